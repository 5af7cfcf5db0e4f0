"""s2ft inside vLLM: S²FT adapters served by name, and slices of a training run written into the engine's weights.

vLLM calls :func:`register` in every process that it starts, because the package declares it as a plugin (entry point
group ``vllm.general_plugins``). Nothing else is needed: ``pip install s2ft`` beside vLLM is enough.
"""

from functools import cache
from importlib import import_module

from s2ft.vllm.compatibility import guarded

# Each module has `install()`, which adds one feature to vLLM. A feature that this vLLM can't have is left out alone.
FEATURES = {
    "S²FT adapters": "s2ft.vllm.lora_requests",
    "adapters by the name in a request": "s2ft.vllm.resolver",
    "layers that hold slices": "s2ft.vllm.layers",
    "slices of a training run": "s2ft.vllm.transfer",
}


@cache  # a second call does nothing
def register() -> None:
    """Add what s2ft brings to vLLM. vLLM calls this in every process; it never raises, and a second call does nothing.

    A feature that cannot be added to this release of vLLM is named in the log with the reason.
    """
    for feature, module in FEATURES.items():
        guarded(feature, lambda module=module: import_module(module).install())
