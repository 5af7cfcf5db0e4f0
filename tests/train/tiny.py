"""A random Llama of a few thousand weights and a byte-level tokenizer, made in milliseconds without a network."""

import json

import torch
from support.states import randomize, with_adapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import s2ft

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# CHAT with the marks of the answers, which TRL's loss on answers needs.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OTHER = CHAT.replace("<|im_start|>", "<|endoftext|>")  # another template
ASK = [{"role": "user", "content": "2+3?"}]
UNTIED = dict(tie_word_embeddings=False)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def fast_tokenizer(model, pre_tokenizer, decoder, chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, chat_template=chat_template)


def tiny_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={token: number for number, token in enumerate(SPECIAL + letters)}, merges=[])
    return fast_tokenizer(model, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), chat_template)


def tiny_config(**changes) -> LlamaConfig:
    return LlamaConfig(
        **{
            **dict(
                vocab_size=len(SPECIAL) + 256,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=None,
                tie_word_embeddings=True,
            ),
            **changes,
        }
    )


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**changes)).to(dtype).eval()


def save_tiny(folder, **changes):
    """Write a checkpoint folder like one from the hub."""
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def base_of(folder, **changes):
    """Write a checkpoint folder whose tokenizer a GGUF file can hold: with merges, and as many tokens as the model."""
    save_tiny(folder, **changes)
    tokenizer = tiny_tokenizer()
    # a byte that no text contains; the merged pair gets its token id
    never = max(token for token in tokenizer.get_vocab() if len(token) == 1)
    vocabulary = {("th" if token == never else token): number for token, number in tokenizer.get_vocab().items()}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[("t", "h")])
    tokenizer.save_pretrained(folder)
    return folder


def save_random_adapter(folder, model, std: float = 0.1, name: str = "default", info: dict | None = None, **config):
    """Attach to the model, give the slices random values and save the adapter. Returns the model."""
    randomize(with_adapter(model, s2ft.S2FTConfig(**config), name=name), config.get("seed", 1), std)
    s2ft.save_adapter(model, folder, info=info)
    return model


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def sums(count: int) -> list[dict]:
    return [
        {"instruction": f"{a}+{a % 3}=", "output": f"The answer is {a + a % 3}.", "answer": str(a + a % 3)}
        for a in range(count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
