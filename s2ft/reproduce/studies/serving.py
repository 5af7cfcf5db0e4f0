"""Serving many adapters over the base's width and their number: switching, and one batch for all (S²FT paper, 5.4).

The models have random weights, and the adapters random values. Each row is measured and checked in one run: after all
switches the weights are those of a fresh load and of the base, bit for bit; a batch of the bank gives the logits of
each adapter alone. What merging and unmerging leaves of LoRA's base is measured beside it.
"""

import copy
import itertools
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import s2ft
from s2ft.adapter.adapter import Adapter
from s2ft.adapter.formats import native
from s2ft.packages import check_packages
from s2ft.reproduce.figures import Figure, Series
from s2ft.reproduce.kind import Kind, Planned
from s2ft.reproduce.random_models import config_of, random_model
from s2ft.reproduce.recipe import Recipe
from s2ft.reproduce.results import DONE, Run
from s2ft.reproduce.tables import Column, Table, summary
from s2ft.reproduce.timing import interleaved, milliseconds, ratio
from s2ft.train.options import check_fields, option

logger = logging.getLogger(__name__)
TARGET = "down_proj"
HEAD = 64  # width of an attention head
STD = 1e-2  # of the adapters' values


@dataclass
class ServingOptions:
    """Options of the kind "serving". The help text of each field describes it."""

    measures: list[str] = option(["switch", "parallel"], "what is measured: switch, parallel, or both")
    widths: list[int] = option([512, 1024, 2048, 4096], "hidden sizes of the base, multiples of 64")
    numbers: list[int] = option([2, 8, 32], "numbers of adapters, at least 2; in a parallel batch also of its rows")
    channels: int = option(32, "channels of down_proj that each adapter of S²FT has in each layer", least=1)
    rank: int = option(16, "rank of each LoRA on down_proj", least=1)
    layers: int = option(1, "layers of the base", least=1)
    tokens: int = option(16, "tokens of each row of a parallel batch", least=1)
    rounds: int = option(15, "measured rounds; each runs all methods", least=1)
    switches: int = option(100, "switches before the weights are checked", least=1)
    dtype: str = option(
        "float32",
        "dtype of the base for switching; parallel batches run in float32, so that logits can be compared",
        choices=("float32", "bfloat16", "float16"),
    )
    device: str | None = option(None, "cpu or cuda; null is the GPU if there is one", choices=("cpu", "cuda"))

    def __post_init__(self) -> None:
        check_fields(self)
        for measure in self.measures:
            if measure not in ("switch", "parallel"):
                raise ValueError(f"measures must be switch or parallel, got {measure!r}")
        for name, least in (("widths", 1), ("numbers", 2)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ValueError(f"{name} must be one or more numbers of at least {least}, got {values!r}")
        odd = [width for width in self.widths if width % HEAD]
        if odd:
            raise ValueError(f"widths must be multiples of {HEAD}, the width of a head, got {odd}")
        few = [width for width in self.widths if self.channels > ffn_channels(width)]
        if few:
            raise ValueError(f"channels must be at most {ffn_channels(few[0])} at width {few[0]}, got {self.channels}")

    @property
    def place(self) -> str:
        """The device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


def ffn_channels(width: int) -> int:
    """Return the channels of an FFN with the proportions of LLaMA-7B."""
    return 8 * ((width + 2) // 3)


def base_of(width: int, options: ServingOptions, dtype: str) -> nn.Module:
    """Return a Llama of this width with random weights, frozen."""
    fields = {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": width,
        "intermediate_size": ffn_channels(width),
        "num_hidden_layers": options.layers,
        "num_attention_heads": width // HEAD,
    }
    return random_model(config_of(fields), dtype, options.place).requires_grad_(False)


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


def measure_switch(width: int, number: int, options: ServingOptions) -> dict[str, Any]:
    """Measure a switch to another adapter in all layers: S²FT's scatter against unmerging and merging LoRA.

    Args:
        width: Hidden size of the base.
        number: Number of adapters.
        options: What else is measured with.

    Returns:
        `s2ft_ms`, `lora_ms`, `lora_to_s2ft` (the median of the ratios of each round), `exact`, whether the weights
        after `switches` switches equal those of a fresh load and, without an adapter, the base, and `lora_drift`, the
        largest difference of a base weight after as many switches of LoRA.

    Raises:
        RuntimeError: A switch was not exact.

    Example:
        >>> from s2ft.reproduce.studies.serving import ServingOptions, measure_switch
        >>> measure_switch(64, 2, ServingOptions(channels=4, rank=2, rounds=1, switches=5))["exact"]
        True
    """
    base = base_of(width, options, options.dtype)
    adapters = random_adapters(base, number, options.channels)
    model = copy.deepcopy(base)
    for adapter in adapters:
        s2ft.load_adapter(model, adapter, active=False, device=options.place)
    lora = lora_of(base, number, options.rank)
    step, lora_step = _s2ft_step(model, number), _lora_step(lora, number)
    times = interleaved({"s2ft": step, "lora": lora_step}, options.rounds, device=options.place)
    for _ in range(options.switches):
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


@torch.no_grad()
def measure_parallel(width: int, number: int, options: ServingOptions) -> dict[str, Any]:
    """Measure one forward pass in which each row has its own adapter: a bank against PEFT's mixed batch.

    Args:
        width: Hidden size of the base.
        number: Number of adapters, and of rows.
        options: What else is measured with.

    Returns:
        `base_ms`, `s2ft_ms`, `lora_ms`, `lora_to_s2ft` (the median of the ratios of each round), `difference`, the
        largest difference of the bank's logits to those of each adapter alone, relative to the largest logit, and
        `restored`, whether the base has its old bits.

    Raises:
        RuntimeError: The bank's logits are not those of the adapters alone, or the base has changed.

    Example:
        >>> from s2ft.reproduce.studies.serving import ServingOptions, measure_parallel
        >>> measure_parallel(64, 2, ServingOptions(channels=4, rank=2, rounds=1, tokens=3))["restored"]
        True
    """
    base = base_of(width, options, "float32")
    adapters, before = random_adapters(base, number, options.channels), copy.deepcopy(base)
    names = [adapter.name for adapter in adapters]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (number, options.tokens), generator=generator).to(options.place)
    lora = lora_of(base, number, options.rank)
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
        times = interleaved(steps, options.rounds, device=options.place)
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


# ---- the experiment ------------------------------------------------------------------------------------

MEASURES = {"switch": measure_switch, "parallel": measure_parallel}
TITLES = {"switch": "switching to another adapter", "parallel": "a batch with an adapter for each row"}


def plan(options: ServingOptions) -> list[Planned]:
    """Return a run for each measure, width and number."""
    check_packages("s2ft.peft")
    known = ("channels", "rank", "layers", "tokens", "rounds", "switches", "dtype")
    shared = {**{name: getattr(options, name) for name in known}, "device": options.place}
    runs = []
    for measured in options.measures:
        for width in options.widths:
            for number in options.numbers:
                labels = {"measure": measured, "width": width, "adapters": number}
                runs.append(Planned(labels, {**shared, **labels}))
    return runs


def measure(options: ServingOptions, run: Planned, folder: Path) -> list[dict[str, Any]]:
    """Measure and check one measure at one width and number."""
    labels = run.labels
    return [MEASURES[labels["measure"]](labels["width"], labels["adapters"], options)]


def tables(recipe: Recipe, options: ServingOptions, runs: Sequence[Run]) -> list[Table]:
    """Return a table of each measure."""
    by = [Column("width"), Column("adapters")]
    times = [Column(f"{name}_ms", f"{title} ms", ".4g") for name, title in
             (("base", "base"), ("s2ft", "S²FT"), ("lora", "LoRA"))]  # fmt: skip
    checks = {
        "switch": [Column("exact", "bits as loaded"), Column("lora_drift", "LoRA's drift", ".2g")],
        "parallel": [Column("difference", "difference to alone", ".2g"), Column("restored", "base's bits")],
    }
    notes = {
        "switch": [f"S²FT: {options.channels} channels, LoRA: rank {options.rank}; {options.switches} switches before "
                   "the bits were compared"],
        "parallel": [f"{options.tokens} tokens a row; the difference is relative to the largest logit"],
    }  # fmt: skip
    found = []
    for name in options.measures:
        mine = [run for run in runs if run.labels["measure"] == name]
        columns = [*times, Column("lora_to_s2ft", "LoRA to S²FT", ".3g"), *checks[name]]
        title = f"{recipe.title}: {TITLES[name]} ({options.place})"
        found.append(summary(name, title, mine, by, columns, notes[name]))
    return found


def figures(recipe: Recipe, options: ServingOptions, runs: Sequence[Run]) -> list[Figure]:
    """Return the times over the width at the largest number, and over the number at the largest width."""
    found = []
    for name in options.measures:
        for x, other, most in (("width", "adapters", max(options.numbers)), ("adapters", "width", max(options.widths))):
            mine = [run for run in runs if run.status == DONE and run.labels["measure"] == name]
            mine = sorted((run for run in mine if run.labels[other] == most), key=lambda run: run.labels[x])
            series = [
                Series(title, [run.labels[x] for run in mine], [run.rows[0][key] for run in mine])
                for key, title in (("base_ms", "base"), ("s2ft_ms", "S²FT"), ("lora_ms", "LoRA"))
                if mine and key in mine[0].rows[0]
            ]
            title = f"{TITLES[name]}, {most} {'adapters' if other == 'adapters' else 'wide'}"
            found.append(Figure(f"{name}_by_{x}", title, x, "ms", series, "lines", "xy"))
    return found


KIND = Kind(ServingOptions, plan, measure, tables, figures)
