"""What to train: one validated dataclass. A new option is one new field; the command line follows."""

import os
import re
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PROJECTIONS = ("q", "k", "v", "o", "u", "g", "d")  # as in s2ft.model.coupling, which imports PyTorch
METRICS = {  # a metric is a row here and a file s2ft/selection/<name>.py
    "random": "at random",
    "weight": "by weight norm",
    "activation": "by activation norm on calibration data",
    "product": "by weight norm times activation norm on calibration data",
    "gradient": "by gradient norm on calibration data",
}
ALLOCATIONS = {  # an allocation is a row here and a file s2ft/selection/allocation_<name>.py
    "uniform": "the same number of units in each layer",
    "global": "the units with the best scores over all layers, so a layer may get none",
}
CHOICES = {
    "selection": tuple(METRICS),
    "order": ("largest", "smallest"),
    "allocation": tuple(ALLOCATIONS),
    "layout": ("permuted", "indexed"),
    "delta_dtype": (None, "float32", "bfloat16", "float16", "float64"),
}
CHOOSING = (
    *(f"{key}_ratio" for key in PROJECTIONS),
    "selection",
    "order",
    "allocation",
    "layers",
    "budget",
    "match_lora_rank",
    "exclude",
)  # what has no use where the units are given
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def _parameters(value: Any) -> int:
    """9.2M → 9,200,000."""
    if isinstance(value, str):
        found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([KMB]?)", value.strip().upper())
        if not found:
            raise ValueError(f"budget must be a number of parameters such as 9.2M or 9200000, got {value!r}")
        value = int(Fraction(found[1]) * SUFFIXES[found[2]])
    _check_positive("budget", value)
    return value


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _names(option: str, value: Any) -> list[str]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise ValueError(f"{option} must be a list of modules' names, such as ['classifier'], got {value!r}")
    names = list(value)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{option} must be a list of at least one module's name, or None, got {value!r}")
    return list(dict.fromkeys(names))


def _units(name: str, value: Any) -> Any:
    """Lists by path, as JSON has them, or the path of a file as text."""
    if value is None:
        return None
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if hasattr(value, "to_dict"):  # a Selection
        return value.to_dict()
    if not isinstance(value, dict):
        raise ValueError(
            f"{name} must be a selection, lists of unit numbers by module path, or the path of a file "
            f"that has them, got {type(value).__name__}"
        )
    return {path: numbers.tolist() if hasattr(numbers, "tolist") else numbers for path, numbers in value.items()}


def _listed(options: dict[str, str]) -> str:
    return ", ".join(f"{name} ({text})" for name, text in options.items())


def _ratio(of: str) -> Any:
    return field(default=0.0, metadata={"help": f"share of {of} to train in each layer, from 0 to 1"})


