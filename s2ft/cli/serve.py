"""s2ft serve: answer over HTTP with a base model and its adapters."""

from dataclasses import dataclass

from s2ft.cli.parse import MODEL, parse, quiet_transformers
from s2ft.packages import check_packages
from s2ft.text.models import DTYPES
from s2ft.train.options import check_fields, option

EXAMPLE = """  s2ft serve --model meta-llama/Llama-3.2-1B --adapters runs
  s2ft serve --model meta-llama/Llama-3.2-1B --adapters runs math=old-runs/7 --check
  s2ft serve --model meta-llama/Llama-3.2-1B --adapters runs --host 0.0.0.0 --port 80 --api-key SECRET"""


@dataclass
class ServeArguments:
    model: str = option(text=MODEL)
    adapters: list[str] = option(
        [],
        "directories of adapters or of output folders of s2ft sft, or single ones, also as NAME=DIR; clients name an "
        "adapter by its folder, and new folders are found while the server runs",
        metavar="DIR",
    )
    check: bool = option(False, "read all adapters, compare them with the base, and end without serving")
    engine: str = option(
        "transformers",
        "transformers: the built-in server; vllm: export the adapters as LoRA and run `vllm serve`",
        choices=("transformers", "vllm"),
    )
    host: str = option("127.0.0.1", "address to listen on; the default is reached from this machine only")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    api_key: str | None = option(
        None,
        "key that clients must send for all paths under /v1 (/health and /metrics are open)",
        shown="the variable S2FT_API_KEY, if it is set",
        metavar="KEY",
    )
    served_model_name: str | None = option(
        None, "name of the base model for clients", shown="the name of the model or of its folder", metavar="NAME"
    )
    max_batch_size: int = option(16, "answers that are generated at once", unit="answers")
    max_batch_tokens: int | None = option(
        None,
        "tokens of all prompts and answers in the batch, which limits the memory of keys and values",
        shown="no limit",
    )
    queue_size: int = option(256, "requests that may wait; more are refused with status 429", unit="requests")
    timeout: float = option(300.0, "longest time of a request, waiting included", unit="seconds", metavar="SECONDS")
    max_tokens_limit: int | None = option(None, "longest answer in tokens", shown="the rest of the context")
    max_body_bytes: int = option(2 << 20, "largest request in bytes", shown="2097152, which is 2 MiB")
    adapter_bytes: int | None = option(
        None, "memory for adapters in bytes; the least recently used ones are removed", shown="no limit"
    )
    grace: float = option(
        20.0, "time to finish running requests after SIGTERM or Ctrl-C", unit="seconds", metavar="SECONDS"
    )
    access_log: str = option(
        "text", "one line a request in the log, as text or as JSON, or off", choices=("text", "json", "off")
    )
    ignore_unsupported: bool = option(
        False,
        "ignore fields of requests that the server does not support, such as tools; the header X-Ignored-Parameters "
        "of the answer names them",
    )
    dtype: str = option("auto", "dtype of the model's weights; auto keeps the checkpoint's dtype", choices=DTYPES)
    load_in_4bit: bool = option(False, "load the weights in 4 bit by bitsandbytes")
    load_in_8bit: bool = option(False, "load the weights in 8 bit by bitsandbytes")
    attn_implementation: str | None = option(
        None, "attention of the model by its name in transformers", shown="transformers' choice", metavar="NAME"
    )
    revision: str = option("main", "branch, tag or commit of the model on the hub")
    trust_remote_code: bool = option(False, "run the code that the model brings along")

    def __post_init__(self) -> None:
        check_fields(self)


def run(arguments: list[str]) -> None:
    (job,) = parse(
        "serve",
        "Answer over HTTP with a base model and its adapters. The API is like OpenAI's; a request's `model` names the\n"
        "adapter.",
        [ServeArguments],
        arguments,
        EXAMPLE,
    )
    quiet_transformers()
    by_vllm = job.engine == "vllm" and not job.check
    if by_vllm:
        check_packages("s2ft serve --engine vllm", "--engine transformers, which serves without it")
    else:
        check_packages("s2ft serve")
    check(job)
    if by_vllm:
        serve_by_vllm(job)
    else:
        serve_here(job)


def check(job: ServeArguments) -> None:
    """Check the options before the model is loaded, which can take minutes.

    Raises:
        NotADirectoryError: A folder of adapters does not exist.
        ValueError: A number is outside its range, or a folder can't be served.
    """
    from s2ft.serve.sources import source_of

    for adapters in job.adapters:
        source_of(adapters)
    if job.check and not job.adapters:
        raise ValueError("--check checks adapters: give --adapters")
    if not 0 <= job.port < 1 << 16:
        raise ValueError(f"port must be 0 to 65535, got {job.port}")
    for name in ("max_batch_size", "queue_size", "timeout", "max_body_bytes"):
        if not getattr(job, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(job, name)}")
    if not job.grace >= 0:
        raise ValueError(f"grace must be 0 or above, got {job.grace}")


def serve_here(job: ServeArguments) -> None:
    """Serve with the built-in server until it is stopped."""
    from s2ft.serve.options import Limits, ServerOptions, key_of, served_name
    from s2ft.serve.server import check_adapters, serve

    limits = Limits(key_of(job.api_key), job.timeout, job.max_body_bytes, job.max_tokens_limit, job.ignore_unsupported)
    options = ServerOptions(
        job.host,
        job.port,
        job.max_batch_size,
        job.queue_size,
        job.max_batch_tokens,
        job.adapter_bytes,
        job.grace,
        job.access_log,
        limits,
    )
    model, tokenizer = load(job)
    base = job.served_model_name or served_name(job.model)
    if job.check:
        return check_adapters(model, base, job.adapters)
    serve(model, tokenizer, base, job.adapters, options)


def load(job: ServeArguments):
    """Load the model and its tokenizer."""
    from types import SimpleNamespace

    import torch

    from s2ft.train.loading import load_base
    from s2ft.train.options import ModelOptions

    options = ModelOptions(
        job.model, job.revision, job.dtype, job.attn_implementation, job.load_in_8bit, job.load_in_4bit
    )
    gpu = torch.cuda.is_available()
    device = SimpleNamespace(use_cpu=not gpu, device="cuda" if gpu else "cpu", trust_remote_code=job.trust_remote_code)
    return load_base(options, device)


def serve_by_vllm(job: ServeArguments) -> None:
    """Export the adapters as LoRA and replace this process by `vllm serve`. Raises ValueError without adapters."""
    import os
    import tempfile
    from pathlib import Path

    from s2ft.serve import vllm
    from s2ft.serve.options import key_of, served_name, warn_if_open

    if not job.adapters:
        raise ValueError("--engine vllm serves adapters: give --adapters")
    key = key_of(job.api_key)
    warn_if_open(job.host, key)
    # vLLM replaces this process and reads the folder, which is therefore not removed. It is, if the export fails.
    with tempfile.TemporaryDirectory(prefix="s2ft-vllm-") as target:
        exported = vllm.export(job.model, job.adapters, Path(target))
        base = job.served_model_name or served_name(job.model)
        template = vllm.write_template(exported, Path(target))
        line = vllm.command(job.model, exported, job.host, job.port, base, key, template)
        os.execvp(line[0], line)
