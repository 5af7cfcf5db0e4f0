"""s2ft export: write an adapter for other tools, or take one from them."""

from s2ft.cli.parse import Help, Parser, quiet_transformers
from s2ft.packages import check_packages

FORMATS = ("lora", "merged", "gguf")
DESCRIPTION = """Write an adapter for other tools, load it again and compare before saying so.

lora     a folder that PEFT and vLLM load; adds the same to every weight
merged   a stock checkpoint with tokenizer and generation settings, as s2ft merge writes it
gguf     a .gguf file of the merged model, for llama.cpp; families llama, mistral and qwen2

With --from-lora the other way: a LoRA that is S²FT by its structure becomes an adapter."""


def run(arguments: list[str]) -> None:
    job = _parser().parse_args(arguments)
    _check(job)
    check_packages(f"s2ft export --format {job.format}")
    quiet_transformers()
    print(export(job))


def _parser() -> Parser:
    parser = Parser(
        prog="s2ft export",
        description=DESCRIPTION,
        formatter_class=Help,
        allow_abbrev=False,
        epilog="example:\n  s2ft export my-run --model meta-llama/Llama-3.2-1B --format lora --output my-lora",
    )
    parser.add_argument(
        "adapter", nargs="?", metavar="ADAPTER", help="an adapter folder, or the output folder of s2ft finetune"
    )
    parser.add_argument(
        "--model", required=True, help="the adapter's base: a checkpoint folder, a name on the hub, or a .gguf file"
    )
    parser.add_argument("--format", choices=FORMATS, help="what to write; default: lora")
    parser.add_argument("--from-lora", metavar="DIR", help="a LoRA folder to make an adapter of")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: auto (that of training), float32, bfloat16, float16"
    )
    parser.add_argument(
        "--rank",
        type=int,
        help="lora: the rank of every module; default: the lowest that is enough, of those that vLLM has",
    )
    parser.add_argument(
        "--rank-pattern", action="store_true", help="lora: no zeros to one rank, which PEFT reads and vLLM does not"
    )
    parser.add_argument("--max-shard-size", help="merged: largest file of weights, 2GB say; default: transformers'")
    parser.add_argument("--name", help="from-lora: the new adapter's name; default: default")
    return parser


def _check(job) -> None:
    """Raises: ValueError for options that don't go together."""
    if (job.adapter is None) == (job.from_lora is None):
        raise ValueError("give an ADAPTER to export, or --from-lora with a LoRA folder, and not both")
    if job.from_lora is not None and job.format is not None:
        raise ValueError("--from-lora writes an adapter, so there is no --format")
    kind = "from-lora" if job.from_lora is not None else job.format or "lora"
    for option, kinds in (
        ("rank", ("lora",)),
        ("rank_pattern", ("lora",)),
        ("max_shard_size", ("merged",)),
        ("name", ("from-lora",)),
    ):
        if getattr(job, option) and kind not in kinds:
            raise ValueError(f"--{option.replace('_', '-')} is for {' and '.join(kinds)}, not for {kind}")


def export(job) -> str:
    """What was written, in words."""
    if job.from_lora is not None:
        return from_lora(job)
    if job.format == "merged":
        from s2ft.export.merged import merge_checkpoint

        merge_checkpoint(job.model, job.adapter, job.output, job.dtype, job.max_shard_size)
        return f"merged checkpoint, loaded again and compared: {job.output}"
    if job.format == "gguf":
        from s2ft.export.merged import merge_gguf

        file = merge_gguf(job.model, job.adapter, job.output, job.dtype)
        return f"GGUF of the merged model, loaded again and compared: {file}"
    return to_lora(job)


def to_lora(job) -> str:
    from s2ft.adapter import read_adapter
    from s2ft.adapter.formats import lora
    from s2ft.export.merged import folder_beside
    from s2ft.text.models import dtype_of_base, load_model

    adapter = read_adapter(job.adapter)
    with folder_beside(job.output) as beside:
        model, _ = load_model(job.model, dtype_of_base(adapter, job.dtype))
        lora.write(adapter, model, beside, job.rank, job.rank_pattern)
        _compare(lora.read(beside, model), adapter)
        size, rank = (beside / lora.TENSORS).stat().st_size, lora.rank_of(beside)
    serving = (
        ""
        if job.rank_pattern or rank > lora.RANKS[-1]
        else f"; vLLM: --enable-lora --max-lora-rank {next(one for one in lora.RANKS if one >= rank)}"
    )
    return f"LoRA of rank {rank}, {size:,} bytes, read again and compared: {job.output}{serving}"


def from_lora(job) -> str:
    from s2ft.adapter import read_adapter
    from s2ft.adapter.formats import lora, native
    from s2ft.adapter.store import model_info
    from s2ft.export.merged import folder_beside
    from s2ft.text.models import load_model

    with folder_beside(job.output) as beside:
        model, _ = load_model(job.model, job.dtype)
        adapter = lora.read(job.from_lora, model, job.name or "default")
        adapter.info |= {**model_info(model), "base_model": job.model}
        native.write(adapter, beside)
        _compare(read_adapter(beside), adapter)
    return f"adapter {adapter.name!r}, {adapter.parameters:,} parameters, read again and compared: {job.output}"


def _compare(found, adapter) -> None:
    """Raises: RuntimeError where a number is another."""
    import torch

    same = found.selection == adapter.selection and all(
        delta.values.dtype == adapter.deltas[path].values.dtype
        and torch.equal(delta.index, adapter.deltas[path].index)
        and torch.equal(delta.values, adapter.deltas[path].values.cpu())
        for path, delta in found.deltas.items()
    )
    if not same:
        raise RuntimeError("what was written is not the adapter")
