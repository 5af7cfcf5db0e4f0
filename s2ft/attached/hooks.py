"""What an attached model changes around its layers: for transformers, quantizers, state dicts, weights that arrive.

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
changes nothing, and anything else is an error. Loaded adapters that are active are left out of the copies. A model
without a trainable adapter has its weights in the state as they are.

While a model of transformers trains an adapter, save_pretrained writes the adapter alone. The Trainers of transformers
and TRL can resume from these checkpoints without changes.

Weights that FSDP2 or ZeRO-3 has sharded stay in their order, because no rank has all the units that would move, and
under the name in their layer, by which FSDP looks for them. Under tensor parallelism each rank puts its own units in
order. Packed weights are gathered for that, so every rank must call ``state_dict()`` if there are any.

Under FSDP2 with cpu_ram_efficient_loading only the first rank of a machine reads the base. On the other ranks the model
is on the meta device while the trainable layers are mounted, and the weights arrive when it has been sharded: by
load_state_dict, in the base's order. Until then the record waits for them, the units have not moved, and the trainable
layers refuse to run. When the weights are there, on all ranks together: they are compared with the base's fingerprint,
the base of the extra weights is kept, and the units move on the shards.

A layer that runs writes its own slice if s2 has changed. A hook of the model does it for all layers first: for code
that reads a weight past its layer, and for weights that are spread over ranks, where each rank writes what it owns.
"""

import json
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import MethodType
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from torch.optim.optimizer import register_optimizer_step_pre_hook

from s2ft.adapter import native
from s2ft.adapter.adapter import Adapter
from s2ft.adapter.folders import write_card
from s2ft.attached.active import (
    extra_parameters,
    full_copies,
    is_in_capture,
    keep_base_before_forward,
    keep_base_of_unfrozen,
    place_loaded,
    set_extra,
    set_trained,
    write_changed_layers,
    write_once_in_graph,
)
from s2ft.attached.record import (
    Mount,
    Part,
    Record,
    applied,
    check_extra_fits,
    clear_record,
    find_record,
    record_of,
    set_record,
)
from s2ft.attached.report import print_trainable_parameters
from s2ft.attached.saving import with_saved
from s2ft.config import S2FTConfig
from s2ft.distributed import (
    fsdp_modules,
    group_store,
    is_dtensor,
    is_partitioned,
    is_spread,
    managed_by_fsdp,
    ranks_sharing,
    reshard_all,
    wait_for_ranks,
)
from s2ft.files.plain_text import replace_file
from s2ft.files.reading import json_entry
from s2ft.foreign import check_mentioned
from s2ft.layers import S2Layer, act_mul_of, forward_of, is_intercepted, kind_of
from s2ft.model.checkpoint import INDEX, WEIGHTS
from s2ft.model.coupling import Coupling, by_key
from s2ft.model.fingerprint import difference, fingerprint
from s2ft.model.weights import Delta, Move, any_on_meta, restoring_moves, tensors_of, weight_at
from s2ft.ops import act_mul, swap_
from s2ft.ops._library import transforms_active

# ---- forwards -------------------------------------------------------------------------------------------------------


def gated_forward(block: Any, x: Tensor, activation: str, act_class: type[Any]) -> Tensor:
    """The forward of a gated FFN, x [..., width] → [..., width].

    For the backward it keeps the outputs of gate and up, and of their product only what the down projection keeps. The
    block's own forward runs if `act_fn` is not of the class that `activation` stands for, or has hooks.
    """
    if transforms_active() or type(block.act_fn) is not act_class or is_intercepted(block.act_fn):
        return type(block).forward(block, x)
    return block.down_proj(act_mul(block.gate_proj(x), block.up_proj(x), activation))


