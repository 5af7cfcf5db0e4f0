"""Make a golden adapter in this folder: `python make.py NAME`.

There is one of each kind: plain, with couplings of the user, with a weight that is trained in full, with one-sided
couplings, with several projections in one transposed weight. Once a schema is released its adapters are never made
again, and every later version must load them. A new schema gets new names and folders.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import s2ft
from s2ft import Coupling, S2FTConfig
from s2ft.model.coupling import Projection

HERE = Path(__file__).parent
RATIOS = dict(q_ratio=0.5, v_ratio=0.5, o_ratio=0.25, u_ratio=0.1, d_ratio=0.2)


def numbers(count: int, seed: int) -> torch.Tensor:
    """[count] float32 in [-0.5, 0.5), from 24 bits of sha256 each, so that they are equal in every release of torch."""
    digests = b"".join(hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(count // 8 + 1))
    return (torch.frombuffer(bytearray(digests), dtype=torch.int32)[:count] & 0xFFFFFF).float() / 2**24 - 0.5


def fill(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(numbers(parameter.numel(), i).view_as(parameter))
    return model


def llama() -> nn.Module:
    return fill(
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=20,
                num_hidden_layers=2,
                vocab_size=11,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
    )


def gpt2() -> nn.Module:
    return fill(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=16, vocab_size=11)))


def perceptron() -> nn.Module:
    return fill(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)))


def couplings() -> list:
    return [Coupling("ffn", 0, (Projection("u", "0", 6, 2, 0),), Projection("d", "2", 6, 2, 1))]


def one_sided() -> list:
    return [Coupling.one_sided(0, path="0", count=6, unit=2, side="outputs"), Coupling.one_sided(0, path="2", count=12)]


MODELS = {
    "schema-1": llama,
    "schema-1-couplings": perceptron,
    "schema-1-extra-weights": llama,
    "schema-1-one-sided": perceptron,
    "schema-1-transposed": gpt2,
}


def digests(model: nn.Module) -> dict:
    """The sha256 of the bytes of each weight."""
    return {
        key: hashlib.sha256(weight.detach().contiguous().numpy().tobytes()).hexdigest()
        for key, weight in model.state_dict().items()
    }


def save(model: nn.Module, name: str) -> None:
    """Save the adapter with deltas from `numbers`, and digests of the merged weights beside it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for i, parameter in enumerate(trained):
            parameter.copy_(numbers(parameter.numel(), 1000 + i).view_as(parameter) / 8)
    s2ft.save_adapter(model, HERE / name)
    (HERE / name / "merged.json").write_text(json.dumps(digests(s2ft.merge(model)), indent=1) + "\n")


def make(name: str) -> None:
    model = MODELS[name]()
    options = {}
    config = S2FTConfig(**RATIOS, layout="permuted" if name == "schema-1" else "indexed")
    if name == "schema-1-couplings":
        config = S2FTConfig(u_ratio=0.5, d_ratio=0.3)
        options = dict(couplings=couplings(), example=torch.ones(1, 6))
    elif name == "schema-1-extra-weights":
        config = S2FTConfig(**RATIOS, modules_to_save=["model.norm"])
    elif name == "schema-1-one-sided":
        config = S2FTConfig(l_ratio=0.3, towers=["language"])
        options = dict(couplings=one_sided(), verify=False)
    s2ft.attach(model, config, name="golden", **options)
    save(model, name)


if __name__ == "__main__":
    make(sys.argv[1])
