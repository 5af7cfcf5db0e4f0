"""s2ft estimate: the memory of training a model."""

import json
from dataclasses import dataclass, replace

from s2ft.cli.parse import MODEL, given_options, parse, quiet_transformers
from s2ft.cli.plan import check_ratios, hollow
from s2ft.text.models import DTYPES
from s2ft.train.options import check_fields, option, with_default_ratio

EXAMPLE = """  s2ft estimate meta-llama/Llama-3.1-8B --batch-size 4 --max-length 2048 --device-memory 24GB
  s2ft estimate meta-llama/Llama-3.1-70B --strategy fsdp2 --device-memory 80GB --gradient-checkpointing"""
SHARED = {"group": "model and data"}
SEVERAL = {"group": "several devices"}
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "tp", "tp+fsdp2")  # those of s2ft.Strategy, without torch


@dataclass
class EstimateArguments:
    model: str = option(text=MODEL, positional=True, metavar="MODEL")
    batch_size: int = option(8, "rows of one forward pass on one device", unit="rows", least=1, **SHARED)
    max_length: int = option(1024, "tokens of the longest row", unit="tokens", least=2, **SHARED)
    accumulation: int = option(1, "forward passes of one update", least=1, **SHARED)
    dtype: str = option("auto", "dtype of the model's weights; auto: that of its config", choices=DTYPES, **SHARED)
    load_in_4bit: bool = option(False, "count a base in 4 bit", **SHARED)
    load_in_8bit: bool = option(False, "count a base in 8 bit", **SHARED)
    optimizer: str = option("adamw", "optimizer by its name in s2ft.estimate", **SHARED)
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass", **SHARED)
    chunked_loss: bool = option(
        True, "compute the loss in pieces", off="compute the loss from all logits at once", **SHARED
    )
    device: str | None = option(
        None, "device of the training", choices=("cpu", "cuda"), shown="the GPU if there is one", **SHARED
    )
    device_memory: str | None = option(
        None, "memory of the device, such as 24GB: the table says which row fits", metavar="SIZE",
        shown="what is free here", **SHARED,
    )  # fmt: skip
    ratios: list[float] | None = option(
        None, "ratios of the table, for every projection that is trained", shown="0.01 0.03 0.05 0.1 0.2", **SHARED
    )
    json: bool = option(False, "print JSON", **SHARED)
    strategy: str | None = option(
        None,
        "how training is spread over devices; the numbers are then those of one device",
        choices=STRATEGIES,
        shown="one device",
        **SEVERAL,
    )
    devices: int | None = option(
        None, "number of devices", least=1, shown="the smallest on which the largest row fits", **SEVERAL
    )
    tp_size: int | None = option(
        None, "devices over which each weight is split, for tp+fsdp2", least=2, shown="none", **SEVERAL
    )
    offload: str | None = option(
        None, "what is kept in the memory of the host", choices=("optimizer", "all"), shown="nothing", **SEVERAL
    )
    reshard_after_forward: bool = option(
        True, "FSDP2: free the gathered weights of a block after its forward pass",
        off="keep them until the backward pass", **SEVERAL,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields(self)
        check_ratios(self.ratios)
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other")
        if self.strategy is None:
            given = [name for name in ("devices", "tp_size", "offload") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{given[0]} needs strategy: one of {', '.join(STRATEGIES)}")
        elif self.load_in_4bit or self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are counted for one device: leave out strategy")

    def spread(self):
        """Return how training is spread over devices, an s2ft.Strategy, or None for one device."""
        from s2ft.estimation.devices import Strategy, check_devices

        if self.strategy is None:
            return None
        made = Strategy(self.strategy, self.offload, self.tp_size, reshard_after_forward=self.reshard_after_forward)
        check_devices(made, self.devices)
        return made


def run(arguments: list[str]) -> None:
    from s2ft.config import S2FTConfig

    job, config = parse(
        "estimate",
        "Print what training a model takes: parameters and memory. Only the model's config is read, no weights.",
        [EstimateArguments, S2FTConfig],
        arguments,
        EXAMPLE,
        {S2FTConfig: "selection"},
    )
    quiet_transformers()
    from s2ft.estimation.result import size
    from s2ft.train.ratio_table import table

    config = with_default_ratio(config, given_options(arguments))
    model = hollow(job.model, job.dtype)
    rows, found, room = _rows(job, config, model)
    if job.json:
        shown = {"model": job.model, "device": found.device, "batch": found.batch, "length": found.length}
        shown |= {"strategy": found.strategy, "devices": found.devices, "host": found.host}
        print(json.dumps({**shown, "room": room, "rows": [row.to_dict() for row in rows]}, indent=2))
        return
    print(
        f"{size(found.parameters + found.buffers)} of weights{_bits(job)}; a step of {job.batch_size} × "
        f"{job.max_length:,} tokens on {_where(found)}, {job.optimizer}"
    )
    print(table(rows, room))
    print("\n".join(_remarks(rows, found)))


def _where(found) -> str:
    from s2ft.estimation.result import size

    if found.strategy is None:
        return found.device
    host = "" if not found.host else f" and at least {size(found.host)} of the host's memory each"
    return f"each of {found.devices} {found.device} device{'s' * (found.devices > 1)} with {found.strategy}{host}"


def _rows(job: EstimateArguments, config, model):
    """Return the rows with their memory, the estimate of the smallest, and the bytes of the device."""
    import torch

    from s2ft.estimation.memory import free_memory
    from s2ft.estimation.result import size_of
    from s2ft.train.ratio_table import rows_of, with_memory

    device = torch.device(job.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    room = size_of(job.device_memory, "device_memory") or free_memory(device)
    step = dict(
        batch=job.batch_size,
        length=job.max_length,
        accumulation=job.accumulation,
        gradient_checkpointing=job.gradient_checkpointing,
        optimizer=job.optimizer,
        device=device,
        strategy=job.spread(),
        devices=job.devices,
        memory=room,
    )
    rows = rows_of(model, config, **({"ratios": job.ratios} if job.ratios else {}))
    bits = "4bit" if job.load_in_4bit else "8bit" if job.load_in_8bit else None
    config = replace(config, layout="indexed") if bits else config  # the layout that sft takes for quantized weights
    rows, found = with_memory(rows, model, config, step, job.chunked_loss, bits)
    return rows, found, room


def _bits(job: EstimateArguments) -> str:
    bits = 4 if job.load_in_4bit else 8 if job.load_in_8bit else None
    return f" before they are quantized to {bits} bit" if bits else ""


def _remarks(rows, found) -> list[str]:
    lines = ["LoRA rank: of a LoRA on the same weights with as many parameters"]
    if any(not row.counted and not row.refused for row in rows):
        lines.append("≤: on the line between the smallest and the largest row, which were counted")
    return lines + [f"note: {note}" for note in found.notes]
