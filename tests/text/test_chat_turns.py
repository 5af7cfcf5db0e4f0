"""A chat answers as the model does that runs the whole prompt, whatever it keeps of earlier turns."""

import pytest
from serve.fleet import alone, text_of
from support.inside import Chat, Prompter, Sampler
from train.tiny import UNTIED, tiny_model, tiny_tokenizer


def chat_of(new=12, system=None, info=None, seed=None, temperature=0.0, **changes):
    model, prompter = tiny_model(**{**UNTIED, **changes}), Prompter(tiny_tokenizer(), info)
    return Chat(model, prompter, lambda seed: Sampler(temperature, seed=seed), new, system, seed)


def ask(chat, text):
    return "".join(chat.answer(text))


def text_from_scratch(messages, new):
    """The answer of a model that runs the prompt as a whole."""
    ids = tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return text_of(alone(None, ids, new, **UNTIED))


def test_every_turn_is_answered_as_from_scratch():
    chat = chat_of()
    for number, text in enumerate(("hi", "what is 2+3?", "and 4+4?", "thanks")):
        expected = text_from_scratch([*chat.messages, {"role": "user", "content": text}], 12)
        assert ask(chat, text) == expected and len(chat.messages) == 2 * number + 2
    chat.undo()
    expected = text_from_scratch([*chat.messages, {"role": "user", "content": "else?"}], 12)
    assert ask(chat, "else?") == expected


def test_a_later_turn_runs_only_what_is_new():
    chat, ran = chat_of(), []
    ask(chat, "a question that is long")
    chat.model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: ran.append(inputs[0].numel()))
    ask(chat, "next")
    assert ran[0] < 60 and set(ran[1:]) <= {1}  # the template's words and the message, not the first turn


def test_the_oldest_turns_are_dropped_when_the_context_is_full():
    chat, dropped = chat_of(max_position_embeddings=192), []
    for text in map("question {}".format, range(8)):
        ask(chat, text)
        dropped.append(chat.dropped)
        kept = [*chat.messages[dropped[-1] : -2], {"role": "user", "content": text}]
        assert chat.messages[-1]["content"] == text_from_scratch(kept, 12)
    assert dropped[0] == 0 < dropped[-1] and dropped == sorted(dropped) and len(chat.messages) == 16


def test_a_message_that_never_fits_is_refused_and_not_kept():
    chat = chat_of(max_position_embeddings=64)
    with pytest.raises(ValueError, match=r"context is 64 tokens.*1\d\d"):
        ask(chat, "x" * 99)
    assert chat.messages == []


def test_an_answer_that_ends_early_is_kept_and_the_chat_goes_on():
    chat = chat_of()
    answer = chat.answer("hi")
    written = "".join(next(answer) for _ in range(6))
    answer.close()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[-1]["content"] == written and not chat.cut
    assert ask(chat, "on") == text_from_scratch([*chat.messages, {"role": "user", "content": "on"}], 12)


def test_a_seed_gives_the_same_conversation_and_each_answer_its_own_draw():
    first, second, other = (chat_of(temperature=1.0, seed=seed) for seed in (1, 1, 2))
    for chat in (first, second, other):
        ask(chat, "hi")
    assert first.messages == second.messages != other.messages
    assert first.undo() and ask(first, "hi") != second.messages[-1]["content"]
