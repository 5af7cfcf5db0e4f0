"""Prompts: the chat template of the tokenizer, or a plain instruction prompt if it has none.

Training and generation build the prompt with the same function, so that both use the same tokens.
"""

from collections.abc import Sequence

from s2ft.text.examples import Example

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
HEADINGS = {"user": "### Instruction:", "assistant": "### Response:"}

Conversation = Sequence[dict[str, str]]


def prompt_text(tokenizer, conversation: Conversation) -> str:
    """Return the conversation as text that ends where the assistant's answer begins."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
    return plain_prompt(conversation)


def plain_prompt(conversation: Conversation) -> str:
    """Return the prompt for tokenizers without a chat template: blocks with headings under a preamble.

    A system message replaces the preamble.

    Example:
        >>> print(s2ft.text.prompts.plain_prompt([{"role": "user", "content": "2+3="}]))
        Below is an instruction that describes a task. ...
        <BLANKLINE>
        ### Instruction:
        2+3=
        <BLANKLINE>
        ### Response:
        <BLANKLINE>
    """
    system = [message["content"] for message in conversation if message["role"] == "system"]
    blocks = system or [PREAMBLE]
    blocks += [
        f"{HEADINGS.get(message['role'], '### ' + message['role'].capitalize() + ':')}\n{message['content']}"
        for message in conversation
        if message["role"] != "system"
    ]
    return "\n\n".join([*blocks, HEADINGS["assistant"] + "\n"])


def answer_text(tokenizer, conversation: Conversation, output: str) -> str:
    """Return the answer that the model should write, with the end-of-turn token."""
    end = tokenizer.eos_token or ""
    if not tokenizer.chat_template:
        return output + end
    prompt = prompt_text(tokenizer, conversation)
    text = tokenizer.apply_chat_template([*conversation, {"role": "assistant", "content": output}], tokenize=False)
    if not text.startswith(prompt) or output.strip() not in text[len(prompt) :]:
        return output + end  # the template changes earlier turns or the answer itself
    rest = text[len(prompt) :].rstrip()  # templates write a line break after the end-of-turn token
    return rest if not rest.endswith(output.strip()) else rest + end


def encode_prompt(tokenizer, conversation: Conversation) -> list[int]:
    """Return the token ids of the prompt, with the beginning-of-text token if the tokenizer uses one."""
    text = prompt_text(tokenizer, conversation)
    if tokenizer.chat_template:  # the template contains the first token
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_example(tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt and of the answer. Only the answer has a loss."""
    answer = answer_text(tokenizer, example.conversation, example.output)
    return encode_prompt(tokenizer, example.conversation), tokenizer(answer, add_special_tokens=False)["input_ids"]


def end_ids(tokenizer, generation_config=None) -> list[int]:
    """Return the tokens that end an answer.

    These are the tokenizer's end of text, the end tokens of `generation_config`, and the chat template's end of turn.
    """
    ids = {tokenizer.eos_token_id}
    configured = getattr(generation_config, "eos_token_id", None)
    ids.update(configured if isinstance(configured, (list, tuple)) else [configured])
    probe = answer_text(tokenizer, [{"role": "user", "content": "a"}], "a")
    last = tokenizer(probe, add_special_tokens=False)["input_ids"][-1:]
    ids.update(token for token in last if token in tokenizer.all_special_ids)
    return sorted(ids - {None})


def pad_id(tokenizer) -> int:
    """Return the id to pad with. Padding is always masked, so the end-of-text token serves if there is no other."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
