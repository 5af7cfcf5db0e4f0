"""The trainer's side of slice sync: it sends the trained slices of a model to the engine that generates its answers."""

import base64
import json
import logging
import time
import urllib.error
import urllib.request
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2ft.distributed import all_ranks, decide, run_on_ranks
from s2ft.sync.slices import TrainedSlices
from s2ft.sync.wire import DTYPES, name_of, to_message

logger = logging.getLogger(__name__)
BACKEND = """{"backend": "s2ft"}"""

# ---- the engines: a server of vLLM, or vLLM's LLM in this process --------------------------------------


class EngineError(RuntimeError):
    """An engine refused a call, failed, or did not answer. The message has the engine's own words.

    Example:
        >>> from s2ft.sync import EngineError, SliceSender
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> try:
        ...     SliceSender(model, "http://127.0.0.1:9").sync()
        ... except EngineError as error:
        ...     print(str(error)[:47])
        the engine at http://127.0.0.1:9 can't be reach
    """


class ReceivingEngine(ABC):
    """What a sender asks of an engine.

    Attributes:
        name: Words for messages.
        is_local: Whether each rank of the trainer has an engine of its own.
    """

    @abstractmethod
    def dtype(self) -> torch.dtype | None:
        """The dtype of its weights; None if it does not say so.

        Raises:
            EngineError: It has no routes for weights, or another weight transfer backend.
        """

    @abstractmethod
    def call(self, method: str, body: dict[str, Any] | None = None) -> Any:
        """Call one of vLLM's methods for weights.

        Args:
            method: Its name, which is that of the server's route too.
            body: Its argument.

        Raises:
            EngineError: The engine refused, failed, or did not answer.
        """

    def send(self, flat: Tensor, info: dict[str, Any]) -> None:
        """Send numbers: in the message as base64, unless the engine takes a tensor."""
        raw = flat.detach().cpu().view(torch.uint8).numpy().tobytes()
        self.update({**info, "values": base64.b64encode(raw).decode()})

    def update(self, info: dict[str, Any]) -> None:
        """Make an update, and forget what was computed with other weights."""
        self.call("start_weight_update")
        self.call("update_weights", {"update_info": info})
        self.call("finish_weight_update")
        self.call("reset_prefix_cache")


