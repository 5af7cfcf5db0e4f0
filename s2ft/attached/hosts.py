"""What an attached model changes around its layers, for transformers, checkpointing, quantizers and state dicts.

A gated FFN runs in one op, and experts by grouped products. The forwards are partial objects: torch.load could not
make a bound method of a module that it is still loading.

A reentrant checkpoint gives no gradient, not even to the weights inside it, if none of its inputs requires one. With
frozen embeddings the inputs of the first blocks require none. So hooks make the input of a checkpointed block require a
gradient if the block trains something. Other blocks are left alone, so that the backward ends at the lowest of these.

Trainer accepts a quantized model if PEFT trains adapters in it, or if its quantizer reports that it can be trained.
While trainable layers are mounted and gradients pass the quantized ones, that report is right.

Trained weights hold base + delta, and in layout `permuted` the units of coupled weights are in another order than in
the base. So ``state_dict()`` returns copies of these weights with the base's values in original order. A parameter that
a trainable layer has replaced keeps its name. The copies load into a plain model of the base, and into one with other
units selected. ``load_state_dict`` accepts only the base, in either order: the weights are frozen, so loading it
changes nothing, and anything else is an error. Loaded adapters that are active stay in the copies, as they are in
the weights.

Weights that FSDP2 or ZeRO-3 has sharded stay in their order, because no rank has all the units that would move, and
under the name in their layer, by which FSDP looks for them. Under tensor parallelism each rank puts its own units in
order. Packed weights are gathered for that, so every rank must call ``state_dict()`` if there are any.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.attached.active import keep_unfrozen
from s2ft.attached.record import Attachment, Mount, attachment_of
from s2ft.distributed import is_dtensor, is_sharded, managed_by_fsdp
from s2ft.layers import act_mul_of, forward_of, is_intercepted, kind_of
from s2ft.model.coupling import Coupling
from s2ft.model.permutation import restoring_moves
from s2ft.model.weights import tensors_of, weight_at
from s2ft.ops import act_mul, swap_

# ---- forwards -------------------------------------------------------------------------------------------------------


def gated_forward(block: nn.Module, x: Tensor, activation: str, act_class: type) -> Tensor:
    """The forward of a gated FFN, x [..., width] → [..., width].

    For the backward it keeps the outputs of gate and up, and of their product only what the down projection keeps. The
    block's own forward runs if `act_fn` is not of the class that `activation` stands for, or has hooks.
    """
    if type(block.act_fn) is not act_class or is_intercepted(block.act_fn):
        return type(block).forward(block, x)
    return block.down_proj(act_mul(block.gate_proj(x), block.up_proj(x), activation))


def replace_forward(model: nn.Module, coupling: Coupling, record: Attachment) -> None:
    """Give the coupling's block the forward that its trainable layers need.

    A module of experts must have that of :func:`s2ft.layers.forward_of`. A gated FFN gets :func:`gated_forward`, unless
    someone else has replaced its forward already.

    Raises:
        ValueError: Someone else has replaced the forward of experts.
    """
    for path in experts_modules(coupling):
        block = model.get_submodule(path)
        if "forward" not in block.__dict__:
            activation = act_mul_of(block) if record.config.ffn_kernel else None
            act_class = type(getattr(block, "act_fn", None))
            options = {} if activation is None else {"activation": activation, "act_class": act_class}
            _put(block, path, partial(forward_of(block), block, **options), record)
        elif path not in record.forwards:
            forward = block.__dict__["forward"]
            name = getattr(forward, "__qualname__", type(forward).__name__)
            raise ValueError(
                f"the forward of {path} has been replaced by {name}, which can't run "
                "trainable experts: leave the experts out of what replaces it, for Liger-Kernel with swiglu=False"
            )
    if coupling.activation is not None and record.config.ffn_kernel:
        block = model.get_submodule(coupling.block)
        if "forward" not in block.__dict__:
            forward = partial(gated_forward, block, activation=coupling.activation, act_class=type(block.act_fn))
            _put(block, coupling.block, forward, record)


def _put(block: nn.Module, path: str, forward: partial, record: Attachment) -> None:
    record.forwards[path] = forward
    block.forward = forward


def experts_modules(coupling: Coupling) -> list[str]:
    """The paths of the modules whose parameters are the coupling's experts; none if it is not about experts."""
    paths = (projection.path.rpartition(".")[0] for projection in coupling.projections if projection.expert is not None)
    return list(dict.fromkeys(paths))


def restore_forwards(model: nn.Module, record: Attachment) -> None:
    """Remove the recorded forwards, except where someone else has replaced them since."""
    for path, forward in record.forwards.items():
        block = model.get_submodule(path)
        if block.__dict__.get("forward") is forward:
            block.__dict__.pop("forward", None)


