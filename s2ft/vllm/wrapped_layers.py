"""Which layer of vLLM computes a projection.

vLLM renames the modules of a checkpoint (`hf_to_vllm_mapper`), fuses several into one layer (q_proj, k_proj and v_proj
into qkv_proj), and serves adapters on the layers that it has wrapped for LoRA alone.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from s2ft.vllm.compatibility import part_of, private

MERGED = "export the model merged (s2ft export --format merged)"  # what always works


@dataclass(frozen=True)
class Target:
    """Where vLLM takes the adapter of one module of a checkpoint.

    Attributes:
        name: Name under which vLLM looks for the adapter's weights.
        layer: Name of the wrapped layer in vLLM's model; the same, unless the layer is a fused one.
        slot: Position among the modules that are fused in the layer; None if the layer is this module alone.
        is_here: Whether this process has the layer. Another rank of pipeline parallelism has it otherwise.
    """

    name: str
    layer: str
    slot: int | None = None
    is_here: bool = True


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
        self.layers: dict[str, nn.Module] = part_of(adapter_manager, "modules")
        packed: dict[str, list[str]] = part_of(adapter_manager, "packed_modules")
        self._fused = {layer for layer in packed if layer in self.layers}
        self._parts = {
            name: Target(name, layer, slot)
            for layer, names in packed.items()
            for slot, name in enumerate(names)
            if layer in self.layers
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
        name = self._renamed(path)
        if self._is_pooling and f"model.{name}" in {*self.layers, *self._parts}:
            name = f"model.{name}"  # of embeddings: the model without a head was trained, and vLLM gave it a prefix
        if name in self._parts:
            return self._parts[name]
        if name in self._fused:
            raise ValueError(
                f"{path} is one weight in the checkpoint, and vLLM serves adapters of its parts alone: {MERGED}"
            )
        if name in self.layers:
            return Target(name, name)
        if is_elsewhere(self._model, name):
            return Target(name, name, is_here=False)
        raise ValueError(self._why_not(path, name))

    def _renamed(self, path: str) -> str:
        """The name of a module in vLLM's model, as vLLM reads it from the name of a LoRA's weight."""
        parse = private("vllm.lora.utils", "parse_fine_tuned_lora_name")
        return parse(f"base_model.model.{path}.lora_A.weight", self._mapper)[0]

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


def sizes(layer: nn.Module, slot: int | None) -> tuple[int | None, int | None]:
    """Outputs and inputs of a wrapped layer, or of one module that is fused in it, before tensor parallelism splits it.

    Args:
        layer: A layer that vLLM has wrapped for LoRA.
        slot: Position of the module in the layer; None for the whole layer.

    Returns:
        The numbers; None for one that the layer does not say.
    """
    base = getattr(layer, "base_layer", None)
    inputs = getattr(base, "input_size", None)
    if hasattr(base, "total_num_kv_heads"):  # output_sizes counts heads twice that several ranks have
        values = getattr(base, "v_head_size", base.head_size)
        parts = [base.total_num_heads * base.head_size, base.total_num_kv_heads * base.head_size]
        parts.append(base.total_num_kv_heads * values)
    else:
        parts = getattr(base, "output_sizes", None)
    if parts is None:
        return getattr(base, "output_size", None), inputs
    return (sum(parts) if slot is None else parts[slot] if slot < len(parts) else None), inputs
