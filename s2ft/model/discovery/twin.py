"""Builds the twin of a model: a tiny one with the same modules and random float64 weights, to try couplings on.

On the twin a wrong coupling can't hide: no norm weight is 1, no bias is 0 and no matrix is zero. In float64 rounding
is a million times smaller than any real change.
"""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2ft.distributed import full_shape, full_tensors, is_partitioned, without_zero_init
from s2ft.model.discovery.tiny_config import DEPTH, Level, config_for, tiny_config

MOST = 60_000_000  # parameters of a twin: 0.5 GB
COPIED_AT_ONCE = 1_000_000  # a model that is this small needs no smaller twin
MOST_COPIED = 500_000_000  # parameters of a model that is copied in float64 where no smaller twin can be built: 4 GB
DEPTHS = (DEPTH, 6, 12, 128)
SPREAD = 0.2  # of what is added to norm weights and biases
_LOW = (torch.float32, torch.float16, torch.bfloat16)


def twins_of(model: nn.Module, tried: list[str]) -> Iterator[nn.Module]:
    """Iterate over twins of a model, the smallest first, and append to `tried` why others can't be built.

    A twin has modules of the same classes as the model, under the same paths, apart from numbers in them. It is on the
    CPU, in float64 and in evaluation mode. The model and the global random state stay as they are.

    Args:
        model: The model. Its weights may be quantized, in half precision, on another device, or on meta.
        tried: Gets what failed, in words.
    """
    size = sum(full_shape(parameter).numel() for parameter in model.parameters())
    if size <= COPIED_AT_ONCE and not any(p.is_meta for p in model.parameters()) and not _is_quantized(model):
        yield copied(model)
        return
    wanted, rows = paths_and_classes(model), kinds_of_blocks(model)
    if hasattr(type(model), "_from_config") and getattr(model, "config", None) is not None:
        for level in Level:
            twin = _same_at_some_depth(model, level, wanted, rows, tried)
            if twin is not None:
                yield twin
    if _is_quantized(model):
        tried.append("a copy of the model: its weights are quantized")
    elif size > MOST_COPIED:
        tried.append(f"a copy of the model: {size / 1e9:.1f} billion parameters are too many in float64")
    else:
        yield copied(model)


def _same_at_some_depth(model: nn.Module, level: Level, wanted: set, kinds: set, tried: list[str]) -> nn.Module | None:
    """The twin of the least depth with all kinds of blocks, else of the least with all paths; None if there is none."""
    second = None
    for depth in DEPTHS:
        try:
            twin = tiny_model(type(model), tiny_config(model.config, level, depth), torch.float64)
        except Exception as error:  # configs fail in many ways; every one only rules this level out
            tried.append(f"{level.name} with {depth} layers: {type(error).__name__}: {str(error)[:200]}")
            continue
        missing = wanted ^ paths_and_classes(twin)
        if missing:
            tried.append(f"{level.name} with {depth} layers: other modules than the model, such as {min(missing)}")
        elif kinds == kinds_of_blocks(twin):
            return twin
        else:
            second = second or twin
    return second


