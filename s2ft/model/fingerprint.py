"""The fingerprint of a base model, and where the slices of an adapter lie in it."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.distributed import elements_of, full_values, is_dtensor, own_shard, sum_over_shards
from s2ft.layers import EXPERTS, TRANSPOSED_EXPERTS
from s2ft.model.coupling import Coupling, Projection, projections_of
from s2ft.model.weights import WeightHandle, weight_at

SAMPLES = 4  # values of each weight in the fingerprint, for comparing weights of different dtypes
TOLERANCE = 2**-6  # relative error of samples; rounding to bfloat16 gives 2**-9
QUANTIZED = "quantized"  # how Kind.dtype_name starts for quantized weights
QUANTIZATION = 0.5  # mean error / mean value of samples; four bits give about 0.1, two bits 0.35, another model over 1

# What a fingerprint takes of one weight or bias: bytes that depend on its label, its shape and every element, and a few
# of its values.
WeightPrint = tuple[bytes, list[float]]


def fingerprint(model: nn.Module, couplings: list[Coupling]) -> dict[str, Any]:
    """Compute the fingerprint of a model's coupled weights and biases, whose units are in the base's order.

    It reads each weight once. Weights that are spread over ranks are not gathered, and every one of these ranks must
    call this. A digest depends on every element of a layer: on their sum as integers, and on 64 elements by position.

    Args:
        model: The model.
        couplings: Its couplings.

    Returns:
        ``{"dtype": …, "layers": {"0": {"digest": …, "samples": [floats]}, …}}``. :func:`difference` compares the
        digests of fingerprints of one dtype, else the samples.

    Raises:
        ValueError: A weight is on the meta device, and in no file.
    """
    prints: dict[str, list[WeightPrint]] = {str(coupling.layer): [] for coupling in couplings}
    for layer, projection, handle in covered(model, couplings):
        with _readable(handle.tensor, handle.full) as weight:
            prints[layer].append(read_print(f"{projection.key}.weight", weight))
        del weight  # before the next one is read
        if handle.bias is not None:
            with _readable(handle.bias) as bias:
                prints[layer].append(read_print(f"{projection.key}.bias", bias))
    return {"dtype": _dtype(model, couplings), "layers": {layer: layer_print(found) for layer, found in prints.items()}}


def covered(model: nn.Module, couplings: list[Coupling]) -> Iterator[tuple[str, Projection, WeightHandle]]:
    """Iterate over the weights that a fingerprint covers: the layer, the first projection in the weight, the weight."""
    seen: set[str] = set()
    for coupling in couplings:
        for projection in coupling.projections:
            if projection.path not in seen:  # several projections, or experts, may be in one weight
                seen.add(projection.path)
                yield str(coupling.layer), projection, weight_at(model, projection)


def read_print(label: str, tensor: Tensor) -> WeightPrint:
    """Read what the fingerprint takes of one weight or bias.

    Args:
        label: The projection's key and "weight" or "bias", such as "d.weight".
        tensor: The weight as it is stored, in the dtype of the fingerprint.

    Raises:
        ValueError: A sample is NaN or infinite, which JSON can't hold.
    """
    samples = _every(tensor, SAMPLES).cpu().double()  # which some accelerators lack
    if not bool(torch.isfinite(samples).all()):
        raise ValueError(f"{label} of the base is not finite: it has NaN or infinite values")
    return f"{label}{tuple(tensor.shape)}".encode() + _content(tensor), samples.tolist()


def layer_print(prints: Iterable[WeightPrint]) -> dict[str, Any]:
    """The entry of a layer in a fingerprint, from those of its weights and biases."""
    digest, samples = hashlib.sha256(), []
    for content, values in prints:
        digest.update(content)
        samples += [float(f"{value:.5g}") for value in values]
    return {"digest": digest.hexdigest()[:16], "samples": samples}


def _dtype(model: nn.Module, couplings: list[Coupling]) -> str:
    """The dtype of the first quantized weight in words, or, without any, of the first consumer or one-sided layer."""
    handles = (weight_at(model, projection) for projection in projections_of(couplings))
    quantized = (handle.dtype_name for handle in handles if handle.dtype_name.startswith(QUANTIZED))
    return next(quantized, weight_at(model, couplings[0].main).dtype_name)


def _readable(
    tensor: Tensor, full: Callable[[], AbstractContextManager[Tensor]] | None = None
) -> AbstractContextManager[Tensor]:
    """Open a weight or bias in full, but for a DTensor, whose shards are read on each rank."""
    if is_dtensor(tensor) and not tensor.is_meta:
        return nullcontext(tensor)
    return full_values(tensor) if full is None else full()


def sampled(count: int, samples: int = SAMPLES) -> Tensor:
    """The positions of the values that a fingerprint has of a weight of so many values."""
    return torch.arange(0, count, max(1, count // samples), device="cpu")[:samples]


def _every(tensor: Tensor, samples: int) -> Tensor:
    positions = sampled(tensor.numel(), samples)
    if is_dtensor(tensor):
        return elements_of(tensor, positions)
    return tensor.detach().reshape(-1)[positions.to(tensor.device)]


def _content(tensor: Tensor) -> bytes:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = (own_shard(tensor).tensor if is_dtensor(tensor) else tensor.detach()).contiguous().view(-1).view(integers)
    # PyTorch would make a copy in int64 before it sums; NumPy needs none, and an eighth of the time.
    total = int(flat.numpy().sum(dtype="int64") if flat.device.type == "cpu" else flat.sum(dtype=torch.int64))
    if is_dtensor(tensor):
        total = int(sum_over_shards(torch.tensor(total), tensor))
    some = _every(tensor, 64).contiguous().view(integers)
    return total.to_bytes(8, "little", signed=True) + some.cpu().numpy().tobytes()


def digest(fingerprint: dict[str, Any] | None) -> str:
    """Hash a fingerprint to 16 hexadecimal digits; "unknown" if there is none yet."""
    if fingerprint is None:
        return "unknown"
    layers = "".join(layer["digest"] for layer in fingerprint["layers"].values())
    return hashlib.sha256(layers.encode()).hexdigest()[:16]


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Compare two fingerprints.

    Digests are compared if the dtypes are the same. Otherwise samples are compared, with the tolerance of rounding, or,
    if one side is quantized, with that of quantization.

    Args:
        ours: The fingerprint of this model.
        theirs: The fingerprint of the model that an adapter was trained on.

    Returns:
        The difference in words; empty if both are of one base.
    """
    mine, other = ours["layers"], theirs["layers"]
    if mine.keys() != other.keys():
        return (
            f"{len(other)} layers against this model's {len(mine)}, and layer {min(mine.keys() ^ other.keys())} is in "
            "one of them alone"
        )
    # Two quantized ones are compared by samples too: devices round differently, and scales may be quantized.
    quantized = any(fingerprint["dtype"].startswith(QUANTIZED) for fingerprint in (ours, theirs))
    exact = ours["dtype"] == theirs["dtype"] and not quantized
    layers = [layer for layer in mine if not _same(mine[layer], other[layer], exact, quantized)]
    return f"{len(layers)} of {len(mine)} layers differ, the first is layer {layers[0]}" if layers else ""


