"""s2ft serve: answer over HTTP with a base model and its adapters."""

from dataclasses import dataclass, replace

from s2ft.cli.parse import BASE_MODEL, parse, quiet_transformers
from s2ft.config import option, refuse
from s2ft.packages import check_packages
from s2ft.serve.server_options import ServerOptions, key_of, served_name, warn_if_open
from s2ft.text.models import DTYPES

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


@dataclass(frozen=True, kw_only=True)
class ServeArguments(ServerOptions):
    model: str | None = option(None, **BASE_MODEL)
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
    served_model_name: str | None = option(
        None, "name of the base model for clients", shown="the name of the model or of its folder", metavar="NAME"
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
    (job,), given = parse(
        "serve",
        "Answer over HTTP with a base model and its adapters. The API is like OpenAI's; a request's `model` names the\n"
        "adapter.",
        [ServeArguments],
        words,
        """  s2ft serve --adapters runs
  s2ft serve --model meta-llama/Llama-3.2-1B --adapters runs math=old-runs/7 --check
  s2ft serve --model meta-llama/Llama-3.2-1B --adapters runs --host 0.0.0.0 --port 80 --api-key SECRET
  s2ft serve --model meta-llama/Llama-3.2-1B --adapters runs --engine vllm -- --tensor-parallel-size 2""",
    )
    quiet_transformers()
    from s2ft.adapter.folders import source_of
    from s2ft.text.adapter_prompts import base_name

    on_vllm = job.engine == "vllm"
    by_vllm = on_vllm and not job.check
    refuse(
        *(
            (on_vllm and name in given, f"--{name.replace('_', '-')} is for --engine transformers; for vLLM: {instead}")
            for name, instead in sorted(ONLY_BUILT_IN.items())
        ),
        *(
            (not on_vllm and name in given, f"--{name.replace('_', '-')} is for --engine vllm")
            for name in sorted(ONLY_VLLM)
        ),
        (options and not on_vllm, f"options after -- are vLLM's, and the engine is {job.engine}: give --engine vllm"),
        (job.check and not job.adapters, "--check checks adapters: give --adapters"),
    )
    needs = ("s2ft serve --engine vllm", "--engine transformers, which serves without it")
    check_packages(*(needs if by_vllm else ("s2ft serve",)))
    sources = [source_of(adapters) for adapters in job.adapters]  # before the model is loaded, which can take minutes
    if job.model is None:
        folders = (folder for source in sources for folder in source.folders().values())
        job = replace(job, model=base_name(None, next(folders, None)))
    if by_vllm:
        serve_by_vllm(job, options)
    else:
        serve_here(job)


def serve_here(job: ServeArguments) -> None:
    """Serve with the built-in server until it is stopped."""
    from types import SimpleNamespace

    import torch

    from s2ft.serve.server import check_adapters, serve
    from s2ft.train.base_model import load_base
    from s2ft.train.options import ModelOptions

    options = replace(job, api_key=key_of(job.api_key))
    gpu = torch.cuda.is_available()
    device = SimpleNamespace(
        use_cpu=not gpu,
        device="cuda" if gpu else "cpu",
        trust_remote_code=job.trust_remote_code,
        parallelism_config=None,
    )
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
    from s2ft.vllm.slice_layer import Budget

    refuse(
        (not job.adapters, "--engine vllm serves adapters: give --adapters"),
        (job.slice_units is not None and not job.slices, "--slice-units is the budget of --slices: give both"),
    )
    Budget.parse(job.slice_units or "")
    command.check_options(options)
    command.check_plugin()
    # vLLM replaces this process and reads the folder, which is therefore not removed. It is, if something fails here.
    with tempfile.TemporaryDirectory(prefix="s2ft-vllm-") as target:
        key, model = key_of(job.api_key), command.unpacked(job.model, job.dtype, Path(target, "base"))
        warn_if_open(job.host, key)
        base = job.served_model_name or served_name(job.model)
        adapters = command.adapters_of(model, job.adapters, job.revision, reserved=(base,))
        template = command.write_template(adapters, Path(target))
        words, environment = command.launch(job, adapters, model, base, key, options, template)
        os.environ.update(environment)
        os.execv(words[0], words)
