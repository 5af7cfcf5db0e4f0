"""`adapter: s2ft` in Axolotl.

Name the plugin in Axolotl's configuration file, and say what is trained:

    plugins:
      - s2ft.integrations.axolotl.S2FTPlugin
    adapter: s2ft
    s2ft:
      d_ratio: 0.03
      o_ratio: 0.1

`axolotl train`, `axolotl inference` and `axolotl merge-lora` then take the file as they take one with `adapter: lora`.
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, Field, model_validator

from s2ft.config import refuse
from s2ft.integrations.settings import config_from
from s2ft.peft import S2FTPeftConfig

NAME = "s2ft"


class S2FTArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's configuration file."""

    s2ft: dict[str, Any] | None = Field(
        default=None, description="What S²FT trains: the fields of s2ft.peft.S2FTPeftConfig, for example d_ratio: 0.03"
    )

    @model_validator(mode="before")
    @classmethod
    def check_s2ft(cls, data: Any) -> Any:
        """Check the settings before anything is loaded, and choose the way of merging that knows S²FT."""
        if not hasattr(data, "get"):
            return data
        if data.get("adapter") != NAME:
            if data.get("s2ft"):
                raise ValueError(f"s2ft says what S²FT trains, but adapter is {data.get('adapter')!r}: adapter: s2ft")
            return data
        _config(data)
        refuse(
            *(
                (
                    data.get(quantized),
                    f"{quantized} and adapter: s2ft exclude each other, because Axolotl loads quantized models only "
                    "for its own adapters: remove it, or train with s2ft sft --load-in-4bit",
                )
                for quantized in ("load_in_4bit", "load_in_8bit", "gptq")
            ),
            (
                data.get("merge_method") == "memory_efficient",
                "merge_method: memory_efficient merges LoRA only: write merge_method: legacy",
            ),
        )
        data["merge_method"] = "legacy"
        return data


class S2FTPlugin(BasePlugin):
    """Axolotl's plugin that trains, loads and merges S²FT adapters in PEFT's form."""

    def get_input_args(self) -> str:
        """Return the class of the keys that the plugin adds to the configuration file."""
        return "s2ft.integrations.axolotl.S2FTArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Return the name of the adapter. ReLoRA's restarts and LoRA's own loader don't apply to it."""
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, S2FTPeftConfig] | None:
        """Add a new adapter to the model, or load that of `lora_model_dir`.

        Args:
            model: The base.
            cfg: Axolotl's configuration.
            inference: Whether the adapter is only used, not trained.
            config_only: Whether only the config is wanted, for a trainer that adds the adapter itself.

        Returns:
            The model with the adapter, or None, and the adapter's config; None if the configuration has another
            adapter.
        """
        if cfg.adapter != NAME:
            return None
        config = _config(cfg)
        if config_only:
            return None, config
        dtype = cfg.peft_autocast_adapter_dtype
        options = {} if dtype is None else {"autocast_adapter_dtype": dtype}
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
        else:
            model = get_peft_model(model, config, **options)
        model.print_trainable_parameters()
        return model, model.peft_config["default"]


def _config(cfg: Any) -> S2FTPeftConfig:
    task_type = "SEQ_CLS" if cfg.get("reward_model") else "CAUSAL_LM"
    modules = cfg.get("lora_modules_to_save")
    return config_from(cfg.get("s2ft"), "s2ft", task_type=task_type, modules_to_save=list(modules) if modules else None)
