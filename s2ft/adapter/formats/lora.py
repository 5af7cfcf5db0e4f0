"""PEFT's LoRA format, for what reads that: an S²FT delta is a LoRA of which one side is one-hot.

Columns: B = the values [O, r], A = one-hot rows [r, I] that pick the inputs. Rows: B = one-hot columns [O, r] that
place the outputs, A = the values [r, I]. lora_alpha = r, so the scaling is 1 and B @ A is the delta, every number of
it, whatever zeros are appended to reach a rank. The other way round such a LoRA is an adapter again.
"""

import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from s2ft.adapter.adapter import Adapter, check_fits
from s2ft.api import new_attachment
from s2ft.attached.record import RECORD, Attachment
from s2ft.config import S2FTConfig
from s2ft.files.reading import FLOATS, check_adapter_name, check_finite, open_file, read_json, read_tensors, shortened
from s2ft.files.writing import replace_file
from s2ft.layers import kind_of
from s2ft.model.coupling import Coupling, Projection, projections_of
from s2ft.model.delta import Delta
from s2ft.model.weights import find, weight_at
from s2ft.selection import Selection

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the names of the base's modules
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank can be
Sides = tuple[Tensor, Tensor]  # B [O, r], A [r, I]


# ---- out -----------------------------------------------------------------------------------------------


def write(adapter: Adapter, model: nn.Module, directory, rank: int | None = None, rank_pattern: bool = False) -> None:
    """Save `adapter` as a LoRA of `model`, in the dtype of its deltas. Each file is written beside and renamed.

    Args:
        model: the adapter's base, with or without adapters.
        directory: made if need be.
        rank: the rank of every module, to which zeros are appended. Default: the lowest that is enough of those
            that vLLM can be set to, 8 to 512, with a warning where none is.
        rank_pattern: give every module the rank it needs, without zeros; PEFT reads it, vLLM does not.
    Raises: ValueError for an adapter of another model; for experts and convolutions, which are no LoRA of a linear
        layer; for weights that are trained whole; for a rank that is too low. Nothing is written then.
    """
    record = _record(model)
    check_fits(adapter, model, record)
    if adapter.extra_weights:
        raise ValueError(
            f"adapter {adapter.name!r} has {next(iter(adapter.extra_weights))} trained whole, which a "
            "LoRA folder does not hold here: export the model merged (format merged)"
        )
    sides = _sides(adapter, model, record)
    ranks = {path: a.shape[0] for path, (_, a) in sides.items()}
    uniform = _rank(max(ranks.values()), rank, rank_pattern)
    tensors = {}
    for path, (b, a) in sides.items():
        zeros = 0 if rank_pattern else uniform - ranks[path]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, zeros)).contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = nn.functional.pad(b, (0, zeros)).contiguous()
    config = _config(model, list(sides), uniform, adapter.info.get("base_model"))
    if rank_pattern:
        pattern = {f"^{re.escape(path)}": n for path, n in ranks.items() if n != uniform}
        config["rank_pattern"], config["alpha_pattern"] = pattern, dict(pattern)
    blob = save(tensors, metadata={"format": "pt"})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / TENSORS, blob)
    replace_file(directory / CONFIG, json.dumps(config, indent=2).encode())


def rank_of(directory) -> int:
    """r of a folder that :func:`write` wrote."""
    return read_json(Path(directory) / CONFIG)["r"]


def _record(model: nn.Module, couplings: Sequence[Coupling] | None = None) -> Attachment:
    """Of a model without adapters one that is not kept."""
    return model.__dict__[RECORD] if RECORD in model.__dict__ else new_attachment(model, couplings)


def _sides(adapter: Adapter, model: nn.Module, record: Attachment) -> dict[str, Sides]:
    """Of every module, with all its projections one after the other."""
    parts: dict[str, list[Sides]] = {}
    for projection in projections_of(record.couplings):
        if projection.name in adapter.deltas:
            _check_linear(model, projection)
            shape = weight_at(model, projection).shape
            parts.setdefault(projection.path, []).append(_factors(adapter.deltas[projection.name], shape))
    return {
        path: (torch.cat([b for b, _ in sides], 1), torch.cat([a for _, a in sides], 0))
        for path, sides in parts.items()
    }


def _check_linear(model: nn.Module, projection: Projection) -> None:
    if not weight_at(model, projection).kind.is_linear:
        kind = "a convolution" if projection.expert is None else "the weight of experts"
        raise ValueError(
            f"{projection.name} is {kind}, and a LoRA folder has linear layers only: export the model "
            "merged (format merged), or keep the adapter as it is"
        )


