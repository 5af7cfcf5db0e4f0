"""What to train: one validated dataclass. A new option is one new field; the command line follows."""
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional

import torch

from s2ft.coupling import PROJECTIONS

DELTA_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16,
                "float16": torch.float16, "float64": torch.float64}
CHOICES = {
    "selection": ("random", "weight", "activation", "product", "gradient"),
    "order": ("largest", "smallest"),
    "allocation": ("uniform",),
    "layout": ("permuted", "indexed"),
    "delta_dtype": (None, *DELTA_DTYPES),
}


def _ratio(of: str) -> Any:
    return field(default=0.0, metadata={"help": f"share of {of} to train in every layer, 0 to 1"})


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
    selection: str = field(default="random", metadata={
        "help": "how units are chosen: random; or by weight norm, activation norm, their product, or gradient norm, the "
                "last three on calibration data"})
    order: str = field(default="largest", metadata={"help": "which end of a metric's ranking is taken; "
                                                            "random selection has none"})
    allocation: str = field(default="uniform", metadata={"help": "uniform: the same number in every layer"})
    layout: str = field(default="permuted", metadata={"help": "permuted: the units become one dense slice; "
                                                              "indexed: they stay where they are"})
    seed: int = field(default=0, metadata={"help": "seed of the random selection"})
    layers: Optional[List[int]] = field(default=None, metadata={"help": "layers to train; default: all"})
    delta_dtype: Optional[str] = field(default=None, metadata={
        "help": "dtype of the trained deltas; default: the weight's, but at least float32"})
    fuse_ffn: bool = field(default=True, metadata={"help": "compute act(gate) * up in one pass each way"})

    def __post_init__(self) -> None:
        for key in PROJECTIONS:
            self._check_ratio(f"{key}_ratio")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        if not isinstance(self.fuse_ffn, bool):
            raise ValueError(f"fuse_ffn must be True or False, got {self.fuse_ffn!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")
        if self.layers is not None:
            self._check_layers()

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
    def ratios(self) -> Dict[str, float]:
        """Ratio of every projection that is asked for, by its key."""
        return {key: value for key in PROJECTIONS if (value := getattr(self, f"{key}_ratio")) > 0}

    def delta_dtype_for(self, weight_dtype: torch.dtype) -> torch.dtype:
        """float32 under a half-precision weight: updates below its step size would be lost."""
        if self.delta_dtype is not None:
            return DELTA_DTYPES[self.delta_dtype]
        return torch.promote_types(weight_dtype, torch.float32)

    def to_dict(self) -> Dict[str, Any]:
        return asdict(self)
