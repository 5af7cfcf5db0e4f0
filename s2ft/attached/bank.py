"""Many adapters of one base in memory, and batches in which each sequence has its own (S²FT paper, section 3.4).

The base's weights are never written. While a batch runs, each linear layer that an adapter of the bank changes has
another forward: the layer's own, then :func:`s2ft.ops.multi_adapter_linear` on its output. The adapters of the batch
are packed into one buffer for each layer. Buffers only grow, in powers of two, so a compiled model sees the same shapes
from batch to batch. Adapters are packed when a batch names one that is not in the buffers. This takes a few
milliseconds, less than one step of generation.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.adapter import native
from s2ft.adapter.adapter import Adapter
from s2ft.adapter.folders import adapters_in
from s2ft.attached.record import Record, check_fits, find_record, new_record, unwrapped
from s2ft.config import check_adapter_name, refuse
from s2ft.files.reading import CONFIG, TENSORS, has_adapter, own_folder
from s2ft.layers import kind_of
from s2ft.model.coupling import Projection, by_key
from s2ft.model.parts import tower_of, trained_towers
from s2ft.model.weights import Delta, find
from s2ft.ops import multi_adapter_linear

# Types of which no row is known to be of a sequence
NOT_BY_SEQUENCE = (
    *("xlnet", "fsmt", "longformer", "led"),  # the time is first
    *("switch_transformers", "nllb-moe"),  # the tokens of each expert
    *("musicgen", "musicgen_melody", "dia"),  # guidance: all rows, and then all of them without the prompt
)


class AdapterBank:
    """Many adapters of one base in memory, and batches that mix them (S²FT paper, section 3.4).

    An adapter is read from its folder when a batch first names it. Adapters may change linear layers, transformers'
    Conv1D and quantized linear layers. An adapter that changes experts or convolutions, or has extra weights, raises
    when a batch names it.

    `add` and `remove` can be called from other threads at any time: a running batch keeps its adapters. A model runs
    one batch at a time.

    Args:
        model: The base, plain or with adapters of which none is active, in layout `indexed`. Do not change its weights
            while the bank is in use, because the bank checks them only once.
        directory: A directory of adapters or of outputs of runs. Each folder in it that holds an adapter now is known
            by its name. :meth:`add` adds others.
        limit_bytes: Limit for the adapters that are kept in memory; the ones that were not used for longest are
            dropped. The buffers of the largest batch so far are not counted. Default: no limit.

    Raises:
        ValueError: An adapter is active on the model or has moved its units, the model has layers whose inputs are not
            [sequences, ...], or an argument is not valid.
        NotADirectoryError: `directory` is not a folder.

    Example:
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> s2ft.save_adapter(model, "adapters/math")
        >>> bank = s2ft.AdapterBank(s2ft.detach(model), "adapters")
        >>> with bank.batch(["math", None]):  # one name for each sequence; None is the base
        ...     logits = bank.model(input_ids).logits
        >>> bank.loaded
        ['math']
    """

    def __init__(
        self, model: nn.Module, directory: str | os.PathLike | None = None, *, limit_bytes: int | None = None
    ) -> None:
        model = unwrapped(model)
        refuse(
            (
                limit_bytes is not None and (not isinstance(limit_bytes, int) or limit_bytes < 1),
                f"limit_bytes must be a whole number above 0, or None, got {limit_bytes!r}",
            ),
            (
                getattr(getattr(model, "config", None), "model_type", None) in NOT_BY_SEQUENCE
                or any(
                    isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
                    and not module.self_attn.batch_first
                    for module in model.modules()
                ),
                f"{type(model).__name__} has layers whose inputs are not [sequences, ...]: use set_adapter",
            ),
        )
        if directory is not None and not Path(directory).is_dir():
            raise NotADirectoryError(f"{directory} is not a folder of adapters")
        check_plain(model)
        self.model, self.limit_bytes = model, limit_bytes
        found = {} if directory is None else adapters_in(Path(directory))
        self._entries = {name: folder for name, folder in found.items() if not name.startswith(".")}  # folders by name
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # the most recently used one is last
        self._lock = threading.Lock()  # guards the two fields above; never held while a file is read
        self._running = threading.Lock()  # held by a batch; guards the fields below
        self._records: dict[Any, Record] = {}  # guarded by the lock below, since a batch may run during a check
        self._making_record = threading.Lock()
        self._layers: dict[str, _BankLayer] = {}
        self._packed: dict[int, int] = {}  # slot in the layers' buffers, by serial number of a loaded adapter
        self._slots = 1  # number of slots, a power of two
        self._serial = 0

    # ---- names ---------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of all known adapters, sorted.

        Example:
            >>> s2ft.AdapterBank(model).names
            []
        """
        with self._lock:
            return sorted(self._entries)

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters in memory. The first was not used for longest and is dropped next.

        Example:
            >>> s2ft.AdapterBank(model).loaded
            []
        """
        with self._lock:
            return list(self._loaded)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the adapters in memory, without the buffers of batches.

        Example:
            >>> s2ft.AdapterBank(model).loaded_bytes
            0
        """
        with self._lock:
            return self._bytes()

    def __contains__(self, name) -> bool:
        return name in self._entries

    def add(self, name: str, folder: str | os.PathLike) -> None:
        """Add the adapter of a folder. It is read when a batch first names it.

        Args:
            name: Name of the adapter in the bank.
            folder: The adapter's folder, or the output folder of a run.

        Raises:
            ValueError: The name is taken or not valid.
            FileNotFoundError: The folder has no adapter.

        Example:
            >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
            >>> s2ft.save_adapter(model, "runs/math")
            >>> bank = s2ft.AdapterBank(s2ft.detach(model))
            >>> bank.add("math", "runs/math")
            >>> "math" in bank
            True
        """
        check_adapter_name(name)
        folder = own_folder(Path(folder))
        if not has_adapter(folder):
            missing = next((file for file in (CONFIG, TENSORS) if not (folder / file).is_file()), CONFIG)
            raise FileNotFoundError(f"{folder} is not an S²FT adapter: it has no {missing}")
        with self._lock:
            if name in self._entries:
                raise ValueError(f"there is an adapter called {name!r} already: remove it first")
            self._entries[name] = folder

    def check(self, folder: str | os.PathLike) -> Adapter:
        """Check that batches can use the adapter of a folder, without reading its values.

        Its units and shapes and the fingerprint of its base are compared with the model. It can be called from other
        threads while a batch runs.

        Args:
            folder: The adapter's folder.

        Returns:
            The adapter. Its values are on the meta device.

        Raises:
            FileNotFoundError: The folder has no adapter.
            ValueError: The adapter is damaged, has another base, or changes layers that can't be mixed.

        Example:
            >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
            >>> s2ft.save_adapter(model, "runs/math")
            >>> s2ft.AdapterBank(s2ft.detach(model)).check("runs/math").name
            'math'
        """
        adapter = native.read_without_values(Path(folder))
        self._changed_by(adapter)
        return adapter

    def remove(self, name: str) -> None:
        """Remove an adapter from the bank. Its files stay, and a running batch keeps it.

        Args:
            name: Name of the adapter.

        Raises:
            ValueError: The name is unknown.

        Example:
            >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
            >>> s2ft.save_adapter(model, "adapters/math")
            >>> bank = s2ft.AdapterBank(s2ft.detach(model), "adapters")
            >>> bank.remove("math")
            >>> len(bank.names)
            0
        """
        with self._lock:
            self._entry(name)
            del self._entries[name]
            self._loaded.pop(name, None)

    def _entry(self, name: str) -> Path:
        if name not in self._entries:
            raise ValueError(f"the bank has no adapter called {name!r}")
        return self._entries[name]

    # ---- batches -------------------------------------------------------------------------------------

    @contextmanager
    def batch(self, names: Sequence[str | None]) -> Iterator[None]:
        """Run the model inside this context with one adapter for each sequence of the batch.

        Row b of the model's input runs with the adapter ``names[b]``. If the model runs on k times as many rows (beams,
        or several samples), each name applies to k rows that follow each other, as in transformers' `generate`.

        Args:
            names: An adapter's name for each sequence, or None for the base.

        Returns:
            A context manager; it gives no value.

        Raises:
            ValueError: A name is unknown, an adapter has another base or changes layers that can't be mixed, or the
                batch's adapters exceed `limit_bytes`. The model has not changed.
            RuntimeError: Another batch is running on this model.

        Example:
            >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
            >>> s2ft.save_adapter(model, "adapters/math")
            >>> bank = s2ft.AdapterBank(s2ft.detach(model), "adapters")
            >>> with bank.batch(["math", None]):
            ...     tokens = bank.model.generate(input_ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
            >>> tokens.shape
            torch.Size([2, 10])
        """
        names = self._checked(names)
        if not self._running.acquire(blocking=False):
            raise RuntimeError("another batch is running, and a model runs one batch at a time: leave that batch first")
        try:
            check_plain(self.model)
            with torch.inference_mode(False), torch.no_grad():  # the next batch may have another mode
                known = self._layers.items()
                self._add_layers({path: self._layer_at(path, one.dim, None, "the bank changes") for path, one in known})
                adapters = self._load(list(dict.fromkeys(name for name in names if name is not None)))
                slots = self._pack(list(adapters.values()))
                self._assign_rows([-1 if name is None else slots[adapters[name].serial] for name in names])
            with _forwards_replaced(self._layers.values()):
                yield
        finally:
            self._running.release()

    @staticmethod
    def _checked(names) -> list[str | None]:
        if isinstance(names, (str, bytes)):
            raise TypeError(f"names must be a list with one name, or None, for every sequence, got {names!r}")
        names = list(names)
        if not names:
            raise ValueError("names is empty: give one name, or None, for every sequence of the batch")
        return names

    def _load(self, names: list[str]) -> dict[str, "_Loaded"]:
        """Load the adapters of a batch. The batch keeps them even if they are removed from the bank."""
        with self._lock:  # all names first, so that an unknown name raises before any file is read
            entries = {name: self._entry(name) for name in names}
            adapters = {name: self._loaded[name] for name in names if name in self._loaded}
            for name in names:
                if name in self._loaded:
                    self._loaded.move_to_end(name)
        for name, folder in entries.items():
            if name not in adapters:
                adapters[name] = self._read(name, folder)
                total = sum(one.bytes for one in adapters.values())
                if self.limit_bytes is not None and total > self.limit_bytes:
                    raise ValueError(
                        f"the batch's adapters need at least {total:,} bytes, more than limit_bytes = "
                        f"{self.limit_bytes:,}: give smaller batches or a higher limit"
                    )
                self._remember(name, folder, adapters[name], set(names))
        return {name: adapters[name] for name in names}

    def _remember(self, name: str, folder: Path, loaded: "_Loaded", needed: set[str]) -> None:
        """Keep an adapter in memory, unless it was removed while it was read, and drop others to stay in the limit."""
        with self._lock:
            if self._entries.get(name) is not folder:
                return
            if self.limit_bytes is not None:
                old = [other for other in self._loaded if other not in needed]
                while old and self._bytes() + loaded.bytes > self.limit_bytes:
                    del self._loaded[old.pop(0)]
            self._loaded[name] = loaded

    def _bytes(self) -> int:
        return sum(one.bytes for one in self._loaded.values())

    # ---- reading -------------------------------------------------------------------------------------

    def _read(self, name: str, folder: Path) -> "_Loaded":
        adapter = native.read(folder)
        adapter.name = name
        changed, layers = self._changed_by(adapter)
        deltas = by_key((projection.path, delta) for projection, delta in zip(changed, adapter.deltas.values()))
        by_layer = {path: self._layer_delta(layer, deltas[path]) for path, layer in layers.items()}
        self._add_layers(layers)
        self._serial += 1
        tensors = [tensor for delta in by_layer.values() for tensor in (delta.index, delta.values)]
        return _Loaded(self._serial, by_layer, sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    def _changed_by(self, adapter: Adapter) -> tuple[list[Projection], dict[str, "_BankLayer"]]:
        """Check an adapter against the model. Return its projections in order and its layers."""
        if adapter.extra_weights:
            raise ValueError(
                f"adapter {adapter.name!r} has {next(iter(adapter.extra_weights))} trained in full. A batch has one "
                "such weight for all rows: serve the model merged (s2ft merge), or use load_adapter"
            )
        record = self._record_for(adapter)
        check_fits(adapter, self.model, record)
        changed = [record.projections[key] for key in adapter.deltas]
        towers = trained_towers(self.model, None)
        if any(tower_of(self.model, one.path) not in towers for one in changed):
            raise ValueError(
                f"adapter {adapter.name!r} changes a tower whose rows are images, not the batch's sequences: "
                "serve the model merged (s2ft merge), or use load_adapter"
            )
        layers = {
            one.path: self._layer_at(one.path, one.dim, one.expert, f"adapter {adapter.name!r} changes")
            for one in changed
        }
        return changed, layers

    def _record_for(self, adapter: Adapter) -> Record:
        """The record of the model, by the couplings of its family or by those of the adapter."""
        attached = find_record(self.model)
        key = None if adapter.couplings is None or attached else tuple(adapter.couplings)
        with self._making_record:
            if key not in self._records:
                self._records.update({key: attached or new_record(self.model, adapter.couplings)})
            return self._records[key]

    def _layer_at(self, path: str, dim: int, expert: int | None, who: str) -> "_BankLayer":
        """The known layer at a path, or a new one if the layer is new or was replaced in the model."""
        module, known = find(self.model, path), self._layers.get(path)
        if known is not None and known.module is module:
            if known.dim != dim:
                raise ValueError(f"{who} the other side of {path} than another adapter of this bank: use another bank")
            return known
        is_expert = expert is not None or ".experts." in path
        if is_expert or not kind_of(module).is_linear:
            raise ValueError(
                f"{who} {path}: batches mix adapters of linear layers only, so use load_adapter and set_adapter instead"
            )
        return _BankLayer(path, module, dim)

    def _add_layers(self, layers: dict[str, "_BankLayer"]) -> None:
        if any(self._layers.get(path) is not layer for path, layer in layers.items()):
            self._layers.update(layers)
            self._packed = {}  # nothing is in the buffers of the new layers

    def _layer_delta(self, layer: "_BankLayer", deltas: list[Delta]) -> Delta:
        weight = layer.module.weight
        rows = [delta.values if delta.dim == 0 else delta.values.t() for delta in deltas]
        values = torch.cat(rows).to(weight.device, self._dtype_of(layer), copy=True)
        return Delta(0, torch.cat([delta.index for delta in deltas]).to(weight.device), values.contiguous())

    def _dtype_of(self, layer: "_BankLayer") -> torch.dtype:
        """The dtype in which the layer computes. A quantized weight does not have it, so it is the model's."""
        dtype = layer.module.weight.dtype
        return dtype if dtype.is_floating_point else getattr(self.model, "dtype", torch.get_default_dtype())

    # ---- packing -------------------------------------------------------------------------------------

    def _pack(self, adapters: list["_Loaded"]) -> dict[int, int]:
        """Pack the adapters into the buffers of all layers, unless they are packed already.

        Returns:
            The slot of each adapter by its serial number.
        """
        moved = any(not layer.has_buffers(self._dtype_of(layer)) for layer in self._layers.values())
        if not moved and all(one.serial in self._packed for one in adapters):
            return self._packed
        self._packed = {}  # now, because packing may run out of memory half-way
        self._slots = max(self._slots, _power(len(adapters)))
        bounds = [
            layer.pack([one.by_layer.get(path) for one in adapters], self._dtype_of(layer))
            for path, layer in self._layers.items()
        ]
        padded = [ends + [ends[-1]] * (self._slots + 1 - len(ends)) for ends in bounds]
        for layer, offsets in zip(self._layers.values(), torch.tensor(padded).unbind() if padded else ()):
            layer.offsets = offsets.to(layer.values.device)
        self._packed = {one.serial: slot for slot, one in enumerate(adapters)}
        return self._packed

    def _assign_rows(self, slots: list[int]) -> None:
        """Set the slot of each sequence in all layers; -1 is the base."""
        devices = {layer.values.device for layer in self._layers.values()}
        ids = {device: torch.tensor(slots, device=device) for device in devices}
        for layer in self._layers.values():
            layer.adapter = ids[layer.values.device]


@dataclass
class _Loaded:
    """An adapter in memory: one delta of dim 0 for each layer, of all its projections, and their bytes."""

    serial: int
    by_layer: dict[str, Delta]
    bytes: int


class _BankLayer:
    """A layer that adapters of the bank change, with the packed adapters of the batch (see multi_adapter_linear)."""

    def __init__(self, path: str, module: Any, dim: int) -> None:
        self.path, self.module, self.dim = path, module, dim
        # Tensors; None before the first batch
        self.values: Any = None  # [capacity, inputs or outputs]
        self.index: Any = None  # [capacity]
        self.offsets: Any = None  # [slots + 1]
        self.adapter: Any = None  # [sequences]
        self.used = False  # whether a packed adapter has units here
        self.original_forward: Callable | None = None  # a forward that was set on the module before, not its class's

    def has_buffers(self, dtype: torch.dtype) -> bool:
        """Whether the buffers have this dtype and are on the device of the weight."""
        values = self.values
        return values is not None and values.device == self.module.weight.device and values.dtype == dtype

    def pack(self, deltas: list[Delta | None], dtype: torch.dtype) -> list[int]:
        """Pack the deltas of adapters into the buffers. None is an adapter that does not change this layer.

        Returns:
            The start of each adapter in the buffers, and the end of the last.
        """
        ends = list(accumulate((0 if delta is None else delta.index.numel() for delta in deltas), initial=0))
        self.used = ends[-1] > 0
        self._grow(ends[-1], dtype)
        found = [delta for delta in deltas if delta is not None]
        if found:
            device = self.values.device
            torch.cat([delta.values.to(device) for delta in found], out=self.values[: ends[-1]])
            torch.cat([delta.index.to(device) for delta in found], out=self.index[: ends[-1]])
        return ends

    def _grow(self, units: int, dtype: torch.dtype) -> None:
        """Allocate buffers for so many units, unless they are large enough."""
        capacity = 0 if self.values is None else self.values.shape[0]
        if units <= capacity and self.has_buffers(dtype):
            return
        module, capacity = self.module, max(capacity, _power(units))
        self.values = self.index = None  # frees the old buffers before the new ones are allocated
        outputs, inputs = kind_of(module).shape(module)
        width, device = (inputs, outputs)[self.dim], module.weight.device
        self.values = torch.zeros(capacity, width, dtype=dtype, device=device)
        self.index = torch.zeros(capacity, dtype=torch.int64, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """The forward of the module, with the products of the rows' adapters: input [rows, ..., inputs] → outputs."""
        own = self.original_forward
        y = type(self.module).forward(self.module, input) if own is None else own(input)
        if not torch.compiler.is_compiling() and not self.used:  # a compiled graph must serve all batches
            return y
        values = self.values if self.values.dtype == y.dtype else self.values.to(y.dtype)  # autocast
        rows = self._adapter_of(input.shape[0])
        return multi_adapter_linear(input, y, values, self.index, self.offsets, rows, self.dim)

    def put_back(self) -> None:
        """Give the module the forward that it had."""
        self.module.__dict__.pop("forward", None)
        if self.original_forward is not None:
            self.module.forward = self.original_forward

    def _adapter_of(self, rows: int) -> Tensor:
        """The slot of each row, [rows] int64. The rows of one sequence follow each other."""
        sequences = self.adapter.shape[0]
        if rows == sequences:
            return self.adapter
        if rows % sequences:
            raise ValueError(
                f"{self.path}: the batch names adapters of {sequences} sequences, but the model runs on "
                f"{rows} rows, which is not a multiple of {sequences}"
            )
        return self.adapter[:, None].expand(-1, rows // sequences).reshape(-1)


@contextmanager
def _forwards_replaced(layers) -> Iterator[None]:
    """Replace the forwards of the layers' modules inside this context. Nothing of the bank stays on the model."""
    present = (layer.module.__dict__.get("forward") for layer in layers)
    if any(isinstance(getattr(forward, "__self__", None), _BankLayer) for forward in present):
        raise RuntimeError(
            "a batch of another bank is running on this model, and a model runs one batch at a time: leave that batch "
            "first"
        )
    with ExitStack() as stack:
        for layer in layers:
            layer.original_forward = layer.module.__dict__.get("forward")
            stack.callback(layer.put_back)
            layer.module.forward = layer.forward
        yield


def check_plain(model: nn.Module) -> None:
    """Raise ValueError if the model's weights are not those of the base in its own order."""
    record = find_record(model)
    if record is not None:
        refuse(
            (
                record.active,
                f"{', '.join(record.active)} is active on the model, and a bank adds its own adapters to the base: "
                "call set_adapter(model, None) first, or detach",
            ),
            (
                record.moves,
                "the model's units have moved (layout='permuted'), and a bank needs the base's own order: detach first",
            ),
        )


def _power(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
