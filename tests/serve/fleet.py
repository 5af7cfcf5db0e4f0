"""A tiny model with many random adapters, on disk and in memory, and a server in a thread."""

import threading
import time
from contextlib import contextmanager

import torch
import uvicorn
from support.inside import Row, RunningBatch, Sampler, ServerOptions, build_app, config_of, listen
from train.tiny import save_random_adapter, tiny_model, tiny_tokenizer

import s2ft

BASE = "tiny"


def save_adapters(folder, count, first=0, **changes):
    """Save adapters a0, a1, ... whose deltas are large enough to change nearly every token. Returns the folder."""
    ratios = dict(d_ratio=0.2, o_ratio=0.5, u_ratio=0.1)
    for number in range(first, first + count):
        name = f"a{number}"
        save_random_adapter(folder / name, tiny_model(**changes), 0.3, name, seed=number, **ratios)
    return folder


@torch.no_grad()
def greedy(model, prompt_ids, max_tokens, ends=(2,)):
    """Greedy tokens, without a batch and without a cache."""
    tokens = []
    while len(tokens) < max_tokens and not {*tokens[-1:]} & {*ends}:
        tokens.append(int(model(torch.tensor([[*prompt_ids, *tokens]]), use_cache=False).logits[0, -1].argmax()))
    return tokens


def alone(folder, prompt_ids, max_tokens, ends=(2,), **changes):
    """Greedy tokens of one adapter that is written into the weights. A folder of None is the base."""
    model = tiny_model(**changes)
    if folder is not None:
        s2ft.load_adapter(model, folder)
    return greedy(model, prompt_ids, max_tokens, ends)


def text_of(tokens):
    return tiny_tokenizer().decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def eventually(condition, what="the condition"):
    """Wait until the condition is true."""
    end = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.005)


@contextmanager
def running(adapters, model=None, **options):
    """Run a server in a thread. Yields (http://host:port, the service)."""
    options = ServerOptions(**options)
    model = tiny_model() if model is None else model
    sources = [] if adapters is None else [str(one) for one in (adapters if isinstance(adapters, list) else [adapters])]
    app, service = build_app(model, tiny_tokenizer(), BASE, sources, options)
    config = config_of(app)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listen(options.host, 0)],))
    thread.start()
    try:
        eventually(lambda: server.started or not thread.is_alive(), "the server")
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive() and not service.engine._thread.is_alive()


def greedy_row(prompt, adapter=None):
    return Row(prompt, Sampler(), adapter)


__all__ = ["BASE", "RunningBatch", "alone", "eventually", "greedy", "greedy_row", "running", "save_adapters", "text_of"]