def _factors(delta: Delta, shape: Sequence[int]) -> Sides:
    """B, A with B @ A = the delta [O, I]."""
    values, n = delta.values.detach().cpu(), delta.index.numel()
    one_hot = torch.zeros(n, shape[delta.dim], dtype=values.dtype)
    one_hot[torch.arange(n), delta.index.cpu()] = 1
    return (one_hot.t(), values) if delta.dim == 0 else (values, one_hot)


def _rank(needed: int, asked: int | None, rank_pattern: bool) -> int:
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or asked < needed:
            raise ValueError(f"rank must be at least {needed}, which the widest slice needs, got {asked!r}")
        if rank_pattern:
            raise ValueError("rank and rank_pattern exclude each other: a pattern gives every module its own rank")
        return asked
    if rank_pattern:
        return needed
    if needed > RANKS[-1]:
        warnings.warn(
            f"the widest slice needs rank {needed}, and vLLM's max_lora_rank is {RANKS[-1]} at most: PEFT "
            "reads this LoRA, vLLM does not; export the model merged for that"
        )
        return needed
    return next(rank for rank in RANKS if rank >= needed)


def _config(model: nn.Module, paths: list[str], rank: int, base: str | None) -> dict[str, Any]:
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
    """What names exactly these modules: the last words of their names where those do, else whole names, else a regular
    expression. PEFT takes a name for the end of a longer one."""
    names = [name for name, module in model.named_modules() if name]
    for targets in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        found = {name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)}
        if found == set(paths):
            return targets
    return "|".join(re.escape(path) for path in sorted(paths))


# ---- in ------------------------------------------------------------------------------------------------

# Fields of PEFT's config that do not change what a LoRA computes, or that are read below.
READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias"}
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


def read(directory, model: nn.Module, name: str = "default", couplings: Sequence[Coupling] | None = None) -> Adapter:
    """The adapter that a LoRA folder is, if it is one: with every rank one-hot on the side that S²FT trains, the
    inputs of o and down or the outputs of the rest, up to a factor and to ranks that are zero. Numbers are multiplied
    by the scaling and that factor, rounded once to the LoRA's dtype: exact where both are powers of two. Heads of which
    a part is named are filled up with zeros.

    Args:
        model: the LoRA's base, with or without adapters.
        name: the adapter's. couplings: of a model of no known family, given by hand.
    Raises: FileNotFoundError where a file is missing; ValueError for any other LoRA, naming the module and why.
    """
    check_adapter_name(name, "name")
    directory = Path(directory)
    config_path, tensors_path = (open_file(directory, file, "PEFT LoRA") for file in (CONFIG, TENSORS))
    config = _checked_config(read_json(config_path), config_path)
    tensors, _ = read_tensors(tensors_path, lambda entries: _check_entries(entries, tensors_path))
    record = _record(model, couplings)
    given = record.couplings if record.given else None
    sites: dict[str, list[Projection]] = {}
    for projection in projections_of(record.couplings):
        sites.setdefault(projection.path, []).append(projection)
    deltas, units = {}, {}
    for path in sorted({key.removeprefix(PREFIX).rsplit(".", 2)[0] for key in tensors}):
        if path not in sites or sites[path][0].expert is not None:
            raise ValueError(f"{shortened(path)} is no linear layer of this model that S²FT trains")
        b, a = (tensors[f"{PREFIX}{path}.lora_{side}.weight"] for side in "BA")
        scaling = _scaling(config, path, a.shape[0], config_path)
        shape = tuple(weight_at(model, sites[path][0]).shape)
        index, values = _rows_or_columns(path, sites[path][0], b, a, scaling, shape)
        for projection, chosen, delta in _split(path, sites[path], index, values):
            units[projection.name], deltas[projection.name] = chosen, delta
    if not deltas:
        raise ValueError(f"{tensors_path} changes nothing: every rank of it is zero")
    selection = Selection({key: units[key] for key in sorted(units)})
    info = {"base_model": config.get("base_model_name_or_path"), "converted_from": "LoRA"}
    return Adapter(
        name,
        S2FTConfig(units=selection.to_dict(), layout="indexed"),
        selection,
        record.fingerprint,
        deltas,
        {key: value for key, value in info.items() if isinstance(value, str)},
        given,
    )


def _checked_config(config: Any, path: Path) -> dict[str, Any]:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = shortened(config.get("peft_type")) if isinstance(config, dict) else "no object"
        raise ValueError(f"{path} is of no LoRA: its peft_type is {kind}")
    for key, value in config.items():
        if key == "bias" and value not in ("none", None) or key not in READ | HARMLESS and value:
            raise ValueError(f"{path}: {shortened(key)} is {shortened(value)}, and S²FT has no such thing")
    for key in ("r", "lora_alpha"):
        _check_positive(config.get(key), key, path)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {key} must be an object")
        for value in patterns.values():
            _check_positive(value, key, path)
    return config


