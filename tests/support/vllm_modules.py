"""Stand-ins of vLLM's LoRA layers and managers, for tests without vLLM: fused modules, and shards of tensor parallelism.

They slice an adapter as vLLM's layers do, and multiply by weights that nobody can read directly.
"""

import sys
from dataclasses import dataclass, field, make_dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


# vLLM's classes of these names
LoRALayerWeights = make_dataclass(
    "LoRALayerWeights", ["module_name", "rank", "lora_alpha", "lora_a", "lora_b", ("scaling", float, 1)]
)
LoRAModel = make_dataclass("LoRAModel", ["id", "rank", "loras", ("is_3d_lora_weight", bool, True)])
Request = make_dataclass("LoRARequest", ["lora_name", "lora_int_id", "lora_path", ("load_inplace", bool, False)])


class PPMissingLayer(nn.Identity):
    """vLLM's class of this name: a layer that another rank of pipeline parallelism has."""


def parse_name(name: str, mapper: Any = None) -> tuple[str, bool]:
    """vLLM's parse_fine_tuned_lora_name."""
    name = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    return (name if mapper is None else mapper(name)), True


# what the loading needs
MODULES = {
    "vllm.lora.utils": {"parse_fine_tuned_lora_name": parse_name},
    "vllm.lora.lora_weights": {"LoRALayerWeights": LoRALayerWeights},
    "vllm.model_executor.models.utils": {"PPMissingLayer": PPMissingLayer},
}


def fake_modules(monkeypatch, modules: dict[str, dict[str, Any]]) -> None:
    """Put modules with this content into sys.modules."""
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


class Layer(nn.Module):
    """A wrapped layer of vLLM: one module of the checkpoint, or several that are fused along the outputs.

    Rows are in another order than in the checkpoint if `order` is given.
    """

    def __init__(self, weights: list[Tensor], is_row: bool, size: int, rank: int, order: Tensor | None = None) -> None:
        super().__init__()
        self.tp_size, self.tp_rank, self.n_slices, self.device = size, rank, len(weights), torch.device("cpu")
        self.is_row, self.is_fused = is_row, len(weights) > 1
        weights = weights if order is None else [weight[order] for weight in weights]
        shards = [weight.chunk(size, int(is_row))[rank] for weight in weights]
        self.output_slices = tuple(shard.shape[0] for shard in shards)
        self.shard = torch.cat(shards)
        self.base_layer = SimpleNamespace(
            input_size=weights[0].shape[1],
            output_size=sum(weight.shape[0] for weight in weights),
            output_sizes=[weight.shape[0] for weight in weights],
            params_dtype=self.shard.dtype,
            quant_method=SimpleNamespace(apply=lambda layer, x, bias: x @ self.shard.t()),
        )

    def slice_lora_a(self, a: Any) -> Any:
        """What the rank takes of A."""
        return a.chunk(self.tp_size, 1)[self.tp_rank] if self.is_row else a

    def slice_lora_b(self, b: Any) -> Any:
        """What the rank takes of B."""
        if self.is_row:
            return b
        if not self.is_fused:
            return b.chunk(self.tp_size, 0)[self.tp_rank]
        return [None if one is None else one.chunk(self.tp_size, 0)[self.tp_rank] for one in b]

    def delta(self, parts: list[LoRALayerWeights | None]) -> Tensor:
        """What an adapter adds to the shard."""
        a, b = [part and part.lora_a for part in parts], [part and part.lora_b for part in parts]
        if not self.is_fused:
            a, b = a[0], b[0]
        if self.tp_size > 1:
            a, b = self.slice_lora_a(a), self.slice_lora_b(b)
        if not self.is_fused:
            return b @ a
        widths = (self.output_slices, a, b)
        return torch.cat([torch.zeros(n, self.shard.shape[1]) if y is None else y @ x for n, x, y in zip(*widths)])


@dataclass
class Engine:
    """A stand-in of vLLM's WorkerLoRAManager, and of what it holds."""

    s2ft_vllm_config: Any
    _adapter_manager: Any
    lora_config: Any
    _lora_model_cls: type = field(default=LoRAModel)

    def added(self, lora: LoRAModel, layer: str) -> Tensor:
        """What a loaded adapter adds to the shard of a layer."""
        manager = self._adapter_manager
        names = manager.packed_modules.get(layer, [layer])
        return manager.modules[layer].delta([lora.loras.get(name) for name in names])


def engine_of(
    model: nn.Module, folder: Any, size: int = 1, rank: int = 0, order: Tensor | None = None, **changes: Any
) -> Engine:
    """Make a stand-in that serves a model of transformers.

    Args:
        model: The model. Its projections of one block that FUSED lists become one layer.
        folder: The folder of its checkpoint.
        size: Ranks of tensor parallelism.
        rank: The number of this one.
        order: The order of rows in which the engine keeps o_proj.
        changes: Fields of vLLM's LoRAConfig, and `quantization_config` of the model's config.
    """
    found, packed = {}, {}
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        whole = next((whole for whole, parts in FUSED.items() if last in parts), None)
        if not isinstance(module, nn.Linear) or last == "lm_head":
            continue
        if whole is None:
            is_row = last in ("o_proj", "down_proj")
            found[name] = Layer([module.weight.data], is_row, size, rank, order if last == "o_proj" else None)
        elif f"{parent}.{whole}" not in found:
            parts = [f"{parent}.{part}" for part in FUSED[whole]]
            weights = [model.get_submodule(part).weight.data for part in parts]
            found[f"{parent}.{whole}"], packed[f"{parent}.{whole}"] = Layer(weights, False, size, rank), parts
    options = {"max_lora_rank": 512, "lora_dtype": torch.float32, "target_modules": None, **changes}
    config = SimpleNamespace(quantization_config=options.pop("quantization_config", None))
    model_config = SimpleNamespace(model=str(folder), revision=None, hf_config=config)
    lora_config = SimpleNamespace(**options)
    manager = SimpleNamespace(model=nn.Module(), modules=found, packed_modules=packed, lora_config=lora_config)
    whole_config = SimpleNamespace(model_config=model_config, load_config=SimpleNamespace(download_dir=None))
    return Engine(whole_config, manager, lora_config)
