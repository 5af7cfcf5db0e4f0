"""What every trainable layer shares: the slice, fusing, copies and state dicts."""

import copy
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn

from s2ft.distributed import has_master_copy, is_sharded, own_shard, reads_weights, write_full_values
from s2ft.layers.held import note_write, stamp, wait_for_write
from s2ft.layers.kind import Kind
from s2ft.ops import effective_units
from s2ft.ops._library import is_being_captured
from s2ft.ops._lock import LOCK, finish_interrupted
from s2ft.ops._memory import check_private, check_writable

UNITS = ("index", "first")  # buffers that say which units are selected
CALL_INSTEAD = "use effective='call', the default"


class S2Layer(nn.Module):
    """A layer with a frozen weight and a trainable slice of it (S²FT paper, section 3.2).

    The effective weight is the weight with `s2` added to the selected units. The forward is always that of the plain
    layer on the effective weight. Unfused, `weight` holds the base, and the op adds `s2` for the duration of one
    product. Fused, `weight` holds the effective weight, and the forward is the plain one, which cannot train.
    With `effective` "step" a forward fuses the layer first, and a fused layer can train.

    Attributes:
        weight: Frozen weight, as the plain layer stores it.
        bias: Frozen bias [outputs], or None.
        s2: Trainable slice: [n, inputs] if `dim` is 0, [outputs, n] if `dim` is 1.
        index: The selected units [n] int64, where they do not fill the range from `start` to `end`; else None.
        base: The values of the selected units before fusing; None while the layer is not fused.
        enabled: Whether `s2` is added to the weight.
        dim: Dimension of the weight, as outputs × inputs, in which units are selected.
        effective: "call" or "step", see :class:`s2ft.S2FTConfig`.
        kind: What S²FT knows about the plain layer.
    """

    dim: ClassVar[int]
    kind: Kind
    effective = "call"
    _looked_at = 0  # address of the weight whose memory has been checked
    _written: tuple | None = None  # stamp of the s2 that the weight of a fused layer holds; None: not known
    _base_of = 0  # id of the weight that `base` belongs to
    is_tied = False  # whether other modules hold the same weight
    awaits_order = False  # whether the units of the weight must be reordered before this layer may run
    _first_values: Tensor | None = None  # of an s2 that is on the meta device, in full; None: zeros

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        start: int | None = None,
        end: int | None = None,
        *,
        index: Tensor | None = None,
        delta_dtype: torch.dtype | None = None,
        effective: str = "call",
    ) -> "S2Layer":
        """Make a trainable layer that uses the weight and bias of a plain layer, without copying them.

        Args:
            module: The plain layer. Its weight and bias are frozen.
            start: First selected unit; default: 0.
            end: End of the selected units (exclusive); default: the number of units.
            index: The selected units [n] int64, instead of `start` and `end`.
            delta_dtype: dtype of `s2`; default: that of the weight.
            effective: "call" or "step", see :class:`s2ft.S2FTConfig`. With "step" the weight may be in memory that
                other processes read.

        Returns:
            The trainable layer, in the mode (training or evaluation) of `module`.

        Raises:
            ValueError: The selection is empty, names a unit twice or lies outside the weight, or the weight is in
                shared or read-only memory, or this kind of layer does not support `effective`.

        Example:
            >>> linear = torch.nn.Linear(8, 16)
            >>> layer = s2ft.S2ColumnLinear.from_module(linear, 0, 4)
            >>> layer.s2.shape, layer.weight is linear.weight
            (torch.Size([4, 8]), True)
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        # Hooks registered on the module keep working, because both share the dicts of hooks.
        self.__dict__.update({key: value for key, value in module.__dict__.items() if "_hook" in key})
        self._copy_settings(module)
        self.weight, self.bias = module.weight, module.bias
        self._set_effective(effective)
        self._check_memory(self.weight)
        self._set_units(start, end, index, delta_dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.train(module.training)
        return self

    def _set_effective(self, effective: str) -> None:
        """Set `effective`. Raises ValueError if it is unknown, or if this kind of layer does not support it."""
        if effective not in ("call", "step"):
            raise ValueError(f"effective must be 'call' or 'step', got {effective!r}")
        if effective == "step" and self.kind.why_not_held:
            raise ValueError(f"effective='step' is not possible for {self.kind.name}: {self.kind.why_not_held}")
        self.effective = effective

    def _check_memory(self, weight: Tensor) -> None:
        """Raise ValueError if the weight can't be written, or if another process may read what it must not see."""
        if self.effective == "step":
            check_writable("effective='step'", weight)
        else:
            check_private("weight", weight)

    def _copy_settings(self, module: nn.Module) -> None:
        """Copy the attributes of the plain layer that the forward needs, besides weight and bias."""

    def take_over(self, module: nn.Module) -> None:
        """Remove the weight and bias from the plain layer that this layer replaces in a model.

        Only this layer keeps them: a second owner would keep them whole where this layer's are sharded or moved.
        """
        module.weight = module.bias = None

    def give_back(self, module: nn.Module) -> None:
        """Undo :meth:`take_over`: the plain layer gets the weight and bias as they are now."""
        module.weight, module.bias = self.weight, self.bias

    @property
    def matrix(self) -> Tensor:
        """The weight as outputs × inputs (× taps of a convolution), in the weight's own memory."""
        return self.kind.view(self.weight)

    @property
    def shape(self) -> torch.Size:
        """The shape of :attr:`matrix`."""
        return self.kind.shape(self)

    def _set_units(self, start, end, index, delta_dtype) -> None:
        """Set `start`, `end`, `index` and `s2`."""
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
                raise ValueError(f"start and end must be None with an index, got start={start}, end={end}")
            index = torch.as_tensor(index, dtype=torch.int64)
            length = index.numel()
            if index.dim() != 1 or length == 0:
                raise ValueError(f"index must be a list of at least one unit, got shape {tuple(index.shape)}")
            if int(index.min()) < 0 or int(index.max()) >= size:
                raise ValueError(f"index must be within {side}, got {int(index.min())} to {int(index.max())}")
            if index.unique().numel() != length:
                raise ValueError("index must have each unit once, got a unit twice")
            index = beside(index, self.weight)
        self.start, self.end = start, end
        self.register_buffer("index", index)
        shape[self.dim] = length
        self._make_s2(shape, delta_dtype or self.weight.dtype)

    def _make_s2(self, shape: list[int], dtype: torch.dtype) -> None:
        """Make an s2 of zeros, and what else the layer trains with.

        If the weight is on the meta device, s2 is on the CPU: accelerate tells the parameters of an optimizer apart by
        their address, and those on the meta device have none.
        """
        arrives = self.weight.is_meta or not reads_weights() and self.weight.device.type == "cpu"
        zeros = untouched_zeros(shape, dtype) if arrives else torch.zeros(shape, device=self.weight.device, dtype=dtype)
        self.s2 = nn.Parameter(zeros)
        self._made = self.s2.dtype
        self.register_buffer("base", None)
        self.enabled = True

    @property
    def delta(self) -> Tensor:
        """The slice that the forward adds to the weight, after checks."""
        return self.checked(self.s2, self.weight)

    def checked(self, s2: Tensor, weight: Tensor) -> Tensor:
        """Check the layer's slice and weight before a forward, and return the slice."""
        if not torch.compiler.is_compiling():
            self._check_weight(weight)
            if s2.dtype is not self._made and s2.dtype.itemsize < self._made.itemsize:
                _warn_about_cast(self._made, s2.dtype)
        return s2

    def _check_weight(self, weight: Tensor) -> None:
        """Raise RuntimeError if the weight is unfrozen or not in order, ValueError if its memory is unsuitable now."""
        if self.awaits_order and not weight.is_meta:
            raise RuntimeError(
                "the weights were loaded after attach, and their units are not in the order of this layer yet: call "
                "the model that has the adapter, or load its weights by load_state_dict, which puts them in order"
            )
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "weight must be frozen, and it requires a gradient: this layer trains s2 only. To train more of the "
                "weight, select more units; to train all of it, detach first"
            )
        check_private_once(self, weight, self._check_memory)

    # ---- fuse and unfuse -------------------------------------------------------------------------

    @property
    def fused(self) -> bool:
        """Whether `weight` holds the effective weight."""
        return self.base is not None

    def fuse(self) -> None:
        """Write base + s2 into `weight` and keep the base's values in `base`.

        A fused layer writes the present values of `s2`. Call this after other code has written into ``s2.data``, which
        a forward does not notice.

        Raises:
            RuntimeError: The adapter is off, or the weight is quantized.
            ValueError: The weight is in read-only memory, or, with `effective` "call", in shared memory.

        Example:
            >>> layer = s2ft.S2RowLinear(8, 16, end=4)
            >>> layer.fuse()
            >>> layer.fused
            True
        """
        if not self.enabled:
            raise RuntimeError("this layer's adapter is off: call s2ft.set_adapter first")
        check_private_once(self, self.weight, self._check_memory)
        with LOCK, torch.inference_mode(False):  # tensors that are made in inference mode can't be changed later
            finish_interrupted()
            self._check_same_weight()
            if self.base is None:
                # The base is kept before anything is written, so that unfuse restores it after an interrupt at any
                # moment. Until the stamp below is set, the next forward writes base + s2 again.
                self._written, self._base_of = None, id(self.weight)
                self.base = self._units().clone()
            now = stamp(self.s2)  # before the values are read: if another thread changes them, they are written again
            self._write_units(self._effective(self.base))
            note_write(self.weight)
            self._written = now

    def unfuse(self) -> None:
        """Copy the base's values back into `weight`, bit for bit. A layer that is not fused stays as it is.

        Example:
            >>> layer = s2ft.S2RowLinear(8, 16, end=4)
            >>> layer.fuse()
            >>> layer.unfuse()
            >>> layer.fused
            False
        """
        self._check_same_weight()
        if self.base is not None:
            with LOCK:
                self._written = None  # an interrupt below leaves a fused layer that writes base + s2 again
                self._write_units(self.base)
                note_write(self.weight)
                if self.base.is_cuda:  # another stream may have made it, and would use its memory again at once
                    self.base.record_stream(torch.cuda.current_stream(self.base.device))
                self.base = None

    fuse_s2_weight, unfuse_s2_weight = fuse, unfuse  # the reference code's names

    def _check_fused(self) -> None:
        if torch.is_grad_enabled() and self.s2.requires_grad and self.training:
            raise RuntimeError(
                "this layer is fused and in training mode, where s2 gets no gradient: call unfuse() to train, or run "
                "the layer in eval() or under torch.no_grad()"
            )
        if not torch.compiler.is_compiling() and not self.is_held:
            self.fuse()  # an optimizer, an average of weights or a loaded state has changed s2

    @property
    def is_held(self) -> bool:
        """Whether `weight` holds base + s2 with the present values of `s2`."""
        if self._written is None or self.base is None:
            return False
        self._check_same_weight()
        return self._written == stamp(self.s2)

    def _check_same_weight(self) -> None:
        """Check that no other parameter has taken the place of the weight that `base` belongs to.

        Only layers that fuse themselves check this: whoever calls fuse knows that the weight is not the base.

        Raises:
            RuntimeError: One has. `base` is kept, and everything works again when the weight is back.
        """
        if self.effective == "step" and self.base is not None and self._base_of != id(self.weight):
            raise RuntimeError(
                "effective='step': the weight was replaced or sharded while it held base + s2, so that this layer's "
                f"copy of the base belongs to another weight: call s2ft.unfuse(model) before, or {CALL_INSTEAD}"
            )

    def hold(self) -> None:
        """Write base + s2 into `weight` if it does not hold it, for a layer with `effective` "step".

        Raises:
            RuntimeError: The weight is unfrozen or not in order, or is spread over ranks, or the first call is part of
                the capture of a CUDA graph.
        """
        weight = self.weight
        self._check_weight(weight)
        if not weight.is_cuda and self.is_held:
            return
        is_captured = is_being_captured(weight)
        if is_captured and self.base is None:
            raise RuntimeError(
                "effective='step' keeps a copy of the base before it writes base + s2, and a CUDA graph would copy it "
                "again at every replay: run the model once before you capture it"
            )
        # A replay does not run this function, so a graph writes the slice at every replay.
        if is_captured or not self.is_held:
            why = why_not_whole(self)
            if why:
                raise RuntimeError(f"effective='step' writes base + s2 into whole weights, and {why}: {CALL_INSTEAD}")
            self.fuse()
        wait_for_write(weight)

    def base_weight(self) -> Tensor:
        """The weight with the base's values, as it is stored: a copy if the layer is fused, else the weight itself."""
        self._check_same_weight()
        if self.base is None:
            return self.weight
        copy = at_rest(self.weight)
        self.write_units_of(copy, self.base)
        return copy

    def _units(self) -> Tensor:
        matrix = self.matrix.detach()
        if self.index is None:
            return matrix.narrow(self.dim, self.start, self.end - self.start)
        return matrix.index_select(self.dim, self.index)

    def _effective(self, base: Tensor) -> Tensor:
        return effective_units(base, self.s2.detach())

    def _write_units(self, values: Tensor) -> None:
        # A graph of autograd that was recorded before is still valid, because its backward looks at `base`. So the
        # version of the weight, by which autograd would refuse the graph, is not changed.
        self.write_units_of(self.weight.data if self.effective == "step" else self.weight, values)

    def write_units_of(self, weight: Tensor, values: Tensor) -> None:
        """Write values to the selected units of a weight.

        Args:
            weight: A tensor of the shape of this layer's weight.
            values: Values of the shape of `s2`.
        """
        matrix = self.kind.view(weight.detach())
        if self.index is None:
            matrix.narrow(self.dim, self.start, self.end - self.start).copy_(values)
        else:
            matrix.transpose(0, self.dim)[self.index] = values.transpose(0, self.dim)

    # ---- the meta device -------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        """Move or cast the layer. The units are kept on the way over the meta device, and so is s2 until it is sharded.

        While the weight is on the meta device, fn may be that of to_empty, which would leave no values in s2.
        """
        if self.effective == "step":
            self.unfuse()  # the sum of two casts is not the cast of a sum
        units = {name: buffer for name in UNITS if (buffer := self._buffers.get(name)) is not None}
        weight_was_here, before = not self.weight.is_meta, own_shard(self.s2)
        super()._apply(fn, recurse)
        for name, numbers in units.items():
            if self._buffers[name] is not numbers:
                self._buffers[name] = beside(numbers, self._buffers[name])
        if not self.s2.is_meta and before.tensor.is_meta:
            self.start_s2()
        elif not self.s2.is_meta and not weight_was_here:
            own_shard(self.s2).tensor.copy_(before.tensor)
        elif self.s2.is_meta and not before.tensor.is_meta:
            self._first_values = before.tensor if before.is_full else None
        return self

    def leave_units_out_of_states(self) -> None:
        """Leave the selected units out of state dicts: what shards and broadcasts a state expects parameters only."""
        if self.index is not None:
            self._non_persistent_buffers_set.add("index")

    def drop_data(self) -> None:
        """Send s2 and the selected units to the meta device too, for a model that never gets any data."""
        self.s2 = nn.Parameter(self.s2.to("meta"))
        for name in UNITS:
            if self._buffers.get(name) is not None:
                self._buffers[name] = self._buffers[name].to("meta")

    def start_s2(self) -> None:
        """Give s2, which was on the meta device, the values that training starts from."""
        if self._first_values is None:
            own_shard(self.s2).tensor.zero_()
        else:
            write_full_values(self.s2, self._first_values.to(self.s2.dtype))

    def forget_first_values(self) -> None:
        """Free what was kept for an s2 on the meta device."""
        self._first_values = None

    # ---- copies and states -----------------------------------------------------------------------
    # They are taken while no other thread has base + s2 in the weight, see stable_weights.

    def __deepcopy__(self, memo: dict[int, Any]) -> "S2Layer":
        return copy_at_rest(self, memo)

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle and torch.save, with a copy of the weight, because they read a tensor's memory later.

        A tied weight is not copied, so that it is still tied when it is loaded.
        """
        state = {**self.__dict__, "_looked_at": 0, "_written": None}
        weight = self._parameters.get("weight")
        if weight is not None and not self.is_tied:
            state["_parameters"] = {**self._parameters, "weight": nn.Parameter(at_rest(weight), requires_grad=False)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._written = None  # the versions of the copy start again
        self._base_of = id(self._parameters.get("weight"))
        weight = self._parameters.get("weight")
        if weight is not None and weight.device.type == "cpu" and weight.is_shared():
            weight.data = weight.data.clone()  # torch.multiprocessing sends tensors in shared memory

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Load a state. Its entry `base` tells whether the layer was fused, and the layer then is too."""
        self._check_same_units(state_dict, prefix)
        with torch.no_grad():
            if state_dict.get(prefix + "weight") is self.weight:
                pass  # the hook of an attached model found that it equals the weight
            elif prefix + "weight" not in state_dict:
                self.unfuse()  # the state has s2 only, which belongs to the base
            if prefix + "base" in state_dict:
                self.base = self._units().clone() if self.base is None else self.base
            elif prefix + "weight" in state_dict:
                self.base = None  # the weight in the state is a base
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._base_of = id(self.weight)
        self._written = None  # s2 may have changed: the next forward writes it

    def _check_same_units(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Take the selected units out of a state to load if this layer's states don't have them.

        Raises:
            ValueError: They are other units.
        """
        if "index" in self._non_persistent_buffers_set:
            found = state_dict.pop(prefix + "index", None)
            if found is not None and not torch.equal(found.to(self.index), self.index):
                raise ValueError(f"{prefix}index: the state is of other units than those that this layer trains")

    def _selected(self) -> str:
        """The selected units and the state, for extra_repr."""
        units = f"start={self.start}, end={self.end}" if self.index is None else f"units={self.index.numel()}"
        return units + (", fused" if self.fused else "") + ("" if self.enabled else ", off")


def beside(index: Tensor, weight: Tensor) -> Tensor:
    """Move the numbers of units to the device of a weight. On the meta device they would be lost, so they stay."""
    return index if weight.is_meta else index.to(weight.device)


def untouched_zeros(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Make zeros on the CPU that take no memory until they are written."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.from_numpy(numpy.zeros(count, dtype=numpy.uint8)).view(dtype).view(shape)


def check_private_once(
    layer: nn.Module, weight: Tensor, check: Callable[[Tensor], None] = partial(check_private, "weight")
) -> None:
    """Check the weight's memory if it is not the one of the last call. Every forward calls this.

    Args:
        layer: Keeps the address in `_looked_at`.
        weight: The layer's weight. Only plain parameters on the CPU are checked.
        check: Function that raises ValueError for unsuitable memory.
    """
    if type(weight) is nn.Parameter and weight.data_ptr() != layer._looked_at:
        check(weight)  # which looks at memory of the CPU only
        layer._looked_at = weight.data_ptr()


def why_not_whole(layer: S2Layer) -> str:
    """Return why the weight of a layer is not whole in this process from step to step; "" if it is."""
    if is_sharded(layer.weight) or is_sharded(layer.s2):
        return "this one is spread over ranks by FSDP2, ZeRO-3 or tensor parallelism"
    if has_master_copy(layer.s2):
        return "DeepSpeed's optimizer has its own copy of s2"
    if layer.weight._is_view() or layer.s2._is_view():
        return "this one is a view of other memory, as FSDP version 1 makes them"
    return ""


def copy_at_rest(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Deep-copy a layer while no operation has base + delta in its weight."""
    made = memo[id(layer)] = type(layer).__new__(type(layer))
    with LOCK:
        finish_interrupted()
        state = copy.deepcopy(layer.__dict__, memo)
    made.__setstate__(state)
    made._looked_at = 0
    return made


def at_rest(weight: Tensor) -> Tensor:
    """Copy a weight while no operation has base + delta in it."""
    with LOCK:
        finish_interrupted()
        return weight.detach().clone()


@cache  # once a process
def _warn_about_cast(made: torch.dtype, now: torch.dtype) -> None:
    made, now = (str(dtype).removeprefix("torch.") for dtype in (made, now))
    warnings.warn(
        f"s2 was made as {made} and is {now} in the forward. If FSDP (param_dtype of MixedPrecisionPolicy) or "
        f"DeepSpeed cast it, updates are still summed in {made}, but base + delta is the sum of rounded parts, and not "
        f"bit for bit the weight that merging writes: leave param_dtype unset and load the base in {now}, or use "
        f"torch.autocast. If model.to cast it, updates that are smaller than the step of {now} are lost",
        stacklevel=3,
    )
