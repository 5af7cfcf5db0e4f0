"""The formats that adapters are read from and written to. A new format is one module and one row here.

The rows name their modules instead of importing them, so that the command line can list the formats without PyTorch.
"""

from argparse import BooleanOptionalAction
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

Options = Mapping[str, Mapping[str, Any]]  # options of a command line by name, with the keywords of argparse


@dataclass(frozen=True)
class AdapterFormat:
    """One format of adapter folders. Its module has the four functions below."""

    summary: str  # one line for the help of `s2ft export`
    module: str  # full name of the module
    options: Options = field(default_factory=dict)  # further arguments of `write`

    @property
    def matches(self) -> Callable[[Path], bool]:
        """`matches(folder)`: whether the folder has this format. Only names and small files are looked at."""
        return import_module(self.module).matches

    @property
    def read(self) -> Callable[..., Any]:
        """`read(folder, model=None, name=None, couplings=None)` returns the Adapter.

        A format that does not name the units itself needs the base `model`, and `couplings` for a model of no known
        family. `name` replaces the name in the file.
        """
        return import_module(self.module).read

    @property
    def write(self) -> Callable[..., None]:
        """`write(adapter, folder, model=None, **options)` creates the folder or replaces the adapter in it."""
        return import_module(self.module).write

    @property
    def describe(self) -> Callable[[Path], str]:
        """`describe(folder)` returns a few words about a folder that `write` wrote."""
        return import_module(self.module).describe


NATIVE = "native"
ADAPTER_FORMATS = {
    NATIVE: AdapterFormat("the format of s2ft.save_adapter", "s2ft.adapter.formats.native"),
    "lora": AdapterFormat(
        "a folder that PEFT and vLLM load; it adds the same numbers to every weight",
        "s2ft.adapter.formats.lora",
        {
            "rank": {
                "type": int,
                "help": "the rank of every module; zeros are appended to reach it (default: the rank that each needs)",
            },
            "rank_pattern": {
                "action": BooleanOptionalAction,
                "help": "each module has the rank it needs, which is the default; --no-rank-pattern: all have that of "
                "the widest one, for programs that read one rank only",
            },
        },
    ),
    "peft": AdapterFormat(
        "a folder that PEFT loads as S²FT after `import s2ft.peft`, as training by PEFT's form saves it",
        "s2ft.adapter.formats.peft",
    ),
}


def read_adapter_folder(folder: Path, model=None, name: str | None = None) -> Any:
    """Read an adapter in the format that its folder has.

    Args:
        folder: The adapter's folder.
        model: The base model, for formats that do not name the units themselves.
        name: The adapter's name; default: the name in the file.

    Returns:
        The Adapter.

    Raises:
        FileNotFoundError: The folder has no known format; the message names the file of the native format it lacks.
        ValueError: The files are damaged, or their format needs a model.
    """
    known = next((one for one in ADAPTER_FORMATS.values() if one.matches(folder)), ADAPTER_FORMATS[NATIVE])
    return known.read(folder, model, name)
