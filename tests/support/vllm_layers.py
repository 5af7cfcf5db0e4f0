"""Stand-ins for vLLM's linear layers and LoRA layers, with the attributes that slices need, for tests without vLLM."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """A rank's part of a linear layer.

    Attributes:
        whole: The weight on all ranks, shape [outputs, inputs].
    """

    def __init__(self, whole: Tensor, rank: int = 0, ranks: int = 1, prefix: str = "layers.0.proj"):
        super().__init__()
        self.whole, self.tp_rank, self.tp_size, self.prefix = whole, rank, ranks, prefix
        self.output_size, self.input_size = whole.shape
        self.weight = self.part()

    def part(self) -> Tensor:
        return self.whole

    def rows(self, sizes, shards) -> Tensor:
        """This rank's part of weights that lie one after the other: local sizes, and number of the part."""
        found, begin = [], 0
        for (size, local), shard in zip(sizes, shards):
            found.append(self.whole[begin + local * shard : begin + local * (shard + 1)])
            begin += size
        return torch.cat(found)

    def input_of(self, x: Tensor) -> Tensor:
        return x

    def joined(self, parts: list[Tensor]) -> Tensor:
        """The layer's output from those of all ranks, in the order of the whole weight."""
        return parts[0]


class Row(Linear):
    input_is_parallel = True

    def part(self) -> Tensor:
        self.input_size_per_partition = self.input_size // self.tp_size
        return self.whole[:, self.mine()]

    def mine(self) -> slice:
        return slice(self.tp_rank * self.input_size_per_partition, (self.tp_rank + 1) * self.input_size_per_partition)

    def input_of(self, x: Tensor) -> Tensor:
        return x[..., self.mine()]

    def joined(self, parts):
        return torch.stack(parts).sum(0)


class Column(Linear):
    """Weights that lie one after the other along the outputs, each split among the ranks."""

    gather_output = False

    def __init__(self, whole, rank=0, ranks=1, prefix="layers.0.proj", sizes=None):
        if sizes is not None:
            self.output_sizes = sizes
        self.local = [(size, size // ranks) for size in sizes or [len(whole)]]
        self.copies = [1] * len(self.local)
        super().__init__(whole, rank, ranks, prefix)

    def part(self) -> Tensor:
        return self.rows(self.local, [self.tp_rank // copies for copies in self.copies])

    def joined(self, parts):
        pieces = zip(*(part.split([local for _, local in self.local], -1) for part in parts))
        return torch.cat([one for of_all, copies in zip(pieces, self.copies) for one in of_all[::copies]], -1)


class QKV(Column):
    """Query, key and value of grouped heads. With more ranks than key heads, several ranks have the same."""

    def __init__(self, whole, rank=0, ranks=1, prefix="layers.0.qkv_proj", heads=(8, 2), head_size=4):
        self.total_num_heads, self.total_num_kv_heads = heads
        self.head_size = head_size
        self.num_heads = heads[0] // ranks
        self.num_kv_heads = max(1, heads[1] // ranks)
        self.num_kv_head_replicas = max(1, ranks // heads[1])
        self.output_sizes = [self.num_heads * head_size * ranks] + [self.num_kv_heads * head_size * ranks] * 2
        keys = (heads[1] * head_size, self.num_kv_heads * head_size)
        self.local = [(heads[0] * head_size, self.num_heads * head_size), keys, keys]
        self.copies = [1, self.num_kv_head_replicas, self.num_kv_head_replicas]
        Linear.__init__(self, whole, rank, ranks, prefix)


class LoRALayer(nn.Module):
    """What vLLM's LoRA layers have in common."""

    def __init__(self, base_layer: Linear):
        super().__init__()
        self.base_layer, self.device = base_layer, torch.device("cpu")
        self.tp_size, self.tp_rank = base_layer.tp_size, base_layer.tp_rank
        self.n_slices = len(getattr(base_layer, "output_sizes", [0]))

    @classmethod
    def can_replace_layer(cls, source_layer, lora_config, packed_modules_list, model_config=None):
        return not lora_config.fully_sharded_loras

    def create_lora_weights(self, max_loras, lora_config, model_config=None):
        outputs, inputs = self.base_layer.weight.shape
        rank, options = lora_config.max_lora_rank, {"device": self.device, "dtype": lora_config.lora_dtype}
        self.lora_a_stacked = tuple(torch.zeros(max_loras, 1, rank, inputs, **options) for _ in range(self.n_slices))
        self.lora_b_stacked = tuple(torch.zeros(max_loras, 1, outputs, rank, **options) for _ in range(self.n_slices))

    def set_mapping(self, punica_wrapper):
        self.punica_wrapper = punica_wrapper

    reset_lora = set_lora = _apply_lora_to_output = None  # the slices have their own

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_lora_to_output(x, x @ self.base_layer.weight.t().to(x.dtype))


class Punica:
    """The object that knows the slot of each token."""

    def __init__(self, most: int = 512):
        self._token_lora_indices = torch.full((most,), 12345)  # vLLM does not write it at the start

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size):
        slots = [lora_index_to_id.index(number) if number > 0 else -1 for number in mapping.index_mapping]
        self._token_lora_indices[: len(slots)] = torch.tensor(slots, dtype=torch.int64)

    def step(self, numbers, lora_index_to_id):
        """A new batch: the number of each token's adapter, 0 for none."""
        self.update_metadata(SimpleNamespace(index_mapping=tuple(numbers)), lora_index_to_id, len(lora_index_to_id), 10)


def lora_config(rank: int = 1, dtype: torch.dtype = torch.float64, sharded: bool = False) -> SimpleNamespace:
    return SimpleNamespace(max_lora_rank=rank, lora_dtype=dtype, fully_sharded_loras=sharded)
