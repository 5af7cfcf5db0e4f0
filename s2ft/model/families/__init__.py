"""Model families: a file for each, which lists the couplings of the model types that it names.

A new family is one file, with MODEL_TYPES and couplings(model), and its row in `FILES`.
"""

from collections.abc import Callable
from importlib import import_module

from torch import nn

from s2ft.model.coupling import Coupling

FILES = (
    "bert",
    "clip",
    "codegen",
    "cohere",
    "composite",
    "conformer",
    "deepseek",
    "diffllama",
    "falcon",
    "gemma3n",
    "gemma4",
    "glm4v",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "hybrid",
    "jetmoe",
    "llama",
    "mixtral",
    "mllama",
    "named",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "stablelm",
    "starcoder2",
    "t5",
    "towers",
    "vit",
    "whisper",
    "xlm",
)

# model type → the function that lists the couplings of such a model
FAMILIES: dict[str, Callable[[nn.Module], list[Coupling]]] = {
    model_type: family.couplings
    for family in (import_module(f"{__name__}.{file}") for file in FILES)
    for model_type in family.MODEL_TYPES
}
