"""Adapters on the Hugging Face hub: finding the folder of an adapter, and its model card."""

import re
from pathlib import Path
from typing import Any

from s2ft.adapter.adapter import Adapter
from s2ft.adapter.folders import adapter_folder
from s2ft.adapter.formats import native
from s2ft.files.writing import replace_file

FILES = [native.CONFIG, native.TENSORS]
CARD = "README.md"
WORD = r"[A-Za-z0-9][\w.\-]*"
REPOSITORY = re.compile(rf"{WORD}/{WORD}(?:@[\w./\-]+)?", re.ASCII)  # org/name, org/name@revision


def resolve(directory_or_repo, **options) -> Path:
    """Return the folder of an adapter. The files of a repository are downloaded, unless they are in the cache.

    Args:
        directory_or_repo: A folder of an adapter, the output folder of a run, or a repository on the hub, as
            "org/name" or "org/name@revision". A folder that exists takes precedence over a repository.
        options: Arguments of huggingface_hub's snapshot_download, for example token, cache_dir or local_files_only.

    Returns:
        The folder. If it does not exist, the reader of the folder raises the error.

    Raises:
        FileNotFoundError: There is neither a folder nor a repository, or the run has not saved an adapter.
    """
    path = Path(directory_or_repo).expanduser()
    if path.exists() or not isinstance(directory_or_repo, str) or not REPOSITORY.fullmatch(directory_or_repo):
        return adapter_folder(path)
    from huggingface_hub import snapshot_download  # imported here, because `import s2ft.adapter` is faster so

    repo_id, _, revision = directory_or_repo.partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=FILES, **options))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors: no such repository, no network
        first = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"adapter {directory_or_repo} doesn't exist as a folder, and the hub gives no adapter of this name: "
            f"{first or type(error).__name__}"
        ) from error


# ---- the model card ------------------------------------------------------------------------------------


METHODS = {"sft": "supervised fine-tuning", "dpo": "direct preference optimization", "grpo": "GRPO"}  # by command


def card_of(adapter: Adapter) -> str:
    """The model card: front matter, what was trained on which data, the prompt, and how to load the adapter.

    Bases and data sets are named if they are on the hub. A path on the machine of the training is not published.
    """
    from huggingface_hub import ModelCardData  # imported here, because `import s2ft.adapter` is faster so

    base, training = _on_hub(adapter.info.get("base_model")), adapter.info.get("training") or {}
    data = [name for name in training.get("data") or () if _on_hub(name)]
    metadata: dict[str, Any] = {"library_name": "s2ft", "tags": ["s2ft"]}
    metadata |= {"base_model": base} if base else {}
    metadata |= {"datasets": data} if data else {}
    rows = {
        "base model": f"[{base}](https://huggingface.co/{base})" if base else "a local model",
        "method": _method(adapter, training),
        "trained": _trained(adapter),
        "data": ", ".join([*data, *([f"{training['rows']:,} rows"] if training.get("rows") else [])]),
        "training": _length(training),
        "prompt": _prompt(adapter.info.get("prompt")),
    }
    return "\n".join(
        [
            "---",
            ModelCardData(**metadata).to_yaml(),
            "---",
            "",
            f"# {adapter.name}: an S²FT adapter",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {text} |" for name, text in rows.items() if text),
            "",
            *_how_to_load(base or "path/to/the/base"),
            "",
        ]
    )


def _on_hub(name: Any) -> str | None:
    return name if isinstance(name, str) and REPOSITORY.fullmatch(name) and not Path(name).exists() else None


def _method(adapter: Adapter, training: dict[str, Any]) -> str:
    keys = ", ".join(f"{key}_ratio {ratio:g}" for key, ratio in adapter.config.ratios.items()) or "units given by name"
    chosen = "" if adapter.config.units is not None else f", units chosen by {adapter.config.selection}"
    kind = METHODS.get(training.get("method", ""), "")
    return f"S²FT (structured sparse fine-tuning, arXiv 2412.06289){f', {kind}' if kind else ''}: {keys}{chosen}"


def _trained(adapter: Adapter) -> str:
    whole = f" and {', '.join(adapter.extra_weights)} trained in full" if adapter.extra_weights else ""
    return f"{adapter.parameters:,} parameters on {len(adapter.deltas)} projections{whole}"


def _length(training: dict[str, Any]) -> str:
    length = {"steps": training.get("max_steps"), "epochs": training.get("epochs")}
    known = [f"{value:g} {name}" for name, value in length.items() if value][:1]
    known += [f"{training['batch_size']} rows an update"] if training.get("batch_size") else []
    known += [f"{name} {training[key]:g}" for key, name in (("learning_rate", "learning rate"), ("seed", "seed"))
              if training.get(key) is not None]  # fmt: skip
    return ", ".join(known)


def _prompt(prompt: Any) -> str:
    if not isinstance(prompt, dict):
        return ""
    if prompt.get("form") == "text":
        return "plain text"
    system = " ".join(str(prompt["system"]).replace("|", "\\|").split()) if prompt.get("system") else ""
    return "the chat template in s2ft_config.json" + (f", with the system prompt “{system}”" if system else "")


def _how_to_load(base: str) -> list[str]:
    return [
        "```python",
        "import s2ft",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")',
        's2ft.load_adapter(model, "path/or/repository/of/this/adapter")',
        "```",
        "",
        "`s2ft chat` and `s2ft serve` use the prompt that is recorded in the adapter:",
        "",
        "```bash",
        f"s2ft chat --model {base} --adapter path/or/repository/of/this/adapter",
        "```",
    ]


def write_card(adapter: Adapter, directory: Path) -> None:
    """Write the model card into a folder, unless it has one."""
    if not (directory / CARD).exists():
        replace_file(directory / CARD, card_of(adapter).encode())
