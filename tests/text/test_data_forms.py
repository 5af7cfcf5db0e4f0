"""Forms of rows: each form that people have is read or refused with the field's name."""

import json

import pytest
from support.inside import BadRow, normalised

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
    "prompt and completion with system": (
        {"prompt": "2+3=", "completion": "5", "system": "Be brief."},
        {"messages": [SYSTEM, *CHAT]},
    ),
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
    "system": ({"system": "a", "messages": CHAT}, {"messages": [{"role": "system", "content": "a"}, *CHAT]}),
    "a question of weight 0": ({"messages": [{**USER, "weight": 0}, {**ASSISTANT, "weight": 1}]}, {"messages": CHAT}),
    "no answer": ({"instruction": "2+3=", "output": "5", "answer": ""}, {"messages": CHAT}),
    "truth": ({"instruction": "2+3=", "output": "5", "answer": True}, {"messages": CHAT, "answer": "true"}),
}  # fmt: skip
IMAGE = {"role": "user", "content": [{"type": "image", "url": "a"}]}
REFUSED = (  # a row, and words of the message
    ({"question_text": "a", "reply": "b"}, "needs messages.*it has 'question_text', 'reply'.*--field"),
    ([1], "an object"),
    ({"instruction": "a"}, "'output' is missing"),
    ({"instruction": "a", "output": None}, "'output' is null"),
    ({"output": "a"}, "'instruction' is missing"),
    ({"prompt": "a"}, "'completion' is missing"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'completion' is missing"),
    ({"instruction": "a", "output": " "}, "'output' is empty"),
    ({"instruction": "a", "output": float("nan")}, "'output' .*nan"),
    ({"instruction": "a", "input": ["b"], "output": "c"}, "'input' .*list"),
    ({"text": ""}, "'text' is empty"),
    ({"prompt": "a", "completion": [ASSISTANT]}, "both be text or both be lists"),
    ({"prompt": [], "completion": [ASSISTANT]}, "'prompt' has no messages"),
    ({"prompt": CHAT, "completion": [USER]}, "'completion' has no message of the assistant"),
    ({"instruction": "a", "output": "b", "answer": ["b", "c"]}, "'answer' .*list"),
    ({"instruction": "a", "output": "b", "tools": "add"}, "'tools' .*JSON"),
    ({"messages": "hi"}, "'messages' .*str"),
    ({"messages": "[{"}, "'messages' .*JSON"),
    ({"messages": [USER]}, "'messages' has no message of the assistant"),
    ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, r"messages\[1\] has weight 0"),
    ({"messages": [USER, USER]}, "'messages' has no message of the assistant"),
    ({"messages": [{"role": "human", "content": "a"}, {"role": "bot", "content": "b"}]}, "its roles are bot, user"),
    ({"messages": [SYSTEM, ASSISTANT]}, "before the assistant's"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 1 is empty"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\].content .*null"),
    ({"messages": [{"content": "a"}, ASSISTANT]}, r"messages\[0\] .*'role'"),
    ({"messages": [IMAGE, ASSISTANT]}, r"messages\[0\].content\[0\] .*'image'"),
    ({"messages": [USER, ASSISTANT], "image": "a.jpg"}, "'image': this command trains on text only"),
    ({"conversations": [{"from": "me", "value": "a"}, {"from": "gpt", "value": "b"}]}, "role 'me'"),
    (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}]},
        "arguments of add .*JSON",
    ),
    ({"instruction": "\ud800", "output": "x"}, "'instruction' .*Unicode: character 1"),
    ({"messages": [{"role": "user", "content": "\ud800"}, ASSISTANT]}, r"messages\[0\].content .*Unicode"),
)


@pytest.mark.parametrize("name", READ)
def test_form_is_read(name):
    row, expected = READ[name]
    assert normalised(row, {}) == expected


@pytest.mark.parametrize("row, message", REFUSED, ids=[message for _, message in REFUSED])
def test_bad_row_names_the_field(row, message):
    with pytest.raises(BadRow, match=message):
        normalised(row, {})


def test_other_names_are_mapped():
    row = {"q": "2+3=", "reply": "5", "output": "of another form", "messages": CHAT[:1]}
    assert normalised(row, {"q": "instruction", "reply": "output"}) == {"messages": CHAT}
    with pytest.raises(BadRow, match="has no field 'q'.*'question'"):
        normalised({"question": "a"}, {"q": "instruction"})


def test_output_may_be_empty_if_only_the_answer_is_scored():
    assert normalised({"instruction": "2+3=", "output": "", "answer": "5"}, {}, scored=True)["answer"] == "5"
