"""What every trainable layer shares: the slice, base + s2 in the weight, copies and state dicts.

An optimizer's step changes s2, and the slices are written right after it. A layer also writes its own before it runs,
if s2 has changed since.

The gradient ignores the rounding of base + s2 (straight-through).
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, cast
from weakref import WeakSet, WeakValueDictionary, ref

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from s2ft.codecs.codec import Blocks, Codec
from s2ft.distributed import (
    full_shape,
    full_tensor,
    has_master_copy,
    is_partitioned,
    is_spread,
    local_part,
    own_shard,
    own_shards,
    ranks_sharing,
    reads_weights,
    release_gathered,
)
from s2ft.ops import Slice, effective_units, write_slices_
from s2ft.ops._library import LIBRARY
from s2ft.ops.in_place import WRITING, check_distinct, check_private, give_own_memory, is_being_captured, write_slice

# ---- when weights get base + s2 -------------------------------------------------------------------------------------

_holding: "WeakValueDictionary[int, Any]" = WeakValueDictionary()  # layers by the address of their s2's storage
# Layers that have written base + s2. The table above may lack one: under ZeRO-3 several have one address in turn.
_writers: "WeakSet[Any]" = WeakSet()


def write_all(layers: Sequence[Any]) -> None:
    """Write base + s2 into the weights of some layers, or into what this process owns of them.

    After an interrupt at any moment, a layer either knows that its weight holds the present values or writes it again.

    Args:
        layers: Layers (S2Layer) that are on. Every rank that has a part of an s2 must name the same ones.

    Raises:
        RuntimeError: A weight has been replaced while it held base + s2.
        ValueError: A weight is in read-only memory, or in memory that other processes have too.
    """
    with WRITING, torch.inference_mode(False):  # tensors that are made in inference mode can't be changed later
        begun = [layer.begin_write() for layer in layers]
        write_slices_([one for _, slices in begun for one in slices])
        for layer, (stamps, _) in zip(layers, begun):
            layer.end_write(stamps)
        for device in {layer.weight.device for layer in layers}:
            note_written(device)


def stamp(tensor: Tensor) -> tuple[int, Any]:
    """Return the version and a weak reference to the storage. If both are equal, no change that counts was made.

    It changes with every change in place that PyTorch counts, and with another memory. It does not change when other
    code writes into ``s2.data``. Steps of optimizers, some of which write in this way, are noted apart.
    """
    return tensor._version, ref(tensor.untyped_storage())


def note_written(device: torch.device) -> None:
    """Remember that weights on a device have been written, so that other streams wait for it."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(device)
        _last_writes[stream.device_index] = stream, stream.record_event()


# By device: the stream of the last write of a slice, and an event after it.
_last_writes: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}


def wait_for_write(weight: Tensor) -> None:
    """Let the present stream wait for the last write, if another stream has done it. The host does not wait.

    A pipeline runs a layer for the first part of a batch on one stream, where the slice is written, and for the next
    part on another. A stream that is being captured can't wait for work outside the graph, so this must not be called.
    """
    stream = torch.cuda.current_stream(weight.device)
    last = _last_writes.get(stream.device_index)
    if last is not None and last[0] != stream:
        stream.wait_event(last[1])


@cache  # once a process
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_write_stepped)