# ---- gradients through checkpointed blocks whose inputs are frozen --------------------------------------------------


def open_blocks(model: nn.Module, trained: Iterable[str]) -> None:
    """Register hooks on transformers' checkpointable blocks that contain trained modules. trained: paths of modules."""
    around = {parent for path in trained for parent in _parents(path)}
    blocks = [module for path, module in model.named_modules() if path in around and _block_class(module)]
    # up to 5.20 transformers runs a block's hooks inside its checkpoint
    if any("__call__" in vars(_block_class(block)) for block in blocks):
        for embeddings in _embeddings(model):
            embeddings.register_forward_hook(_Embeddings(blocks))
    else:
        for block in blocks:
            block.register_forward_pre_hook(_need_gradient)


def close_blocks(model: nn.Module) -> None:
    """Remove the hooks of :func:`open_blocks`. They are searched for, because an interrupt could lose handles."""
    for module in model.modules():
        remove_hooks(module._forward_pre_hooks, _need_gradient)
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _Embeddings)]:
            module._forward_hooks.pop(key, None)


def remove_hooks(hooks: dict[int, Callable], *ours: Callable) -> None:
    """Remove functions from a module's dict of hooks. PyTorch wraps those that run before a state dict is loaded."""
    for key in [key for key, hook in hooks.items() if any(getattr(hook, "hook", hook) is one for one in ours)]:
        hooks.pop(key, None)


def _parents(path: str) -> Iterator[str]:
    """Yield the paths of the modules that contain the module at `path`."""
    while path := path.rpartition(".")[0]:
        yield path


def _block_class(module: nn.Module) -> type | None:
    return next((kind for kind in type(module).__mro__ if kind.__name__ == "GradientCheckpointingLayer"), None)


def _need_gradient(block: nn.Module, inputs: tuple) -> tuple | None:
    """Forward pre-hook: make the first input require a gradient if no input does."""
    if not inputs or not _is_reentrant(block) or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return None
    hidden_states, *rest = inputs
    return (hidden_states.detach().requires_grad_(), *rest)  # detach gives a view: the caller's tensor does not change


