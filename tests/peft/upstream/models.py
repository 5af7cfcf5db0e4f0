"""Tiny random models with a tokenizer under the names that PEFT's tests ask for."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

WORDS = 128
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
SHAPE = dict(vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8, **IDS)
GPT = dict(vocab_size=WORDS, n_embd=32, n_inner=48, n_layer=2, n_head=8, n_positions=64, **IDS)

MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": OPTConfig(
        vocab_size=WORDS,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
        **IDS,
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": GPT2Config(**GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": GPTJConfig(**GPT, rotary_dim=4),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "peft-internal-testing/tiny-dummy-qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Gemma3TextConfig(**SHAPE, num_key_value_heads=2, head_dim=4),
}
CLASSIFIERS = {"bert-base-uncased": BertConfig(**SHAPE, max_position_embeddings=64)}


def save_models(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )
    for table, auto in ((MODELS, AutoModelForCausalLM), (CLASSIFIERS, AutoModelForSequenceClassification)):
        for name, config in table.items():
            torch.manual_seed(0)
            auto.from_config(config).save_pretrained(folder / name)
            fast.save_pretrained(folder / name)