def replace_forward(model: nn.Module, coupling: Coupling, record: Record) -> None:
    """Give the coupling's block the forward that its trainable layers need.

    A module of experts must have that of :func:`s2ft.layers.forward_of`. A gated FFN gets :func:`gated_forward`, unless
    someone else has replaced its forward already.

    Raises:
        ValueError: Someone else has replaced the forward of experts.
    """
    for path in experts_modules(coupling):
        block = model.get_submodule(path)
        if _has_own_forward(block):
            activation = act_mul_of(block) if cast(S2FTConfig, record.config).ffn_kernel else None
            act_class = type(getattr(block, "act_fn", None))
            options = {} if activation is None else {"activation": activation, "act_class": act_class}
            _put(block, path, partial(forward_of(block), block, **options), record)
        elif path not in record.forwards:
            forward = block.__dict__[_place_of_forward(block)]
            name = getattr(forward, "__qualname__", type(forward).__name__)
            raise ValueError(
                f"the forward of {path} has been replaced by {name}, which can't run "
                "trainable experts: leave the experts out of what replaces it, for Liger-Kernel with swiglu=False"
            )
    if coupling.activation is not None and coupling.block is not None and cast(S2FTConfig, record.config).ffn_kernel:
        block = model.get_submodule(coupling.block)
        if _has_own_forward(block):
            forward = partial(gated_forward, block, activation=coupling.activation, act_class=type(block.act_fn))
            _put(block, coupling.block, forward, record)


def _put(block: nn.Module, path: str, forward: partial, record: Record) -> None:
    record.forwards[path] = forward
    setattr(block, _place_of_forward(block), forward)


def _has_own_forward(block: nn.Module) -> bool:
    return block.__dict__.get(_place_of_forward(block)) in (None, MethodType(type(block).forward, block))


def _place_of_forward(block: nn.Module) -> str:
    """The attribute that holds a module's forward: another one where accelerate has put a hook around it."""
    return "_old_forward" if hasattr(block, "_hf_hook") else "forward"


def experts_modules(coupling: Coupling) -> list[str]:
    """The paths of the modules whose parameters are the coupling's experts; none if it is not about experts."""
    paths = (projection.path.rpartition(".")[0] for projection in coupling.projections if projection.expert is not None)
    return list(dict.fromkeys(paths))


def restore_forwards(model: nn.Module, record: Record) -> None:
    """Remove the recorded forwards, except where someone else has replaced them since."""
    for path, forward in record.forwards.items():
        block = model.get_submodule(path)
        place = _place_of_forward(block)
        if block.__dict__.get(place) is forward:
            block.__dict__.pop(place)
            if place != "forward":  # accelerate's hook needs one
                setattr(block, place, MethodType(type(block).forward, block))


# ---- gradients through checkpointed blocks whose inputs are frozen --------------------------------------------------


def add_checkpoint_hooks(model: nn.Module, trained: Collection[str]) -> None:
    """Register hooks on transformers' checkpointable blocks that contain trained modules. trained: paths of modules."""
    remove_checkpoint_hooks(model)
    modeling = sys.modules.get("transformers.modeling_layers")
    if modeling is None:  # no model of transformers
        return
    kind = modeling.GradientCheckpointingLayer
    blocks = [
        module
        for path, module in model.named_modules()
        if isinstance(module, kind) and any(one.startswith(f"{path}.") for one in trained)
    ]
    if blocks and "__call__" in vars(kind):  # up to 5.20 transformers runs a block's hooks inside its checkpoint
        for embeddings in _embeddings(model):
            embeddings.register_forward_hook(partial(_give_gradient, blocks))
    else:
        for block in blocks:
            block.register_forward_pre_hook(_need_gradient)


def remove_checkpoint_hooks(model: nn.Module) -> None:
    """Undo :func:`add_checkpoint_hooks`. The hooks are searched for, because an interrupt could lose handles."""
    for module in model.modules():
        remove_hooks(module._forward_pre_hooks, _need_gradient)
        remove_hooks(module._forward_hooks, _give_gradient)


def remove_hooks(hooks: dict[int, Callable], *ours: Callable) -> None:
    """Remove functions from a module's dict of hooks, also partial ones.

    PyTorch wraps those that run before a state dict is loaded.
    """
    for key, hook in list(hooks.items()):
        if getattr(hook, "func", getattr(hook, "hook", hook)) in ours:
            hooks.pop(key, None)


