"""Folders with many adapters, which are served, and the model card of an adapter."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2ft.adapter.adapter import Adapter
from s2ft.config import check_adapter_name, refuse
from s2ft.files.plain_text import replace_file
from s2ft.files.reading import ADAPTER, CONFIG, REPOSITORY, TENSORS, has_adapter, is_run, own_folder
from s2ft.model.coupling import by_key

STATE = "trainer_state.json"  # in every checkpoint of a Trainer, which writes it last


def adapters_in(directory: Path) -> dict[str, Path]:
    """Return the adapters in a directory of adapters or of runs, by the names of the folders in it.

    The output folder of one run has one adapter, with the name of that folder. Checkpoints are left out.
    """
    if is_run(directory) and has_adapter(directory / ADAPTER):
        return {directory.resolve().name: directory / ADAPTER}
    return {
        entry.name: own_folder(entry)
        for entry in sorted(directory.iterdir())
        if has_adapter(own_folder(entry)) and not (own_folder(entry) / STATE).is_file()
    }


# ---- sources: what is served -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A directory with many adapters, or one adapter.

    Attributes:
        folder: A directory of adapters or of runs; with a name, an adapter's folder or the output folder of a run.
        name: The name of the only adapter. None if the folder has many, which are named by their folders.
    """

    folder: Path
    name: str | None = None

    def folders(self) -> dict[str, Path]:
        """Return the folders of all adapters by name. Raises OSError if the directory was deleted."""
        if self.name is None:
            return adapters_in(self.folder)
        return {self.name: own_folder(self.folder)} if has_adapter(own_folder(self.folder)) else {}

    def skipped(self, found: Sequence[str]) -> dict[str, str]:
        """Return the other folders of the source by path, with the reason why they are no adapters.

        Args:
            found: Names of the adapters.
        """
        if self.name is not None:
            return {} if self.folders() else {str(self.folder): why_skipped(self.folder)}
        return {
            str(entry): why_skipped(entry)
            for entry in sorted(self.folder.iterdir())
            if entry.is_dir() and not entry.name.startswith(".") and entry.name not in found
        }


def source_of(text: str) -> Source:
    """Return the source that an argument names.

    Args:
        text: A directory of adapters or of runs, an adapter's folder, the output folder of a run, or NAME=DIR.

    Raises:
        NotADirectoryError: The folder does not exist.
        ValueError: The folder is a checkpoint or an adapter of PEFT, the name is not valid, or NAME=DIR names a
            directory of adapters.
    """
    name, separator, path = text.partition("=")
    if not separator or Path(text).is_dir():
        name, path = "", text
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"adapters: {path or text} is not a folder")
    if (folder / STATE).is_file():
        raise ValueError(
            f"adapters: {folder} is a checkpoint of a training run, and checkpoints are not served: give the run's "
            f"folder, or copy the files {CONFIG} and {TENSORS} to a folder of their own"
        )
    is_one = has_adapter(folder) or is_run(folder)
    if not is_one and (folder / "adapter_config.json").is_file():
        raise ValueError(f"adapters: {folder} can't be served: {why_skipped(folder)}")
    if name and not is_one:
        inside = ", ".join(sorted(adapters_in(folder))[:3])
        raise ValueError(
            f"adapters: {text} gives a name to one adapter, but {folder} is neither an adapter nor the output of a run"
            + (f"; it has {inside} in it: give the directory without {name}=" if inside else "")
        )
    if name:
        check_adapter_name(name, f"adapters: {text}")
    place = folder.resolve()
    of_run = place.name == ADAPTER and is_run(place.parent)  # an adapter has the name of its folder, or of its run
    return Source(folder, name or (place.parent if of_run else place).name) if is_one else Source(folder)


def folders_of(sources: Iterable[Source], reserved: Collection[str] = ()) -> dict[str, Path]:
    """Return the folders of all adapters of some sources by name.

    Args:
        sources: The sources.
        reserved: Names of the base.

    Raises:
        ValueError: Two adapters have the same name, or one has a name of the base.
    """
    found: dict[str, Path] = {}
    for name, folder in (pair for source in sources for pair in source.folders().items()):
        first = found.setdefault(name, folder)
        refuse(
            (
                name in reserved,
                f"adapter {name!r} has the name of the base: rename its folder, or give the base another name with "
                "--served-model-name",
            ),
            (
                first.resolve() != folder.resolve(),
                f"two adapters are called {name!r}, {first} and {folder}: name one of them with --adapters NAME=DIR, "
                "or leave out its directory",
            ),
        )
    return found


