"""What to train: one validated dataclass. A new option is one new field, and the command line gets it from there."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from s2ft.files.plain_text import MAX_NAME, shortened

if TYPE_CHECKING:
    import torch

PROJECTIONS = ("q", "k", "v", "o", "u", "g", "d", "l", "i")  # u, g, d: up, gate, down
TOWERS = ("language", "vision", "audio", "projector")  # the parts of a model that takes images or sound besides text
METRICS = {  # a metric is a row here and in s2ft/selection/metrics.py
    "random": "at random",
    "weight": "by weight norm",
    "activation": "by activation norm on calibration data",
    "product": "by weight norm times activation norm on calibration data",
    "gradient": "by gradient norm on calibration data",
}
ALLOCATIONS = {  # an allocation is a row here and in s2ft/selection/__init__.py
    "uniform": "the same number of units in each layer",
    "global": "the units with the best scores over all layers, or drawn from all layers together, so a layer may get "
    "none",
}
CHOICES = {
    "selection": tuple(METRICS),
    "order": ("largest", "smallest"),
    "allocation": tuple(ALLOCATIONS),
    "layout": ("permuted", "indexed"),
    "codec": ("none", "auto"),
    "delta_dtype": (None, "float32", "bfloat16", "float16", "float64"),
}
LISTS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what a list has, and the check of one of them
    "layers": ("the numbers of layers from 0", lambda one: type(one) is int and one >= 0),
    "towers": (", ".join(TOWERS), TOWERS.__contains__),
    "modules_to_save": ("the names of modules, such as ['classifier']", lambda one: isinstance(one, str) and one != ""),
}
CHOOSING = (
    *(f"{key}_ratio" for key in PROJECTIONS),
    "selection",
    "order",
    "allocation",
    "layers",
    "towers",
    "align",
    "group",
    "budget",
    "match_lora_rank",
    "exclude",
    "protect_ratio",
)  # options that choose units, which have no use if the units are given
PROTECTED = 0.5  # share of the units that protect data protect, as in SSU (arXiv 2512.04844)
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "tp", "tp+fsdp2")  # of s2ft.Strategy
LARGEST = 2**32 - 1  # the largest whole number of an option: NumPy's generator takes no larger seed


def option(default: Any = MISSING, text: str = "", **metadata: Any) -> Any:
    """A dataclass field that is also an option of the command line.

    Args:
        default: Default value. A list is copied for each object. Without one the option is required.
        text: Help text.
        metadata: What else is known of the option:
            group: Heading of the help under which the option stands.
            choices: The allowed values.
            unit: Unit of the value, which the help shows behind the default.
            least: Smallest allowed value.
            shown: Text that the help shows in place of the default.
            off: Help text of ``--no-...``, for a switch that is on by default.
            metavar: Name of the value in the help.
            positional: Whether the value is given without the option's name.

    Returns:
        The field.
    """
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


def check_fields(options: Any) -> None:
    """Check the values of a dataclass against `least` and `choices` of its fields.

    Args:
        options: The dataclass object. A field that is None is not checked.

    Raises:
        ValueError: A value is too small, too large, or not among the choices. The message names the field.
    """
    for one in fields(options):
        value, least, choices = getattr(options, one.name), one.metadata.get("least"), one.metadata.get("choices")
        if value is None:
            continue
        refuse(
            (least is not None and value < least, f"{one.name} must be at least {least}, got {value}"),
            (
                isinstance(value, int) and value > LARGEST and not one.name.endswith("_bytes"),
                f"{one.name} must be at most {LARGEST}, got {value}",
            ),
            (
                choices and value not in choices,
                f"{one.name} must be one of {', '.join(map(str, choices or ()))}, got {value!r}",
            ),
        )


def did_you_mean(word: str, names: Iterable[str], others: Mapping[str, str] | None = None, prefix: str = "") -> str:
    """Return "; did you mean ...?" with the closest name, or "" if none is close.

    Args:
        word: The unknown word.
        names: The known words.
        others: Other names of known words, separated by blanks, by the known word. More text may follow that word.
        prefix: Text before the name in the answer.
    """
    names = list(names)
    own = [name for name, elsewhere in (others or {}).items() if word in elsewhere.split() and name.split()[0] in names]
    begun = [name for name in names if len(word) > 2 and name.startswith(word)]
    close = own or begun[:1] or difflib.get_close_matches(word, names, 1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def refuse(*mistakes: tuple[Any, str]) -> None:
    """Raise ValueError for the first of some mistakes that was made.

    Args:
        mistakes: For each one, whether it was made, and the message.
    """
    for was_made, message in mistakes:
        if was_made:
            raise ValueError(message)


def _parameters(value: Any) -> int:
    """Return a number of parameters: 9.2M → 9,200,000."""
    if isinstance(value, str):
        found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([KMB]?)", value.strip().upper())
        if not found:
            raise ValueError(f"budget must be a number of parameters such as 9.2M or 9200000, got {value!r}")
        value = int(Fraction(found[1]) * SUFFIXES[found[2]])
    check_whole("budget", value)
    return value


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless the value is a whole number, and not below the least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_adapter_name(name: Any, where: str = "name") -> None:
    """Check an adapter's name. Arguments and files are checked by this one rule.

    Args:
        name: The name to check.
        where: The start of the message: the argument, or the file that has the name.

    Raises:
        ValueError: It is not a printable word of at most MAX_NAME characters, has a slash, or begins with a dot.
    """
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= MAX_NAME
        or not name.isprintable()
        or name.startswith(".")
        or "/" in name
        or "\\" in name
    ):
        raise ValueError(
            f"{where}: an adapter's name must be a word without slashes, got {shortened(name)}: give "
            f"at most {MAX_NAME} printable characters, and no dot in front"
        )


def _list(name: str, value: Any, what: str, is_one: Callable[[Any], bool]) -> list[Any]:
    """Return a list of `what` after checking that there is at least one and none twice."""
    items = [] if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__") else list(value)
    if not items or not all(map(is_one, items)) or len(set(items)) < len(items):
        raise ValueError(f"{name} must be a list of at least one of {what}, and none of them twice, got {value!r}")
    return items


def _units(name: str, value: Any) -> Any:
    """Return lists of units by projection, as in JSON, or the path of a file as text."""
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
    return option(0.0, f"share of {of} to train in each layer, from 0 to 1")


@dataclass
class S2FTConfig:
    """What to train: which units, how they are chosen, and where they are in memory.

    Without a ratio or `units`, nothing is selected, and :func:`s2ft.attach` raises an error.

    Attributes:
        q_ratio: Share of the query heads to train in every layer, 0 to 1 (q_proj).
        k_ratio: Share of the key heads (k_proj).
        v_ratio: Share of the value heads (v_proj).
        o_ratio: Share of the heads of the output projection (o_proj).
        u_ratio: Share of the FFN channels of up_proj.
        g_ratio: Share of the FFN channels of gate_proj.
        d_ratio: Share of the FFN channels of down_proj.
        l_ratio: Share of the inputs or outputs of linear layers that share their units with no other.
        i_ratio: Share of the inputs of every layer that the other ratios are for. Each layer has inputs of its own, and
            they stay where they are. It goes with none of the other ratios.
        selection: How units are chosen: `random`, or by the norm of `weight`, `activation`, their `product`, or
            `gradient` (S²FT paper, section 3.1). The last three need calibration data.
        order: Which end of the ranking is chosen: `largest` or `smallest`.
        allocation: `uniform` chooses the same number in every layer; `global` chooses the best of each projection over
            all layers by their scores, so a layer may get none. With `random` it draws from the units of all layers
            together, as the paper's code does; a ratio is then a share of all of them, rounded down.
        align: Round the number of a projection's units down to a multiple of this, for instance 8, so that every row
            of a slice starts at an aligned address. Fewer units are an error, unless they are heads whose elements are
            a multiple. Default: no rounding.
        group: Choose the inputs of a layer, such as the channels of down_proj, in groups of this many neighbours, for
            instance 32 for a base in Q4_0: inputs that share a scale in the file are then trained together. Heads of
            whole groups stay units. Default: one by one.
        budget: Number of trained parameters, such as 9200000 or "9.2M". The ratios are scaled to as many units as fit.
        match_lora_rank: Use as budget the number of parameters that LoRA of this rank trains on the same projections.
        exclude: Units that are never chosen: a selection, lists by projection, or the path of a selection file or an
            adapter folder.
        protect_ratio: Share of each projection's units that are never chosen, above 0 and below 1: those that the base
            needs most on the protect data, by the scores of `product`. Default: 0.5 with protect data, else none.
        units: Units to train, in the same forms. It replaces the ratios and the options that choose units.
        layout: `permuted` moves the selected units together into one dense slice (S²FT paper, section 3.2), where they
            can move; `indexed` leaves them in place.
        seed: Seed of the random selection, and of the command line's choice of calibration rows.
        layers: Numbers of the layers to train. Default: all.
        towers: Parts of a model of images or sound and text to train: `language`, `vision`, `audio`, `projector`.
            Default: the language model if there is one, and everything in all other models.
        delta_dtype: Dtype of the slices. Default: the weight's, but at least float32.
        codec: `auto`: what is trained of a quantized base (GGUF, compressed-tensors, NF4) ends with values that its
            files can hold, so that the merged files compute what was trained; see :func:`s2ft.set_rounding`. `none`:
            it is rounded when it is merged.
        modules_to_save: Modules to train in full and to save with the slices, such as a new head: their paths, or the
            last parts of their paths.
        ffn_kernel: Whether a gated FFN computes act(gate) * up in one op.

    Raises:
        ValueError: A value is not allowed, or two options contradict each other. The message names them.

    Example:
        >>> config = s2ft.S2FTConfig(d_ratio=0.05, o_ratio=0.25, layout="indexed")
        >>> config.ratios
        {'o': 0.25, 'd': 0.05}
    """

    q_ratio: float = _ratio("query heads (q_proj)")
    k_ratio: float = _ratio("key heads (k_proj)")
    v_ratio: float = _ratio("value heads (v_proj)")
    o_ratio: float = _ratio("the output projection's heads (o_proj)")
    u_ratio: float = _ratio("FFN channels of up_proj")
    g_ratio: float = _ratio("FFN channels of gate_proj")
    d_ratio: float = _ratio("FFN channels of down_proj")
    l_ratio: float = _ratio("the inputs or outputs of linear layers that share their units with no other")
    i_ratio: float = option(
        0.0, "share of the inputs to train of every layer that the other ratios are for, each layer by itself, 0 to 1"
    )
    selection: str = option("random", "how units are chosen: " + _listed(METRICS), choices=CHOICES["selection"])
    order: str = option(
        "largest",
        "take the units with the largest or the smallest scores; a random selection has no scores",
        choices=CHOICES["order"],
    )
    allocation: str = option(
        "uniform", "how units are distributed over the layers: " + _listed(ALLOCATIONS), choices=CHOICES["allocation"]
    )
    align: int | None = option(
        None,
        "round the number of units of each projection down to a multiple of this, for example 8; needs "
        "allocation uniform",
        metavar="UNITS",
    )
    group: int | None = option(
        None,
        "choose inputs (of o, d, i) in groups of this many neighbours: those that share a scale in a quantized file",
        metavar="INPUTS",
    )
    budget: int | str | None = option(
        None,
        "number of trained parameters, for example 9.2M; the ratios are scaled to it and give only the proportions",
    )
    match_lora_rank: int | None = option(
        None, "train as many parameters as LoRA of this rank on the same projections", metavar="RANK"
    )
    exclude: dict[str, list[int]] | str | None = option(
        None, "never choose the units of this selection file or adapter folder", metavar="PATH"
    )
    protect_ratio: float | None = option(
        None,
        "share of each projection's units that are never chosen because the base needs them most on the protect data",
        shown=f"{PROTECTED} with protect data, else none",
    )
    units: dict[str, list[int]] | str | None = option(
        None,
        "train exactly the units of this selection file or adapter folder; ratios and the options that go "
        "with them are not allowed then",
        metavar="PATH",
    )
    layout: str = option(
        "permuted",
        "permuted: the selected units are moved together into one dense slice; indexed: the units stay where they are",
        choices=CHOICES["layout"],
    )
    seed: int = option(0, "seed of the random selection and of the choice of calibration rows")
    layers: list[int] | None = option(None, "layers to train", shown="all layers")
    towers: list[str] | None = option(
        None,
        "parts of a model to train: " + ", ".join(TOWERS),
        shown="the language model if the model has one besides other parts, else everything",
        choices=TOWERS,
    )
    delta_dtype: str | None = option(
        None,
        "dtype of the trained deltas",
        shown="the weight's dtype, but at least float32",
        choices=CHOICES["delta_dtype"],
    )
    codec: str = option(
        "none",
        "auto: train what the files of a quantized base can hold; none: s2ft merge rounds at the end",
        choices=CHOICES["codec"],
    )
    modules_to_save: list[str] | None = option(
        None,
        "modules to train in full and save with the adapter, for example the new head of a classifier; the "
        "full names of the modules or the last parts of them",
        metavar="MODULE",
    )
    ffn_kernel: bool = option(
        True,
        "compute act(gate) * up of the FFN in one kernel",
        off="compute act(gate) * up of the FFN in separate steps; without this option one kernel computes it",
    )

    def __post_init__(self) -> None:
        for key in PROJECTIONS:
            self._check_ratio(f"{key}_ratio")
        refuse(
            *(
                (
                    getattr(self, name) not in choices,
                    f"{name} must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}",
                )
                for name, choices in CHOICES.items()
            ),
            (not isinstance(self.ffn_kernel, bool), f"ffn_kernel must be True or False, got {self.ffn_kernel!r}"),
        )
        check_whole("seed", self.seed, 0)
        for name, (what, is_one) in LISTS.items():
            if getattr(self, name) is not None:
                setattr(self, name, _list(name, getattr(self, name), what, is_one))
        if self.budget is not None:
            self.budget = _parameters(self.budget)
        for name in ("match_lora_rank", "align", "group"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        if self.protect_ratio is not None:
            self._check_ratio("protect_ratio")
            if not 0 < self.protect_ratio < 1:
                raise ValueError(f"protect_ratio must be above 0 and below 1, got {self.protect_ratio:g}")
        self.exclude, self.units = _units("exclude", self.exclude), _units("units", self.units)
        needless = [f.name for f in fields(self) if f.name in CHOOSING and getattr(self, f.name) != f.default]
        refuse(
            (
                self.i_ratio and len(self.ratios) > 1,
                "i_ratio trains inputs of every layer that the other ratios are for: set it, or the others, not both",
            ),
            (
                self.align is not None and self.allocation != "uniform",
                f"align={self.align} needs allocation='uniform': with {self.allocation!r} the scores decide how many "
                "units a layer gets",
            ),
            (self.align and self.group, "align and group exclude each other: a group is aligned"),
            (
                self.budget is not None and self.match_lora_rank is not None,
                "budget and match_lora_rank exclude each other: both set how much is trained",
            ),
            (
                self.units is not None and needless,
                f"units lists the units to train, so nothing is left for {', '.join(needless)} to choose",
            ),
        )

    def _check_ratio(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
        setattr(self, name, float(value))

    @property
    def ratios(self) -> dict[str, float]:
        """Ratios above 0, by the projection's key: q, k, v, o, u, g, d, l or i."""
        return {key: value for key in PROJECTIONS if (value := getattr(self, f"{key}_ratio")) > 0}

    @property
    def trains_inputs(self) -> bool:
        """Whether inputs of every layer are trained in place of couplings: by `i_ratio`, or by units of such."""
        return bool(self.i_ratio) or isinstance(self.units, dict) and all(name.endswith(".i") for name in self.units)

    def delta_dtype_for(self, weight_dtype: "torch.dtype") -> "torch.dtype":
        """Return the dtype of the slice of a weight.

        Args:
            weight_dtype: Dtype of the weight.

        Returns:
            `delta_dtype` if it is set, else the weight's dtype, but at least float32. In half precision, updates that
            are smaller than the step size of the values would be lost.
        """
        import torch

        own = self.delta_dtype
        return torch.promote_types(weight_dtype, torch.float32) if own is None else getattr(torch, own)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration for JSON.

        Returns:
            The fields as JSON values.
        """
        return asdict(self)
