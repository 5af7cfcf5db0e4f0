"""Files into files: what `s2ft export`, `s2ft merge` and `s2ft patch` write for other programs.

A new export is one module and one row here. Its module has ``export(model_name, adapter, output, dtype="auto",
**options)``, which writes the export, reads it again and returns a sentence about the output. It raises FileExistsError
if the output exists, and leaves nothing if it raises.
An adapter format that other tools read is an export too, and has its row in :mod:`s2ft.adapter.formats`. The rows name
their modules instead of importing them, so that the command line can list the exports without PyTorch.
"""

from importlib import import_module

from s2ft.adapter.formats import ADAPTER_FORMATS, Format

IMPORTS = list(ADAPTER_FORMATS)  # the formats that `s2ft export --from-NAME` reads
EXPORTS = {
    **ADAPTER_FORMATS,
    "merged": Format(
        "a checkpoint of transformers with tokenizer and generation settings, as s2ft merge writes it",
        "s2ft.conversion.merged",
        {
            "max_shard_size": (
                str,
                {
                    "default": None,
                    "text": "the largest file of weights, for example 2GB",
                    "shown": "that of transformers",
                },
            )
        },
    ),
    "gguf": Format(
        "a .gguf file of the merged model, by the converter of llama.cpp, which must be installed",
        "s2ft.conversion.gguf",
        {
            "quantization": (
                str,
                {
                    "default": None,
                    "metavar": "TYPE",
                    "text": "type of the weights: q8_0, q4_k_m, ... by their names in llama.cpp, whose llama-quantize "
                    "makes those with a k",
                    "shown": "that of the dtype",
                },
            ),
            "llama_cpp": (
                str,
                {
                    "default": None,
                    "metavar": "DIR",
                    "text": "folder of llama.cpp",
                    "shown": "that of the variable LLAMA_CPP_DIR, else what is on the PATH",
                },
            ),
        },
    ),
    "ollama": Format(
        "the merged checkpoint and a Modelfile, for `ollama create`",
        "s2ft.conversion.ollama",
        {"num_ctx": (int, {"default": None, "text": "tokens of the context", "shown": "the model's, at most 8192"})},
    ),
}


def export(name: str, *arguments, **options) -> str:
    """Write an export by its name, see above."""
    if name in ADAPTER_FORMATS:
        return import_module("s2ft.conversion.adapter_formats").export(*arguments, format_name=name, **options)
    return EXPORTS[name].module.export(*arguments, **options)
