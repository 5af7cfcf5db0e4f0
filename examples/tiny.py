"""Code that the examples share: the option --model, and a tiny model that is used without this option.

The tiny model is a LLaMA of two layers with random weights and a tokenizer whose tokens are bytes. It is made in
milliseconds, without a download. It knows no language, so the examples print losses rather than good answers.
"""

import argparse

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
CHAT = (
    "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the option --model. The example can add options of its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a checkpoint folder, a name on the hub, or a .gguf file; default: a tiny model"
    )
    return parser


def load(name: str | None = None):
    """Load a model and its tokenizer.

    Args:
        name: A checkpoint folder, a name on the hub or a .gguf file. None makes the tiny model.

    Returns:
        The model in evaluation mode, and the tokenizer.
    """
    if name is not None:
        from s2ft.text.models import load_model

        return load_model(name)
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, with a chat template."""
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SPECIAL[1], eos_token=SPECIAL[2],
                                   unk_token=SPECIAL[0], pad_token=SPECIAL[0])  # fmt: skip
    fast.chat_template = CHAT
    return fast


def train(model, batch: dict, steps: int = 10, lr: float = 1e-2) -> tuple[float, float]:
    """Train the parameters that require gradients on one batch, with AdamW.

    Returns:
        The loss before the first step and after the last one.
    """
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=lr)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        return losses[0], model(**batch).loss.item()