def _is_reentrant(block: nn.Module) -> bool:
    """Whether the next forward runs the block in a reentrant checkpoint. Other checkpoints need no hook."""
    if not (block.gradient_checkpointing and block.training and torch.is_grad_enabled()):
        return False  # transformers checkpoints no block in these cases
    if torch.compiler.is_compiling():
        return False  # a compiled graph has no reentrant checkpoints
    return getattr(block._gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False


class _Embeddings:
    """The hook up to transformers 5.20: the embeddings' output requires a gradient, whichever block trains."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        is_needed = isinstance(output, Tensor) and any(map(_is_reentrant, self.blocks)) and not output.requires_grad
        return output.detach().requires_grad_() if is_needed else None


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the input embeddings of the model and of the models in it, each once."""
    found = {}
    for module in model.modules():
        try:
            embeddings = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
        except NotImplementedError:
            continue
        if isinstance(embeddings, nn.Module):
            found[id(embeddings)] = embeddings
    return list(found.values())


# ---- quantized models in transformers' Trainer ----------------------------------------------------------------------

KNOWN = ("bitsandbytes", "torchao")  # quantizers whose layers are known to pass gradients, or not to


def allow_training(model: nn.Module) -> None:
    """Make the model's quantizer, if it has one, report that the model can be trained."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method in KNOWN:
        quantizer.__class__ = _trainable_class(type(quantizer))


def restore_quantizer(model: nn.Module) -> None:
    """Undo :func:`allow_training`."""
    quantizer = getattr(model, "hf_quantizer", None)
    if hasattr(quantizer, "s2ft_original"):
        quantizer.__class__ = quantizer.s2ft_original


@cache
def _trainable_class(kind: type) -> type:
    """Return a subclass of a quantizer's class that reports that the model can be trained."""
    if hasattr(kind, "s2ft_original"):
        return kind
    return type(
        kind.__name__,
        (kind,),
        {
            "is_trainable": True,
            "is_qat_trainable": True,
            "s2ft_original": kind,
            # The class has no name in a module, so copies and files rebuild it from the original class.
            "__reduce__": lambda self: (_rebuild, (kind,), self.__dict__),
        },
    )


def _rebuild(kind: type) -> object:
    """Make an object of the trainable class of `kind`, without its attributes."""
    made = _trainable_class(kind)
    return made.__new__(made)


# ---- state dicts ----------------------------------------------------------------------------------------------------


class _BaseOrder:
    """Makes copies of a model's weights in the base's order."""

    def __init__(self, model: nn.Module, record: Attachment) -> None:
        self.model, self.record = model, record
        self.moves = restoring_moves(model, record.moves)
        self.layers = {
            id(mounted.layer.weight): mounted.layer
            for mounted in record.mounts.values()
            if "weight" in mounted.layer._parameters
        }
        self.written = {id(weight_at(model, entry.projection).tensor) for entry in record.written}

    def changed(self, tensor: Tensor) -> bool:
        """Whether a tensor may differ from its entry in a state dict."""
        return id(tensor) in self.moves or id(tensor) in self.layers or id(tensor) in self.written

    def copy_of(self, tensor: Tensor, without_written: bool = False) -> Tensor:
        """Copy a parameter or buffer, without the trainable adapter, in original order.

        Args:
            tensor: Parameter or buffer of the model.
            without_written: Whether to leave out the adapters that are written into it.
        """
        layer = self.layers.get(id(tensor))
        copy = (tensor if layer is None else layer.base_weight()).detach().clone()
        for moving in self.moves.get(id(tensor), ()):
            moving.permute(copy)
        for entry in reversed(self.record.written) if without_written else ():
            handle = weight_at(self.model, entry.projection)
            if not entry.is_local and handle.tensor is tensor:
                view = handle.view(copy)
                swap_(view, entry.index.to(view.device), entry.base.to(view, copy=True), entry.projection.dim)
        return copy


def _tensors(model: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (key in a state dict, tensor) for parameters and buffers; a tied tensor under each of its names."""
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            yield prefix + name, tensor


def put_in_order(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Post-hook of state_dict: replace weights that differ from the base by copies in the base's order."""
    record = attachment_of(model)
    if record.awaits_weights or not (record.moves or record.mounts):
        return  # no unit has moved and no trainable layer runs
    order, copies, is_fsdp = _BaseOrder(model, record), {}, bool(managed_by_fsdp(model))
    for key, tensor in _tensors(model, prefix):
        found = state.get(key)
        # keep_vars=True returns the parameters themselves
        if not isinstance(found, Tensor) or found is tensor or not order.changed(tensor):
            continue
        if is_sharded(tensor) and (not is_dtensor(tensor) or is_fsdp):
            continue
        if id(tensor) not in copies:
            copies[id(tensor)] = order.copy_of(tensor, without_written=True)
        state[key] = copies[id(tensor)]
    replaced = [key for key, mounted in _of_parameters(record, prefix) if not mounted.layer.is_managed]
    names = {f"{key}.weight": key for key in replaced}
    entries = [(names.get(key, key), value) for key, value in state.items()]
    state.clear()  # in place, and the order stays
    state.update(entries)


def _of_parameters(record: Attachment, prefix: str) -> Iterator[tuple[str, Mount]]:
    """Yield the trainable layers that have replaced a parameter, with the parameter's key in a state dict."""
    for path, mounted in record.mounts.items():
        if mounted.original is None:
            yield prefix + path, mounted


def check_is_base(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of load_state_dict: check that the weights of couplings are the base's, and keep them unchanged.

    The base of weights that were unfrozen by hand is recorded first.

    Raises:
        ValueError: They are not. Nothing has changed.
    """
    record = attachment_of(model)
    keep_unfrozen(model, record)
    for key, _ in _of_parameters(record, prefix):
        if key in state:
            state[f"{key}.weight"] = state.pop(key)
    if record.awaits_weights:
        return  # weights that arrive are checked when they are complete, see s2ft.attached.arrival
    order, frozen, same = _BaseOrder(model, record), _coupled(model, record), {}
    for key, tensor in _tensors(model, prefix):
        found = state.get(key)
        if id(tensor) in frozen and isinstance(found, Tensor) and not is_sharded(tensor) and not is_sharded(found):
            if found.shape != tensor.shape or found.is_meta or tensor.is_meta:
                continue  # PyTorch raises an error that names what does not fit
            if not _is_same(order, tensor, found):
                raise ValueError(
                    f"{key} is not the weight of the base that this model's adapters belong to: call "
                    "s2ft.detach(model) first, load the state, and attach again or load the adapter again"
                )
            same[key] = tensor
    state.update(same)  # load_state_dict then copies each onto itself


def _coupled(model: nn.Module, record: Attachment) -> set:
    """Return the ids of the couplings' tensors, except those of quantized layers, which load them themselves."""
    found = {id(tensor) for coupling in record.couplings for tensor in tensors_of(model, coupling)}
    return found - {
        id(parameter) for module in model.modules() if kind_of(module).read_only for parameter in module.parameters()
    }


def _is_same(order: _BaseOrder, tensor: Tensor, found: Tensor) -> bool:
    """Whether `found` is the base of `tensor` in original order, or the present value of `tensor` in either order."""
    found = found.to(tensor)
    return (
        torch.equal(found, tensor)
        or torch.equal(found, order.copy_of(tensor))
        or (bool(order.record.written) and torch.equal(found, order.copy_of(tensor, without_written=True)))
    )
