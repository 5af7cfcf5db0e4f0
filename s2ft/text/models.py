"""Load a causal language model and its tokenizer from a folder, from the hub, or from a GGUF file.

A model with towers for images or sound is loaded whole.
"""

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from s2ft.files.plain_text import first_line
from s2ft.packages import check_packages

# Modules that import torch are imported in functions: the options of the command line need this module.

AUTO = (
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForCTC",
    "AutoModel",
)
MODEL = "a causal language model"  # in errors
UNPACKING = ("num_bits", "type", "strategy", "group_size", "symmetric", "block_structure", "actorder")  # of a format
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name: str,
    dtype: str = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Any = None,
    keep_packed: bool = False,
    **model_options: Any,
):
    """Load a model and its tokenizer.

    Args:
        name: A local folder with config.json or with one .gguf file, a .gguf file, or a name on the hub.
        dtype: Dtype of the weights: "auto", "float32", "bfloat16" or "float16". "auto" is the checkpoint's dtype,
            and float32 for a GGUF file.
        revision: Branch, tag or commit on the hub, of the model and of the tokenizer; default: the main branch.
        trust_remote_code: Whether code that the model or the tokenizer brings along is run.
        quantization: A quantization config of transformers, to quantize the weights while they are loaded.
        keep_packed: Whether linear layers of a GGUF file keep its blocks, as :class:`s2ft.layers.PackedLinear`, which
            unpacks them for each product. Otherwise all weights are unpacked.
        **model_options: More arguments of `from_pretrained` for the model, such as `attn_implementation`.

    Returns:
        The model, on the CPU unless `model_options` has a device_map, in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The dtype is unknown, the files lack a weight, or the model or the tokenizer cannot be loaded.
        MissingPackages: The package that reads GGUF files is not installed.

    Example:
        >>> from transformers import ByT5Tokenizer
        >>> _ = model.save_pretrained("tiny"), ByT5Tokenizer().save_pretrained("tiny")
        >>> loaded, tokenizer = s2ft.text.models.load_model("tiny", "bfloat16", attn_implementation="eager")
        >>> loaded.dtype, loaded.config._attn_implementation, tokenizer("5")["input_ids"]
        (torch.bfloat16, 'eager', [56, 1])
    """
    import transformers

    from s2ft.codecs.packed_folder import COMPRESSED
    from s2ft.model.checkpoint import is_of_compressed_tensors, open_checkpoint

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source, options = locate(name)
    is_gguf = bool(options)
    if is_gguf:
        check_packages("a model in a .gguf file")
        if quantization is not None:
            raise ValueError(f"{name} is a GGUF file, which can't be quantized again: give the checkpoint's folder")
        dtype = "float32" if dtype == "auto" else dtype
        # Plain weights, where transformers would keep GGUF blocks if it has kernels for them; 5.0 always unpacks.
        kind = getattr(transformers, "GgufConfig", None)
        quantization = kind and kind(dequantize=True)
    elif keep_packed:
        raise ValueError(f"keep_packed is for a GGUF file, and {name} is none")
    options = {**options, **_remote(revision, trust_remote_code)}
    _check_hub(name, source, options.get("revision"))
    wanted = {**options, "dtype": dtype, "output_loading_info": not keep_packed, **model_options}
    if quantization is not None:
        wanted["quantization_config"] = quantization
    with _parsed_once() if is_gguf else nullcontext():
        tokenizer = _from_pretrained(transformers.AutoTokenizer, name, source, options, "a tokenizer")
        config = None if is_gguf else _from_pretrained(transformers.AutoConfig, name, source, options)
        settings = getattr(config, "quantization_config", None) or {}
        is_compressed = settings.get("quant_method") == COMPRESSED
        if is_compressed:
            check_packages("a model of compressed-tensors")
            groups = (settings.get("config_groups") or {}).values()
            packed = [one["weights"] for one in groups if isinstance(one, Mapping) and one.get("weights")]
            if len({str([one.get(name) for name in UNPACKING]) for one in packed}) > 1:
                raise ValueError(f"{name} has weights in several formats, and transformers unpacks all by one of them")
            wanted["config"] = _unpacking(config)
        auto = transformers.AutoModelForCausalLM if config is None else _auto_class(config)
        found = (_packed_model if keep_packed else _from_pretrained)(auto, name, source, wanted)
    model, missing = (found, ()) if keep_packed else (found[0], sorted(found[1]["missing_keys"]))
    if missing and is_compressed:  # before 5.24 transformers counted the weights that it unpacks
        stored = open_checkpoint(source).tensors
        missing = [one for one in missing if f"{one}_scale" not in stored]
    if missing:  # transformers fills them with random numbers
        raise ValueError(
            f"{name} lacks weights of the model, such as {missing[0]} ({len(missing)} in all): is it one of several "
            "files? Join them first (llama-gguf-split --merge), or give the whole checkpoint"
        )
    if is_gguf or is_compressed:
        for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):  # the weights are plain now
            model.__dict__.pop(attribute, None)
        model.config.__dict__.pop("quantization_config", None)
        for module in model.modules():  # before transformers 5.24 a cache of weights, and the scales of the file, stay
            module._parameters = {
                key: parameter
                for key, parameter in module._parameters.items()
                if key in ("weight", "bias") or not is_of_compressed_tensors(module)
            }
        model.config._name_or_path = model.name_or_path = str(Path(source, options["gguf_file"])) if is_gguf else name
    if model.config.model_type in ("recurrent_gemma", "rwkv", "xlstm"):
        model.register_forward_pre_hook(_refuse_what_is_ignored, with_kwargs=True)
    return model.eval(), tokenizer


