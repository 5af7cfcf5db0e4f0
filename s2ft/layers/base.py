"""What every layer with a trainable slice shares: the slice, fusing, and loading a state."""

import copy
import warnings
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from s2ft.layers.kind import Kind
from s2ft.ops import effective_units
from s2ft.ops._lock import LOCK, finish_interrupted
from s2ft.ops._memory import check_private


class S2Layer(nn.Module):
    """A frozen weight with a trainable slice; `dim` is the dimension of the weight, as outputs × inputs, that is sliced.

    Effective weight = weight, with s2 added to the selected units; the forward is that of the plain layer on the
    effective weight at every moment. Unfused, `weight` holds the base and the op adds s2 for the length of one
    product. Fused, `weight` holds the effective weight, the buffer `base` holds the slice it replaced, and the
    forward is the plain one and cannot train.

    Parameters: `weight` and `bias` are frozen; `s2` is trainable, of the slice's shape.
    """

    dim: ClassVar[int]
    kind: Kind  # of the plain layer
    wraps_plain: ClassVar[bool] = False  # whether it runs the plain layer, which then keeps its weight and bias
    _looked_at = 0  # the address of the weight that check_private has passed
    _fused_version = -1  # of s2, as the weight holds it
    is_tied = False  # whether other modules hold the same weight

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        start: int | None = None,
        end: int | None = None,
        *,
        index: Tensor | None = None,
        delta_dtype: torch.dtype | None = None,
    ) -> "S2Layer":
        """A layer on the very weight and bias of `module`: no copy, and both become frozen."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        # Hooks registered on the module keep working: both share the dicts they live in.
        self.__dict__.update({key: value for key, value in module.__dict__.items() if "_hooks" in key})
        self._copy_settings(module)
        check_private("weight", module.weight)
        self.weight, self.bias = module.weight, module.bias
        self._set_units(start, end, index, delta_dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.train(module.training)
        return self

    def _copy_settings(self, module: nn.Module) -> None:
        """Set what the layer knows about the plain one besides weight and bias."""

    @property
    def matrix(self) -> Tensor:
        """The weight as outputs × inputs (× taps of a convolution), in its own memory."""
        return self.kind.view(self.weight)

    @property
    def shape(self) -> torch.Size:
        """Of the weight as outputs × inputs (× taps)."""
        return self.matrix.shape

    def _set_units(self, start, end, index, delta_dtype) -> None:
        """Set start, end, index and s2."""
        shape = list(self.shape)
        size = shape[self.dim]
        side = f"the weight's {size} {('outputs', 'inputs')[self.dim]}"
        if index is None:
            start, end = 0 if start is None else int(start), size if end is None else int(end)
            if not 0 <= start < end <= size:
                raise ValueError(
                    f"start and end must satisfy 0 <= start < end <= {size} ({side}), got start={start}, end={end}"
                )
            length = end - start
        else:
            if start is not None or end is not None:
                raise ValueError("give start and end, or index, not both")
            index = torch.as_tensor(index, dtype=torch.int64)
            length = index.numel()
            if index.dim() != 1 or length == 0:
                raise ValueError(f"index must be a list of at least one unit, got shape {tuple(index.shape)}")
            if int(index.min()) < 0 or int(index.max()) >= size:
                raise ValueError(f"index must lie within {side}, got {int(index.min())} to {int(index.max())}")
            if index.unique().numel() != length:
                raise ValueError("index names a unit twice")
            index = index.to(self.weight.device)
        self.start, self.end = start, end
        self.register_buffer("index", index)
        shape[self.dim] = length
        self.s2 = nn.Parameter(torch.zeros(shape, device=self.weight.device, dtype=delta_dtype or self.weight.dtype))
        self._made = self.s2.dtype
        self.register_buffer("base", None)  # the replaced slice, while fused
        self.enabled = True

    @property
    def delta(self) -> Tensor:
        """s2, for the forward to add to the weight."""
        if not torch.compiler.is_compiling():
            self._check_weight()
            if self.s2.dtype.itemsize < self._made.itemsize:
                _say_cast(self._made, self.s2.dtype)
        return self.s2

    def _check_weight(self) -> None:
        """Raises: RuntimeError for a weight that was unfrozen; ValueError for one that lies in shared memory now."""
        weight = self.weight
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "weight requires a gradient, which this layer gives to s2 alone: it stays frozen. To train "
                "more of it select more units, to train all of it detach first"
            )
        check_private_once(self, weight)

    # ---- fuse and unfuse -------------------------------------------------------------------------

    @property
    def fused(self) -> bool:
        """Whether `weight` holds the effective weight now."""
        return self.base is not None

    def fuse(self) -> None:
        """Write base + s2 into `weight`, keeping the base slice; fused already: take s2 as it is now."""
        if not self.enabled:
            raise RuntimeError("this layer's adapter is off: set_adapter first")
        check_private("weight", self.weight)
        with LOCK:
            finish_interrupted()
            if self.base is None:
                # Kept before anything is written, so that unfuse restores it wherever an interrupt falls. Until the
                # version below is set the next forward writes base + s2 again.
                self._fused_version = -1
                self.base = self._units().clone()
            self._write_units(effective_units(self.base, self.s2.detach()))
            self._fused_version = self.s2._version

    def unfuse(self) -> None:
        """Copy the base slice back into `weight`, bit for bit."""
        if self.base is not None:
            with LOCK:
                self._write_units(self.base)
                self.base = None

    fuse_s2_weight, unfuse_s2_weight = fuse, unfuse  # the reference code's names

    def _check_fused(self) -> None:
        if torch.is_grad_enabled() and self.s2.requires_grad and self.training:
            raise RuntimeError(
                "this layer is fused and in training mode, where s2 would get no gradient: "
                "call unfuse() to train, or eval() / torch.no_grad() to run it"
            )
        if not torch.compiler.is_compiling() and self.s2._version != self._fused_version:
            self.fuse()  # s2 was changed since: by an optimizer, an average of weights, a loaded state

    def _units(self) -> Tensor:
        matrix = self.matrix.detach()
        if self.index is None:
            return matrix.narrow(self.dim, self.start, self.end - self.start)
        return matrix.index_select(self.dim, self.index)

    def _write_units(self, values: Tensor) -> None:
        self.write_units_of(self.weight, values)

    def write_units_of(self, weight: Tensor, values: Tensor) -> None:
        """Write `values`, of s2's shape, to the selected units of a weight that is stored as this layer's is."""
        matrix = self.kind.view(weight.detach())
        if self.index is None:
            matrix.narrow(self.dim, self.start, self.end - self.start).copy_(values)
        else:
            matrix.transpose(0, self.dim)[self.index] = values.transpose(0, self.dim)

    # ---- copies and states -----------------------------------------------------------------------
    # Of a weight that no other thread has in use: see stable_weights.

    def __deepcopy__(self, memo: dict[int, Any]) -> "S2Layer":
        return copy_at_rest(self, memo)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and torch.save, which read a tensor's memory later: the weight as a copy. A tied weight goes as it
        is, so that it is still tied when it is loaded."""
        state = {**self.__dict__, "_looked_at": 0}
        weight = self._parameters.get("weight")
        if weight is not None and not self.is_tied:
            state["_parameters"] = {**self._parameters, "weight": nn.Parameter(at_rest(weight), requires_grad=False)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        weight = self._parameters.get("weight")
        if weight is not None and weight.device.type == "cpu" and weight.is_shared():
            weight.data = weight.data.clone()  # torch.multiprocessing sends tensors in shared memory

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """The state's own `base` entry says whether it was fused; the layer takes that state over."""
        with torch.no_grad():
            if state_dict.get(prefix + "weight") is self.weight:
                pass  # an attached model found that it is the weight that is here
            elif prefix + "weight" not in state_dict:
                self.unfuse()  # s2 alone comes in: it belongs to the base
            if prefix + "base" in state_dict:
                self.base = self._units().clone() if self.base is None else self.base
            elif prefix + "weight" in state_dict:
                self.base = None  # the weight that comes in is a base
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if state_dict.get(prefix + "weight") is self.weight:
            self._fused_version = -1  # s2 may be another: the next forward writes it
        else:
            self._fused_version = self.s2._version

    def _selected(self) -> str:
        """For extra_repr."""
        units = f"start={self.start}, end={self.end}" if self.index is None else f"units={self.index.numel()}"
        return units + (", fused" if self.fused else "") + ("" if self.enabled else ", off")


def check_private_once(layer: nn.Module, weight: Tensor) -> None:
    """:func:`check_private`, where the weight's memory is another than at the last call; it is asked in every forward.

    Args:
        layer: keeps the address in `_looked_at`.
        weight: its weight. Only plain parameters on the CPU are looked at.
    """
    if weight.device.type == "cpu" and type(weight) is nn.Parameter and weight.data_ptr() != layer._looked_at:
        check_private("weight", weight)
        layer._looked_at = weight.data_ptr()


def copy_at_rest(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """The __deepcopy__ of a layer whose weight operations write to."""
    made = memo[id(layer)] = type(layer).__new__(type(layer))
    with LOCK:
        finish_interrupted()
        state = copy.deepcopy(layer.__dict__, memo)
    made.__setstate__(state)
    made._looked_at = 0
    return made


def at_rest(weight: Tensor) -> Tensor:
    """A copy of `weight`, taken while no operation has base + delta in it."""
    with LOCK:
        finish_interrupted()
        return weight.detach().clone()


@cache  # once a process
def _say_cast(made: torch.dtype, now: torch.dtype) -> None:
    made, now = (str(dtype).removeprefix("torch.") for dtype in (made, now))
    warnings.warn(
        f"s2 was made as {made} and comes to the forward as {now}. Where FSDP (MixedPrecisionPolicy's "
        f"param_dtype) or DeepSpeed cast it, updates still add up in {made}, but base + delta is the sum of "
        f"rounded parts, and not bit for bit the weight that merging writes: leave param_dtype unset and load "
        f"the base in {now}, or use torch.autocast. Where model.to did, updates below {now}'s step are lost",
        stacklevel=3,
    )
