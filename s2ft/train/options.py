"""The options of a training run. Each field is an option of the command line."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

AUTOCAST = ("none", "bfloat16", "float16")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainOptions:
    """How to train. The defaults are those of the S²FT paper, where it gives one.

    The help text of each field describes it, see `s2ft finetune --help`.

    Raises:
        ValueError: A value is out of range. The message names the field.

    Example:
        >>> from s2ft.train.options import TrainOptions
        >>> options = TrainOptions(epochs=2, batch_size=32)
        >>> options.steps(rows=1000), options.accumulation(devices=2)
        (64, 2)
    """

    learning_rate: float = _option(
        2e-4, "peak learning rate; the paper takes 2e-4 for commonsense and 1e-3 for arithmetic"
    )
    epochs: float = _option(3.0, "passes over the data")
    max_steps: int = _option(-1, "number of updates; overrules epochs if positive")
    batch_size: int = _option(64, "rows of one update, over all devices")
    micro_batch_size: int = _option(
        8, "rows of one forward pass on one device; gradients are accumulated to batch_size"
    )
    warmup_steps: int = _option(100, "steps of linear warm-up, at most a tenth of all steps")
    schedule: str = _option(
        "linear", "learning-rate schedule after warm-up, by transformers' name: linear, cosine, constant_with_warmup …"
    )
    weight_decay: float = _option(0.0, "AdamW's weight decay, on the deltas")
    max_grad_norm: float = _option(1.0, "clip the gradient's norm to this; 0: don't")
    max_length: int = _option(1024, "longest row in tokens; a longer one is left out and counted")
    dtype: str = _option("auto", "dtype of the model's weights: auto (the checkpoint's), float32, bfloat16, float16")
    optimizer: str = _option(
        "adamw_torch_fused",
        "by transformers' name: adamw_torch_fused, sgd, adafactor, adamw_8bit and paged_adamw_8bit (bitsandbytes) …",
    )
    autocast: str = _option(
        "none",
        "multiply in bfloat16 or float16 (float16 with a loss scaler, on a GPU) while the "
        "weights stay in their dtype; none: in the weights' dtype",
    )
    gradient_checkpointing: bool = _option(False, "trade time for memory: compute activations again in backward")
    compile: bool = _option(False, "compile the model with torch.compile")
    chunked_loss: bool = _option(
        True,
        "compute the loss in pieces, without keeping logits, where that is the model's own loss; said if it is not",
    )
    log_steps: int = _option(1, "updates between lines of log.jsonl")
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": "further loggers, by transformers' name: tensorboard, wandb …, where they are installed"},
    )
    eval_steps: int = _option(0, "updates between evaluations on the evaluation data; 0: at the end only")
    save_steps: int = _option(200, "updates between checkpoints; 0: none")
    keep_checkpoints: int = _option(2, "checkpoints kept, the newest; 0: all")
    stop_after: int = _option(0, "stop at this update with a checkpoint, for --resume to go on from; 0: run to the end")
    data_seed: int = _option(42, "seed of the order of the data and of dropout")

    def __post_init__(self) -> None:
        for name, least in {
            "batch_size": 1,
            "micro_batch_size": 1,
            "warmup_steps": 0,
            "weight_decay": 0,
            "max_grad_norm": 0,
            "max_length": 2,
            "log_steps": 1,
            "save_steps": 0,
            "keep_checkpoints": 0,
            "data_seed": 0,
            "eval_steps": 0,
            "stop_after": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("learning_rate", "epochs", "weight_decay", "max_grad_norm"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.max_steps <= 0 and not self.epochs > 0:
            raise ValueError(f"epochs must be positive, got {self.epochs}")
        if self.autocast not in AUTOCAST:
            raise ValueError(f"autocast must be one of {', '.join(AUTOCAST)}, got {self.autocast!r}")

    def accumulation(self, devices: int) -> int:
        """Return the number of forward passes of one update on one device.

        Args:
            devices: Number of devices.

        Raises:
            ValueError: `batch_size` is not a multiple of `micro_batch_size` times `devices`.
        """
        at_once = self.micro_batch_size * devices
        if self.batch_size % at_once:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size "
                f"{self.micro_batch_size} times {devices} devices"
            )
        return self.batch_size // at_once

    def steps(self, rows: int) -> int:
        """Return the number of updates of a run over a number of rows."""
        return self.max_steps if self.max_steps > 0 else max(1, math.ceil(-(-rows // self.batch_size) * self.epochs))

    def warmup(self, steps: int) -> int:
        """Return the number of warm-up steps in a run of `steps` updates.

        It is at most a tenth of them. Otherwise a short run would end before it reaches its learning rate.
        """
        return min(self.warmup_steps, steps // 10)

    def to_dict(self) -> dict[str, Any]:
        """The options by name."""
        return asdict(self)


# options that may differ when a run is resumed
NOT_PART_OF_A_RUN = ("log_steps", "report_to", "eval_steps", "save_steps", "keep_checkpoints", "stop_after")