@torch.compiler.disable
def _write_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Write the slices that an optimizer has changed, so that whoever reads a weight finds base + s2 after the step.

    An optimizer may change s2 without PyTorch counting it. What an engine manages has its new values later, so that it
    is written before the next forward.
    """
    stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
    with WRITING:  # another thread may add one
        fused = [layer for layer in _writers if layer.fused]
    changed = [
        one
        for one in fused
        if (id(one.s2) in stepped or one.is_managed or type(one.s2) is Tensor) and one.after_step()  # Tensor: a sum
    ]
    write_all(changed)
    for layer in changed:
        layer.write_before_next_forward()


def _check_held(s2: Tensor, trains: bool) -> None:
    layer = _holding.get(s2.untyped_storage()._cdata)
    if layer is None or not layer.has_written(stamp(s2)):
        raise RuntimeError(
            "a compiled graph multiplies by a weight that does not hold the present values of s2: they have changed "
            "since, or the adapter is off. Call the model that has the adapter, and not a part of it, or layer.fuse() "
            "before"
        )
    if trains:
        layer.write_before_next_forward()


LIBRARY.define("check_held(Tensor s2, bool trains) -> ()")
LIBRARY.impl("check_held", _check_held, "CompositeExplicitAutograd")
torch.library.register_fake("s2ft::check_held", lambda s2, trains: None, lib=LIBRARY)
torch.fx.node.has_side_effect(torch.ops.s2ft.check_held.default)


# ---- one trainable layer --------------------------------------------------------------------------------------------

UNITS = ("index", "first", "own", "places")  # buffers that say which units are selected


class S2Layer(nn.Module):
    """A layer with a frozen weight and a trainable slice of it (S²FT paper, section 3.2).

    A unit of a layer is one row or column of its weight: a head, which is a unit of a coupling, has several.

    While the layer is switched on, its weight holds base + s2 in the selected units, and the forward is that of the
    plain layer. The base's values of these units are kept beside it. The slice is written again when s2 has changed:
    after a step of the optimizer, and otherwise before a forward.

    Attributes:
        weight: Frozen weight, as the plain layer stores it.
        bias: Frozen bias [outputs], or None.
        s2: Trainable slice: [n, inputs] if `dim` is 0, [outputs, n] if `dim` is 1.
        index: The selected units [n] int64, where they do not fill the range from `start` to `end`; else None.
        base: What the selected units hold without s2 (base + loaded adapters); for a weight that is spread over ranks
            those that this process has, in a list. None while s2 is not in the weight.
        enabled: Whether `s2` is added to the weight.
        dim: Dimension of the weight, as outputs × inputs, in which units are selected.
        kinds: The kind of the plain layer, and that of one whose weight is stored as [inputs, outputs].
        transposed: Whether the weight is stored so.
        rounding: What the base's file can hold of the selected units; None: all of base + s2.
        is_written_in_graph: Whether the CUDA graph that is being captured writes the slice already, so that the forward
            need not add a second write to each replay.
    """

    dim: ClassVar[int]
    kinds: ClassVar[tuple[Any, ...]]
    transposed = False
    weight: Tensor
    bias: Tensor | None
    index: Tensor | None
    rounding: "FileRounding | None" = None
    base: Tensor | list[Tensor] | None = None
    _looked_at: Any = None  # memory of the weight that has been checked
    _written: Any = None  # a tuple, the stamps of s2 and of the weight when base + s2 was written last
    _is_current = False  # False after unfuse and after an optimizer's step, whatever the stamps say
    _may_have_changed = False  # whether s2 may have been changed since in a way that its stamp does not tell
    _base_of = 0  # id of the weight that `base` belongs to
    _whole: Any = None  # memory of the weight that this layer was made on, or wrote last
    is_written_in_graph = False
    is_on_trial = False  # whether the weight requires a gradient to find code that reads it past this layer
    awaits_order = False  # whether the units of the weight must be reordered before this layer may run
    first_values: Tensor | None = None  # of an s2 that is on the meta device, in full; None: zeros

    @property
    def kind(self) -> Any:
        """What S²FT knows about the plain layer, see :class:`s2ft.layers.Kind`."""
        return self.kinds[self.transposed]

    @classmethod
    def from_module(
        cls,
        module: Any,
        start: int | None = None,
        end: int | None = None,
        *,
        index: Tensor | None = None,
        delta_dtype: torch.dtype | None = None,
    ) -> "S2Layer":
        """Make a trainable layer that uses the weight and bias of a plain layer, without copying them.

        Args:
            module: The plain layer. Its weight and bias are frozen.
            start: First selected unit; default: 0.
            end: End of the selected units (exclusive); default: the number of units.
            index: The selected units [n] int64, instead of `start` and `end`.
            delta_dtype: dtype of `s2`; default: that of the weight.

        Returns:
            The trainable layer, in the mode (training or evaluation) of `module`.

        Raises:
            ValueError: The selection is empty, names a unit twice or lies outside the weight, or the weight is in
                shared or read-only memory.

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
        self._share(module)
        self._set_units(start, end, index, delta_dtype or self.kind.delta_dtype(module))
        module.requires_grad_(False)
        self.train(module.training)
        return self

    def _share(self, module: Any) -> None:
        """Take the weight, the bias and all settings of the plain layer that the forward needs."""
        self._copy_settings(module)
        self.weight = module.weight
        self.register_parameter("bias", module.bias)  # also None: see `tensors`
        self._check_own_memory(self.weight)

    def _check_own_memory(self, weight: Tensor) -> None:
        """Raise ValueError if the weight is in memory that can't be written, or that other processes have too."""
        if type(weight) is nn.Parameter:
            memory = stamp(weight)[1], weight.data_ptr()  # share_memory_ moves a storage to another address
            if self._looked_at != memory:
                check_private("weight", weight)  # which looks at memory of the CPU only
                self._looked_at = memory

    def _copy_settings(self, module: nn.Module) -> None:
        """Copy the attributes of the plain layer that the forward needs, besides weight and bias."""

    def take_over(self, module: Any) -> None:
        """Remove the weight and bias from the plain layer that this layer replaces in a model.

        Only this layer keeps them: a second owner would keep them whole where this layer's are sharded or moved.
        """
        module.weight = module.bias = None

    def give_back(self, module: Any) -> None:
        """Undo :meth:`take_over`: the plain layer gets the weight and bias as they are now."""
        module.weight, module.bias = self.weight, self.bias

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight as outputs × inputs (× taps of a convolution)."""
        return self.kind.shape(self)

    def _set_units(self, start, end, index, delta_dtype) -> None:
        """Set `start`, `end`, `index` and `s2`."""
        shape = list(self.shape)
        size = shape[self.dim]
        if index is None:
            start, end = 0 if start is None else int(start), size if end is None else int(end)
            if not 0 <= start < end <= size:
                raise ValueError(
                    f"start and end must satisfy 0 <= start < end <= {size} (the weight's "
                    f"{('outputs', 'inputs')[self.dim]}), got start={start}, end={end}"
                )
            length = end - start
        else:
            if start is not None or end is not None:
                raise ValueError(f"start and end must be None with an index, got start={start}, end={end}")
            index = torch.as_tensor(index, dtype=torch.int64)
            length = index.numel()
            if index.dim() != 1 or length == 0:
                raise ValueError(f"index must be a list of at least one unit, got shape {tuple(index.shape)}")
            check_distinct(type(self).__name__, index, size)
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
        if self.kind.read_only is None:
            self._whole = stamp(local_part(self.weight))[1]
        self.enabled = True

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """The weight, bias and s2. As attributes, each takes an exception inside nn.Module, 0.6 µs."""
        parameters: dict[str, Any] = self._parameters
        try:
            return parameters["weight"], parameters["bias"], parameters["s2"]
        except KeyError:  # something else holds them, such as a parametrization
            return self.weight, self.bias, self.s2

    # ---- base + s2 in the weight -------------------------------------------------------------------

    def write_if_changed(self, weight: Tensor, s2: Tensor) -> bool:
        """Before a forward: write base + s2 into the weight if s2 has changed since it was written.

        Args:
            weight: The layer's weight.
            s2: The layer's s2.

        Returns:
            Whether the weight holds it. False for a weight that an engine has gathered for this forward: only what the
            ranks own can be written, before the model runs.

        Raises:
            RuntimeError: The weight is unfrozen or not in order, or the first call is part of the capture of a CUDA
                graph.
        """
        if self.awaits_order or weight.requires_grad or s2.dtype is not self._made:
            self._check(weight, s2)
        # A replay does not run this function, so a graph writes the slice at every replay: once, if the model has.
        is_captured = is_being_captured(weight)
        goes_into_graph = is_captured and not self.is_written_in_graph and not isinstance(self.base, list)
        is_held = self.is_held(weight, s2)
        if is_held and self._may_have_changed and not is_captured and isinstance(self.base, Tensor):
            self._write_again(weight)
        elif not is_held or self._may_have_changed or goes_into_graph:
            if self._may_be_gathered(weight, s2):
                return False
            write_all([self])
        if weight.is_cuda and not is_captured:
            wait_for_write(weight)
        return True

    def _may_be_gathered(self, weight: Tensor, s2: Tensor) -> bool:
        """Whether a weight may be in the memory of an engine. FSDP2 puts another parameter here for a forward."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        return self._whole != stamp(weight)[1] or weight._is_view() or s2._is_view() or self.is_managed

    def is_held(self, weight: Tensor, s2: Tensor) -> bool:
        """Whether the weight holds base + the present s2, as far as stamps tell; see :meth:`write_if_changed`."""
        if weight.is_meta:
            return True  # there are no values
        return self.has_written(stamp(s2)) and (isinstance(self.base, list) or self._written[1] == stamp(weight))

    def has_written(self, s2: tuple[int, Any]) -> bool:
        """Whether the weight holds the s2 of this stamp. A spread s2 is written before it is gathered."""
        return self._is_current and (isinstance(self.base, list) or self._written[0] == s2)

    def _check(self, weight: Tensor, s2: Tensor) -> None:
        if self.awaits_order and not weight.is_meta:
            raise RuntimeError(
                "the weights were loaded after attach, and their units are not in the order of this layer yet: call "
                "the model that has the adapter, or load its weights by load_state_dict, which puts them in order"
            )
        if weight.requires_grad and torch.is_grad_enabled() and not self.is_on_trial:
            raise RuntimeError(
                "weight must be frozen, and it requires a gradient: this layer trains s2 only. To train more of the "
                "weight, select more units; to train all of it, detach first"
            )
        if s2.dtype.itemsize < self._made.itemsize and not has_master_copy(s2) and not isinstance(self.base, list):
            _warn_about_cast(self._made, s2.dtype)

    @property
    def is_managed(self) -> bool:
        """Whether an engine spreads the weight or s2 over ranks, or keeps values of s2 of its own."""
        return isinstance(self.base, list) or ranks_sharing((self.weight, self.s2)) is not None

    @property
    def is_surely_held(self) -> bool:
        """Whether the weight, or what this process owns of it, holds the present values. Not inside a forward."""
        if isinstance(self.base, list):
            return self._is_current and self._written[0] == stamp(local_part(self.s2))
        return self.is_held(self.weight, self.s2) and not self._may_have_changed

    def write_before_next_forward(self) -> None:
        """Make the next forward write the slice, because ``s2.data`` may change without a version.

        It is called when s2 has got a gradient or an optimizer has made a step: a loop in place of an optimizer may
        follow, or an average of earlier values that is put in its place for an evaluation.
        """
        self.__dict__["_may_have_changed"] = not isinstance(self.base, list)  # by nn.Module it takes 4 µs

    def train(self, mode: bool = True) -> "S2Layer":
        """Set the mode, as in ``eval()`` before an evaluation, and make the next forward write the slice.

        An average of earlier values is often put in the place of s2 for an evaluation, and taken away after it, by
        ``s2.data``, which has no version.
        """
        super().train(mode)
        if self.base is not None:
            self.write_before_next_forward()
        return self

    def after_step(self) -> bool:
        """Called after an optimizer has changed s2.

        Returns:
            Whether to write the slice now. An engine may have the new values later, at its next forward.
        """
        self._is_current = False
        return not self.is_managed

    def full_s2(self) -> Tensor:
        """All values of s2 in the precision in which they are trained. Every rank that has a part must call this."""
        full = full_tensor(self.s2)
        return full.to(self._made) if has_master_copy(self.s2) else full  # the optimizer's copy is float32

    @property
    def fused(self) -> bool:
        """Whether `weight` holds base + s2, for some values of s2."""
        return self.base is not None

    def _write_again(self, weight: Tensor) -> None:
        """Write again where ``s2.data`` may have changed without a version. write_all takes 70 µs more."""
        with WRITING:
            for one in self._slices(weight.data, self.full_s2()):
                write_slice(one)
            self.__dict__["_may_have_changed"] = False
            note_written(weight.device)

    def begin_write(self) -> tuple[tuple, list[Slice]]:
        """Keep the base of what is about to be written, so that :meth:`unfuse` restores it after an interrupt.

        Returns:
            What :meth:`end_write` gets, and what to write.
        """
        weight, s2 = self.weight, self.s2
        if isinstance(self.base, Tensor) and self.is_held(weight, s2):  # `s2.data` may have changed: no stamp shows it
            return self._written, self._slices(weight.data, self.full_s2())
        self._check_same_weight()
        self._check_own_memory(weight)
        # Before the values are read: if another thread changes them, they are written again.
        stamps = stamp(local_part(s2)), stamp(local_part(weight))
        self.__dict__.update(_is_current=False, _base_of=id(weight))  # by nn.Module each takes 4 µs
        values = self.full_s2()
        if is_spread(weight):
            if self.rounding is not None:
                raise RuntimeError("a codec needs whole weights, and this one is spread over ranks: set codec='none'")
            self._keep_own()
            return stamps, [
                one
                for (matrix, index, here), base in zip(self._own_parts(weight, values), cast("list[Tensor]", self.base))
                for one in as_slices(matrix, base, here.to(base.device), index, self.dim)
            ]
        self._keep_base(weight, values, stamps)
        # Through weight.data no version changes. A graph of autograd that was recorded before is still valid, because
        # its backward looks at what the weight holds.
        return stamps, self._slices(weight.data, values)

    def end_write(self, stamps: tuple) -> None:
        """Note that the weight holds base + s2 with the values of these stamps."""
        if isinstance(self.base, list):
            release_gathered(self.weight)
        _watch_optimizers()  # one may change s2 without a new version
        # PEFT's sum of two adapters is in other memory each time
        if _holding.get(before := self.__dict__.get("_held_at", 0)) is self:
            del _holding[before]
        at = local_part(self.s2).untyped_storage()._cdata
        self.__dict__.update(
            _written=stamps, _whole=stamps[1][1], _is_current=True, _may_have_changed=False, _held_at=at
        )
        _holding[at] = self
        _writers.add(self)

    def _keep_base(self, weight: Tensor, s2: Tensor, stamps: tuple) -> None:
        """Keep the base's values of a whole weight. If other values were loaded into it since, keep those."""
        if self.base is None:
            if is_being_captured(weight):
                raise RuntimeError(
                    "a layer keeps a copy of the base before it writes base + s2, and a CUDA graph would copy it again "
                    "at every replay, base + s2 then: run the model once before you capture it"
                )
            self.base = self._units(weight).clone(memory_format=torch.contiguous_format)
        elif self._written is not None and self._written[1] != stamps[1]:
            now = self._units(weight)
            base = cast(Tensor, self.base).to(now.device)
            is_ours = torch.equal(now, effective_units(*self._summands(base, s2)).to(now))  # in other memory or dtype
            self.base = base.to(now)
            # An average of parameters changes the weight and s2: `base` stays valid.
            if not is_ours and self._written[0] == stamps[0]:
                self.base = now.clone()

    def fuse(self) -> None:
        """Write base + s2 into `weight` now, as the next forward would do if s2 has changed.

        It is needed only where other code has written into ``s2.data`` and neither a backward, an optimizer's step nor
        a call of ``train()`` or ``eval()`` came after it. A forward of the whole model with gradients writes anyway,
        unless the weights are sharded.

        Raises:
            RuntimeError: The adapter is off, or the weight is quantized.
            ValueError: The weight is in read-only memory, or in memory that other processes have too.

        Example:
            >>> layer = s2ft.S2RowLinear(8, 16, end=4)
            >>> layer.fuse()
            >>> layer.fused
            True
        """
        if self.kind.read_only or not self.enabled:
            raise RuntimeError(self.kind.read_only or "this layer's adapter is off: call s2ft.set_adapter first")
        self.write_before_next_forward()  # after an interrupt below, the next forward writes
        write_all([self])

    def unfuse(self) -> None:
        """Take s2 out of `weight`, bit for bit. The next forward of a layer that is on undoes this.

        Example:
            >>> layer = s2ft.S2RowLinear(8, 16, end=4)
            >>> layer.fuse()
            >>> layer.unfuse()
            >>> layer.fused
            False
        """
        self._check_same_weight()
        if self.base is None:
            return
        with WRITING:
            self._is_current = False  # after an interrupt below, base + s2 is written again
            if is_spread(self.weight):
                self._keep_own()
                self._put_own_base(self.weight)
                release_gathered(self.weight)
            else:
                base = cast(Tensor, self.base)  # of a whole weight
                self.write_units_of(self.weight.data, base)  # data: as in begin_write
                note_written(self.weight.device)
                if base.is_cuda:  # another stream may have made it, and would use its memory again at once
                    base.record_stream(torch.cuda.current_stream(base.device))
            self.base = None

    fuse_s2_weight, unfuse_s2_weight = fuse, unfuse  # the reference code's names

    def _check_same_weight(self) -> None:
        """Check that no other parameter has taken the place of the weight that `base` belongs to.

        Raises:
            RuntimeError: One has, or it is a part of a flat parameter. `base` is kept, and everything works again when
                the weight is back.
        """
        if self.weight.dim() < 2 and not is_spread(self.weight):  # ZeRO-3 has a part too, which it gathers
            raise RuntimeError(
                "the weight is a part of a flat parameter, as FSDP version 1 makes it, which s2ft can't train: use "
                "FSDP2 (fully_shard; fsdp_version: 2 of accelerate), and attach again"
            )
        if self.base is None or is_spread(self.weight):
            return
        if isinstance(self.base, list):
            raise RuntimeError("the weight is gathered from several ranks now: reshard the model first")
        if self._base_of != id(self.weight):
            raise RuntimeError(
                "the weight was replaced while it held base + s2, so that this layer's copy of the base belongs to "
                "another weight: call layer.unfuse() before, or load the new weight by load_state_dict"
            )

    def effective_weight(self, s2: Tensor, weight: Tensor) -> Tensor:
        """Return a copy of the weight that holds base + s2, through which gradients of any order flow to s2.

        Raises:
            RuntimeError: Only other values of s2 are in a weight that is spread over ranks.
        """
        if isinstance(self.base, list):
            if not self._is_current:
                raise RuntimeError(
                    "s2 has changed, and this weight is spread over ranks, which write it before the model runs: call "
                    "the model that has the adapter, and not a part of it"
                )
            values = self._units(weight) + (s2 - s2.detach()).to(weight.dtype)
        else:
            values = effective_units(*self._summands(self._units(weight) if self.base is None else self.base, s2))
        return self._with_units(weight.detach(), values)

    def base_weight(self) -> Tensor:
        """The weight with the base's values, as it is stored: a copy if it holds base + s2, else the weight itself."""
        self._check_same_weight()
        if self.base is None or is_partitioned(self.weight):
            return self.weight
        with WRITING:
            copied = self.weight.detach().clone()
            if is_spread(copied):
                self._keep_own()
                self._put_own_base(copied)
            else:
                self.write_units_of(copied, cast(Tensor, self.base))
        return copied

    # ---- the selected units of a whole weight --------------------------------------------------------

    def selected_units(self) -> Tensor:
        """The selected units, [n] int64, on the device of `s2`."""
        return torch.arange(self.start, self.end, device=self.s2.device) if self.index is None else self.index

    @property
    def own_units(self) -> int | Tensor:
        """The selected units as the functions of a slice need them: the first one, or an index."""
        index = self._buffers["index"]
        return self.start if index is None else index

    def _units(self, weight: Tensor) -> Tensor:
        matrix = self.kind.view(weight.detach())
        if self.index is None:
            return matrix.narrow(self.dim, self.start, self.end - self.start)
        return matrix.index_select(self.dim, self.index)

    def _slices(self, weight: Tensor, s2: Tensor) -> list[Slice]:
        """What to write into a whole weight."""
        return as_slices(
            self.kind.view(weight), *self._summands(cast(Tensor, self.base), s2.detach()), self.own_units, self.dim
        )

    def _summands(self, base: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors whose sum the selected units get. `base` has the active loaded adapters, the file has not."""
        return (base, s2) if self.rounding is None else self.rounding.summands(base, s2)

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
            _put(matrix, self.index, values, self.dim)

    def _with_units(self, weight: Tensor, values: Tensor) -> Tensor:
        """Copy a weight with other values in the selected units. Gradients flow to the values."""
        return self.kind.with_units(weight, self.selected_units().to(weight.device), values, self.dim)

    # ---- what this process owns of a weight that is spread over ranks ---------------------------------

    def _pieces(self, values: Tensor) -> Iterator[tuple[int | None, Tensor, Tensor]]:
        """Yield the expert, the units [n] int64, and the values of each matrix of the weight."""
        yield None, self.selected_units(), values

    def _own_parts(self, weight: Tensor, values: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield each block that this process owns, the units in it [n] int64, and the values there.

        Args:
            weight: A tensor that is spread as the layer's weight is.
            values: Values of the full shape of `s2`. Default: on the meta device.
        """
        if values is None:
            values = torch.empty(full_shape(self.s2), device="meta")
        for shard in own_shards(weight):
            for expert, units, part in self._pieces(values):
                block = self.kind.shard(shard, expert)
                index, here = block.restrict(units, part, self.dim)
                yield block.tensor, index.to(block.tensor.device), here

    def _keep_own(self) -> None:
        """Keep the base of what this process owns. If the weight was whole, it has been spread since."""
        weight = self.weight
        if isinstance(self.base, Tensor):
            self.base = [here.to(matrix.device, copy=True) for matrix, _, here in self._own_parts(weight, self.base)]
        elif self.base is None:
            self.base = [matrix.index_select(self.dim, index) for matrix, index, _ in self._own_parts(weight)]

    def _put_own_base(self, weight: Tensor) -> None:
        for (matrix, index, _), base in zip(self._own_parts(weight), cast("list[Tensor]", self.base)):
            _put(matrix, index, base, self.dim)

    # ---- the meta device -------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        """Move or cast the layer. The units are kept on the way over the meta device, and so is s2 until it is sharded.

        While the weight is on the meta device, fn may be that of to_empty, which would leave no values in s2.
        """
        self.unfuse()  # the sum of two casts is not the cast of a sum
        units = {name: buffer for name in UNITS if (buffer := self._buffers.get(name)) is not None}
        weight_was_here, before = not self.weight.is_meta, own_shard(self.s2)
        super()._apply(fn, recurse)
        for name, numbers in units.items():
            if self._buffers[name] is not numbers:
                self._buffers[name] = beside(numbers, self._buffers[name])
        if not self.s2.is_meta and before.tensor.is_meta:
            # Give s2, which was on the meta device, the values that training starts from.
            shard, first = own_shard(self.s2), self.first_values
            shard.tensor.copy_(shard.tensor.new_zeros(()) if first is None else shard.cut(first))
        elif not self.s2.is_meta and not weight_was_here:
            own_shard(self.s2).tensor.copy_(before.tensor)
        elif self.s2.is_meta and not before.tensor.is_meta:
            self.first_values = before.tensor if before.start is None else None
        return self

    def leave_units_out_of_states(self) -> None:
        """Leave the selected units out of state dicts: what shards and broadcasts a state expects parameters only."""
        if self.index is not None:
            self._non_persistent_buffers_set.add("index")

    # ---- copies and states -----------------------------------------------------------------------

    # What a copy finds out by itself
    _FORGOTTEN = {
        "_looked_at": None,
        "_written": None,
        "_is_current": False,
        "_whole": None,
        "is_written_in_graph": False,
    }

    def __deepcopy__(self, memo: dict[int, Any]) -> "S2Layer":
        made = memo[id(self)] = type(self).__new__(type(self))
        with WRITING:
            state = {**self.__dict__, **self._FORGOTTEN}
            if self.base is None and self.kind.read_only is None and not (self.awaits_order or is_spread(self.weight)):
                state["base"] = self._units(self.weight).clone()  # averages of copies change the weight and s2 alike
            state = copy.deepcopy(state, memo)
        made.__setstate__(state)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle and torch.save, with the base in the weight."""
        state = {**self.__dict__, **self._FORGOTTEN, "base": None}
        if self.base is not None and "weight" in self._parameters:
            state["_parameters"] = {**self._parameters, "weight": nn.Parameter(self.base_weight(), requires_grad=False)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        weight = self._parameters.get("weight")
        self._base_of = id(weight)
        if weight is not None:
            give_own_memory(weight)
            self._whole = stamp(local_part(weight))[1]
        if isinstance(self.base, Tensor) and weight is not None:
            self._written = (
                stamp(self.s2),
                stamp(weight),
            )  # so that the base is kept if s2 changes before the next write

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """Save the base's weight. With `keep_vars`, which asks for the parameters themselves, it holds base + s2."""
        if is_partitioned(self.weight):
            self.unfuse()  # DeepSpeed's checkpoint reads the parts themselves after this; the next forward writes them
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.base is not None and not keep_vars and prefix + "weight" in destination:
            destination[prefix + "weight"] = self.base_weight().detach()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        if self.index is not None and "index" in self._non_persistent_buffers_set:  # this layer's states have no units
            found = state_dict.pop(prefix + "index", None)
            if found is not None and not torch.equal(found.to(self.index), self.index):
                raise ValueError(f"{prefix}index: the state is of other units than those that this layer trains")
        self.unfuse()  # the weight in a state is a base, and so is the one that stays without it
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The selected units and whether the layer is on."""
        units = f"start={self.start}, end={self.end}" if self.index is None else f"units={self.index.numel()}"
        return units + ("" if self.enabled else ", off")


def beside(index: Tensor, weight: Tensor) -> Tensor:
    """Move the numbers of units to the device of a weight. On the meta device they would be lost, so they stay."""
    return index if weight.is_meta else index.to(weight.device)


def untouched_zeros(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Make zeros on the CPU that take no memory until they are written."""
    return torch.from_numpy(numpy.zeros([*shape, dtype.itemsize], dtype=numpy.uint8)).view(dtype).view(shape)


def as_slices(matrix: Tensor, base: Tensor, delta: Tensor, units: int | Tensor, dim: int) -> list[Slice]:
    """One slice of a matrix, or one for each tap of a convolution's weight [outputs, inputs, taps]."""
    if matrix.dim() == 2:
        return [Slice(matrix, base, delta, units, dim)]
    return [Slice(*tap, units, dim) for tap in zip(matrix.unbind(2), base.unbind(2), delta.unbind(2))]


def _put(matrix: Tensor, index: Tensor, values: Tensor, dim: int) -> None:
    """Write units of a matrix, or of a stack of taps."""
    matrix.transpose(0, dim)[index] = values.transpose(0, dim)  # index_copy_ visits columns element by element


@cache  # once a process
def _warn_about_cast(made: torch.dtype, now: torch.dtype) -> None:
    old, new = (str(dtype).removeprefix("torch.") for dtype in (made, now))
    warnings.warn(
        f"s2 was made as {old} and is {new} now, as by model.to: updates that are smaller than the step of {new} are "
        "lost. Load the base in the dtype that you want before you attach, or use torch.autocast",
        stacklevel=3,
    )


# ---- what a layer computes with if its weight has to fit into a quantized file --------------------------------------


class FileRounding:
    """Units of a weight as a quantized file has them.

    Attributes:
        base: The file's values of the units, in the order of s2, float32.
        share: How far values go from base + s2, at 0, to what the file can hold, at 1.
    """

    share = 1.0

    def __init__(self, codec: Codec, blocks: Blocks, positions: Tensor, dim: int) -> None:
        """Keep the codes of some units.

        Args:
            codec: The codec of the weight.
            blocks: Its units in ascending order.
            positions: Where each of them is in s2, [n] int64.
            dim: Dimension of the units.
        """
        self.codec, self.blocks, self.positions, self.dim = codec, blocks, positions, dim
        self.base = self._in_order(codec.values(blocks).float())
        self._last: Any = None, self.base, self.base  # of the last call: share and dtype, s2, the values

    @property
    def half_step(self) -> float:
        """Half the usual distance of two values that the units can have: a smaller delta is rounded away."""
        factor, _ = self.codec.scale_and_offset(self.blocks.scales)
        levels = self.codec.levels
        gaps = levels[levels.isfinite()].unique().diff()
        return float(factor.abs().median() * gaps.float().median() / 2)

    def __call__(self, s2: Tensor) -> Tensor:
        """The values of the units, in the order of s2, float32. Gradients flow to s2 unchanged."""
        if self.base.device != s2.device:
            codes, scales = self.blocks
            self.blocks = Blocks(codes.to(s2.device), tuple(scale.to(s2.device) for scale in scales))
            self.positions, self.base = self.positions.to(s2.device), self.base.to(s2.device)
        if s2.requires_grad and torch.is_grad_enabled():
            return self._coded(s2.detach(), self.share) + (s2 - s2.detach())
        if s2.device.type != "cpu" or torch.compiler.is_compiling():
            return self._coded(s2, self.share)
        # A slice is written after each step, and again before the next forward, when s2 is rarely another. A GPU would
        # have to be waited for to know.
        alike, known, coded = self._last
        if alike != (self.share, s2.dtype) or not torch.equal(known, s2):
            alike, known = (self.share, s2.dtype), s2.detach().clone()  # another thread may change s2 from now on
            coded = self._coded(known, alike[0])
            self._last = alike, known, coded
        return coded

    @torch.no_grad()
    def _coded(self, s2: Tensor, share: float) -> Tensor:
        wanted = self.base + s2.float()
        if share == 0:
            return wanted
        nearest = self.codec.nearest(wanted.index_select(self.dim, self.positions), self.blocks)
        coded = self._in_order(self.codec.values(nearest).float())
        return wanted.lerp(coded, share)  # NaN where `wanted` is not finite: a loss of NaN is seen

    def _in_order(self, values: Tensor) -> Tensor:
        return torch.empty_like(values).index_copy_(self.dim, self.positions, values)

    def summands(self, base: Tensor, s2: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Two tensors whose sum the units get that are at some positions in s2, by default all of them.

        base: their values in the weight, which other adapters may have changed.
        """
        coded, held = self(s2), self.base
        if positions is not None:
            coded, held = (one.index_select(self.dim, positions.to(one.device)) for one in (coded, held))
        return -(held.to(base.dtype) - base), coded  # -0.0 where equal: -0.0 + x is x for every x