@dataclass
class S2FTConfig:
    """Which units are trained, how they are chosen, and how they lie in memory.

    Raises: ValueError naming the field when a value cannot be meant.
    """

    q_ratio: float = _ratio("query heads (q_proj)")
    k_ratio: float = _ratio("key heads (k_proj)")
    v_ratio: float = _ratio("value heads (v_proj)")
    o_ratio: float = _ratio("the output projection's heads (o_proj)")
    u_ratio: float = _ratio("FFN channels of up_proj")
    g_ratio: float = _ratio("FFN channels of gate_proj")
    d_ratio: float = _ratio("FFN channels of down_proj")
    selection: str = field(
        default="random",
        metadata={"help": "how units are chosen: " + _listed(METRICS), "choices": CHOICES["selection"]},
    )
    order: str = field(
        default="largest",
        metadata={
            "help": "take the units with the largest or the smallest scores; a random selection has no scores",
            "choices": CHOICES["order"],
        },
    )
    allocation: str = field(
        default="uniform",
        metadata={
            "help": "how units are distributed over the layers: " + _listed(ALLOCATIONS),
            "choices": CHOICES["allocation"],
        },
    )
    budget: int | str | None = field(
        default=None,
        metadata={
            "help": "number of trained parameters, for example 9.2M; the ratios are scaled to it and give only the "
            "proportions"
        },
    )
    match_lora_rank: int | None = field(
        default=None,
        metadata={"help": "train as many parameters as LoRA of this rank on the same projections", "metavar": "RANK"},
    )
    exclude: dict[str, list[int]] | str | None = field(
        default=None,
        metadata={"help": "never choose the units of this selection file or adapter folder", "metavar": "PATH"},
    )
    units: dict[str, list[int]] | str | None = field(
        default=None,
        metadata={
            "help": "train exactly the units of this selection file or adapter folder; ratios and the options that go "
            "with them are not allowed then",
            "metavar": "PATH",
        },
    )
    layout: str = field(
        default="permuted",
        metadata={
            "help": "permuted: the selected units are moved together into one dense slice; indexed: the units stay "
            "where they are",
            "choices": CHOICES["layout"],
        },
    )
    seed: int = field(
        default=0, metadata={"help": "seed of the random selection and of the choice of calibration rows"}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "layers to train", "shown": "all layers"})
    delta_dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of the trained deltas",
            "shown": "the weight's dtype, but at least float32",
            "choices": CHOICES["delta_dtype"],
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "modules to train in full and save with the adapter, for example the new head of a classifier; the "
            "full names of the modules or the last parts of them",
            "metavar": "MODULE",
        },
    )
    ffn_kernel: bool = field(
        default=True,
        metadata={
            "help": "compute act(gate) * up of the FFN in one kernel",
            "off": "compute act(gate) * up of the FFN in separate steps; without this option one kernel computes it",
        },
    )

    def __post_init__(self) -> None:
        for key in PROJECTIONS:
            self._check_ratio(f"{key}_ratio")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        if not isinstance(self.ffn_kernel, bool):
            raise ValueError(f"ffn_kernel must be True or False, got {self.ffn_kernel!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")
        if self.layers is not None:
            self._check_layers()
        if self.modules_to_save is not None:
            self.modules_to_save = _names("modules_to_save", self.modules_to_save)
        if self.budget is not None:
            self.budget = _parameters(self.budget)
        if self.match_lora_rank is not None:
            _check_positive("match_lora_rank", self.match_lora_rank)
        self.exclude, self.units = _units("exclude", self.exclude), _units("units", self.units)
        self._check_together()

    def _check_together(self) -> None:
        if self.budget is not None and self.match_lora_rank is not None:
            raise ValueError("budget and match_lora_rank exclude each other: both say how much is trained")
        if self.allocation == "global" and self.selection == "random":
            raise ValueError(
                "allocation='global' compares scores, and random selection has none: choose another "
                "selection, or allocation='uniform'"
            )
        if self.units is not None:
            defaults = {f.name: f.default for f in fields(self)}
            needless = [name for name in CHOOSING if getattr(self, name) != defaults[name]]
            if needless:
                raise ValueError(f"units says which units are trained, so nothing is left for {', '.join(needless)}")

    def _check_ratio(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
        setattr(self, name, float(value))

    def _check_layers(self) -> None:
        if isinstance(self.layers, (str, bytes)):
            raise ValueError(f"layers must be a list of layer numbers, got {self.layers!r}")
        self.layers = list(self.layers)
        if not self.layers or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.layers):
            raise ValueError(f"layers must be a list of layer numbers from 0, got {self.layers!r}")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers names a layer twice: {self.layers!r}")

    @property
    def ratios(self) -> dict[str, float]:
        """Ratio of every projection that is asked for, by its key."""
        return {key: value for key in PROJECTIONS if (value := getattr(self, f"{key}_ratio")) > 0}

    def delta_dtype_for(self, weight_dtype: "torch.dtype") -> "torch.dtype":
        """float32 under a half-precision weight: updates below its step size would be lost."""
        import torch

        if self.delta_dtype is not None:
            return getattr(torch, self.delta_dtype)
        return torch.promote_types(weight_dtype, torch.float32)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Without modules_to_save where it is None: files of earlier releases don't have it."""
        return {name: value for name, value in asdict(self).items() if name != "modules_to_save" or value is not None}
