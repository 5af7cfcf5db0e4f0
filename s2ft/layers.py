"""Linear layers that train a few output rows or input columns of a frozen weight."""
import math
from typing import ClassVar, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.ops import effective_units, indexed_linear, sliced_linear


class S2Linear(nn.Module):
    """What S2ColumnLinear and S2RowLinear share; `dim` is the dimension of the weight that is sliced.

    Effective weight = weight, with s2 added to the selected units; :meth:`forward` is
    ``F.linear(x, effective weight, bias)`` at every moment. Unfused, `weight` holds the base and the
    op adds s2 for the length of one GEMM. Fused, `weight` holds the effective weight, the buffer
    `base` holds the slice it replaced, and the forward is a plain linear that cannot train.

    Parameters: `weight` (out, in) and `bias` (out) are frozen; `s2` is trainable, of the slice's shape.
    """

    dim: ClassVar[int]

    def __init__(self, in_features: int, out_features: int, bias: Union[bool, Tensor, None] = True,
                 start: Optional[int] = None, end: Optional[int] = None, device=None, dtype=None, *,
                 index: Optional[Tensor] = None, delta_dtype: Optional[torch.dtype] = None) -> None:
        """Args:
            in_features, out_features: as in nn.Linear.
            bias: True or False as in nn.Linear, or the values [out_features] to start from.
            start, end: the slice; default: from the first to the last unit.
            index: [n] int64, the units where they are scattered, instead of start and end.
            device, dtype: of the weight; `s2` follows both.
            delta_dtype: dtype of `s2` where it shall differ, e.g. float32 on a bfloat16 weight, so that
                small updates are not rounded away.
        Raises: ValueError for an empty, reversed or repeated selection or one outside the weight.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype),
                                   requires_grad=False)
        self._add_bias(bias)
        self._select(start, end, index, delta_dtype)
        self.reset_parameters()
        if isinstance(bias, Tensor):
            with torch.no_grad():
                self.bias.copy_(bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, start: Optional[int] = None, end: Optional[int] = None, *,
                    index: Optional[Tensor] = None, delta_dtype: Optional[torch.dtype] = None) -> "S2Linear":
        """A layer on the very weight and bias of `linear`: no copy, and both become frozen."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        # Hooks registered on the linear keep working: both modules share the dicts they live in.
        self.__dict__.update({key: value for key, value in linear.__dict__.items() if "_hooks" in key})
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._select(start, end, index, delta_dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.train(linear.training)
        return self

    def _add_bias(self, bias) -> None:
        if isinstance(bias, Tensor) and bias.shape != (self.out_features,):
            raise ValueError(f"bias must have shape ({self.out_features},), got {tuple(bias.shape)}")
        if bias is None or bias is False:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(self.weight.new_empty(self.out_features), requires_grad=False)

    def _select(self, start, end, index, delta_dtype) -> None:
        """Set start, end, index and s2."""
        size = self.weight.shape[self.dim]
        side = f"the weight's {size} {('outputs', 'inputs')[self.dim]}"
        if index is None:
            start, end = 0 if start is None else int(start), size if end is None else int(end)
            if not 0 <= start < end <= size:
                raise ValueError(f"start and end must satisfy 0 <= start < end <= {size} ({side}), "
                                 f"got start={start}, end={end}")
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
        shape = (length, self.in_features) if self.dim == 0 else (self.out_features, length)
        self.s2 = nn.Parameter(torch.zeros(shape, device=self.weight.device, dtype=delta_dtype or self.weight.dtype))
        self.register_buffer("base", None)   # the replaced slice, while fused
        self.enabled = True

    def reset_parameters(self) -> None:
        """Initialise weight and bias as nn.Linear does, s2 with zeros."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.s2)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] → [..., out_features]."""
        if self.fused:
            self._check_fused()
            return F.linear(input, self.weight, self.bias)
        if not self.enabled:
            return F.linear(input, self.weight, self.bias)
        if self.index is None:
            return sliced_linear(input, self.weight, self.s2, self.start, self.dim, self.bias)
        return indexed_linear(input, self.weight, self.s2, self.index, self.dim, self.bias)

    # ---- fuse and unfuse -------------------------------------------------------------------------

    @property
    def fused(self) -> bool:
        """Whether `weight` holds the effective weight now."""
        return self.base is not None

    @torch.no_grad()
    def fuse(self) -> None:
        """Write base + s2 into `weight`, keeping the base slice; fused already: take s2 as it is now."""
        if not self.enabled:
            raise RuntimeError("this layer's adapter is off: set_adapter first")
        base = self._units().clone() if self.base is None else self.base
        self._write_units(effective_units(base, self.s2))
        self.base = base
        self._fused_version = self.s2._version

    @torch.no_grad()
    def unfuse(self) -> None:
        """Copy the base slice back into `weight`, bit for bit."""
        if self.base is not None:
            self._write_units(self.base)
            self.base = None

    fuse_s2_weight, unfuse_s2_weight = fuse, unfuse   # the reference code's names

    def _check_fused(self) -> None:
        if torch.is_grad_enabled() and self.s2.requires_grad and self.training:
            raise RuntimeError("this layer is fused and in training mode, where s2 would get no gradient: "
                               "call unfuse() to train, or eval() / torch.no_grad() to run it")
        if not torch.compiler.is_compiling() and self.s2._version != self._fused_version:
            self.fuse()   # s2 was changed since: by an optimizer, an average of weights, a loaded state

    def _units(self) -> Tensor:
        if self.index is None:
            return self.weight.narrow(self.dim, self.start, self.end - self.start)
        return self.weight.index_select(self.dim, self.index)

    def _write_units(self, values: Tensor) -> None:
        if self.index is None:
            self._units().copy_(values)
        else:
            self.weight.transpose(0, self.dim)[self.index] = values.transpose(0, self.dim)

    # ---- state -----------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """The state's own `base` entry says whether it was fused; the layer takes that state over."""
        with torch.no_grad():
            if prefix + "weight" not in state_dict:
                self.unfuse()   # s2 alone comes in: it belongs to the base
            if prefix + "base" in state_dict:
                self.base = self._units().clone() if self.base is None else self.base
            elif prefix + "weight" in state_dict:
                self.base = None   # the weight that comes in is a base
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._fused_version = self.s2._version

    def extra_repr(self) -> str:
        units = f"start={self.start}, end={self.end}" if self.index is None else f"units={self.index.numel()}"
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, {units}" + (", fused" if self.fused else "")
                + ("" if self.enabled else ", off"))


class S2ColumnLinear(S2Linear):
    """Linear that trains outputs: s2 [end-start, in_features] on ``weight[start:end, :]`` (q, k, v, up, gate)."""

    dim = 0


class S2RowLinear(S2Linear):
    """Linear that trains inputs: s2 [out_features, end-start] on ``weight[:, start:end]`` (o, down).

    For the backward it keeps the slice of its input, not the input.
    """

    dim = 1
