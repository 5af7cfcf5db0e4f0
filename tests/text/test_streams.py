"""Text that comes in pieces is the text that comes at once, and stop strings are never seen."""

import pytest
from hypothesis import given, settings, strategies as st
from train.tiny import tiny_tokenizer

from s2ft.text.streams import TextStream

TOKENIZER = tiny_tokenizer()


def pieces(tokens, stop=()):
    stream = TextStream(TOKENIZER, stop)
    found = []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped:
            return found, True
    return [*found, stream.flush()], stream.stopped


def whole(tokens):
    return TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(deadline=None)
@given(st.lists(st.integers(0, 258), max_size=80))
def test_pieces_of_any_tokens_make_the_whole(tokens):
    assert "".join(pieces(tokens)[0]) == whole(tokens)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_characters_of_several_tokens_come_whole(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    found, _ = pieces(ids)
    assert "".join(found) == text and not any(
        "\N{REPLACEMENT CHARACTER}" in piece for piece in found if "\N{REPLACEMENT CHARACTER}" not in text
    )


@settings(deadline=None)
@given(st.text("ab€", max_size=30), st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    found, stopped = pieces(TOKENIZER(text, add_special_tokens=False)["input_ids"], stops)
    places = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(places)
    if places:  # the one that is complete first ends the text; another may begin earlier
        assert any(text.startswith("".join(found) + stop) for stop in stops)
    assert not any(stop in "".join(found) for stop in stops)


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(TOKENIZER, ["end."])
    seen = [stream.push(token) for token in TOKENIZER("the ender, end.", add_special_tokens=False)["input_ids"]]
    assert seen == ["t", "h", "", "e ", "", "", "", "end", "er", ",", " ", "", "", "", ""]
    assert stream.stopped and stream.flush() == ""


@pytest.mark.parametrize("stop", [[], ["zzz"]])
def test_held_text_comes_in_the_end(stop):
    found, stopped = pieces(TOKENIZER("a zz", add_special_tokens=False)["input_ids"], stop)
    assert "".join(found) == "a zz" and not stopped