def _need_gradient(block: nn.Module, inputs: tuple) -> tuple | None:
    """Forward pre-hook: make the first input require a gradient if no input does."""
    if not inputs or not _is_reentrant(block) or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return None
    hidden_states, *rest = inputs
    return (hidden_states.detach().requires_grad_(), *rest)  # detach gives a view: the caller's tensor does not change


def _is_reentrant(block: nn.Module) -> bool:
    """Whether the next forward runs the block in a reentrant checkpoint. Other checkpoints need no hook."""
    return bool(
        # transformers checkpoints no block in other cases
        (block.gradient_checkpointing and block.training and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()  # a compiled graph has no reentrant checkpoints
        and getattr(block._gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False
    )


def _give_gradient(blocks: list[nn.Module], module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
    """Forward hook of embeddings up to transformers 5.20: the output requires a gradient, whichever block trains."""
    is_needed = isinstance(output, Tensor) and any(map(_is_reentrant, blocks)) and not output.requires_grad
    return output.detach().requires_grad_() if is_needed else None


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the input embeddings of the model and of the models in it, each once."""
    found = {}
    for module in model.modules():
        try:
            embeddings = cast(Any, module).get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
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
        quantizer.__class__ = _trainable_class(quantizer.__class__)


def restore_quantizer(model: nn.Module) -> None:
    """Undo :func:`allow_training`."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and hasattr(quantizer, "s2ft_original"):
        quantizer.__class__ = quantizer.s2ft_original


@cache
def _trainable_class(kind: type) -> Any:
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

    def __init__(self, model: nn.Module, record: Record) -> None:
        self.model, self.record = model, record
        self.aside, self.overwritten = _held(model, record.extra.trained), _held(model, record.extra.overwritten)
        self.moves = restoring_moves(model, record.moves)
        self.layers = {
            id(mounted.layer.weight): mounted.layer
            for mounted in record.mounts.values()
            if "weight" in mounted.layer._parameters
        }
        self.written = by_key((id(weight_at(model, entry.projection).tensor), entry) for entry in record.written)

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
        for entry in reversed(self.written.get(id(tensor), ())) if without_written else ():
            if entry.index is None:
                view = weight_at(self.model, entry.projection).view(copy)
                swap_(view, entry.delta.index.to(view.device), entry.base.to(view, copy=True), entry.projection.dim)
        return copy

    def versions_of(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the values that a state of this model may have: the present ones, in either order, and the base's."""
        yield tensor
        yield self.copy_of(tensor)
        if self.record.written:
            yield self.copy_of(tensor, without_written=True)


def named_tensors(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (key in a state dict, tensor) for parameters and buffers; a tied tensor under each of its names."""
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            yield prefix + name, tensor


UNITS = "s2ft_units"  # entry of a state's metadata: the digest of the selection


def give_base_values(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Post-hook of state_dict: replace weights that differ from the base by copies in the base's order."""
    record = record_of(model)
    if record.selection is not None:
        metadata[UNITS] = record.selection.digest
    if record.awaits_weights or not (record.moves or record.mounts):
        return  # no unit has moved and no trainable layer runs
    order, copies, is_fsdp = _BaseOrder(model, record), {}, bool(managed_by_fsdp(model))
    for key, tensor in named_tensors(model, prefix):
        found = state.get(key)
        # keep_vars=True returns the parameters themselves
        if not isinstance(found, Tensor) or found is tensor:
            continue
        if id(tensor) in order.aside:
            state[key] = record.extra.trained[order.aside[id(tensor)]].clone()
        elif id(tensor) in order.overwritten:
            state[key] = record.extra.overwritten[order.overwritten[id(tensor)]].clone()
        if not order.changed(tensor):
            continue
        if is_spread(tensor) and (not is_dtensor(tensor) or is_fsdp):
            continue
        if id(tensor) not in copies:
            copies[id(tensor)] = order.copy_of(tensor, without_written=True)
        state[key] = copies[id(tensor)]
    replaced = _in_place_of_parameters(record, prefix)
    names = {f"{key}.weight": key for key, layer in replaced.items() if not layer.is_managed}
    entries = [(names.get(key, key), value) for key, value in state.items()]
    state.clear()  # in place, and the order stays
    state.update(entries)


def _held(model: nn.Module, values: Mapping[str, Tensor]) -> dict[int, str]:
    """The names of extra weights by id, given the values of them that the record keeps.

    A state has these values: those of the trainable adapter while it is off, and the base of those that loaded adapters
    have overwritten.
    """
    found = {name: model.get_parameter(name) for name in values}
    return {id(parameter): name for name, parameter in found.items() if not is_spread(parameter)}


def _in_place_of_parameters(record: Record, prefix: str) -> dict[str, S2Layer]:
    """The trainable layers that have replaced a parameter, by the parameter's key in a state dict."""
    return {prefix + path: mounted.layer for path, mounted in record.mounts.items() if mounted.original is None}


def check_is_base(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *_: Any) -> None:
    """Pre-hook of load_state_dict: check that the weights of couplings are the base's, and keep them unchanged.

    The base of weights that were unfrozen by hand is recorded first.

    Raises:
        ValueError: They are not. Nothing has changed.
    """
    record = record_of(model)
    keep_base_of_unfrozen(model, record)
    digest = getattr(record.selection, "digest", None)
    for path, mounted in record.mounts.items():
        own = f"{prefix}{path}.s2" in state  # an adapter's file, which transformers loads too, has an index of its own
        index, found = mounted.layer.index, state.get(f"{prefix}{path}.index") if own else None
        is_other = index is not None and found is not None and not torch.equal(found.to(index), index)
        if is_other or metadata.get(UNITS, digest) != digest:
            raise ValueError(f"the state is of other units of {path} than those that this model trains")
    for key in _in_place_of_parameters(record, prefix):
        if key in state:
            state[f"{key}.weight"] = state.pop(key)
    if record.awaits_weights:
        return  # weights that arrive are checked when they are complete, see `accept_arrived_weights`
    # The couplings' tensors, except those of quantized layers, which load them themselves
    frozen = {id(tensor) for coupling in record.couplings for tensor in tensors_of(model, coupling)}
    read_only = (module for module in model.modules() if kind_of(module).read_only)
    frozen -= {id(parameter) for module in read_only for parameter in module.parameters()}
    order, same, taken = _BaseOrder(model, record), {}, {}
    for key, tensor in named_tensors(model, prefix):
        found = state.get(key)
        if id(tensor) in order.aside and isinstance(found, Tensor) and found.shape == tensor.shape:
            taken[order.aside[id(tensor)]], same[key] = found.detach().to(tensor, copy=True), tensor
        elif id(tensor) in order.overwritten and isinstance(found, Tensor):
            same[key] = tensor  # the loaded adapter that has it stays active
        elif id(tensor) in frozen and isinstance(found, Tensor) and not is_spread(tensor) and not is_spread(found):
            if found.shape != tensor.shape or found.is_meta or tensor.is_meta:
                continue  # PyTorch raises an error that names what does not fit
            if not any(torch.equal(found.to(tensor), one) for one in order.versions_of(tensor)):
                raise ValueError(
                    f"{key} is not the weight of the base that this model's adapters belong to: call "
                    "s2ft.detach(model) first, load the state, and attach again or load the adapter again"
                )
            same[key] = tensor
    record.extra.trained = {**record.extra.trained, **taken}
    state.update(same)  # load_state_dict then copies each onto itself


# ---- a model of transformers while it trains an adapter -------------------------------------------------------------

logger = logging.getLogger(__name__)
ATTRIBUTES = ("save_pretrained", "print_trainable_parameters", "_keys_to_ignore_on_save")
NOT_GATHERED = (
    "%s gets no adapter: ZeRO-3 has spread it over the ranks, and this rank saves alone. DeepSpeed's own checkpoint "
    "there has it, with the base. Use S2FTTrainer, call s2ft.save_adapter(model, folder) on every rank after the "
    "training, or set stage3_gather_16bit_weights_on_model_save, which gathers the base too"
)
WHOLE_MODELS = (WEIGHTS, "pytorch_model.bin", "pytorch_model.bin.index.json")


def save_pretrained(
    self: nn.Module,
    save_directory,
    is_main_process: bool = True,
    state_dict=None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Save the trainable adapter, not the model: the model's weights alone would be a checkpoint of the base.

    To save the whole model, call :func:`s2ft.merge` first.

    Args:
        self: Model with a trainable adapter.
        save_directory: Folder to write to, created if needed.
        is_main_process: Whether this rank writes.
        state_dict: A gathered state_dict. Default: the model's own.
        push_to_hub: Must be False: :func:`s2ft.push_to_hub` uploads adapters.
        options: Further options of transformers, which are ignored.

    Raises:
        ValueError: `push_to_hub` is True, or the folder contains a whole model.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> model.save_pretrained("checkpoint")
        >>> s2ft.read_adapter("checkpoint").name
        'default'
    """
    if push_to_hub:
        raise ValueError("push_to_hub must be False while an adapter is trained: use s2ft.push_to_hub(model, repo_id)")
    if not is_main_process:
        return
    directory, record = Path(save_directory).expanduser(), record_of(self)
    if state_dict == {} and any(map(is_partitioned, record.slices.values())):  # the plain Trainer, which did not gather
        logger.warning(NOT_GATHERED, directory)
        return
    _check_no_model(directory)
    layers = dict.fromkeys([*record.slices, *extra_parameters(self, record)], native.TENSORS)

    def write(adapter: Adapter) -> None:
        native.write(adapter, directory)
        write_card(adapter, directory)
        index = {"metadata": {"format": "s2ft"}, "weight_map": layers}
        replace_file(directory / INDEX, json.dumps(index, indent=1).encode())

    with_saved("saving an adapter", self, record.trainable, write, state=state_dict)


def _check_no_model(directory: Path) -> None:
    """Check that the folder has no model, which would load with random weights after its index was replaced.

    Raises:
        ValueError: The folder contains a whole model's weights, or an index that s2ft did not write.
    """
    found = [name for name in WHOLE_MODELS if (directory / name).exists()]
    if (directory / INDEX).exists() and json_entry(directory / INDEX, "metadata", "format") != "s2ft":
        found.append(INDEX)
    if found:
        raise ValueError(
            f"save_directory {directory} holds another model ({found[0]}), which would load with random "
            "weights after an adapter was saved there: give another folder, or call s2ft.merge first to save the whole "
            "model"
        )


def _load_deltas(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of load_state_dict: copy the tensors of an adapter's file into the trainable layers.

    Raises:
        ValueError: They are of another selection. Nothing has changed.
    """
    record = record_of(model)
    marked = prefix + native.EXTRA
    found = {
        key.removeprefix(prefix).rpartition(".")[0]
        for key in state
        if key.startswith(prefix) and key.endswith(".delta") and not key.startswith(marked)
    }
    if not found:
        return  # the state has the layers' s2, not the tensors of an adapter's file
    if found != record.parts.keys():
        raise ValueError(
            "the adapter to load trains other projections than this model: "
            f"{', '.join(sorted(found ^ record.parts.keys())[:3])}"
        )
    parts = record.parts
    deltas = {name: _delta(*parts[name], name, state, prefix + name) for name in found}
    values = {key.removeprefix(marked): value for key, value in state.items() if key.startswith(marked)}
    check_extra_fits(model, record, cast(str, record.trainable), values)
    set_trained(model, record, deltas, values)
    for name in found:
        del state[f"{prefix}{name}.delta"], state[f"{prefix}{name}.index"]
    for name in values:
        del state[marked + name]
    _ignore_base_weights(model, values)


def _ignore_base_weights(model: Any, extra_names: Iterable[str]) -> None:
    """List the base's weights as not saved, so that Trainer does not warn that a checkpoint lacks them."""
    model._keys_to_ignore_on_save = set(model.state_dict(keep_vars=True)) - {*record_of(model).slices, *extra_names}


def _delta(mount: Mount, part: Part, name: str, state: dict[str, Tensor], key: str) -> Delta:
    """Check and return the delta of one projection from the tensors of an adapter's file."""
    index, values = state.get(f"{key}.index"), state[f"{key}.delta"]
    if index is None or not torch.equal(index.long().cpu(), part.elements):
        raise ValueError(f"the adapter to load has other units of {name} than the ones this model trains")
    shape = list(mount.layer.s2.shape)
    shape[mount.layer.dim] = part.elements.numel()
    if list(values.shape) != shape:
        raise ValueError(f"the adapter to load has shape {tuple(values.shape)} for {name}, expected {tuple(shape)}")
    return Delta(mount.layer.dim, part.elements, values)


def add_save_functions(model: Any, record: Record) -> None:
    """Give a model of transformers the functions that save and load its trainable adapter."""
    remove_save_functions(model, record)
    if not hasattr(type(model), "save_pretrained"):
        return
    record.replaced_attributes = {name: model.__dict__[name] for name in ATTRIBUTES if name in model.__dict__}
    # partial objects: torch.load could not make bound methods of a model that it is still loading
    model.save_pretrained = partial(save_pretrained, model)
    model.print_trainable_parameters = partial(print_trainable_parameters, model)
    _ignore_base_weights(model, ())
    model.register_load_state_dict_pre_hook(_load_deltas)


def remove_save_functions(model: nn.Module, record: Record) -> None:
    """Undo :func:`add_save_functions`, whether all, some or none of it was done."""
    remove_hooks(model._load_state_dict_pre_hooks, _load_deltas)
    for name in ATTRIBUTES if record.replaced_attributes is not None else ():
        model.__dict__.pop(name, None)
    model.__dict__.update(record.replaced_attributes or {})


# ---- weights that arrive after an adapter was attached, on ranks that started without them --------------------------


def expect_no_weights(record: Record) -> None:
    """Make the model run as it is: it is a copy without numbers, for which no weights will arrive."""
    record.awaits_weights, record.none_awaited = False, True
    for mount in record.mounts.values():
        mount.layer.awaits_order = False


def mark_layers(record: Record) -> None:
    """Tell each trainable layer whether its units have yet to move, and what its states contain until then."""
    waiting = {projection.path for move in record.moves if move.is_pending for projection in move.coupling.projections}
    for path, mount in record.mounts.items():
        mount.layer.awaits_order = path in waiting
        if record.awaits_weights:
            mount.layer.leave_units_out_of_states()


def _change_moves(record: Record, change: Callable[[Move], None]) -> None:
    """Change all moves, and tell the layers."""
    for move in record.moves:
        change(move)
    mark_layers(record)


@contextmanager
def not_awaiting(model: nn.Module, record: Record) -> Iterator[None]:
    """Inside, a model whose weights are here, and will be loaded again, runs with its units in the new order."""
    if not record.awaits_weights:
        yield
        return
    record.awaits_weights = False
    try:
        _change_moves(record, lambda move: move.finish(model))
        yield
    finally:
        record.awaits_weights = True
        _change_moves(record, lambda move: move.undo(model, later=True))


def after_load(model: nn.Module, *_: Any) -> None:
    """Post-hook of load_state_dict: take up weights that were loaded."""
    if not accept_arrived_weights(model):
        _reorder_if_base_was_loaded(model)


def _reorder_if_base_was_loaded(model: nn.Module) -> None:
    """Reorder the shards of FSDP2 again if a state has brought them in the base's order.

    The state of a sharded model has the model's own order, and a checkpoint of the base has the base's. Nothing but the
    fingerprint tells one from the other. Every rank loads a state of a sharded model, so every rank calls this.
    """
    record = record_of(model)
    was_reordered = any(move.is_done for move in record.moves)
    if record.awaits_weights or record.written or not was_reordered or not fsdp_modules(model):
        return
    reshard_all(model)
    if difference(fingerprint(model, record.couplings), cast("dict[str, Any]", record.fingerprint)):
        return
    _change_moves(record, Move.start_again)
    _change_moves(record, lambda move: move.finish(model))


def accept_arrived_weights(model: nn.Module) -> bool:
    """Take up weights that have arrived since the last call. Every rank of a sharded model calls this.

    Returns:
        Whether any have arrived.

    Raises:
        RuntimeError: They are not those of the base. The units have not moved.
    """
    record = record_of(model)
    if not record.mounts or not _has_to_accept(model, record):
        return False
    reshard_all(model)
    if any_on_meta(model, record.couplings):
        return False
    _change_moves(record, Move.start_again)  # what was loaded is in the base's order
    _check_arrived(model, record)
    try:
        _change_moves(record, lambda move: move.finish(model))
        _keep_extra_base(model, record)
        record.awaits_weights, record.none_awaited = False, True
    except BaseException:  # an interrupt: the next call starts from the base's order again
        _change_moves(record, lambda move: move.undo(model, later=True))
        raise
    for mount in record.mounts.values():
        mount.layer.first_values = None
    values, record.extra.arriving = record.extra.arriving, {}
    set_extra(model, record, values)
    return True


def _has_to_accept(model: nn.Module, record: Record) -> bool:
    """Whether this rank, or another rank with a shard of the same weights, waits for them."""
    if record.awaits_weights:
        return True
    if record.none_awaited or not record.fingerprint_decision.key:
        return False
    if model not in fsdp_modules(model) and not any(is_spread(m.layer.weight) for m in record.mounts.values()):
        return False
    record.none_awaited = not record.fingerprint_decision.is_for_others
    return not record.none_awaited


def _check_arrived(model: nn.Module, record: Record) -> None:
    found = fingerprint(model, record.couplings)
    record.fingerprint = record.fingerprint or found
    differing = difference(found, record.fingerprint)
    if differing:
        raise RuntimeError(
            f"the weights that were loaded are not those of the base of {record.trainable!r}: {differing}. Load "
            "the base's own state, in its own order of units"
        )
    if any(mount.layer.s2.is_meta for mount in record.mounts.values()):
        raise RuntimeError(
            "the weights were loaded, and the slices (s2) are still on the meta device: call "
            "model.to_empty(device=...) before you load the state of the base, or load a state that has the slices"
        )


def _keep_extra_base(model: nn.Module, record: Record) -> None:
    """Keep the base of the extra weights, which this rank may not have had."""
    parameters = {name: model.get_parameter(name) for name in record.extra.base}
    source = _rank_that_has(record, ranks_sharing(parameters.values()))
    if source is None:
        record.extra.base = full_copies(parameters)
    else:
        record.extra.base = {name: _sent(record, name, one, source) for name, one in parameters.items()}


def _rank_that_has(record: Record, ranks: list[int] | None) -> int | None:
    """The first rank that has the base of the extra weights; None if none has, or if the weights are whole here."""
    if ranks is None:
        return None
    has = not any(value.is_meta for value in record.extra.base.values())
    key = wait_for_ranks("who has the base of the extra weights", ranks, str(int(has)))
    return next((rank for rank in ranks if group_store().get(f"{key}/{rank}") == b"1"), None)


def _sent(record: Record, name: str, parameter: Any, source: int) -> Tensor:
    """Send the base of an extra weight from one rank to all."""
    value = record.extra.base[name].detach()
    device = parameter.device_mesh.device_type
    value = value.new_empty(parameter.shape, device=device) if value.is_meta else value.to(device)
    dist.broadcast(value, source)
    return value.to(parameter.device)


# ---- before a forward -----------------------------------------------------------------------------------------------


def before_forward(model: Any, *_: Any) -> None:
    """Forward pre-hook of a model with adapters.

    Weights that have arrived are taken up, the base of weights that were unfrozen by hand is recorded, and changed
    slices are written.

    Raises:
        RuntimeError: A weight or bias of a coupling was unfrozen, which would get no gradient, or the weights that have
            arrived are not the base's.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return  # in another function's graph each layer checks what its weight holds; torch.func runs them on copies
    record, hooks = record_of(model), model._forward_pre_hooks
    is_first = next(iter(hooks.values())) is before_forward
    if not is_first:  # FSDP2 was applied since
        hooks.move_to_end(next(key for key, hook in hooks.items() if hook is before_forward), last=False)
    is_gathered = not is_first and model in fsdp_modules(model)  # by the hook of FSDP2, which came first
    if accept_arrived_weights(model) and is_gathered:
        model.unshard()  # again
    if record.trains and getattr(model, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel copies the model at each forward, which a trainable adapter can't follow: use "
            "DistributedDataParallel (torchrun), or one device (CUDA_VISIBLE_DEVICES=0)"
        )
    if torch.is_grad_enabled() and record.snapshot is None:  # a proof unfreezes weights for its time
        keep_base_before_forward(model, record)
    if is_gathered:
        return  # layers compute with copies, this once
    written = write_changed_layers(model, record)
    if is_in_capture(written):
        write_once_in_graph(model, written)


_attached_models: WeakSet[nn.Module] = WeakSet()


@cache  # once a process
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)


@torch.compiler.disable
def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Keep the base of weights that were unfrozen by hand where only a module inside the model has run."""
    stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
    for model in list(_attached_models):
        record = find_record(model)
        if record is not None and record.trains and any(id(one) in stepped for one in model.parameters()):
            keep_base_before_forward(model, record)


skip_code(before_forward.__code__)  # a compiled model runs its hooks outside of the graph: this one as it is


# ---- the record and the hooks of a model ----------------------------------------------------------------------------


def add_record_and_hooks(model: nn.Module, record: Record) -> None:
    """Give the model its record and s2ft's hooks. This comes before anything changes."""
    replicate = nn.Module._replicate_for_data_parallel
    check_mentioned(replicate, "_is_replica", "torch", "copies that nn.DataParallel makes of a model")
    set_record(model, record)
    model._apply = partial(_apply_to_all, model)  # type: ignore[method-assign]
    _remove_hooks(model)
    _attached_models.add(model)
    _watch_optimizers()
    model.register_forward_pre_hook(before_forward, prepend=True)
    model.register_state_dict_post_hook(give_base_values)
    model.register_load_state_dict_pre_hook(check_is_base)
    model.register_load_state_dict_post_hook(after_load)


def remove_record_and_hooks(model: nn.Module) -> None:
    """Undo :func:`add_record_and_hooks`, whether all, some or none of it was done."""
    _remove_hooks(model)
    model.__dict__.pop("_apply", None)
    clear_record(model)


def _remove_hooks(model: nn.Module) -> None:
    """Remove the hooks of :func:`add_record_and_hooks`, if they are registered."""
    pre, post = model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks
    for hooks in (model._forward_pre_hooks, model._state_dict_hooks, pre, post):
        remove_hooks(hooks, before_forward, give_base_values, check_is_base, after_load)


def _apply_to_all(model: nn.Module, function: Callable[[Tensor], Tensor], *args: Any, **options: Any) -> nn.Module:
    """The model's _apply: casts and moves (to, half, cuda) also reach the recorded base, which is in no module."""
    type(model)._apply(model, function, *args, **options)
    record = record_of(model)
    for entry in record.written:
        entry.base = applied(function, entry.base)
    record.extra.apply(function)
    place_loaded(model, record, record.loaded)
    if record.mounts and any_on_meta(model, record.couplings):  # the weights have gone, and will arrive again
        record.awaits_weights = True
        _change_moves(record, lambda move: move.forget(model))
    return model
