"""TRL's trainers with slices: they generate by vLLM, and after each update vLLM gets the trained slices alone.

TRL merges the adapter, sends every weight of the model, and unmerges. Here the trainer sends what is trained, and the
engine restores its base at the end. TRL decides in the middle of its constructors how vLLM is started and which client
talks to a server. So these classes stand in their places while a trainer is made, and nothing of TRL is changed
afterwards.
"""

import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType
from typing import Any, TypeVar

from s2ft.model.running import replaced
from s2ft.sync.sender import SliceSender
from s2ft.sync.wire import name_of

Trainer = TypeVar("Trainer")
BACKEND = {"backend": "s2ft"}
SLEEP = (
    "vllm_enable_sleep_mode does not work with slices: an engine that sleeps forgets its base, and the slices alone do "
    "not bring it back: leave it False"
)
_NAMES = threading.Lock()  # names of TRL's modules are exchanged while a trainer is made


def with_slices(trainer: type[Trainer], *, llm: Mapping[str, Any] | None = None, **options: Any) -> type[Trainer]:
    """Make a class of TRL's trainer whose vLLM gets the trained slices in place of the whole model.

    It takes an attached model as well as an adapter in PEFT's form (`peft_config=S2FTPeftConfig(...)`). With
    `vllm_mode="colocate"` the engine has the model's dtype. A server is started with

        VLLM_SERVER_DEV_MODE=1 vllm serve BASE --weight-transfer-config '{"backend": "s2ft"}'
        --logprobs-mode processed_logprobs

    and NCCL is not needed. At the end of `train`, also after an error, the engine has its base again.

    Args:
        trainer: GRPOTrainer, RLOOTrainer, OnlineDPOTrainer or AsyncGRPOTrainer of TRL, or a class derived from one.
            AsyncGRPOTrainer makes the model itself: give it `peft_config`, or call s2ft.attach on its `model` before
            `train`.
        llm: More arguments of vLLM's LLM in colocate mode, for example ``{"dtype": "bfloat16"}``.
        options: Arguments of :class:`SliceSender`: take_over, timeout, name.

    Returns:
        A class with the arguments of `trainer`. Its trainers have the attribute `slice_sender`; None without vLLM.

    Raises:
        TypeError: The class has no way to vLLM that is known here.

    Example:
        >>> from trl import GRPOTrainer
        >>> from s2ft.sync import with_slices
        >>> issubclass(with_slices(GRPOTrainer), GRPOTrainer)
        True
    """
    if hasattr(trainer, "_sync_weight_merged"):
        mixin = _Async
    elif hasattr(trainer, "_move_model_to_vllm") or _module_with(trainer, "VLLMGeneration") is not None:
        mixin = _Generating
    else:
        raise TypeError(
            f"{trainer.__name__} generates by no vLLM that s2ft knows: its class must be one of TRL's trainers"
        )
    fields = {"llm_options": dict(llm or {}), "sender_options": options, "__module__": __name__}
    return type(f"{trainer.__name__}WithSlices", (mixin, trainer), {**fields, "__doc__": trainer.__doc__})


class _Slices:
    """What the classes share."""

    llm_options: Mapping[str, Any] = {}
    sender_options: Mapping[str, Any] = {}
    slice_sender: SliceSender | None = None

    def train(self, *args: Any, **options: Any) -> Any:
        """Train, and restore the engine's base."""
        try:
            result = super().train(*args, **options)
        except BaseException:
            self.is_in_train = False
            self._abandon_engine()
            raise
        self.release_engine()
        return result

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """Evaluate. After the training, restore the engine's base again."""
        try:
            result = super().evaluate(*args, **options)
        except BaseException:
            if not self.is_in_train:
                self._abandon_engine()
            raise
        finally:
            self._last_loaded_step = -1  # a codec evaluates with other weights than it trains with
        if not self.is_in_train:
            self.release_engine()
        return result

    def _abandon_engine(self) -> None:
        if self.slice_sender is not None:
            self.slice_sender.destroy()  # on this rank alone: others may not have failed
            self._last_loaded_step = -1  # TRL's: the next generation sends again

    def release_engine(self) -> None:
        """Restore the engine's base. On several ranks every rank must call this. The next generation sends again."""
        if self.slice_sender is not None:
            self.slice_sender.restore()
            self._last_loaded_step = -1


class _Generating(_Slices):
    """GRPO, RLOO and others that have a `vllm_generation`, and online DPO, which has its own way to vLLM."""

    def __init__(self, *args: Any, **options: Any) -> None:
        with _making(self, _module_with(type(self), "VLLMClient"), args, options):
            super().__init__(*args, **options)
        if getattr(self, "use_vllm", False):
            owner = getattr(self, "vllm_generation", self)
            engine = address_of(self.args) if self.args.vllm_mode == "server" else owner.llm
            self.slice_sender = SliceSender(self.model, engine, **self.sender_options)
            if owner is not self:
                owner.sync_weights = self.slice_sender.sync

    def _move_model_to_vllm(self) -> None:
        self.slice_sender.sync()


