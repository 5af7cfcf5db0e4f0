"""The layers of vLLM that take adapters: those that hold slices, and which one computes a projection.

A layer that holds slices has the numbers of an S²FT adapter as they are, without padding to a rank. It is switched on
by ``S2FT_VLLM_SLICES=1``. ``S2FT_VLLM_UNITS`` is the budget of units of an adapter in a layer, see
:class:`s2ft.vllm.slice_layer.Budget`. vLLM's LoRA layers are not made then, and adapters of other kinds are refused.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from s2ft.config import refuse
from s2ft.vllm.compatibility import in_place_of, logger, part_of, private, when_imported
from s2ft.vllm.slice_layer import OPTION, Budget, SliceLayer, is_slices, pieces, with_slices

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
NEEDED = (
    ("vllm.lora.utils", "_all_lora_classes"),
    ("vllm.lora.model_manager", "from_layer_logits_processor"),
    ("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.update_metadata"),
    (WORKERS, "WorkerLoRAManager._load_adapter"),
)

enabled = False  # whether the layers of this process hold slices; False too if this release of vLLM can't have them


def install() -> None:
    """Put layers with slices in the place of vLLM's LoRA layers, if the option is set.

    An option without a valid value stops an engine that serves adapters, and no other one.

    Raises:
        MissingInVLLM: This release of vLLM lacks a module that is needed.
    """
    value = os.environ.get(SWITCH, "")
    if value in ("", "0"):
        return
    try:
        if value != "1":
            raise ValueError(f"{SWITCH} is {value!r}: expected 1 to serve adapters as slices, or 0")
        budget = Budget.parse(os.environ.get(OPTION, ""))
    except ValueError as error:
        when_imported(WORKERS, FEATURE, partial(_refuse, str(error)))
        return
    when_imported("vllm.config.lora", FEATURE, lambda: _change_hash(budget))
    when_imported(WORKERS, FEATURE, lambda: _change_workers(budget))


def _refuse(message: str) -> None:
    @in_place_of("vllm.lora.model_manager", "LoRAModelManager.__init__")
    def __init__(*args: Any, **options: Any) -> None:
        raise ValueError(message)


def _change_workers(budget: Budget) -> None:
    """Change vLLM's LoRA: its layers, a report of their memory, and a check before another adapter is removed.

    All names are looked up before the first change.
    """
    global enabled
    methods = [("vllm.lora.layers", f"{name}.{method}") for name, method in itertools.product(LAYERS, METHODS)]
    for module, attribute in (*methods, *NEEDED):
        private(module, attribute)
    made = tuple(with_slices(private("vllm.lora.layers", name), budget) for name in LAYERS)

    @in_place_of("vllm.lora.model_manager", "LoRAModelManager.__init__")
    def __init__(make: Any, self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        layers = [layer for _, layer in _slice_layers(self)]
        units = {name: count for layer in layers for name, count in map(layer.room, (0, 1)) if count}
        logger.info(
            "s2ft: %d layers hold the slices of %d adapters in %.1f MB; %s=%s. vLLM serves S²FT adapters alone.",
            len(layers),
            self.lora_slots,
            sum(bank.nbytes for layer in layers for bank in layer.banks) / 1e6,
            OPTION,
            ",".join(f"{key}={count}" for key, count in sorted(units.items())),
        )

    @in_place_of(WORKERS, "WorkerLoRAManager._load_adapter")
    def _load_adapter(load: Any, self: Any, lora_request: Any) -> Any:
        lora = load(self, lora_request)
        admit(self._adapter_manager, lora, lora_request.lora_name)
        return lora

    private("vllm.lora.utils")._all_lora_classes = made
    # lm_head stays as it is, too. Its LoRA would be computed for every token, and no adapter can have one.
    private("vllm.lora.model_manager").from_layer_logits_processor = lambda layer, *args, **options: layer
    enabled = True


# ---- hooks -----------------------------------------------------------------------------------------------


def _change_hash(budget: Budget) -> None:
    """vLLM keeps compiled models on the disk by this hash. Layers with slices are another model."""
    from s2ft import __version__

    @in_place_of("vllm.config.lora", "LoRAConfig.compute_hash")
    def changed(compute_hash: Any, self: Any) -> str:
        return f"{compute_hash(self)} s2ft {__version__} slices {budget}"


def _slice_layers(manager: Any) -> Iterator[tuple[str, SliceLayer]]:
    return ((path, layer) for path, layer in manager.modules.items() if isinstance(layer, SliceLayer))


# ---- checks ----------------------------------------------------------------------------------------------


def admit(manager: Any, lora: Any, name: str) -> None:
    """Check that an adapter can be served in the layers of this worker.

    Args:
        manager: vLLM's LoRAModelManager.
        lora: vLLM's LoRAModel.
        name: The adapter's name.

    Raises:
        ValueError: It is no S²FT adapter, does not fit the layers, or is too large for their budget.
    """
    left, needs, too_large = dict(lora.loras), {}, ""
    if not all(is_slices(one.lora_a) for one in left.values()):
        raise ValueError(
            f"{name!r} is no S²FT adapter, and vLLM was started with {SWITCH}=1, which has no memory for LoRA: start "
            f"it without {SWITCH} to serve adapters of both kinds"
        )
    for path, layer in _slice_layers(manager):
        found = [left.pop(one, None) for one in manager.packed_modules.get(path, [path])]
        if not any(found):
            continue
        try:
            counts = layer.needs([one and (one.lora_a, one.lora_b) for one in found])
        except ValueError as error:
            raise ValueError(f"the adapter {name!r} does not fit {path}: {error}") from error
        for dim, count in counts.items():
            key, room = layer.room(dim)
            needs[key] = max(count, needs.get(key, 0))
            if count > room:
                too_large = too_large or f"it has {count} units in {path}, whose budget for an adapter is {room}"
    units = ",".join(f"{key}={count}" for key, count in sorted(needs.items()))
    refuse(
        *(
            (
                not is_elsewhere(manager.model, path),
                f"the adapter {name!r} has slices of {path}, which is no linear layer that vLLM serves adapters on: "
                f"start vLLM without {SWITCH}, or merge the adapter",
            )
            for path in left
        ),
        (too_large, f"the adapter {name!r} does not fit: {too_large}. Start vLLM with {OPTION}={units}"),
    )


# ---- which layer computes a projection -----------------------------------------------------------------
#
# vLLM renames the modules of a checkpoint (hf_to_vllm_mapper), fuses several into one layer (q_proj, k_proj and v_proj
# into qkv_proj), and serves adapters on the layers that it has wrapped for LoRA alone.

MERGED = "export the model merged (s2ft export --format merged)"  # what always works
NO_PLACES = "it does not record where its slices lie: load it into its model and save it again"


@dataclass(frozen=True)
class Target:
    """Where vLLM takes the adapter of one module of a checkpoint.

    Attributes:
        name: Name under which vLLM looks for the adapter's weights.
        layer: The layer, which vLLM has wrapped for LoRA; None if another rank of pipeline parallelism has it.
        slot: Position among the modules that are fused in the layer; None if the layer is this module alone.
    """

    name: str
    layer: Any
    slot: int | None = None

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Outputs and inputs of the module on all ranks; None for one that the layer does not say."""
        base = getattr(self.layer, "base_layer", None)
        if not hasattr(base, "input_size"):
            return None, None
        outputs = [size for size, _, _ in pieces(base, 0)]
        if self.slot is None:
            return sum(outputs), base.input_size
        return outputs[self.slot] if self.slot < len(outputs) else None, base.input_size


