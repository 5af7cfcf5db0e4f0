"""TRL's own command line with S²FT instead of LoRA.

    python -m s2ft.integrations.trl sft --config run.yaml

runs `trl sft --config run.yaml` with an S²FT adapter in PEFT's form. The file, or the command line, says what is
trained:

    s2ft:                                  # or --s2ft '{"d_ratio": 0.03, "o_ratio": 0.1}'
      d_ratio: 0.03
      o_ratio: 0.1

All other options are TRL's, and all of its training commands are taken: sft, dpo, grpo, kto, reward, rloo and so on. On
several devices, `accelerate launch -m s2ft.integrations.trl sft --config run.yaml` runs it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module

import trl
from trl.cli.commands import get_commands
from trl.cli.commands.training import TrainingCommand

from s2ft.config import did_you_mean
from s2ft.integrations.settings import config_from

HELP = "what S²FT trains: fields of s2ft.peft.S2FTPeftConfig, in YAML or as JSON, for example {d_ratio: 0.03}"


@dataclass
class S2FTOptions:
    """The option that this command adds to those of TRL.

    Args:
        s2ft: The fields of :class:`s2ft.peft.S2FTPeftConfig`, as a mapping or as JSON.
    """

    s2ft: dict | str | None = field(default=None, metadata={"help": HELP})

    def __post_init__(self) -> None:
        if isinstance(self.s2ft, str):
            try:
                self.s2ft = json.loads(self.s2ft)
            except ValueError as error:
                raise ValueError(f"--s2ft must be JSON such as '{{\"d_ratio\": 0.03}}', got {self.s2ft!r}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a training command of TRL with an S²FT adapter.

    Args:
        arguments: The command and its options. Default: those of the command line.
    """
    name, *options = (sys.argv[1:] if arguments is None else arguments) or [""]
    commands = [command.name for command in get_commands() if isinstance(command, TrainingCommand)]
    if name not in commands:
        raise SystemExit(
            f"usage: python -m s2ft.integrations.trl {{{','.join(commands)}}} [TRL's options]"
            f"{did_you_mean(name, commands)}"
        )
    script = import_module(f"trl.scripts.{name}")
    parser = trl.TrlParser((*script.make_parser().dataclass_types, S2FTOptions), prog=f"s2ft.integrations.trl {name}")
    *parsed, chosen = parser.parse_args_and_config(options)
    model = next(one for one in parsed if isinstance(one, trl.ModelConfig))  # some options of LoRA hold for S²FT too
    task_type = "SEQ_CLS" if name == "reward" else model.lora_task_type
    config = config_from(chosen.s2ft, "s2ft", task_type=task_type, modules_to_save=model.lora_modules_to_save)
    # The scripts import this function from trl when they run. It is TRL's only way from options to a PEFT config.
    trl.get_peft_config = lambda model_args: config
    script.main(*parsed)


if __name__ == "__main__":
    main()
