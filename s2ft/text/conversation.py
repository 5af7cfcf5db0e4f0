"""A chat with a model: several turns, answered token by token."""

import random
from collections.abc import Callable, Generator, Iterator, Sequence

from s2ft.text.adapter_prompts import Prompter
from s2ft.text.encoding import context_length
from s2ft.text.generation import AnswerRow, RunningBatch, TextStream

SHARE = 4  # a prompt leaves at least one part in so many of the context to the answer


def pieces(
    batch: RunningBatch, row: AnswerRow, tokenizer, ends: frozenset[int], limit: int, before: Sequence[int] = ()
) -> Iterator[str]:
    """Generate the rest of an answer and yield its text, as soon as it is complete.

    Args:
        batch: The batch, with this row alone and its first token.
        row: The row.
        tokenizer: The model's tokenizer.
        ends: Tokens that end the answer.
        limit: Longest answer in tokens.
        before: The prompt's tokens, if the answer continues its text.

    Raises:
        ValueError: The model's output is not a finite number.
    """
    text = TextStream(tokenizer, before=before)
    while not row.failed and row.tokens[-1] not in ends:
        yield text.push(row.tokens[-1])
        if len(row.tokens) == limit:
            break
        batch.step()
    if row.failed:
        raise ValueError(row.failed)
    yield text.flush()


class Chat:
    """A conversation with a model. Each answer is appended to the messages.

    The keys and values of earlier turns are used again, as long as the model is the same.

    Args:
        model: A causal language model, in evaluation mode, on its device.
        prompter: Makes the prompts; see :meth:`use`.
        new_sampler: Makes the :class:`~s2ft.text.generation.Sampler` of an answer from a seed.
        max_new_tokens: Longest answer in tokens.
        system: System prompt. None is the one that the adapter was trained with.
        seed: Seed of all answers. None draws one.

    Attributes:
        messages: The messages so far, without the system prompt.
        tokens: Number of tokens of the last answer.
        dropped: Number of messages at the beginning that the model did not see then, because the context was full.
        cut: Whether the last answer reached the longest length.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.adapter_prompts import Prompter
        >>> from s2ft.text.conversation import Chat
        >>> from s2ft.text.generation import Sampler
        >>> tokenizer = ByT5Tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
        >>> chat = Chat(model.eval(), Prompter(tokenizer), lambda seed: Sampler(), max_new_tokens=4)
        >>> answer = "".join(chat.answer("2+3="))
        >>> [message["role"] for message in chat.messages]
        ['user', 'assistant']
    """

    def __init__(
        self,
        model,
        prompter: Prompter,
        new_sampler: Callable,
        max_new_tokens: int,
        system: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.model, self.prompter, self.new_sampler = model, prompter, new_sampler
        self.max_new_tokens, self.system = max_new_tokens, system
        self.messages: list[dict[str, str]] = []
        self.tokens, self.dropped, self.cut = 0, 0, False
        self._seeds = random.Random(seed)
        self._batch: RunningBatch[AnswerRow] = RunningBatch(model)

    def use(self, prompter: Prompter) -> None:
        """Go on with the prompts of another adapter, after the model has been switched to it."""
        self.prompter = prompter
        self._batch.clear()

    def undo(self) -> bool:
        """Forget the last message of the user and the answer to it. Returns whether there was one."""
        last = max((place for place, one in enumerate(self.messages) if one["role"] == "user"), default=None)
        self.messages = self.messages if last is None else self.messages[:last]
        return last is not None

    def transcript(self) -> list[dict[str, str]]:
        """All messages, with the system prompt that the model gets."""
        return self.prompter.messages(self.messages, self.system)

    def answer(self, text: str) -> Generator[str, None, None]:
        """Answer a message of the user, and yield the answer's text while it is generated.

        The message and the answer are appended to the messages, also if the answer ends early, by an interrupt or
        because the iterator is closed. Nothing is appended if an error is raised before the first token.

        Args:
            text: The message.

        Raises:
            ValueError: The message alone is longer than the context, the template refuses the messages, or the model
                fails.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids, dropped, limit = self._prompt(messages)
        row = AnswerRow(ids, self.new_sampler(self._seeds.getrandbits(63)))
        done, written = False, ""
        try:
            self._batch.replace(row)
            self.messages = messages
            for piece in pieces(self._batch, row, self.prompter.tokenizer, self.prompter.ends, limit):
                written += piece
                yield piece
            done = True
        finally:
            if not done:  # the step that was cut short may have left the cache half written
                self._batch.clear()
            if self.messages is messages:
                self.messages = [*messages, {"role": "assistant", "content": written}] if written else messages[:-1]
            self.tokens, self.dropped = len(row.tokens), dropped
            self.cut = done and len(row.tokens) == limit and row.tokens[-1] not in self.prompter.ends

    def _prompt(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], int, int]:
        """Return the prompt's tokens, how many of the oldest messages it leaves out, and the longest answer."""
        context = context_length(self.model)
        ids = self.prompter.encode(messages, self.system)
        room = context - min(self.max_new_tokens, max(1, context // SHARE))
        for start in (place for place, message in enumerate(messages) if message["role"] == "user"):
            ids = self.prompter.encode(messages[start:], self.system) if start else ids
            if len(ids) <= room:
                return ids, start, min(self.max_new_tokens, context - len(ids))
        raise ValueError(
            f"the model's context is {context} tokens, and the message takes {len(ids)} with its prompt: at most "
            f"{room} fit, so that there is room for an answer; shorten it"
        )
