"""The shadow model: a copy of a model that has S²FT's trainable layers and no data."""

import copy
import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from s2ft.attached.hooks import add_record_and_hooks, expect_no_weights
from s2ft.attached.mounting import mount
from s2ft.attached.record import Record, check_unattached
from s2ft.config import S2FTConfig, refuse
from s2ft.distributed import is_spread
from s2ft.layers import S2Layer, kind_of
from s2ft.model.checkpoint import dtype_plan, is_of_transformers
from s2ft.model.coupling import Coupling
from s2ft.model.parts import couplings_in_towers
from s2ft.model.registry import find_couplings
from s2ft.model.running import example_of
from s2ft.selection import select


def make_shadow(
    model: nn.Module,
    config: S2FTConfig | Any,
    dtype: torch.dtype | None,
    couplings: Sequence[Coupling] | None,
    example: Any = None,
) -> tuple[nn.Module, Record]:
    """Copy a model to the meta device, with trainable layers or a LoRA in it, and return the copy and its record.

    The slices and the numbers of the units have data until :func:`forget_data`. Quantized weights are shared with the
    model, because their layers read properties of them.
    """
    check_unattached(model)
    found = find_couplings(model, couplings, example, config if isinstance(config, S2FTConfig) else S2FTConfig())
    wanted = wanted_dtypes(model, dtype)
    memo: dict[int, Any] = {}  # deepcopy uses these objects instead of copies
    for path, module in model.named_modules():
        quantized = kind_of(module).read_only
        if quantized and module.weight.is_meta:  # a layer of bitsandbytes that has no quantized data yet
            raise ValueError(
                f"{path} ({type(module).__name__}) is on the meta device, and its quantization is known only "
                "when it is loaded: estimate the loaded model, or the unquantized one"
            )
        memo.update({id(thing): thing for thing in kind_of(module).shared(module)})
        for name, tensor in (*module._parameters.items(), *module._buffers.items(), *vars(module).items()):
            if not isinstance(tensor, Tensor) or id(tensor) in memo:
                continue
            if quantized and name == "weight":  # a new parameter that shares the data
                memo[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False)
                memo[id(tensor)].__dict__.update(vars(tensor))
            else:
                memo[id(tensor)] = _hollow(f"{path}.{name}", tensor, wanted.get(id(tensor), tensor.dtype))
    shadow = copy.deepcopy(model, memo)
    # with the fingerprint of no base, so that nothing is compared
    record = Record(found.couplings, {"layers": {}}, {}, is_custom=found.is_custom)
    if not isinstance(config, S2FTConfig):
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, shadow, low_cpu_mem_usage=True)  # in the dtype of the weights
        return shadow, record
    selection = select(couplings_in_towers(shadow, found.couplings, config), as_random(config), shadow)
    add_record_and_hooks(shadow, record)
    mount(shadow, record, config, selection, "estimate")
    expect_no_weights(record)
    return shadow, record


def as_random(config: S2FTConfig) -> S2FTConfig:
    """Return a configuration that trains as many units and chooses them without data."""
    if config.units is not None:
        return config
    allocation = config.allocation if config.selection == "random" else "uniform"
    return replace(config, selection="random", allocation=allocation, order="largest", protect_ratio=None)


