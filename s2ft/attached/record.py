"""What s2ft knows about a model that it has changed. Only the files of this folder assign these fields."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from s2ft.adapter.adapter import Adapter
from s2ft.config import S2FTConfig, check_adapter_name, refuse
from s2ft.distributed import Decision, decide, full_shape, is_dtensor, is_spread, reshard_all, will_be_loaded_again
from s2ft.files.reading import is_patched
from s2ft.foreign import check_mentioned
from s2ft.layers import S2Layer
from s2ft.model.checkpoint import is_of_compressed_tensors
from s2ft.model.coupling import Coupling, Projection, projections_of
from s2ft.model.fingerprint import Structure, fingerprint
from s2ft.model.parts import outermost
from s2ft.model.registry import find_couplings
from s2ft.model.running import Snapshot
from s2ft.model.weights import Delta, Move, Positions, have_values, memory_of, weight_at
from s2ft.ops.in_place import check_distinct
from s2ft.selection import Selection

# ---- models in a wrapper ----------------------------------------------------------------------------------
#
# s2ft changes, saves and loads the model inside, so that an adapter has the paths of the model of transformers, and a
# plain one can load it too.

PACKAGE = "sentence_transformers"
Function = TypeVar("Function", bound=Callable[..., Any])


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile or sentence-transformers has wrapped. Any other model is returned unchanged.

    Raises:
        ValueError: A model of sentence-transformers has no model of transformers inside, or more than one.
    """
    model = uncompiled(model)
    return uncompiled(transformer_in(model)) if is_sentence_model(model) else model


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile has wrapped. Any other model is returned unchanged."""
    while "_orig_mod" in {**vars(model), **vars(model).get("_modules", {})}:  # accelerate keeps it as an attribute
        model = cast(nn.Module, model._orig_mod)
    return model


def on_unwrapped(function: Function) -> Function:
    """Decorator: pass the model inside a wrapper of torch.compile or sentence-transformers to the function.

    The compiled model notices replaced layers and is compiled again at its next call.
    """

    @wraps(function)
    def call(model: nn.Module, *args, **options):
        return function(unwrapped(model), *args, **options)

    return cast(Function, call)


# ---- sentence-transformers -------------------------------------------------------------------------------


def is_sentence_model(model: nn.Module) -> bool:
    """Whether this is a SentenceTransformer, SparseEncoder or CrossEncoder. The package is not imported for it."""
    return isinstance(model, nn.Sequential) and any(
        parent.__module__.partition(".")[0] == PACKAGE for parent in type(model).__mro__
    )


def transformer_in(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside a model of sentence-transformers.

    Raises:
        ValueError: There is none, or more than one.
    """
    from transformers import PreTrainedModel  # not at the top, where it would load transformers with every import

    found = outermost(model, lambda module: isinstance(module, PreTrainedModel))
    if len(found) == 1:
        return next(iter(found.values()))
    kinds = ", ".join(type(module).__name__ for module in model.children())
    raise ValueError(
        f"{type(model).__name__} must have one model of transformers inside, and it has "
        + (f"{len(found)}, at {', '.join(found)}: pass one of these modules" if found else f"none (modules: {kinds})")
    )


def check_sentence_model(model: nn.Module) -> None:
    """Check that a model of sentence-transformers trains nothing outside of its model of transformers.

    Any other model passes.

    Raises:
        ValueError: A parameter outside would be trained, and an adapter can't contain it.
    """
    model = uncompiled(model)
    if not is_sentence_model(model):
        return
    inside = {id(parameter) for parameter in transformer_in(model).parameters()}
    trained = [key for key, value in model.named_parameters() if value.requires_grad and id(value) not in inside]
    if trained:
        raise ValueError(
            f"{type(model).__name__} would also train {', '.join(trained[:3])}, and an adapter contains weights of the "
            f"model of transformers only: freeze the module by model[{trained[0].partition('.')[0]}]"
            ".requires_grad_(False), or, to train it too, attach to model.transformers_model and save the whole model "
            "after s2ft.merge"
        )


# ---- what is recorded -----------------------------------------------------------------------------------------------

