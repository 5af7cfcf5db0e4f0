"""The config of S²FT in PEFT: which modules are trained and, after the injection, which units."""

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, cast

from peft import PeftType
from peft.config import PeftConfig

from s2ft.config import CHOOSING, S2FTConfig, refuse
from s2ft.model.coupling import SIDES, Coupling, checked_couplings
from s2ft.selection import Selection
from s2ft.selection.metrics import METRICS

TYPE = "S2FT"  # the method's name in PeftType and in adapter_config.json


@dataclass
class S2FTPeftConfig(PeftConfig, S2FTConfig):
    """Config of an S²FT adapter for `peft.get_peft_model` and `PeftModel.add_adapter`.

    There are three ways to define what is trained:

    - ``d_ratio=0.03, o_ratio=0.1``, for the model families that s2ft knows: the same units that :func:`s2ft.attach`
      trains with the same options. ``layers``, ``exclude_modules`` and ``layers_to_transform`` restrict them.
    - ``target_modules=["down_proj"], ratio=0.03``: this share of the units of each of these modules. In a known family
      the units are heads or channels. In modules outside any coupling they are single inputs, or outputs, see ``dim``.
      ``target_modules="all-linear"`` takes every linear layer but the output head, in any model that PEFT takes.
    - ``units={"model.layers.0.mlp.down_proj": [3, 17]}``: exactly these units, as a selection, as lists, or as the path
      of a saved selection. A selection that needs calibration data is passed in this way:
      ``units=s2ft.select(model, config, calibration)``.

    The units are selected when the adapter is injected. From then on the config names them in `units`, and `chosen_by`
    has the options by which they were selected. A saved adapter therefore has its units, and loading selects nothing.
    A config can be used again, for another base or with another seed: the next adapter gets a copy with the original
    options.

    Deltas have the dtype of their weight. With PEFT's ``autocast_adapter_dtype`` they have float32 on a weight in half
    precision.

    Args:
        target_modules: Modules to train: ends of their names, a regular expression, or "all-linear".
        target_parameters: Stacked experts to train: ends of the names of the parameters that hold them all, for example
            "mlp.experts.down_proj". Each expert gets its own units.
        exclude_modules: Modules never to train: ends of their names, or a regular expression.
        layers_to_transform: Layers to train, by the first number in a module's name.
        layers_pattern: The word before that number, for example "layers".
        modules_to_save: Modules to train and save in full besides, for example a new head.
        trainable_token_indices: Tokens whose embeddings are trained besides, as in PEFT's LoRA: their numbers, or such
            lists by the embedding's name.
        ensure_weight_tying: Whether an embedding in `modules_to_save` or `trainable_token_indices` and the head that is
            tied to it are trained as one weight. Otherwise PEFT warns, and they are two weights after the training.
        ratio: Share of the units of every target module and of every expert, above 0 and at most 1.
        dim: "outputs" or "inputs": the units of target modules that are in no coupling. Default: "inputs".
        init_weights: True starts the deltas at zero, so that nothing changes; False makes them random, for tests.
        chosen_by: Written by the injection: the options by which the units were selected.
        base_fingerprint: Written by the injection: fingerprint that the base must have; None for no check.
        couplings: Couplings of a model of no known family, as :class:`s2ft.Coupling` objects. The injection writes down
            those that it finds, so that loading has the same.
        uncoupled: Written by the injection: the modules that are in no coupling. Their units stay single inputs or
            outputs, even if a later version of s2ft knows a coupling of them.
        skipped: Written by the injection: target modules that are not trained, because they have less than one unit at
            the ratio, or, for "all-linear", because S²FT can't train them. A warning has the reasons.
        info: JSON values that are saved with the adapter, as in `info` of :class:`s2ft.Adapter`: for example the prompt
            that it is trained with.

    The other arguments are those of :class:`s2ft.S2FTConfig` (ratios by projection, selection, budget, layers and so
    on) and of `peft.PeftConfig` (task_type, inference_mode and so on).

    Attributes:
        layout: Always "indexed".
        ffn_kernel: Always False: PEFT's layers run one by one.
        delta_dtype: Always None: the dtype is that of the weight, see above.

    Raises:
        ValueError: A value or a combination of values is not valid; the message names the field.

    Example:
        >>> from peft import get_peft_model
        >>> from s2ft.peft import S2FTPeftConfig
        >>> config = S2FTPeftConfig(target_modules=["down_proj"], ratio=0.05, task_type="CAUSAL_LM")
        >>> peft_model = get_peft_model(model, config)
        >>> peft_model.save_pretrained("math")
    """

    layout: ClassVar[str] = "indexed"  # type: ignore[misc]  # the only layout here: units stay where they are
    ffn_kernel: ClassVar[bool] = False  # type: ignore[misc]
    delta_dtype: ClassVar[None] = None  # type: ignore[misc]
    # ModuleUnits by module and weight, after the injection: "" is the weight of a layer, others are of stacked experts
    module_units = cast("dict[str, dict[str, Any]] | None", None)
    changed_fields = cast("dict[str, tuple] | None", None)  # (value at creation, value after the injection) by field

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "modules to train: ends of their names, a regular expression, or all-linear"}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "stacked experts to train: ends of the names of their parameters"}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "modules never to train: ends of their names, or a regular expression"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "layers to train, by the first number in a module's name"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "the word before that number, for example layers"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules to train and save in full, for example a new head"}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "tokens whose embeddings are trained, or such lists by the embedding's name"}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "train an embedding and the head that is tied to it as one weight"}
    )
    ratio: float | None = field(default=None, metadata={"help": "share of the units of every target module"})
    dim: str | None = field(
        default=None,
        metadata={"help": "outputs or inputs (default): the units of target modules in no coupling that s2ft knows"},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "start the deltas at zero, so that nothing changes; False: at random, for tests"},
    )
    chosen_by: dict[str, Any] | None = field(
        default=None, metadata={"help": "written by the injection: the options by which the units were selected"}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "written by the injection: fingerprint that the base must have; None: no check"}
    )
    couplings: list[Any] | None = field(
        default=None, metadata={"help": "couplings of a model of no known family; the injection writes those it finds"}
    )
    uncoupled: list[str] | None = field(
        default=None, metadata={"help": "written by the injection: the target modules that are in no coupling"}
    )
    skipped: list[str] | None = field(
        default=None, metadata={"help": "written by the injection: the target modules that are not trained"}
    )
    info: dict[str, Any] | None = field(
        default=None, metadata={"help": "JSON values that are saved with the adapter, for example its prompt"}
    )

    def __post_init__(self) -> None:
        self.units = _lists(self.units)
        if isinstance(self.modules_to_save, list):  # PEFT adds the head again to that of a loaded config
            self.modules_to_save = list(dict.fromkeys(self.modules_to_save)) or None
        PeftConfig.__post_init__(self)
        S2FTConfig.__post_init__(self)
        self.peft_type = PeftType(TYPE)
        if self.couplings is not None:
            found = (Coupling.from_dict(one) if isinstance(one, dict) else one for one in self.couplings)
            self.couplings = [one.to_dict() for one in checked_couplings(list(found))]
        if isinstance(self.target_parameters, str):
            raise ValueError(f"target_parameters must be a list of names, got {self.target_parameters!r}")
        for name in ("target_modules", "target_parameters", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, value if value is None or isinstance(value, str) else set(value))
        refuse(
            (
                self.layers_pattern and self.layers_to_transform is None,
                "layers_pattern needs layers_to_transform: it tells where a layer's number is in a name",
            ),
            (self.dim not in (None, *SIDES), f"dim must be one of {', '.join(SIDES)}, or None, got {self.dim!r}"),
        )
        if self.ratio is not None:
            self._check_ratio("ratio")
        # What is trained must be defined in exactly one of the three ways.
        named = [f"{key}_ratio" for key in self.ratios]
        is_targeted = self.target_modules is not None or self.target_parameters is not None
        refuse(
            (
                self.units is not None and self.ratio is not None,
                "units and ratio exclude each other: units names the trained units",
            ),
            (
                self.ratio is not None and not is_targeted,
                "ratio is the share of units of the target modules: give target_modules, or q_ratio … d_ratio instead",
            ),
            (
                named and is_targeted,
                f"target_modules or target_parameters and {', '.join(named)} exclude each other: a projection's ratio "
                "defines which modules are trained; with target_modules give ratio",
            ),
            (
                is_targeted and self.layers is not None,
                "layers goes with q_ratio … d_ratio: with target_modules give layers_to_transform",
            ),
            (
                is_targeted and self.towers is not None,
                "towers goes with q_ratio … d_ratio: with target_modules name modules of the towers",
            ),
            (
                is_targeted and self.ratio is None and self.units is None,
                "target_modules needs ratio, the share of their units to train, or units",
            ),
            (
                not named and not is_targeted and self.units is None,
                "nothing is selected: set one of q_ratio, k_ratio, v_ratio, o_ratio, u_ratio, g_ratio, "
                "d_ratio above 0, or give target_modules and ratio, or units",
            ),
            (
                self.protect_ratio is not None,
                "protect_ratio needs protect data, for which PEFT has no argument: give "
                "units=s2ft.select(model, s2ft.S2FTConfig(...), protect=batches)",
            ),
            (
                self.group is not None,
                "group: here units are chosen one by one: give units=s2ft.select(model, s2ft.S2FTConfig(...))",
            ),
            (self.codec != "none", "codec: PEFT's layers do not round to the base's file: use s2ft.attach"),
            (
                METRICS[self.selection].calibrated,
                f"selection={self.selection!r} needs calibration data, for which PEFT has no argument: give "
                "units=s2ft.select(model, s2ft.S2FTConfig(...), calibration)",
            ),
        )

    def with_units(
        self,
        selection: Selection,
        paths: list[str],
        parameters: list[str],
        fingerprint: str | None,
        uncoupled: list[str],
        skipped: list[str],
    ) -> "S2FTPeftConfig":
        """Return a copy that names the units; the options by which they were selected move to `chosen_by`.

        Args:
            selection: The selected units.
            paths: The modules that have them.
            parameters: The stacked experts that have them.
            fingerprint: Fingerprint of the base as JSON text, or None.
            uncoupled: The modules that are in no coupling.
            skipped: Names of the target modules that are not trained.

        Returns:
            The copy.
        """
        by, defaults = self.chosen_by, cast("dict[str, Any]", {})
        if self.units is None:
            defaults = {f.name: f.default for f in fields(self) if f.name in (*CHOOSING, "ratio")}
            given = {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}
            by = {**{name: value for name, value in given.items() if not isinstance(value, dict)}, "seed": self.seed}
        return replace(
            self,
            units=selection.to_dict(),
            target_modules=paths or None if self.target_modules is None or skipped else self.target_modules,
            target_parameters=parameters or None,
            base_fingerprint=fingerprint,
            chosen_by=by,
            uncoupled=sorted(uncoupled),
            skipped=sorted(skipped) or self.skipped,
            **defaults,
        )

    def as_created(self) -> "S2FTPeftConfig":
        """Undo the changes of the injection.

        Returns:
            A copy with the values before the injection, except for fields that the user has changed since.
        """
        before = {name: was for name, (was, now) in (self.changed_fields or {}).items() if getattr(self, name) == now}
        return replace(self, **before)

    def updated_to(self, selected: "S2FTPeftConfig") -> "S2FTPeftConfig":
        """Take over all fields of a config with units, because PEFT's users read them in the object that they gave.

        Args:
            selected: The config with units, see :meth:`with_units`.

        Returns:
            This config; or a copy, if this config already names other units for another adapter.
        """
        kept = ("units", "base_fingerprint", "chosen_by")
        if self.module_units is not None and any(getattr(self, name) != getattr(selected, name) for name in kept):
            return selected
        vars(self).update(vars(selected))
        return self

    def remember_created(self, created: "S2FTPeftConfig") -> None:
        """Record what the injection has changed, for :meth:`as_created`.

        Args:
            created: The config before the injection.
        """
        self.changed_fields = {f.name: (getattr(created, f.name), getattr(self, f.name)) for f in fields(self)}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values. The units of a module are one text such as "0,1,2,17".

        Returns:
            The values by field.

        Example:
            >>> from s2ft.peft import S2FTPeftConfig
            >>> S2FTPeftConfig(units={"model.layers.0.mlp.down_proj": [0, 1, 2, 17]}).to_dict()["units"]
            {'model.layers.0.mlp.down_proj': '0,1,2,17'}
        """
        values = super().to_dict()
        values |= {name: sorted(value) for name, value in values.items() if isinstance(value, set)}
        if isinstance(self.units, dict):
            values["units"] = {name: ",".join(map(str, sorted(units))) for name, units in sorted(self.units.items())}
        return values


def _lists(units: Any) -> Any:
    """Units that :meth:`S2FTPeftConfig.to_dict` wrote as text become lists again; other values stay as they are."""
    if not isinstance(units, dict):
        return units
    for name, text in units.items():
        if isinstance(text, str) and not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
            raise ValueError(f"units: {name} must be unit numbers such as 0,1,2,17, got {text[:40]!r}")
    return {name: list(map(int, one.split(","))) if isinstance(one, str) else one for name, one in units.items()}
