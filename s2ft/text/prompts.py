"""What the model reads: the tokenizer's own chat template, or a plain instruction prompt.

Training and generation take the prompt from the same function, so that a prompt in training is, token for
token, the prompt that is generated from.
"""

from collections.abc import Sequence

from s2ft.text.examples import Example

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
HEADINGS = {"user": "### Instruction:", "assistant": "### Response:"}

Conversation = Sequence[dict[str, str]]


def prompt_text(tokenizer, conversation: Conversation) -> str:
    """The conversation as text that ends where the assistant's answer begins."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
    return plain_prompt(conversation)


def plain_prompt(conversation: Conversation) -> str:
    """Headed blocks under a preamble, for tokenizers without a chat template."""
    system = [message["content"] for message in conversation if message["role"] == "system"]
    blocks = system or [PREAMBLE]
    blocks += [
        f"{HEADINGS.get(message['role'], '### ' + message['role'].capitalize() + ':')}\n{message['content']}"
        for message in conversation
        if message["role"] != "system"
    ]
    return "\n\n".join([*blocks, HEADINGS["assistant"] + "\n"])


def answer_text(tokenizer, conversation: Conversation, output: str) -> str:
    """The answer as the model has to write it, the end-of-turn mark included."""
    end = tokenizer.eos_token or ""
    if not tokenizer.chat_template:
        return output + end
    prompt = prompt_text(tokenizer, conversation)
    whole = tokenizer.apply_chat_template([*conversation, {"role": "assistant", "content": output}], tokenize=False)
    if not whole.startswith(prompt) or output.strip() not in whole[len(prompt) :]:
        return output + end  # a template that rewrites earlier turns or the answer itself
    rest = whole[len(prompt) :].rstrip()  # templates put a line break behind the end-of-turn mark
    return rest if not rest.endswith(output.strip()) else rest + end


def encode_prompt(tokenizer, conversation: Conversation) -> list[int]:
    """Token ids of the prompt, with the first token that the tokenizer wants before a text."""
    text = prompt_text(tokenizer, conversation)
    if tokenizer.chat_template:  # the template writes its own first token
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_example(tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """Prompt ids and answer ids. Their sequence is what is trained on; the loss falls on the answer only."""
    answer = answer_text(tokenizer, example.conversation, example.output)
    return encode_prompt(tokenizer, example.conversation), tokenizer(answer, add_special_tokens=False)["input_ids"]


def end_ids(tokenizer, generation_config=None) -> list[int]:
    """The tokens that end an answer: the end of text, of generation, and the chat template's end of turn."""
    ids = {tokenizer.eos_token_id}
    configured = getattr(generation_config, "eos_token_id", None)
    ids.update(configured if isinstance(configured, (list, tuple)) else [configured])
    probe = answer_text(tokenizer, [{"role": "user", "content": "a"}], "a")
    last = tokenizer(probe, add_special_tokens=False)["input_ids"][-1:]
    ids.update(token for token in last if token in tokenizer.all_special_ids)
    return sorted(ids - {None})


def pad_id(tokenizer) -> int:
    """A token to fill with; it is always masked, so the end of text will do where there is no padding token."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
