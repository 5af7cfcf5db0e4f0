"""Text in pieces equals the text at once, and no piece contains a stop string."""

import pytest
from hypothesis import given, settings, strategies as st
from support.inside import TextStream
from text.merging_tokenizers import TOKENIZERS
from tokenizers import decoders, models, pre_tokenizers
from train.tiny import SPECIAL, fast_tokenizer, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BYTES = [f"<0x{number:02X}>" for number in range(256)]
BYTE_FALLBACK = fast_tokenizer(  # as Llama 2's: no run of bytes is decoded before it is whole
    models.BPE({token: number for number, token in enumerate([*SPECIAL, *BYTES])}, [], byte_fallback=True),
    pre_tokenizers.Sequence([]),
    decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    None,
)


def pieces(tokens, stop=(), tokenizer=TOKENIZER):
    stream = TextStream(tokenizer, stop)
    found = []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped:
            return found, True
    return [*found, stream.flush()], stream.stopped


@settings(deadline=None)
@given(st.lists(st.integers(0, 258), max_size=80))
def test_pieces_of_any_tokens_add_up_to_the_text(tokens):
    expected = TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces(tokens)[0]) == expected


def test_a_text_that_continues_a_prompt_keeps_its_first_space():
    for tokenizer, text in ((TOKENIZERS["SentencePiece"](), "the cat sat"), (BYTE_FALLBACK, "日本日本")):
        ids = tokenizer(text)["input_ids"]
        for cut in range(3, len(ids), 3):  # not within a character
            stream = TextStream(tokenizer, before=ids[:cut])
            head = tokenizer.decode(ids[:cut], skip_special_tokens=True)
            assert head + "".join(map(stream.push, ids[cut:])) + stream.flush() == text


@settings(deadline=None)
@given(st.text(max_size=60))
def test_characters_of_several_tokens_are_not_split(text):
    for tokenizer in (TOKENIZER, BYTE_FALLBACK):
        found, _ = pieces(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer=tokenizer)
        assert "".join(found) == text and not any(
            "\N{REPLACEMENT CHARACTER}" in piece for piece in found if "\N{REPLACEMENT CHARACTER}" not in text
        )


@settings(deadline=None)
@given(st.text("ab€", max_size=30), st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    found, stopped = pieces(TOKENIZER(text, add_special_tokens=False)["input_ids"], stops)
    places = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(places)
    if places:  # the first stop string to be complete ends the text; another may begin earlier
        assert any(text.startswith("".join(found) + stop) for stop in stops)
    assert not any(stop in "".join(found) for stop in stops)


def test_text_that_may_become_a_stop_string_is_held_back():
    stream = TextStream(TOKENIZER, ["end."])
    seen = [stream.push(token) for token in TOKENIZER("the ender, end.", add_special_tokens=False)["input_ids"]]
    assert seen == ["t", "h", "", "e ", "", "", "", "end", "er", ",", " ", "", "", "", ""]
    assert stream.stopped and stream.flush() == ""


@pytest.mark.parametrize("stop", [[], ["zzz"]])
def test_held_text_is_returned_at_the_end(stop):
    found, stopped = pieces(TOKENIZER("a zz", add_special_tokens=False)["input_ids"], stop)
    assert "".join(found) == "a zz" and not stopped
