"""The native format: deltas and indices in a safetensors file, the rest in s2ft_config.json.

Reading is strict, because a folder may have any origin: see :mod:`s2ft.files.reading`.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

import s2ft
from s2ft.adapter.adapter import Adapter
from s2ft.config import S2FTConfig, check_adapter_name, refuse
from s2ft.files.plain_text import replace_file, shortened
from s2ft.files.reading import (
    AN_ADAPTER,
    CONFIG,
    DTYPE_NAMES,
    FLOATS,
    INTEGERS,
    MAX_CONFIG,
    PENDING,
    TENSORS,
    Entries,
    check_finite,
    open_file,
    parse_json,
    read_bytes,
    read_consistent,
    read_some_tensors,
    read_tensors,
)
from s2ft.model.coupling import (
    Coupling,
    check_parameter_name,
    check_projection_name,
    checked_couplings,
    digest_of,
    projections_of,
)
from s2ft.model.fingerprint import Location, Structure
from s2ft.model.weights import Delta
from s2ft.selection import Selection

SCHEMA = 1
EXTRA = "extra_weights/"  # prefix of the extra weights' names among the tensors
# Fields that config_sha256 covers. The other fields have a digest of their own, or define how the file is read.
DIGESTED = ("name", "config", "projections", "base_fingerprint", "info", "couplings", "extra_weights", "structure")
FIELDS = {"schema", "s2ft_version", "selection_digest", "tensors_sha256", "config_sha256", *DIGESTED}
MAX_ELEMENTS = 2**24  # of one side of a weight whose size is read from couplings in the file


def describe(folder: Path) -> str:
    """The adapter's name and size in words."""
    adapter = read(folder)
    return f"adapter {adapter.name!r}, {adapter.parameters:,} parameters"


def write(adapter: Adapter, folder) -> None:
    """Save an adapter.

    Args:
        adapter: The adapter.
        folder: The folder, which is created if it is missing. An adapter in it is replaced in one step, see
            :mod:`s2ft.files.reading`.

    Raises:
        ValueError: A tensor is empty (a shard that was not gathered) or not finite, or a name could not be read
            again. Nothing has been written.
    """
    check_adapter_name(adapter.name, "save")
    tensors = {}
    for path, delta in adapter.deltas.items():
        check_projection_name(path, "save")
        if delta.values.numel() == 0 or not bool(torch.isfinite(delta.values).all()):
            raise ValueError(f"{path}: the delta is empty or not finite, so it is not saved")
        tensors[f"{path}.delta"] = delta.values.detach().cpu().contiguous()
        tensors[f"{path}.index"] = delta.index.to(torch.int32)
    for name, value in adapter.extra_weights.items():
        check_parameter_name(name, "save")
        if DTYPE_NAMES.get(value.dtype) not in FLOATS:  # PyTorch can't say of each of these dtypes what is finite
            raise ValueError(f"{name}: extra weights are saved as {', '.join(FLOATS)}, not as {value.dtype}")
        if value.numel() == 0 or not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: the weight is empty or not finite, so it is not saved")
        tensors[EXTRA + name] = value.detach().cpu().contiguous()
    blob = save(tensors, metadata={"format": "s2ft", "schema": str(SCHEMA)})
    config = {
        "schema": SCHEMA,
        "s2ft_version": s2ft.__version__,
        "name": adapter.name,
        "config": adapter.config.to_dict(),
        "projections": {
            path: {"dim": delta.dim, "units": adapter.selection.units[path].tolist()}
            for path, delta in sorted(adapter.deltas.items())
        },
        "selection_digest": adapter.selection.digest,
        "base_fingerprint": adapter.fingerprint,
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
        "info": adapter.info,
    }
    optional = {
        "couplings": [coupling.to_dict() for coupling in adapter.couplings or ()],
        "structure": adapter.structure
        and {
            "locations": {
                name: {key: value for key, value in asdict(found).items() if value is not None}
                for name, found in sorted(adapter.structure.locations.items())
            },
            "base_weights": adapter.structure.base_weights,
        },
        "extra_weights": {
            name: {"dtype": DTYPE_NAMES[value.dtype], "shape": list(value.shape)}
            for name, value in sorted(adapter.extra_weights.items())
        },
    }
    config.update({name: value for name, value in optional.items() if value})
    config = json.loads(json.dumps(config, allow_nan=False))  # the digest needs keys and lists as they are read
    config["config_sha256"] = _digest(config)
    _write_folder(Path(folder).expanduser(), json.dumps(config).encode(), blob)


