"""The engines that a trainer sends slices to: a server of vLLM, or vLLM's LLM in this process."""

import base64
import json
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from s2ft.sync.wire import DTYPES

BACKEND = """{"backend": "s2ft"}"""


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


class Engine(ABC):
    """What a sender asks of an engine.

    Attributes:
        name: Words for messages.
        is_local: Whether each rank of the trainer has an engine of its own.
    """

    name: str
    is_local: bool

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

    def init(self, info: dict[str, Any]) -> None:
        """Announce slices."""
        self.call("init_weight_transfer_engine", {"init_info": info})

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

    def pause(self) -> None:
        """Stop generation. Requests wait and go on afterwards."""
        self.call("pause?mode=keep")

    def resume(self) -> None:
        """Let generation go on."""
        self.call("resume")


def engine_of(engine: Any, timeout: float) -> Engine:
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


class ServerEngine(Engine):
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
        answer = _values(raw)
        error = answer.get("error", answer)
        text = error.get("message", error) if isinstance(error, dict) else error
        return f"{self.name} refused {path.partition('?')[0]} (status {code}): {text or raw.decode(errors='replace')}"


def _values(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw) if raw else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class LocalEngine(Engine):
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

    def pause(self) -> None:
        """Nothing: an LLM generates nothing between two calls."""

    def resume(self) -> None:
        """Nothing."""

    def call(self, method: str, body: dict[str, Any] | None = None) -> None:
        try:
            getattr(self.llm, method)(*([] if body is None else [body]))
        except Exception as error:  # of the worker, of any class
            raise EngineError(f"{self.name} refused {method}: {error}") from error
