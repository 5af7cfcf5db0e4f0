"""Choose the command, run it, and turn a user's mistakes into one line."""

import importlib
import logging
import os
import sys

COMMANDS = {
    "finetune": "train an adapter on your data",
    "select": "choose units and save them, without training",
    "eval": "score a model, with or without an adapter, by generation",
    "generate": "write one answer to a prompt",
    "serve": "answer over HTTP, with many adapters of one base at once",
    "merge": "write model and adapter as a stock checkpoint",
    "export": "write an adapter as LoRA, merged checkpoint or GGUF, or a LoRA as adapter",
    "fuse": "add adapters up into a new one",
    "info": "say what an adapter folder holds",
    "demo": "fine-tune a small model from start to finish, no arguments needed",
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
WRITERS = ("PytorchStreamWriter failed", "unexpected pos", "I/O error")  # how torch and safetensors say it
TRACEBACK = "S2FT_TRACEBACK"


def usage() -> str:
    lines = [
        "usage: s2ft [--version] [--help] [--traceback] COMMAND …",
        "",
        "Structured sparse fine-tuning of large language models.",
        "",
        "commands:",
    ]
    lines += [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            *lines,
            "",
            "s2ft COMMAND --help lists the options of a command. --traceback, or "
            f"{TRACEBACK}=1, shows where an error comes from.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a file could not be read or written (a full disk), 2 a mistake in what was asked for,
    130 interrupted. Other errors are raised."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in arguments or os.environ.get(TRACEBACK, "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from s2ft import __version__

        print(f"s2ft {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"s2ft: there is no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "transformers", "accelerate", "torch"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("s2ft").setLevel(logging.DEBUG if traceback else logging.NOTSET)
    try:
        importlib.import_module(f"s2ft.cli.{name}").run(rest)  # here, so that no command waits for another's imports
    except MISTAKES as error:
        if traceback:
            raise
        say_error(name, str(error))
        return 2
    except Exception as error:
        reason = reason_not_written(error)
        if traceback or reason is None:
            raise
        say_error(name, reason)
        return 1
    except KeyboardInterrupt:
        print(f"s2ft {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def say_error(command: str, reason: str) -> None:
    """One line on stderr. Of several ranks with the same error one says it."""
    from s2ft.distributed import should_print

    line = f"s2ft {command}: error: " + " ".join(reason.splitlines())
    if should_print(line):
        print(line, file=sys.stderr)


def reason_not_written(error: Exception) -> str | None:
    """What the system said where a file could not be read or written; None for any other error."""
    if isinstance(error, OSError):
        return str(error)
    text = str(error).strip().split("\n")[0]
    return f"a file could not be written ({text})" if any(word in text for word in WRITERS) else None
