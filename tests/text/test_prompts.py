"""Chat templates: generation continues the tokens that training begins with, and answers are found in the text."""

from pathlib import Path

import pytest
import trl
from support.inside import (
    PromptFormat,
    TemplateError,
    as_template_takes,
    encode_prompt,
    encode_rendered,
    end_ids,
    pad_id,
    prompt_format,
    prompt_text,
    render_chat,
    template_of,
)
from text.merging_tokenizers import TOKENIZERS, trained_text
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from train.tiny import CHAT, assistant, tiny_tokenizer
from transformers import GenerationConfig
from trl.chat_template_utils import get_training_chat_template

OF_TRL = Path(trl.__file__).parent / "chat_templates"
ASK = {"role": "user", "content": "1+1?"}
TALK = (
    {"role": "system", "content": "Be brief."},
    ASK,
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 2+2?"},
)
THINKING = CHAT.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content']",
    "{{ '<|im_start|>' + m['role'] + '\n' + ('<think></think>' if loop.last and m['role'] == 'assistant' else '')"
    " + m['content']",
)
TRIMMING = CHAT.replace("m['content']", "m['content'] | trim")
REWRITING = CHAT.replace("m['content'] +", "(m['content'] if loop.last or m['role'] != 'assistant' else '') +")
ENDLESS = CHAT.replace("<|im_end|>", "")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'assistant' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_LAST = MISTRAL.replace(
    "{% if m['role'] != 'assistant' %}{{ '[INST] ' +",
    "{% if m['role'] == 'system' %}{% elif m['role'] == 'user' %}{{ '[INST] ' + (messages[0]['content'] + '\n\n' "
    "if loop.last and messages[0]['role'] == 'system' else '') +",
)
COLON = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + (eos_token if m['role'] == 'assistant' else '\n\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
STABLE = {"chat": CHAT, "alpaca": None, "trimming": TRIMMING, "mistral": MISTRAL, "colon": COLON, "endless": ENDLESS}
TEMPLATES = {**STABLE, "thinking": THINKING, "rewriting": REWRITING, "system last": SYSTEM_LAST}


def encoded(tokenizer, *messages, loss_on="assistant"):
    """Ids and labels of a chat."""
    return encode_rendered(tokenizer, [render_chat(tokenizer, messages, template_of(tokenizer), loss_on=loss_on)])[0]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", ["The answer is 4.", " The answer is 4.", "\n\nThe answer"])
def test_training_begins_with_the_tokens_of_generation(name, kind, text):
    tokenizer = TOKENIZERS[kind](TEMPLATES[name])
    ids, labels = encoded(tokenizer, *TALK, assistant(text), loss_on="last")
    prompt = encode_prompt(tokenizer, TALK)
    assert ids[: len(prompt)] == prompt and set(labels[: len(prompt)]) == {-100}
    assert labels[len(prompt) :] == ids[len(prompt) :] and ids[-1] == tokenizer.eos_token_id
    assert text.strip() in trained_text(tokenizer, labels)
    written = render_chat(tokenizer, [*TALK, assistant(text)], template_of(tokenizer), loss_on="last").text
    assert tokenizer.decode(ids) == written


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", STABLE)
def test_each_turn_of_a_chat_begins_with_the_tokens_of_generation(name, kind):
    tokenizer = TOKENIZERS[kind](STABLE[name])
    chat = [ASK, assistant(" The first"), ASK, assistant("\n\nThe second"), ASK, assistant("The third")]
    ids, labels = encoded(tokenizer, *chat)
    for number in (1, 3, 5):
        prompt = encode_prompt(tokenizer, chat[:number])
        assert ids[: len(prompt)] == prompt and labels[len(prompt) - 1] == -100 and labels[len(prompt)] >= 0
    assert [text in trained_text(tokenizer, labels) for text in ("first", "second", "third", "1+1")] == [1, 1, 1, 0]


def test_answers_end_with_the_end_of_turn_and_nothing_else_is_trained():
    tokenizer = tiny_tokenizer()
    ids, labels = encoded(tokenizer, *TALK, assistant("4"))
    assert trained_text(tokenizer, labels) == "2<|im_end|>4<|im_end|>"
    whole = tokenizer.apply_chat_template([*TALK, assistant("4")], tokenize=False)
    assert tokenizer.decode(ids) + "\n" == whole
    assert trained_text(tokenizer, encoded(tokenizer, *TALK, assistant("4"), loss_on="all")[1]) == whole[:-1]


def test_earlier_answers_that_a_template_changes_or_drops_are_refused():
    tokenizer = tiny_tokenizer(THINKING)
    assert trained_text(tokenizer, encoded(tokenizer, *TALK, assistant("4"), loss_on="last")[1]).startswith(
        "<think></th"
    )
    with pytest.raises(TemplateError, match='answer "4" differently .*loss_on="last"'):
        encoded(tokenizer, ASK, assistant("4"), ASK, assistant("5"))
    with pytest.raises(TemplateError, match='leaves out .* "the first one"'):
        encoded(tiny_tokenizer(REWRITING), ASK, assistant("the first one"), ASK, assistant("5"))


def test_tool_calls_are_trained_and_a_template_that_drops_them_is_refused():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = ASK, {"role": "assistant", "content": "", "tool_calls": [call]}
    qwen = tiny_tokenizer((OF_TRL / "qwen2_5.jinja").read_text())
    assert '"arguments": {"a": 2}' in trained_text(qwen, encoded(qwen, *messages)[1])
    plain = tiny_tokenizer(
        "{% for m in messages %}{{ 'add: 2' + eos_token if m.get('tool_calls') else m['content'] }}{% endfor %}"
    )
    assert trained_text(plain, encoded(plain, *messages)[1]).count(plain.eos_token) == 1
    with pytest.raises(TemplateError, match="leaves out .* calls a tool"):
        encoded(tiny_tokenizer(), *messages)


@pytest.mark.parametrize("role", ["system", "developer", "User"])
def test_a_template_that_drops_a_message_or_the_tools_is_refused(role):
    tokenizer = tiny_tokenizer(
        CHAT.replace("{% for m in messages %}", "{% for m in messages if m['role'] in ('user', 'assistant') %}")
    )
    with pytest.raises(TemplateError, match=f"leaves out the text of the role '{role}'"):
        encoded(tokenizer, {"role": role, "content": "Be brief."}, ASK, assistant("2"))
    with pytest.raises(TemplateError, match="leaves out the tools"):
        render_chat(tokenizer, (ASK, assistant("2")), template_of(tokenizer), tools=[{"function": {"name": "add"}}])


def test_a_template_may_rewrite_a_text_and_tools_may_be_odd():
    rewriting = tiny_tokenizer(CHAT.replace("m['content']", "m['content'].replace('/think', '')"))
    messages = [{"role": "user", "content": "see /thinking"}, assistant("2")] * 9  # more would take years, one by one
    assert "see ing" in render_chat(rewriting, messages, template_of(rewriting)).text
    assert render_chat(rewriting, messages, template_of(rewriting), tools=[{"function": None}, {"name": 5}]).text


def test_thoughts_are_trained_once_and_a_template_that_drops_them_is_refused():
    distilled = tiny_tokenizer((OF_TRL / "deepseek_r1_distill.jinja").read_text())
    text = render_chat(distilled, (ASK, assistant("<think>\nadd\n</think>\n\n2")), template_of(distilled)).text
    assert text.endswith("<think>\nadd\n</think>\n\n2<|im_end|>") and text.count("<think>") == 1
    for thoughts in ("reasoning_content", "reasoning", "thinking"):
        with pytest.raises(TemplateError, match="leaves out the thoughts"):
            encoded(tiny_tokenizer(), ASK, {**assistant("2"), thoughts: "add"})


def test_chat_that_begins_with_the_assistant():
    tokenizer = tiny_tokenizer()
    _, labels = encoded(tokenizer, assistant("Hello!"), ASK, assistant("2"))
    assert trained_text(tokenizer, labels) == "Hello!<|im_end|>2<|im_end|>"


@pytest.mark.parametrize("name", sorted(p.stem for p in OF_TRL.glob("*.jinja") if not p.stem.endswith("_training")))
def test_templates_of_trl_have_its_assistant_masks_and_the_prompts_of_generation(name):
    tokenizer = tiny_tokenizer((OF_TRL / f"{name}.jinja").read_text())
    prompt_format(tokenizer).apply_to(tokenizer)
    chat = [ASK, assistant("It is 2."), {"role": "user", "content": "And 7-2?"}, assistant("Five,\n\nof course.")]
    rendered = render_chat(tokenizer, chat, tokenizer.chat_template)
    ((ids, labels),) = encode_rendered(tokenizer, [rendered])
    assert trained_text(tokenizer, labels).count("It is 2.") == 1 and "1+1" not in trained_text(tokenizer, labels)
    if not rendered.other_prompt:
        for number in (1, 3):
            prompt = encode_prompt(tokenizer, chat[:number])
            assert ids[: len(prompt)] == prompt
    try:
        marked = get_training_chat_template(tokenizer) or tokenizer.chat_template
    except Exception:
        return  # TRL does not know the template, or knows it for images only
    chat = as_template_takes(tokenizer, chat, tokenizer.chat_template)
    expected = tokenizer.apply_chat_template(
        chat, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == expected["input_ids"]
    assert [label >= 0 for label in labels] == [bool(bit) for bit in expected["assistant_masks"]]


@pytest.mark.parametrize("answer", ["2", "", " \n"])
def test_an_answer_has_one_end_also_if_it_is_blank(answer):
    tokenizer = tiny_tokenizer()
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[/{{ m.role }}]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = ({"role": "user", "content": "1+1"}, {"role": "assistant", "content": answer})
    rendered = render_chat(tokenizer, messages, template)
    assert rendered.text == f"[user]1+1[/user][assistant]{answer.strip()}[/assistant]"
    start, end = rendered.spans[-1]
    assert rendered.text[start:end] == f"{answer.strip()}[/assistant]"


def test_template_that_changes_earlier_answers_is_replaced_by_that_of_trl(caplog):
    caplog.set_level("INFO")
    qwen = (OF_TRL / "qwen3.jinja").read_text()
    assert prompt_format(tiny_tokenizer(qwen)).template == (OF_TRL / "qwen3_training.jinja").read_text()
    assert "TRL's version for training" in caplog.text
    llama = (OF_TRL / "llama3.jinja").read_text()
    assert prompt_format(tiny_tokenizer(llama)).template == llama


def test_alpaca_is_the_prompt_of_tokenizers_without_a_template():
    text = prompt_text(tiny_tokenizer(None), TALK[1:2])
    assert text.startswith("Below is an instruction") and text.endswith("### Instruction:\n1+1?\n\n### Response:\n")
    text = prompt_text(tiny_tokenizer(None), TALK)
    assert text.startswith("Be brief.\n\n### Instruction:\n1+1?\n\n### Response:\n2<|im_end|>\n\n### Instruction:\nand")


def test_the_tokenizers_first_token_is_kept_and_an_end_token_is_dropped():
    tokenizer = tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    for prompt in (TALK[1:2], "a text", "<|im_start|>a text"):
        ids = encode_prompt(tokenizer, prompt)
        assert ids[:2] == [1, tokenizer.encode(prompt_text(tokenizer, prompt).removeprefix("<|im_start|>"))[1]]
        assert ids[-1] != 2


@pytest.mark.parametrize("template", [None, CHAT, ENDLESS])
def test_tokenizer_without_end_and_padding_tokens(template):
    tokenizer = tiny_tokenizer(template)
    tokenizer.eos_token = None
    _, labels = encoded(tokenizer, *TALK, assistant("4"))
    assert "4" in trained_text(tokenizer, labels) and "None" not in trained_text(tokenizer, labels)
    assert pad_id(tokenizer) == 0


def test_end_ids_are_those_of_tokenizer_settings_and_template():
    assert end_ids(tiny_tokenizer(), GenerationConfig(eos_token_id=[0, 2])) == [0, 2]
    assert end_ids(tiny_tokenizer(CHAT.replace("<|im_end|>", "<|endoftext|>"))) == [0, 2]
    assert end_ids(tiny_tokenizer(None)) == [2]
    unnamed = tiny_tokenizer(CHAT.replace("<|im_end|>", "<|eot_id|>"))
    unnamed.add_tokens([AddedToken("<|eot_id|>", special=True)])
    assert end_ids(unnamed) == [2, unnamed.convert_tokens_to_ids("<|eot_id|>")]
    assert tiny_tokenizer().pad_token is None and pad_id(tiny_tokenizer()) == 2  # the tokenizer needs no change


def test_template_is_a_file_a_text_or_a_name(tmp_path):
    tokenizer = tiny_tokenizer()
    (tmp_path / "chat_template.jinja").write_text(TRIMMING, encoding="utf-8-sig")  # as Notepad saves it
    for given in (tmp_path / "chat_template.jinja", TRIMMING):
        assert prompt_format(tokenizer, chat_template=given) == PromptFormat("chat", TRIMMING)
    assert "### Response" in prompt_format(tokenizer, chat_template="alpaca").template
    assert prompt_format(tokenizer).template == tokenizer.chat_template == CHAT


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chat_template": "nowhere.jinja"}, "nowhere.jinja is no file"),
        ({"chat_template": "{% for m in messages %}"}, "line 1: Unexpected end"),
        ({"chat_template": "{{ messages[0]['content'][:3] }}"}, "leaves out .* role 'user'"),
        ({"chat_template": CHAT.replace("m['content']", "(m['content'] if m['role'] == 'user' else '')")},
         "leaves out the answer"),
        ({"chat_template": CHAT.replace("in messages %}", "in messages if m['role'] != 'system' %}", 1), "system": "Be brief."},
         "takes no system prompt: .* role 'system'"),
        ({"chat_template": str(OF_TRL / "gemma.jinja"), "system": "Be brief."}, "no system prompt: .*not supported"),
        ({"form": "text", "system": "Be brief."}, "system"),
        ({"form": "prose"}, "form .*chat, text.*prose"),
    ],
)  # fmt: skip
def test_format_that_can_not_work_is_refused(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prompt_format(tiny_tokenizer(), **options)


def test_format_is_recorded_and_read_again():
    prompt = prompt_format(tiny_tokenizer(), system="Be brief.")
    assert PromptFormat.from_dict({**prompt.to_dict(), "of a later version": 1}) == prompt
    other = prompt.apply_to(tiny_tokenizer(None))
    assert prompt_text(other, prompt.conversation([ASK])).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert prompt.conversation(TALK) == list(TALK)
    with pytest.raises(ValueError, match="template .*list"):
        PromptFormat.from_dict({"template": []})
