"""Many adapters of one base, served together: a batch whose sequences name theirs (paper, section 3.4).

The base's weights are never written. While a batch runs, every linear layer that an adapter of the bank touches has a
forward of ours: its own, and :func:`s2ft.ops.multi_adapter_linear` on the output. The adapters that the batch names
lie packed, projection by projection, in buffers that only grow, in powers of two: so the shapes that a compiled model
sees stay the same from batch to batch. Packing copies the adapters of a batch that names one which isn't packed
already, a few milliseconds, which one step of generating outweighs; and nothing has to be moved where adapters come
and go.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any, Optional

import torch
from torch import Tensor, nn

from s2ft.adapter.adapter import Adapter, check_fits
from s2ft.adapter.formats import native
from s2ft.api import new_attachment
from s2ft.attached.hosts.compiled import unwrapped
from s2ft.attached.record import RECORD, Attachment
from s2ft.files.adapter_folder import CONFIG, TENSORS, is_folder
from s2ft.files.reading import check_adapter_name
from s2ft.layers import kind_of
from s2ft.model.coupling import Projection, projections_of
from s2ft.model.delta import Delta
from s2ft.model.weights import find
from s2ft.ops import multi_adapter_linear

OURS = "_s2ft_bank"  # what marks a forward of ours


class AdapterBank:
    """Adapters by name, read from disk when a batch first names them, and batches that mix them.

    ::

        bank = AdapterBank(model, "adapters", limit_bytes=2 << 30)      # adapters/maths, adapters/code, ...
        bank.add("chat", "elsewhere/chat")
        with bank.batch(["maths", None, "chat", "maths"]):              # the sequences of the batch; None: the base
            model.generate(**inputs)

    Args:
        model: a plain base, or one with adapters of which none is active and whose units are where they were. It is
            the caller's not to change its weights while the bank is used: they are looked at once.
        directory: every folder in it that holds an adapter is known by the folder's name, those to come too.
        limit_bytes: of adapters kept in memory; beyond it those used longest ago are let go. The buffers of the
            largest batch yet come on top. Default: no limit.
        dtype: to keep adapters in; default: that of the weights they belong to.

    Adapters touch linear layers, transformers' Conv1D and quantized linear layers; experts and convolutions are
    refused when a batch names an adapter that has some. `add` and `remove` may be called from other threads at any
    time: a batch keeps what it began with. A model runs one batch at a time.
    """

    def __init__(
        self, model: nn.Module, directory=None, *, limit_bytes: int | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Raises: ValueError for a model with an active adapter or a limit that is none; NotADirectoryError."""
        if limit_bytes is not None and (not isinstance(limit_bytes, int) or limit_bytes < 1):
            raise ValueError(f"limit_bytes must be a whole number above 0, or None, got {limit_bytes!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating-point dtype, or None, got {dtype!r}")
        if directory is not None and not Path(directory).is_dir():
            raise NotADirectoryError(f"{directory} is no folder of adapters")
        model = unwrapped(model)
        check_plain(model)
        self.model, self.limit_bytes, self.dtype = model, limit_bytes, dtype
        self._directory = None if directory is None else Path(directory)
        self._entries: dict[str, _Entry] = {}
        self._removed: set[str] = set()  # of the directory's
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # the one used last comes last
        self._lock = threading.Lock()  # of the three above; never held while a file is read
        self._running = threading.Lock()  # held by a batch, and so is all that follows
        self._bases: dict[Any, _Base] = {}
        self._sites: dict[str, _Site] = {}
        self._packed: dict[int, int] = {}  # serial number of a loaded adapter → its place in the sites' buffers
        self._places = 1  # there are, a power of two
        self._serial = 0

    # ---- names ---------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """All that are known, sorted."""
        with self._lock:
            found = set(self._entries)
            if self._directory is not None:
                found |= {folder.name for folder in self._directory.iterdir() if self._has(folder.name)}
        return sorted(found)

    @property
    def loaded(self) -> list[str]:
        """Those in memory; the one used longest ago, which is let go next, comes first."""
        with self._lock:
            return list(self._loaded)

    @property
    def loaded_bytes(self) -> int:
        with self._lock:
            return self._bytes()

    def __contains__(self, name) -> bool:
        with self._lock:
            return isinstance(name, str) and (name in self._entries or self._has(name))

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, folder) -> None:
        """Make the adapter in `folder` known as `name`; it is read when a batch first names it.

        Raises: ValueError for a name that is taken or would be a path; FileNotFoundError where no adapter is.
        """
        check_adapter_name(name)
        folder = Path(folder)
        if not is_folder(folder):
            missing = next((file for file in (CONFIG, TENSORS) if not (folder / file).is_file()), CONFIG)
            raise FileNotFoundError(f"{folder} is no S²FT adapter: it has no {missing}")
        with self._lock:
            if name in self._entries or self._has(name):
                raise ValueError(f"there is an adapter called {name!r} already: remove it first")
            self._entries[name] = _Entry(folder)

    def remove(self, name: str) -> None:
        """Forget an adapter; its files stay, and a batch that runs keeps it. Raises: ValueError for an unknown name."""
        with self._lock:
            self._entry(name)
            if self._has(name):
                self._removed.add(name)
            del self._entries[name]
            self._loaded.pop(name, None)

    def _has(self, name: str) -> bool:
        """Whether the directory has an adapter of this name."""
        if self._directory is None or name in self._removed or name.startswith(".") or any(c in name for c in "/\\\0"):
            return False
        return bool(name) and is_folder(self._directory / name)

    def _entry(self, name: str) -> "_Entry":
        if name not in self._entries:
            if not isinstance(name, str) or not self._has(name):
                raise ValueError(f"the bank has no adapter called {name!r}")
            self._entries[name] = _Entry(self._directory / name)
        return self._entries[name]

    # ---- batches -------------------------------------------------------------------------------------

    @contextmanager
    def batch(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within, row b of what the model is given runs with adapter ``names[b]``, or the base where that is None.

        Where a model runs on k times as many rows (beams, several samples), each sequence has k rows that follow each
        other, as transformers' generate makes them. Any other multiple can't be told from that.

        Raises: ValueError for an unknown name, an adapter of another base or of layers that can't be mixed, or a
        batch whose adapters exceed the limit; RuntimeError while another batch runs. The model is then as it was.
        """
        names = self._checked(names)
        if not self._running.acquire(blocking=False):
            raise RuntimeError("a batch runs already, and a model runs one at a time: leave it first")
        try:
            check_plain(self.model)
            with torch.inference_mode(False), torch.no_grad():  # buffers live on, in whatever mode the next batch has
                self._use(
                    {path: self._site(path, site.dim, None, "the bank changes") for path, site in self._sites.items()}
                )
                taken = self._take(list(dict.fromkeys(name for name in names if name is not None)))
                places = self._pack(list(taken.values()))
                self._point([-1 if name is None else places[taken[name].serial] for name in names])
            with _mounted(self._sites.values()):
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

    def _take(self, names: list[str]) -> dict[str, "_Loaded"]:
        """What the batch has, whatever is removed from now on."""
        with self._lock:  # all or none: nothing is read where one is unknown
            entries = {name: self._entry(name) for name in names}
            taken = {name: self._loaded.get(name) for name in names}
            for name in names:
                if name in self._loaded:
                    self._loaded.move_to_end(name)
        for name, entry in entries.items():
            if taken[name] is None:
                taken[name] = self._read(name, entry.folder)
                self._check_limit(taken.values())
                self._keep(name, entry, taken[name], set(names))
        self._check_limit(taken.values())
        return taken

    def _check_limit(self, taken: Iterable[Optional["_Loaded"]]) -> None:
        if self.limit_bytes is None:
            return
        total = sum(one.bytes for one in taken if one is not None)
        if total > self.limit_bytes:
            raise ValueError(
                f"the batch's adapters take {total:,} bytes at least, more than limit_bytes = "
                f"{self.limit_bytes:,}: give smaller batches or a higher limit"
            )

    def _keep(self, name: str, entry: "_Entry", loaded: "_Loaded", needed: set[str]) -> None:
        """Among the loaded, unless it was removed meanwhile; others go, those used longest ago first."""
        with self._lock:
            if self._entries.get(name) is not entry:
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
        if adapter.extra_weights:
            raise ValueError(
                f"adapter {name!r} has {next(iter(adapter.extra_weights))} trained whole, and a batch "
                "has one for all of its rows: serve it merged (s2ft merge), or by load_adapter alone"
            )
        base = self._base(adapter)
        check_fits(adapter, self.model, base.record)
        touched = [base.projections[key] for key in adapter.deltas]
        sites = {one.path: self._site(one.path, one.dim, one.expert, f"adapter {name!r} changes") for one in touched}
        deltas: dict[str, list[Delta]] = {path: [] for path in sites}
        for projection, delta in zip(touched, adapter.deltas.values()):
            deltas[projection.path].append(delta)
        parts = {path: self._part(site, deltas[path]) for path, site in sites.items()}
        self._use(sites)
        self._serial += 1
        return _Loaded(self._serial, parts)

    def _base(self, adapter: Adapter) -> "_Base":
        """The model as the adapter's couplings see it: its family's, or those that the adapter has by hand."""
        attached = self.model.__dict__.get(RECORD)
        key = None if adapter.couplings is None or attached else tuple(adapter.couplings)
        if key not in self._bases:
            record = attached or new_attachment(self.model, adapter.couplings)
            self._bases[key] = _Base(record, {one.name: one for one in projections_of(record.couplings)})
        return self._bases[key]

    def _site(self, path: str, dim: int, expert: int | None, who: str) -> "_Site":
        """The one we have of this layer, or a new one where it is new, or was exchanged in the model."""
        module, known = find(self.model, path), self._sites.get(path)
        if known is not None and known.module is module:
            return known
        if expert is not None or not kind_of(module).is_linear:
            what = "experts" if expert is not None else f"a {type(module).__name__}"
            raise ValueError(
                f"{who} {path}, {what}: batches mix adapters of linear layers only, so use load_adapter "
                "and set_adapter instead"
            )
        return _Site(path, module, dim)

    def _use(self, sites: dict[str, "_Site"]) -> None:
        if any(self._sites.get(path) is not site for path, site in sites.items()):
            self._sites.update(sites)
            self._packed = {}  # not in the buffers of the new ones

    def _part(self, site: "_Site", deltas: list[Delta]) -> "_Part":
        weight = site.module.weight
        rows = [delta.values if delta.dim == 0 else delta.values.t() for delta in deltas]
        values = torch.cat(rows).to(weight.device, self.dtype or self._dtype_of(site), copy=True)
        return _Part(torch.cat([delta.index for delta in deltas]).to(weight.device), values.contiguous())

    def _dtype_of(self, site: "_Site") -> torch.dtype:
        """What the layer computes in: of a quantized one the bytes do not say."""
        dtype = site.module.weight.dtype
        return dtype if dtype.is_floating_point else getattr(self.model, "dtype", torch.get_default_dtype())

    # ---- packing -------------------------------------------------------------------------------------

    def _pack(self, taken: list["_Loaded"]) -> dict[int, int]:
        """Adapters by place in every site's buffers. Nothing is copied where the last ones packed include these."""
        moved = any(not site.is_in_place(self._dtype_of(site)) for site in self._sites.values())
        if not moved and all(one.serial in self._packed for one in taken):
            return self._packed
        self._packed = {}  # should memory run out half-way
        self._places = max(self._places, _power(len(taken)))
        bounds = [
            site.fill([one.parts.get(path) for one in taken], self._dtype_of(site))
            for path, site in self._sites.items()
        ]
        padded = [ends + [ends[-1]] * (self._places + 1 - len(ends)) for ends in bounds]
        for site, offsets in zip(self._sites.values(), torch.tensor(padded).unbind() if padded else ()):
            site.offsets = offsets.to(site.values.device)
        self._packed = {one.serial: place for place, one in enumerate(taken)}
        return self._packed

    def _point(self, places: list[int]) -> None:
        """Tell every site which row has which adapter."""
        ids, on, repeated = torch.tensor(places), {}, {}
        for site in self._sites.values():
            device = site.values.device
            if device not in on:
                on[device] = ids.to(device)
            site.adapter, site.repeated = on[device], repeated


@dataclass(eq=False)
class _Entry:
    """One adapter that is known; another one of the same name is another entry."""

    folder: Path


@dataclass
class _Base:
    """The model as a list of couplings sees it."""

    record: Attachment
    projections: dict[str, Projection]  # by name


@dataclass
class _Part:
    """What an adapter adds to one layer, be it in several projections."""

    index: Tensor  # [n] int64
    values: Tensor  # [n, inputs] for dim 0, [n, outputs] for dim 1


@dataclass
class _Loaded:
    """An adapter in memory."""

    serial: int
    parts: dict[str, _Part]  # by layer
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = sum(
            tensor.numel() * tensor.element_size()
            for part in self.parts.values()
            for tensor in (part.index, part.values)
        )


class _Site:
    """A layer that adapters of the bank touch, and the packed adapters of the batch (see multi_adapter_linear)."""

    def __init__(self, path: str, module: nn.Module, dim: int) -> None:
        self.path, self.module, self.dim = path, module, dim
        self.values: Tensor | None = None  # [capacity, inputs or outputs]
        self.index: Tensor | None = None  # [capacity]
        self.offsets: Tensor | None = None  # [places + 1]
        self.adapter: Tensor | None = None  # [sequences]
        self.repeated: dict[tuple, Tensor] = {}  # the same for more rows, shared by all sites of the batch
        self.used = False  # whether a packed adapter has units here
        self.own: Callable | None = None  # a forward that someone put on the module before
        self.forward = MethodType(_forward_of(self), module)

    def is_in_place(self, dtype: torch.dtype) -> bool:
        values = self.values
        return values is not None and values.device == self.module.weight.device and values.dtype == dtype

    def fill(self, parts: list[_Part | None], dtype: torch.dtype) -> list[int]:
        """Pack these; None has nothing here. Returns: where each begins, and the end of the last."""
        ends = [0]
        for part in parts:
            ends.append(ends[-1] + (0 if part is None else part.index.numel()))
        self.used = ends[-1] > 0
        self._make_room(ends[-1], dtype)
        there = [part for part in parts if part is not None]
        if there:
            device = self.values.device
            torch.cat([part.values.to(device) for part in there], out=self.values[: ends[-1]])
            torch.cat([part.index.to(device) for part in there], out=self.index[: ends[-1]])
        return ends

    def _make_room(self, units: int, dtype: torch.dtype) -> None:
        capacity = 0 if self.values is None else self.values.shape[0]
        if units <= capacity and self.is_in_place(dtype):
            return
        module, capacity = self.module, max(capacity, _power(units))
        self.values = self.index = None  # the old ones go first
        outputs, inputs = kind_of(module).shape(module)
        width, device = (inputs, outputs)[self.dim], module.weight.device
        self.values = torch.zeros(capacity, width, dtype=dtype, device=device)
        self.index = torch.zeros(capacity, dtype=torch.int64, device=device)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y [rows, ..., outputs] and what the rows' adapters add to it for x [rows, ..., inputs]."""
        if not torch.compiler.is_compiling() and not self.used:  # compiled, one graph serves all batches
            return y
        values = self.values if self.values.dtype == y.dtype else self.values.to(y.dtype)  # autocast
        return multi_adapter_linear(x, y, values, self.index, self.offsets, self._adapter_of(x.shape[0]), self.dim)

    def _adapter_of(self, rows: int) -> Tensor:
        """[rows] int64: adapter of each row, where each sequence has several that follow each other."""
        sequences = self.adapter.shape[0]
        if rows == sequences:
            return self.adapter
        if rows % sequences:
            raise ValueError(
                f"{self.path}: the batch names adapters of {sequences} sequences, but the model runs on "
                f"{rows} rows, which is no multiple of that"
            )
        if torch.compiler.is_compiling():
            return _repeat(self.adapter, rows // sequences)
        key = (rows, self.adapter.device)
        if key not in self.repeated:
            self.repeated[key] = _repeat(self.adapter, rows // sequences)
        return self.repeated[key]


def _repeat(adapter: Tensor, times: int) -> Tensor:
    return adapter[:, None].expand(-1, times).reshape(-1)


def _forward_of(site: _Site) -> Callable:
    def forward(module: nn.Module, x: Tensor) -> Tensor:
        y = type(module).forward(module, x) if site.own is None else site.own(x)
        return site.add(x, y)

    setattr(forward, OURS, True)
    return forward


@contextmanager
def _mounted(sites) -> Iterator[None]:
    """Have the sites' modules run our forward. Before and after, nothing of ours is on the model."""
    if any(hasattr(site.module.__dict__.get("forward"), OURS) for site in sites):
        raise RuntimeError("a batch of another bank runs on this model, and a model runs one at a time: leave it first")
    mounted = []
    try:
        for site in sites:
            site.own = site.module.__dict__.get("forward")
            site.module.forward = site.forward
            mounted.append(site)
        yield
    finally:
        for site in mounted:
            if site.own is None:
                del site.module.forward
            else:
                site.module.forward = site.own


def check_plain(model: nn.Module) -> None:
    """Raises: ValueError for a model whose weights are not those of the base as it was loaded."""
    record = model.__dict__.get(RECORD)
    if record is None:
        return
    if record.active:
        raise ValueError(
            f"{', '.join(record.active)} is active on the model, and a bank adds its own adapters to the "
            "base: set_adapter(model, None) first, or detach"
        )
    if record.moves:
        raise ValueError(
            "the model's units have moved (layout='permuted'), and a bank's adapters are in original "
            "order: detach first"
        )


def _power(count: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(0, count - 1).bit_length()
