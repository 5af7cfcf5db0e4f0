"""Gradients that couplings pass back, from their consumers' outputs to their producers' outputs.

A backward hook between a coupling's layers may treat each unit by its number, such as one that scales channel 7. Units
that move then get the gradients of others, which no output shows. So the proof of attach sends a random gradient back
through each coupling, in the plain model and in the attached one, and compares what arrives for each unit.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.attached.record import Record
from s2ft.layers import kind_of
from s2ft.model.coupling import Coupling

# By how much rounding may change a gradient, as a share of its size and of the usual size. A hook that does something
# to a unit changes it by more, and half precision by less, in most of the tokens.
ROUNDING = 0.1


class LocalGradients:
    """What arrives at the producers' outputs in one run of a model.

    Args:
        couplings: The couplings whose units move. Experts are left out: no foreign code runs between their weights.
        is_plain: Whether the model is plain. No gradient is then passed on behind a consumer.
    """

    def __init__(self, couplings: Sequence[Coupling], is_plain: bool) -> None:
        self.couplings = [one for one in couplings if all(part.expert is None for part in one.projections)]
        self.is_plain = is_plain
        self.outputs: dict[str, Tensor] = {}  # the last output of each producer's layer
        # For each coupling the gradient at each producer's layer, by its path, in each call of the consumer
        self.found: dict[str, list[dict[str, Tensor]]] = {one.place: [] for one in self.couplings}

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        """Inside, forwards of the model add to `found`. They must run with gradients enabled."""
        with ExitStack() as stack:
            for coupling in self.couplings:
                consumer = coupling.consumer
                assert consumer is not None  # units move between layers
                for path in _producers(coupling):
                    hook = partial(self._after_producer, path)
                    # first, so that hooks of others see the output whose gradient is asked for
                    stack.callback(model.get_submodule(path).register_forward_hook(hook, prepend=True).remove)
                hook = partial(self._after_consumer, coupling)
                stack.callback(model.get_submodule(consumer.path).register_forward_hook(hook).remove)
            yield
        self.outputs.clear()

    def _after_producer(self, path: str, module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        """Forward hook: keep the output, and pass on a copy, which the forward may change in place."""
        self.outputs.pop(path, None)
        if not isinstance(output, Tensor) or not torch.is_grad_enabled():  # a reentrant checkpoint computes without
            return None
        self.outputs[path] = output if output.requires_grad else output.detach().requires_grad_()
        return self.outputs[path].clone()

    def _after_consumer(self, coupling: Coupling, module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        """Forward hook: send the same random gradient back each time."""
        outputs = {path: self.outputs[path] for path in _producers(coupling) if path in self.outputs}
        if not outputs or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        sent = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(output)
        try:
            arrived = torch.autograd.grad(output, list(outputs.values()), sent, retain_graph=True, allow_unused=True)
        except Exception:  # a backward of the model's may refuse, as a reentrant checkpoint's does
            arrived = (None,) * len(outputs)
        self.found[coupling.place].append({p: one.detach() for p, one in zip(outputs, arrived) if one is not None})
        return output.detach() if self.is_plain else None


def first_difference(model: nn.Module, record: Record, plain: LocalGradients, attached: LocalGradients) -> str:
    """Name the first layer whose units get other gradients in the attached model than in the plain one.

    Rounding may change single entries by any amount, as at the kink of a ReLU. So a unit counts as different if its
    gradients differ in two tokens or more, and in more than half of those that reach it.

    Args:
        model: The attached model.
        record: Its record.
        plain: What arrived in the plain model.
        attached: What arrived in the attached model.

    Returns:
        The path of the producer and its coupling in words, or "".
    """
    for move in record.moves:
        place = move.coupling.place
        for then, now in zip(plain.found.get(place, ()), attached.found.get(place, ())):
            for projection in move.coupling.producers:
                path = projection.path
                if path not in then or path not in now:
                    continue
                elements = projection.elements(torch.arange(projection.count, device="cpu"))
                expected = _by_element(model, record, path, then[path], elements)
                found = _by_element(model, record, path, now[path], move.places(projection)[elements])
                if _differs_in_a_unit(found, expected):
                    return f"{path}, in {move.coupling}"
    return ""


def _by_element(model: nn.Module, record: Record, path: str, gradient: Tensor, elements: Tensor) -> Tensor:
    """Some elements [n] of a gradient at a layer's output, as [tokens, n]."""
    layer = model.get_submodule(path)
    kind = record.mounts[path].layer.kind if path in record.mounts else kind_of(layer)
    return kind.features_last(layer, gradient).flatten(0, -2).index_select(1, elements.to(gradient.device))


def _differs_in_a_unit(found: Tensor, expected: Tensor) -> bool:
    """Whether two gradients [tokens, elements] differ in some element by more than rounding."""
    found, expected = found.float(), expected.float()
    usual = expected.square().mean().sqrt()
    is_near = (found - expected).abs() <= ROUNDING * (expected.abs() + usual)
    both_nan = found.isnan() & expected.isnan()
    wrong_tokens = (~is_near & ~both_nan).sum(0)
    reached_tokens = ((found != 0) | (expected != 0)).sum(0)
    return bool(((wrong_tokens >= 2) & (2 * wrong_tokens > reached_tokens)).any())


def _producers(coupling: Coupling) -> list[str]:
    return list(dict.fromkeys(projection.path for projection in coupling.producers))
