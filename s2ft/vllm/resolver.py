"""Adapters that clients name in a request before anyone has loaded them.

vLLM asks its resolvers for a model name that it does not know, if VLLM_ALLOW_RUNTIME_LORA_UPDATING is 1. This one finds
adapters in directories (S2FT_VLLM_ADAPTERS) and on the hub, among owners and repositories of a list (S2FT_VLLM_HUB).
Without either variable it is not there.
"""

import asyncio
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2ft.adapter.folders import STATE
from s2ft.config import refuse
from s2ft.files.reading import own_folder
from s2ft.vllm.compatibility import logger, private
from s2ft.vllm.lora_requests import folder_of

NAME = "S²FT"
DIRECTORY, HUB, ALLOWED = "S2FT_VLLM_ADAPTERS", "S2FT_VLLM_HUB", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
# No separator and no leading dot: the name can't lead out of the directory. Longer ones no file system has.
ENTRY = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")  # an owner, or a repository
FOLDER = re.compile(r"\w[\w.\- ]{0,199}")


def install() -> None:
    """Register the resolver, if one of its variables is set.

    Raises:
        ValueError: S2FT_VLLM_ADAPTERS is no directory, or S2FT_VLLM_HUB has an entry that is no name on the hub.
        MissingInVLLM: This release of vLLM has no resolvers.
    """
    directories = [Path(one) for one in os.environ.get(DIRECTORY, "").split(os.pathsep) if one]
    hub = frozenset(entry.strip() for entry in os.environ.get(HUB, "").split(",") if entry.strip())
    if not directories and not hub:
        return
    refuse(
        *(
            (not one.is_dir(), f"{DIRECTORY} must name directories of adapters, and {one} is none")
            for one in directories
        ),
        *(
            (not ENTRY.fullmatch(one), f"{HUB} must list owners and repositories, such as org or org/name, got {one!r}")
            for one in hub
        ),
    )
    private("vllm.lora.resolver", "LoRAResolverRegistry").register_resolver(NAME, make_resolver(directories, hub))
    if not private("vllm", "envs").VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        logger.warning(
            "s2ft: %s is set, and vLLM asks for unknown names only with %s=1",
            DIRECTORY if directories else HUB,
            ALLOWED,
        )


def make_resolver(directories: Sequence[Path], hub: frozenset[str]) -> Any:
    """Make the resolver.

    Args:
        directories: The directories whose adapters can be named. The first one that has a name gives the adapter.
        hub: Owners and repositories on the hub whose adapters can be named.

    Returns:
        A LoRAResolver of vLLM.
    """
    request = private("vllm.lora.request", "LoRARequest")

    class S2FTResolver(private("vllm.lora.resolver", "LoRAResolver")):
        """Finds S²FT adapters by name. vLLM logs why one that was found does not load."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            path = await asyncio.to_thread(path_of, lora_name, directories, hub)
            return None if path is None else request(lora_name=lora_name, lora_int_id=1, lora_path=path)  # vLLM sets it

    return S2FTResolver()


def path_of(name: str, directories: Sequence[Path], hub: frozenset[str]) -> str | None:
    """Find the adapter that a client names.

    Args:
        name: The name.
        directories: See :func:`make_resolver`.
        hub: See :func:`make_resolver`.

    Returns:
        A folder or a name on the hub, for vLLM's LoRARequest; None if there is no such adapter.
    """
    path = next(filter(None, (_in_directory(name, directory) for directory in directories)), None)
    repository = name.partition("@")[0]
    if path is None and repository.count("/") == 1 and {repository, repository.partition("/")[0]} & hub:
        path = name
    return None if path is None or folder_of(path) is None else path


def _in_directory(name: str, directory: Path) -> str | None:
    """A folder of the directory itself. A separator, a link that leads out of it, or a checkpoint finds nothing."""
    if not FOLDER.fullmatch(name):
        return None
    folder = directory / name
    try:
        inside = folder.is_dir() and folder.resolve().is_relative_to(directory.resolve())
    except OSError:  # a name that is too long in its bytes
        return None
    return str(folder) if inside and not (own_folder(folder) / STATE).is_file() else None
