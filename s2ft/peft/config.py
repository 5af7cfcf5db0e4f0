"""S2FTConfig with PEFT's habits: what to train, which modules, and, once injected, which units."""

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from peft import PeftType
from peft.config import PeftConfig

from s2ft.config import CHOOSING, S2FTConfig
from s2ft.selection import METRICS, Selection

TYPE = "S2FT"
DIMS = ("outputs", "inputs")  # of a weight's dim 0 and 1
MOST = 2**24  # units a module can have, in a range that a file writes as 0-9


@dataclass
class S2FTPeftConfig(PeftConfig, S2FTConfig):
    """What to train, in one of three ways:

    - ``d_ratio=0.03, o_ratio=0.1, …``, for the model families that s2ft knows: the same units as :func:`s2ft.attach`
      trains by the same options. ``layers``, ``exclude_modules`` and ``layers_to_transform`` narrow it down.
    - ``target_modules=["down_proj"], ratio=0.03``: that share of the units of each of these modules. In a known family
      the units are the projection's heads or channels; of modules outside any coupling they are single outputs or
      inputs, as ``dim`` says.
    - ``units={"model.layers.0.mlp.down_proj": [3, 17], …}``, as a selection, lists, or the file of one: exactly these.
      So go selections that need calibration: ``units=s2ft.select(model, config, calibration)``.

    Units are chosen when the adapter is injected, and the config then names them (`units`) instead of what they were
    chosen by (`chosen_by`), so that what is saved has them, and loading chooses nothing. Used again, on another base or
    with another seed, it means what it was made with: the further adapter gets a copy.

    Deltas have the dtype of their weight or, with PEFT's ``autocast_adapter_dtype``, float32 on a half-precision one.
    Raises: ValueError naming the field when a value or a combination can't be meant.
    """

    layout: ClassVar[str] = "indexed"  # of S2FTConfig; weights stay where they are
    ffn_kernel: ClassVar[bool] = False
    delta_dtype: ClassVar[None] = None
    sites: ClassVar[dict[str, Any] | None] = None  # once injected: s2ft.peft.units.Site by module
    asked: ClassVar[dict[str, tuple] | None] = None  # what it was made with, and has instead now, by field

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "modules to train: ends of their names, a regular expression, or all-linear"}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "modules never to train: ends of their names, or a regular expression"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "layers to train, by the first number in a module's name"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "what stands before that number, e.g. layers"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules to train and save whole besides, e.g. a new head"}
    )
    ratio: float | None = field(default=None, metadata={"help": "share of the units of every target module"})
    dim: str | None = field(
        default=None,
        metadata={
            "help": "outputs or inputs: what a unit is in target modules that are in no coupling that s2ft knows"
        },
    )
    init_weights: bool = field(
        default=True, metadata={"help": "deltas begin at zero, so that nothing changes; False: random, for tests"}
    )
    chosen_by: dict[str, Any] | None = field(
        default=None, metadata={"help": "for the record: the options that the units were chosen by"}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "what the base must be, for the families that s2ft knows; None: not looked at"}
    )

    def __post_init__(self) -> None:
        self.units = _lists(self.units)
        PeftConfig.__post_init__(self)
        S2FTConfig.__post_init__(self)
        self.peft_type = PeftType(TYPE)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, value if value is None or isinstance(value, str) else set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where a layer's number stands, and needs layers_to_transform")
        if self.dim not in (None, *DIMS):
            raise ValueError(f"dim must be one of {', '.join(DIMS)}, or None, got {self.dim!r}")
        if self.ratio is not None:
            self._check_ratio("ratio")
        self._check_way()

    def _check_way(self) -> None:
        """One of the three ways, and whole."""
        named = [f"{key}_ratio" for key in self.ratios]
        if self.units is not None and self.ratio is not None:
            raise ValueError("units says which units are trained, so nothing is left for ratio")
        if self.ratio is not None and self.target_modules is None:
            raise ValueError(
                "ratio is the share of units of the target modules: give target_modules, or q_ratio … d_ratio instead"
            )
        if named and self.target_modules is not None:
            raise ValueError(
                f"target_modules goes with ratio, and {', '.join(named)} without: a projection's ratio "
                "says which modules are trained"
            )
        if self.target_modules is not None and self.layers is not None:
            raise ValueError("layers goes with q_ratio … d_ratio: with target_modules give layers_to_transform")
        if self.target_modules is not None and self.ratio is None and self.units is None:
            raise ValueError("target_modules needs ratio, the share of their units to train, or units")
        if not named and self.target_modules is None and self.units is None:
            raise ValueError(
                "nothing is selected: set one of q_ratio, k_ratio, v_ratio, o_ratio, u_ratio, g_ratio, "
                "d_ratio above 0, or give target_modules and ratio, or units"
            )
        if METRICS[self.selection].calibrated:
            raise ValueError(
                f"selection={self.selection!r} needs calibration data, which PEFT has no place for: give "
                "units=s2ft.select(model, s2ft.S2FTConfig(...), calibration)"
            )

    def with_units(self, selection: Selection, paths: list[str], fingerprint: str | None) -> "S2FTPeftConfig":
        """A copy that names the units, and how they were chosen, instead of the options they were chosen by."""
        if self.units is not None:
            by, chosen_by = {}, self.chosen_by
        else:
            defaults = {f.name: f.default for f in fields(self) if f.name in (*CHOOSING, "ratio")}
            by = {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}
            chosen_by = {name: value for name, value in by.items() if not isinstance(value, dict)}
            chosen_by["seed"] = self.seed
            by = {name: defaults[name] for name in by}
        targets = paths if self.target_modules is None else self.target_modules
        return replace(
            self,
            units=selection.to_dict(),
            target_modules=targets,
            base_fingerprint=fingerprint,
            chosen_by=chosen_by,
            **by,
        )

    def as_asked(self) -> "S2FTPeftConfig":
        """A copy as it was made, but for what was changed since by hand."""
        before = {name: was for name, (was, now) in (self.asked or {}).items() if getattr(self, name) == now}
        return replace(self, **before)

    def become(self, settled: "S2FTPeftConfig") -> "S2FTPeftConfig":
        """Name the units that `settled` names; where this config names others, of another adapter, a copy does."""
        kept = ("units", "base_fingerprint", "chosen_by")
        same = all(getattr(self, name) == getattr(settled, name) for name in kept)
        made = self if self.sites is None or same else replace(settled)
        before = self.as_asked()
        for name in {f.name for f in fields(self)}:
            setattr(made, name, getattr(settled, name))
        made.sites = settled.sites
        made.note(before)
        return made

    def note(self, before: "S2FTPeftConfig") -> None:
        """Remember what it was made with."""
        changed = {f.name: (getattr(before, f.name), getattr(self, f.name)) for f in fields(self)}
        self.asked = {name: both for name, both in changed.items() if both[0] != both[1]}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a module's units are one line of text, 0-3,17."""
        values = super().to_dict()
        for name in ("target_modules", "exclude_modules"):
            values[name] = sorted(values[name]) if isinstance(values[name], set) else values[name]
        if isinstance(self.units, dict):
            values["units"] = {name: _text(numbers) for name, numbers in sorted(self.units.items())}
        return values


def _text(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _lists(units: Any) -> Any:
    """What :meth:`S2FTPeftConfig.to_dict` wrote, as lists again; anything else as it is."""
    if not isinstance(units, dict):
        return units
    return {name: _numbers(name, text) if isinstance(text, str) else text for name, text in units.items()}


def _numbers(name: str, text: str) -> list[int]:
    numbers: list[int] = []
    for run in text.split(","):
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", run)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < MOST:
            raise ValueError(f"units: {name} must be unit numbers such as 0-3,17, got {text[:40]!r}")
        numbers += range(first, last + 1)
    return numbers