def tiny_model(model_class: type, config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a model from a tiny config, with random weights of which none is special.

    Args:
        model_class: A model class of transformers.
        config: Its config, cut by :func:`tiny_config`.
        dtype: Type of the weights. With float64 the forward computes in float64 wherever the model asks for less.

    Returns:
        The model on the CPU in evaluation mode.

    Raises:
        ValueError: The model would have more than 60 million parameters.
    """
    config = config_for(model_class, config)
    with _fixed_random_numbers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            shadow = _from_config(model_class, copy.deepcopy(config), dtype)
        size = sum(parameter.numel() for parameter in shadow.parameters())
        if size > MOST:
            raise ValueError(f"{size / 1e6:.0f} million parameters, at most {MOST / 1e6:.0f}")
        with torch.device("cpu"):
            model = _from_config(model_class, config, dtype)
    return _prepared(model, dtype)


def _from_config(model_class: type, config: Any, dtype: torch.dtype) -> nn.Module:
    with without_zero_init():
        of_transformers = hasattr(model_class, "_from_config")
        return model_class._from_config(config, dtype=dtype) if of_transformers else model_class(config)


def copied(model: nn.Module) -> nn.Module:
    """A float64 copy of a model. Weights on meta become random ones."""
    with _fixed_random_numbers():
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            twin = copy.deepcopy(model).to_empty(device="cpu")
            for tensor in (*twin.parameters(), *twin.buffers()):
                if tensor.is_floating_point():
                    tensor.detach().zero_()
        else:
            partitioned = {str(id(one)): one for one in model.parameters() if is_partitioned(one)}  # by ZeRO-3
            memo = {int(key): nn.Parameter(value) for key, value in full_tensors(partitioned).items()}
            twin = copy.deepcopy(model, memo).to("cpu")
    return _prepared(twin, torch.float64)


def _prepared(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    # The `to` of a module would drop the imaginary parts of complex tensors.
    model = model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    model = model._apply(lambda tensor: tensor.to(dtype.to_complex()) if tensor.is_complex() else tensor)
    model = model.eval().requires_grad_(True)
    make_general(model)
    if dtype == torch.float64:
        if getattr(getattr(model, "config", None), "_attn_implementation", None) not in (None, "eager", "sdpa"):
            model.set_attn_implementation("eager")  # other kernels need a GPU or half precision
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the grouped matrix product of PyTorch takes no float64
        mode = _InFloat64()
        model.register_forward_pre_hook(mode.enter, prepend=True)
        model.register_forward_hook(mode.leave, always_call=True)
    return model


@contextlib.contextmanager
def _fixed_random_numbers() -> Iterator[None]:
    """Draw the same random numbers every time, and leave the global generators as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        yield


# ---- weights of which none is special ---------------------------------------------------------------------


def make_general(model: nn.Module) -> None:
    """Change weights so that none is special: no norm weight of 1, no bias of 0, no matrix that hardly matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                _make_general(parameter, generator)
        for path, buffer in model.named_buffers():
            if _is_trained_buffer(model, path, buffer):
                buffer += SPREAD * _normal(buffer, generator) * (0.1 if path.endswith("running_var") else 1)


def _make_general(parameter: Tensor, generator: torch.Generator) -> None:
    noise = _normal(parameter, generator)
    if not bool(torch.isfinite(parameter).all()) or float(parameter.abs().max()) > 1e4:
        parameter.zero_()  # memory that nobody has initialized
    if parameter.dim() < 2:
        parameter += SPREAD * noise
        return
    usual = (parameter.numel() // parameter.shape[0]) ** -0.5 if parameter.dim() != 3 else parameter.shape[-1] ** -0.5
    spread = float(parameter.std(correction=0))
    if spread < 1e-6:
        parameter += usual * noise
    elif spread < usual:
        parameter *= usual / spread


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)


def _is_trained_buffer(model: nn.Module, path: str, buffer: Tensor) -> bool:
    """Whether a buffer is part of the weights: it is saved, and is a vector of moderate numbers."""
    owner, _, name = path.rpartition(".")
    saved = name not in model.get_submodule(owner)._non_persistent_buffers_set
    vector = buffer.dim() == 1 and buffer.is_floating_point() and buffer.numel() > 0
    return saved and vector and float(buffer.abs().max()) < 1e3  # NaN is not below


# ---- float64 in the forward ---------------------------------------------------------------------------------


class _InFloat64(TorchDispatchMode):
    """Computes in float64 where a model asks for float32 or less, as norms and rotary embeddings do.

    `enter` and `leave` are hooks of the twin.
    """

    def enter(self, module: nn.Module, args: Any) -> None:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        self.__enter__()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)
        torch.set_default_dtype(self.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _LOW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


# ---- structure --------------------------------------------------------------------------------------------


def paths_and_classes(model: nn.Module) -> set[tuple[str, str]]:
    """The paths of all modules, with * for every number, and the names of their classes."""
    return {  # quantizers replace the class of a linear layer
        (re.sub(r"\d+", "*", path), "Linear" if isinstance(module, nn.Linear) else type(module).__name__)
        for path, module in model.named_modules()
    }


def kinds_of_blocks(model: nn.Module) -> set[tuple[str, frozenset]]:
    """The kinds of blocks in every list of modules: what modules such a block has."""
    return {
        (re.sub(r"\d+", "*", f"{path}.{name}"), frozenset(paths_and_classes(block)))
        for path, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList)
        for name, block in stack.named_children()
    }


def _is_quantized(model: nn.Module) -> bool:
    """Whether weights are integers, or tensors of a class of their own as those of torchao."""
    return bool(getattr(model, "is_quantized", False)) or any(
        not parameter.is_floating_point() or type(parameter.data) is not Tensor for parameter in model.parameters()
    )