class WrappedLayers:
    """The layers of one vLLM model that take adapters."""

    def __init__(self, adapter_manager: Any) -> None:
        """List the wrapped layers.

        Args:
            adapter_manager: vLLM's LoRAModelManager.

        Raises:
            MissingInVLLM: It lacks an attribute that is needed.
        """
        self._model: nn.Module = part_of(adapter_manager, "model")
        self._config = part_of(adapter_manager, "lora_config")
        self._layers: dict[str, nn.Module] = part_of(adapter_manager, "modules")
        packed: dict[str, list[str]] = part_of(adapter_manager, "packed_modules")
        self._fused = {layer: names for layer, names in packed.items() if layer in self._layers}
        self._parts = {
            name: Target(name, self._layers[layer], slot)
            for layer, names in self._fused.items()
            for slot, name in enumerate(names)
        }
        self._is_pooling = getattr(adapter_manager, "is_pooling_model", False)
        mapper = getattr(self._model, "hf_to_vllm_mapper", None)
        # Renames alone: the mapper's other entries are about weights that it stacks or leaves out.
        self._mapper = mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper

    def find(self, path: str) -> Target:
        """Find the layer of a module.

        Args:
            path: Path of the module in the model of transformers.

        Raises:
            ValueError: vLLM serves no adapter on this module. The message says what to do.
        """
        parse = private("vllm.lora.utils", "parse_fine_tuned_lora_name")
        name = parse(f"base_model.model.{path}.lora_A.weight", self._mapper)[0]  # as vLLM reads that of a LoRA's weight
        if self._is_pooling and f"model.{name}" in {*self._layers, *self._parts}:
            name = f"model.{name}"  # of embeddings: the model without a head was trained, and vLLM gave it a prefix
        if name in self._parts:
            return self._parts[name]
        if name in self._fused:
            raise ValueError(
                f"{path} is one weight in the checkpoint, and vLLM serves adapters of its parts alone: {MERGED}"
            )
        if name in self._layers or is_elsewhere(self._model, name):
            return Target(name, self._layers.get(name))
        raise ValueError(self._why_not(path, name))

    def _why_not(self, path: str, name: str) -> str:
        suffix, wanted = name.rpartition(".")[2], self._config.target_modules
        if wanted is not None and suffix not in wanted and name not in wanted:
            return (
                f"this server does not serve adapters of {path}: --lora-target-modules is {' '.join(sorted(wanted))}. "
                f"Add {suffix}, or leave the option out"
            )
        return (
            f"vLLM serves no adapter on {path}"
            + ("" if path == name else f" ({name} in vLLM)")
            + f": {type(self._model).__name__} has no such layer that takes LoRA (for the layers of a vision tower see "
            "--enable-tower-connector-lora): " + MERGED
        )


def is_elsewhere(model: Any, path: str) -> bool:
    """Whether another rank of pipeline parallelism has a module."""
    missing = private("vllm.model_executor.models.utils", "PPMissingLayer")
    for part in path.split("."):
        model = getattr(model, part, None)
        if isinstance(model, missing):
            return True
    return False
