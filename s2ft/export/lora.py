"""PEFT's LoRA format, which PEFT and vLLM load: an S²FT delta is a LoRA with one side that is one-hot.

A delta of columns has B = the values [O, r] and A = one-hot rows [r, I] that select the inputs. A delta of rows has
B = one-hot columns [O, r] that select the outputs and A = the values [r, I]. lora_alpha equals r, so the scaling is 1
and B @ A is exactly the delta. Zeros that are appended to reach a rank change nothing. A LoRA with this structure can
be read as an adapter again.

Each module has its own rank, and PEFT reads the ranks in `rank_pattern`. vLLM reads them from release 0.32 on. Earlier
releases take the rank from the tensors' shapes and the scaling from r and lora_alpha, which is 1 for all modules here.
"""

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from s2ft.adapter.adapter import Adapter
from s2ft.attached.loading import load_adapter
from s2ft.attached.record import Record, check_fits, find_record, new_record, on_unwrapped, record_of
from s2ft.attached.report import Report
from s2ft.attached.saving import get_adapter
from s2ft.config import S2FTConfig, refuse
from s2ft.files.plain_text import replace_file, shortened
from s2ft.files.reading import FLOATS, Entries, check_finite, json_entry, open_file, parse_json, read_json, read_tensors
from s2ft.layers import kind_of
from s2ft.model.coupling import Coupling, Projection, by_key, projections_of
from s2ft.model.fingerprint import structure_of
from s2ft.model.registry import input_couplings
from s2ft.model.weights import Delta, find, weight_at
from s2ft.selection import Selection

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PROMPT = "prompt"  # key of an adapter's info, and of the metadata of the tensors file; PEFT and vLLM ignore it
PREFIX = "base_model.model."  # PEFT puts it before the names of the base's modules
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM accepts for --max-lora-rank
Sides = tuple[Tensor, Tensor]  # B [O, r], A [r, I]


def matches(folder: Path) -> bool:
    """Whether the folder has the config of a LoRA."""
    return json_entry(folder / CONFIG, "peft_type") == "LORA"


def describe(folder: Path) -> str:
    """The rank in words, and the options with which vLLM loads a folder that :func:`write` wrote."""
    config = read_json(folder / CONFIG)
    ranks = sorted({config["r"], *config["rank_pattern"].values()})
    vllm = vllm_rank(config["r"])
    return (
        f"LoRA of rank {ranks[0]}"
        + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        + ("" if vllm is None else f" (vLLM: --enable-lora --max-lora-rank {vllm})")
    )


def vllm_rank(needed: int) -> int | None:
    """The lowest value of vLLM's --max-lora-rank that is enough for a rank; None if no value is enough."""
    return next((rank for rank in VLLM_RANKS if rank >= needed), None)


# ---- writing -------------------------------------------------------------------------------------------


def write(
    adapter: Adapter,
    folder,
    model: nn.Module | None = None,
    *,
    rank: int | None = None,
    rank_pattern: bool | None = None,
) -> None:
    """Save an adapter as a LoRA, in the dtype of its deltas. Each file is replaced in one step.

    Args:
        adapter: The adapter.
        folder: The folder, which is created if it is missing.
        model: The adapter's base model, with or without adapters. It must be given.
        rank: The rank of every module; zeros are appended to reach it. Default: each module has the rank it needs.
        rank_pattern: Whether each module has the rank it needs, which is the default without `rank`. False gives every
            module the rank of the widest one, for programs that read one rank only.

    Raises:
        ValueError: The adapter belongs to another model, changes experts or convolutions, has extra weights, or needs
            a higher rank. Nothing has been written.

    Warns:
        UserWarning: A module needs a higher rank than vLLM can be set to.
    """
    model, record = _record(model, folder, adapter.couplings)
    check_fits(adapter, model, record)
    if adapter.extra_weights:
        raise ValueError(
            f"adapter {adapter.name!r} has {next(iter(adapter.extra_weights))} trained in full, and a LoRA folder "
            "holds linear layers only: export the model merged (format merged)"
        )
    sides = _sides(adapter, model, record)
    ranks = {path: a.shape[0] for path, (_, a) in sides.items()}
    rank_pattern = rank is None if rank_pattern is None else rank_pattern
    highest = _rank(max(ranks.values()), rank, rank_pattern)
    tensors = {}
    for path, (b, a) in sides.items():
        zeros = 0 if rank_pattern else highest - ranks[path]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, zeros)).contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = nn.functional.pad(b, (0, zeros)).contiguous()
    config = _config(model, list(sides), highest, adapter.info.get("base_model"))
    if rank_pattern:
        pattern = {f"^{re.escape(path)}": n for path, n in ranks.items() if n != highest}
        config["rank_pattern"], config["alpha_pattern"] = pattern, dict(pattern)
    prompt = {PROMPT: json.dumps(adapter.info[PROMPT])} if PROMPT in adapter.info else {}
    blob = save(tensors, metadata={"format": "pt", **prompt})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / TENSORS, blob)
    replace_file(folder / CONFIG, json.dumps(config, indent=2).encode())


