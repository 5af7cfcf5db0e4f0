"""An engine without vLLM, for tests of the sending side: its weights are the tensors of a checkpoint's files.

It takes the messages of `s2ft.sync` as vLLM's server and vLLM's LLM take them, and refuses what they refuse.
"""

import base64
import threading
import time
from contextlib import contextmanager

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from torch import nn

from support.inside import Receiver
from support.ranks import free_port
from support.states import tensors_of


class CheckpointEngine:
    """Weights of a checkpoint in a dtype, into which slices are written by the plugin's receiver.

    Attributes:
        weights: The tensors by name.
        calls: Names of all calls, in order.
        bytes: Size of the numbers of each update.
        written: Copies of all tensors after each update.
        paused: Whether generation is paused.
        fails: A text with which the next update fails.
    """

    def __init__(self, folder, dtype=torch.float32) -> None:
        found = tensors_of(folder).items()
        self.weights = {name: nn.Parameter(tensor.to(dtype), requires_grad=False) for name, tensor in found}
        self.receiver = Receiver(nn.ParameterList(self.weights.values()), self.load_weights)
        self.calls, self.bytes, self.paused, self.updating, self.fails = [], [], False, False, ""
        self.written: list[dict[str, torch.Tensor]] = []

    def load_weights(self, tensors) -> None:
        for name, tensor in tensors:
            self.weights[name].data.copy_(tensor)

    # ---- vLLM's methods ------------------------------------------------------------------------------

    def init_weight_transfer_engine(self, request) -> None:
        self.calls.append("init")
        self.receiver.bind(request["init_info"])

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
        info = request["update_info"]
        try:
            if self.fails and not info.get("base"):
                raise RuntimeError(self.fails)
            self.receiver.update(info)
        except BaseException:
            self.updating = False  # as vLLM's worker does
            raise
        self.written.append({name: tensor.clone() for name, tensor in self.weights.items()})
        if not info.get("base"):
            self.bytes.append(info["tensor"].nbytes if "tensor" in info else len(base64.b64decode(info["values"])))

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def pause(self, mode="abort") -> None:
        self.calls.append(f"pause {mode}")
        self.paused = True

    def resume(self) -> None:
        self.calls.append("resume")
        self.paused = False


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
        models = {"dtype": str(next(iter(engine.weights.values())).dtype)}
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
    port = free_port()
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
