"""Convert rendered texts to token ids and labels.

The ids of a prompt are those that generation starts from. A tokenizer may merge the end of a prompt with the beginning
of the answer into one token. Such a text is encoded in two parts, so that training sees the prompt of generation.
"""

from collections.abc import Sequence

from s2ft.selection.batches import IGNORED
from s2ft.text.templates import Rendered, in_common

ANCHORS = ("\n", ".", "a")  # texts before a continuation, which the tokenizer must not merge with it


def encode_rendered(tokenizer, rendered: Sequence[Rendered]) -> list[tuple[list[int], list[int]]]:
    """Return the ids and labels of rendered texts. The tokenizer is called once for all of them.

    Args:
        tokenizer: The model's tokenizer.
        rendered: The texts.

    Returns:
        For each text its ids and its labels. A label is -100 where the token has no loss. A token that is partly in
        a trained span has a loss.
    """
    texts = [text for one in rendered for text in (one.text, *(one.text[:cut] for cut in one.prompts))]
    if not texts:
        return []
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
    ids = encoded["input_ids"]
    rows, at = [], 0
    for one in rendered:
        prompts = ids[at + 1 : at + 1 + len(one.prompts)]
        if any(ids[at][: len(prompt)] != prompt for prompt in prompts):
            rows.append(_encode_in_parts(tokenizer, one))
        else:
            offsets = encoded["offset_mapping"][at] if fast else None
            labels = _labels_by_prefixes(tokenizer, one, ids[at]) if offsets is None else _labels(one, ids[at], offsets)
            rows.append(_after_begin(one, ids[at], labels))
        at += 1 + len(one.prompts)
    return rows


def _after_begin(one: Rendered, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    return [*one.begin, *ids], [IGNORED] * len(one.begin) + labels


def _labels(one: Rendered, ids: list[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    labels, spans, at = [], one.spans, 0
    for token, (start, end) in zip(ids, offsets):
        while at < len(spans) and start >= spans[at][1]:
            at += 1
        labels.append(token if at < len(spans) and end > spans[at][0] else IGNORED)
    return labels


def _labels_by_prefixes(tokenizer, one: Rendered, ids: list[int], cuts: Sequence[int] = ()) -> list[int]:
    """Labels for texts in parts, and for tokenizers that do not say where their tokens stand in the text."""
    labels = [IGNORED] * len(ids)
    for span in one.spans:
        first, last = (in_common(_encode_parts(tokenizer, one.text[:position], cuts), ids) for position in span)
        labels[first:last] = ids[first:last]
    return labels


def _encode_in_parts(tokenizer, one: Rendered) -> tuple[list[int], list[int]]:
    """Encode a text so that it begins with the ids of each of its prompts."""
    cuts: list[int] = []
    for prompt in one.prompts:
        head, whole = (_encode_parts(tokenizer, text, cuts) for text in (one.text[:prompt], one.text))
        if whole[: len(head)] != head:
            cuts.append(prompt)
    whole = _encode_parts(tokenizer, one.text, cuts)
    return _after_begin(one, whole, _labels_by_prefixes(tokenizer, one, whole, cuts))


def _encode_parts(tokenizer, text: str, cuts: Sequence[int]) -> list[int]:
    inner = [cut for cut in cuts if cut < len(text)]
    parts = [text[start:end] for start, end in zip([0, *inner], [*inner, len(text)])]
    return _encode(tokenizer, parts[0]) + [token for part in parts[1:] for token in continuation_ids(tokenizer, part)]


def continuation_ids(tokenizer, text: str) -> list[int]:
    """Return the ids of a text that continues another one.

    A SentencePiece tokenizer would put a space before a text of its own.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
    """
    for anchor in ANCHORS:
        head, whole = _encode(tokenizer, anchor), _encode(tokenizer, anchor + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    return _encode(tokenizer, text)


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