def _same(mine: dict[str, Any], other: dict[str, Any], exact: bool, quantized: bool) -> bool:
    """Whether two layers may be of one base: by their digests, or by samples that rounding or quantization changed."""
    if exact:
        return mine["digest"] == other["digest"]
    a, b = torch.tensor(mine["samples"]), torch.tensor(other["samples"])
    if a.shape != b.shape:
        return False
    size = float(a.abs().mean())
    if not math.isfinite(size):  # a damaged scale, such as NaN; no adapter has such a base
        return False
    if quantized:
        return float((a - b).abs().mean()) <= QUANTIZATION * size
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * size)


# ---- where the slices of an adapter lie, in words that need no model to be understood -------------------------------

LINEAR, TRANSPOSED, OF_EXPERTS, OF_EXPERTS_TRANSPOSED, OTHER = STORAGES = (
    "linear",  # [outputs, inputs]
    "transposed linear",  # [inputs, outputs], such as transformers' Conv1D
    "experts",  # [experts, outputs, inputs]
    "transposed experts",  # [experts, inputs, outputs]
    "other",  # for instance a convolution
)


@dataclass(frozen=True)
class Location:
    """The weight of one projection.

    Attributes:
        path: Path of the layer in the model; for experts, of the parameter with the weights of all of them.
        size: All elements of the weight along the dimension of the slices.
        storage: How the weight is stored, one of STORAGES.
        shared: Whether other projections lie in the same weight: queries, keys and values in one, for instance.
        expert: Number of the expert.
    """

    path: str
    size: int
    storage: str = LINEAR
    shared: bool = False
    expert: int | None = None

    def check(self, name: str) -> None:
        """Raise ValueError, naming the projection, for fields that can't be those of a weight."""
        valid = isinstance(self.path, str) and type(self.size) is int and 0 < self.size < 2**31
        valid = valid and isinstance(self.storage, str) and self.storage in STORAGES and isinstance(self.shared, bool)
        if not valid or not (self.expert is None or type(self.expert) is int and self.expert >= 0):
            raise ValueError(f"{name} has no valid path, size, storage, shared or expert")


