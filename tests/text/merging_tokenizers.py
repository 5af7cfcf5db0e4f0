"""Tokenizers that merge the end of a prompt with the beginning of an answer, made in milliseconds without a network."""

from tokenizers import decoders, models, pre_tokenizers, processors
from train.tiny import SPECIAL, fast_tokenizer, tiny_tokenizer
from transformers import PreTrainedTokenizerFast


def merging(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Like GPT-2's: line breaks and spaces merge with each other and with the word after them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "T"), ("T", "h")]
    tokens = [*SPECIAL, *letters, *(first + second for first, second in merges)]
    return fast_tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
        chat_template,
    )


def sentence_piece(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Like Llama 2's: a text begins with a space, spaces merge with words, and a text begins with a special token."""
    letters = [chr(number) for number in range(33, 127)] + ["\n", "▁"]
    merges = [("▁", "▁"), ("▁", "T"), ("T", "h"), ("▁T", "h"), (":", "▁")]
    tokens = [*SPECIAL, *letters, *(first + second for first, second in merges)]
    fast = fast_tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges, unk_token=SPECIAL[0]),
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        decoders.Metaspace(prepend_scheme="first"),
        chat_template,
    )
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return fast


TOKENIZERS = {"bytes": tiny_tokenizer, "merging": merging, "SentencePiece": sentence_piece}


def trained_text(tokenizer: PreTrainedTokenizerFast, labels: list[int]) -> str:
    """The text of the tokens that have a label."""
    return tokenizer.decode([label for label in labels if label >= 0])