def _refuse_what_is_ignored(model, inputs, named) -> None:
    """Raise ValueError for padding before a row and for a cache of transformers: the model's forward ignores both."""
    mask = named.get("attention_mask")
    if named.get("past_key_values") is not None or (mask is not None and (mask[:, :-1] < mask[:, 1:]).any()):
        raise ValueError(
            f"{type(model).__name__} ignores the mask of padding before a row, and transformers' cache: generate, chat "
            "and serve can't run it, s2ft eval answers prompts; calibrate with batches of 1"
        )


def _packed_model(kind, name: str, source: str, options: dict):
    """Load a GGUF file of which linear layers keep the blocks. No more than one weight is unpacked at a time."""
    check_packages("keep_packed")
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from s2ft.codecs.gguf_file import GgufFile
    from s2ft.layers import PackedLinear

    known = ("gguf_file", "dtype", "quantization_config", "trust_remote_code", "revision", "output_loading_info")
    more = {name: value for name, value in options.items() if name not in known}  # such as the attention
    file = GgufFile(Path(source) / options["gguf_file"])
    dtype, config = getattr(torch, options["dtype"]), AutoConfig.from_pretrained(source, gguf_file=options["gguf_file"])
    with init_empty_weights(include_buffers=False):
        model = kind.from_config(config, dtype=dtype, **more)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module.weight.is_meta and file.has_codec(path):
            bias = None if module.bias is None else file.values(path, "bias").to(dtype)
            model.set_submodule(path, PackedLinear(file.codec(path), file.whole(path), module.in_features, bias))
    model.tie_weights()
    kept = {path for path, buffer in model.named_buffers() if path in model.state_dict()}
    for path in [*(name for name, parameter in model.named_parameters() if parameter.is_meta), *kept]:
        owner, _, part = path.rpartition(".")
        if not isinstance(module := model.get_submodule(owner), PackedLinear):
            values = file.values(owner, part).to(dtype)
            setattr(module, part, values if path in kept else torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model


def _unpacking(config):
    """The config of a checkpoint of compressed-tensors, by which transformers unpacks the weights."""
    from transformers import CompressedTensorsConfig

    arguments = inspect.signature(CompressedTensorsConfig).parameters
    option = {"dequantize": True} if "dequantize" in arguments else {"run_compressed": False}  # transformers below 5.24
    config.quantization_config = {**config.quantization_config, **option}
    return config


def _parsed_once() -> AbstractContextManager[None]:
    """Let transformers parse a GGUF file once, and make the map of names once.

    It parses the file for the tokenizer, the config and the weights, 3 s each, and makes the map for every module.
    """
    import gguf

    from s2ft.codecs import gguf_file
    from s2ft.model.running import replaced

    return replaced(
        gguf,
        GGUFReader=functools.cache(gguf_file.reader_class()),
        get_tensor_name_map=functools.cache(gguf.get_tensor_name_map),
    )


def _remote(revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """The arguments of `from_pretrained` about the hub. Without an answer about code it asks the user, and waits.

    S2FT_TRUST_REMOTE_CODE=1 in the environment allows the code in every command.
    """
    chosen = {"revision": revision} if revision not in (None, "main") else {}
    return {**chosen, "trust_remote_code": trust_remote_code or os.environ.get("S2FT_TRUST_REMOTE_CODE") == "1"}


def hollow_model(name: str):
    """Build a model on the meta device from its config, without reading weights.

    Args:
        name: A local folder with config.json, a .gguf file, or a name on the hub.

    Returns:
        The model, of the class that its config names, else of the first auto class that has its type.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The config can't be loaded, or no model can be built from it.

    Example:
        >>> _ = model.save_pretrained("tiny")
        >>> hollow = s2ft.text.models.hollow_model("tiny")
        >>> type(hollow).__name__, hollow.device.type
        ('LlamaForCausalLM', 'meta')
    """
    import torch
    import transformers

    from s2ft.distributed import without_zero_init

    source, options = locate(name)
    try:
        _check_hub(name, source, None)
        config = _from_pretrained(transformers.AutoConfig, name, source, {**options, **_remote()}, "a config")
    except ValueError as error:
        if Path(source).exists():
            raise
        why = str(error).rstrip(".")
        raise ValueError(f"{why}. A config.json of the model is enough here: give its path") from error
    is_own = type(config).__module__.startswith("transformers_modules.")  # of code that the checkpoint brings
    named = (getattr(transformers, one, None) for one in (() if is_own else config.architectures or ()))
    autos = (getattr(transformers, auto) for auto in AUTO)
    known = (auto._model_mapping[type(config)] for auto in autos if type(config) in auto._model_mapping)
    makes = [found._from_config for found in (*named, *known) if isinstance(found, type)]
    brought = getattr(config, "auto_map", None) or {}
    makes += [
        functools.partial(getattr(transformers, auto).from_config, **_remote()) for auto in AUTO if auto in brought
    ]
    if not makes:
        raise ValueError(f"transformers has no model for {name} (model type {config.model_type!r})")
    with torch.device("meta"), without_zero_init():
        return makes[0](config)


def model_without_values(name: str, dtype: str = "auto", dtype_of_files: Callable[[], Any] | None = None):
    """Build the model that :func:`load_model` would load, on the meta device. Its files of weights are not needed.

    Args:
        name: A local folder with config.json, or a name on the hub.
        dtype: Dtype of the weights, as for :func:`load_model`.
        dtype_of_files: Returns the torch.dtype of weights whose config has none; default: torch.float32.

    Returns:
        The model, in evaluation mode.

    Raises:
        CannotStream: The weights are not stored as they are: a GGUF file, or a quantized checkpoint.
        FileNotFoundError: The path does not exist.
        ValueError: The dtype is unknown, or the model can't be built.

    Example:
        >>> _ = model.save_pretrained("tiny")
        >>> hollow = s2ft.text.models.model_without_values("tiny", "bfloat16")
        >>> hollow.device.type, hollow.dtype
        ('meta', torch.bfloat16)
    """
    import torch
    import transformers

    from s2ft.model.checkpoint import CannotStream

    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source, options = locate(name)
    if options:
        raise CannotStream(f"{name} is a GGUF file, which has to be unpacked")
    _check_hub(name, source, None)
    config = _from_pretrained(transformers.AutoConfig, name, source, _remote())
    if getattr(config, "quantization_config", None) is not None:
        raise CannotStream(f"the weights of {name} are quantized")
    of_files = dtype_of_files or (lambda: torch.float32)
    wanted = (config.dtype or of_files()) if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        model = _auto_class(config).from_config(config, dtype=wanted, **_remote())
    keep_in_float32(model)
    return model.eval()


def model_on_disk(name: str, dtype: str = "auto"):
    """Build the model that :func:`load_model` would load, on the meta device, and find its weights in the checkpoint.

    Args:
        name: A local folder with config.json and safetensors files, or a name on the hub.
        dtype: Dtype of the weights, as for :func:`load_model`.

    Returns:
        The model, and its weights as a :class:`s2ft.model.checkpoint.StoredWeights`.

    Raises:
        CannotStream: The weights can't be read one at a time, as those of a GGUF file and quantized ones. The message
            says why.
        FileNotFoundError: The path does not exist.
        ValueError: The dtype is unknown, the model can't be built, or its checkpoint is damaged.

    Example:
        >>> _ = model.save_pretrained("tiny")
        >>> hollow, weights = s2ft.text.models.model_on_disk("tiny", "bfloat16")
        >>> hollow.device.type, weights.read("model.norm.weight").dtype
        ('meta', torch.bfloat16)
    """
    from s2ft.model.checkpoint import StoredWeights, open_checkpoint

    source = locate(name)[0]
    model = model_without_values(name, dtype, lambda: open_checkpoint(source).dtype)
    return model, StoredWeights(model, open_checkpoint(source))


def keep_in_float32(model) -> None:
    """Cast the weights of a model on the meta device that transformers loads in float32 only."""
    import torch

    from s2ft.model.checkpoint import dtype_plan

    patterns = [pattern.replace("*", ".*") for pattern in dtype_plan(model, model.dtype)]
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in patterns):
            parameter.data = parameter.data.to(torch.float32)


def load_tokenizer(name: str):
    """Load the tokenizer that :func:`load_model` would load. Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    source, options = locate(name)
    return _from_pretrained(AutoTokenizer, name, source, {**options, **_remote()}, "a tokenizer")


def dtype_of_base(adapter, dtype: str = "auto") -> str:
    """Return the dtype in which to load the base of an adapter.

    In another dtype than that of training, the sums of base and delta round differently, and the model is not equal
    to the trained one bit for bit.

    Args:
        adapter: The adapter, as :func:`s2ft.read_adapter` returns it.
        dtype: The dtype that the user chose. "auto" returns the dtype of the adapter's training.
    """
    return adapter.info.get("base_dtype", "auto") if dtype == "auto" else dtype


def locate(name: str) -> tuple[str, dict[str, str]]:
    """Return the name or path for `from_pretrained`, and the option that it needs for a GGUF file."""
    from s2ft.files.reading import gguf_files, has_adapter, own_folder

    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model {name} is a file but not a .gguf; give the checkpoint's folder")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        packed = gguf_files(path)
        if len(packed) == 1:
            return str(path), {"gguf_file": packed[0].name}
        if not packed and (path / "config.json").is_file():
            return str(path), {}
        found = (
            f"several GGUF files ({', '.join(file.name for file in packed)}): name one"
            if packed
            else "neither config.json nor a .gguf file"
        )
        if has_adapter(own_folder(path)) or (path / "adapter_config.json").is_file():
            found = "an adapter, and no base: give it to --adapter"
        raise ValueError(f"model folder {name} has {found}")
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model {name} doesn't exist")
    return name, {}


def _check_hub(name: str, source: str, revision: str | None) -> None:
    """Raise ValueError if a name is on no hub that can be reached, before each file is asked for many times."""
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    if Path(source).exists() or constants.HF_HUB_OFFLINE:
        return
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            HfApi().model_info(name, revision=revision, timeout=10)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        where = f" in revision {revision}" if revision else ""
        raise ValueError(
            f"there is no folder {name} here, and no such model on the hub{where}; a private one needs `hf auth login`"
        ) from error
    except Exception as error:  # each network error has a class of its own
        raise ValueError(
            f"there is no folder {name} here, and the hub can't be reached ({first_line(error)}); HF_HUB_OFFLINE=1 "
            "uses only models that were downloaded before"
        ) from error


def hub_revision(name: str, revision: str | None = None) -> str:
    """Return the commit of a model on the hub, as it is on this machine or is downloaded now.

    Args:
        name: Its name on the hub.
        revision: Branch, tag or commit; default: the main branch.

    Raises:
        ValueError: There is no such model, or the hub can't be asked.
    """
    from huggingface_hub import errors, hf_hub_download

    _check_hub(name, name, revision)
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name  # snapshots/COMMIT/config.json
    except errors.EntryNotFoundError as error:  # also if the hub may not be asked
        raise ValueError(f"there is no config.json of {name} here, and none was downloaded") from error


def _auto_class(config):
    """The class of transformers that loads the whole checkpoint, also the towers for images and sound if it has any."""
    import transformers

    auto = transformers.AutoModelForMultimodalLM
    multimodal = type(config) in auto._model_mapping and not config.is_encoder_decoder
    return auto if multimodal else transformers.AutoModelForCausalLM


def _from_pretrained(kind, name: str, source: str, options: dict, what: str = MODEL):
    try:
        return kind.from_pretrained(source, **options)
    except Exception as error:  # a broken file can raise any error; tokenizers raises a plain Exception
        first = first_line(error)
        if "custom code" in str(error):
            first = "it brings Python code along, which runs only with trust_remote_code, or S2FT_TRUST_REMOTE_CODE=1"
        where = "" if Path(source).exists() else " (no such folder here, so it was looked for on the hub)"
        raise ValueError(f"can't load {what} from {name}{where}: {first}") from error
