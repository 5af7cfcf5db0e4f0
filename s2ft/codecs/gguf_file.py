"""GGUF files by the names that a model of transformers has: where its weights are, and in which order their rows are.

The file is mapped into memory copy-on-write: what is written here never reaches it.
"""

from collections.abc import Callable, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from s2ft.codecs.codec import Blocks, Codec
from s2ft.codecs.gguf_types import TYPES, Gguf
from s2ft.packages import check_packages


@cache
def reader_class() -> type:
    """The GGUFReader of gguf, which raises where a length in the file reaches past its end.

    The file is a plain array, whose slices take a third of the time of a memmap's.
    """
    import gguf

    least = {kind: numpy.dtype(number).itemsize for kind, number in gguf.GGUFReader.gguf_scalar_to_np.items()}
    # a string begins with its length, an array with the type and the number of its elements
    least |= {gguf.GGUFValueType.STRING: 8, gguf.GGUFValueType.ARRAY: 12}

    class Reader(gguf.GGUFReader):
        @property  # type: ignore[override]  # a plain attribute of GGUFReader
        def data(self) -> numpy.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: numpy.memmap) -> None:
            self._plain = mapped.view(numpy.ndarray)

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset + numpy.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == gguf.GGUFValueType.ARRAY:  # before gguf makes objects of its elements
                kind = int(self._get(orig_offs, numpy.uint32)[0])
                length = int(self._get(orig_offs + 4, numpy.uint64)[0])
                if length * least.get(gguf.GGUFValueType(kind), 1) > len(self.data) - orig_offs:
                    raise ValueError(f"an array has {length} elements, for which the file is too short")
            return super()._get_field_parts(orig_offs, raw_type)

    return Reader


class PackedPart(NamedTuple):
    """The blocks that hold some rows or columns of a weight.

    Attributes:
        rows: Rows of the weight in the file, in the order of transformers, [outputs] int64.
        blocks: Blocks in each row, [blocks] int64.
        packed: Their bytes, [outputs, blocks, bytes of a block].
        index: The rows or columns among those of the blocks, [n] int64.
    """

    rows: Tensor
    blocks: Tensor
    packed: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple has a method of this name


