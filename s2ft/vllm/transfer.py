"""Slice sync in vLLM: the weight transfer backend ``s2ft``.

``vllm serve BASE --weight-transfer-config '{"backend": "s2ft"}'`` with ``VLLM_SERVER_DEV_MODE=1``, or
``LLM(BASE, weight_transfer_config={"backend": "s2ft"})``. vLLM's own routes and methods for weight updates then take
the messages of :mod:`s2ft.sync`. Each worker writes the slices into its own part of the weights.

The engine core knows what the workers don't: whether requests are running, and the prefix cache. So it is asked on the
way of each message to the workers, and it forgets the cache after each change.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from s2ft.foreign import check_mentioned
from s2ft.vllm.compatibility import guarded, in_place_of, logger, part_of, private, when_imported

FEATURE, ON_PROCESSORS = "slices of a training run", "weights that slices can be written into, on processors,"
BACKEND = "s2ft"
_UTILS = "vllm.model_executor.layers.utils"
_FACTORY = "vllm.distributed.weight_transfer.factory"
_CORE = "vllm.v1.engine.core"
_OPEN = "_s2ft_update_is_open"  # of an engine core: an update was started and not finished
INIT, UPDATE, SHUTDOWN = "init_weight_transfer_engine", "update_weights", "shutdown_weight_transfer_engine"
START, FINISH = "start_weight_update", "finish_weight_update"
METHODS = (INIT, START, UPDATE, FINISH, SHUTDOWN)


def install() -> None:
    """Register the backend, let the engine core guard it, and leave weights as they are where it is chosen."""
    engine = BACKEND, "s2ft.vllm.transfer_engine", "S2FTWeightTransferEngine"
    when_imported(_FACTORY, FEATURE, lambda: private(_FACTORY, "WeightTransferEngineFactory").register_engine(*engine))
    when_imported(_CORE, FEATURE, _guard)
    guarded(ON_PROCESSORS, lambda: when_imported(_UTILS, ON_PROCESSORS, _leave_unpacked))


# ---- in the engine core ----------------------------------------------------------------------------------


def _guard() -> None:
    @in_place_of(_CORE, "EngineCore.collective_rpc")
    def collective_rpc(call, self, method, timeout=None, args=(), kwargs=None):
        if method not in METHODS or not is_chosen(self.vllm_config):
            return call(self, method, timeout, args, kwargs)
        return _guarded_call(self, functools.partial(call, self), method, timeout, args, dict(kwargs or {}))


def _guarded_call(
    core: Any, call: Callable, method: str, timeout: Any, args: tuple, kwargs: dict[str, Any]
) -> list[Any]:
    # The workers of all replicas may agree on a message together. A replica that generates would wait for the others in
    # its own collectives meanwhile, and they for it.
    replicas = core.vllm_config.parallel_config.data_parallel_size
    if method in (INIT, UPDATE, SHUTDOWN) and replicas > 1 and not core.is_scheduler_paused():
        raise RuntimeError(
            "an engine with data parallel replicas takes slices while it is paused: pause it first (POST "
            "/pause?mode=keep) and resume it afterwards (POST /resume)"
        )
    if "weights" in part_of(core.model_executor, "sleeping_tags"):
        raise RuntimeError("the engine's weights are asleep: wake the engine up first (POST /wake_up)")
    # No request is in the middle of its answer: none runs, or generation is paused.
    idle = not core.scheduler.has_unfinished_requests() and not core.batch_queue
    args, kwargs = tuple(_with(one, idle) for one in args), {name: _with(one, idle) for name, one in kwargs.items()}
    if method in (START, SHUTDOWN) and getattr(core, _OPEN, False):  # an earlier client has died between two calls
        call(on_worker, timeout, (FINISH, (), {}))
    answers = call(on_worker, timeout, (method, args, kwargs))
    failed = [answer for answer in answers if answer is not None]
    if method in (START, UPDATE, FINISH):
        setattr(core, _OPEN, method != FINISH and not failed)
    if method in (INIT, UPDATE, SHUTDOWN) and idle:  # also a call that failed may have restored the base
        # Keys and values of the former weights are forgotten. Paused requests compute theirs again.
        if not core.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
            raise RuntimeError(
                "the weights are changed, but the prefix cache could not be reset, so that answers may mix old and new "
                "weights: call reset_prefix_cache"
            )
        core.scheduler.reset_encoder_cache()
        core.model_executor.reset_encoder_cache()
    if failed:
        raise ValueError(failed[0])
    return [None for _ in answers]


def _with(info: Any, idle: bool) -> Any:
    """Tell a message whether the engine is idle. An engine with replicas gets a list of messages."""
    if isinstance(info, Mapping):
        return {**info, "idle": idle}
    return [_with(one, idle) for one in info] if isinstance(info, Sequence) and not isinstance(info, str) else info


def on_worker(worker: Any, method: str, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """Call a method of a worker. Returns its error in words.

    An exception of one worker would leave the answers of the others unread, to be taken for those of the next call.
    """
    try:
        getattr(worker, method)(*args, **kwargs)
    except Exception as error:
        logger.debug("s2ft: %s", method, exc_info=True)
        return str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
    return None


# ---- on processors ---------------------------------------------------------------------------------------


def _leave_unpacked() -> None:
    """Let an engine with this backend keep its weights as they are, and multiply by them with PyTorch.

    vLLM's CPU backend packs the weight of each linear layer into a form of its own (oneDNN, AMX, ZenDNN) and forgets
    the original, so that nothing can be written into it. Engines without the backend are not changed.
    """
    config = private("vllm.config", "get_current_vllm_config_or_none")

    @in_place_of(_UTILS, "dispatch_cpu_unquantized_gemm")
    def dispatch(pack: Any, layer: torch.nn.Module, *args: Any, **options: Any) -> None:
        if is_chosen(config()):  # is_packed relies on the name
            check_mentioned(pack, "cpu_linear", "vllm", "weights of which the CPU backend has a packed copy")
        if layer.weight.dim() == 2 and is_chosen(config()):
            layer.cpu_linear = torch.nn.functional.linear
        else:
            pack(layer, *args, **options)


def is_chosen(config: Any) -> bool:
    """Whether an engine's configuration has the weight transfer backend ``s2ft``."""
    return getattr(getattr(config, "weight_transfer_config", None), "backend", None) == BACKEND


def is_packed(module: torch.nn.Module) -> bool:
    """Whether a layer of the CPU backend computes with a packed copy of its weight."""
    return getattr(module, "cpu_linear", torch.nn.functional.linear) is not torch.nn.functional.linear