def _check_positive(value: Any, key: str, path: Path) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**31:
        raise ValueError(f"{path}: {key} must be a positive number, got {shortened(value)}")


def _check_entries(entries: dict[str, tuple[str, tuple[int, ...]]], path: Path) -> None:
    for name, (dtype, shape) in entries.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight", name)
        if not found:
            raise ValueError(f"{path}: {shortened(name)} is not the A or B of a linear layer's LoRA")
        if dtype not in FLOATS or len(shape) != 2 or 0 in shape:
            raise ValueError(f"{path}: {shortened(name)} must be a floating-point matrix, not {dtype} {shape}")
        other = {"A": "B", "B": "A"}[name[-8]]
        if f"{PREFIX}{found[1]}.lora_{other}.weight" not in entries:
            raise ValueError(f"{path}: {shortened(found[1])} has no lora_{other}")


def _scaling(config: dict[str, Any], path: str, rank: int, file: Path) -> float:
    said = _pattern(config.get("rank_pattern"), path, config["r"])
    if said != rank:
        raise ValueError(f"{file}: {path} is said to have rank {said}, and its tensors have {rank}")
    alpha = _pattern(config.get("alpha_pattern"), path, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, Any] | None, path: str, default):
    """As PEFT has it: the first pattern that is the whole name, or its end after a dot. Only names are taken for
    patterns, with a ^ before or a backslash in them, since expressions of others can take for ever."""
    for pattern, value in (patterns or {}).items():
        plain = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"))
        if re.search(r"[^\w.\-]", plain):
            raise ValueError(f"the pattern {shortened(pattern)} is no module's name, and no other is read")
        if path == plain or not pattern.startswith("^") and path.endswith(f".{plain}"):
            return value
    return default


def _rows_or_columns(
    path: str, projection: Projection, b: Tensor, a: Tensor, scaling: float, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """index [n] and values [n, I] or [O, n], in the order of the ranks that are not zero."""
    if (b.shape[0], a.shape[1]) != shape or b.shape[1] != a.shape[0] or b.dtype != a.dtype:
        raise ValueError(f"{path}: B {tuple(b.shape)} and A {tuple(a.shape)} are no LoRA of its weight {shape}")
    check_finite(f"{path}.lora_A", a)
    check_finite(f"{path}.lora_B", b)
    one_hot, values = (b.t(), a) if projection.dim == 0 else (a, b.t())  # both [r, …]
    side = f"lora_{'BA'[projection.dim]}'s {('columns', 'rows')[projection.dim]}"
    nonzeros, used = one_hot.count_nonzero(1), values.count_nonzero(1) > 0
    if bool((used & (nonzeros > 1)).any()):
        which = int((used * nonzeros).argmax())
        raise ValueError(
            f"{path} is no S²FT: of {side} number {which} has {int(nonzeros[which])} numbers that are not "
            f"zero, and one is all that picks a {('row', 'column')[projection.dim]} of the weight"
        )
    kept = nonzeros == 1  # the rest adds nothing
    index = one_hot[kept].abs().argmax(1)
    if index.unique().numel() < index.numel():
        raise ValueError(f"{path} is no S²FT: two of {side} pick the same {('row', 'column')[projection.dim]}")
    factors = one_hot[kept].double().sum(1) * scaling
    values = (values[kept].double() * factors[:, None]).to(values.dtype)
    check_finite(f"{path}: the LoRA times its scaling", values)
    return index, values if projection.dim == 0 else values.t()


def _split(path: str, projections: list[Projection], index: Tensor, values: Tensor):
    """(projection, units [m], delta) of every projection of one weight that the index names elements of."""
    dim, rest = projections[0].dim, set(index.tolist())
    for projection in projections:
        elements = projection.elements(torch.arange(projection.count))
        units = torch.isin(elements, index).view(projection.count, projection.unit).any(1).nonzero().flatten()
        if units.numel() == 0:
            continue
        elements = projection.elements(units)
        place = torch.full((projection.extent,), -1)
        place[index] = torch.arange(index.numel())
        place = place[elements]
        there = values.index_select(dim, place.clamp(min=0))
        mask = (place >= 0)[:, None] if dim == 0 else (place >= 0)[None, :]
        rest -= set(elements.tolist())
        yield projection, units, Delta(dim, elements, torch.where(mask, there, 0).contiguous())
    if rest:
        raise ValueError(f"{path}: {('row', 'column')[dim]} {min(rest)} is in no unit that S²FT trains")
