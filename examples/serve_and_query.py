"""Serve a base and its adapters over HTTP, and query them with OpenAI's client.

Run it:

    python examples/serve_and_query.py
    python examples/serve_and_query.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The server runs in a thread of this process here. In production, run `s2ft serve --model M --adapters adapters`.

It prints the models that the server lists, and an answer of each. Every adapter is a model with the adapter's name.
"""

import threading
import time

import uvicorn
from openai import OpenAI
from tiny import load, options, train

import s2ft
from s2ft.serve.server import build_app
from s2ft.serve.server_options import ServerOptions


def save_an_adapter(name: str | None, folder: str) -> None:
    """Train a few steps and save the adapter."""
    model, tokenizer = load(name)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2, o_ratio=0.5))
    ids = tokenizer("Good morning! What a fine day it is.", return_tensors="pt")["input_ids"]
    train(model, {"input_ids": ids, "labels": ids}, lr=3e-2 if name is None else 1e-3)
    s2ft.save_adapter(model, folder)


def start(model, tokenizer, adapters: str) -> tuple[uvicorn.Server, threading.Thread]:
    """A running server on a free port, and its thread."""
    app, _ = build_app(model, tokenizer, "base", adapters, ServerOptions())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    return server, thread


def main() -> None:
    job = options(__doc__).parse_args()
    save_an_adapter(job.model, "adapters/polite")
    model, tokenizer = load(job.model)
    server, thread = start(model.requires_grad_(False), tokenizer, "adapters")
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="not needed")
        names = [each.id for each in client.models.list()]
        print(f"models: {', '.join(names)}")
        for name in names:
            reply = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Hello"}], max_tokens=12, temperature=0
            )
            print(f"{name}: {reply.choices[0].message.content!r}")
        client.close()
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