def _write_folder(directory: Path, config: bytes, tensors: bytes) -> None:
    """Write the files of an adapter in one step, see :mod:`s2ft.files.reading`."""
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / PENDING, config)
    replace_file(directory / TENSORS, tensors)
    try:
        os.replace(directory / PENDING, directory / CONFIG)
    except FileNotFoundError:  # another rank that writes the same adapter has renamed it
        replace_file(directory / CONFIG, config)


def _digest(config: dict[str, Any]) -> str:
    kept = {name: config[name] for name in DIGESTED if name in config}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read(folder) -> Adapter:
    """Read an adapter. Anything missing, left over, misshapen or damaged is an error that names it.

    Args:
        folder: The adapter's folder.

    Returns:
        The adapter, on the CPU.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or its content is not valid.
    """
    return read_files(folder)[0]


def read_files(folder) -> tuple[Adapter, dict[str, bytes]]:
    """Read an adapter as :func:`read` does. Returns it with the bytes of both files by file name."""
    return read_consistent(Path(folder), _read)


def read_without_values(folder) -> Adapter:
    """Read an adapter as :func:`read` does, but leave its values in the file.

    Args:
        folder: The adapter's folder.

    Returns:
        The adapter. The values of its deltas and its extra weights are on the meta device.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or its content is not valid. Damage inside the values is not found.
    """
    return read_consistent(Path(folder), lambda path: _read(path, False)[0])


def _read(path: Path, with_values: bool = True) -> tuple[Adapter, dict[str, bytes]]:
    """Read an adapter by the path of its config. Without values the bytes of the files are not returned."""
    tensors_path = open_file(path.parent, TENSORS, AN_ADAPTER)
    content = read_bytes(path, MAX_CONFIG)
    header = _read_header(content, path)
    check_adapter_name(_field(header, "name", str, path), str(path))
    projections = _projections(header, path)
    extra_weights = _extra_weights(header, path)

    indices = {f"{name}.index" for name in projections}
    check = partial(_check_entries, projections=projections, extra_weights=extra_weights, path=tensors_path)
    if with_values:
        tensors, blob = read_tensors(tensors_path, check)
    else:
        tensors, blob = read_some_tensors(tensors_path, check, lambda name: name in indices), None
    deltas = {name: _delta(name, entry, tensors) for name, entry in projections.items()}
    if blob is not None and hashlib.sha256(blob).hexdigest() != header.get("tensors_sha256"):
        raise ValueError(f"{tensors_path} is damaged, or was saved with another {CONFIG}: its sha256 differs")
    for name in extra_weights:
        check_finite(name, tensors[EXTRA + name])
    units = {name: entry["units"] for name, entry in projections.items()}
    if digest_of(units) != header.get("selection_digest"):
        raise ValueError(f"{path}: the units listed are not the ones that were saved")
    adapter = Adapter(
        header["name"],
        _config(header, path),
        Selection({name: torch.tensor(numbers, device="cpu") for name, numbers in units.items()}),
        _fingerprint(header, path),
        deltas,
        _field(header, "info", dict, path),
        _couplings(header, path),
        {name: tensors[EXTRA + name] for name in extra_weights},
        _structure(header, path) if "structure" in header else None,
    )
    if header.get("config_sha256", _digest(header)) != _digest(header):
        raise ValueError(f"{path} is damaged: its config_sha256 differs")
    return adapter, {} if blob is None else {CONFIG: content, TENSORS: blob}


