"""Layers of vLLM that hold slices: the numbers of an S²FT adapter as they are, without padding to a rank.

Switched on by ``S2FT_VLLM_SLICES=1``. ``S2FT_VLLM_UNITS`` is the budget of units of a layer, see
:mod:`s2ft.vllm.slices.units`. vLLM's own LoRA layers are not made then, and adapters of other kinds are refused.
"""

import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from s2ft.vllm import retired
from s2ft.vllm.compatibility import guarded, part_of, private, when_imported
from s2ft.vllm.slices.layer import SliceLayer, is_slices, parts_of, with_slices
from s2ft.vllm.slices.units import OPTION, Admission, Budget, Place

logger = logging.getLogger("vllm.s2ft")  # vLLM prints what loggers below its own say

FEATURE = "layers that hold slices"
WORKERS = "vllm.lora.worker_manager"
SWITCH = "S2FT_VLLM_SLICES"
LAYERS = (
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "QKVParallelLinearWithLoRA",
    "MergedQKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
    "ReplicatedLinearWithLoRA",
    "MergedColumnParallelLinearVariableSliceWithLoRA",
)
METHODS = ("can_replace_layer", "create_lora_weights", "reset_lora", "set_lora", "set_mapping", "_apply_lora_to_output")


_installed = False


def wanted() -> bool:
    """Whether the option asks for layers that hold slices.

    Raises:
        ValueError: ``S2FT_VLLM_SLICES`` is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} is {value!r}: expected 1 to serve adapters as slices, or 0")
    return value == "1"


def enabled() -> bool:
    """Whether the layers of this process hold slices. False too if this release of vLLM can't have them."""
    return _installed


def install() -> None:
    """Put layers with slices in the place of vLLM's LoRA layers, if the option is set.

    An option without a valid value stops an engine that serves adapters, and no other one.

    Raises:
        MissingInVLLM: This release of vLLM lacks a module that is needed.
    """
    try:
        if not wanted():
            return
        budget = Budget.parse(os.environ.get(OPTION, ""))
    except ValueError as error:
        message = str(error)
        when_imported(WORKERS, FEATURE, lambda: _refuse(message))
        return
    when_imported("vllm.config.lora", FEATURE, lambda: _change_config(budget))
    when_imported(WORKERS, FEATURE, lambda: _change_workers(budget))
    guarded(retired.FEATURE, retired.install)


def _refuse(message: str) -> None:
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        raise ValueError(message)

    private("vllm.lora.model_manager", "LoRAModelManager").__init__ = __init__


def _change_config(budget: Budget) -> None:
    config = private("vllm.config.lora", "LoRAConfig")
    config.compute_hash = _hash_with(private("vllm.config.lora", "LoRAConfig.compute_hash"), budget)


def _change_workers(budget: Budget) -> None:
    """Change vLLM's LoRA. All names are looked up before the first change."""
    global _installed
    made = tuple(with_slices(_checked(name), budget) for name in LAYERS)
    private("vllm.lora.utils", "_all_lora_classes")
    private("vllm.lora.model_manager", "from_layer_logits_processor")
    private("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.update_metadata")
    manager = private("vllm.lora.model_manager", "LoRAModelManager")
    worker = private(WORKERS, "WorkerLoRAManager")
    hooks = {
        (manager, "__init__"): _with_report,
        (manager, "activate_adapter"): _with_room,
        (worker, "_load_adapter"): _with_check,
        (worker, "remove_adapter"): _forgetting,
    }
    changed = {key: make(private(key[0].__module__, f"{key[0].__name__}.{key[1]}")) for key, make in hooks.items()}
    for (cls, name), method in changed.items():
        setattr(cls, name, method)
    private("vllm.lora.utils")._all_lora_classes = made
    # lm_head stays as it is, too. Its LoRA would be computed for every token, and no adapter can have one.
    private("vllm.lora.model_manager").from_layer_logits_processor = lambda layer, *args, **options: layer
    _installed = True


def _checked(name: str) -> type:
    """A LoRA layer that has all methods which are overridden."""
    for method in METHODS:
        private("vllm.lora.layers", f"{name}.{method}")
    return private("vllm.lora.layers", name)


# ---- hooks -----------------------------------------------------------------------------------------------


def _hash_with(compute_hash: Any, budget: Budget) -> Any:
    """vLLM keeps compiled models on the disk by this hash. Layers with slices are another model."""
    from s2ft import __version__

    @functools.wraps(compute_hash)
    def changed(self: Any) -> str:
        return f"{compute_hash(self)} s2ft {__version__} slices {budget}"

    return changed


