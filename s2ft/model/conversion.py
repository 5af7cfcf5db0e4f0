"""How transformers makes a model's weights from the tensors of a checkpoint, and back.

Most tensors keep their values and change their names at most. Others are converted: the experts of a mixture become one
parameter, or a weight of queries, keys and values is split. transformers has this knowledge as a list of transforms and
applies it to all weights at once. Here the same transforms are sorted into groups, so that one group can be
converted at a time. The functions of transformers that this needs are in its module core_model_loading, which has no
promise of stability: :func:`_loading` is the only place that knows their names.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class CannotStream(ValueError):
    """Weights can't be converted one group at a time. The message says why; a caller may load the whole model."""


@dataclass
class Group:
    """Tensors that are made together from other tensors.

    Attributes:
        name: Name of the first tensor that is made.
        sources: Names of the tensors that they are made from, each with the pattern of the transform that it matches.
        transform: The WeightConverter of transformers; None if one tensor is passed on.
        made: The tensors that are made, by name, on the meta device.
        dtype: Dtype to which the sources are cast before they are converted; None keeps theirs.
        rename: Changes the names that the transform gives.
    """

    name: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    transform: Any = None
    made: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    rename: Callable[[str], str] = str

    def convert(self, model: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Make the tensors.

        Args:
            model: The model, also on the meta device.
            read: Returns a source by name.

        Returns:
            The tensors by name.
        """
        if self.transform is None:
            return {self.name: read(self.sources[0][0]).to(dtype=self.dtype)}
        transform = deepcopy(self.transform)  # it forgets its tensors while it converts them
        for name, pattern in self.sources:
            transform.add_tensor(self.name, name, pattern, read(name).to(dtype=self.dtype))
        made = transform.convert(self.name, model=model, config=model.config)
        return {self.rename(name): values[0] if isinstance(values, list) else values for name, values in made.items()}


@cache
def _loading() -> SimpleNamespace:
    """The functions and classes of transformers that describe its conversions.

    Raises:
        CannotStream: This release of transformers lacks one of them.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            PrefixChange,
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        import transformers

        raise CannotStream(
            f"transformers {transformers.__version__} does not say how it converts weights ({error})"
        ) from error
    return SimpleNamespace(
        PrefixChange=PrefixChange,
        WeightConverter=WeightConverter,
        WeightRenaming=WeightRenaming,
        dot_natural_key=dot_natural_key,
        rename_source_key=rename_source_key,
        mapping=get_model_conversion_mapping,
    )


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers, whose checkpoints may have other names than its weights."""
    return hasattr(model, "base_model_prefix") and hasattr(model, "config")


def loading_groups(model: nn.Module, stored: Mapping[str, Tensor]) -> tuple[dict[str, Group], list[str], list[Any]]:
    """Find how the weights of a model are made from the tensors of a checkpoint, as `from_pretrained` makes them.

    Args:
        model: The model. Its weights may be on the meta device; their dtypes are those of the result.
        stored: The checkpoint's tensors by name, on the meta device.

    Returns:
        The group of each weight by the weight's name, the names of tensors that no weight is made from, and the
        transforms that were used, for :func:`saving_groups`.

    Raises:
        CannotStream: transformers can't say how, or a transform refuses the tensors.
        ValueError: A weight would get another shape than the model has.
    """
    state = model.state_dict(keep_vars=True)
    if not is_of_transformers(model):
        found = {name: Group(name, [(name, name)], dtype=state[name].dtype) for name in stored if name in state}
        return _with_made(found.values(), model, stored), [name for name in stored if name not in state], []
    of = _loading()
    transforms = of.mapping(model)
    renamings = [one for one in transforms if isinstance(one, of.WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, of.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, Group] = {}
    unused = []
    for name in sorted(stored, key=of.dot_natural_key):  # a converter concatenates its sources in this order
        new, pattern = of.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:
            new, pattern = of.rename_source_key(name, [], [], model.base_model_prefix, state)
        if new not in state:
            unused.append(name)
            continue
        group = groups.setdefault(new, Group(new, [], by_pattern.get(pattern), dtype=state[new].dtype))
        if group.sources and group.transform is None:
            raise CannotStream(f"{group.sources[0][0]} and {name} of the checkpoint both are {new} of the model")
        group.sources.append((name, name if pattern is None else pattern))
    return _with_made(groups.values(), model, stored, state), unused, [one for one in transforms if one.was_used()]


def saving_groups(model: nn.Module, transforms: list[Any] | None, names: Iterable[str]) -> list[Group]:
    """Find how a checkpoint's tensors are made from the weights of a model, as `save_pretrained` makes them.

    Args:
        model: The model. Its weights may be on the meta device.
        transforms: The transforms with which it was loaded; None for a model that was not loaded.
        names: Names of the weights to save.

    Returns:
        The groups.

    Raises:
        CannotStream: transformers can't say how, or a transform can't be inverted.
    """
    state, names = model.state_dict(keep_vars=True), list(names)
    if not is_of_transformers(model):
        return [Group(name, [(name, name)], made={name: _meta(state[name])}) for name in names]
    of = _loading()
    if transforms is None:  # without a checkpoint nothing tells whether its names had the prefix
        transforms = [one for one in of.mapping(model, add_legacy=False) if not isinstance(one, of.PrefixChange)]
    try:
        transforms = [one.reverse_transform() for one in reversed(transforms)]
    except Exception as error:  # each transform raises errors of its own
        raise CannotStream(f"transformers can't invert a conversion of this model: {error}") from error
    renamings = [one for one in transforms if isinstance(one, of.WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, of.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, Group] = {}

    def rename(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    for name in sorted(names, key=of.dot_natural_key):
        converted = (converter.rename_source_key(name) for converter in converters)
        new, pattern = next((one for one in converted if one[1] is not None), (rename(name), None))
        group = groups.setdefault(new, Group(new, [], by_pattern.get(pattern), rename=rename))
        group.sources.append((name, name if pattern is None else pattern))
    _with_made(groups.values(), model, state)
    return list(groups.values())


def _with_made(
    groups: Iterable[Group],
    model: nn.Module,
    sources: Mapping[str, Tensor],
    expected: Mapping[str, Tensor] | None = None,
) -> dict[str, Group]:
    """Try each group on the meta device, note what it makes, and return the groups by what they make."""
    found: dict[str, Group] = {}
    for group in groups:
        try:
            group.made = group.convert(model, lambda name: _meta(sources[name]))
        except Exception as error:  # each transform raises errors of its own
            raise CannotStream(f"transformers can't convert {group.name} by itself: {error}") from error
        for name, made in group.made.items():
            if expected is not None and (name not in expected or made.shape != expected[name].shape):
                needed = tuple(expected[name].shape) if name in expected else "no such weight"
                raise ValueError(f"{name} is {tuple(made.shape)} in the checkpoint, and {needed} in the model")
            found[name] = group
    return found


def _meta(tensor: Tensor) -> Tensor:
    # ZeRO-3: the shape is empty while the weight is partitioned
    return torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")