def _read_header(content: bytes, path: Path) -> dict[str, Any]:
    header = parse_json(content, str(path))
    schema = header.get("schema") if isinstance(header, dict) else None
    refuse(
        (type(schema) is not int or schema < 1, f"{path} is not an S²FT adapter config: it has no schema number"),
        (
            schema != SCHEMA,
            f"{path} has schema {schema!r:.60}, and this version of s2ft reads schema {SCHEMA}: use the version "
            "that saved it, or train and save the adapter again",
        ),
    )
    foreign = sorted(header.keys() - FIELDS)
    if foreign:
        raise ValueError(f"{path} has foreign fields {shortened(foreign)}")
    return header


def _field(header: dict[str, Any], name: str, kind: type, path: Path) -> Any:
    if not isinstance(header.get(name), kind):
        raise ValueError(f"{path}: {name} is missing or not a {kind.__name__}")
    return header[name]


def _projections(header: dict[str, Any], path: Path) -> dict[str, Any]:
    """The checked entries by projection: {"dim": 0 or 1, "units": ascending numbers}."""
    projections = _field(header, "projections", dict, path)
    if not projections:
        raise ValueError(f"{path}: projections is empty")
    for name, entry in projections.items():
        check_projection_name(name, str(path))
        units = entry.get("units") if isinstance(entry, dict) else None
        if not isinstance(units, list) or type(entry.get("dim")) is not int or entry["dim"] not in (0, 1):
            raise ValueError(f"{name}: its entry in {CONFIG} must have dim 0 or 1 and a list of units")
        if (
            not units
            or any(type(unit) is not int or not 0 <= unit < 2**31 for unit in units)
            or any(a >= b for a, b in zip(units, units[1:]))
        ):
            raise ValueError(f"{name}: units in {CONFIG} must be ascending numbers from 0, and at least one")
    return projections


