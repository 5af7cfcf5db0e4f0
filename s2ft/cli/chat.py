"""s2ft generate and chat: one answer in the terminal, or several turns in which adapters can be switched."""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2ft.cli.parse import ADAPTER, BASE_MODEL, DTYPE, command
from s2ft.config import check_fields, did_you_mean, option, refuse
from s2ft.files.plain_text import check_output
from s2ft.text.models import DTYPES, dtype_of_base, load_model
from s2ft.train.options import Options

# ---- s2ft generate -------------------------------------------------------------------------------------


@dataclass
class SamplingArguments:
    """How `s2ft generate` and `s2ft chat` choose the tokens of an answer."""

    max_new_tokens: int = option(512, "longest answer", unit="tokens", least=1)
    temperature: float = option(0.0, "sampling temperature; 0 always takes the most likely token")
    top_p: float = option(
        1.0, "sample from the most likely tokens whose probabilities add up to this share", metavar="SHARE"
    )
    top_k: int = option(0, "sample from so many most likely tokens; 0 is all", least=0)
    min_p: float = option(
        0.0, "leave out tokens whose probability is below this share of the most likely one's", metavar="SHARE"
    )
    repetition_penalty: float = option(1.0, "above 1, tokens of the prompt and of the answer become less likely")
    seed: int | None = option(
        None, "seed of the sampling; the same seed gives the same answers", shown="another one each time"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        refuse(
            (not 0 <= self.temperature < math.inf, f"temperature must be 0 or above, got {self.temperature}"),
            (not 0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}"),
            (not 0 <= self.min_p <= 1, f"min_p must be from 0 to 1, got {self.min_p}"),
            (
                not 0 < self.repetition_penalty < math.inf,
                f"repetition_penalty must be above 0, got {self.repetition_penalty}",
            ),
        )

    def sampler(self, seed: int | None = None):
        """Return the Sampler of an answer, with another seed if one is given."""
        from s2ft.text.generation import Sampler

        return Sampler(
            self.temperature,
            self.top_p,
            self.seed if seed is None else seed,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


@dataclass
class GenerateArguments:
    model: str | None = option(None, **BASE_MODEL)
    adapter: str | None = option(None, ADAPTER, metavar="ADAPTER")
    prompt: str | None = option(None, "the user's message; - reads it from stdin", metavar="TEXT")
    prompt_file: str | None = option(None, "a text file with the prompt", metavar="FILE")
    system: str | None = option(None, "system prompt", shown="the one of the training, if it had one", metavar="TEXT")
    raw: bool = option(False, "continue the prompt as it is, without the chat template")
    chat: bool = option(False, "use the chat template also for an adapter that was trained on plain text")
    dtype: str = option("auto", DTYPE, choices=DTYPES)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.raw and (self.chat or self.system is not None):
            raise ValueError(f"raw is without a chat template, so there is no {'chat' if self.chat else 'system'}")


@command(
    """Write one answer to a prompt.

The prompt is the message of a user, in the chat template that the adapter was trained with. Without adapter it is that
of the model; a model without one continues the text.""",
    """  s2ft generate --model meta-llama/Llama-3.2-1B-Instruct --adapter my-run --prompt "Hello!"
  s2ft generate --model my-model --prompt-file prompt.txt --temperature 0.7 --top-p 0.9""",
)
def run_generate(job: GenerateArguments, sampling: SamplingArguments) -> None:
    from s2ft.text.adapter_prompts import base_name, load_with_adapter
    from s2ft.text.conversation import pieces
    from s2ft.text.encoding import context_length
    from s2ft.text.generation import AnswerRow, RunningBatch
    from s2ft.train.device import explain_out_of_memory, gpu_or_cpu, smaller_answers

    prompt = read_prompt(job)
    model, prompter = load_with_adapter(base_name(job.model, job.adapter), job.adapter, job.dtype)
    is_chat = job.chat or job.system is not None or (prompter.is_chat and not job.raw)
    messages = [{"role": "user", "content": prompt}]
    ids = prompter.encode(messages, job.system) if is_chat else prompter.encode_text(prompt)
    room = context_length(model) - len(ids)
    if room < 1:
        raise ValueError(f"the model's context is {room + len(ids)} tokens, and the prompt has {len(ids)}: shorten it")
    row, limit = AnswerRow(ids, sampling.sampler()), min(sampling.max_new_tokens, room)
    with explain_out_of_memory(smaller_answers(1, str(model.dtype))):
        batch: RunningBatch[AnswerRow] = RunningBatch(model.to(gpu_or_cpu()))
        batch.admit([row])
        for piece in pieces(batch, row, prompter.tokenizer, prompter.ends, limit, () if is_chat else ids):
            print(piece, end="", flush=True)
    print()
    if limit < sampling.max_new_tokens and len(row.tokens) == limit and row.tokens[-1] not in prompter.ends:
        print(f"(cut after {limit} tokens: the model's context is full)", file=sys.stderr)


def read_prompt(job: GenerateArguments) -> str:
    """Read the prompt from the option, the file or stdin, without the last line break of the latter two.

    Raises:
        ValueError: There is no prompt, there are two, or it is empty or not valid text.
    """
    from s2ft.text.data.forms import check_unicode

    if (job.prompt is None) == (job.prompt_file is None):
        raise ValueError("give either --prompt or --prompt-file")
    try:
        prompt = job.prompt if job.prompt_file is None else Path(job.prompt_file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file {job.prompt_file} is not UTF-8 text: {error}") from None
    prompt = sys.stdin.read() if job.prompt == "-" else prompt
    check_unicode(prompt, "prompt")  # Bytes of another encoding would fail later, in the tokenizer.
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return prompt if job.prompt not in (None, "-") else prompt.removesuffix("\n")


# ---- s2ft chat -----------------------------------------------------------------------------------------

BASE = "base"  # the model without an adapter, in /adapter
COMMANDS = ("/adapter", "/system", "/undo", "/reset", "/save", "/help", "/exit")
HELP = """/adapter NAME   go on with another adapter; /adapter base is the model without one; /adapter alone lists them
/system TEXT    set the system prompt; /system "" removes it; /system alone shows it
/undo           take back the last message and its answer
/reset          begin a new conversation
/save FILE      write the conversation as a JSONL row, which s2ft sft can train on
/help           this list
/exit           end, like Ctrl-D

A line that ends with \\ goes on in the next one. A message that begins with / is written with //.
Ctrl-C stops an answer."""


@dataclass
class ChatArguments(Options):
    model: str | None = option(None, **BASE_MODEL)
    adapter: list[str] | None = option(
        None,
        "one or more adapters: the output folder of a run, an adapter's folder, a checkpoint, a name on the hub, each "
        "also as NAME=FOLDER; or a directory of adapters or runs. The chat begins with the first",
        metavar="ADAPTER",
    )
    system: str | None = option(None, "system prompt", shown="the one of the training, if it had one", metavar="TEXT")
    dtype: str = option("auto", DTYPE, choices=DTYPES)


@command(
    f"""Talk to a model in the terminal, with or without adapters.

Prompts have the chat template and the system prompt that the present adapter was trained with. If stdin is no terminal,
each of its lines is a message, and only the answers are printed.

in the chat:
{HELP}""",
    """  s2ft chat --model meta-llama/Llama-3.2-1B-Instruct --adapter my-run
  s2ft chat --model meta-llama/Llama-3.2-1B-Instruct --adapter math=runs/7 support=runs/9 --temperature 0.7
  s2ft chat --model meta-llama/Llama-3.2-1B-Instruct --adapter runs""",
)
def run_chat(job: ChatArguments, sampling: SamplingArguments) -> None:
    Talk(job, sampling).loop()


# ---- adapters by name ----------------------------------------------------------------------------------


def adapters_by_name(words: list[str]) -> dict[str, str | Path]:
    """Return the folder or hub name of each adapter that --adapter names, by the name in the chat.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: Two adapters have the same name, or one has the name of the base.
    """
    found: dict[str, str | Path] = {}
    for name, source in (pair for word in words for pair in _named(word)):
        refuse(
            (name == BASE, f"adapter {source} can't be called {BASE!r}, the word for the model: give NAME={source}"),
            (name in found, f"{found.get(name)} and {source} are both called {name!r}: give one as NAME={source}"),
        )
        found[name] = source
    return found


def _named(word: str) -> list[tuple[str, str | Path]]:
    """The adapters of one word of --adapter: one by its own name or by that of its folder, or all of a directory."""
    from s2ft.adapter.folders import adapters_in
    from s2ft.files.reading import ADAPTER, has_adapter

    name, equals, source = word.partition("=")
    if equals and not Path(word).exists():
        return [(name, source)]
    path = Path(word).expanduser().absolute()
    is_one = has_adapter(path) or has_adapter(path / ADAPTER)
    inside = adapters_in(path) if path.is_dir() and not is_one else {}
    return list(inside.items()) or [(path.parent.name if path.name == ADAPTER and is_one else path.name, word)]


# ---- the chat ------------------------------------------------------------------------------------------


class Talk:
    """A chat in the terminal. An adapter is read when it is first used.

    Args:
        job: The options: the model with its adapters. The chat begins with the first.
        sampling: How tokens are chosen.

    Attributes:
        present: Name of the adapter that the model computes with, or BASE.
    """

    def __init__(self, job: ChatArguments, sampling: SamplingArguments) -> None:
        import s2ft
        from s2ft.files.reading import local_folder
        from s2ft.text.adapter_prompts import base_name
        from s2ft.text.conversation import Chat
        from s2ft.train.device import gpu_or_cpu

        # The folders are looked up first, so that a wrong one is found at once.
        self.folders = {name: local_folder(source) for name, source in adapters_by_name(job.adapter or []).items()}
        first = next(iter(self.folders.values()), None)
        dtype = job.dtype if first is None else dtype_of_base(s2ft.read_adapter(first), job.dtype)
        self.model, self.tokenizer = load_model(base_name(job.model, first), dtype)
        self.model.to(gpu_or_cpu())
        self.is_terminal = sys.stdin.isatty()
        self._prompters: dict[str, Any] = {}
        prompter = self.switch(next(iter(self.folders), BASE))
        self.chat = Chat(self.model, prompter, sampling.sampler, sampling.max_new_tokens, job.system, sampling.seed)

    def switch(self, name: str):
        """Switch the model to an adapter, or to BASE. Returns the Prompter of the adapter.

        Raises:
            ValueError: The name is unknown, or the adapter is not one of this model. The present one stays.
        """
        import s2ft
        from s2ft.text.adapter_prompts import Prompter

        if name not in (BASE, *self.folders):
            raise ValueError(f"there is no adapter {name!r}{did_you_mean(name, list(self.folders))}; {self.adapters()}")
        if name not in self._prompters:
            adapter = None if name == BASE else s2ft.read_adapter(self.folders[name])
            info = None if adapter is None else adapter.info
            prompter = Prompter(self.tokenizer, info, self.model.generation_config, f"adapter {name!r}")
            if adapter is not None:
                s2ft.load_adapter(self.model, adapter, name, active=False)
                if not prompter.is_chat:
                    say(f"(adapter {name} was trained on plain text; the chat has the template of the base)")
            self._prompters[name] = prompter
        if s2ft.list_adapters(self.model):
            s2ft.set_adapter(self.model, None if name == BASE else name)
        self.present = name
        return self._prompters[name]

    def adapters(self) -> str:
        """Return a line with the names of the adapters."""
        return "adapters: " + ", ".join(
            f"{name} (on)" if name == self.present else name for name in (*self.folders, BASE)
        )

    def loop(self) -> None:
        """Answer messages until the input ends.

        Raises:
            ValueError: A line of a script is wrong. In a terminal the chat goes on.
        """
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() a history and editing

            if self.folders:
                say(self.adapters())
            say("/help lists the commands, Ctrl-D ends the chat")
        for line in self._lines():
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if self._command(line):
                        return
                elif line.strip():
                    self._answer(line[1:] if line.startswith("//") else line)
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
                if not self.is_terminal:
                    raise
                say(f"error: {error}")

    def _lines(self) -> Iterator[str]:
        """The lines of the input. A line that ends with a backslash is joined with the next one."""
        held = ""
        while True:
            try:
                line = input(("… " if held else f"{self.present}> ") if self.is_terminal else "")
            except EOFError:
                if held:
                    yield held
                if self.is_terminal:
                    print()
                return
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                held = ""
                say("\n/exit or Ctrl-D ends the chat")
                continue
            if line.endswith("\\"):
                held += line[:-1] + "\n"
            else:
                yield held + line
                held = ""

    def _answer(self, message: str) -> None:
        from s2ft.text.data.forms import check_unicode

        check_unicode(message, "message")
        before, dropped = self.chat.messages, self.chat.dropped
        try:
            with contextlib.closing(self.chat.answer(message)) as pieces:
                for piece in pieces:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:  # ends the answer in a terminal; the conversation keeps what was written
            if not self.is_terminal:
                raise
        print(flush=True)
        if self.chat.cut:
            say(f"(cut after {self.chat.tokens} tokens)")
        if self.chat.dropped > dropped:
            say(f"(the context is full: the model no longer sees the first {self.chat.dropped} messages)")
        if self.chat.messages == before:
            say("(no answer: the message is not kept)")

    # ---- commands --------------------------------------------------------------------------------

    def _command(self, line: str) -> bool:
        """Run a command of the chat. Returns whether the chat ends."""
        name, _, rest = line.partition(" ")
        match name, rest.strip():
            case "/exit" | "/quit", _:
                return True
            case "/adapter", "":
                say(self.adapters())
            case "/adapter", adapter:
                self.chat.use(self.switch(adapter))
                say(f"(adapter {adapter})" if adapter != BASE else "(the model without an adapter)")
            case "/system", "":
                systems = [one["content"] for one in self.chat.transcript() if one["role"] == "system"]
                say(systems[0] if systems else "there is no system prompt")
            case "/system", text:
                self.chat.system = text[1:-1] if text[0] == text[-1] and text[0] in "\"'" else text
            case "/undo", _:
                if not self.chat.undo():
                    raise ValueError("there is nothing to undo")
            case "/reset", _:
                self.chat.messages = []
            case "/save", file:
                self._save(file)
            case "/help", _:
                say(HELP)
            case _:
                raise ValueError(f"there is no {name}{did_you_mean(name, COMMANDS)} (see /help)")
        return False

    def _save(self, name: str) -> None:
        import json

        refuse((not name, "/save needs a file"), (not self.chat.messages, "there is no conversation to save"))
        path = Path(name).expanduser()
        check_output(path)
        path.write_text(json.dumps({"messages": self.chat.transcript()}, ensure_ascii=False) + "\n", encoding="utf-8")
        say(f"({len(self.chat.messages)} messages in {path})")


def say(text: str) -> None:
    """Print what is not an answer to stderr, so that stdout has the answers alone."""
    print(text, file=sys.stderr, flush=True)
