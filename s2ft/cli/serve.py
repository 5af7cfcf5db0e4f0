"""s2ft serve: answer over HTTP with a base model and its adapters."""

from dataclasses import dataclass

from s2ft.cli.parse import MODEL, given_options, parse, quiet_transformers
from s2ft.packages import check_packages
from s2ft.text.models import DTYPES
from s2ft.train.options import Options, option

EXAMPLE = """  s2ft serve --model meta-llama/Llama-3.2-1B --adapters runs
  s2ft serve --model meta-llama/Llama-3.2-1B --adapters runs math=old-runs/7 --check
  s2ft serve --model meta-llama/Llama-3.2-1B --adapters runs --host 0.0.0.0 --port 80 --api-key SECRET
  s2ft serve --model meta-llama/Llama-3.2-1B --adapters runs --engine vllm -- --tensor-parallel-size 2"""

# Options of the built-in server, and what vLLM has in their place: options that stand after "--", or a reason
ONLY_BUILT_IN = {
    "max_batch_size": "-- --max-num-seqs N",
    "max_batch_tokens": "-- --kv-cache-memory-bytes N",
    "queue_size": "vLLM has no such limit",
    "timeout": "vLLM has no such limit",
    "max_tokens_limit": """-- --override-generation-config '{"max_new_tokens": N}'""",
    "max_body_bytes": "vLLM has no such limit",
    "adapter_bytes": "-- --max-cpu-loras N",
    "access_log": "-- --disable-uvicorn-access-log",
    "ignore_unsupported": "vLLM decides by itself which fields of a request it takes",
    "load_in_8bit": "vLLM loads a checkpoint that is stored in 8 bit",
    "attn_implementation": "-- --attention-backend NAME",
}
ONLY_VLLM = ("slices", "slice_units")


