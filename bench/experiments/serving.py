"""Serving many adapters over the base's width and their number: switching, and one batch for all (S²FT paper, 5.4).

The models have random weights, and the adapters random values. Each row is measured and checked in one run: after all
switches the weights are those of a fresh load and of the base, bit for bit; a batch of the bank gives the logits of
each adapter alone. What merging and unmerging leaves of LoRA's base is measured beside it.
"""

import copy
import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import s2ft
from bench.experiments.printing import Column, Table, summary
from bench.experiments.random_models import config_of, random_model
from bench.experiments.runner import ExperimentRun, Results, Stage
from bench.harness import drift, fill_slices, interleaved, loras_of, median_ratio, same_bits
from s2ft.adapter import native
from s2ft.adapter.adapter import Adapter
from s2ft.packages import check_packages
from s2ft.train.device import gpu_or_cpu

KEYS = ("settings", "measures", "widths", "numbers")
NEEDED = ("measures", "widths", "numbers")
SETTINGS = ("channels", "rank", "layers", "tokens", "rounds", "switches", "dtype", "device")
ROW = ()
HEAD = 64  # width of an attention head
STD = 1e-2  # of the adapters' values
TITLES = {"switch": "switching to another adapter", "parallel": "a batch with an adapter for each row"}
METHODS = {"base_ms": "base", "s2ft_ms": "S²FT", "lora_ms": "LoRA"}


def stages(experiment: dict[str, Any]) -> list[Stage]:
    """Check the experiment; there is a run for each measure, width and number."""
    check_packages("s2ft.peft")
    found = runs(experiment)
    return [Stage(found, alone=True)]


def runs(experiment: dict[str, Any]) -> list[ExperimentRun]:
    """Return the runs."""
    settings = {**experiment["settings"], "device": experiment["settings"].get("device") or str(gpu_or_cpu())}
    if min(experiment["numbers"]) < 2 or any(width % HEAD for width in experiment["widths"]):
        raise ValueError(
            f"numbers must be at least 2 and widths multiples of {HEAD}, got {experiment['numbers']} and "
            f"{experiment['widths']}"
        )
    if settings["channels"] > ffn_channels(min(experiment["widths"])):
        raise ValueError(
            f"channels must be at most {ffn_channels(min(experiment['widths']))}, got {settings['channels']}"
        )
    labels = itertools.product(experiment["measures"], experiment["widths"], experiment["numbers"])
    found = [dict(zip(("measure", "width", "adapters"), one)) for one in labels]
    for one in found:
        if one["measure"] not in TITLES:
            raise ValueError(f"measures must be of {', '.join(TITLES)}, got {one['measure']!r}")
    return [ExperimentRun(one, {**settings, **one}) for one in found]