def _with_report(init: Any) -> Any:
    """Print the memory after the layers were made."""

    @functools.wraps(init)
    def changed(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.s2ft_admission = Admission(self.lora_slots)
        layers = dict(_slice_layers(self))
        total = sum(bank.nbytes for layer in layers.values() for bank in layer.banks)
        units = {place.key: place.capacity for _, place in _places(layers) if place.capacity}
        logger.info(
            "s2ft: %d layers hold the slices of %d adapters in %.1f MB; %s=%s. vLLM serves S²FT adapters alone.",
            len(layers),
            self.lora_slots,
            total / 1e6,
            OPTION,
            ",".join(f"{key}={count}" for key, count in sorted(units.items())),
        )

    return changed


def _with_room(activate_adapter: Any) -> Any:
    """Before an adapter gets a slot, empty all slots that vLLM has given up. It does not tell the layers."""

    @functools.wraps(activate_adapter)
    def changed(self: Any, lora_id: int) -> bool:
        if lora_id in part_of(self, "_active_adapters"):
            return activate_adapter(self, lora_id)
        unused = [slot for slot, number in enumerate(self.lora_index_to_id) if number is None]
        for _, layer in _slice_layers(self):
            layer.drop(unused)
        try:
            return activate_adapter(self, lora_id)
        except Exception:
            self.deactivate_adapter(lora_id)  # its slot is filled in some layers alone
            raise

    return changed


def _with_check(load_adapter: Any) -> Any:
    """Refuse an adapter that does not fit before vLLM removes another one for it."""

    @functools.wraps(load_adapter)
    def changed(self: Any, lora_request: Any) -> Any:
        lora = load_adapter(self, lora_request)
        admit(self._adapter_manager, lora, lora_request.lora_name)
        return lora

    return changed


def _forgetting(remove_adapter: Any) -> Any:
    @functools.wraps(remove_adapter)
    def changed(self: Any, adapter_id: int) -> bool:
        self._adapter_manager.s2ft_admission.forget(adapter_id)
        return remove_adapter(self, adapter_id)

    return changed


def _slice_layers(manager: Any) -> Iterator[tuple[str, SliceLayer]]:
    return ((path, layer) for path, layer in manager.modules.items() if isinstance(layer, SliceLayer))


def _places(layers: dict[str, SliceLayer]) -> Iterator[tuple[int, Place]]:
    return (pair for path, layer in layers.items() for pair in layer.places(path).items())


# ---- checks ----------------------------------------------------------------------------------------------


def admit(manager: Any, lora: Any, name: str) -> None:
    """Check that an adapter can be served in the layers of this worker, and keep a record of its units.

    Args:
        manager: vLLM's LoRAModelManager.
        lora: vLLM's LoRAModel.
        name: The adapter's name.

    Raises:
        ValueError: It is no S²FT adapter, does not fit the layers, or is too large for their budget.
    """
    needs: dict[Place, int] = {}
    left = dict(lora.loras)
    for path, layer in _slice_layers(manager):
        paths = manager.packed_modules.get(path, [path])
        found = [left.pop(one, None) for one in paths]
        if not any(found):
            continue
        a = [one and one.lora_a for one in found] if path in manager.packed_modules else found[0].lora_a
        b = [one and one.lora_b for one in found] if path in manager.packed_modules else found[0].lora_b
        if not all(part is None or is_slices(part[0]) for part in parts_of(a, b)):
            raise _is_lora(name)
        try:
            counts = layer.needs(a, b)
        except ValueError as error:
            raise ValueError(f"the adapter {name!r} does not fit {path}: {error}") from error
        places = layer.places(path)
        needs.update({places[dim]: count for dim, count in counts.items()})
    _check_left(manager, left, name)
    manager.s2ft_admission.add(lora.id, name, needs)


def _check_left(manager: Any, left: dict[str, Any], name: str) -> None:
    for path, one in left.items():
        if not is_slices(one.lora_a):
            raise _is_lora(name)
        if not _is_elsewhere(manager.model, path):
            raise ValueError(
                f"the adapter {name!r} has slices of {path}, which is no linear layer that vLLM serves adapters on: "
                f"start vLLM without {SWITCH}, or merge the adapter"
            )


def _is_lora(name: str) -> ValueError:
    return ValueError(
        f"{name!r} is no S²FT adapter, and vLLM was started with {SWITCH}=1, which has no memory for LoRA: start it "
        f"without {SWITCH} to serve adapters of both kinds"
    )


def _is_elsewhere(model: Any, path: str) -> bool:
    """Whether another rank of pipeline parallelism has the module."""
    missing = private("vllm.model_executor.models.utils", "PPMissingLayer")
    for name in path.split("."):
        if isinstance(model, missing):
            return True
        model = getattr(model, name, None)
    return isinstance(model, missing)