def _record(model: nn.Module | None, folder, couplings: Sequence[Coupling] | None = None) -> tuple[nn.Module, Record]:
    """The model, which must be given, and its record, or a temporary one for a model without adapters."""
    if model is None:
        raise ValueError(
            f"{folder} is a LoRA with the structure of S²FT, which is read and written together with its base model: "
            "s2ft.import_lora(model, folder) loads it, and s2ft export --from-lora makes an adapter of it"
        )
    return model, find_record(model) or new_record(model, couplings)


def _sides(adapter: Adapter, model: nn.Module, record: Record) -> dict[str, Sides]:
    """The factors of each module, with the projections of one module joined along the rank."""
    parts: dict[str, list[Sides]] = {}
    for projection in projections_of(record.couplings):
        if projection.name in adapter.deltas:
            handle = weight_at(model, projection)
            if not handle.kind.is_linear:
                kind = "a convolution" if projection.expert is None else "the weight of experts"
                raise ValueError(
                    f"{projection.name} is {kind}, and a LoRA folder holds linear layers only: export the model merged "
                    "(format merged), or keep the adapter in the format of s2ft"
                )
            parts.setdefault(projection.path, []).append(_factors(adapter.deltas[projection.name], handle.shape))
    return {
        path: (torch.cat([b for b, _ in sides], 1), torch.cat([a for _, a in sides], 0))
        for path, sides in parts.items()
    }


def _factors(delta: Delta, shape: Sequence[int]) -> Sides:
    """The factors B and A, with B @ A = the delta [O, I]."""
    values, n = delta.values.detach().cpu(), delta.index.numel()
    one_hot = torch.zeros(n, shape[delta.dim], dtype=values.dtype).scatter_(1, delta.index.cpu()[:, None], 1)
    return (one_hot.t(), values) if delta.dim == 0 else (values, one_hot)


def _rank(needed: int, asked: int | None, rank_pattern: bool) -> int:
    """The highest rank of the LoRA."""
    highest = needed if asked is None else asked
    refuse(
        (
            isinstance(highest, bool) or not isinstance(highest, int) or highest < needed,
            f"rank must be at least {needed}, the rank of the widest slice, got {asked!r}",
        ),
        (
            asked is not None and rank_pattern,
            "rank and rank_pattern exclude each other: a pattern gives each module its own rank",
        ),
    )
    if vllm_rank(highest) is None:
        warnings.warn(
            f"the widest slice needs rank {highest}, and vLLM's max_lora_rank is {VLLM_RANKS[-1]} at most: PEFT reads "
            "this LoRA, vLLM does not. vLLM serves the adapter itself with s2ft serve --engine vllm --slices",
            stacklevel=2,
        )
    return highest


def _config(model: nn.Module, paths: list[str], rank: int, base: str | None) -> dict[str, Any]:
    """PEFT's LoraConfig of the modules `paths`, as JSON values."""
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base or getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": any(kind_of(find(model, path)).transposed for path in paths),
        "target_modules": _targets(model, paths),
    }


def _targets(model: nn.Module, paths: list[str]):
    """PEFT's target_modules for exactly these modules: the last words of their names if no other module matches, else
    the full names, else a regular expression. PEFT also matches a name with the end of a longer one."""
    names = [name for name, module in model.named_modules() if name]
    for targets in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        found = {name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)}
        if found == set(paths):
            return targets
    return "|".join(re.escape(path) for path in sorted(paths))


# ---- reading -------------------------------------------------------------------------------------------

# Fields of PEFT's config that are checked below, and fields that do not change what a LoRA computes
CHECKED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "bias"}
HARMLESS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
}