def _hollow(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the same shape on the meta device."""
    if is_spread(tensor) or is_traceable_wrapper_subclass(tensor):
        raise ValueError(
            f"{name} is a {type(tensor.data).__name__}, which can't be counted: pass the model before "
            "it is sharded or wrapped"
        )
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def wanted_dtypes(model: Any, dtype: torch.dtype | None) -> dict[int, torch.dtype]:
    """Return the dtypes of the weights after loading in `dtype`, by id. A model may keep some weights in float32."""
    if dtype is None:
        return {}
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    plan = dtype_plan(model, dtype) if is_of_transformers(model) else {}
    wanted = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # buffers outside it are not loaded either
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            found = (kept for pattern, kept in plan.items() if re.search(rf"(^|\.){pattern}(\.|$)", name))
            wanted[id(tensor)] = next(found, dtype)
    return wanted


def forget_data(shadow: nn.Module, record: Record, device: torch.device, checkpointing: bool | str) -> None:
    """Replace all tensors by fake tensors on `device`, and switch gradient checkpointing on if it is wanted."""
    if checkpointing:
        _checkpoint(shadow, checkpointing)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old tensor, so that its id is not used again

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            made[id(tensor)] = (_fake(tensor, mode, device), tensor)
        return made[id(tensor)][0]

    for module in shadow.modules():
        state = {} if isinstance(module, S2Layer) else kind_of(module).state(module)
        for tensors in (module._parameters, module._buffers, vars(module), state):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)})
    for mounted in record.mounts.values():
        if mounted.layer.kind.read_only is None:
            mounted.layer.fuse()  # the base of the slice is kept from the first step on


def _fake(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    if is_traceable_wrapper_subclass(tensor.data):
        made = mode.from_tensor(tensor.data).to(device)
    else:
        with mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        made.__dict__.update(
            {
                name: _fake(value, mode, device) if isinstance(value, Tensor) else value
                for name, value in vars(tensor).items()
            }
        )
    return made


def _checkpoint(shadow: nn.Module, kind: Any) -> None:
    """Switch gradient checkpointing on.

    Raises:
        ValueError: `kind` is unknown, or the model does not support checkpointing.
    """
    refuse(
        (
            kind not in (True, "reentrant", "non-reentrant"),
            f"gradient_checkpointing must be True, False, 'reentrant' or 'non-reentrant', got {kind!r}",
        ),
        (
            not getattr(shadow, "supports_gradient_checkpointing", False),
            f"gradient_checkpointing: {type(shadow).__name__} does not support it",
        ),
    )
    name = "activation" if hasattr(shadow, "activation_checkpointing_enable") else "gradient"  # transformers 5.2x
    options = {"use_reentrant": kind == "reentrant", "preserve_rng_state": False}
    getattr(shadow, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": options})


def made_inputs(
    shadow: Any, batch: int, length: int | None, logits: int | None, device: torch.device
) -> dict[str, Any]:
    """Make inputs according to the model's config, with labels if these are tokens."""
    inputs: dict[str, Any] | None = example_of(shadow, batch, length or 1, device)
    if inputs is None:
        raise ValueError(
            f"{type(shadow).__name__} is not a model of transformers whose inputs s2ft can make: pass example"
        )
    tokens = [value for name, value in inputs.items() if name.endswith("input_ids")]
    if tokens and length is None:
        raise ValueError(f"length must be given for {type(shadow).__name__}, which takes tokens, got None")
    takes = inspect.signature(shadow.forward).parameters
    if logits is not None:
        refuse(
            (
                "logits_to_keep" not in takes,
                f"logits={logits}: {type(shadow).__name__} can't compute logits for some positions only",
            ),
            (length is not None and logits > length, f"logits must be at most length, {length}, got {logits}"),
        )
        inputs["logits_to_keep"] = logits
    if "labels" in takes and "decoder_input_ids" in inputs:
        inputs["labels"] = inputs.pop("decoder_input_ids")  # the model makes the decoder inputs from its labels
    elif "labels" in takes and tokens and shadow.get_output_embeddings() is not None:
        inputs["labels"] = tokens[0] if logits is None else tokens[0][:, -logits:]
    elif "return_loss" in takes:
        inputs["return_loss"] = True
    return inputs


def shape_of(inputs: Any) -> tuple[int, int | None]:
    """Return the batch size, and the length if there are tokens."""
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else [inputs]
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise ValueError("example has no tensor whose first dim is the batch")
    tokens = [tensor for tensor in tensors if tensor.dim() == 2 and not tensor.is_floating_point()]
    return len(tensors[0]), tokens[0].shape[1] if tokens else None
