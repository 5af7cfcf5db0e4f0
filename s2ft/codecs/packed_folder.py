"""Checkpoint folders with packed weights, of compressed-tensors or in NF4 of bitsandbytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2ft.codecs.codec import Blocks, Codec
from s2ft.codecs.compressed import Nf4, Packed, codec_of
from s2ft.files.reading import StoredTensor
from s2ft.packages import check_packages

COMPRESSED = "compressed-tensors"


def has_codecs(settings: Mapping[str, Any] | None) -> bool:
    """Whether there are codecs for a checkpoint, given `quantization_config` of its config."""
    return settings is not None and (
        is_nf4(settings)
        or (settings.get("quant_method") == COMPRESSED and bool(settings.get("config_groups")))  # none if only sparse
    )


def is_nf4(settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is in NF4 of bitsandbytes."""
    return settings.get("quant_method") == "bitsandbytes" and settings.get("bnb_4bit_quant_type") == "nf4"


class PackedFolder:
    """A checkpoint folder whose packed weights have codecs.

    Attributes:
        path: The folder.
        tensors: Where each tensor is, by its name in the files.
    """

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> None:
        """Use the files of a folder.

        Args:
            path: The folder.
            tensors: Where each tensor is, by its name in the files.
            settings: `quantization_config` of the checkpoint's config, for which :func:`has_codecs` holds.
        """
        self.path, self.tensors, self._settings = path, tensors, settings

    @property
    def files(self) -> list[Path]:
        """The files that have tensors."""
        return sorted({stored.file for stored in self.tensors.values()})

    def packed(self, path: str) -> Packed:
        """Read the tensors of a packed weight, given the path of its module, by their names behind it.

        NF4 has tensors of the weight besides: ``weight.absmax`` is ``absmax`` here.

        Raises:
            ValueError: The folder has no such weight, or it is not packed.
        """
        parts = {name.removeprefix(f"{path}."): name for name in self.tensors if name.startswith(f"{path}.")}
        if not parts.keys() & {"weight_packed", "weight_scale", "weight.absmax"}:
            raise ValueError(
                f"{self.path}: the weight of {path} isn't packed, or isn't there; --dtype bfloat16 merges it"
            )
        return {part.removeprefix("weight."): self.tensors[name].read() for part, name in parts.items()}

    def name(self, path: str, part: str) -> str:
        """The name of a tensor of :meth:`packed` in the files."""
        return next(name for name in (f"{path}.{part}", f"{path}.weight.{part}") if name in self.tensors)

    def codec(self, path: str, packed: Packed | None = None) -> Codec:
        """The codec of a weight.

        Args:
            path: Path of the module.
            packed: What :meth:`packed` returns, if it was read before.

        Raises:
            ValueError: There is none for its format.
        """
        if is_nf4(self._settings):
            return Nf4(packed or self.packed(path))
        check_packages("a model of compressed-tensors")
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.utils import is_match

        groups = self._settings["config_groups"].values()
        for module in (torch.nn.Identity(), torch.nn.Linear(1, 1, device="meta")):  # a name precedes a class
            for group in groups:
                if is_match(path, module, group["targets"], self._settings.get("ignore") or ()):
                    return codec_of(QuantizationArgs.model_validate(group["weights"]).model_dump(mode="json"))
        raise ValueError(f"{self.path}: the weight of {path} is not packed; --dtype bfloat16 merges it")

    def unit_blocks(self, path: str, index: Tensor, dim: int) -> tuple[Codec, Blocks]:
        """The codec of a weight, and the blocks of some rows or columns.

        Args:
            path: Path of the module.
            index: Rows or columns [n] int64, ascending.
            dim: 0 for rows, 1 for columns.
        """
        packed = self.packed(path)
        codec = self.codec(path, packed)
        return codec, codec.unpack(packed).take(index, dim)

    def elements(self, path: str, part: str, shape: torch.Size, positions: Tensor) -> list[float]:
        """Some values of a parameter, as those of :meth:`s2ft.codecs.gguf_file.GgufFile.elements`."""
        ends = ("weight_packed", "weight_scale", "weight.absmax")  # of a weight that is packed
        if part == "weight" and any(f"{path}.{end}" in self.tensors for end in ends):
            packed = self.packed(path)
            values = self.codec(path, packed).decode(packed)
        elif f"{path}.{part}" in self.tensors:
            values = self.tensors[f"{path}.{part}"].read()
        else:  # transformers joins experts
            raise ValueError(f"{self.path} has no tensor of the name {path}.{part}: merge takes none of other names")
        if values.shape != shape:
            raise ValueError(f"{self.path}: {path}.{part} has shape {list(values.shape)}, not {list(shape)}")
        return values.flatten()[positions].float().tolist()
