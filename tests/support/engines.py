"""A stand-in for an engine's model: fused and sharded parameters, and a loader like vLLM's."""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from support.inside import SliceSpec, hashes_of

HIDDEN, HEADS, KEYS, SIZE, CHANNELS, VOCABULARY = 16, 4, 2, 4, 24, 30
SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.layers.0.self_attn.q_proj.weight": (HEADS * SIZE, HIDDEN),
    "model.layers.0.self_attn.q_proj.bias": (HEADS * SIZE,),
    "model.layers.0.self_attn.k_proj.bias": (KEYS * SIZE,),
    "model.layers.0.self_attn.v_proj.bias": (KEYS * SIZE,),
    "model.layers.0.self_attn.k_proj.weight": (KEYS * SIZE, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (KEYS * SIZE, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HEADS * SIZE),
    "model.layers.0.mlp.gate_proj.weight": (CHANNELS, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (CHANNELS, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, CHANNELS),
    "model.layers.0.mlp.conv1d.weight": (HIDDEN, CHANNELS),  # stored as [inputs, outputs]
    "model.layers.0.experts.0.down_proj.weight": (HIDDEN, CHANNELS),
    "model.layers.0.experts.1.down_proj.weight": (HIDDEN, CHANNELS),
    "model.norm.weight": (HIDDEN,),
}


def checkpoint(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of all names."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def specs_of(tensors: dict[str, Tensor], index: dict[str, tuple[int, list[int]]]) -> list[SliceSpec]:
    """The slices at these positions of weights, each along a dimension."""
    found = []
    for name, (dim, positions) in index.items():
        units = torch.tensor(positions)
        hashes = hashes_of(tensors[name].index_select(dim, units), dim)
        found.append(SliceSpec(name, tuple(tensors[name].shape), dim, units, hashes))
    return found


class Engine(nn.Module):
    """One rank's share of the model.

    Args:
        rank: Number of the rank.
        size: How many ranks share the tensors. Heads of keys are copied where there are more ranks than heads.
        dtype: Dtype of the parameters.
        stage: The pipeline's stage: 0 has the embedding, 1 has the norm, None has all.
    """

    def __init__(self, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32, stage: int | None = None):
        super().__init__()
        self.rank, self.size, self.stage = rank, size, stage
        self.keys = max(1, KEYS // size)
        q, k, channels = HEADS // size * SIZE, self.keys * SIZE, CHANNELS // size

        def empty(*shape):
            return nn.Parameter(torch.full(shape, 7.0, dtype=dtype), requires_grad=False)

        self.qkv, self.qkv_bias, self.o = empty(q + 2 * k, HIDDEN), empty(q + 2 * k), empty(HIDDEN, q)
        self.gate_up, self.down, self.conv1d = empty(2 * channels, HIDDEN), empty(HIDDEN, channels), None
        self.conv1d, self.experts, self.norm = empty(channels, HIDDEN), empty(2, HIDDEN, channels), empty(HIDDEN)
        self.rows = 32 // size  # the vocabulary is padded
        self.embed = empty(self.rows, HIDDEN)
        self.head = self.embed  # tied

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy the tensors of a checkpoint to where they belong."""
        done = set()
        for name, tensor in tensors:
            if name == "lm_head.weight" or (self.stage is not None and ("norm" in name) == (self.stage == 0)):
                continue
            if name not in SHAPES:
                raise KeyError(name)
            self._load(name, tensor)
            done.add(name)
        return done

    def _load(self, name: str, tensor: Tensor) -> None:
        short = name.removeprefix("model.layers.0.").removeprefix("model.")
        part = short.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
        if part in ("q_proj", "k_proj", "v_proj"):
            parameter = self.qkv_bias if short.endswith("bias") else self.qkv
            q, k = HEADS // self.size * SIZE, self.keys * SIZE
            first, count = {"q_proj": (0, q), "k_proj": (q, k), "v_proj": (q + k, k)}[part]
            shard = self.rank if part == "q_proj" else self.rank * KEYS // max(KEYS, self.size)
            parameter.data.narrow(0, first, count).copy_(tensor.narrow(0, shard * count, count))
        elif part in ("gate_proj", "up_proj"):
            count = CHANNELS // self.size
            into = self.gate_up.data.narrow(0, count * (part == "up_proj"), count)
            into.copy_(tensor.narrow(0, self.rank * count, count))
        elif part == "embed_tokens":
            first = self.rank * self.rows
            tensor = tensor.narrow(0, first, min(self.rows, VOCABULARY - first))
            self.embed[: tensor.shape[0]].data.copy_(tensor)
            self.embed[tensor.shape[0] :].data.fill_(0)
        elif part == "norm":
            self.norm.data.copy_(tensor)
        else:
            self._load_inputs(short, part, tensor)

    def _load_inputs(self, short: str, part: str, tensor: Tensor) -> None:
        if part == "conv1d":
            count = CHANNELS // self.size
            self.conv1d.data.copy_(tensor.t().narrow(0, self.rank * count, count))
            return
        if short.startswith("experts."):
            into = self.experts.data[int(short.split(".")[1])]
        else:
            into = {"o_proj": self.o, "down_proj": self.down}[part].data
        count = into.shape[1]
        into.copy_(tensor.narrow(1, self.rank * count, count))

    def checksums(self) -> dict[str, Tensor]:
        """Copies of all parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}


def engines(size: int, dtype: torch.dtype = torch.float32, base: dict[str, Tensor] | None = None) -> list[Engine]:
    """The engines of all ranks, with a checkpoint loaded."""
    made = [Engine(rank, size, dtype) for rank in range(size)]
    for engine in made:
        engine.load_weights((checkpoint(dtype) if base is None else base).items())
    return made


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=30)
        self.values: list = [None] * size

    def of(self, rank: int) -> "OneThread":
        """The view of one rank."""
        return OneThread(self, rank)

    def run(self, work) -> list:
        """Call `work(rank)` in a thread for each rank. Returns the results, or the exceptions."""

        def one(rank):
            try:
                return work(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


class OneThread:
    """One of several ranks."""

    def __init__(self, group: Threads, rank: int) -> None:
        self.group, self.rank = group, rank

    def gather(self, value):
        """The values of all ranks."""
        self.group.values[self.rank] = value
        self.group.barrier.wait()
        values = list(self.group.values)
        self.group.barrier.wait()
        return values
