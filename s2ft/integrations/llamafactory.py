"""S²FT in LlamaFactory.

    python -m s2ft.integrations.llamafactory train run.yaml

runs `llamafactory-cli train run.yaml`, and the file may say

    finetuning_type: s2ft
    s2ft:
      d_ratio: 0.03
      o_ratio: 0.1

With `USE_V1=1`, LlamaFactory's second version is run, whose files say ``peft_config: {name: s2ft, d_ratio: 0.03}``. All
other commands of llamafactory-cli are taken too, and know the saved adapters. On several devices,
`torchrun --nproc-per-node 2 -m s2ft.integrations.llamafactory train run.yaml` runs it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from llamafactory.extras.misc import is_env_enabled

from s2ft.integrations.settings import config_from
from s2ft.peft import S2FTPeftConfig

NAME = "s2ft"
TRAINING = ("train", "sft", "dpo", "rm")  # commands of the second version that train


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command of LlamaFactory that knows S²FT.

    Args:
        arguments: The command, the configuration file and so on. Default: those of the command line.
    """
    sys.argv[1:] = sys.argv[1:] if arguments is None else arguments
    (run_second if is_env_enabled("USE_V1") else run_first)()


# ---- the second version --------------------------------------------------------------------------------


def run_second() -> None:
    """Register S²FT as a plugin of the second version, and run the command in this process."""
    from llamafactory.v1 import launcher
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin

    PeftPlugin(NAME).register()(add_adapter)
    (launcher.main if len(sys.argv) > 1 and sys.argv[1] in TRAINING else launcher.launch)()


def add_adapter(model: Any, config: Mapping[str, Any], is_train: bool = False) -> Any:
    """Add a new adapter to a model, or load the one of `adapter_name_or_path`.

    Args:
        model: The base.
        config: The file's `peft_config`.
        is_train: Whether the adapter is trained. Otherwise it is merged.

    Returns:
        The model with the adapter.

    Raises:
        ValueError: The settings are missing or wrong.
    """
    from llamafactory.v1.plugins.model_plugins.peft import load_adapter
    from peft import get_peft_model

    settings = {name: value for name, value in config.items() if name not in ("name", "adapter_name_or_path")}
    if config.get("adapter_name_or_path"):
        return load_adapter(model, config["adapter_name_or_path"], is_train)
    model = get_peft_model(model, config_from(settings, "peft_config", task_type="CAUSAL_LM"))
    if is_train:
        model.print_trainable_parameters()
    return model


# ---- the first version ---------------------------------------------------------------------------------


def run_first() -> None:
    """Run the command of the first version, to which `finetuning_type: s2ft` is LoRA with another config."""
    from llamafactory import launcher
    from llamafactory.hparams import parser
    from llamafactory.train import tuner

    parser.read_args = partial(_read, parser.read_args)
    if sys.argv[1:2] == ["train"]:  # launch() would start the processes of several devices without S²FT
        sys.argv.pop(1)
        tuner.run_exp()
    else:
        launcher.launch()


def _read(read_args: Callable[..., Any], args: Any = None) -> Any:
    """Read the configuration as the first version does, and replace what it says about S²FT."""
    given = read_args(args)
    if not isinstance(given, dict) or not (NAME in given or given.get("finetuning_type") == NAME):
        return given
    if given.get("finetuning_type") != NAME:
        raise ValueError(f"there is a block s2ft, but finetuning_type is {given.get('finetuning_type')!r}, not s2ft")
    settings = given.get(NAME)
    if settings is not None or given.get("do_train"):
        config_from(settings, NAME)  # an error comes before the model is loaded
    from llamafactory.model import adapter

    adapter.LoraConfig = partial(_config, settings)
    return {**{name: value for name, value in given.items() if name != NAME}, "finetuning_type": "lora"}


def _config(settings: Any, task_type: Any = None, modules_to_save: Any = None, **lora: Any) -> S2FTPeftConfig:
    """Make the config of S²FT where the first version makes that of LoRA."""
    modules = sorted(modules_to_save) if modules_to_save else None
    return config_from(settings, NAME, task_type=task_type, modules_to_save=modules)


if __name__ == "__main__":
    main()
