"""PEFT's method comparison: a model learns MetaMathQA and is tested on GSM8K, by the protocol of PEFT's script.

`python -m bench.experiments metamath --model MODEL --data DIR` makes the runs, `... --set peft=DIR` writes the rows of
S²FT as experiments for PEFT's own run.py. A run that is stopped goes on from its checkpoint, on a CPU to the same bits.
docs/reproduce.md says where the protocol differs from PEFT's script.
"""

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from decimal import Decimal
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, get_cosine_schedule_with_warmup

import s2ft
from bench.experiments.matched_methods import matched, trained_parameters
from bench.experiments.memory import size_of_process
from bench.experiments.printing import Column, Table, cell_of, failures
from bench.experiments.runner import ExperimentRun, Results, Stage, check_names, file_digest
from s2ft.packages import check_packages
from s2ft.text.collator import TokenCollator, needs_calibration
from s2ft.text.divergence import mean_loss
from s2ft.text.encoding import padded_batch
from s2ft.text.evaluation import TOLERANCE, last_number
from s2ft.text.generation import generation_mode
from s2ft.text.models import hollow_model, load_model
from s2ft.train.device import gpu_or_cpu
from s2ft.train.tuners import TUNERS, Prepared, prepare

logger = logging.getLogger(__name__)
KEYS = ("settings", "rows", "seeds", "rates", "peft")
NEEDED = ("rows", "seeds")
SETTINGS = (
    "model", "dtype", "data", "parameters", "max_length", "batch_size", "steps", "eval_steps", "answer_batch",
    "weight_decay", "max_grad_norm", "gradient_checkpointing", "query", "max_new_tokens", "longest_answer", "test_rows",
)  # fmt: skip
ROW = ("method", "options", "parameters", "rates", "title")
BUCKET = 20  # batches whose rows are sorted by length together
LONGEST = 1300  # characters of a training row
TEXTS, PROTECTED, VALIDATION, CALIBRATION = 100, 128, 50, 128  # texts of the encyclopedia, problems, training rows
WARM_UP = 0.1  # of the steps
RANK = 32  # without `parameters` the size of all methods is that of LoRA of this rank on q_proj and v_proj, as in PEFT


# ---- the plan --------------------------------------------------------------------------------------------


def stages(experiment: dict[str, Any]) -> list[Stage]:
    """Check the experiment; the runs are one rate of each row after the other, and each has a process of its own."""
    check_packages("s2ft.peft")
    if experiment.get("peft"):
        for folder in write_for_peft(experiment, Path(experiment["peft"])):
            print(folder)
    found = runs(experiment)
    return [Stage(found, alone=True, fresh=True)]


def runs(experiment: dict[str, Any]) -> list[ExperimentRun]:
    """Return the runs."""
    settings, rows = experiment["settings"], experiment["rows"]
    if "{query}" not in settings["query"]:
        raise ValueError(f"query must contain {{query}}, got {settings['query']!r}")
    if settings.get("parameters") is None:
        options = {"r": RANK, "target_modules": ["q_proj", "v_proj"]}
        settings = {**settings, "parameters": trained_parameters(hollow_model(settings["model"]), "lora", options)}
    settings = {**settings, "files": [file_digest(file) for file in files_of(settings.get("data"))]}
    for name, row in rows.items():
        check_names(f"row {name}, method", [row.get("method")], TUNERS)
    rates = {name: row.get("rates") or experiment["rates"] for name, row in rows.items()}
    found = []
    for seed in experiment["seeds"]:
        for number in range(max(map(len, rates.values()))):
            for name, row in ((name, row) for name, row in rows.items() if number < len(rates[name])):
                labels = {"method": name, "rate": float(rates[name][number]), "seed": seed}
                own = {key: row[key] for key in ("method", "options", "parameters") if key in row}
                own |= {"row": name, "rate": labels["rate"], "seed": seed}
                found.append(ExperimentRun(labels, {**settings, "options": {}, **own}))
    return found


