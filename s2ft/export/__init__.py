"""Exports: what `s2ft export` writes for other programs. A new export is one module and one row here.

An adapter format that other tools read is an export too, and has its row in :mod:`s2ft.files.formats`. The rows name
their modules instead of importing them, so that the command line can list the exports without PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module

from s2ft.files.formats import ADAPTER_FORMATS, NATIVE, Options


@dataclass(frozen=True)
class Export:
    """One format that an adapter is exported to."""

    summary: str  # one line for the help of `s2ft export`
    module: str  # full name of the module with the function `export`
    options: Options = field(default_factory=dict)  # further arguments of `export`
    adapter_format: str | None = None  # key of ADAPTER_FORMATS, if the export is an adapter again

    @property
    def run(self) -> Callable[..., str]:
        """`run(model_name, adapter, output, dtype="auto", **options)` writes the export and reads it again.

        It returns a sentence about the output. It raises FileExistsError if the output exists, and removes the output
        if it raises.
        """
        function = import_module(self.module).export
        return function if self.adapter_format is None else partial(function, format_name=self.adapter_format)


IMPORTS = [name for name in ADAPTER_FORMATS if name != NATIVE]  # the formats that `s2ft export --from-NAME` reads
EXPORTS = {
    **{
        name: Export(ADAPTER_FORMATS[name].summary, "s2ft.export.adapters", ADAPTER_FORMATS[name].options, name)
        for name in IMPORTS
    },
    "merged": Export(
        "a checkpoint of transformers with tokenizer and generation settings, as s2ft merge writes it",
        "s2ft.export.merged",
        {"max_shard_size": {"help": "the largest file of weights, for example 2GB; default: that of transformers"}},
    ),
    "gguf": Export(
        "a .gguf file of the merged model, by the converter of llama.cpp, which must be installed",
        "s2ft.export.gguf",
        {
            "quantization": {
                "metavar": "TYPE",
                "help": "type of the weights: q8_0, q4_k_m, ... by their names in llama.cpp, whose llama-quantize "
                "makes those with a k; default: that of the dtype",
            },
            "llama_cpp": {
                "metavar": "DIR",
                "help": "folder of llama.cpp; default: that of the variable LLAMA_CPP_DIR, else what is on the PATH",
            },
        },
    ),
    "ollama": Export(
        "the merged checkpoint and a Modelfile, for `ollama create`",
        "s2ft.export.ollama",
        {"num_ctx": {"type": int, "metavar": "N", "help": "tokens of the context; default: the model's, at most 8192"}},
    ),
}