def engine_of(engine: Any, timeout: float) -> ReceivingEngine:
    """Return the engine of an address or an LLM.

    Args:
        engine: Address of a server, or vLLM's LLM.
        timeout: Seconds to wait for an answer of a server.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(engine, str):
        return ServerEngine(engine, timeout)
    if hasattr(engine, "init_weight_transfer_engine") and hasattr(engine, "update_weights"):
        return LocalEngine(engine)
    raise TypeError(f"engine must be the address of a vLLM server or vLLM's LLM, got {type(engine).__name__}")


class ServerEngine(ReceivingEngine):
    """A server of vLLM.

    Attributes:
        url: Its address.
        timeout: Seconds to wait for an answer.
    """

    is_local = False

    def __init__(self, url: str, timeout: float) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"engine must be an address such as http://localhost:8000, got {url!r}")
        self.url, self.timeout = url.rstrip("/"), timeout
        self.name = f"the engine at {self.url}"

    def dtype(self) -> torch.dtype | None:
        config = self._request("server_info?config_format=json", None).get("vllm_config", {})
        backend = (config.get("weight_transfer_config") or {}).get("backend")
        if backend != "s2ft":
            raise EngineError(
                f"{self.name} was started with weight transfer backend {backend}: install s2ft beside vLLM and start "
                f"it with --weight-transfer-config '{BACKEND}'"
            )
        return DTYPES.get(str(config.get("model_config", {}).get("dtype", "")).removeprefix("torch."))

    def call(self, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._request(method, body or {})

    def _request(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Send a POST request, or a GET request without a body. Returns the answer.

        Raises:
            EngineError: The server refused, failed, or did not answer.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return _values(answer.read())
        except urllib.error.HTTPError as error:
            raise EngineError(self._explained(path, error.code, error.read())) from error
        except TimeoutError as error:
            raise EngineError(f"{self.name} did not answer {path} within {self.timeout:g} s") from error
        except OSError as error:
            raise EngineError(f"{self.name} can't be reached: {getattr(error, 'reason', error)}") from error

    def _explained(self, path: str, code: int, raw: bytes) -> str:
        if code == 404:
            return (
                f"{self.name} has no route /{path.partition('?')[0]}: start it with VLLM_SERVER_DEV_MODE=1 and "
                f"--weight-transfer-config '{BACKEND}'"
            )
        return f"{self.name} refused {path.partition('?')[0]} (status {code}): {raw.decode(errors='replace')}"


def _values(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw) if raw else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class LocalEngine(ReceivingEngine):
    """vLLM's LLM in this process. Each rank of the trainer has its own.

    Attributes:
        llm: The LLM.
    """

    is_local = True
    name = "the LLM in this process"

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def dtype(self) -> torch.dtype | None:
        config = getattr(getattr(self.llm, "llm_engine", None), "vllm_config", None)
        if config is None:
            return None
        backend = getattr(config.weight_transfer_config, "backend", None)
        if backend != "s2ft":
            raise EngineError(
                f"{self.name} was made with weight transfer backend {backend}: give LLM the argument "
                f"weight_transfer_config={BACKEND}"
            )
        return config.model_config.dtype

    def send(self, flat: Tensor, info: dict[str, Any]) -> None:
        """Send numbers: the tensor itself if the weights are in this process."""
        engine = getattr(self.llm, "llm_engine", None)
        if getattr(getattr(engine, "model_executor", None), "driver_worker", None) is None:
            return super().send(flat, info)
        parallel = engine.vllm_config.parallel_config
        # With an external launcher each rank has an LLM of its own.
        if parallel.world_size > 1 and parallel.distributed_executor_backend != "external_launcher":
            return super().send(flat, info)
        self.update({**info, "tensor": flat})

    def call(self, method: str, body: dict[str, Any] | None = None) -> None:
        try:
            getattr(self.llm, method)(*([] if body is None else [body]))
        except Exception as error:  # of the worker, of any class
            raise EngineError(f"{self.name} refused {method}: {error}") from error


# ---- sending -------------------------------------------------------------------------------------------


class Sent(NamedTuple):
    """What one sync has sent.

    Attributes:
        step: Number of the sync.
        nbytes: Size of the numbers.
        seconds: Time from the pause to the end, with the making of the numbers.

    Example:
        >>> from s2ft.sync import Sent
        >>> sent = Sent(step=3, nbytes=7_603_200, seconds=0.05)
        >>> f"{sent.nbytes / 1e6:.1f} MB"
        '7.6 MB'
    """

    step: int
    nbytes: int
    seconds: float


class SliceSender(AbstractContextManager):
    """Sends the trained slices of a model to an engine, which generates with the merged weights from then on.

    Only the slices are sent: absolute numbers in the engine's dtype, the same that merging writes. The engine keeps the
    base's numbers of the slices and restores them exactly at the end.

    For TRL's trainers see :func:`s2ft.sync.with_slices`. A loop of your own calls :meth:`sync` after each update and
    :meth:`restore` at the end, or uses the sender in a `with` statement. An LLM whose weights are in this process gets
    the tensor; every other engine gets the numbers in the request.

    Args:
        model: An attached model, or a PeftModel with an adapter of s2ft.
        engine: Address of a vLLM server, started with VLLM_SERVER_DEV_MODE=1 and
            ``--weight-transfer-config '{"backend": "s2ft"}'``, or vLLM's LLM in this process, made with
            ``weight_transfer_config={"backend": "s2ft"}``.
        dtype: The engine's dtype. Default: what the engine says.
        take_over: Whether to take the engine from a sender that has ended without releasing it. The engine restores
            that sender's slices first.
        timeout: Seconds to wait for each answer of a server.
        name: Name of this sender. An engine that is bound to a sender refuses every other name. Default: a new one.

    Attributes:
        model: The model.
        step: Number of the last sync; -1 before the first.
        slices: The described slices; None before the first sync.

    Raises:
        TypeError: `engine` is neither an address nor an LLM.
        ValueError: The address is not valid.

    Example:
        >>> from s2ft.sync import SliceSender
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> sender = SliceSender(model, "http://localhost:8000")
        >>> sender.step
        -1
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Any,
        *,
        dtype: torch.dtype | None = None,
        take_over: bool = False,
        timeout: float = 600.0,
        name: str | None = None,
    ) -> None:
        self.model = model
        self._engine: ReceivingEngine = engine_of(engine, timeout)
        self._dtype, self._take_over = dtype, take_over
        self.name = name or uuid.uuid4().hex[:16]
        self.step = -1
        self.slices: TrainedSlices | None = None
        self._is_bound = False

    def sync(self) -> Sent:
        """Send the present numbers, so that the engine generates with them. On several ranks every rank must call this.

        Generation is paused meanwhile: requests wait and go on with the new weights. The engine's prefix cache is
        reset.

        Returns:
            The number of the sync, the bytes and the time.

        Raises:
            EngineError: The engine refused or failed. Generation goes on, and the message says with which weights.
            ValueError: The model trains something that can't be sent.
        """
        began = time.perf_counter()
        self._describe()
        flat = self.slices.buffer()
        run_on_ranks("sending slices", all_ranks(), self._sends(), lambda: self._paused(lambda: self._send(flat)))
        return Sent(self.step, self.slices.nbytes, time.perf_counter() - began)

    def restore(self) -> None:
        """Restore the engine's base, bit for bit, and release the engine. On several ranks every rank must call this.

        A later :meth:`sync` begins anew. Nothing happens if nothing was announced.

        Raises:
            EngineError: The engine refused or failed.
        """
        run_on_ranks("restoring the engine", all_ranks(), self._sends(), self._restore)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.restore()
        except Exception as failure:
            if error is None:
                raise
            logger.warning("%s", failure)

    def destroy(self) -> None:
        """Restore the engine's base and release it, on this rank alone. A failure is logged."""
        try:
            self._restore()
        except Exception as failure:
            logger.warning("%s", failure)

    # ---- what each does ------------------------------------------------------------------------------

    def _describe(self) -> None:
        """Describe the slices of the model, once. On several ranks every rank must call this."""
        if self.slices is not None:
            return
        dtype = self._dtype
        if dtype is None:
            dtype = DTYPES.get(decide("the engine's dtype", self._sends(), lambda: name_of(self._engine.dtype())).value)
        self.slices = TrainedSlices.of(self.model, dtype)

    def _send(self, flat: Tensor) -> None:
        """Send a buffer. After a failure the engine has its base again, or the error says that it does not."""
        if not self._is_bound:
            dtype, slices = name_of(self.slices.dtype), to_message(self.slices.specs)
            info = {"sender": self.name, "dtype": dtype, "slices": slices, "take_over": self._take_over}
            self._engine.call("init_weight_transfer_engine", {"init_info": info})
            self._is_bound, self._take_over = True, False
        step = self.step + 1
        try:
            self._engine.send(flat, {"sender": self.name, "step": step})
        except Exception as error:
            raise EngineError(f"sync {step} failed: {error}; {self._recovered()}") from error
        self.step = step

    def _recovered(self) -> str:
        """Restore the engine's base after a failure. Returns in words what the engine has now."""
        try:
            self._release()
        except Exception as error:
            self._is_bound, self.step = False, -1
            return (
                f"its base could not be restored ({error}), so its weights are those of this sync or of the last one: "
                "restart it, or take it over with SliceSender(..., take_over=True) and restore it"
            )
        return "the engine has its base again, and is free for another sender"

    def _restore(self) -> None:
        if self._is_bound:
            self._paused(self._release)

    def _release(self) -> None:
        self._engine.update({"base": True, "sender": self.name})
        self._is_bound, self.step = False, -1

    def _paused(self, act: Callable[[], None]) -> None:
        """Call a function while generation is paused: requests wait and go on afterwards."""
        if self._engine.is_local:  # an LLM generates nothing between two calls
            act()
            return
        try:
            self._engine.call("pause?mode=keep")
            act()
        except BaseException:
            try:
                self._engine.call("resume")
            except EngineError as error:  # the failure that is raised matters more
                logger.warning("generation could not be resumed: %s", error)
            raise
        self._engine.call("resume")

    def _sends(self) -> bool:
        """Whether this rank sends: all do if each has an engine of its own, else the first one."""
        ranks = all_ranks()
        return ranks is None or self._engine.is_local or dist.get_rank() == ranks[0]
