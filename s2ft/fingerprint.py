"""A short digest of the base model an adapter belongs to."""
import hashlib
from typing import Dict, List

import torch
from torch import Tensor, nn

from s2ft.coupling import Coupling

SAMPLES = 64   # elements of each weight whose place counts too


def fingerprint(model: nn.Module, couplings: List[Coupling]) -> Dict[str, str]:
    """Digest by layer of the weights and biases of every coupling, in original order: {"0": "3f…", …}.

    Weights are looked at in bfloat16, so a checkpoint has one fingerprint whether it is loaded in
    float32 or bfloat16. Every element counts through a sum, SAMPLES of each weight through their
    place as well. Costs one read of the weights. Raises: ValueError for weights on the meta device.
    """
    digests: Dict[str, "hashlib._Hash"] = {}
    for coupling in couplings:
        digest = digests.setdefault(str(coupling.layer), hashlib.sha256())
        for projection in coupling.projections:
            module = model.get_submodule(projection.path)
            for name in ("weight", "bias"):
                tensor = getattr(module, name, None)
                if tensor is not None:
                    digest.update(f"{projection.key}.{name}{tuple(tensor.shape)}".encode())
                    digest.update(_content(projection.path, tensor))
    return {layer: digest.hexdigest()[:16] for layer, digest in digests.items()}


@torch.no_grad()
def _content(path: str, tensor: Tensor) -> bytes:
    if tensor.is_meta:
        raise ValueError(f"{path} is on the meta device: load its weights first")
    bits = tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16).reshape(-1)
    step = max(1, bits.numel() // SAMPLES)
    total = int(bits.sum(dtype=torch.int64))
    return total.to_bytes(8, "little", signed=True) + bits[::step][:SAMPLES].cpu().numpy().tobytes()


def difference(ours: Dict[str, str], theirs: Dict[str, str]) -> str:
    """What differs between two fingerprints, in words; empty when nothing does."""
    if ours.keys() != theirs.keys():
        return f"{len(theirs)} layers against {len(ours)}"
    layers = [layer for layer in ours if ours[layer] != theirs[layer]]
    if not layers:
        return ""
    return f"{len(layers)} of {len(ours)} layers differ, the first is layer {layers[0]}"
