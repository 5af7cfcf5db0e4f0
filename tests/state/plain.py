"""The reference: the visible state of a model, and its expected weights, by plain torch formulas."""

from collections.abc import Iterable

import torch
from support.inside import couplings_of, projections_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import s2ft

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NOT_ATTACHED = "has no S²FT adapter"  # part of the ValueError that detach raises for a plain model


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit, NaN and signed zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = BITS[a.element_size()]
    return torch.equal(a.detach().contiguous().view(kind), b.detach().contiguous().view(kind))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Clones of all parameters and buffers, by name."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def describe(model: nn.Module) -> dict[str, object]:
    """All state that detach must restore, by a readable name.

    It contains clones of the tensors, the order of the keys of the state, requires_grad, ties between parameters, and
    the class, mode, attributes and number of hooks of each module.
    """
    seen: dict[str, object] = {f"tensor {name}": tensor for name, tensor in weights_of(model).items()}
    seen["keys of the state"] = list(model.state_dict())
    named = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in named.items():
        seen[f"requires_grad of {name}"] = parameter.requires_grad
        names.setdefault(id(parameter), []).append(name)
    seen["tied parameters"] = [group for group in names.values() if len(group) > 1]
    for path, module in model.named_modules():
        seen[f"class of {path or 'the model'}"] = type(module)
        seen[f"mode of {path or 'the model'}"] = module.training
        seen[f"attributes of {path or 'the model'}"] = sorted(module.__dict__)
        hooks = {key: len(value) for key, value in module.__dict__.items() if "_hooks" in key and value}
        seen[f"hooks of {path or 'the model'}"] = hooks
    return seen


def differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    """A sentence for each difference."""
    names = [name for name in expected.keys() | found.keys() if not _same(expected.get(name), found.get(name))]
    return sorted(f"{name} was {_short(expected.get(name))}, is {_short(found.get(name))}" for name in names)


def _same(one: object, other: object) -> bool:
    both_tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return same_bits(one, other) if both_tensors else type(one) is type(other) and one == other


def _short(value: object) -> str:
    return f"{value.dtype} {value.flatten()[:9].tolist()}" if isinstance(value, Tensor) else str(value)


def detach_if_attached(model: nn.Module) -> None:
    """Detach the model if it has an adapter."""
    try:
        s2ft.detach(model)
    except ValueError as error:
        if NOT_ATTACHED not in str(error):
            raise


def effective_weights(plain: nn.Module, parts: Iterable[tuple[s2ft.Adapter, float]]) -> dict[str, Tensor]:
    """The weights of `plain` with a weighted sum of adapters added: base + Σ weight × delta, rounded once.

    Args:
        plain: the base model; it is not changed.
        parts: adapters with their weights in the sum.
    Returns:
        Clones of all parameters and buffers, by name.
    """
    weights, projections = weights_of(plain), {p.name: p for p in projections_of(couplings_of(plain))}
    sums: dict[str, Tensor] = {}  # by name of the weight: [outputs, inputs], in the widest dtype
    for adapter, weight in parts:
        for name, delta in adapter.deltas.items():
            path = projections[name].path
            key, base = f"{path}.weight", weights[f"{path}.weight"]
            if isinstance(plain.get_submodule(path), Conv1D):
                base = base.t()
            wide = torch.promote_types(torch.promote_types(base.dtype, delta.values.dtype), torch.float32)
            total = sums.setdefault(key, base.to(wide, copy=True))
            total.index_add_(delta.dim, delta.index, delta.values.to(wide) * weight)
    for key, total in sums.items():
        matrix = total.t() if isinstance(plain.get_submodule(key.removesuffix(".weight")), Conv1D) else total
        weights[key] = matrix.to(weights[key].dtype).contiguous()
    return weights
