"""Bases and adapters on the disk, with the answers that transformers gives with the merged weights, in float32."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

import s2ft
from support.states import randomize, with_adapter, with_loaded

PROMPTS = [torch.randint(3, 512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 9, 17, 33)]
TOKENS = 24
# Units of inputs alone; of all kinds of projections, in different numbers; and of other projections
ADAPTERS = {
    "down-o": dict(d_ratio=0.03, o_ratio=0.13),
    "wide": dict(d_ratio=0.09, u_ratio=0.02, g_ratio=0.01, q_ratio=0.13, v_ratio=0.34, o_ratio=0.13),
    "other": dict(d_ratio=0.05, k_ratio=0.34),
}


@dataclass
class Served:
    """A base and its adapters on the disk.

    Attributes:
        base: The base's folder, as `save_pretrained` writes it.
        adapters: Folder of the adapters' folders.
        answers: Greedy answers to the prompts with the merged weights, by adapter, and those of `base`.
    """

    base: Path
    adapters: Path
    answers: dict[str, list[list[int]]]

    def merged(self, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Return transformers' model of the dtype with an adapter merged."""
        return s2ft.merge(with_loaded(type_of(self.base).from_pretrained(self.base, dtype=dtype), self.adapters / name))


SHAPE = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
ALL = dict(d_ratio=0.05, u_ratio=0.03, g_ratio=0.03, q_ratio=0.25, v_ratio=0.5, o_ratio=0.25)


def phi3() -> tuple[Phi3ForCausalLM, dict]:
    """A model with query, key and value in one weight of the checkpoint, and gate and up in another; ratios for it."""
    config = Phi3Config(**SHAPE, num_key_value_heads=2, vocab_size=512, max_position_embeddings=1024, pad_token_id=0)
    return Phi3ForCausalLM(config), ALL


def type_of(folder: Path):
    """The class of a saved model."""
    import transformers

    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def tiny_llama(seed: int = 1, **changes) -> LlamaForCausalLM:
    """A model with grouped keys and values, which is split evenly among two ranks."""
    shape = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8)
    fields = dict(num_key_value_heads=4, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=False)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=512, bos_token_id=1, eos_token_id=2, **{**shape, **fields, **changes})
    return LlamaForCausalLM(config).float().eval()


@torch.no_grad()
def answers(model: PreTrainedModel, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[int]]:
    """The greedy answers of a model to prompts of token ids."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        options = dict(do_sample=False, max_new_tokens=TOKENS, pad_token_id=0, eos_token_id=None)
        found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    return found


def save_adapters(
    model: PreTrainedModel,
    folder: Path,
    adapters: Mapping[str, dict] = ADAPTERS,
    scale: float = 0.02,
    prompts: Sequence[Sequence[int]] = PROMPTS,
) -> Served:
    """Save a model and adapters of it, with random deltas that change its answers.

    Args:
        model: The base. It is changed.
        folder: The folder to write to.
        adapters: The ratios of each adapter by its name.
        scale: Standard deviation of the deltas.
        prompts: Prompts of the answers.
    """
    model.save_pretrained(folder / "base")
    found = {"base": answers(model, prompts)}
    for seed, (name, ratios) in enumerate(adapters.items()):
        randomize(with_adapter(model, s2ft.S2FTConfig(**ratios, seed=seed), name=name), seed, scale)
        s2ft.save_adapter(model, folder / "adapters" / name)
        found[name] = answers(model, prompts)
        s2ft.detach(model)
    return Served(folder / "base", folder / "adapters", found)