@dataclass(frozen=True)
class Structure:
    """What an adapter has to know of its model, so that it can be served without building the model.

    Attributes:
        locations: The weight of each of the adapter's projections, by the projection's name.
        base_weights: The weights that the base's fingerprint covers, by layer: pairs of the label in the fingerprint,
            such as "d.weight", and the parameter's name in the model, in the fingerprint's order.
    """

    locations: dict[str, Location]
    base_weights: dict[str, list[tuple[str, str]]]


def union(parts: Iterable[Structure | None]) -> Structure | None:
    """Join the structures of adapters of one base; None if one of them is not known."""
    found = list(parts)
    known = [part for part in found if part is not None]
    locations = {name: one for part in known for name, one in part.locations.items()}
    return Structure(locations, known[0].base_weights) if len(known) == len(found) else None


def structure_of(model: nn.Module, couplings: list[Coupling], names: Iterable[str]) -> Structure:
    """Describe the weights of an adapter's projections in its model.

    Args:
        model: The model, with or without adapters. It may be on the meta device.
        couplings: Its couplings.
        names: The adapter's projections.

    Returns:
        The description.

    Raises:
        KeyError: A name is not one of a projection of the couplings.
    """
    known = {projection.name: projection for projection in projections_of(couplings)}
    locations = {
        name: Location(one.path, one.extent, _storage(weight_at(model, one).kind), one.size is not None, one.expert)
        for name, one in ((name, known[name]) for name in names)
    }
    return Structure(locations, _base_weights(model, couplings))


def _storage(kind: Any) -> str:
    if kind in (EXPERTS, TRANSPOSED_EXPERTS):
        return OF_EXPERTS if kind is EXPERTS else OF_EXPERTS_TRANSPOSED
    return OTHER if not kind.is_linear else TRANSPOSED if kind.transposed else LINEAR


def _base_weights(model: nn.Module, couplings: list[Coupling]) -> dict[str, list[tuple[str, str]]]:
    """The weights and biases that :func:`s2ft.model.fingerprint.fingerprint` reads, in its order."""
    found: dict[str, list[tuple[str, str]]] = {str(coupling.layer): [] for coupling in couplings}
    for layer, projection, handle in covered(model, couplings):
        path, key = projection.path, projection.key
        is_parameter = projection.expert is not None and handle.kind in (EXPERTS, TRANSPOSED_EXPERTS)
        found[layer].append((f"{key}.weight", path if is_parameter else f"{path}.weight"))
        if handle.bias is not None:
            found[layer].append((f"{key}.bias", f"{path}.bias"))
    return found
