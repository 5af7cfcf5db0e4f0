"""Prompts are made by the format that an adapter was trained with, here and in other programs."""

import pytest
from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from support.inside import (
    Prompter,
    PromptFormat,
    check_same_prompts,
    give_prompt,
    prompt_text,
    recorded_format,
    standalone_template,
)
from train.tiny import ASK, CHAT, OTHER, tiny_tokenizer

SYSTEMS = ["Be brief.", 'Say "yes"\n\tor \\n {{ no }} {% raw %} äöü 漢\N{SLIGHTLY SMILING FACE} \u2028 it\'s %}']


def info_of(template=OTHER, system=None, form="chat"):
    return {"prompt": PromptFormat(form, template, system).to_dict()}


def test_each_adapter_has_its_own_template_and_the_tokenizer_keeps_its():
    tokenizer = tiny_tokenizer()
    first, second, base = (Prompter(tokenizer, info) for info in (info_of(), info_of(CHAT, "Be brief."), None))
    assert tokenizer.decode(first.encode(ASK)).startswith("<|endoftext|>user")
    assert tokenizer.decode(second.encode(ASK)).startswith("<|im_start|>system\nBe brief.")
    assert tokenizer.decode(base.encode(ASK)).startswith("<|im_start|>user") and tokenizer.chat_template == CHAT
    assert first.encode_text("2+3?") == base.encode_text("2+3?") == tokenizer("2+3?")["input_ids"]


def test_a_tokenizer_with_several_templates_has_the_default_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHAT, "tool_use": OTHER}
    own = Prompter(tokenizer, info_of(CHAT))
    assert own.encode(ASK) == Prompter(tokenizer).encode(ASK) == Prompter(tiny_tokenizer()).encode(ASK)


@pytest.mark.parametrize(
    "template, info, is_chat",
    [
        (CHAT, None, True),
        (None, None, False),  # a base that knows no chats continues text
        (None, {}, True),  # an adapter of an earlier version was trained on chats
        (CHAT, info_of(None, form="text"), False),
        (None, info_of(), True),
    ],
)
def test_what_is_a_chat(template, info, is_chat):
    prompter = Prompter(tiny_tokenizer(template), info)
    assert prompter.is_chat == is_chat and prompter.encode(ASK) and prompter.encode_text("a")


@pytest.mark.parametrize("wrong", ["chat", ["chat"], {"form": "chit"}, {"form": "chat", "template": 3}], ids=str)
def test_a_damaged_record_is_named(wrong, caplog):
    assert recorded_format({"on_top_of": {"a": 1.0}}, str(wrong)) is None and "trained on top of a" in caplog.text
    assert recorded_format({}) is None and recorded_format(info_of()).template == OTHER
    with pytest.raises(ValueError, match="adapter 'a' records"):
        Prompter(tiny_tokenizer(), {"prompt": wrong}, name="adapter 'a'")


@pytest.mark.parametrize("template", [CHAT, OTHER, None], ids=["same", "other", "none"])
@pytest.mark.parametrize("system", [None, *SYSTEMS], ids=["none", "simple", "hostile"])
def test_other_programs_make_the_prompt_of_the_training(template, system, caplog):
    caplog.set_level("INFO")
    tokenizer = give_prompt(tiny_tokenizer(template), info_of(system=system), "adapter 'a'")
    chat = [*ASK, {"role": "assistant", "content": "5"}, {"role": "user", "content": "sure?"}]
    for messages in (ASK, chat, [{"role": "system", "content": "Other."}, *chat]):
        expected = [{"role": "system", "content": system}, *messages] if system else messages
        expected = messages if messages[0]["role"] == "system" else expected
        found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert found == prompt_text(tiny_tokenizer(OTHER), expected)
    assert "adapter 'a' was trained with" in caplog.text and ("default" in caplog.text) == bool(system)


@pytest.mark.parametrize(
    "marks", [("{% generation %}", "{% endgeneration %}"), ("{%- generation -%}", "{%-endgeneration%}")]
)
def test_other_programs_get_no_marks_of_training(marks):
    """Plain Jinja doesn't know the marks, and the prompt is the same without them."""
    template = CHAT.replace("{{ '<|im_start|>' + m", f"\n{marks[0]}\n{{{{ '<|im_start|>' + m").replace(
        "}}{% endfor", f"}}}} {marks[1]}\n{{% endfor"
    )
    alone = standalone_template(PromptFormat("chat", template))
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    chat = [*ASK, {"role": "assistant", "content": "5"}]
    expected = tiny_tokenizer().apply_chat_template(chat, chat_template=template, tokenize=False)
    assert plain.from_string(alone).render(messages=chat) == expected and "<|im_end|>" in expected
    with pytest.raises(TemplateSyntaxError):
        plain.from_string(template)


@pytest.mark.parametrize("begin", ["\n", "  ", "\n\n  ", "  {% if true %}x{% endif %}\n"], ids=repr)
def test_a_default_system_prompt_keeps_the_white_space_of_the_template(begin):
    template, messages = begin + CHAT, [{"role": "system", "content": "Be brief."}, *ASK]
    found, expected = (
        tiny_tokenizer().apply_chat_template(chat, chat_template=one, tokenize=False)
        for one, chat in ((standalone_template(PromptFormat("chat", template, "Be brief.")), ASK), (template, messages))
    )
    assert found == expected


def test_a_tokenizer_is_not_changed_by_an_adapter_of_plain_text_or_of_an_earlier_version():
    for info in ({}, info_of(None, form="text")):
        assert give_prompt(tiny_tokenizer(), info, "a").chat_template == CHAT
        assert give_prompt(tiny_tokenizer(None), info, "a").chat_template is None
    with pytest.raises(ValueError, match="another prompt"):
        check_same_prompts(tiny_tokenizer(), Prompter(tiny_tokenizer(), info_of()))
