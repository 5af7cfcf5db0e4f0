"""The settings of a run, and the folders of experiments in which PEFT keeps them."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from s2ft.reproduce.methods import METHODS

DEFAULTS = Path(__file__).parents[1] / "default_training_params.json"
PEFT_CONFIG, TRAINING_PARAMS = "adapter_config.json", "training_params.json"
DTYPES = ("float32", "float16", "bfloat16")
UNUSED = {"compile": False, "use_amp": False, "init_kv_cache_prefix": None, "optimizer_type": "AdamW"}
POSITIVE = ("max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps")


@dataclass(frozen=True)
class TrainingParams:
    """How a model is trained and evaluated. The fields have the names and meanings of PEFT's `training_params.json`.

    Attributes:
        model_id: A name on the hub, or a folder with a checkpoint.
        dtype: Dtype of the base's weights: "float32", "float16" or "bfloat16".
        max_seq_length: Longest text in tokens; longer ones are cut.
        batch_size: Rows of a training step.
        batch_size_eval: Problems that are answered at once.
        max_steps: Number of training steps.
        eval_steps: Steps between two validations.
        use_gc: Whether activations are computed again in the backward (gradient checkpointing).
        seed: Seed of PyTorch and of the selection.
        grad_norm_clip: Largest norm of the gradients; 0 does not clip.
        optimizer_kwargs: Arguments of `torch.optim.AdamW`.
        lr_scheduler: "cosine" (with a warm-up of a tenth of the steps) or None (a constant rate).
        autocast_adapter_dtype: Whether PEFT keeps the adapter in float32.
        attn_implementation: Attention of transformers; None is its default.
        generation_kwargs: Arguments of `GenerationConfig`. With both `max_length` and `max_new_tokens` the smaller
            limit holds. `do_sample` null takes the model's own setting.
        query_template: The prompt, with the word {query}.
        compile: Must be False.
        use_amp: Must be False.
        init_kv_cache_prefix: Must be None.
        optimizer_type: Must be "AdamW".

    Raises:
        ValueError: A value is not allowed; the message names the field.
    """

    model_id: str
    dtype: str
    max_seq_length: int
    batch_size: int
    batch_size_eval: int
    max_steps: int
    eval_steps: int
    compile: bool
    use_gc: bool
    seed: int
    grad_norm_clip: float
    optimizer_type: str
    optimizer_kwargs: dict[str, Any]
    lr_scheduler: str | None
    use_amp: bool
    autocast_adapter_dtype: bool
    attn_implementation: str | None
    generation_kwargs: dict[str, Any]
    query_template: str
    init_kv_cache_prefix: str | None

    def __post_init__(self) -> None:
        for name, value in UNUSED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be {value!r} here, got {getattr(self, name)!r}: use PEFT's own run.py")
        for name in POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}: s2ft sft trains in 4 bit")
        if self.eval_steps > self.max_steps:
            raise ValueError(f"eval_steps must be at most max_steps ({self.max_steps}), got {self.eval_steps}")
        if self.lr_scheduler not in ("cosine", None):
            raise ValueError(f"lr_scheduler must be 'cosine' or null, got {self.lr_scheduler!r}")
        if "{query}" not in self.query_template:
            raise ValueError(f"query_template must contain {{query}}, got {self.query_template!r}")
        if not self.optimizer_kwargs.get("lr", 0) > 0:
            raise ValueError(f"optimizer_kwargs must have lr above 0, got {self.optimizer_kwargs!r}")

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.optimizer_kwargs["lr"]


@dataclass(frozen=True)
class Run:
    """One run: what is trained, and how.

    Attributes:
        name: "METHOD/NAME", as the experiment's folder.
        params: How the model is trained and evaluated.
        adapter: The content of `adapter_config.json`, or None.
        method: A method of `s2ft.reproduce.methods`, if there is no `adapter`; "full" trains all weights.
        options: Options of the method.
    """

    name: str
    params: TrainingParams
    adapter: dict[str, Any] | None = None
    method: str = "full"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name.count("/") != 1 or self.name != self.name.strip("/"):
            raise ValueError(f"name must be METHOD/NAME, got {self.name!r}")
        if self.adapter is None and self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")

    @property
    def file_name(self) -> str:
        """Name of the run's result, as PEFT names it: METHOD--NAME.json."""
        return self.name.replace("/", "--") + ".json"

    def to_dict(self) -> dict[str, Any]:
        """Return the run for JSON."""
        params = {one.name: getattr(self.params, one.name) for one in fields(self.params)}
        return {**{one.name: getattr(self, one.name) for one in fields(self)}, "params": params}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Run":
        """Return the run of :meth:`to_dict`."""
        return cls(**{**values, "params": TrainingParams(**values["params"])})


def training_params(changes: dict[str, Any], where: str = "options") -> TrainingParams:
    """Return the default parameters with changes.

    Args:
        changes: Values by field. A value replaces the default whole, as in PEFT: `optimizer_kwargs` with a rate only
            has the weight decay of `torch.optim.AdamW`.
        where: Where the changes stand, for errors.

    Returns:
        The parameters.

    Raises:
        ValueError: A field does not exist, or has a value that is not allowed.
    """
    unknown = sorted(set(changes) - {one.name for one in fields(TrainingParams)})
    if unknown:
        raise ValueError(f"{where}: there is no training parameter {', '.join(unknown)}")
    return TrainingParams(**{**json.loads(DEFAULTS.read_text(encoding="utf-8")), **changes})


def read_experiment(folder: Path, changes: dict[str, Any]) -> Run:
    """Read an experiment's folder, as PEFT's `run.py` does.

    Args:
        folder: experiments/METHOD/NAME with `adapter_config.json` (none means full fine-tuning), and with
            `training_params.json` where parameters differ from the defaults.
        changes: Parameters that differ from both.

    Returns:
        The run.

    Raises:
        ValueError: The folder is no experiment, or a file has values that are not allowed.
    """
    folder = folder.resolve()
    if not (folder / PEFT_CONFIG).is_file() and not (folder / TRAINING_PARAMS).is_file():
        raise ValueError(f"{folder} is no experiment: it has neither {PEFT_CONFIG} nor {TRAINING_PARAMS}")
    if folder.parent.parent.name != "experiments":
        raise ValueError(f"an experiment's folder must be …/experiments/METHOD/NAME, got {folder}")
    adapter = _json(folder / PEFT_CONFIG) if (folder / PEFT_CONFIG).is_file() else None
    own = _json(folder / TRAINING_PARAMS) if (folder / TRAINING_PARAMS).is_file() else {}
    return Run(f"{folder.parent.name}/{folder.name}", training_params({**own, **changes}, folder.name), adapter)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
