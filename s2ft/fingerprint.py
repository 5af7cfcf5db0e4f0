"""A short description of the base model that an adapter belongs to."""
import hashlib
from typing import Any, Dict, List

import torch
from torch import Tensor, nn

from s2ft.coupling import Coupling

SAMPLES = 4          # values of each weight that are kept for comparing across dtypes
TOLERANCE = 2**-6    # relative; bfloat16's rounding is 2**-9


def fingerprint(model: nn.Module, couplings: List[Coupling]) -> Dict[str, Any]:
    """What identifies the weights and biases of the couplings, in original order.

    ``{"dtype": …, "layers": {"0": {"digest": …, "samples": [floats]}, …}}``. The digest takes in every
    element (their sum as integers, and 64 of them by place) and is compared where the dtypes are the
    same; the samples are compared, within rounding, where a base is loaded in another dtype. Costs one
    read of the weights. Raises: ValueError for weights on the meta device.
    """
    layers: Dict[str, Dict[str, Any]] = {}
    digests: Dict[str, Any] = {}
    for coupling in couplings:
        layer = layers.setdefault(str(coupling.layer), {"digest": "", "samples": []})
        digest = digests.setdefault(str(coupling.layer), hashlib.sha256())
        for projection in coupling.projections:
            module = model.get_submodule(projection.path)
            for name in ("weight", "bias"):
                tensor = getattr(module, name, None)
                if tensor is not None:
                    if tensor.is_meta:
                        raise ValueError(f"{projection.path} is on the meta device: load its weights first")
                    digest.update(f"{projection.key}.{name}{tuple(tensor.shape)}".encode())
                    digest.update(_content(tensor.detach()))
                    layer["samples"] += _every(tensor.detach(), SAMPLES).double().tolist()
        layer["digest"] = digest.hexdigest()[:16]
    for layer in layers.values():
        layer["samples"] = [float(f"{value:.5g}") for value in layer["samples"]]
    return {"dtype": str(weight_dtype(model, couplings)).removeprefix("torch."), "layers": layers}


def weight_dtype(model: nn.Module, couplings: List[Coupling]) -> torch.dtype:
    return model.get_submodule(couplings[0].consumer.path).weight.dtype


def _every(tensor: Tensor, samples: int) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[::max(1, flat.numel() // samples)][:samples]


def _content(tensor: Tensor) -> bytes:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = int(tensor.contiguous().view(integers).sum(dtype=torch.int64))
    return total.to_bytes(8, "little", signed=True) + _every(tensor, 64).contiguous().view(integers).cpu().numpy().tobytes()


def difference(ours: Dict[str, Any], theirs: Dict[str, Any]) -> str:
    """What differs between two fingerprints, in words; empty when nothing does."""
    mine, other = ours["layers"], theirs["layers"]
    if mine.keys() != other.keys():
        return f"{len(other)} layers against this model's {len(mine)}"
    same = _same_digest if ours["dtype"] == theirs["dtype"] else _same_samples
    layers = [layer for layer in mine if not same(mine[layer], other[layer])]
    if not layers:
        return ""
    return f"{len(layers)} of {len(mine)} layers differ, the first is layer {layers[0]}"


def _same_digest(mine: Dict[str, Any], other: Dict[str, Any]) -> bool:
    return mine["digest"] == other["digest"]


def _same_samples(mine: Dict[str, Any], other: Dict[str, Any]) -> bool:
    a, b = torch.tensor(mine["samples"]), torch.tensor(other["samples"])
    return a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(a.abs().mean()))
