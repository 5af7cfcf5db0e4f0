"""Forms of rows: each form that people have is read or refused with the field's name."""

import json

import pytest

from s2ft.text.data.forms import BadRow, normalised

USER, ASSISTANT = {"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}
CHAT = [USER, ASSISTANT]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
READ = {
    "Alpaca": ({"instruction": "2+3=", "input": "", "output": "5"}, {"messages": CHAT}),
    "Alpaca with null input": ({"instruction": "2+3=", "input": None, "output": "5"}, {"messages": CHAT}),
    "Alpaca with input": (
        {"instruction": "Add.", "input": "2, 3", "output": "5"},
        {"messages": [{"role": "user", "content": "Add.\n\n2, 3"}, ASSISTANT]},
    ),
    "Alpaca with system": (
        {"instruction": "2+3=", "output": "5", "system": "Be brief."},
        {"messages": [SYSTEM, *CHAT]},
    ),
    "numeric output": ({"instruction": "2+3=", "output": 5}, {"messages": CHAT}),
    "prompt and completion": ({"prompt": "2+3=", "completion": "5"}, {"prompt": "2+3=", "completion": "5"}),
    "TRL's conversational form": ({"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}),
    "question and answer": ({"question": "2+3=", "answer": 5}, {"messages": CHAT}),
    "prompt and response": ({"prompt": "2+3=", "response": "5"}, {"messages": CHAT}),
    "text": ({"text": "2+3=5"}, {"text": "2+3=5"}),
    "messages": ({"messages": [SYSTEM, *CHAT, *CHAT]}, {"messages": [SYSTEM, *CHAT, *CHAT]}),
    "messages as JSON text": ({"messages": json.dumps(CHAT)}, {"messages": CHAT}),
    "chat that ends with the user": ({"messages": [*CHAT, {"role": "user", "content": "thanks"}]}, {"messages": CHAT}),
    "null fields of other forms": ({"messages": CHAT, "text": None, "prompt": None}, {"messages": CHAT}),
    "content as parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+"}, "3="]}, ASSISTANT]},
        {"messages": CHAT},
    ),
    "tool calls with content null": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
    ),
    "tool calls with arguments as text": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]}]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "2+3="}, {"from": "gpt", "value": "5"}]},
        {"messages": CHAT},
    ),
    "ShareGPT with roles": ({"conversations": CHAT}, {"messages": CHAT}),
    "ShareGPT with a system prompt and tools": (
        {
            "system": "Be brief.",
            "tools": '[{"name": "add"}]',
            "conversations": [
                {"from": "human", "value": "2+3="},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 3}}'},
                {"from": "observation", "value": "5"},
                {"from": "gpt", "value": "5"},
            ],
        },
        {
            "messages": [
                SYSTEM,
                USER,
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "5"},
                ASSISTANT,
            ],
            "tools": [{"name": "add"}],
        },
    ),
    "short answer": ({"instruction": "2+3=", "output": "5", "answer": ["5"]}, {"messages": CHAT, "answer": "5"}),
    "truth": ({"instruction": "2+3=", "output": "5", "answer": True}, {"messages": CHAT, "answer": "true"}),
}  # fmt: skip
REFUSED = {
    "nothing known": ({"question_text": "a", "reply": "b"}, "needs messages.*it has 'question_text', 'reply'.*--field"),
    "not an object": ([1], "expected an object"),
    "no output": ({"instruction": "a"}, "field 'output' is missing"),
    "output null": ({"instruction": "a", "output": None}, "field 'output' is null"),
    "no instruction": ({"output": "a"}, "field 'instruction' is missing"),
    "no completion": ({"prompt": "a"}, "field 'completion' is missing .with 'prompt' a row needs 'completion' or 'resp"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "field 'completion' is missing"),
    "empty output": ({"instruction": "a", "output": " "}, "field 'output' is empty"),
    "output is no number": ({"instruction": "a", "output": float("nan")}, "field 'output' must be text, got the number nan"),
    "input is a list": ({"instruction": "a", "input": ["b"], "output": "c"}, "field 'input' must be text, got list"),
    "empty text": ({"text": ""}, "field 'text' is empty"),
    "text and messages mixed": ({"prompt": "a", "completion": [ASSISTANT]}, "must both be text or both be lists"),
    "completion without an answer": ({"prompt": CHAT, "completion": [USER]}, "'completion' has no message of the assist"),
    "answer is a list": ({"instruction": "a", "output": "b", "answer": ["b", "c"]}, "field 'answer' must be text or a n"),
    "messages are text": ({"messages": "hi"}, "'messages' must be a list of messages, got str"),
    "one message": ({"messages": [USER]}, "at least two messages"),
    "no answer": ({"messages": [USER, USER]}, "'messages' has no message of the assistant"),
    "no question": ({"messages": [SYSTEM, ASSISTANT]}, "no message before the assistant's"),
    "empty answer": ({"messages": [USER, {"role": "assistant", "content": " "}]}, "the assistant's message 1 is empty"),
    "content null": ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\].content must be text, got null"),
    "no role": ({"messages": [{"content": "a"}, ASSISTANT]}, r"messages\[0\] needs 'role' and 'content'"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}, ASSISTANT]},
        r"messages\[0\].content\[0\] must be a part of type 'text', got 'image'",
    ),
    "unknown ShareGPT role": ({"conversations": [{"from": "me", "value": "a"}, {"from": "gpt", "value": "b"}]}, "role 'me'"),
    "arguments are no JSON": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}]},
        "arguments of add can't be read as JSON",
    ),
    "half a surrogate pair": ({"instruction": "\ud800", "output": "x"}, "field 'instruction' is not valid Unicode: character 1"),
    "half a surrogate pair in a message": (
        {"messages": [{"role": "user", "content": "\ud800"}, ASSISTANT]},
        r"messages\[0\].content is not valid Unicode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_form_is_read(name):
    row, expected = READ[name]
    assert normalised(row, {}) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_bad_row_names_the_field(name):
    row, message = REFUSED[name]
    with pytest.raises(BadRow, match=message):
        normalised(row, {})


def test_other_names_are_mapped():
    row = {"q": "2+3=", "reply": "5", "output": "of another form", "messages": CHAT[:1]}
    assert normalised(row, {"q": "instruction", "reply": "output"}) == {"messages": CHAT}


def test_a_mapped_name_that_no_row_has_is_named():
    with pytest.raises(BadRow, match="has no field 'q', which field names; it has 'question'"):
        normalised({"question": "a"}, {"q": "instruction"})


def test_output_may_be_empty_if_only_the_answer_is_scored():
    row = {"instruction": "2+3=", "output": "", "answer": "5"}
    assert normalised(row, {}, scored=True)["answer"] == "5"
    with pytest.raises(BadRow, match="field 'output' is empty"):
        normalised(row, {})