_ATTRIBUTE = "_s2ft"  # the attribute of a model that holds its Record; no other file knows it


@dataclass
class Part:
    """The share of one projection in a layer's s2.

    Attributes:
        projection: Projection whose units are trained.
        positions: Positions in s2 along its sliced dimension, [n] int64; before the layer is made, in the weight.
        elements: Rows or columns of the base's weight that these positions train, shape [n], int64, ascending.
    """

    projection: Projection
    positions: Tensor
    elements: Tensor


@dataclass
class Mount:
    """One trainable layer and the module or parameter that it replaces.

    Attributes:
        original: The replaced module, without its weight and bias; None if a parameter was replaced.
        layer: The trainable layer.
        parts: One part for each projection that is trained in this weight.
        position: Position of a replaced parameter among the parameters of its module.
    """

    original: nn.Module | None
    layer: S2Layer
    parts: list[Part]
    position: int | None = None


@dataclass
class Written:
    """A slice of a weight that active adapters have overwritten. It is recorded before the weight is written.

    Attributes:
        projection: Projection whose weight was written.
        delta: What was written. Its index says which rows or columns were overwritten.
        base: Values that the weight had there before.
        index: The overwritten rows or columns in this rank's shard, [n] int64, as numbers within it; None if the
            weight was whole.
    """

    projection: Projection
    delta: Delta
    base: Tensor
    index: Tensor | None


@dataclass
class ExtraWeights:
    """Values of extra weights that a record keeps, by the parameter's name in the model.

    Attributes:
        base: Values before the trainable adapter's training.
        trained: Trained values while the parameters hold the base; empty while the parameters hold the trained values.
        overwritten: Base values of the parameters that active loaded adapters have overwritten.
        arriving: Trained values that are written when the weights of the model have arrived.
    """

    base: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, Tensor] = field(default_factory=dict)
    overwritten: dict[str, Tensor] = field(default_factory=dict)
    arriving: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Cast or move the kept values as the model's parameters are; they never go to the meta device."""
        function = partial(applied, function)
        for values in (self.base, self.overwritten, self.trained):
            values.update({name: function(value) for name, value in values.items()})


