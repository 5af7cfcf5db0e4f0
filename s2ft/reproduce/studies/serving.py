"""Serving many adapters over the base's width and their number: switching, and one batch for all (S²FT paper, 5.4).

The models have random weights, and the adapters random values. Each row is measured and checked in one run: after all
switches the weights are those of a fresh load and of the base, bit for bit; a batch of the bank gives the logits of each
adapter alone. What merging and unmerging leaves of LoRA's base is measured beside it.
"""

import copy
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import s2ft
from s2ft.adapter.adapter import Adapter
from s2ft.adapter.formats import native
from s2ft.packages import check_packages
from s2ft.reproduce.studies.random_models import config_of, random_model
from s2ft.reproduce.studies.timing import interleaved, milliseconds, ratio

logger = logging.getLogger(__name__)
TARGET = "down_proj"
HEAD = 64  # width of an attention head
STD = 1e-2  # of the adapters' values


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        widths: Hidden sizes of the base.
        numbers: Numbers of adapters.
        channels: Channels of down_proj that each adapter of S²FT trains in each layer.
        rank: Rank of each LoRA on down_proj.
        layers: Layers of the base.
        tokens: Tokens of each sequence of a parallel batch. 1 is a step of generation without a cache.
        rounds: Measured rounds of each function.
        switches: Switches before the weights are checked.
        dtype: Dtype of the base for switching. Parallel batches run in float32, so that logits can be compared.
        device: "cpu" or "cuda"; None is the GPU if there is one.
    """

    widths: Sequence[int] = (512, 1024, 2048, 4096)
    numbers: Sequence[int] = (2, 8, 32)
    channels: int = 32
    rank: int = 16
    layers: int = 1
    tokens: int = 16
    rounds: int = 15
    switches: int = 100
    dtype: str = "float32"
    device: str | None = None

    @property
    def place(self) -> str:
        """The device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


