"""A short description of the base model that an adapter belongs to."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.distributed import is_dtensor, is_partitioned
from s2ft.model.coupling import Coupling, projections_of
from s2ft.model.weights import weight_at

SAMPLES = 4  # values of each weight that are kept for comparing across dtypes
TOLERANCE = 2**-6  # relative; bfloat16's rounding is 2**-9
QUANTIZED = "quantized"
QUANTIZATION = 0.5  # mean error to mean value; four bits make about 0.1, two bits 0.35, and another model more than 1


def fingerprint(model: nn.Module, couplings: list[Coupling]) -> dict[str, Any]:
    """What identifies the weights and biases of the couplings, in original order.

    ``{"dtype": …, "layers": {"0": {"digest": …, "samples": [floats]}, …}}``. The digest takes in every
    element (their sum as integers, and 64 of them by place) and is compared where the dtypes are the
    same; the samples are compared, within rounding, where a base is loaded in another dtype, and roughly
    where one side is quantized. Costs one read of the weights. Raises: ValueError for weights on the meta device
    or sharded.
    """
    layers: dict[str, dict[str, Any]] = {}
    digests: dict[str, Any] = {}
    seen: set[str] = set()
    for coupling in couplings:
        layer = layers.setdefault(str(coupling.layer), {"digest": "", "samples": []})
        digest = digests.setdefault(str(coupling.layer), hashlib.sha256())
        for projection in coupling.projections:
            if projection.path in seen:  # several projections, or experts, in one weight
                continue
            seen.add(projection.path)
            handle = weight_at(model, projection)
            _check_is_here(projection.path, handle.tensor)
            weight = handle.matrix if handle.read_only else handle.tensor  # all experts; dequantized where it must be
            for name, tensor in (("weight", weight), ("bias", handle.bias)):
                if tensor is not None:
                    digest.update(f"{projection.key}.{name}{tuple(tensor.shape)}".encode())
                    digest.update(_content(tensor.detach()))
                    layer["samples"] += _every(tensor.detach(), SAMPLES).double().tolist()
        layer["digest"] = digest.hexdigest()[:16]
    for layer in layers.values():
        layer["samples"] = [float(f"{value:.5g}") for value in layer["samples"]]
    return {"dtype": _dtype(model, couplings), "layers": layers}


def _check_is_here(path: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError(
            f"{path} is on the meta device: load its weights first (on every rank: FSDP's "
            "cpu_ram_efficient_loading leaves them to the first alone)"
        )
    if is_partitioned(weight):
        raise ValueError(
            f"{path} is partitioned by ZeRO-3 already: load the model outside deepspeed.zero.Init (before "
            "the DeepSpeed config is made, or with zero3_init_flag false), attach or load the adapter, "
            "then let DeepSpeed have it"
        )
    if is_dtensor(weight):
        axes = weight.device_mesh.mesh_dim_names or ()
        if "tp" in axes or any(p.is_shard() and p.dim for p in weight.placements):
            raise ValueError(
                f"{path} is split over ranks by tensor parallelism ({weight.placements}), where no rank "
                "has all the units that S²FT selects from and moves: load the model without tp_plan, "
                "attach, and shard it by FSDP2 or ZeRO"
            )
        raise ValueError(f"{path} is sharded (a DTensor): attach or load the adapter first, then shard the model")


def _dtype(model: nn.Module, couplings: list[Coupling]) -> str:
    """The dtype of the first quantized weight in words, or, without any, of the first consumer."""
    handles = (weight_at(model, projection) for projection in projections_of(couplings))
    quantized = (handle.dtype_name for handle in handles if handle.dtype_name.startswith(QUANTIZED))
    return next(quantized, weight_at(model, couplings[0].consumer).dtype_name)


def _every(tensor: Tensor, samples: int) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // samples)][:samples]


def _content(tensor: Tensor) -> bytes:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = int(tensor.contiguous().view(integers).sum(dtype=torch.int64))
    some = _every(tensor, 64).contiguous().view(integers)
    return total.to_bytes(8, "little", signed=True) + some.cpu().numpy().tobytes()


def digest(fingerprint: dict[str, Any]) -> str:
    """Of all layers, in 16 hexadecimal digits."""
    layers = "".join(layer["digest"] for layer in fingerprint["layers"].values())
    return hashlib.sha256(layers.encode()).hexdigest()[:16]


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What differs between two fingerprints, in words; empty when nothing does."""
    mine, other = ours["layers"], theirs["layers"]
    if mine.keys() != other.keys():
        return f"{len(other)} layers against this model's {len(mine)}"
    if any(fingerprint["dtype"].startswith(QUANTIZED) for fingerprint in (ours, theirs)):
        same = _close_samples  # of the same kind too: devices round differently, and scales may be quantized or not
    else:
        same = _same_digest if ours["dtype"] == theirs["dtype"] else _same_samples
    layers = [layer for layer in mine if not same(mine[layer], other[layer])]
    if not layers:
        return ""
    return f"{len(layers)} of {len(mine)} layers differ, the first is layer {layers[0]}"


def _same_digest(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    return mine["digest"] == other["digest"]


def _same_samples(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    a, b = torch.tensor(mine["samples"]), torch.tensor(other["samples"])
    return a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(a.abs().mean()))


def _close_samples(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether one can be the other quantized."""
    a, b = torch.tensor(mine["samples"]), torch.tensor(other["samples"])
    return a.shape == b.shape and float((a - b).abs().mean()) <= QUANTIZATION * float(a.abs().mean())
