"""Quantized models on the CPU: the linear layers of bitsandbytes and torchao."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from support.inside import NO_FUSE, S2Layer, kind_of
from support.models import output_of

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")


@torch.no_grad()
def plain(dtype=torch.float32, seed=0):
    """A LLaMA with biases in evaluation mode; its sizes suit all kinds of quantization."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=67,
            attention_bias=True,
        )
    ).eval()
    for parameter in model.parameters():
        parameter.normal_(**(dict(mean=0.5, std=0.3) if parameter.dim() == 1 else dict(std=0.1)))
    return model.to(dtype)


def low_bits(kind=bnb.nn.Linear4bit, **options):
    return lambda linear: kind(linear.in_features, linear.out_features, linear.bias is not None, **options)


def by_bitsandbytes(make, linear):
    made = make(linear)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def by_torchao(config, linear):
    holder = nn.Sequential(linear)
    torchao.quantize_(holder, config)
    return holder[0]


KINDS = {
    "nf4": lambda linear: by_bitsandbytes(low_bits(quant_type="nf4"), linear),
    "fp4": lambda linear: by_bitsandbytes(low_bits(quant_type="fp4", compress_statistics=False), linear),
    "nf4-bfloat16": lambda linear: by_bitsandbytes(low_bits(quant_type="nf4", compute_dtype=torch.bfloat16), linear),
    "8bit": lambda linear: by_bitsandbytes(low_bits(kind=bnb.nn.Linear8bitLt, has_fp16_weights=False), linear),
    "torchao-int8": lambda linear: by_torchao(torchao.Int8WeightOnlyConfig(), linear),
    "torchao-float8": lambda linear: by_torchao(torchao.Float8WeightOnlyConfig(), linear),
    "torchao-int4": lambda linear: by_torchao(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4), linear),
}
RARE = ("fp4", "nf4-bfloat16", "torchao-float8")  # layers of the same classes as others


def is_projection(path):
    return path.endswith("_proj")


def quantized(kind, dtype=torch.float32, seed=0, wanted=is_projection):
    """The model with the projections quantized; lm_head is not, as in transformers."""
    model = plain(dtype, seed)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and wanted(path):
            model.set_submodule(path, KINDS[kind](module))
    return model.eval()


def linears(model):
    """The quantized layers, attached or not, by the path of the projection."""
    return {path.removesuffix(".linear"): module for path, module in model.named_modules() if is_quantized(module)}


def is_quantized(module):
    return kind_of(module).read_only == NO_FUSE and not isinstance(module, S2Layer)


def dense_reference(model):
    """The plain model with the dequantized weights of `model`."""
    reference = plain(model.lm_head.weight.dtype)
    for path, module in linears(model).items():
        reference.get_submodule(path).weight.data.copy_(kind_of(module).matrix(module))
    return reference


def contents(model):
    """The bytes of each quantized weight and its scales, as bitsandbytes and torchao store them."""
    found = {}
    for path, module in linears(model).items():
        if type(module) is nn.Linear:
            names, _ = module.weight.__tensor_flatten__()
            parts = [getattr(module.weight, name) for name in names]
        elif isinstance(module, bnb.nn.Linear4bit):
            packed = module.weight.quant_state
            state = packed.as_dict() if packed else {}  # the scales are quantized too and have scales themselves
            parts = [module.weight.data, *(state[name] for name in sorted(state))]
        else:
            parts = [module.weight.data, module.state.SCB if module.weight.SCB is None else module.weight.SCB]
        found[path] = [part.clone() for part in parts if isinstance(part, torch.Tensor)]
    return found


def assert_same_contents(ours, theirs):
    assert list(ours) == list(theirs) and len(ours) > 0
    for path, tensors in ours.items():
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, theirs[path], strict=True)), path


def forward(model):
    """The output in training mode, where bitsandbytes packs no weights and quantizes no activations on the CPU."""
    before = model.training
    model.train()
    output = output_of(model)
    model.train(before)
    return output


def dynamic(name):
    """A model one of whose layers, which need not be trained, quantizes its inputs too."""
    model = plain()
    torchao.quantize_(model, getattr(torchao, name)(), lambda module, path: path.endswith("1.self_attn.o_proj"))
    return model