def base_of(width: int, plan: Plan, dtype: str) -> nn.Module:
    """Return a Llama of this width with random weights; its FFN has the proportions of LLaMA-7B."""
    fields = {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": width,
        "intermediate_size": 8 * ((width + 2) // 3),
        "num_hidden_layers": plan.layers,
        "num_attention_heads": max(1, width // HEAD),
    }
    return random_model(config_of(fields), dtype, plan.place).requires_grad_(False)


def random_adapters(base: nn.Module, number: int, channels: int) -> list[Adapter]:
    """Make adapters with random units of down_proj and random values.

    Args:
        base: A model without adapters. It is the same afterwards.
        number: Number of adapters. They are named by their numbers.
        channels: Channels that each trains in each layer.

    Raises:
        ValueError: The base has fewer channels.
    """
    found = []
    for seed in range(number):
        config = s2ft.S2FTConfig(d_ratio=channels / base.config.intermediate_size, layout="indexed", seed=seed)
        s2ft.attach(base, config, name=str(seed))
        generator = torch.Generator().manual_seed(seed)
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(STD * torch.randn(parameter.shape, generator=generator))
        found.append(s2ft.get_adapter(base, str(seed)))
        s2ft.detach(base)
    return found


def lora_of(base: nn.Module, number: int, rank: int) -> nn.Module:
    """Return a PeftModel on a copy of the base with random LoRAs on down_proj, named by their numbers."""
    check_packages("s2ft.peft")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=[TARGET], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="0")
    for name in range(1, number):
        model.add_adapter(str(name), config)
    return model.eval()


# ---- switching ---------------------------------------------------------------------------------------------


def switching(plan: Plan) -> Iterator[dict[str, Any]]:
    """Measure a switch to another adapter in all layers: S²FT's scatter against unmerging and merging LoRA.

    Args:
        plan: What is measured.

    Yields:
        A row for each width and number: `s2ft_ms`, `lora_ms`, `lora_to_s2ft` (the median of the ratios of each round),
        `exact`, whether the weights after `switches` switches equal those of a fresh load and, without an adapter, the
        base, and `lora_drift`, the largest difference of a base weight after as many switches of LoRA.

    Raises:
        RuntimeError: A switch was not exact.

    Example:
        >>> from s2ft.reproduce.studies.serving import Plan, switching
        >>> [row] = switching(Plan(widths=[64], numbers=[2], channels=4, rank=2, rounds=1, switches=5))
        >>> row["width"], row["adapters"], row["exact"]
        (64, 2, True)
    """
    _check(plan)
    for width in plan.widths:
        base = base_of(width, plan, plan.dtype)
        for number in plan.numbers:
            yield {"width": width, "adapters": number, "dtype": plan.dtype, "device": plan.place,
                   **_switched(base, number, plan)}  # fmt: skip


def _switched(base: nn.Module, number: int, plan: Plan) -> dict[str, Any]:
    adapters = random_adapters(base, number, plan.channels)
    model = copy.deepcopy(base)
    for adapter in adapters:
        s2ft.load_adapter(model, adapter, active=False, device=plan.place)
    lora = lora_of(base, number, plan.rank)
    step, lora_step = _s2ft_step(model, number), _lora_step(lora, number)
    times = interleaved({"s2ft": step, "lora": lora_step}, plan.rounds, device=plan.place)
    for _ in range(plan.switches):
        step()
        lora_step()
    exact = _is_exact(model, base, adapters)
    if not exact:
        raise RuntimeError(
            f"width {base.config.hidden_size}: the weights after switching are not those of a fresh load"
        )
    return {
        "s2ft_ms": milliseconds(times["s2ft"]),
        "lora_ms": milliseconds(times["lora"]),
        "lora_to_s2ft": ratio(times, "lora", "s2ft"),
        "exact": exact,
        "lora_drift": _drift(lora, base),
    }


def _s2ft_step(model: nn.Module, number: int) -> Callable[[], None]:
    names = itertools.cycle(map(str, range(number)))
    return lambda: s2ft.set_adapter(model, next(names))


def _lora_step(model: nn.Module, number: int) -> Callable[[], None]:
    names = itertools.cycle(map(str, range(number)))
    model.merge_adapter([next(names)])

    def step() -> None:
        model.unmerge_adapter()
        model.merge_adapter([next(names)])

    return step


def _is_exact(model: nn.Module, base: nn.Module, adapters: list[Adapter]) -> bool:
    """Whether the weights are those of a fresh load of the active adapter, and without it those of the base."""
    (active,) = s2ft.status(model).active
    fresh = copy.deepcopy(base)
    s2ft.load_adapter(fresh, adapters[int(active)])
    loaded = same_bits(model, fresh)
    s2ft.set_adapter(model, None)
    return loaded and same_bits(model, base)


def same_bits(model: nn.Module, other: nn.Module) -> bool:
    """Return whether all weights and buffers of two models with the same names are equal, bit for bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def _drift(lora: nn.Module, base: nn.Module) -> float:
    """The largest difference of a weight of the base after all LoRAs are unmerged."""
    lora.unmerge_adapter()
    weights = dict(base.named_parameters())
    names = {
        key: key.removeprefix("base_model.model.").replace(".base_layer", "") for key, _ in lora.named_parameters()
    }
    return max(
        float((parameter.float() - weights[names[key]].float()).abs().max())
        for key, parameter in lora.named_parameters()
        if "lora_" not in key
    )


# ---- one batch for all adapters ----------------------------------------------------------------------------


def parallel(plan: Plan) -> Iterator[dict[str, Any]]:
    """Measure one forward pass in which each sequence has its own adapter: a bank against PEFT's mixed batch.

    Args:
        plan: What is measured.

    Yields:
        A row for each width and number, which is the number of sequences too: `base_ms`, `s2ft_ms`, `lora_ms`,
        `lora_to_s2ft`, `difference`, the largest difference of the bank's logits to those of each adapter alone, relative
        to the largest logit, and `restored`, whether the base has its old bits.

    Raises:
        RuntimeError: The bank's logits are not those of the adapters alone, or the base has changed.

    Example:
        >>> from s2ft.reproduce.studies.serving import Plan, parallel
        >>> [row] = parallel(Plan(widths=[64], numbers=[2], channels=4, rank=2, rounds=1, tokens=3))
        >>> row["width"], row["adapters"], row["restored"]
        (64, 2, True)
    """
    _check(plan)
    for width in plan.widths:
        base = base_of(width, plan, "float32")
        for number in plan.numbers:
            yield {"width": width, "adapters": number, "dtype": "float32", "device": plan.place,
                   **_in_parallel(base, number, plan)}  # fmt: skip


@torch.no_grad()
def _in_parallel(base: nn.Module, number: int, plan: Plan) -> dict[str, Any]:
    adapters, before = random_adapters(base, number, plan.channels), copy.deepcopy(base)
    names = [adapter.name for adapter in adapters]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (number, plan.tokens), generator=generator).to(plan.place)
    lora = lora_of(base, number, plan.rank)
    with tempfile.TemporaryDirectory() as root:
        for adapter in adapters:
            native.write(adapter, Path(root, adapter.name))
        bank = s2ft.AdapterBank(base, root)

        def batch() -> Tensor:
            with bank.batch(names):
                return base(input_ids=ids).logits

        steps = {
            "base": lambda: base(input_ids=ids),
            "s2ft": batch,
            "lora": lambda: lora(input_ids=ids, adapter_names=names),
        }
        times = interleaved(steps, plan.rounds, device=plan.place)
        difference = _difference(batch(), before, adapters, ids)
    restored = same_bits(base, before)
    if difference > 1e-4 or not restored:
        raise RuntimeError(
            f"width {base.config.hidden_size}: a batch of the bank differs by {difference:.2g} from the adapters alone"
            if restored
            else f"width {base.config.hidden_size}: a batch of the bank has changed the base"
        )
    return {
        **{f"{name}_ms": milliseconds(seconds) for name, seconds in times.items()},
        "lora_to_s2ft": ratio(times, "lora", "s2ft"),
        "difference": float(f"{difference:.2g}"),
        "restored": restored,
    }


def _difference(logits: Tensor, base: nn.Module, adapters: list[Adapter], ids: Tensor) -> float:
    """The largest difference of a batch's logits to those of each adapter alone, relative to the largest logit."""
    model = copy.deepcopy(base)
    largest = 0.0
    for row, adapter in enumerate(adapters):
        s2ft.load_adapter(model, adapter)
        alone = model(input_ids=ids[row : row + 1]).logits
        largest = max(largest, float((logits[row] - alone[0]).abs().max() / alone.abs().max()))
    return largest


def _check(plan: Plan) -> None:
    for name in ("widths", "numbers"):
        values = list(getattr(plan, name))
        if not values or min(values) < (2 if name == "numbers" else 1):
            raise ValueError(f"{name} must be at least {'two adapters' if name == 'numbers' else 'one'}, got {values}")
    small = [width for width in plan.widths if width % min(width, HEAD)]
    if small:
        raise ValueError(f"widths must be multiples of {HEAD}, the width of a head, got {small}")
