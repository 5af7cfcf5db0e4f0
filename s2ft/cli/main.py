"""Choose the command, run it, and turn a user's mistake into one line."""

import _thread
import importlib
import io
import logging
import os
import re
import signal
import sys
import threading
import warnings
from typing import Any

from s2ft.config import did_you_mean
from s2ft.files.plain_text import reason_not_written
from s2ft.train.device import OutOfMemory, is_out_of_memory, words_of_allocator

COMMANDS = {
    "sft": "train an adapter on your data; s2ft finetune is the same",
    "dpo": "train an adapter on pairs of a better and a worse answer",
    "grpo": "train an adapter by the rewards of its own answers",
    "compare": "train S²FT and LoRA on your data and compare them",
    "select": "choose units and save them, without training",
    "eval": "score a model, with or without an adapter, on a file of problems, or tasks of lm-eval",
    "generate": "write one answer to a prompt",
    "chat": "talk to a model in several turns, and switch adapters meanwhile",
    "serve": "answer over HTTP with many adapters of one base model",
    "merge": "write base model and adapter as one checkpoint",
    "patch": "write an adapter into a GGUF file in place, and take it back",
    "export": "write an adapter as LoRA, merged checkpoint or GGUF file, or make an adapter from a LoRA",
    "combine": "add adapters into a new one",
    "info": "describe an adapter folder",
    "plan": "print what ratios train of a model, and the LoRA ranks of the same size",
    "estimate": "print the memory that training a model takes",
    "couplings": "print which layers of a model share units, and how each weight is trained",
    "demo": "fine-tune a small model from start to finish, without any arguments",
}
TRAINING = ("sft", "dpo", "grpo", "compare")
# Commands whose module has another name
MODULES = {
    "demo": "training",
    "generate": "chat",
    **dict.fromkeys(("info", "combine", "merge", "export", "patch"), "adapters"),
    **dict.fromkeys(("select", "estimate", "couplings"), "plan"),
}
SAME = {"finetune": "sft"}  # other names of commands
# Commands by the names that other programs give them.
OTHER_NAMES = {
    "eval": "evaluate score test",
    "export": "convert",
    "combine": "fuse",
    "sft": "fit train tune fine-tune",
    "sft --push-to-hub": "push upload",
    "generate": "inference run",
    "couplings": "inspect layers structure",
    "info": "show",
    "estimate": "memory vram",
    "select": "choose",
}
MISTAKES = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ImportError,
)
TRACEBACK = "S2FT_TRACEBACK"
# Loggers whose warnings are about other libraries' optional parts. Their errors are still shown.
CHATTY = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "fsspec",
    "httpx",
    "huggingface_hub",
    "lm_eval",
    "torch.utils._pytree",
    "torchao",
    "transformers",
    "trl",
)


def usage() -> str:
    """Return the help of the command without a command's name."""
    return "\n".join(
        [
            "usage: s2ft [--version] [--help] [--traceback] COMMAND ...",
            "",
            "S²FT: structured sparse fine-tuning of large language models.",
            "",
            "commands:",
            *(f"  {name:<10}{text}" for name, text in COMMANDS.items()),
            "",
            "s2ft COMMAND --help lists the options of a command.",
            f"--traceback, or the variable {TRACEBACK}=1, shows where an error was raised, and all warnings.",
            "",
            "example:",
            "  s2ft sft --model meta-llama/Llama-3.2-1B --data my-data.jsonl --output my-run",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words of the command line; default: those of the process.

    Returns:
        The exit status. 0: done. 1: memory, disk or network failed, for example a full disk. 2: a mistake of the user.
        130: interrupted.

    Raises:
        Exception: An error that is none of these.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in arguments or os.environ.get(TRACEBACK, "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--traceback"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without a character gets its number, and no error
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from s2ft import __version__

        print(f"s2ft {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS and name not in SAME:
        hint = did_you_mean(name, [*COMMANDS, *SAME], OTHER_NAMES)
        say_error("s2ft", f"there is no command {name!r}{hint} (see s2ft --help)")
        return 2
    if traceback:
        os.environ[TRACEBACK] = "1"  # for the processes that a command starts
    set_up_logging(traceback)
    sys.unraisablehook = _interrupt_again
    try:
        _run(SAME.get(name, name), rest)
    except MISTAKES as error:
        if traceback:
            raise
        say_error(f"s2ft {name}", str(error))
        return 2
    except Exception as error:
        if traceback:
            raise
        if is_out_of_memory(error):
            said = str(error) if isinstance(error, OutOfMemory) else f"out of memory: {words_of_allocator(error)}"
            say_error(f"s2ft {name}", *said.split("\n"))
            return 1
        reason = reason_not_written(error)
        if reason is None:
            raise
        say_error(f"s2ft {name}", reason)
        return 1
    except KeyboardInterrupt:
        print(f"s2ft {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def entry() -> None:
    """Run the command of this process. While Python ends after it, Ctrl-C ends the process without a traceback."""
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _run(command: str, words: list[str]) -> None:
    try:
        if command in TRAINING:
            from s2ft.cli.training import run

            run(command, words)
        else:
            module = f"s2ft.cli.{MODULES.get(command, command)}"  # only the chosen one is imported
            getattr(importlib.import_module(module), f"run_{command}")(words)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__
        if cause is None:
            raise
        raise KeyboardInterrupt from error  # Ctrl-C in the middle of an import can come out as another error


def _interrupt_again(unraisable: Any, earlier: Any = sys.unraisablehook) -> None:
    """Interrupt the process once more if Ctrl-C came inside a ``__del__``, which can't pass it on."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, _thread.interrupt_main).start()  # from this function it could not pass either
    else:
        earlier(unraisable)


def set_up_logging(everything: bool) -> None:
    """Log to stderr, one plain line a message, without the warnings of other libraries unless `everything` is set."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("torch").setLevel(logging.WARNING)
    if not everything and "tqdm" not in sys.modules and not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it once; a bar in a log is one endless line
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING if everything else logging.ERROR)
    logging.getLogger("s2ft").setLevel(logging.DEBUG if everything else logging.NOTSET)
    if not everything:
        warnings.simplefilter("ignore", FutureWarning)  # of what will change in other libraries
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", module=rf"(torch|datasets|peft|{'|'.join(CHATTY)})(\.|$)")


def say_error(program: str, reason: str, *more: str) -> None:
    """Print one line on stderr, and `more` lines. If several ranks have the same error, one of them prints it.

    Lines of the reason that begin with two spaces, such as a list of bad rows, stay lines.
    """
    line = f"{program}: error: " + re.sub(r"\n(?!  )", " ", reason)
    if "WORLD_SIZE" in os.environ:  # Several ranks may have been started; importing PyTorch takes a second.
        from s2ft.distributed import should_print

        if not should_print(line):
            return
    print("\n".join([line, *more]), file=sys.stderr)