def why_skipped(folder: Path) -> str:
    """Explain why a folder is not served."""
    if (folder / STATE).is_file():
        return "it is a checkpoint of a training run"
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter of PEFT: convert it with s2ft export --from-peft, or a LoRA with --from-lora"
    if is_run(folder) and not (folder / ADAPTER).is_dir():
        return "it is the output of a run that has saved no adapter yet"
    place = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    missing = [name for name in (CONFIG, TENSORS) if not (place / name).is_file()]
    return f"it has no {' and no '.join(missing)}" if missing else "its name can't be the name of an adapter"


def grouped(reasons: dict[str, str]) -> list[str]:
    """Format names with their reasons, one line for each reason.

    Args:
        reasons: Reasons by name. Five names are in a line, the others are counted.

    Example:
        >>> s2ft.adapter.folders.grouped({"a": "it is empty", "b": "it is empty"})
        ['a, b: it is empty']
    """
    return [
        f"{some(names)}: {reason}" for reason, names in by_key((why, name) for name, why in reasons.items()).items()
    ]


def some(names: Sequence[str], shown: int = 5) -> str:
    """Format the first names, and the number of the others."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


# ---- the model card ------------------------------------------------------------------------------------

CARD = "README.md"
UNKNOWN = "path/to/the/base"  # in a card of a base that is not on the hub
TRAINING = ("method", "max_steps", "epochs", "batch_size", "learning_rate", "seed")  # of the recorded training


def card_of(adapter: Adapter) -> str:
    """The model card: front matter, what was trained on which data, the prompt, and how to load the adapter.

    Bases and data sets are named if they are on the hub. A path on the machine of the training is not published.
    """
    from huggingface_hub import ModelCardData  # imported here, because `import s2ft.adapter` is faster so

    base, training = _on_hub(adapter.info.get("base_model")), adapter.info.get("training") or {}
    data = [name for name in training.get("data") or () if _on_hub(name)]
    metadata: dict[str, Any] = {"library_name": "s2ft", "tags": ["s2ft"], "base_model": base, "datasets": data}
    chosen = ", ".join(f"{key}_ratio {ratio:g}" for key, ratio in adapter.config.ratios.items()) or "units by name"
    whole = f" and {', '.join(adapter.extra_weights)} trained in full" if adapter.extra_weights else ""
    rows = {
        "base model": f"[{base}](https://huggingface.co/{base})" if base else "a local model",
        "method": f"S²FT (structured sparse fine-tuning, arXiv 2412.06289): {chosen}",
        "trained": f"{adapter.parameters:,} parameters on {len(adapter.deltas)} projections{whole}",
        "data": ", ".join([*data, *([f"{training['rows']:,} rows"] if training.get("rows") else [])]),
        "training": ", ".join(f"{name} {training[name]}" for name in TRAINING if training.get(name) is not None),
        "prompt": _prompt(adapter.info.get("prompt")),
    }
    return "\n".join(
        [
            "---",
            ModelCardData(**{name: value for name, value in metadata.items() if value}).to_yaml(),
            "---",
            "",
            f"# {adapter.name}: an S²FT adapter",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {text} |" for name, text in rows.items() if text),
            "",
            "```python",
            "import s2ft",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{base or UNKNOWN}", dtype="auto")',
            's2ft.load_adapter(model, "path/or/repository/of/this/adapter")',
            "```",
            "",
            "`s2ft chat` and `s2ft serve` use the prompt that is recorded in the adapter:",
            "",
            "```bash",
            f"s2ft chat --model {base or UNKNOWN} --adapter path/or/repository/of/this/adapter",
            "```",
            "",
        ]
    )


def _on_hub(name: Any) -> str | None:
    return name if isinstance(name, str) and REPOSITORY.fullmatch(name) and not Path(name).exists() else None


def _prompt(prompt: Any) -> str:
    if not isinstance(prompt, dict):
        return ""
    if prompt.get("form") == "text":
        return "plain text"
    system = " ".join(str(prompt["system"]).replace("|", "\\|").split()) if prompt.get("system") else ""
    return "the chat template in s2ft_config.json" + (f", with the system prompt “{system}”" if system else "")


def write_card(adapter: Adapter, directory: Path) -> None:
    """Write the model card into a folder, unless it has one."""
    if not (directory / CARD).exists():
        replace_file(directory / CARD, card_of(adapter).encode())
