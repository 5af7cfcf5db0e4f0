"""An engine without vLLM, for tests of the sending side: its weights are the tensors of a checkpoint's files.

It takes the messages of `s2ft.sync` as vLLM's server and vLLM's LLM take them, and refuses what they refuse.
"""

import base64
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from safetensors import safe_open
from starlette.concurrency import run_in_threadpool

from support.inside import DTYPES, from_message, hashes_of


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder by name."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})
    return found


class CheckpointEngine:
    """Weights of a checkpoint in a dtype, into which slices are written.

    Attributes:
        weights: The tensors by name.
        calls: Names of all calls, in order.
        bytes: Size of the numbers of each update.
        written: Copies of all tensors after each update.
        paused: Whether generation is paused.
        fails: A text with which the next update fails.
    """

    def __init__(self, folder, dtype=torch.float32) -> None:
        self.weights = {name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()}
        self.written: list[dict[str, torch.Tensor]] = []
        self.dtype, self.specs, self.sender, self.step = dtype, [], None, 0
        self.originals, self.calls, self.bytes, self.paused, self.fails = {}, [], [], False, ""
        self.updating = False

    # ---- vLLM's methods ------------------------------------------------------------------------------

    def init_weight_transfer_engine(self, request) -> None:
        info = request["init_info"]
        self.calls.append("init")
        if self.sender not in (None, info["sender"]) and not info["take_over"]:
            raise ValueError(f"the engine is bound to sender {self.sender!r}: set take_over")
        self.restore()
        specs = from_message(info["slices"])
        for spec in specs:
            weight = self.weights[spec.name]
            assert tuple(weight.shape) == spec.shape, spec.name
            if not torch.equal(hashes_of(weight.index_select(spec.dim, spec.index), spec.dim), spec.hashes):
                raise ValueError(f"{spec.name} is of another base")
        assert DTYPES[info["dtype"]] == self.dtype
        self.sender, self.specs, self.step = info["sender"], specs, -1
        self.originals = {one.name: self.weights[one.name].index_select(one.dim, one.index) for one in specs}

    def start_weight_update(self) -> None:
        self.calls.append("start")
        self.updating = True  # also after a client that has died, whose update the plugin finishes

    def finish_weight_update(self) -> None:
        self.calls.append("finish")
        if not self.updating:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update")
        self.updating = False

    def update_weights(self, request) -> None:
        self.calls.append("update")
        try:
            self._update(request["update_info"])
            self.written.append({name: tensor.clone() for name, tensor in self.weights.items()})
        except BaseException:
            self.updating = False  # as vLLM's worker does
            raise

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def pause(self, mode="abort") -> None:
        self.calls.append(f"pause {mode}")
        self.paused = True

    def resume(self) -> None:
        self.calls.append("resume")
        self.paused = False

    # ---- what an update does -------------------------------------------------------------------------

    def _update(self, info) -> None:
        if info.get("base"):
            self.restore()
            if info.get("sender") == self.sender:
                self.sender = None
            return
        if self.sender is None:
            raise RuntimeError("an update came before init")
        if info["sender"] != self.sender:
            raise ValueError(f"the engine is bound to sender {self.sender!r}")
        if self.fails:
            raise RuntimeError(self.fails)
        values = self._values(info)
        self.bytes.append(values.numel() * values.element_size())
        if values.numel() != sum(spec.numel for spec in self.specs):
            raise ValueError(f"{values.numel()} numbers came")
        for spec, part in zip(self.specs, values.split([spec.numel for spec in self.specs])):
            self.weights[spec.name].index_copy_(spec.dim, spec.index, part.view(spec.values_shape))

    def _values(self, info) -> torch.Tensor:
        if "tensor" in info:
            return info["tensor"].clone()
        return torch.frombuffer(bytearray(base64.b64decode(info["values"])), dtype=self.dtype)

    def restore(self) -> None:
        """Write the originals back."""
        self.calls.append("restore")
        for spec in self.specs:
            self.weights[spec.name].index_copy_(spec.dim, spec.index, self.originals[spec.name])


def app_of(engine: CheckpointEngine, has_dev_mode: bool = True) -> FastAPI:
    """A server with vLLM's routes. vLLM answers an exception with its text and status 500."""
    app = FastAPI()

    def answer(call, *arguments):
        try:
            call(*arguments)
        except Exception as error:
            return JSONResponse({"error": {"message": str(error), "code": 500}}, 500)
        return {"message": "done"}

    @app.get("/health")
    def health():
        return {}

    if not has_dev_mode:
        return app

    @app.get("/server_info")
    def server_info():
        models = {"dtype": str(engine.dtype)}
        return {"vllm_config": {"model_config": models, "weight_transfer_config": {"backend": "s2ft"}}}

    @app.post("/{method}")
    async def call(method: str, request: Request):
        body = await request.json()
        arguments = [*request.query_params.values(), *([body] if body else [])]
        return await run_in_threadpool(answer, getattr(engine, method), *arguments)

    return app


@contextmanager
def serving(app: FastAPI):
    """Serve an app on a free port of this machine. Yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
