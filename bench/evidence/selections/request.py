"""What the candidates share: a request with protected data, and ratios of a gain and a need."""

from dataclasses import dataclass, replace

from s2ft.selection.batches import Calibration
from s2ft.selection.metric import Request, Units


@dataclass(frozen=True)
class ProtectedRequest(Request):
    """What a candidate scores. `calibration` is data of the task, `protect` is data that the base must not lose."""

    protect: Calibration | None = None


def on_protected_data(request: ProtectedRequest) -> Request:
    """Return the request with the protected data in place of the task's, so that a metric of s2ft reads them.

    Raises:
        ValueError: There are no protected data.
    """
    if request.protect is None:
        raise ValueError("this selection needs protected data: pass protect, an iterable of batches")
    return replace(request, calibration=request.protect)


def ratio(gain: Units, need: Units, damping: float = 1.0) -> Units:
    """Return gain / (need + damping × the projection's mean need) for every unit.

    Without damping the ratio would choose units that hardly do anything for either data: their need is nearly 0. With
    it, a unit that the base does not need at all counts as one that it needs `damping` times as much as the mean.

    Args:
        gain: What a unit could do for the task, by projection, shape [count], float64.
        need: What the base needs the unit for, in the same form.
        damping: Share of the mean need that is added, above 0.

    Returns:
        The ratios in the same form. They are 0 for a projection in which gain and need are all 0.
    """
    ratios = {}
    for name, values in gain.items():
        below = need[name] + damping * need[name].mean()
        ratios[name] = (values / below).where(below > 0, values)
    return ratios
