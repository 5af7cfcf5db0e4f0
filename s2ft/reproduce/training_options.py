"""The options that all experiments with training share."""

from dataclasses import dataclass

from s2ft.text.models import DTYPES
from s2ft.train.options import SCHEDULES, check_fields, divide_batch, option


@dataclass(kw_only=True)
class TrainingOptions:
    """Options of an experiment that trains a model. The help text of each field describes it."""

    model: str = option(text="the base model: a folder, a name on the hub, or a .gguf file")
    seeds: list[int] = option([0, 1, 2], "a run for each seed: units, order of rows, validation rows, adapter's start")
    data: str | None = option(None, "folder of the data files")
    limit: int | None = option(None, "use the first N training rows of each task only", least=1)
    test_limit: int | None = option(None, "use the first N rows of each test only", least=1)
    prompt: str | None = option(None, "chat template: a file, or alpaca; null is the tokenizer's own")
    max_length: int = option(1024, "longest row in tokens; longer rows are left out", least=2)
    dtype: str = option("auto", "dtype of the weights", choices=DTYPES)
    epochs: float = option(1.0, "passes over the training rows of a task")
    max_steps: int | None = option(None, "end each task after so many updates; then epochs has no effect", least=1)
    batch_size: int = option(64, "rows of an update", least=1)
    micro_batch_size: int | None = option(None, "rows of a forward pass; null takes a divisor up to 8", least=1)
    schedule: str = option("linear", "schedule of the learning rate of each task", choices=tuple(SCHEDULES))
    warmup_steps: int = option(100, "updates of the warm-up of each task, fewer than it has", least=0)
    weight_decay: float = option(0.0, "weight decay", least=0)
    betas: list[float] = option([0.9, 0.999], "betas of AdamW")
    max_grad_norm: float = option(1.0, "longest gradient; a longer one is shortened", least=0)
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass")
    order: str = option("random", "order of the rows", choices=("random", "group_by_length"))
    num_beams: int = option(1, "beams of generated answers", least=1)
    max_new_tokens: int = option(256, "longest generated answer in tokens", least=1)
    eval_batch_size: int = option(16, "prompts that are answered at once", least=1)

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {self.betas!r}")
        if not self.seeds:
            raise ValueError("seeds needs at least one value")

    @property
    def micro(self) -> int:
        """Rows of a forward pass, also of a calibration."""
        return divide_batch(self.batch_size, 1, self.micro_batch_size)[0]