def read(
    folder, model: nn.Module | None = None, name: str | None = None, couplings: Sequence[Coupling] | None = None
) -> Adapter:
    """Read a LoRA as :func:`write` writes it as an adapter: the inverse, bit for bit.

    Every rank must be one-hot on the side that S²FT trains: the inputs of o and down, the outputs of the other
    projections. Ranks that are zero are left out. The scaling must be 1.

    Args:
        folder: The LoRA's folder.
        model: The LoRA's base model, with or without adapters. It must be given.
        name: The adapter's name; default: "default".
        couplings: The couplings of a model of no known family.

    Returns:
        The adapter, on the CPU.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The LoRA has another structure or another base; the message names the module.
    """
    name = "default" if name is None else name
    folder = Path(folder)
    config_path, tensors_path = (open_file(folder, file, "a PEFT LoRA") for file in (CONFIG, TENSORS))
    config = _checked_config(read_json(config_path), config_path)
    tensors, _ = read_tensors(tensors_path, lambda entries: _check_entries(entries, tensors_path))
    check_can_be_slices(tensors, config_path.parent)
    model, record = _record(model, folder, couplings)
    if couplings is None and _takes_inputs(tensors, record):
        record = new_record(model, input_couplings(model, record.couplings))
    projections = by_key((projection.path, projection) for projection in projections_of(record.couplings))
    deltas, units = {}, {}
    for path in sorted({key.removeprefix(PREFIX).rsplit(".", 2)[0] for key in tensors}):
        if path not in projections or projections[path][0].expert is not None:
            raise ValueError(f"{shortened(path)} is not a linear layer of this model that S²FT can train")
        b, a = (tensors[f"{PREFIX}{path}.lora_{side}.weight"] for side in "BA")
        first = projections[path][0]
        index, values = _rows_or_columns(path, first, b, a, tuple(weight_at(model, first).shape))
        for projection, chosen, delta in _split(path, projections[path], index, values):
            units[projection.name], deltas[projection.name] = chosen, delta
    if not deltas:
        raise ValueError(f"{tensors_path} changes nothing: every rank of it is zero")
    selection = Selection({key: units[key] for key in sorted(units)})
    info = {"base_model": config.get("base_model_name_or_path"), "converted_from": "LoRA"}
    info = {key: value for key, value in info.items() if isinstance(value, str)}
    with safe_open(tensors_path, "pt") as file:
        prompt = (file.metadata() or {}).get(PROMPT)
    if prompt is not None:
        info[PROMPT] = parse_json(prompt.encode(), f"{tensors_path}: the prompt in its metadata")
    return Adapter(
        name,
        S2FTConfig(units=selection.to_dict(), layout="indexed"),
        selection,
        cast("dict[str, Any]", record.fingerprint),
        deltas,
        info,
        record.custom_couplings,
        structure=structure_of(model, record.couplings, deltas),
    )


def _takes_inputs(tensors: dict[str, Tensor], record: Record) -> bool:
    """Whether the ranks of a layer whose units are outputs take an input each, as those of `i_ratio` do."""
    found = (
        tensors.get(f"{PREFIX}{one.path}.lora_A.weight") for one in projections_of(record.couplings) if not one.dim
    )
    return any(a is not None and bool(a.any()) and bool((a.count_nonzero(1) <= 1).all()) for a in found)


def _checked_config(config: Any, path: Path) -> dict[str, Any]:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = shortened(config.get("peft_type")) if isinstance(config, dict) else "missing"
        raise ValueError(f"{path} is not the config of a LoRA: its peft_type is {kind}")
    for key, value in config.items():
        if key == "bias" and value not in ("none", None) or key not in CHECKED | HARMLESS and value:
            raise ordinary_lora(path.parent, f"{shortened(key)} is {shortened(value)}, which S²FT does not have")
    for rank, alpha in (("r", "lora_alpha"), ("rank_pattern", "alpha_pattern")):
        if config.get(rank) != config.get(alpha):
            raise ordinary_lora(
                path.parent, f"{alpha} is {shortened(config.get(alpha))} and {rank} {shortened(config.get(rank))}"
            )
    return config


def ordinary_lora(folder: Path, sign: str) -> ValueError:
    """Return the error for a LoRA that s2ft has not written.

    Args:
        folder: The LoRA's folder.
        sign: How it is known, in words.
    """
    return ValueError(
        f"{folder} is an ordinary LoRA ({sign}), which can't become an S²FT adapter, because it changes every element "
        "of a weight: merge it by PEFT (PeftModel.from_pretrained(model, folder).merge_and_unload()), and give s2ft "
        "the merged model"
    )


def check_can_be_slices(tensors: dict[str, Tensor], folder: Path) -> None:
    """Raises: ValueError: A layer's A and B both mix elements of its weight, which no base is needed to see."""
    for key in (key for key in tensors if key.endswith(".lora_A.weight")):
        path = key.removesuffix(".lora_A.weight")
        a, b = tensors[key], tensors[f"{path}.lora_B.weight"]
        if bool((a.count_nonzero(1) > 1).any()) and bool((b.count_nonzero(0) > 1).any()):
            name = path.removeprefix(PREFIX)
            raise ordinary_lora(folder, f"{shortened(name)} does not have the structure of S²FT")


def _check_entries(entries: Entries, path: Path) -> None:
    for name, (dtype, shape) in entries.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight", name)
        if found is None:
            raise ValueError(f"{path}: {shortened(name)} is not the A or B of a linear layer's LoRA")
        other = {"A": "B", "B": "A"}[name[-8]]
        refuse(
            (
                dtype not in FLOATS or len(shape) != 2 or 0 in shape,
                f"{path}: {shortened(name)} must be a floating-point matrix, not {dtype} {shape}",
            ),
            (
                f"{PREFIX}{found[1]}.lora_{other}.weight" not in entries,
                f"{path}: {shortened(found[1])} has no lora_{other}",
            ),
        )


