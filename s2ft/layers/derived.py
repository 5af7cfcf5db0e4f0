"""Linear layers of classes derived from nn.Linear or transformers' Conv1D.

What such a class adds to the forward must not be lost. A class that is known to compute the same as its parent is
trained as its parent is. Every other class runs its own forward on the effective weight.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from s2ft.layers.base import S2Layer
from s2ft.layers.linear import CONV1D, Kind, LinearKind, is_conv1d
from s2ft.ops._library import transforms_active
from s2ft.ops.sliced import DTYPES

OWN_NAMES = tuple("s2 index base start end enabled dim kind kinds transposed plain own_units".split())
FALCON = ("FalconLinear", "modeling_falcon")  # its forward computes the same as nn.Linear's, in two steps


def computes_linear(module: nn.Module) -> bool:
    """Whether a layer derived from nn.Linear computes ``F.linear(x, weight, bias)`` and nothing else.

    That is known of layers with nn.Linear's forward and no further tensors, and of Falcon's.
    """
    if module._modules or module._buffers.keys() or module._parameters.keys() - {"weight", "bias"}:
        return False
    found = type(module)
    return found.forward is nn.Linear.forward or (found.__name__, found.__module__.rpartition(".")[2]) == FALCON


# ---- the forward of the class on another weight --------------------------------------------------------


def run_on(
    module: nn.Module,
    parameters: dict[str, Tensor | None],
    buffers: dict[str, Tensor | None],
    args: tuple,
    kwargs: dict[str, Any] | None = None,
    **attributes: Any,
) -> Any:
    """Run the forward of a layer's class on other tensors. The layer's hooks do not run.

    What the forward assigns to attributes and buffers, such as statistics, is kept. The layer's own tensors stay.

    Args:
        module: The layer.
        parameters: Parameters to use in place of those of the same names.
        buffers: Its buffers by name. The forward may replace them there.
        args: Arguments of the forward.
        kwargs: Keyword arguments of the forward.
        attributes: Other attributes to use in place of the layer's.

    Returns:
        What the forward returns.
    """
    # A second object with the same attributes, so that threads that run the layer at once don't disturb each other
    other = object.__new__(type(module))
    other.__dict__.update(module.__dict__, **attributes)
    other.__dict__["_parameters"] = {**module._parameters, **parameters}
    other.__dict__["_buffers"] = buffers
    before = dict(other.__dict__)
    result = type(module).forward(other, *args, **(kwargs or {}))
    for name, value in other.__dict__.items():
        if value is not before.get(name, module):
            module.__dict__[name] = value
    return result


class S2OwnForward(S2Layer):
    """What S2ColumnOwnForward and S2RowOwnForward share: the plain layer's forward, run on the effective weight.

    The layer has the parameters, buffers and modules of the plain one under the same names. A forward copies the
    weight, and a backward computes the gradient of all of it before it takes that of the selected units. So a step
    costs as much as full training of this layer, while optimizer and adapter have the slice only.

    Attributes:
        plain: The plain layer. It is not a submodule. Its tensors may be missing, because this layer has them.
    """

    plain: nn.Module

    def _copy_settings(self, module: nn.Module) -> None:
        names = [*module._parameters, *module._buffers, *module._modules]
        taken = next((name for name in names if name in OWN_NAMES), None)
        if taken is not None:
            raise ValueError(
                f"a {type(module).__name__} has a tensor or module {taken!r}, a name that its trainable layer uses for "
                "itself: rename it in the class"
            )
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            self.add_module(name, child)
        self.__dict__["plain"] = module  # not as a submodule
        self.transposed = is_conv1d(module)

    def __getattr__(self, name: str) -> Any:
        """Find what this layer has not got in the plain one, because other modules may read its settings."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "plain" not in self.__dict__ or name in OWN_NAMES:
                raise
            return getattr(self.plain, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what only the plain layer has there, because its forward reads it."""
        if (
            "plain" in self.__dict__
            and name in self.plain.__dict__
            and name not in self.__dict__
            and name[0] != "_"
            and name != "forward"  # which accelerate's hooks set here
        ):
            setattr(self.plain, name, value)
        else:
            super().__setattr__(name, value)

    def take_over(self, module: nn.Module) -> None:
        for tensors in (module._parameters, module._buffers):
            tensors.update(dict.fromkeys(tensors))

    def give_back(self, module: nn.Module) -> None:
        module._parameters.update({name: self._parameters[name] for name in module._parameters})
        module._buffers.update({name: self._buffers[name] for name in module._buffers})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain layer's forward on the effective weight; its arguments and what it returns are those."""
        weight, s2 = self.weight, self.s2
        if self.enabled:
            is_held = not (torch.compiler.is_compiling() or transforms_active()) and self.write_if_changed(weight, s2)
            if not is_held or s2.requires_grad and torch.is_grad_enabled():
                weight = self.effective_weight(s2, weight)
        parameters: dict[str, Tensor | None] = {name: self._parameters[name] for name in self.plain._parameters}
        parameters["weight"] = weight
        return run_on(
            self.plain, parameters, self._buffers, args, kwargs, training=self.training, _modules=self._modules
        )

    def extra_repr(self) -> str:
        return f"{type(self.plain).__name__}, weight={tuple(self.shape)}, {super().extra_repr()}"


class S2ColumnOwnForward(S2OwnForward):
    """Layer of a class derived from nn.Linear that trains outputs."""

    dim = 0


class S2RowOwnForward(S2OwnForward):
    """Layer of a class derived from nn.Linear that trains inputs."""

    dim = 1


# ---- kinds ---------------------------------------------------------------------------------------------


def _can_add(found: Any) -> bool:
    """Whether the weight is a plain parameter in a dtype in which a delta can be added, and not a packed one."""
    weight = getattr(found, "weight", None)
    return type(weight) is nn.Parameter and weight.dim() == 2 and weight.dtype in DTYPES


class OutProjectionKind(Kind):
    """`out_proj` of nn.MultiheadAttention, which reads its weight and never runs it. A trainable layer in its place
    would change nothing and get no gradient."""

    name = "out_proj of nn.MultiheadAttention, which uses the weight without running the layer"

    def matches(self, found: Any) -> bool:
        return isinstance(found, NonDynamicallyQuantizableLinear)


class SameForwardKind(LinearKind):
    """A class derived from nn.Linear that computes the same, for instance transformers' FalconLinear."""

    name = "classes derived from nn.Linear"

    def matches(self, found: Any) -> bool:
        return isinstance(found, nn.Linear) and _can_add(found) and computes_linear(found)


class OwnForwardKind(Kind):
    """A class derived from nn.Linear or Conv1D with a forward of its own, such as a router that picks experts."""

    layers = (S2ColumnOwnForward, S2RowOwnForward)

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed
        self.name = f"classes derived from {CONV1D.name if transposed else 'nn.Linear'}, with their own forward"

    def matches(self, found: Any) -> bool:
        return (is_conv1d(found) if self.transposed else isinstance(found, nn.Linear)) and _can_add(found)

    def run_with_delta(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        x, delta, index, dim, *rest = args
        weight = self.with_delta(module.weight, delta, index, dim)
        return run_on(module, {"weight": weight}, module._buffers, (x, *rest), kwargs)

    def features_last(self, module: nn.Module, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise ValueError(
                f"a {type(module).__name__} returns a {type(x).__name__}, so calibration data can't score its outputs: "
                "use another selection for it, or exclude it"
            )
        return x


OUT_PROJECTION, SAME_FORWARD = OutProjectionKind(), SameForwardKind()
OWN_LINEAR, OWN_CONV1D = S2OwnForward.kinds = OwnForwardKind(transposed=False), OwnForwardKind(transposed=True)
DERIVED = (OUT_PROJECTION, SAME_FORWARD, OWN_LINEAR, OWN_CONV1D)
