"""Configs with one flag flipped: every boolean and every listed choice, on the smallest model of each type.

A flip may change the modules of a block, or what its forward does. Whatever it does, attach must keep what the model
computes and train what merging writes, or refuse.
"""

import ast
import copy
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

import s2ft
from s2ft import S2FTConfig
from support import composites
from support.aliases import ROWS, model_with
from support.inside import (
    composite,
    copied,
    couplings_of,
    projections_of,
    run_example,
    runnable_example,
    tensors_in,
    tower_of,
)
from support.models import ALL_RATIOS, CASES, LAYOUTS, inputs_of
from support.states import randomize, with_adapter

TOLERANCE = 1e-9  # of outputs in float64, relative to the largest
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "relu2")  # two of the FFN kernel and another one
# Entries without which a config with the flip is refused by transformers
NEEDED = {
    "add_cross_attention": {"is_decoder": True},
    "new_decoder_architecture": {"num_kv_heads": 2, "parallel_attn": True},
}


class Flip(NamedTuple):
    """One entry of a config, or of a config inside it, with another value; no flip if `key` is empty."""

    part: str = ""
    key: str = ""
    value: Any = None

    def __str__(self) -> str:
        return f"{self.part}{'.' * bool(self.part)}{self.key}={self.value}" if self.key else "as it is"


class Outcome(NamedTuple):
    """What became of a flip: "right", "refused", "wrong", "same" as without it, or "no model" that runs."""

    word: str
    reason: str = ""


# ---- models -----------------------------------------------------------------------------------------------------


def options_of(model_type: str) -> dict[str, Any]:
    """The options of the smallest config of a type that has a row or a case."""
    if model_type in ROWS:
        return copy.deepcopy(ROWS[model_type])
    make = next(make for make in CASES.values() if make().model_type == model_type)
    found: dict[str, Any] = {}
    with mock.patch.object(type(make()), "__init__", lambda self, **options: found.update(options)):
        make()
    return found


def model_of(model_type: str, flip: Flip = Flip()) -> PreTrainedModel:
    """The smallest model of a type with a flip."""
    entries = {flip.key: flip.value, **(NEEDED.get(flip.key, {}) if flip.value else {})} if flip.key else {}
    if model_type in composite.PROJECTORS:
        return composites.composite_of(model_type, {flip.part: entries} if flip.part else entries)
    options = options_of(model_type)
    options.update({flip.part: {**(options.get(flip.part) or {}), **entries}} if flip.part else entries)
    return model_with(CONFIG_MAPPING[model_type](**options))


