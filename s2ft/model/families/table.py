"""Model families: which function lists the couplings of which model type.

A new family is a function, in a file of its own or in others.py, and its row in `FAMILIES`.
"""

from collections.abc import Callable

from packaging.version import Version
from torch import nn

from s2ft.model.coupling import Coupling
from s2ft.model.families import decoders, named, others

# model type → the function that lists the couplings of such a model; composite.py adds its own types
FAMILIES: dict[str, Callable[[nn.Module], list[Coupling]]] = {
    **dict.fromkeys(decoders.MODEL_TYPES, decoders.couplings),
    **dict.fromkeys(named.MODEL_TYPES, named.couplings),
    **others.FAMILIES,
}

# model type → the first release of transformers whose models have the modules that its function describes, if that is
# later than the first one that s2ft works with, see pyproject.toml
SINCE = {
    **dict.fromkeys(("hunyuan_v1_moe", "phimoe"), "5.1"),
    "moonshine": "5.2",
    "afmoe": "5.5",
    "videomae": "5.6",
    "gpt_oss": "5.7",
    **dict.fromkeys(("audio-spectrogram-transformer", "beit", "deit", "ijepa", "pixio", "segformer", "swin"), "5.9"),
    **dict.fromkeys(("vit", "vit_mae", "vit_msn", "vivit"), "5.9"),
    **dict.fromkeys(("granitemoe", "granitemoehybrid", "granitemoeshared", "recurrent_gemma"), "5.14"),
    **dict.fromkeys(("nemotron_h", "olmo_hybrid"), "5.15"),
    **dict.fromkeys(("aria_text", "dinov2", "dinov2_with_registers", "sew-d"), "5.18"),
    "fsmt": "5.18",  # before, its decoder sees the first token only
    "layoutlmv3": "5.24",
}


def is_too_old(release: str, model_type: str) -> bool:
    """Whether a release of transformers is older than the family of a model type needs.

    A development version counts as the release that it precedes.
    """
    return Version(release).release < Version(SINCE.get(model_type, "0")).release


def check_release(model_type: str) -> None:
    """Check that the installed transformers is new enough for the family of a model type.

    Raises:
        ValueError: It is older; the message names both releases.
    """
    from transformers import __version__  # not at the top, where it would load transformers with every import

    if is_too_old(__version__, model_type):
        needed = SINCE[model_type]
        raise ValueError(
            f"model type {model_type!r} needs transformers >= {needed}, and this is transformers {__version__}, whose "
            f"modules have other names or shapes: pip install --upgrade 'transformers>={needed}'"
        )
