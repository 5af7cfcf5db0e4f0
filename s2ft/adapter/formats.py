"""The formats besides our own that adapters are read from and written to. A new format is one module and one row here.

The rows name their modules instead of importing them, so that the command line can list the formats without PyTorch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Format:
    """One format that an adapter is written in.

    The module of an adapter format has four functions:

    - `matches(folder)`: whether the folder has this format. Only names and small files are looked at.
    - `read(folder, model=None, name=None)` returns the Adapter. A format that does not name the units itself needs the
      base `model`.
    - `write(adapter, folder, model=None, **options)` creates the folder or replaces the adapter in it.
    - `describe(folder)` returns a few words about a folder that `write` wrote.

    The module of any other export has `export`, see :mod:`s2ft.conversion`.
    """

    summary: str  # one line for the help of `s2ft export`
    path: str  # full name of the module
    options: Mapping[str, tuple[type, Mapping[str, Any]]] = field(
        default_factory=dict
    )  # as s2ft.config.option takes them

    @property
    def module(self) -> ModuleType:
        """The module, imported when it is needed."""
        return import_module(self.path)


ADAPTER_FORMATS = {
    "lora": Format(
        "a folder that PEFT and vLLM load; it adds the same numbers to every weight",
        "s2ft.export.lora",
        {
            "rank": (
                int,
                {
                    "default": None,
                    "text": "the rank of every module; zeros are appended to reach it",
                    "shown": "the rank that each needs",
                },
            ),
            "rank_pattern": (
                bool,
                {
                    "default": True,
                    "text": "each module has the rank it needs",
                    "off": "lora: all modules have the rank of the widest one, for programs that read one rank only",
                },
            ),
        },
    ),
    "peft": Format(
        "a folder that PEFT loads as S²FT after `import s2ft.peft`, as training by PEFT's form saves it",
        "s2ft.export.peft_folder",
    ),
}