def applied(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Cast or move a value that a record keeps. The meta device would lose it, so it stays where it is then."""
    moved = function(value)
    return value if moved.is_meta else moved


@dataclass
class Record:
    """Everything s2ft knows about a model it has changed.

    Attributes:
        couplings: Couplings of the model.
        fingerprint: Hashes of the base's coupled weights, by layer; None while no rank has the weights.
        required_grad: requires_grad of every parameter before s2ft changed the model, by name.
        fingerprint_decision: The decision that found the fingerprint. It tells whether another rank waits for weights.
        is_custom: Whether adapters store the couplings, because the model type alone does not say them.
        weight_rows: Rows of discovery about each weight of the blocks, for the report; empty for all other couplings.
        trainable: Name of the trainable adapter; None if there is none.
        config: Config of the trainable adapter.
        selection: Units of the trainable adapter.
        structure: Where its slices lie.
        info: JSON values that are saved with the trainable adapter.
        moves: Reorderings of couplings, done or about to be done.
        move_of: The move of each projection that one reorders, by the projection's name.
        mounts: Trainable layers by path.
        forwards: Forwards that s2ft has given to modules, by the module's path.
        repacking_stopped: Layers that were told not to repack their weights.
        extra: Values of extra weights.
        loaded: Adapters that are not trainable, by name.
        active: Factors of the active adapters by name. It is cleared before the weights get the base back, and assigned
            before the slices are written, because `write_changed_layers` asks for it.
        written: Slices of weights that active adapters have overwritten.
        replaced_attributes: Attributes of the model that others had set before s2ft replaced them; None if it has not.
        awaits_weights: Whether this rank's weights are loaded only after sharding (meta device), see the top of
            hooks.py.
        none_awaited: Whether no rank waits for weights any more.
        change_unfinished: Whether a change of the active adapters is under way or was interrupted.
        snapshot: What a forward of a proof may have changed; None if no proof runs, as `before_forward` asks.
        unproved: What the proof of the trainable adapter could not prove, in words.
    """

    couplings: list[Coupling]
    fingerprint: dict[str, Any] | None
    required_grad: dict[str, bool]
    fingerprint_decision: Decision = Decision(None, "")
    is_custom: bool = False
    weight_rows: tuple[Any, ...] = ()
    trainable: str | None = None
    config: S2FTConfig | None = None
    selection: Selection | None = None
    structure: Structure | None = None
    info: dict[str, Any] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    move_of: dict[str, Move] = field(default_factory=dict)
    mounts: dict[str, Mount] = field(default_factory=dict)
    forwards: dict[str, Callable] = field(default_factory=dict)
    repacking_stopped: list[nn.Module] = field(default_factory=list)
    extra: ExtraWeights = field(default_factory=ExtraWeights)
    loaded: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    written: list[Written] = field(default_factory=list)
    replaced_attributes: dict[str, Any] | None = None
    awaits_weights: bool = False
    none_awaited: bool = False
    change_unfinished: bool = False
    snapshot: Snapshot | None = None
    unproved: str = ""

    # ---- what is there ---------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """Whether the trainable adapter is active with weight 1, so that it gets gradients.

        It is computed and not stored: an interrupt between the change of a layer and the assignment of a stored value
        would leave a wrong one.
        """
        return self.trainable is not None and self.active.get(self.trainable) == 1

    @property
    def names(self) -> list[str]:
        """Names of all adapters, the trainable one first."""
        return ([] if self.trainable is None else [self.trainable]) + list(self.loaded)

    @property
    def default_name(self) -> str:
        """The adapter that is saved where no name is given: the trainable one, else an active one, else the first."""
        return self.trainable if self.trainable is not None else next(iter(self.active), self.names[0])

    @property
    def custom_couplings(self) -> list[Coupling] | None:
        """The couplings that adapters store; None where the model type says them."""
        return [replace(one, block=None, activation=None) for one in self.couplings] if self.is_custom else None

    @cached_property
    def projections(self) -> dict[str, Projection]:
        """All projections of the couplings, by name."""
        return {projection.name: projection for projection in projections_of(self.couplings)}

    @property
    def slices(self) -> dict[str, Tensor]:
        """Every s2, by its name in the model."""
        return {f"{path}.s2": mount.layer.s2 for path, mount in self.mounts.items()}

    @property
    def parts(self) -> dict[str, tuple[Mount, Part]]:
        """Every trained part and its mount, by the projection's name."""
        return {part.projection.name: (mount, part) for mount in self.mounts.values() for part in mount.parts}

    def current_positions(self, projection: Projection, index: Tensor) -> Tensor:
        """Return where rows or columns of the base are in the weight now. index: shape [n], int64, in base order."""
        move = self._done_move_of(projection)
        return index if move is None else move.places(projection)[index]

    def _done_move_of(self, projection: Projection) -> Move | None:
        move = self.move_of.get(projection.name)
        return move if move is not None and move.is_done else None

    def positions_of(self, projection: Projection, delta: Delta, device: torch.device) -> Tensor:
        """Return where the elements of a delta are in the whole weight now, shape [n], int64, on a device.

        They are sent to the device once, and kept with the delta. Later calls do not wait for the device.

        Args:
            projection: Projection of the delta.
            delta: The delta.
            device: Device of the weight.
        """
        move, kept = self._done_move_of(projection), delta.positions
        if kept is None or kept.move is not move:
            kept = Positions(move, self.current_positions(projection, delta.index.cpu()))
        if kept is not delta.positions or kept.index.device != device:
            # on the meta device they would be lost
            kept = delta.positions = kept._replace(index=kept.index if device.type == "meta" else kept.index.to(device))
        return kept.index

    # ---- changes of the record alone -------------------------------------------------------------

    def drop(self, name: str) -> None:
        """Remove a loaded adapter, which must not be active; nothing happens if none has this name."""
        self.loaded = {key: adapter for key, adapter in self.loaded.items() if key != name}

    def add_info(self, info: dict[str, Any]) -> None:
        """Add values to the info of the trainable adapter."""
        self.info = {**self.info, **info}

    def rename(self, name: str, new: str) -> None:
        """Rename an adapter. After an interrupt it has its old name everywhere, or its new one everywhere."""
        loaded = {new if key == name else key: adapter for key, adapter in self.loaded.items()}
        active = {new if key == name else key: weight for key, weight in self.active.items()}
        if new in loaded:
            loaded[new] = replace(loaded[new], name=new)
        # one step, so that no interrupt comes between
        self.__dict__.update(trainable=new if name == self.trainable else self.trainable, loaded=loaded, active=active)

    def forget_trainable(self) -> None:
        """Reset the fields of the trainable adapter. Call it after :func:`s2ft.attached.mounting.unmount_layers`."""
        self.trainable = self.config = self.selection = self.structure = self.replaced_attributes = None
        self.extra, self.info, self.awaits_weights = ExtraWeights(), {}, False
        self.snapshot, self.unproved = None, ""
        for collection in (self.moves, self.move_of, self.mounts, self.forwards, self.repacking_stopped):
            collection.clear()


# ---- the record of a model -----------------------------------------------------------------------------


def find_record(model: nn.Module) -> Record | None:
    """Return the model's record, or None for a model that s2ft has not changed."""
    return model.__dict__.get(_ATTRIBUTE)


def record_of(model: nn.Module) -> Record:
    """Return the model's record.

    Raises:
        ValueError: The model has no adapter. The message names the module inside that has one.
    """
    record = find_record(model)
    if record is None:
        inside = next((path for path, module in model.named_modules() if find_record(module) is not None), None)
        raise ValueError(
            f"{type(model).__name__} has no S²FT adapter: "
            + (
                "call s2ft.attach or s2ft.load_adapter first"
                if inside is None
                else f"it wraps the model that has one: pass model.{inside}, or accelerator.unwrap_model(model)"
            )
        )
    return record


def set_record(model: nn.Module, record: Record) -> None:
    """Give the model its record."""
    setattr(model, _ATTRIBUTE, record)


def clear_record(model: nn.Module) -> None:
    """Remove the model's record, if it has one."""
    model.__dict__.pop(_ATTRIBUTE, None)


def check_unattached(model: nn.Module) -> None:
    """Raises: ValueError: The model has an adapter already."""
    record = find_record(model)
    if record is not None:
        raise ValueError(
            f"{type(model).__name__} has an S²FT adapter already ({', '.join(record.names)}): detach or merge it first"
        )


def new_record(
    model: nn.Module, couplings: Sequence[Coupling] | None = None, example: Any = None, config: S2FTConfig | None = None
) -> Record:
    """Make a record of a model without adapters; the model does not get it yet.

    Args:
        model: Model without adapters.
        couplings: Couplings that the user gave. Default: those of the model's family, or else those that trials find.
        example: Input for the trials.
        config: What will be trained, see :func:`find_couplings`.

    Raises:
        ValueError: The model has adapters, or is cut into pipeline stages, or is in inference mode, or has packed
            weights, or is a GGUF file with an adapter in place, or no couplings were given and none can be found.
    """
    if torch.is_inference_mode_enabled() or any(one.is_inference() for one in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} was loaded, or is used here, in torch.inference_mode(), whose tensors can't be "
            "changed in place: load it outside, or under torch.no_grad()"
        )
    packed: Any = filter(is_of_compressed_tensors, model.modules())
    if any(getattr(one, "weight", None) is None or one.weight.element_size() == 1 for one in packed):
        raise ValueError(
            f"the weights of {type(model).__name__} are packed by compressed-tensors: load the model with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    base = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    if base.endswith(".gguf") and is_patched(base):  # in another dtype than float32 a fingerprint may not tell
        raise ValueError(f"{base} has an adapter in place: s2ft patch {base} --undo first")
    check_unattached(model)
    if couplings is None:  # who names the layers may have any others in the model
        check_without_peft(model)
    check_parallelism(model)
    check_not_offloaded(model)
    found = find_couplings(model, couplings, example, config)
    reshard_all(model)
    decision = decide("the base", have_values(model, found.couplings), lambda: fingerprint(model, found.couplings))
    return Record(
        found.couplings,
        decision.value,
        {key: parameter.requires_grad for key, parameter in model.named_parameters()},
        is_custom=found.is_custom,
        weight_rows=found.weights,
        fingerprint_decision=decision,
    )


# ---- what is refused -----------------------------------------------------------------------------------

WITHOUT = "load the model without tensor parallelism, attach, and shard it by FSDP2 or ZeRO"


def check_without_peft(model: nn.Module) -> None:
    """Raises: ValueError: PEFT has wrapped the model, or layers of it."""
    wrapped = (path for path, module in model.named_modules() if type(module).__module__.partition(".")[0] == "peft")
    path = next(wrapped, None)
    if path is None:
        return
    what = f"{type(model).__name__} is a model of PEFT" if path == "" else f"PEFT has wrapped {path}"
    raise ValueError(
        f"{what}, and s2ft changes and reads plain models: pass model.unload() (the base), or model.merge_and_unload() "
        "(the base with what PEFT trained). To train S²FT as a method of PEFT, import s2ft.peft"
    )


def check_parallelism(model: nn.Module) -> None:
    """Raise ValueError for a model that is cut into pipeline stages, or split in a way that s2ft can't read."""
    for path, module in model.named_modules():
        if "_pp_stage" in module.__dict__ or "pippy_stage" in module.__dict__:
            raise ValueError(
                f"{path or type(model).__name__} is cut into pipeline stages. The stages of transformers (pp_size) and "
                "of accelerate (prepare_pippy) run forwards only and pass no gradient, so nothing can be trained: load "
                "the model without stages, and use FSDP2, ZeRO-3 or tensor parallelism for a model that does not fit "
                "on one device"
            )
        size = module.__dict__.get("_tp_size") or 1
        if size > 1 and not any(map(is_dtensor, module.parameters())):
            raise ValueError(
                f"{path or type(model).__name__} is split over {size} ranks by tensor parallelism, in tensors that do "
                "not say of which weight they are a part. This release of transformers makes no DTensors: update "
                f"transformers, or {WITHOUT}"
            )


def check_not_offloaded(model: nn.Module) -> None:
    """Raise ValueError if hooks of accelerate bring weights of the model from other memory or a disk."""
    hooks = sys.modules.get("accelerate.hooks")  # without it no model has its hooks
    if hooks is not None:
        purpose = "weights that accelerate keeps elsewhere"
        check_mentioned(hooks.add_hook_to_module, "_hf_hook", "accelerate", purpose)
        check_mentioned(hooks.AlignDevicesHook.__init__, "offload", "accelerate", purpose)
        check_mentioned(hooks.SequentialHook.__init__, "hooks", "accelerate", purpose)
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
            raise ValueError(
                f"accelerate keeps the weights of {path or type(model).__name__} elsewhere (cpu_offload, disk_offload, "
                "or a device_map with cpu or disk) and brings them for each forward, so s2ft can't change them: load "
                "the model onto devices that hold it whole, or quantized, or call "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
            )


def check_slices_are_here(record: Record, *, in_weights: bool = False) -> None:
    """Raise ValueError if the slices can't be read yet, or with `in_weights` if they can't be written into weights."""
    missing = record.fingerprint is None or any(mount.layer.s2.is_meta for mount in record.mounts.values())
    if missing or in_weights and record.awaits_weights:
        raise ValueError(
            "the weights of this model have not arrived on this rank (it is on the meta device): prepare the model "
            "with accelerate, or load its weights, before you read, save or switch its adapters"
        )


# ---- an adapter and a model ----------------------------------------------------------------------------------------


def check_fits(adapter: Adapter, model: nn.Module, record: Record) -> None:
    """Raise ValueError, naming what does not fit, if `adapter` was not trained on this model."""
    known = record.projections
    for path, delta in adapter.deltas.items():
        if path not in known:
            raise ValueError(f"adapter {adapter.name!r} is for another model: this one has no projection {path}")
        shape = list(weight_at(model, known[path]).shape)
        size, shape[known[path].dim] = shape[known[path].dim], delta.index.numel()
        if delta.dim != known[path].dim or shape != list(delta.values.shape):
            raise ValueError(
                f"adapter {adapter.name!r} is for another model: {path}.delta has shape "
                f"{tuple(delta.values.shape)} for dim {delta.dim}, this model needs dim {known[path].dim} and shape "
                f"{tuple(shape)}"
            )
        check_distinct(f"adapter {adapter.name!r}", delta.index, size, f"{path}.index")
    # without a fingerprint the weights are compared when they arrive
    if record.fingerprint is not None:
        adapter.check_base(record.fingerprint)
    check_extra_fits(model, record, adapter.name, adapter.extra_weights)
    for path, delta in adapter.deltas.items():
        projection, units = known[path], adapter.selection.units[path]
        last = int(units.max())
        refuse(
            (
                last >= projection.count,  # in a weight of several projections, the element may belong to another one
                f"adapter {adapter.name!r}: {path} has units 0..{projection.count - 1}; there is no unit {last}",
            ),
            (
                not torch.equal(projection.elements(units), delta.index),
                f"adapter {adapter.name!r}: {path}.index does not name the selected units, each of {projection.unit} "
                "elements",
            ),
        )


def check_extra_fits(model: nn.Module, record: Record, adapter: str, values: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a weight that the model doesn't have, that has another shape, or that is of a coupling."""
    if not values:
        return
    parameters, coupled = dict(model.named_parameters()), coupled_names(record.couplings)
    for name, value in values.items():
        if name not in parameters or name in coupled or name.endswith(".s2"):
            raise ValueError(
                f"adapter {adapter!r} is for another model: this one has no weight {name} outside its couplings"
            )
        shape = full_shape(parameters[name])
        if value.shape != shape or not parameters[name].is_floating_point():
            raise ValueError(
                f"adapter {adapter!r} is for another model: {name} has shape {tuple(value.shape)}, this "
                f"model has {tuple(shape)} of {parameters[name].dtype}"
            )


def coupled_names(couplings: list[Coupling]) -> set[str]:
    """Return the names that the couplings' weights, biases and vectors have, with trainable layers mounted or not."""
    ends = ("", ".weight", ".bias", ".linear.weight", ".linear.bias")
    return {projection.path + end for projection in projections_of(couplings) for end in ends} | {
        vector.path for coupling in couplings for vector in coupling.vectors
    }


def check_plain_and_untied(model: nn.Module, record: Record, names: Iterable[str]) -> None:
    """Raise ValueError if a weight of these projections is quantized, or tied to another one of theirs."""
    paths: dict[int, str] = {}
    for name in names:
        handle = weight_at(model, record.projections[name])
        path, other = handle.path, paths.setdefault(memory_of(handle.tensor), handle.path)
        refuse(
            (handle.read_only, f"{path} is quantized: {handle.read_only}"),
            (
                other != path,  # their updates differ, so that none of them could be kept
                f"{other} and {path} are one tied weight, and an adapter that trains each by itself can't be written "
                "into it: train one of them only, by couplings= or by the config's layers",
            ),
        )


def check_weights_are_here(model: nn.Module, record: Record) -> None:
    """Raise ValueError if the weights are not here yet, so that an adapter would be written into nothing."""
    weights = [weight_at(model, projection).tensor for projection in record.projections.values()]
    if any(weight.is_meta for weight in weights) or (
        will_be_loaded_again() and not any(is_spread(weight) for weight in weights)
    ):
        raise ValueError(
            "the weights have not arrived on every rank, so an adapter can't be written into them: load it with "
            "trainable=True or active=False, and make it active when the model has been prepared and its weights loaded"
        )


# ---- names ---------------------------------------------------------------------------------------------


def check_new_name(record: Record | None, name: str) -> None:
    """Check the name of an adapter that is made, loaded or renamed.

    Args:
        record: Record of the model; None if it has no adapters.
        name: Name that the adapter would get.

    Raises:
        ValueError: The name could not be saved, or another adapter of the model has it.
    """
    check_adapter_name(name)
    if record is not None and name in record.names:
        raise ValueError(f"there is an adapter called {name!r} already: choose another name")


def check_known(record: Record, name: str) -> None:
    """Raise ValueError if the model has no adapter of this name."""
    if name not in record.names:
        raise ValueError(f"no adapter is called {name!r}; there are {', '.join(record.names) or 'none'}")