def _rows_or_columns(
    path: str, projection: Projection, b: Tensor, a: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return index [n] and values [n, I] or [O, n], in the order of the ranks that are not zero."""
    if (b.shape[0], a.shape[1]) != shape or b.shape[1] != a.shape[0] or b.dtype != a.dtype:
        raise ValueError(f"{path}: B {tuple(b.shape)} and A {tuple(a.shape)} do not fit its weight {shape}")
    check_finite(f"{path}.lora_A", a)
    check_finite(f"{path}.lora_B", b)
    one_hot, values = (b.t(), a) if projection.dim == 0 else (a, b.t())  # both [r, …]
    unit, side = ("row", "column")[projection.dim], f"lora_{'BA'[projection.dim]}"
    used = one_hot.count_nonzero(1) > 0  # the other ranks add nothing
    wrong = used & ((one_hot.count_nonzero(1) > 1) | (one_hot.sum(1) != 1))
    if bool(wrong.any()):
        raise ValueError(
            f"{path} does not have the structure of S²FT: rank {int(wrong.int().argmax())} of {side} must be 1 for one "
            f"{unit} of the weight and 0 for all others"
        )
    index = one_hot[used].argmax(1)
    if index.unique().numel() < index.numel():
        raise ValueError(f"{path} does not have the structure of S²FT: two ranks of {side} select the same {unit}")
    return index, values[used] if projection.dim == 0 else values[used].t()


def _split(path: str, projections: list[Projection], index: Tensor, values: Tensor):
    """Yield (projection, units [m], delta) for each projection of one weight that has units in the index."""
    dim, rest = projections[0].dim, set(index.tolist())
    index, order = index.sort()
    for projection in projections:
        inside = torch.isin(projection.elements(torch.arange(projection.count, device="cpu")), index)
        units = inside.view(projection.count, projection.unit).all(1).nonzero().flatten()
        if units.numel():
            elements = projection.elements(units)
            place = order[torch.searchsorted(index, elements)]
            rest -= set(elements.tolist())
            yield projection, units, Delta(dim, elements, values.index_select(dim, place).contiguous())
    if rest:
        raise ValueError(f"{path}: {('row', 'column')[dim]} {min(rest)} belongs to no whole unit that S²FT can train")


@on_unwrapped
def import_lora(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str = "default",
    *,
    couplings: Sequence[Coupling] | None = None,
) -> Report:
    """Load a LoRA that has the structure of S²FT as an adapter, and make it active.

    Every rank of the LoRA must be one-hot on the side that S²FT trains, as in a folder that :func:`export_lora` wrote.

    Args:
        model: The LoRA's base model, with or without adapters.
        directory: The LoRA's folder.
        name: The name of the new adapter.
        couplings: The couplings of a model of no known family.

    Returns:
        A report of what the adapter has trained, as of :func:`s2ft.load_adapter`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The LoRA has another structure or another base, or the name is taken. The model has not changed.

    Example:
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> s2ft.export_lora(model, "lora")
        >>> base = s2ft.detach(model)
        >>> _ = s2ft.import_lora(base, "lora", "math")
        >>> s2ft.list_adapters(base)
        ['math']
    """
    return load_adapter(model, read(directory, model, name, couplings))


@on_unwrapped
def export_lora(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str | None = None,
    rank: int | None = None,
    rank_pattern: bool | None = None,
) -> None:
    """Save one adapter of a model as a LoRA folder that PEFT and vLLM load.

    The LoRA adds exactly the adapter's numbers to every weight. PEFT and vLLM multiply by the base and by the LoRA
    separately, so outputs differ from this model's by rounding.

    Args:
        model: A model with adapters.
        directory: The folder to write, which is created if it is missing.
        name: The adapter; default: the trainable one, else the active one, else the first one loaded.
        rank: The rank of every module; zeros are appended to reach it. Default: each module has the rank it needs.
        rank_pattern: Whether each module has the rank it needs, which is the default without `rank`. False gives every
            module the rank of the widest one, for programs that read one rank only.

    Raises:
        ValueError: The adapter is unknown, changes experts or convolutions, has extra weights, or needs a higher rank.
            Nothing has been written.

    Example:
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.export_lora(model, "math-lora")
        >>> from peft import PeftModel
        >>> peft_model = PeftModel.from_pretrained(s2ft.detach(model), "math-lora")
    """
    adapter = get_adapter(model, record_of(model).default_name if name is None else name)
    write(adapter, directory, model, rank=rank, rank_pattern=rank_pattern)
