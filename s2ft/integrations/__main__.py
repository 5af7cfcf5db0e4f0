"""Prints the path of a module of this folder, for programs that load plugins by the path of a file:
``swift sft --external_plugins "$(python -m s2ft.integrations ms_swift)"``."""

import sys
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Print the path of a module.

    Args:
        arguments: The module's name.

    Raises:
        SystemExit: There is no such module.
    """
    files = {file.stem: file for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_")}
    names = [name for name in sorted(files) if name != "settings"]
    if len(arguments) != 1 or arguments[0] not in names:
        raise SystemExit(f"usage: python -m s2ft.integrations {{{','.join(names)}}}")
    print(files[arguments[0]])


if __name__ == "__main__":
    main(sys.argv[1:])
