"""Layers whose weight holds base + s2 from one optimizer step to the next (`effective="step"`).

The slice is written into the weight before a forward if s2 has changed since it was written last, see
:meth:`s2ft.layers.S2Layer.hold`. All products are plain ones on the weight as it is: nothing is written and copied back
around them. Their numbers are those of the default, bit for bit, because the same functions see the same operands.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

WHY_UNCOMPILED = "effective='step' compares versions of s2 before every forward, which a compiled graph can't do"


class Formulas:
    """What a layer computes in one call. Each kind of layer has its own. Weights are as the layer stores them."""

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of the layer, given its effective weight."""
        raise NotImplementedError

    def keep(self, x: Tensor, s2: Tensor) -> Tensor:
        """What the gradient of s2 needs of x: x itself, or a copy of a part."""
        raise NotImplementedError

    def gradient_of_x(self, grad: Tensor, weight: Tensor) -> Tensor:
        """The gradient of x, given that of the output and the effective weight."""
        raise NotImplementedError

    def gradient_of_s2(self, grad: Tensor, kept: Tensor, s2: Tensor) -> Tensor:
        """The gradient of s2, in its dtype."""
        raise NotImplementedError

    def gradient_of_bias(self, grad: Tensor) -> Tensor:
        """The gradient of the bias, in the dtype of the product."""
        raise NotImplementedError

    def call_gradient_of_x(self, grad: Tensor, base: Tensor, s2: Tensor) -> Tensor:
        """The gradient of x by the op of effective="call", given the base. It can be differentiated again."""
        raise NotImplementedError


def held_product(layer: Any, x: Tensor, formulas: Formulas) -> Tensor:
    """Run a layer on its weight, which holds base + s2.

    Args:
        layer: The trainable layer (S2Layer). Its slice is written first if s2 has changed.
        x: Its input, in the dtype of the product.
        formulas: What to compute.

    Returns:
        The output. Gradients of any order flow to x, s2 and the bias.
    """
    return (_uncompiled if torch.compiler.is_compiling() else _product)(layer, x, formulas)


def _product(layer: Any, x: Tensor, formulas: Formulas) -> Tensor:
    layer.hold()
    weight, bias, s2 = layer.weight, layer.bias, layer.s2
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, s2, bias)):
        return formulas.run(x, weight, bias)
    # What is kept is made out here, where autograd sees that it depends on x: second derivatives need that.
    kept = formulas.keep(x, s2) if s2.requires_grad else None
    return _HeldProduct.apply(x, s2, bias, kept, layer, formulas)


_uncompiled = torch.compiler.disable(_product, reason=WHY_UNCOMPILED)  # its wrapper takes time in every call


class _HeldProduct(torch.autograd.Function):
    """A product with the weight that a layer holds.

    The weight and s2 are saved, so that a change in place of either between the two directions is PyTorch's error, as
    it is in the ops of effective="call".
    """

    @staticmethod
    def forward(ctx, x, s2, bias, kept, layer, formulas):
        ctx.layer, ctx.formulas, ctx.bias_dtype = layer, formulas, None if bias is None else bias.dtype
        ctx.save_for_backward(layer.weight, s2, kept)
        return formulas.run(x, layer.weight, bias)

    @staticmethod
    def backward(ctx, grad):
        weight, s2, kept = ctx.saved_tensors
        formulas, grad_x, grad_s2, grad_bias = ctx.formulas, None, None, None
        if ctx.needs_input_grad[0]:
            # The base may be back in the weight, for instance inside disable_adapters. And a second derivative has to
            # see that the effective weight depends on s2.
            if ctx.layer.is_held and not torch.is_grad_enabled():
                grad_x = formulas.gradient_of_x(grad, weight)
            else:
                grad_x = formulas.call_gradient_of_x(grad, ctx.layer.base_weight(), s2)
        if ctx.needs_input_grad[1]:
            grad_s2 = formulas.gradient_of_s2(grad, kept, s2)
        if ctx.needs_input_grad[2]:
            grad_bias = formulas.gradient_of_bias(grad).to(ctx.bias_dtype)
        return grad_x, grad_s2, grad_bias, None, None, None


# ---- which values of s2 a weight holds -----------------------------------------------------------------


class _OptimizerSteps:
    """Tells whether an optimizer of this process has made a step since.

    Some optimizers write through `.data` or by kernels of their own, which no version of a tensor counts.
    """

    latest = object()  # a new object after every step
    is_watching = False

    @classmethod
    @torch.compiler.disable
    def note(cls, *_) -> None:
        cls.latest = object()


def stamp(s2: nn.Parameter) -> tuple[int, int, object]:
    """Tell the present values of a slice from earlier ones.

    It changes with every change in place that PyTorch counts, with another memory, and with every optimizer step. It
    does not change when other code writes into ``s2.data``.
    """
    if not _OptimizerSteps.is_watching:
        _OptimizerSteps.is_watching = True
        register_optimizer_step_post_hook(_OptimizerSteps.note)
    return s2._version, s2.untyped_storage()._cdata, _OptimizerSteps.latest


# ---- streams of a GPU ----------------------------------------------------------------------------------

# By device: the stream of the last write of a slice, and an event after it.
_last_writes: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}


def note_write(weight: Tensor) -> None:
    """Remember that the present stream has just written into a weight. Call it under the lock of weights."""
    if weight.is_cuda and not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(weight.device)
        _last_writes[stream.device_index] = stream, stream.record_event()


def wait_for_write(weight: Tensor) -> None:
    """Let the present stream wait for the last write, if another stream has done it. The host does not wait.

    A pipeline runs a layer for the first part of a batch on one stream, where the slice is written, and for the next
    part on another. A stream that is being captured can't wait for work outside the graph.
    """
    if weight.is_cuda and not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(weight.device)
        last = _last_writes.get(stream.device_index)
        if last is not None and last[0] != stream:
            stream.wait_event(last[1])
