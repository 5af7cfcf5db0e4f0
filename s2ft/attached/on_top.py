"""A trainable adapter on top of others that stay active, on units that none of them trains."""

from dataclasses import replace

import torch
from torch import Tensor

from s2ft.attached.record import Attachment
from s2ft.config import S2FTConfig
from s2ft.selection.selection import unit_tensors

ON_TOP_OF = "on_top_of"  # key in the info of an adapter: weights by name of the adapters that it was trained on top of


def apart_from_active(record: Attachment, config: S2FTConfig) -> S2FTConfig:
    """Return a config that chooses no unit that an active adapter trains.

    Args:
        record: Record of a model without a trainable adapter.
        config: Config of the new adapter.

    Returns:
        A copy of the config, with the units of the active adapters in its `exclude`.

    Raises:
        ValueError: The config's `units` name a unit that an active adapter trains.
    """
    if config.units is not None:
        _check_apart(record, unit_tensors(config.units, "units"))
        return config
    taken = [unit_tensors(config.exclude, "exclude")] if config.exclude is not None else []
    taken += [record.loaded[name].selection.units for name in record.active]
    paths = dict.fromkeys(path for units in taken for path in units)
    return replace(
        config, exclude={path: torch.cat([units[path] for units in taken if path in units]).unique() for path in paths}
    )


def _check_apart(record: Attachment, units: dict[str, Tensor]) -> None:
    for name in record.active:
        theirs = record.loaded[name].selection.units
        for path in units.keys() & theirs.keys():
            shared = units[path][torch.isin(units[path], theirs[path])]
            if shared.numel():
                raise ValueError(
                    f"units names {shared.numel()} of {path} that the active adapter {name!r} trains, such as "
                    f"{int(shared[0])}: with on_top=True choose others, or let the ratios and exclude choose"
                )
