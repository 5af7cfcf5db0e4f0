"""How many units of each projection are trained."""
import math
from typing import Dict, List

from s2ft.config import S2FTConfig
from s2ft.coupling import Coupling, projections_of, unit_name


def units_per_projection(couplings: List[Coupling], config: S2FTConfig) -> Dict[str, int]:
    """Number of trainable units by module path, uniform over the layers (paper, section 3.2).

    Raises: ValueError naming the option for an empty request, a ratio that comes to no unit, a
    projection no coupling has, or a layer outside the model.
    """
    if not config.ratios:
        raise ValueError("nothing is selected: set at least one of q_ratio, k_ratio, v_ratio, o_ratio, "
                         "u_ratio, g_ratio, d_ratio above 0")
    layers = requested_layers(couplings, config)
    present = {projection.key for projection in projections_of(couplings)}
    for key in config.ratios:
        if key not in present:
            raise ValueError(f"{key}_ratio asks for a projection that this model does not have")
    budget = {}
    for coupling in couplings:
        if coupling.layer in layers:
            for projection in coupling.projections:
                if projection.key in config.ratios:
                    budget[projection.path] = _units(projection, config.ratios[projection.key])
    return budget


def requested_layers(couplings: List[Coupling], config: S2FTConfig) -> set:
    """Layers to train. Raises: ValueError for one outside the model."""
    known = {coupling.layer for coupling in couplings}
    if config.layers is None:
        return known
    unknown = sorted(set(config.layers) - known)
    if unknown:
        raise ValueError(f"layers names {unknown}, but the model has layers {min(known)} to {max(known)}")
    return set(config.layers)


def _units(projection, ratio: float) -> int:
    units = int(ratio * projection.count + 0.5)
    if units == 0:
        raise ValueError(f"{projection.key}_ratio={ratio} selects none of the {projection.count} "
                         f"{unit_name(projection)} of {projection.path}; the smallest that selects one is "
                         f"{math.ceil(5000 / projection.count) / 10000:g}")
    return units
