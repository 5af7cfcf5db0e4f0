"""The product of a trainable layer: a plain one on its weight, which holds base + s2, with the gradient of the slice.

The kind of the layer gives the formulas, see :class:`s2ft.layers.kind.Kind`. Numbers are those of the merged model, bit
for bit, because the same functions see the same operands. Only what the gradient of the slice needs is kept of x (S²FT
paper, section 3.3).
"""

from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from s2ft.ops._library import LIBRARY, is_dynamo_compiling, runs_directly, transforms_active

# ---- the product ---------------------------------------------------------------------------------------


def product(layer: Any, x: Tensor, call: Any = None) -> Tensor:
    """Run a trainable layer (S2Layer) on its weight, whose slice is written first if s2 has changed.

    Args:
        layer: The layer.
        x: Its input, in the dtype of the product.
        call: What else the formulas of its kind need to know of this call.

    Returns:
        The output. Gradients of any order flow to x, s2 and the bias.
    """
    weight, bias, s2 = layer.tensors()
    # torch.func can't look into the function below, and an exported program has no layers that write their slices.
    if transforms_active() or torch.compiler.is_exporting():
        return layer.kind.run(x, layer.effective_weight(s2, weight), bias, call)
    if not is_dynamo_compiling():
        layer.hold(weight, s2)
    trains = s2.requires_grad or x.requires_grad or bias is not None and bias.requires_grad
    if not (trains and torch.is_grad_enabled()):
        return layer.kind.run(x, _multiplied(layer, weight, s2), bias, call)
    outputs = _Product.apply(layer, x, weight, s2, bias, call)
    return outputs[0] if type(outputs) is tuple else outputs


class _Product(torch.autograd.Function):
    """The product. A copy that is kept of x is a second output of the node: second derivatives reach x through it."""

    @staticmethod
    def forward(ctx, layer, x, weight, s2, bias, call):
        ctx.set_materialize_grads(False)
        kind = ctx.kind = layer.kind
        y = kind.run(x, _multiplied(layer, weight, s2, trains=True), bias, call)
        kept = kind.keep(layer, x, call) if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(weight, s2, kept)
        ctx.layer, ctx.shape, ctx.call, ctx.bias_dtype = layer, x.shape, call, None if bias is None else bias.dtype
        # A compiled graph has no second derivatives.
        return (y, kept) if kept is not None and layer.dim == 1 and not is_dynamo_compiling() else y

    @staticmethod
    def backward(ctx, grad, grad_kept=None):
        _, of_x, _, of_s2, of_bias, _ = ctx.needs_input_grad
        (weight, s2, kept), layer, kind = ctx.saved_tensors, ctx.layer, ctx.kind
        grad_x = grad_s2 = grad_bias = None
        if grad is not None:
            records = torch.is_grad_enabled()
            if of_x:
                grad_x = kind.grad_of_x(grad, _multiplied(layer, weight, s2, True, records), ctx.shape, ctx.call)
            if of_s2:
                if not is_dynamo_compiling():  # the forward of a graph has said so
                    layer.expect_change()
                plain = not records and runs_directly(grad, s2)
                grad_s2 = kind.grad_of_s2(layer, grad, kept, s2, ctx.call, plain)
            if of_bias:
                grad_bias = kind.grad_of_bias(grad).to(ctx.bias_dtype)
        if grad_kept is not None and of_x:
            through_kept = _through_copy(layer, grad_kept, ctx.shape, ctx.call)
            grad_x = through_kept if grad_x is None else grad_x + through_kept
        return None, grad_x, None, grad_s2, grad_bias, None


def _multiplied(
    layer: Any, weight: Tensor, s2: Tensor, trains: bool = False, is_differentiated: bool = False
) -> Tensor:
    """The effective weight: the layer's own, or a copy if it does not hold base + s2 now.

    The base is back in the weight inside disable_adapters, where a backward may run. And a second derivative has to see
    that the weight depends on s2.
    """
    if is_dynamo_compiling():
        torch.ops.s2ft.check_held(s2, trains)  # a compiled function can't compare versions itself
        return weight
    if is_differentiated:
        return layer.effective_weight(s2, weight)
    return weight if layer.is_held(weight, s2) else layer.effective_weight(s2, weight).detach()


def _through_copy(layer: Any, grad: Tensor, shape: torch.Size, call: Any) -> Tensor:
    """The part of the gradient of x that comes through the copy of its units, which is linear in x."""
    with torch.enable_grad():
        x = grad.new_zeros(shape, requires_grad=True)
        return torch.autograd.grad(layer.kind.keep(layer, x, call), x, grad, create_graph=True)[0]


# ---- which values of s2 a weight holds -----------------------------------------------------------------

_holding: "WeakValueDictionary[int, Any]" = WeakValueDictionary()  # layers by the address of their s2's storage


def stamp(tensor: Tensor) -> tuple[int, Any]:
    """Tell the present values of a slice, or of a weight, from earlier ones. It keeps no memory alive.

    It changes with every change in place that PyTorch counts, and with another memory. It does not change when other
    code writes into ``s2.data``. Steps of optimizers, some of which write in this way, are noted apart.
    """
    return tensor._version, ref(tensor.untyped_storage())


def note_written(layer: Any, weight: Tensor, s2: Tensor | None = None) -> None:
    """Remember that a layer has written into its weight, so that other streams wait for it.

    Args:
        layer: The layer (S2Layer).
        weight: Its weight.
        s2: The s2 that was written, so that it is written again after a step of the optimizer. None: the base was.
    """
    if s2 is not None:
        if not _OptimizerSteps.is_watched:
            _OptimizerSteps.is_watched = True
            register_optimizer_step_post_hook(_OptimizerSteps.note)
        _holding[s2.untyped_storage()._cdata] = layer
    if weight.is_cuda and not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(weight.device)
        _last_writes[stream.device_index] = stream, stream.record_event()


# By device: the stream of the last write of a slice, and an event after it.
_last_writes: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}


def wait_for_write(weight: Tensor) -> None:
    """Let the present stream wait for the last write, if another stream has done it. The host does not wait.

    A pipeline runs a layer for the first part of a batch on one stream, where the slice is written, and for the next
    part on another. A stream that is being captured can't wait for work outside the graph.
    """
    if not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(weight.device)
        last = _last_writes.get(stream.device_index)
        if last is not None and last[0] != stream:
            stream.wait_event(last[1])


class _OptimizerSteps:
    """Writes the slices that an optimizer has changed, so that whoever reads a weight finds base + s2 after the step.

    An optimizer may change s2 without PyTorch counting it. What an engine manages has its new values later, so that it
    is written before the next forward.
    """

    is_watched = False

    @staticmethod
    @torch.compiler.disable
    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
        for layer in set(_holding.values()):
            if layer.fused and (id(layer.s2) in stepped or layer.is_managed):
                layer.after_step()


def _check_held(s2: Tensor, trains: bool) -> None:
    layer = _holding.get(s2.untyped_storage()._cdata)
    if layer is None or not layer.holds(stamp(s2)):
        raise RuntimeError(
            "a compiled graph multiplies by a weight that does not hold the present values of s2: they have changed "
            "since, or the adapter is off. Call the model that has the adapter, and not a part of it, or layer.fuse() "
            "before"
        )
    if trains:
        layer.expect_change()


LIBRARY.define("check_held(Tensor s2, bool trains) -> ()")
LIBRARY.impl("check_held", _check_held, "CompositeExplicitAutograd")
torch.library.register_fake("s2ft::check_held", lambda s2, trains: None, lib=LIBRARY)
torch.fx.node.has_side_effect(torch.ops.s2ft.check_held.default)
