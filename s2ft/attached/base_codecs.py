"""Training through the codec: the trained units of a base in a GGUF file stay values that the file can hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from s2ft.attached.record import Attachment, Mount
from s2ft.files.gguf_file import GgufFile
from s2ft.layers.coded import CodedSlice


def set_codecs(model: nn.Module, record: Attachment) -> None:
    """Let each mounted layer compute with what the base's file can hold, if the config says so and the base is a file.

    Raises:
        ValueError: A weight is not that of the file, its type has no codec, or something spreads or shares it.
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    if record.config.codec == "none" or not name.endswith(".gguf"):
        return
    if record.awaits_weights:
        raise ValueError(f"codec={record.config.codec!r} needs the weights of {name}: load them before attach")
    file = GgufFile(Path(name).expanduser())
    for path, mount in record.mounts.items():
        mount.layer.codec = _coded(file, path, mount)


@contextmanager
def without_codecs(record: Attachment) -> Iterator[None]:
    """Inside, layers compute with base + s2, for a proof whose deltas no file could hold."""
    layers = [mount.layer for mount in record.mounts.values()]
    codecs = [layer.codec for layer in layers]
    try:
        for layer in layers:
            layer.codec = None
        yield
    finally:
        for layer, codec in zip(layers, codecs):
            layer.codec = codec


def _coded(file: GgufFile, path: str, mount: Mount) -> CodedSlice:
    if len(mount.parts) > 1 or mount.original is None or mount.layer.kind.transposed or mount.layer.is_managed:
        raise ValueError(f"codec: {path} is not one plain weight of a GGUF file on one device")
    (part,), layer, codec = mount.parts, mount.layer, file.codec(path)
    found = file.part(path, part.elements, layer.dim)
    blocks = codec.unpack(found.packed.flatten(-2)).take(found.index, layer.dim)
    coded = CodedSlice(codec, blocks, part.positions, layer.dim)
    units = layer.selected_units().to(layer.weight.device)[part.positions.to(layer.weight.device)]
    now = layer.matrix.detach().index_select(layer.dim, units).cpu()
    if not torch.equal(coded.base.to(now.dtype), now):
        raise ValueError(f"codec: the weight of {path} is not that of {file.path}, which may have been replaced")
    return coded