def write_for_peft(experiment: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Write each row of S²FT at each rate as an experiment in PEFT's form: FOLDER/s2ft/NAME.

    A row whose selection reads data gets the numbers of its units, chosen on the real model, so that PEFT's script
    needs no data for them.
    """
    from s2ft.peft import S2FTPeftConfig

    settings, known = experiment["settings"], None
    for name, row in experiment["rows"].items():
        if row["method"] != "s2ft":
            continue
        options = dict(row.get("options", {}))
        if "protect_ratio" in options or needs_calibration(s2ft.S2FTConfig(**options)):
            known = known or _LoadedModel(settings)
            units = s2ft.select(known.model, s2ft.S2FTConfig(**options), **known.batches(options))
            options = {"units": units, "info": {"chosen_by": options}}
        narrow = options.pop("delta_dtype", None) is not None  # PEFT's name of a narrow adapter is another one
        for rate in row.get("rates") or experiment["rates"]:
            place = folder / "s2ft" / f"{Path(settings['model']).name.lower()}-{name}-lr_{float(rate):g}"
            S2FTPeftConfig(task_type="CAUSAL_LM", **options).save_pretrained(place)
            changes = {"optimizer_kwargs": {"lr": float(rate), "weight_decay": settings["weight_decay"]}}
            changes |= {"autocast_adapter_dtype": False} if narrow else {}
            (place / "training_params.json").write_text(json.dumps(changes, indent=2) + "\n")
            yield place


# ---- the data --------------------------------------------------------------------------------------------

# Each set: the fields that are read, its name and config on the hub, and where the hub's own files lie in a folder
SETS = {
    "metamathqa": (("query", "response"), "meta-math/MetaMathQA", None, "metamathqa/MetaMathQA*.json"),
    "gsm8k-train": (("question", "answer"), "openai/gsm8k", "main", "gsm8k/main/train-*.parquet"),
    "gsm8k-test": (("question", "answer"), "openai/gsm8k", "main", "gsm8k/main/test-*.parquet"),
    "encyclopedia": (("text",), "HuggingFaceFW/finewiki", None, "finewiki/**/*.parquet"),
}


def files_of(folder: str | None) -> list[Path]:
    """Return the file of each set in a folder: SET.jsonl, or the hub's own. Without a folder there are none.

    Raises:
        FileNotFoundError: The folder has no file of a set.
    """
    found = []
    for name, (_, _, _, pattern) in SETS.items() if folder else ():
        own = Path(folder) / f"{name}.jsonl"
        found += [own] if own.is_file() else sorted(Path(folder).glob(pattern))[:1]
        if not found or len(found) < list(SETS).index(name) + 1:
            raise FileNotFoundError(f"{folder} has neither {name}.jsonl nor {pattern}")
    return found


def rows_of(name: str, folder: str | None) -> Iterator[tuple[str, ...]]:
    """Yield the fields of each row of a set, of a folder or of the hub.

    Raises:
        ValueError: A field is no text.
    """
    from datasets import load_dataset

    keys, hub, config, _ = SETS[name]
    if folder is None:
        split = "test" if name.endswith("test") else "train"
        rows: Iterable[dict] = load_dataset(hub, config, split=split, streaming=name == "encyclopedia")
    else:
        file = dict(zip(SETS, files_of(folder)))[name]
        kind = "parquet" if file.suffix == ".parquet" else "json"
        rows = load_dataset(kind, data_files=str(file), split="train", streaming=True)
    for number, row in enumerate(rows):
        lacking = [key for key in keys if not isinstance(row.get(key), str)]
        if lacking:
            raise ValueError(
                f"{name}, row {number}: field {lacking[0]!r} must be text; it has {', '.join(sorted(row))}"
            )
        yield tuple(row[key] for key in keys)


class Data:
    """The texts of a run, as PEFT's comparison reads them.

    MetaMathQA's rows keep their order, without those of more than 1,300 characters. The validation set is 50 random
    problems of GSM8K's training set, always the same.

    Args:
        settings: The settings of the run.
        needed: Number of training rows that are needed; a whole bucket is read, because its longest rows come first.
    """

    def __init__(self, settings: dict[str, Any], needed: int) -> None:
        folder, bucket = settings.get("data"), settings["batch_size"] * BUCKET
        short = (pair for pair in rows_of("metamathqa", folder) if len(" ".join(pair)) <= LONGEST)
        self.training = list(islice(short, -(-needed // bucket) * bucket))
        if len(self.training) < needed:
            raise ValueError(
                f"training takes {needed:,} rows, and metamathqa has {len(self.training):,} short ones: lower steps"
            )
        candidates = list(rows_of("gsm8k-train", folder))
        order = np.random.RandomState(0).permutation(len(candidates))
        self.validation = [candidates[number] for number in order[:VALIDATION]]
        self.test = list(islice(rows_of("gsm8k-test", folder), settings.get("test_rows")))
        texts = [text for (text,) in islice(rows_of("encyclopedia", folder), TEXTS + PROTECTED)]
        self.texts, self.protected = texts[:TEXTS], texts[TEXTS:]


def batches_of(rows: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Divide rows of token ids into batches. The rows of 20 batches are sorted by length, the longest first."""
    for first in range(0, len(rows), size * BUCKET):
        bucket = rows[first : first + size * BUCKET]
        order = torch.tensor([len(row) for row in bucket]).argsort(descending=True).tolist()
        for start in range(0, len(order), size):
            yield [bucket[number] for number in order[start : start + size]]


def tensors_of(rows: list[list[int]], end: int) -> dict[str, Tensor]:
    """Pad rows on the right with the end token, and label all tokens and the first end token of each row.

    The longest row of a batch has no end token, as in PEFT's comparison.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
    position, lengths = torch.arange(longest), torch.tensor([[len(row)] for row in rows])
    labels = ids.masked_fill(position > lengths, -100)
    return {"input_ids": ids, "attention_mask": (position < lengths).long(), "labels": labels}


# ---- answers ---------------------------------------------------------------------------------------------

# In this order, because a text is searched for the first phrase that it has. "#### " is GSM8K's own mark.
PHRASES = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def answer_in(text: str) -> str | None:
    """Return what follows the last phrase that announces an answer, to the end of the line, by PEFT's rules.

    Example:
        >>> from bench.experiments.metamath import answer_in
        >>> answer_in("2 + 2 makes $4.The answer is: $4."), answer_in("I think it is 4.")
        ('4', None)
    """
    text = text.strip().rstrip(".!?")
    phrase = next((phrase for phrase in PHRASES if phrase in text), None)
    return None if phrase is None else text.rpartition(phrase)[2].strip().split("\n")[0].strip(" .!?$%")


def number_of(text: str) -> float | None:
    """Return the number that a text is, decimal or a fraction; None for another text, such as 1,200."""
    above, line, below = text.partition("/")
    try:
        value = Decimal(above.strip())
        return float(value / Decimal(below.strip()) if line else value)
    except (ArithmeticError, ValueError):
        return None


def is_right(text: str, right: str) -> bool:
    """Whether a generated text has the right answer, by PEFT's rules: as a number, or else as text.

    Raises:
        ValueError: The worked answer of the set has no answer.
    """
    expected, found = answer_in(right), answer_in(text)
    if expected is None:
        raise ValueError(f"the set's answer has none of {', '.join(map(repr, PHRASES))}: {right[:80]!r}")
    if found is None:
        return False
    numbers = number_of(expected), number_of(found)
    return numbers[0] == numbers[1] if None not in numbers else numbers == (None, None) and expected == found


def has_number(text: str, right: str) -> bool:
    """Whether the last number of a text is the right one, as `s2ft eval` counts it: 1,200 is 1200."""
    found, expected = last_number(text), last_number(right)
    return None not in (found, expected) and abs(found - expected) <= TOLERANCE


# ---- a run -----------------------------------------------------------------------------------------------


class _LoadedModel:
    """A base model with its tokenizer, which pads with the end token, and the texts of a run."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.data = Data(settings, settings["steps"] * settings["batch_size"])
        self.model, self.tokenizer = load_model(settings["model"], settings["dtype"], device_map=str(gpu_or_cpu()))
        self.end = self.tokenizer.eos_token_id
        if self.end is None:
            raise ValueError(f"the tokenizer of {settings['model']} has no end token, by which answers end")
        self.tokenizer.pad_token = self.tokenizer.eos_token
        if settings.get("gradient_checkpointing"):
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable()
        self.rows = self.encoded([settings["query"].format(query=one) + answer for one, answer in self.data.training])

    def encoded(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of texts, cut at `max_length`."""
        return [ids[: self.settings["max_length"]] for ids in self.tokenizer(texts)["input_ids"]] if texts else []

    def batches(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the data that a selection of units needs, as arguments of :func:`s2ft.select`."""
        config, needed = s2ft.S2FTConfig(**options), {}
        if needs_calibration(config):
            needed["calibration"] = self._collated(self.rows[:CALIBRATION])
        if config.protect_ratio is not None:
            if not self.data.protected:
                raise ValueError(
                    f"protect_ratio needs more than {TEXTS} texts of the encyclopedia: on those forgetting is measured"
                )
            needed["protect"] = self._collated(self.encoded(self.data.protected))
        return needed

    def _collated(self, rows: list[list[int]]) -> list[dict[str, Any]]:
        collate, size = TokenCollator(self.end), self.settings["batch_size"]
        parts = (rows[first : first + size] for first in range(0, len(rows), size))
        return [collate([{"input_ids": row, "labels": row} for row in part]) for part in parts]


def measure(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Train and test one method.

    Args:
        settings: The settings of the run.
        folder: The folder of its checkpoint, from which a stopped run goes on, and of its answers.

    Returns:
        One row: accuracies as shares, `forgetting` in nats a token, memory in bytes, times in seconds.
    """
    torch.manual_seed(settings["seed"])
    on_gpu = gpu_or_cpu().type == "cuda"
    memory = 0 if on_gpu else size_of_process("VmRSS")
    loaded = _LoadedModel(settings)
    prepared = _prepared(loaded, settings)
    trainer = Trainer(loaded, prepared, settings, folder / "checkpoint.pt")
    if trainer.before is None:
        with base_values(prepared):
            trainer.before = _loss(loaded, prepared)
    trainer.run()
    start = time.perf_counter()
    answers = answers_of(loaded, prepared.model, loaded.data.test, folder / "answers.json")
    right = [one for _, one in loaded.data.test]
    row = {
        "accuracy": sum(map(is_right, answers, right)) / len(right),
        "accuracy_of_numbers": sum(map(has_number, answers, right)) / len(right),
        "forgetting": _loss(loaded, prepared) - trainer.before,
        "validation": trainer.validation,
        "train_loss": fmean(trainer.losses[-settings["eval_steps"] :]),
        "trained": prepared.trainable,
        "file_bytes": size_of_adapter(prepared),
        "memory_bytes": torch.cuda.max_memory_reserved() if on_gpu else size_of_process("VmHWM") - memory,
        "training_seconds": sum(trainer.durations),
        "test_seconds": time.perf_counter() - start,
        "tokens_per_second": sum(trainer.tokens) / sum(trainer.durations),
    }
    trainer.checkpoint.unlink(missing_ok=True)
    return [row]


def _prepared(loaded: _LoadedModel, settings: dict[str, Any]) -> Prepared:
    method, options = settings["method"], dict(settings["options"])
    if method == "full":
        return prepare(loaded.model, method)
    options = matched(loaded.model, method, settings["parameters"], options)
    more = loaded.batches(options) if method == "s2ft" else {}
    return prepare(loaded.model, method, options, seed=settings["seed"], **more)


def base_values(prepared: Prepared):
    """A context in which the model computes what its base does. Before a full fine-tuning that is the model itself."""
    if prepared.method == "full":
        return nullcontext()
    return (
        prepared.model.disable_adapter()
        if hasattr(prepared.model, "peft_config")
        else s2ft.disable_adapters(prepared.model)
    )


def size_of_adapter(prepared: Prepared) -> int:
    """Return the size of the saved adapter in bytes; for full fine-tuning that of all weights, which are not saved."""
    if prepared.method == "full":
        return sum(each.numel() * each.element_size() for each in prepared.model.parameters())
    with tempfile.TemporaryDirectory() as place:
        if hasattr(prepared.model, "peft_config"):
            prepared.model.save_pretrained(place)
        else:
            s2ft.save_adapter(prepared.model, place)
        return sum(file.stat().st_size for file in Path(place).rglob("*.safetensors"))


def _loss(loaded: _LoadedModel, prepared: Prepared) -> float:
    """Mean loss on the encyclopedia, in nats a token."""
    rows = [{"input_ids": ids, "labels": ids} for ids in loaded.encoded(loaded.data.texts)]
    return mean_loss(prepared.model, rows, loaded.settings["batch_size"])


class Trainer:
    """The training of PEFT's script. It saves a checkpoint after each validation, and goes on from one that it finds.

    Args:
        loaded: The base with the data.
        prepared: The model to train.
        settings: The settings of the run.
        checkpoint: The file of the checkpoint.
    """

    KEPT = ("step", "losses", "durations", "tokens", "validation", "before")

    def __init__(self, loaded: _LoadedModel, prepared: Prepared, settings: dict[str, Any], checkpoint: Path) -> None:
        self.loaded, self.model, self.settings, self.checkpoint = loaded, prepared.model, settings, checkpoint
        self.trained = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=settings["rate"], weight_decay=settings["weight_decay"]
        )
        warmup = int(WARM_UP * settings["steps"])
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, settings["steps"])
        self.step, self.before = 0, None
        self.losses, self.durations, self.tokens, self.validation = [], [], [], []
        if checkpoint.is_file():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            with torch.no_grad():
                for name, each in self.trained.items():
                    each.copy_(state["trained"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            torch.set_rng_state(state["random"][0])
            if state["random"][1]:
                torch.cuda.set_rng_state_all(state["random"][1])
            for name in self.KEPT:
                setattr(self, name, state[name])
            logger.info("going on after step %d", self.step)

    def save(self) -> None:
        """Write the checkpoint in one step."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "trained": {name: each.detach() for name, each in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": [torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []],
            **{name: getattr(self, name) for name in self.KEPT},
        }
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)

    def run(self) -> None:
        """Train to the last step.

        Raises:
            FloatingPointError: The loss is no number.
        """
        settings = self.settings
        batches = list(batches_of(self.loaded.rows, settings["batch_size"]))[: settings["steps"]]
        self.model.train()
        while self.step < settings["steps"]:
            start = time.perf_counter()
            self._step(batches[self.step])
            self.durations.append(time.perf_counter() - start)
            if self.step % settings["eval_steps"] == 0:
                pairs = self.loaded.data.validation
                answers = answers_of(self.loaded, self.model, pairs)
                self.validation.append(sum(map(is_right, answers, (one for _, one in pairs))) / len(pairs))
                self.model.train()
                self.save()

    def _step(self, rows: list[list[int]]) -> None:
        batch = {name: one.to(self.model.device) for name, one in tensors_of(rows, self.loaded.end).items()}
        self.optimizer.zero_grad()
        loss = self.model(**batch, num_items_in_batch=batch["attention_mask"].sum().item()).loss
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss of step {self.step + 1} is {loss.item()}: lower the learning rate")
        loss.backward()
        if self.settings["max_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), self.settings["max_grad_norm"])
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.tokens.append(sum(map(len, rows)) + len(rows))
        self.step += 1
        if torch.cuda.is_available() and self.step % 10 == 0:
            torch.cuda.empty_cache()


def answers_of(loaded: _LoadedModel, model: Any, pairs: list[tuple[str, str]], file: Path | None = None) -> list[str]:
    """Let a model answer problems, greedily.

    Args:
        loaded: The tokenizer and the settings.
        model: The model.
        pairs: Questions and worked answers. Only the questions are used.
        file: File in which the texts are kept, so that a stopped run goes on.
    """
    settings = loaded.settings
    prompts = loaded.encoded([settings["query"].format(query=question) for question, _ in pairs])
    texts = json.loads(file.read_text("utf-8")) if file and file.is_file() else []
    while len(texts) < len(prompts):
        batch = padded_batch(prompts[len(texts) : len(texts) + settings["answer_batch"]], loaded.end)
        batch.pop("position_ids")  # model.generate computes the same positions from the mask
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        length = batch["input_ids"].shape[1]
        config = GenerationConfig(
            max_length=min(settings["longest_answer"], length + settings["max_new_tokens"]), do_sample=False,
            temperature=1.0, top_p=1.0, top_k=50, pad_token_id=loaded.end,  # the model's own would warn
        )  # fmt: skip
        with generation_mode(model):
            output = model.generate(**batch, generation_config=config)
        texts += loaded.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(texts), "utf-8")
    return texts


# ---- tables ----------------------------------------------------------------------------------------------

MEASURED = (
    Column("accuracy", "test accuracy %", ".1f"), Column("forgetting", "forgetting (nats)", ".3f"),
    Column("memory", "memory max (GB)", ".1f"), Column("training_seconds", "training (s)", ".0f"),
    Column("time", "with test (s)", ".0f"), Column("tokens_per_second", "tokens/s", ".0f"),
    Column("trained_m", "trained (M)", ".2f"), Column("file", "file (MB)", ".1f"),
)  # fmt: skip


def tables(experiment: dict[str, Any], results: Results) -> list[Table]:
    """Return the table of all runs, and that of each row at the rate with the best validation accuracy."""
    every, groups = runs(experiment), {}
    for run in every:
        groups.setdefault((run.labels["method"], run.labels["rate"]), []).extend(results.rows(run))
    rows, best = [], {}
    for (method, rate), found in groups.items():
        shown = [_shown(row) for row in found]
        cells = [method, rate, *(cell_of([row[column.name] for row in shown]) for column in MEASURED)]
        rows.append(cells)
        # the mean of the last quarter of the validations, not of the test
        last = [fmean(row["validation"][-max(1, len(row["validation"]) // 4) :]) for row in found if row["validation"]]
        if last and fmean(last) > best.get(method, (-1.0, []))[0]:
            best[method] = (fmean(last), cells)
    columns = [Column("method"), Column("rate", "learning rate"), *MEASURED]
    notes = ["memory: above what the process held before; on a GPU what PyTorch has reserved"]
    title = "Each method at the learning rate with the best validation accuracy"
    return [
        Table("all", "All runs", columns, rows, [*notes, *failures(every, results)]),
        Table("best", title, columns, [cells for _, cells in best.values()], notes),
    ]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "accuracy": 100 * row["accuracy"],
        "memory": row["memory_bytes"] / 1e9,
        "time": row["training_seconds"] + row["test_seconds"],
        "trained_m": row["trained"] / 1e6,
        "file": row["file_bytes"] / 1e6,
    }