def _extra_weights(header: dict[str, Any], path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each extra weight, by name."""
    if "extra_weights" not in header:
        return {}
    found = {}
    for name, entry in _field(header, "extra_weights", dict, path).items():
        check_parameter_name(name, str(path))
        if (
            not isinstance(entry, dict)
            or entry.keys() != {"dtype", "shape"}
            or entry["dtype"] not in FLOATS
            or not isinstance(entry["shape"], list)
            or any(type(n) is not int or n < 1 for n in entry["shape"])
        ):
            raise ValueError(f"{path}: {shortened(name)} in extra_weights must have a floating-point dtype and a shape")
        found[name] = (entry["dtype"], tuple(entry["shape"]))
    if not found:
        raise ValueError(f"{path}: extra_weights is empty, but an adapter with this field has at least one")
    return found


def _config(header: dict[str, Any], path: Path) -> S2FTConfig:
    try:
        return S2FTConfig(**_field(header, "config", dict, path))
    except TypeError as error:
        raise ValueError(f"{path}: config does not fit this s2ft: {error}") from None


def _fingerprint(header: dict[str, Any], path: Path) -> dict[str, Any]:
    base = _field(header, "base_fingerprint", dict, path)
    if not isinstance(base.get("dtype"), str) or not isinstance(base.get("layers"), dict):
        raise ValueError(f"{path}: base_fingerprint must have dtype and layers")
    for layer in base["layers"].values():
        samples = layer.get("samples") if isinstance(layer, dict) else None
        if (
            not isinstance(samples, list)
            or not isinstance(layer.get("digest"), str)
            or not all(isinstance(value, float) and math.isfinite(value) for value in samples)
        ):
            raise ValueError(f"{path}: every layer of base_fingerprint must have a digest and samples")
    return base


def _couplings(header: dict[str, Any], path: Path) -> list[Coupling] | None:
    if "couplings" not in header:
        return None
    try:
        couplings = [Coupling.from_dict(entry) for entry in _field(header, "couplings", list, path)]
        for projection in projections_of(couplings):
            check_projection_name(projection.path, "couplings")
            count, unit = projection.count, projection.unit
            is_large = isinstance(count, int) and isinstance(unit, int) and count * unit > MAX_ELEMENTS
            if is_large or any(isinstance(n, int) and n > MAX_ELEMENTS for n in vars(projection).values()):
                raise ValueError(f"{projection.path} has more than {MAX_ELEMENTS:,} elements")  # no list of that size
        return checked_couplings(couplings)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: couplings can't be read: {error}") from None


def _structure(header: dict[str, Any], path: Path) -> Structure:
    """Where the slices lie: an entry for each projection, with a size that holds its indices and units."""
    values = _field(header, "structure", dict, path)
    try:
        if values.keys() != {"locations", "base_weights"}:
            raise ValueError(f"it must have locations and base_weights, not {', '.join(sorted(values)[:5])}")
        locations = {name: Location(**fields) for name, fields in values["locations"].items()}
        for name, found in locations.items():
            found.check(name)
            check_projection_name(found.path, name)
        base_weights = {layer: list(map(tuple, pairs)) for layer, pairs in values["base_weights"].items()}
        for pair in (pair for pairs in values["base_weights"].values() for pair in pairs):
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
                raise ValueError("each of base_weights must be a label and a name")
            check_parameter_name(pair[1], "base_weights")
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: structure can't be read: {error}") from None
    others, layers = header["projections"], header["base_fingerprint"]["layers"]
    refuse(
        (locations.keys() != others.keys(), f"{path}: structure must have one location for each projection"),
        (base_weights.keys() != layers.keys(), f"{path}: structure must have the layers of base_fingerprint"),
    )
    for name, location in locations.items():
        if others[name]["units"][-1] >= location.size:
            raise ValueError(f"{path}: {name} has a unit outside the size in structure, {location.size}")
    return Structure(locations, base_weights)


def _check_entries(
    entries: Entries, projections: dict[str, Any], extra_weights: dict[str, tuple[str, tuple[int, ...]]], path: Path
) -> None:
    expected = {f"{name}.{part}" for name in projections for part in ("delta", "index")}
    expected |= {EXTRA + name for name in extra_weights}
    if entries.keys() != expected:
        missing, foreign = sorted(expected - entries.keys()), sorted(entries.keys() - expected)
        raise ValueError(f"{path}: missing keys {_some(missing)}, foreign keys {_some(foreign)}")
    for name, (dtype, shape) in extra_weights.items():
        if entries[EXTRA + name] != (dtype, shape):
            raise ValueError(
                f"{path}: {name} must be {dtype} of shape {shape}, as in {CONFIG}, but it is "
                f"{' of shape '.join(map(str, entries[EXTRA + name]))}"
            )
    for name, entry in projections.items():
        (dtype, shape), (of_index, index) = entries[f"{name}.delta"], entries[f"{name}.index"]
        refuse(
            (
                dtype not in FLOATS or of_index not in INTEGERS,
                f"{name}: delta must be floating-point and index integers, not {dtype} and {of_index}",
            ),
            (
                len(shape) not in (2, 3) or 0 in shape or index != (shape[entry["dim"]],),
                f"{name}: delta of shape {shape} and index of shape {index} do not fit along dim {entry['dim']}",
            ),
            (
                math.prod(index) % len(entry["units"]),
                f"{name}: {math.prod(index)} elements can't be {len(entry['units'])} units: the units listed are not "
                "the ones that were saved",
            ),
        )


def _some(keys: list[str]) -> str:
    return f"[{', '.join(shortened(key) for key in keys[:10])}{', …' * (len(keys) > 10)}]"


def _delta(name: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
    values, index = tensors[f"{name}.delta"], tensors[f"{name}.index"].to(torch.int64)
    if int(index.min()) < 0 or not bool((index[1:] > index[:-1]).all()):
        raise ValueError(f"{name}.index must be ascending and not negative")
    check_finite(f"{name}.delta", values)
    return Delta(entry["dim"], index, values)
