"""Load a causal language model and its tokenizer from a folder, the hub, or a GGUF file."""

from pathlib import Path

from s2ft.packages import check_packages

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(name: str, dtype: str = "auto"):
    """(model in eval mode on the CPU, tokenizer).

    Args:
        name: a local folder (with config.json, or with one .gguf file), a .gguf file, or a name on the hub.
        dtype: "auto" keeps the checkpoint's own; a GGUF file is unpacked to float32.
    Raises: FileNotFoundError or ValueError that says what is not there or doesn't load; MissingPackages for a .gguf
        file without the package that reads it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    from transformers import AutoModelForCausalLM

    source, options = locate(name)
    if options:
        check_packages("a model in a .gguf file")
    tokenizer = _tokenizer(name, source, options)
    if options and dtype == "auto":
        dtype = "float32"
    model_options = dict(options, dtype=dtype)
    if options:
        model_options |= _unpacked()
    model = _from_pretrained(AutoModelForCausalLM, "a causal language model", name, source, model_options)
    if options:
        _forget_packing(model)
        model.config._name_or_path = model.name_or_path = name
    return model.eval(), tokenizer


def dtype_of_base(adapter, dtype: str = "auto") -> str:
    """The dtype to load an adapter's base in: "auto" is that of training. In another one the sums base + delta
    round differently, and the model is not the trained one bit for bit."""
    return adapter.info.get("base_dtype", "auto") if dtype == "auto" else dtype


def locate(name: str) -> tuple[str, dict[str, str]]:
    """Where `from_pretrained` finds the model, and the option that a GGUF file needs."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model {name} is a file but not a .gguf; give the checkpoint's folder")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path), {}
        packed = sorted(path.glob("*.gguf"))
        if len(packed) == 1:
            return str(path), {"gguf_file": packed[0].name}
        found = (
            f"several GGUF files ({', '.join(file.name for file in packed)}): name one"
            if packed
            else "neither config.json nor a .gguf file"
        )
        raise ValueError(f"model folder {name} has {found}")
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model {name} doesn't exist")
    return name, {}


def _tokenizer(name: str, source: str, options: dict):
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, "a tokenizer", name, source, options)


def _from_pretrained(kind, what: str, name: str, source: str, options: dict):
    try:
        return kind.from_pretrained(source, **options)
    except Exception as error:  # readers of broken files raise anything, the tokenizers library a bare Exception
        first = str(error).strip().split("\n")[0] or type(error).__name__
        where = "" if Path(source).exists() else " (no such folder here, so it was looked for on the hub)"
        raise ValueError(f"can't load {what} from {name}{where}: {first}") from error


def _unpacked() -> dict:
    """Ask for plain weights, where transformers would otherwise keep GGUF blocks if it has kernels for them."""
    try:
        from transformers import GgufConfig
    except ImportError:  # an older transformers always unpacks
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _forget_packing(model) -> None:
    """The weights are plain now: nothing may treat the model, or a checkpoint saved from it, as quantized."""
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(attribute, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