def example_of(model: PreTrainedModel, known: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """An input that the model runs on: the known one, the one of the other tests, or any."""
    make = composites.example_for if model.config.model_type in composite.PROJECTORS else inputs_of
    for given in (known, None) if known else (None,):
        try:
            found = given or make(model)
            with torch.no_grad():
                run_example(model, found)
            return found
        except Exception:  # a flip may ask for other inputs
            continue
    return runnable_example(model)


# ---- flips ------------------------------------------------------------------------------------------------------


def flips_of(model_type: str) -> Iterator[Flip]:
    """Iterate over the flips of a type: those of its config, and of the configs inside it."""
    config = model_of(model_type).config
    for part, one in {"": config, **{name: getattr(config, name, None) for name in config.sub_configs}}.items():
        if isinstance(one, PretrainedConfig):
            yield from (Flip(part, key, value) for key, value in _flipped(one))


def _flipped(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    """Iterate over the keys of a config that are a boolean or a choice, with each other value."""
    ours = {name: field.type for name, field in type(config).__dataclass_fields__.items()}
    entries = {
        key: value for key, value in config.to_dict().items() if key not in PretrainedConfig.__dataclass_fields__
    }
    config.allow_global_per_layer_attribute_access = True  # where layers differ
    for key in dict.fromkeys((*ours, *entries)):
        if key in PretrainedConfig.__dataclass_fields__ or not hasattr(config, key):
            continue
        value, hint = getattr(config, key), ours.get(key)
        if isinstance(value, bool) or value is None and "bool" in str(hint):
            yield key, not value
        elif isinstance(value, str) or value is None and "str" in str(hint):
            is_activation = isinstance(value, str) and "act" in key and value in ACT2FN
            for choice in ACTIVATIONS if is_activation else _choices(config, key, hint):
                if choice != value:
                    yield key, choice


def _choices(config: PretrainedConfig, key: str, hint: Any) -> list[str]:
    """The strings that an entry may be: by its type, or because the code of the type compares it with them."""
    listed = [choice for one in [hint, *get_args(hint)] if get_origin(one) is Literal for choice in get_args(one)]
    folder = Path(sys.modules[type(config).__module__].__file__).parent
    for file in (*folder.glob("modeling_*.py"), *folder.glob("configuration_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and getattr(node.left, "attr", getattr(node.left, "id", None)) == key:
                found = [one for side in node.comparators for one in ast.walk(side) if isinstance(one, ast.Constant)]
                listed += [one.value for one in found if isinstance(one.value, str)]
    return list(dict.fromkeys(listed))


# ---- trials -----------------------------------------------------------------------------------------------------


class Base:
    """A model in float64 with an input and its outputs, in evaluation and in training mode."""

    def __init__(self, model_type: str, flip: Flip = Flip(), plain: "Base | None" = None) -> None:
        model = model_of(model_type, flip)
        self.given = example_of(model, plain and plain.given)
        self.model = copied(model)
        self.example = {
            name: value.double() if value.is_floating_point() else value for name, value in self.given.items()
        }
        self.eval = outputs_of(self.model, self.example)
        self.train = outputs_of(self.model, self.example, training=True)
        if not self.eval or not all(bool(torch.isfinite(one).any()) for one in self.eval):
            raise ValueError("its outputs have no finite numbers")

    def equals(self, other: "Base") -> bool:
        """Whether another model has the same modules and the same outputs, bit for bit."""
        mine, others = ({name: tuple(p.shape) for name, p in one.model.state_dict().items()} for one in (self, other))
        same = [(type(a), str(a)) == (type(b), str(b)) for a, b in zip(self.model.modules(), other.model.modules())]
        outputs = zip((*self.eval, *self.train), (*other.eval, *other.train))
        return mine == others and all(same) and all(a.shape == b.shape and torch.equal(a, b) for a, b in outputs)


def outputs_of(model: nn.Module, example: dict[str, Tensor], training: bool = False) -> list[Tensor]:
    if training:  # a copy, because statistics of batches change
        model = copy.deepcopy(model).train()
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        return [one.clone() for one in tensors_in(run_example(model, example))]


def far(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor."""
    found = [0.0 if len(ours) == len(theirs) else float("inf")]
    for one, other in zip(ours, theirs):
        there = torch.isfinite(other)
        if one.shape != other.shape or not torch.equal(torch.isfinite(one), there):
            return float("inf")
        if there.any():
            found.append(float((one - other)[there].abs().max() / (other[there].abs().max() + 1e-30)))
    return max(found)


def outcome_of(model_type: str, flip: Flip, plain: Base | None, layouts: Sequence[str] = LAYOUTS) -> Outcome:
    """Attach a model with a flip in these layouts, and compare it with the base and with what merging writes."""
    try:
        base = Base(model_type, flip, plain)
    except Exception as error:  # transformers refuses flips in many ways
        return Outcome("no model", f"{type(error).__name__}: {error}".partition("\n")[0][:200])
    if plain is not None and base.equals(plain):
        return Outcome("same")
    try:
        couplings = couplings_of(base.model)
        keys = {projection.key for projection in projections_of(couplings)}
        towers = sorted({tower_of(base.model, one.path) for one in projections_of(couplings)})
        ratios = {f"{key}_ratio": 0.2 if key == "l" else ALL_RATIOS[f"{key}_ratio"] for key in keys}
        ratios |= {f"{p.key}_ratio": 1.0 for p in projections_of(couplings) if p.count == 1}
        reasons = [
            _trial(base, S2FTConfig(**ratios, layout=layout, towers=towers if len(towers) > 1 else None))
            for layout in layouts
        ]
    except ValueError as error:
        return Outcome("refused", str(error).partition("\n")[0][:200])
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {error}".partition("\n")[0][:200])
    wrong = next(filter(None, reasons), "")
    return Outcome("wrong" if wrong else "right", wrong)


def _trial(base: Base, config: S2FTConfig) -> str:
    """What is wrong in one layout, in words."""
    model, example = with_adapter(copy.deepcopy(base.model), config), base.example
    if (change := far(outputs_of(model, example), base.eval)) > TOLERANCE:
        return f"{config.layout}: attach changes the outputs by {change:.2g}"
    steady = far(base.train, base.eval) <= TOLERANCE  # no dropout, whose mask has the order of the channels
    if steady and (change := far(outputs_of(model, example, training=True), base.train)) > TOLERANCE:
        return f"{config.layout}: attach changes the outputs in training mode by {change:.2g}"
    randomize(model)
    trained = outputs_of(model, example)
    if far(trained, base.eval) <= TOLERANCE:
        return f"{config.layout}: slices change no output"
    if (change := far(outputs_of(s2ft.merge(model), example), trained)) > TOLERANCE:
        return f"{config.layout}: the merged model differs from the trained one by {change:.2g}"
    return ""


def outcomes_of(model_type: str) -> dict[Flip, Outcome]:
    """The outcomes of a type as it is, in both layouts, and with every flip, in one layout after the other."""
    none = Flip()
    found = {none: outcome_of(model_type, none, None)}
    if found[none].word == "no model":
        return found
    plain = Base(model_type)
    flips = zip(flips_of(model_type), cycle(LAYOUTS))
    return found | {flip: outcome_of(model_type, flip, plain, (layout,)) for flip, layout in flips}
