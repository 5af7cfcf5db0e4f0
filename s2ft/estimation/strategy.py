"""How training is spread over devices."""

from dataclasses import dataclass
from typing import Any

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "tp", "tp+fsdp2")
OFFLOADS = {"fsdp2": ("all",), "tp+fsdp2": ("all",), "zero1": ("optimizer",), "zero2": ("optimizer",)}
OFFLOADS["zero3"] = ("optimizer", "all")


@dataclass(frozen=True)
class Strategy:
    """How training is spread over devices, for :func:`s2ft.estimate`.

    Attributes:
        name: "ddp", "fsdp2", "zero1", "zero2", "zero3", "tp" or "tp+fsdp2".
        offload: What is kept in the memory of the host: "optimizer" (states, with the gradients that the optimizer
            reads; ZeRO only), "all" (also the weights between uses; FSDP2 and ZeRO-3), or None.
        tp_size: Number of devices over which a weight is split by tensor parallelism, for "tp+fsdp2". For "tp" it is
            the number of devices.
        reshard_after_forward: FSDP2: whether a block's gathered weights are freed after its forward pass.
        reduce_bucket_size: ZeRO: number of elements of a reduction buffer. The default is DeepSpeed's.

    Raises:
        TypeError: A field has a wrong type. The message names it.
        ValueError: A value is unknown, or the strategy does not have it.

    Example:
        >>> strategy = s2ft.Strategy("fsdp2", reshard_after_forward=False)
        >>> s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.1), 2, 8, strategy=strategy, devices=4).devices
        4
    """

    name: str
    offload: str | None = None
    tp_size: int | None = None
    reshard_after_forward: bool = True
    reduce_bucket_size: int = 500_000_000

    def __post_init__(self) -> None:
        if self.name not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.name!r}")
        allowed = OFFLOADS.get(self.name, ())
        if self.offload is not None and self.offload not in allowed:
            choices = " or ".join(map(repr, allowed)) or "None: it has no offload"
            raise ValueError(f"offload of {self.name} must be {choices}, got {self.offload!r}")
        if not isinstance(self.reshard_after_forward, bool):
            raise TypeError(f"reshard_after_forward must be True or False, got {self.reshard_after_forward!r}")
        for name, least in (("tp_size", 2), ("reduce_bucket_size", 1)):
            value = getattr(self, name)
            optional = name == "tp_size" and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if (self.name == "tp+fsdp2") != (self.tp_size is not None):
            raise ValueError(
                f"tp_size must be given for tp+fsdp2 and for no other strategy, got {self.tp_size} for {self.name}"
            )

    @property
    def is_tensor_parallel(self) -> bool:
        """Whether weights are split by tensor parallelism."""
        return self.name.startswith("tp")

    @property
    def is_zero(self) -> bool:
        """Whether it is DeepSpeed's ZeRO, of any stage."""
        return self.name.startswith("zero")

    @property
    def shards_weights(self) -> bool:
        """Whether a device holds only a part of each weight."""
        return self.name not in ("ddp", "zero1", "zero2")


def strategy_of(value: Any) -> Strategy | None:
    """Return the strategy of a name or a Strategy.

    Raises:
        TypeError: It is neither.
        ValueError: The name is unknown.
    """
    if value is None or isinstance(value, Strategy):
        return value
    if not isinstance(value, str):
        raise TypeError(f"strategy must be a name, a Strategy or None, got {type(value).__name__}")
    return Strategy(value)


def check_devices(strategy: Strategy | None, devices: int | None) -> None:
    """Check that a strategy can use this number of devices.

    Raises:
        ValueError: It can't.
    """
    if devices is None:
        return
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"devices must be a whole number of at least 1, got {devices!r}")
    if strategy is None and devices > 1:
        raise ValueError(f"devices={devices} needs a strategy: one of {', '.join(STRATEGIES)}")
    if strategy is not None and strategy.tp_size is not None and devices % strategy.tp_size:
        raise ValueError(f"devices must be a multiple of tp_size, {strategy.tp_size}, got {devices}")