@dataclass
class ServeArguments(Options):
    model: str = option(text=MODEL)
    adapters: list[str] = option(
        [],
        "directories of adapters or of output folders of s2ft sft, or single ones, also as NAME=DIR; clients name an "
        "adapter by its folder",
        metavar="DIR",
    )
    check: bool = option(False, "read all adapters, compare them with the base, and end without serving")
    engine: str = option(
        "transformers",
        "transformers: the built-in server; vllm: run `vllm serve`, which loads the adapters by s2ft's plugin; options "
        "after -- are vLLM's",
        choices=("transformers", "vllm"),
    )
    slices: bool = option(
        False,
        "with --engine vllm: layers hold the trained slices, not LoRA of one rank: adapters need less memory, and have "
        "no limit of 512 rows or columns",
    )
    slice_units: str | None = option(
        None,
        "with --slices: rows or columns of an adapter that a layer can hold, one number or by projection, "
        "such as down_proj=512,o_proj=128",
        shown="what the adapters need",
        metavar="UNITS",
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
    max_batch_size: int = option(16, "answers that are generated at once", unit="answers", least=1)
    max_batch_tokens: int | None = option(
        None,
        "tokens of all prompts and answers in the batch, which limits the memory of keys and values",
        shown="no limit",
    )
    queue_size: int = option(256, "requests that may wait; more are refused with status 429", unit="requests", least=1)
    timeout: float = option(300.0, "longest time of a request, waiting included", unit="seconds", metavar="SECONDS")
    max_tokens_limit: int | None = option(None, "longest answer in tokens", shown="the rest of the context")
    max_body_bytes: int = option(2 << 20, "largest request in bytes", shown="2097152, which is 2 MiB", least=1)
    adapter_bytes: int | None = option(
        None, "memory for adapters in bytes; the least recently used ones are removed", shown="no limit"
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


def run_serve(arguments: list[str]) -> None:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    words, options = arguments[:at], arguments[at + 1 :]  # the options after the first -- are vLLM's
    (job,) = parse(
        "serve",
        "Answer over HTTP with a base model and its adapters. The API is like OpenAI's; a request's `model` names the\n"
        "adapter.",
        [ServeArguments],
        words,
        EXAMPLE,
    )
    quiet_transformers()
    by_vllm = job.engine == "vllm" and not job.check
    _check_engine(job, words, options)
    if by_vllm:
        check_packages("s2ft serve --engine vllm", "--engine transformers, which serves without it")
        check(job)
        serve_by_vllm(job, options)
    else:
        check_packages("s2ft serve")
        check(job)
        serve_here(job)


def _check_engine(job: ServeArguments, words: list[str], options: list[str]) -> None:
    """Refuse options that the engine does not have.

    Args:
        job: The options.
        words: The words of the command line that are options of this command.
        options: The words for vLLM.

    Raises:
        ValueError: An option has no meaning for the engine. The message says what the engine has in its place.
    """
    given = given_options(words)
    if job.engine == "vllm":
        for name in sorted(given & ONLY_BUILT_IN.keys()):
            raise ValueError(
                f"--{name.replace('_', '-')} is for --engine transformers; for vLLM: {ONLY_BUILT_IN[name]}"
            )
        return
    for name in sorted(given & {*ONLY_VLLM}):
        raise ValueError(f"--{name.replace('_', '-')} is for --engine vllm")
    if options:
        raise ValueError(f"options after -- are vLLM's, and the engine is {job.engine}: give --engine vllm")


def check(job: ServeArguments) -> None:
    """Check the options before the model is loaded, which can take minutes.

    Raises:
        NotADirectoryError: A folder of adapters does not exist.
        ValueError: A number is outside its range, or a folder can't be served.
    """
    from s2ft.adapter.folders import source_of

    for adapters in job.adapters:
        source_of(adapters)
    if job.check and not job.adapters:
        raise ValueError("--check checks adapters: give --adapters")
    if not 0 <= job.port < 1 << 16:
        raise ValueError(f"port must be 0 to 65535, got {job.port}")
    if not job.timeout > 0:
        raise ValueError(f"timeout must be above 0, got {job.timeout}")


def serve_here(job: ServeArguments) -> None:
    """Serve with the built-in server until it is stopped."""
    from types import SimpleNamespace

    import torch

    from s2ft.serve.options import Limits, ServerOptions, key_of, served_name
    from s2ft.serve.server import check_adapters, serve
    from s2ft.train.loading import load_base
    from s2ft.train.options import ModelOptions

    limits = Limits(key_of(job.api_key), job.timeout, job.max_body_bytes, job.max_tokens_limit, job.ignore_unsupported)
    options = ServerOptions(
        job.host,
        job.port,
        job.max_batch_size,
        job.queue_size,
        job.max_batch_tokens,
        job.adapter_bytes,
        job.access_log,
        limits,
    )
    gpu = torch.cuda.is_available()
    device = SimpleNamespace(use_cpu=not gpu, device="cuda" if gpu else "cpu", trust_remote_code=job.trust_remote_code)
    loading = (job.model, job.revision, job.dtype, job.attn_implementation, job.load_in_8bit, job.load_in_4bit)
    model, tokenizer = load_base(ModelOptions(*loading), device)
    base = job.served_model_name or served_name(job.model)
    if job.check:
        return check_adapters(model, base, job.adapters)
    serve(model, tokenizer, base, job.adapters, options)


def serve_by_vllm(job: ServeArguments, options: list[str]) -> None:
    """Replace this process by `vllm serve`.

    Args:
        job: The options.
        options: Options of vLLM that are passed on.

    Raises:
        ValueError: There are no adapters, or some can't be served, or options contradict each other.
    """
    import os
    import tempfile
    from pathlib import Path

    from s2ft.vllm import command
    from s2ft.vllm.slices.layer import Budget

    if not job.adapters:
        raise ValueError("--engine vllm serves adapters: give --adapters")
    if job.slice_units is not None and not job.slices:
        raise ValueError("--slice-units is the budget of --slices: give both")
    Budget.parse(job.slice_units or "")
    command.check_options(options)
    command.check_plugin()
    # vLLM replaces this process and reads the folder, which is therefore not removed. It is, if something fails here.
    with tempfile.TemporaryDirectory(prefix="s2ft-vllm-") as target:
        words, environment = _launch(job, options, Path(target))
        os.environ.update(environment)
        os.execv(words[0], words)


def _launch(job: ServeArguments, options: list[str], target):
    """The command line and the variables of what is started, with files of its own in the folder `target`."""
    from s2ft.serve.options import key_of, served_name, warn_if_open
    from s2ft.vllm import command

    key = key_of(job.api_key)
    warn_if_open(job.host, key)
    model = command.unpacked(job.model, job.dtype, target / "base")
    adapters = command.adapters_of(model, job.adapters, job.revision)
    base, template = job.served_model_name or served_name(job.model), command.write_template(adapters, target)
    return command.launch(job, adapters, model, base, key, options, template)
