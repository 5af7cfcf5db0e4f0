"""The native format: deltas and indices in safetensors, the rest in s2ft_config.json."""
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

import s2ft.version
from s2ft.adapter.adapter import Adapter
from s2ft.arch import given_couplings
from s2ft.config import S2FTConfig
from s2ft.coupling import Coupling
from s2ft.delta import Delta
from s2ft.files import replace_file
from s2ft.selection import Selection

SCHEMA = 2           # 2: couplings given by hand
TENSORS = "s2ft_adapter.safetensors"
CONFIG = "s2ft_config.json"   # not adapter_config.json, which PEFT and AutoModel would take for theirs


def write(adapter: Adapter, directory) -> None:
    """Save to `directory`, which is made if need be. Each file is written beside and renamed.

    Raises: ValueError for an empty tensor (a shard that was not gathered) or a NaN, nothing written.
    """
    tensors = {}
    for path, delta in adapter.deltas.items():
        if delta.values.numel() == 0 or not bool(torch.isfinite(delta.values).all()):
            raise ValueError(f"{path}: the delta is empty or not finite, so it is not saved")
        tensors[f"{path}.delta"] = delta.values.detach().cpu().contiguous()
        tensors[f"{path}.index"] = delta.index.to(torch.int32)
    blob = save(tensors, metadata={"format": "s2ft", "schema": str(SCHEMA)})
    config = {
        "schema": SCHEMA,
        "s2ft_version": s2ft.version.__version__,
        "name": adapter.name,
        "config": adapter.config.to_dict(),
        "projections": {path: {"dim": delta.dim, "units": adapter.selection[path].tolist()}
                        for path, delta in sorted(adapter.deltas.items())},
        "selection_digest": adapter.selection.digest,
        "base_fingerprint": adapter.fingerprint,
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
        "info": adapter.info,
    }
    if adapter.couplings is not None:
        config["couplings"] = [coupling.to_dict() for coupling in adapter.couplings]
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / TENSORS, blob)
    replace_file(directory / CONFIG, json.dumps(config, indent=1).encode())


def read(directory) -> Adapter:
    """Load strictly: what is missing, left over, misshapen or damaged is an error that names it.

    Raises: FileNotFoundError where a file is missing, ValueError for anything else.
    """
    directory = Path(directory)
    for name in (CONFIG, TENSORS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is no S²FT adapter: it has no {name}")
    header = _read_header(directory / CONFIG)
    blob = (directory / TENSORS).read_bytes()
    try:
        tensors = load(blob)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{directory / TENSORS} is truncated or damaged: {error}") from None
    projections = _field(header, "projections", dict, directory / CONFIG)
    expected = {f"{path}.{part}" for path in projections for part in ("delta", "index")}
    _check_keys(set(tensors), expected, directory / TENSORS)
    deltas = {path: _delta(path, entry, tensors) for path, entry in projections.items()}
    if hashlib.sha256(blob).hexdigest() != header.get("tensors_sha256"):
        raise ValueError(f"{directory / TENSORS} is damaged or from another save than {CONFIG}: its sha256 differs")
    selection = Selection({path: torch.tensor(entry["units"]) for path, entry in projections.items()})
    if selection.digest != header.get("selection_digest"):
        raise ValueError(f"{directory / CONFIG}: the units listed are not those that were saved")
    base = _field(header, "base_fingerprint", dict, directory / CONFIG)
    if not isinstance(base.get("dtype"), str) or not isinstance(base.get("layers"), dict):
        raise ValueError(f"{directory / CONFIG}: base_fingerprint must have dtype and layers")
    return Adapter(_field(header, "name", str, directory / CONFIG), _config(header, directory / CONFIG), selection,
                   base, deltas, header.get("info", {}), _couplings(header, directory / CONFIG))


def _read_header(path: Path) -> Dict[str, Any]:
    try:
        header = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    schema = header.get("schema") if isinstance(header, dict) else None
    if not isinstance(schema, int):
        raise ValueError(f"{path} is no S²FT adapter config: it has no schema number")
    if schema > SCHEMA:
        raise ValueError(f"{path} has schema {schema}; this s2ft reads up to {SCHEMA}: update s2ft")
    return header


def _field(header: Dict[str, Any], name: str, kind: type, path: Path) -> Any:
    if not isinstance(header.get(name), kind):
        raise ValueError(f"{path}: {name} is missing or not a {kind.__name__}")
    return header[name]


def _config(header: Dict[str, Any], path: Path) -> S2FTConfig:
    try:
        return S2FTConfig(**_field(header, "config", dict, path))
    except TypeError as error:
        raise ValueError(f"{path}: config does not fit this s2ft: {error}") from None


def _couplings(header: Dict[str, Any], path: Path) -> Optional[List[Coupling]]:
    if "couplings" not in header:
        return None
    try:
        return given_couplings([Coupling.from_dict(entry) for entry in _field(header, "couplings", list, path)])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: couplings can't be read: {error}") from None


def _check_keys(found: set, expected: set, path: Path) -> None:
    if found != expected:
        raise ValueError(f"{path}: missing keys {sorted(expected - found)}, foreign keys {sorted(found - expected)}")


def _delta(path: str, entry: Any, tensors: Dict[str, Tensor]) -> Delta:
    values, index = tensors[f"{path}.delta"], tensors[f"{path}.index"].to(torch.int64)
    if not isinstance(entry, dict) or entry.get("dim") not in (0, 1) or not isinstance(entry.get("units"), list):
        raise ValueError(f"{path}: its entry in {CONFIG} must have dim 0 or 1 and a list of units")
    dim = entry["dim"]
    if values.dim() not in (2, 3) or index.dim() != 1 or index.numel() == 0 or values.shape[dim] != index.numel():
        raise ValueError(f"{path}: delta of shape {tuple(values.shape)} and index of shape {tuple(index.shape)} "
                         f"do not fit along dim {dim}")
    if int(index.min()) < 0 or not bool((index[1:] > index[:-1]).all()):
        raise ValueError(f"{path}.index must be ascending and not negative")
    return Delta(dim, index, values)
