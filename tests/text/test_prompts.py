"""Generation uses the same prompt tokens as training."""

import pytest
from train.tiny import CHAT, tiny_tokenizer

from s2ft.text.examples import Example
from s2ft.text.prompts import encode_example, encode_prompt, end_ids, pad_id, prompt_text

TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 2+2?"},
)
THINKING = CHAT.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content']",
    "{{ '<|im_start|>' + m['role'] + '\n' + ('<think></think>' if loop.last and m['role'] == "
    "'assistant' else '') + m['content']",
)
TRIMMING = CHAT.replace("m['content']", "m['content'] | trim")
REWRITING = CHAT.replace("m['content'] +", "(m['content'] if loop.last else '') +")
ENDLESS = CHAT.replace("<|im_end|>", "")
TEMPLATES = {
    "chat": CHAT,
    "plain": None,
    "thinking": THINKING,
    "trimming": TRIMMING,
    "rewriting": REWRITING,
    "without end of turn": ENDLESS,
}


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    return tiny_tokenizer(TEMPLATES[request.param])


def test_training_prompt_is_the_generation_prompt(tokenizer):
    prompt, answer = encode_example(tokenizer, Example(TALK, " The answer is 4."))
    assert prompt == encode_prompt(tokenizer, TALK)
    assert tokenizer.decode(prompt) == prompt_text(tokenizer, TALK)


def test_answer_ends_with_one_end_of_turn_and_holds_the_output(tokenizer):
    _, answer = encode_example(tokenizer, Example(TALK, "The answer is 4."))
    assert answer[-1] == tokenizer.eos_token_id and answer.count(tokenizer.eos_token_id) == 1
    assert "The answer is 4." in tokenizer.decode(answer)


def test_chat_answer_continues_the_template_exactly():
    tokenizer = tiny_tokenizer()
    prompt, answer = encode_example(tokenizer, Example(TALK, "4"))
    whole = tokenizer.apply_chat_template([*TALK, {"role": "assistant", "content": "4"}], tokenize=False)
    assert tokenizer.decode(prompt + answer) + "\n" == whole


def test_thinking_block_of_the_template_is_kept():
    tokenizer = tiny_tokenizer(THINKING)
    assert tokenizer.decode(encode_example(tokenizer, Example(TALK, "4"))[1]) == "<think></think>4<|im_end|>"


def test_plain_prompt_without_chat_template():
    text = prompt_text(tiny_tokenizer(None), TALK[1:2])
    assert text.startswith("Below is an instruction") and text.endswith("### Instruction:\n1+1?\n\n### Response:\n")


def test_the_tokenizers_first_token_is_kept_and_an_end_token_is_dropped():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    ids = encode_prompt(tokenizer, TALK[1:2])
    assert ids[0] == 1 and ids[-1] != 2


def test_end_ids_are_those_of_tokenizer_settings_and_template():
    class Settings:
        eos_token_id = [0, 2]

    assert end_ids(tiny_tokenizer(), Settings) == [0, 2]
    assert end_ids(tiny_tokenizer(CHAT.replace("<|im_end|>", "<|endoftext|>"))) == [0, 2]


def test_padding_token_needs_no_change_of_the_tokenizer():
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token is None and pad_id(tokenizer) == tokenizer.eos_token_id