def ffn_channels(width: int) -> int:
    """Return the channels of an FFN with the proportions of LLaMA-7B."""
    return 8 * ((width + 2) // 3)


def measure(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Measure and check one measure at one width and number: times in ms, medians of the rounds."""
    config = config_of({
        "model_type": "llama", "vocab_size": 128, "hidden_size": settings["width"],
        "intermediate_size": ffn_channels(settings["width"]), "num_hidden_layers": settings["layers"],
        "num_attention_heads": settings["width"] // HEAD,
    })  # fmt: skip
    dtype = "float32" if settings["measure"] == "parallel" else settings["dtype"]  # so that logits can be compared
    base = random_model(config, dtype, settings["device"]).requires_grad_(False)
    adapters = random_adapters(base, settings["adapters"], settings["channels"])
    return [{"switch": measure_switch, "parallel": measure_parallel}[settings["measure"]](base, adapters, settings)]


def random_adapters(base: nn.Module, number: int, channels: int) -> list[Adapter]:
    """Make adapters with random units of down_proj and random values, named by their numbers. The base stays."""
    found = []
    for seed in range(number):
        config = s2ft.S2FTConfig(d_ratio=channels / base.config.intermediate_size, layout="indexed", seed=seed)
        s2ft.attach(base, config, name=str(seed))
        torch.manual_seed(seed)
        fill_slices(base, STD)
        found.append(s2ft.get_adapter(base, str(seed)))
        s2ft.detach(base)
    return found


def _times(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times = interleaved(steps, rounds, warmup=1)
    found = {f"{name}_ms": 1000 * statistics.median(seconds) for name, seconds in times.items()}
    return {**found, "lora_to_s2ft": median_ratio(times, "lora", "s2ft")}


# ---- switching -------------------------------------------------------------------------------------------


def measure_switch(base: nn.Module, adapters: list[Adapter], settings: dict[str, Any]) -> dict[str, Any]:
    """Measure a switch to another adapter in all layers: S²FT's scatter against unmerging and merging LoRA.

    Returns:
        The times; `exact`, whether the weights after `switches` switches equal those of a fresh load and, without an
        adapter, the base; and `lora_drift`, the largest difference of a base weight after as many switches of LoRA.

    Raises:
        RuntimeError: A switch was not exact.
    """
    model, lora = copy.deepcopy(base), loras_of(base, [one.name for one in adapters], settings["rank"])
    for adapter in adapters:
        s2ft.load_adapter(model, adapter, active=False, device=settings["device"])
    ours, theirs = (itertools.cycle(map(str, range(len(adapters)))) for _ in range(2))
    lora.merge_adapter([next(theirs)])

    def lora_step() -> None:
        lora.unmerge_adapter()
        lora.merge_adapter([next(theirs)])

    steps = {"s2ft": lambda: s2ft.set_adapter(model, next(ours)), "lora": lora_step}
    times = _times(steps, settings["rounds"])
    for _ in range(settings["switches"]):
        for step in steps.values():
            step()
    (active,), fresh = s2ft.status(model).active, copy.deepcopy(base)
    s2ft.load_adapter(fresh, adapters[int(active)])
    loaded = same_bits(model, fresh)
    s2ft.set_adapter(model, None)
    if not loaded or not same_bits(model, base):
        raise RuntimeError(f"width {settings['width']}: the weights after switching are not those of a fresh load")
    lora.unmerge_adapter()
    return {**times, "exact": True, "lora_drift": drift(lora, base)}


# ---- one batch for all adapters --------------------------------------------------------------------------


@torch.no_grad()
def measure_parallel(base: nn.Module, adapters: list[Adapter], settings: dict[str, Any]) -> dict[str, Any]:
    """Measure one forward pass in which each row has its own adapter: a bank against PEFT's mixed batch.

    Returns:
        The times; `difference`, the largest difference of the bank's logits to those of each adapter alone, relative to
        the largest logit; and `restored`, whether the base has its old bits.

    Raises:
        RuntimeError: The bank's logits are not those of the adapters alone, or the base has changed.
    """
    before, names = copy.deepcopy(base), [adapter.name for adapter in adapters]
    generator = torch.Generator().manual_seed(0)
    shape = (len(adapters), settings["tokens"])
    ids = torch.randint(base.config.vocab_size, shape, generator=generator).to(settings["device"])
    lora = loras_of(base, names, settings["rank"])
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
        times, logits = _times(steps, settings["rounds"]), batch()
    model, difference = copy.deepcopy(before), 0.0
    for row, adapter in enumerate(adapters):
        s2ft.load_adapter(model, adapter)
        alone = model(input_ids=ids[row : row + 1]).logits
        difference = max(difference, float((logits[row] - alone[0]).abs().max() / alone.abs().max()))
    if difference > 1e-4 or not same_bits(base, before):
        raise RuntimeError(
            f"width {settings['width']}: a batch of the bank differs by {difference:.2g} from the adapters alone, or "
            "has changed the base"
        )
    return {**times, "difference": difference, "restored": True}


# ---- tables ----------------------------------------------------------------------------------------------


def tables(experiment: dict[str, Any], results: Results) -> list[Table]:
    """Return a table of each measure."""
    settings, found = experiment["settings"], []
    values = [Column(name, f"{title} ms", ".4g") for name, title in METHODS.items()]
    values += [Column("lora_to_s2ft", "LoRA to S²FT", ".3g"), Column("exact", "bits as loaded")]
    values += [Column("lora_drift", "LoRA's drift", ".2g"), Column("difference", "difference to alone", ".2g")]
    values += [Column("restored", "base's bits")]
    notes = {
        "switch": f"S²FT: {settings['channels']} channels, LoRA: rank {settings['rank']}; {settings['switches']} "
        "switches before the bits were compared",
        "parallel": f"{settings['tokens']} tokens a row; the difference is relative to the largest logit",
    }
    for name in experiment["measures"]:
        mine = [run for run in runs(experiment) if run.labels["measure"] == name]
        title, by = f"{experiment['title']}: {TITLES[name]}", [Column("width"), Column("adapters")]
        found.append(summary(name, title, mine, results, by, values, [notes[name]]))
    return found
