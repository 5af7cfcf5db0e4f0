"""s2ft serve: answer over HTTP with a base and its adapters."""

from dataclasses import dataclass, field

from s2ft.cli.parse import parse, quiet_transformers
from s2ft.packages import check_packages


@dataclass
class ServeArguments:
    model: str = field(metadata={"help": "a checkpoint folder, a name on the hub, or a .gguf file"})
    adapters: str | None = field(
        default=None,
        metadata={
            "help": "a folder of adapters or of outputs of s2ft finetune; clients name them by their folders. New ones "
            "are found while it runs"
        },
    )
    engine: str = field(
        default="transformers",
        metadata={
            "help": "transformers: built in; vllm: export the adapters as LoRA and run `vllm serve`",
            "choices": ["transformers", "vllm"],
        },
    )
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; the default is this machine alone"})
    port: int = field(default=8000, metadata={"help": "0: a free one"})
    api_key: str | None = field(
        default=None,
        metadata={"help": "what clients have to give under /v1 (/health and /metrics are open); or set S2FT_API_KEY"},
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "what clients call the base; default: the model's name, or its folder's"}
    )
    max_batch_size: int = field(default=16, metadata={"help": "answers generated at once"})
    max_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "of prompts and answers in the batch, which bounds the memory of keys and values. Default: no limit"
        },
    )
    queue_size: int = field(default=256, metadata={"help": "requests that may wait; more are refused with 429"})
    timeout: float = field(default=300.0, metadata={"help": "seconds for a request, waiting included"})
    max_tokens_limit: int | None = field(
        default=None, metadata={"help": "the longest answer in tokens; default: what the context leaves"}
    )
    max_body_bytes: int = field(default=2 << 20, metadata={"help": "the largest request"})
    adapter_bytes: int | None = field(
        default=None, metadata={"help": "memory for adapters; those used longest ago make room. Default: no limit"}
    )
    grace: float = field(default=20.0, metadata={"help": "seconds to finish after SIGTERM or Ctrl-C"})
    dtype: str = field(default="auto", metadata={"help": "auto (the checkpoint's), float32, bfloat16, float16"})


def run(arguments: list[str]) -> None:
    (job,) = parse("serve", "Serve a base and its adapters with an API like OpenAI's.", [ServeArguments], arguments)
    quiet_transformers()
    if job.engine == "vllm":
        check_packages("s2ft serve --engine vllm", "--engine transformers, which serves without it")
    else:
        check_packages("s2ft serve")
    check(job)
    if job.engine == "vllm":
        serve_by_vllm(job)
    else:
        serve_here(job)


def check(job: ServeArguments) -> None:
    """What can be wrong, before minutes go into loading."""
    from pathlib import Path

    if job.adapters is not None and not Path(job.adapters).is_dir():
        raise NotADirectoryError(f"adapters {job.adapters} is no folder")
    if not 0 <= job.port < 1 << 16:
        raise ValueError(f"port must be 0 to 65535, got {job.port}")
    for name in ("max_batch_size", "queue_size", "timeout", "max_body_bytes"):
        if not getattr(job, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(job, name)}")
    if not job.grace >= 0:
        raise ValueError(f"grace must be 0 or above, got {job.grace}")


def serve_here(job: ServeArguments) -> None:
    from s2ft.serve.options import Limits, ServerOptions, key_of, served_name
    from s2ft.serve.server import serve
    from s2ft.text.models import load_model

    limits = Limits(key_of(job.api_key), job.timeout, job.max_body_bytes, job.max_tokens_limit)
    options = ServerOptions(
        job.host,
        job.port,
        job.max_batch_size,
        job.queue_size,
        job.max_batch_tokens,
        job.adapter_bytes,
        job.grace,
        limits,
    )
    model, tokenizer = load_model(job.model, job.dtype)
    serve(model, tokenizer, job.served_model_name or served_name(job.model), job.adapters, options)


def serve_by_vllm(job: ServeArguments) -> None:
    import os
    import tempfile
    from pathlib import Path

    from s2ft.serve import vllm
    from s2ft.serve.options import key_of, served_name, warn_if_open

    if job.adapters is None:
        raise ValueError("--engine vllm serves adapters: give --adapters")
    key = key_of(job.api_key)
    warn_if_open(job.host, key)
    # the folder stays where vLLM takes this process over, which reads it
    with tempfile.TemporaryDirectory(prefix="s2ft-vllm-") as target:
        exported = vllm.export(job.model, job.adapters, Path(target))
        base = job.served_model_name or served_name(job.model)
        line = vllm.command(job.model, exported, job.host, job.port, base, key)
        os.execvp(line[0], line)