class GgufFile:
    """A GGUF file that transformers can load.

    Attributes:
        path: The file.
        reader: The reader of the package gguf.
        tensors: The tensors of the reader by their names in the file.
    """

    def __init__(self, path: Path) -> None:
        """Read the header of a file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no GGUF file, or it is damaged.
            MissingPackages: The package gguf is not installed.
        """
        check_packages("a model in a .gguf file")
        self.path = path
        try:
            self.reader = reader_class()(path, "c")
            self.architecture = self.value("architecture", "general.")
            self.tensors: Mapping[str, Any] = {tensor.name: tensor for tensor in self.reader.tensors}
        except RecursionError:
            raise ValueError(f"{path} is no GGUF file, or it is damaged: too many arrays in arrays") from None
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no GGUF file, or it is damaged: {error}") from error

    def value(self, key: str, prefix: str | None = None) -> Any:
        """A value of the metadata, by its name behind that of the architecture; None if it is missing."""
        field = self.reader.fields.get((f"{self.architecture}." if prefix is None else prefix) + key)
        return None if field is None else field.contents()

    @cached_property
    def _names(self) -> Any:
        import gguf

        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in kinds:
            raise ValueError(f"{self.path} has the architecture {self.architecture}, which gguf does not know")
        return gguf.get_tensor_name_map(kinds[self.architecture], int(self.value("block_count")))

    @cached_property
    def conversions(self) -> list[Any]:
        """The steps by which transformers 5.24 loads some architectures, in the dtype of the model; none for others."""
        from transformers import AutoConfig

        try:
            from transformers.integrations.gguf import GGUF_ARCHS
        except ImportError:
            return []
        make = GGUF_ARCHS.get(self.architecture)
        return make(AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)) if make else []

    @cached_property
    def _processor(self) -> Callable[[numpy.ndarray, str], numpy.ndarray]:
        """What transformers does to the values of a tensor, by its name, when it loads the file."""
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        if self.conversions:
            return partial(_converted, self.conversions)
        heads, groups = self.value("attention.head_count"), self.value("attention.head_count_kv")
        options = {"num_attention_heads": heads, "num_key_value_heads": groups or heads}
        process = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=options).process
        return lambda values, name: process(values, name=name).weights

    def _processed(self, values: numpy.ndarray, name: str) -> numpy.ndarray:
        try:
            return self._processor(values, name)
        except KeyError as error:
            raise ValueError(f"{self.path}: transformers converts {name} by more of the config: {error}") from None

    def name(self, path: str, part: str = "weight") -> str:
        """The name in the file of a parameter of transformers, given the path of its module.

        Raises:
            ValueError: The file does not have it.
        """
        whole = self._names.get_name(f"{path}.{part}")  # of a parameter that is no weight
        bias = f"{self._names.get_name(f'{path}.' + part.replace('_bias', '_proj'))}.bias"  # Qwen3.5's dt_bias
        for name in (f"{self._names.get_name(path)}.{part}", whole, f"{whole}.weight", bias):
            if name in self.tensors:
                return name
        raise ValueError(f"{self.path} has no tensor for {path}.{part}")

    def order(self, path: str, part: str = "weight") -> tuple[Tensor, Tensor]:
        """The row and the column in the file of each that transformers has: llama.cpp reorders some.

        Returns:
            Rows [outputs] int64, and columns [inputs] int64; one of them is in order.

        Raises:
            ValueError: transformers does more to the tensor than to reorder its rows or its columns.
        """
        name = self.name(path, part)
        *inputs, outputs = (numpy.arange(int(size)) for size in self.tensors[name].shape)
        columns = inputs[0] if inputs else numpy.arange(1)
        try:
            rows = self._processed(outputs[:, None], name)[:, 0]
        except IndexError:
            rows, columns = outputs, self._processed(columns[None], name)[0]
        if not (numpy.array_equal(numpy.sort(rows), outputs) and len(columns) == len(numpy.unique(columns))):
            raise ValueError(f"{self.path}: transformers converts {name}, so its blocks can't be changed one by one")
        return torch.from_numpy(numpy.ascontiguousarray(rows)), torch.from_numpy(numpy.ascontiguousarray(columns))

    def codec(self, path: str) -> Gguf:
        """The codec of a weight.

        Raises:
            ValueError: There is none for its type, or its blocks can't be changed one by one.
        """
        kind = self.tensors[self.name(path)].tensor_type.name
        if kind not in TYPES:
            raise ValueError(
                f"{self.path}: {self.name(path)} has the type {kind}, and there are codecs for {', '.join(TYPES)}"
            )
        self.order(path)
        return TYPES[kind]

    def part(self, path: str, index: Tensor, dim: int) -> PackedPart:
        """Read the blocks that hold some rows or columns of a weight.

        Args:
            path: Path of the module.
            index: Rows or columns of the weight in transformers [n] int64, ascending.
            dim: 0 for rows, 1 for columns.

        Raises:
            ValueError: There is no codec for its type, or transformers converts it, or has rows in another order.
        """
        tensor, (rows, columns) = self.tensors[self.name(path)], self.order(path)
        data = tensor.data.reshape(len(rows), -1, self.codec(path).size)
        if dim == 0:
            if not torch.equal(columns, columns.sort().values):
                raise ValueError(
                    f"{self.path}: transformers reorders the inputs of {tensor.name}, which rows have whole"
                )
            rows, blocks, index = rows[index], torch.arange(data.shape[1]), torch.arange(len(index))
        else:
            size, index = len(columns) // data.shape[1], columns[index]  # inputs of a block of bytes
            blocks = (index // size).unique()
            index = torch.searchsorted(blocks, index // size) * size + index % size
        packed = torch.from_numpy(numpy.ascontiguousarray(data[numpy.ix_(rows.numpy(), blocks.numpy())]))
        return PackedPart(rows, blocks, packed, index)

    def whole(self, path: str) -> Tensor:
        """The blocks of all outputs of a weight, in the order of transformers, [outputs, bytes]."""
        return self.part(path, torch.arange(int(self.tensors[self.name(path)].shape[-1])), 0).packed.flatten(-2)

    def unit_blocks(self, path: str, index: Tensor, dim: int) -> tuple[Codec, Blocks]:
        """The codec of a weight, and the blocks of some rows or columns; arguments and errors as of :meth:`part`."""
        found, codec = self.part(path, index, dim), self.codec(path)
        return codec, codec.unpack(found.packed.flatten(-2)).take(found.index, dim)

    def has_codec(self, path: str) -> bool:
        """Whether a weight of the file has a codec, and its blocks can be read one by one."""
        try:
            self.part(path, torch.arange(0), 0)
        except ValueError:
            return False
        return True

    def values(self, path: str, part: str = "weight") -> Tensor:
        """A parameter as transformers loads it, float32."""
        import gguf

        tensor = self.tensors[self.name(path, part)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = numpy.ascontiguousarray(self._processed(values, tensor.name))
        return torch.from_numpy(found.copy() if numpy.shares_memory(found, tensor.data) else found)

    def elements(self, path: str, part: str, shape: torch.Size, positions: Tensor) -> list[float]:
        """Some values of a parameter.

        Args:
            path: Path of the module.
            part: "weight" or "bias".
            shape: Shape of the parameter in transformers.
            positions: Positions of the values in it, in order and counted through all rows, [n] int64.

        Raises:
            ValueError: The file has no such tensor, or it has another shape.
        """
        import gguf

        tensor = self.tensors[self.name(path, part)]
        if tuple(int(size) for size in reversed(tensor.shape)) != tuple(shape):
            raise ValueError(f"{self.path}: {tensor.name} has shape {tensor.shape[::-1].tolist()}, not {list(shape)}")
        rows, columns = self.order(path, part)
        data = tensor.data[:, None] if len(shape) == 1 else tensor.data
        values = gguf.quants.dequantize(data[rows[positions // len(columns)].numpy()], tensor.tensor_type)
        return values[numpy.arange(len(positions)), columns[positions % len(columns)].numpy()].tolist()


def _converted(conversions: list[Any], values: numpy.ndarray, name: str) -> numpy.ndarray:
    """The values of a tensor of the file after transformers' conversions of its name."""
    from transformers.core_model_loading import WeightConverter, rename_source_key

    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    key, pattern = rename_source_key(name, [one for one in conversions if one not in converters], converters)
    found: Any = torch.from_numpy(values.copy())  # of a file that is read only
    for operation in (step for one in converters if pattern in one.source_patterns for step in one.operations):
        found = operation.convert({name: found}, [name], [key])[key]
    return found.numpy()