class _Async(_Slices):
    """AsyncGRPO, which generates by a server while it trains."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if options.get("weight_transfer") is not None:
            raise ValueError("weight_transfer is what with_slices gives: leave it out, or use AsyncGRPOTrainer itself")
        super().__init__(*args, **{**options, "weight_transfer": _SentByTheTrainer(self)})
        self.slice_sender = SliceSender(
            self.accelerator.unwrap_model(self.model), address_of(self.args), **self.sender_options
        )

    def _sync_weight_merged(self, begin: float) -> tuple[float, float, float]:
        """Send the slices from all ranks. Returns three times, as TRL's method does."""
        self.slice_sender.sync()
        if self.accelerator.is_main_process:
            self.model_version += 1
            if self.rollout_worker:
                self.rollout_worker.update_model_version(self.model_version)
        return begin, begin, begin


class _SentByTheTrainer:
    """TRL's WeightTransferProtocol of a trainer that sends by itself."""

    def __init__(self, trainer: _Async) -> None:
        self._trainer = trainer

    def init_weight_transfer(self) -> None:
        """Nothing, as for a pause and its end: the sender announces and pauses itself."""

    pause = resume = init_weight_transfer

    def send_weights(self, iterator: Any) -> None:
        raise RuntimeError("AsyncGRPOTrainer of this release of TRL sends weights in another way than 1.16")

    def destroy(self) -> None:
        if self._trainer.slice_sender is not None:
            self._trainer.slice_sender.destroy()


# ---- how TRL makes an engine -----------------------------------------------------------------------------


def address_of(args: Any) -> str:
    """The address of the server that a trainer's arguments name."""
    return args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"


def uses_vllm(args: tuple, options: Mapping[str, Any]) -> Any:
    """Return the config among the arguments of a trainer, if it asks for vLLM; else None."""
    config = options.get("args") or next((one for one in args if hasattr(one, "use_vllm")), None)
    return config if getattr(config, "use_vllm", False) else None


def check_sends_slices(trainer: type, args: tuple, options: Mapping[str, Any]) -> None:
    """Raise ValueError for a trainer of an attached model that would send all parameters to vLLM.

    In layout `permuted` the base's units are in another order, and vLLM knows no parameter of a slice.
    """
    if uses_vllm(args, options) is not None and not hasattr(trainer, "slice_sender"):
        raise ValueError(
            "use_vllm: TRL would send the parameters of the attached model, whose names and order vLLM does not know: "
            f"use s2ft.sync.with_slices({trainer.__name__}), which sends the trained slices"
        )


def choose_port() -> None:
    """Choose a port for vLLM's process group in a process that trains alone, unless one is given.

    TRL takes the first free one of four, and vLLM listens to it much later. Two runs that start together would take the
    same.
    """
    if os.environ.get("MASTER_PORT", "0") in ("", "0", "auto") and os.environ.get("WORLD_SIZE", "1") == "1":
        with socket.create_server(("", 0)) as free:
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])


@contextmanager
def _making(trainer: _Slices, own: ModuleType | None, args: tuple, options: dict[str, Any]) -> Iterator[None]:
    """Inside, a module of TRL makes engines that take slices, and clients that need no NCCL.

    It is the trainer's own, or the one that all other trainers use.
    """
    config = uses_vllm(args, options)
    if config is None:
        yield
        return
    if getattr(config, "vllm_enable_sleep_mode", False):
        raise ValueError(SLEEP)
    if config.vllm_mode == "colocate":
        choose_port()
    module = own or sys.modules["trl.generation.vllm_generation"]
    names: dict[str, Any] = {"VLLMClient": _client_class(module.VLLMClient)}
    if hasattr(module, "LLM"):  # not without vLLM, for which TRL has an error
        names["LLM"] = partial(_llm, module.LLM, trainer)
    with _NAMES, replaced(module, **names):
        yield


def _llm(make: type, trainer: _Slices, *given: Any, **options: Any) -> Any:
    """Make vLLM's LLM with TRL's options, of the model's dtype, for slices."""
    dtype = name_of(next(trainer.model.parameters()).dtype)
    return make(*given, **{"weight_transfer_config": BACKEND, "dtype": dtype, **options, **trainer.llm_options})


@cache
def _client_class(client: type) -> type:
    """A class of TRL's client that joins no NCCL group with the server."""

    class SliceClient(client):
        def init_communicator(self, device: Any = None) -> None:
            """Nothing: SliceSender connects at the first sync, and says so if the server takes no slices."""

        close_communicator = init_communicator

    return SliceClient


def _module_with(trainer: type, name: str) -> ModuleType | None:
    modules = (sys.modules.get(one.__module__) for one in trainer.__mro__)
    return next((module for module in modules if hasattr(module, name)), None)
