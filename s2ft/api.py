"""attach, detach, merge: turn a model into one that trains its selected units, and back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from s2ft.attached.active import put_on, take_off, write_trained
from s2ft.attached.extra import names_of_modules
from s2ft.attached.hosts.compiled import of_compiled
from s2ft.attached.mounting import (
    check_can_merge,
    check_not_sharded,
    claim,
    mount,
    release,
    remount,
    that_can_move,
    unmount,
)
from s2ft.attached.record import RECORD, Attachment, attachment_of
from s2ft.attached.report import Report
from s2ft.config import S2FTConfig
from s2ft.files.reading import check_adapter_name
from s2ft.model.coupling import Coupling
from s2ft.model.fingerprint import fingerprint
from s2ft.model.registry import couplings_of
from s2ft.model.verify import Trial
from s2ft.ops._build import warn_without_cuda_kernels
from s2ft.ops._lock import LOCK
from s2ft.selection import Selection
from s2ft.selection import select as select_units

# ---- attach ----------------------------------------------------------------------------------------


@of_compiled
def attach(
    model: nn.Module,
    config: S2FTConfig,
    name: str = "default",
    calibration=None,
    *,
    couplings: Sequence[Coupling] | None = None,
    verify: bool | None = None,
    example=None,
) -> Report:
    """Make the units that `config` selects the only trainable weights of `model`, in place.

    Everything is checked before a weight moves. The model computes what it did before: in layout
    ``permuted`` the coupled weights and biases are put in a common new order, in ``indexed`` nothing
    moves. All other parameters are frozen.

    A model of no known family is attached by its couplings, for instance a perceptron ``net`` with layers
    ``net.up`` and ``net.down`` of 64 hidden channels::

        mlp = Coupling("ffn", 0, (Projection("u", "net.up", 64, 1, 0),), Projection("d", "net.down", 64, 1, 1))
        attach(model, S2FTConfig(d_ratio=0.1), couplings=[mlp], example=torch.randn(2, 16))

    They are saved in the adapter, so that loading needs none.

    Adapters that are loaded come off and stay loaded; only one can be trainable.

    Args:
        model: a model of a known family or with `couplings`, no trainable adapter attached; floating-point weights, or for layout
            indexed quantized ones of bitsandbytes or torchao.
        config: what to train. name: of the new adapter.
        calibration: for selections that need data, see :func:`select`.
        couplings: given by hand, of nn.Linear, transformers' Conv1D, nn.Conv1d to Conv3d of one group, or experts
            stacked in one parameter; a module can be in one of them.
        verify: try the couplings out: put the units of each that can move in another order and run the model
            (in evaluation mode), then run it attached; an output that moves by more than rounding is an error
            that names the coupling. Default: where couplings are given by hand, or an example is.
        example: what to run it on: a tensor, a tuple of arguments or a dict of them. For models of transformers
            one is made from the config.
    Returns: a report that prints as a table of what is trained.
    Raises: ValueError, with the model as it was; TypeError for a config that is none; RuntimeError, where
    torch.distributed is initialized, on ranks that would train other units, or on another base, than the first.
    """
    if not isinstance(config, S2FTConfig):
        raise TypeError(f"config must be an S2FTConfig, got {type(config).__name__}")
    if verify not in (None, True, False):
        raise TypeError(f"verify must be True, False or None, got {verify!r}")
    check_adapter_name(name)
    record = _record_for(model, couplings, name)
    if any(parameter.is_cuda for parameter in model.parameters()):
        warn_without_cuda_kernels()
    names_of_modules(model, record.couplings, config.modules_to_save)  # before calibration, which takes its time
    verify = couplings is not None or example is not None if verify is None else verify
    with adapters_aside(model, record):
        selection = select_units(record.couplings, config, model, calibration)
        trial = _try_out(model, record, example) if verify else None
        mount(model, record, config, selection, name)
        if trial is not None:
            trial.check_unchanged()
    return Report.of(model)


def _record_for(model: nn.Module, couplings: Sequence[Coupling] | None, name: str) -> Attachment:
    """A new record, or that of a model with adapters loaded and none trainable."""
    record = model.__dict__.get(RECORD)
    if record is None:
        return new_attachment(model, couplings)
    if record.name is not None:
        _check_unattached(model)
    if couplings is not None and list(couplings) != record.couplings:
        raise ValueError("couplings are those that the loaded adapters came with: leave them out")
    if name in record.names:
        raise ValueError(f"there is an adapter called {name!r} already: give the new one another name")
    return record


@contextmanager
def adapters_aside(model: nn.Module, record: Attachment) -> Iterator[None]:
    """Inside, the model has its record and the base in its weights. Where what is done inside fails, the model is as it
    was before: the adapters that were loaded are there, and those that were active are so again."""
    others, active = dict(record.others), dict(record.active)
    try:
        claim(model, record)
        take_off(model, record)
        yield
    except BaseException:
        take_off(model, record)
        unmount(model, record)
        record.others = others
        if others:
            record.forget_mounts()
            model.requires_grad_(False)
            put_on(model, record, active, {name: others[name].deltas for name in active})
        else:
            release(model, record)
        raise


def _try_out(model: nn.Module, record: Attachment, example: Any) -> Trial:
    trial = Trial(model, record.couplings, record.moves, example)
    groups: dict[tuple, list[Coupling]] = {}  # experts of a layer are tried out together
    for coupling in that_can_move(model, record.couplings):
        one = coupling.consumer.name if coupling.consumer.expert is None else coupling.consumer.path
        groups.setdefault((coupling.layer, one), []).append(coupling)
    for group in groups.values():
        trial.check(group)
    return trial


@of_compiled
def select(
    model: nn.Module, config: S2FTConfig, calibration=None, *, couplings: Sequence[Coupling] | None = None
) -> Selection:
    """The units that :func:`attach` would train, without attaching anything: the model stays as it is.

    Args:
        calibration: for selections that need data (activation, product, gradient): a DataLoader or any iterable
            of batches, each a dict of tensors as a tokenizer or processor gives (input_ids [sequences, tokens],
            attention_mask, labels; pixel_values; input_features and decoder_input_ids) or a tensor of the model's
            main input; for a module that is not of transformers tensors, tuples or dicts of what its forward takes.
            It is read once. Labels are used for the gradient alone, for which causal models take the tokens
            themselves where there are none and all others need them.
        couplings: as for :func:`attach`.
    Returns: a selection; it prints as a table, and has save and load.
    Raises: as :func:`attach`.
    """
    return _chosen(model, config, calibration, couplings)[1]


@of_compiled
def plan(
    model: nn.Module, config: S2FTConfig, calibration=None, *, couplings: Sequence[Coupling] | None = None
) -> Report:
    """The report that :func:`attach` would return, without attaching anything; arguments as for :func:`select`.

    Selections that look at no weights (random, by hand) can be planned on a model on the meta device.
    """
    found, selection = _chosen(model, config, calibration, couplings)
    return Report.planned(model, found, config, selection)


def _chosen(model: nn.Module, config: S2FTConfig, calibration, given) -> tuple[list[Coupling], Selection]:
    if not isinstance(config, S2FTConfig):
        raise TypeError(f"config must be an S2FTConfig, got {type(config).__name__}")
    _check_unattached(model)
    couplings = couplings_of(model, given)
    names_of_modules(model, couplings, config.modules_to_save)  # an error for those that are unknown
    return couplings, select_units(couplings, config, model, calibration)


def _check_unattached(model: nn.Module) -> None:
    if RECORD in model.__dict__:
        raise ValueError(
            f"{type(model).__name__} has an S²FT adapter already "
            f"({', '.join(model.__dict__[RECORD].names)}): detach or merge it first"
        )


def new_attachment(model: nn.Module, given: Sequence[Coupling] | None = None) -> Attachment:
    """A record of the untouched model. given: couplings by hand. Raises: ValueError when there is one already."""
    _check_unattached(model)
    couplings = couplings_of(model, given)
    return Attachment(
        couplings,
        fingerprint(model, couplings),
        {key: parameter.requires_grad for key, parameter in model.named_parameters()},
        given=given is not None,
    )


# ---- back ------------------------------------------------------------------------------------------


@of_compiled
def detach(model: nn.Module) -> nn.Module:
    """Take every adapter off and give back the base model, bit for bit, as it was before attach.

    It does so also where an earlier call was interrupted.

    Raises: ValueError when the model is sharded; there ``set_adapter(model, None)`` gives the base.
    """
    record = attachment_of(model)
    check_not_sharded(model, "detach")
    with LOCK:
        try:
            _take_everything_off(model, record)
        except BaseException:  # an interrupt: a model in between would compute something else
            _take_everything_off(model, record)
            raise
    return model


def _take_everything_off(model: nn.Module, record: Attachment) -> None:
    if RECORD in model.__dict__:
        take_off(model, record)
        release(model, record)


@of_compiled
def merge(model: nn.Module) -> nn.Module:
    """Write the active adapter into the weights and give back the plain model, in original order.

    The weights are, bit for bit, those the adapter was trained with. Until the end the base is kept: where merging is
    interrupted, the adapter is there, and off.

    Raises: ValueError when no adapter is active, the base is quantized, or the model is sharded.
    """
    record = attachment_of(model)
    check_not_sharded(model, "merge")
    if not record.active:
        raise ValueError("no adapter is active, so there is nothing to merge: set_adapter first, or detach")
    if record.trains:
        check_can_merge(record)
    with LOCK:
        try:
            if record.trains:
                record.changing = True
                for mounted in record.mounts.values():
                    mounted.layer.unfuse()
                write_trained(model, record)
            return release(model, record)
        except BaseException:
            if RECORD in model.__dict__:
                take_off(model, record)
                remount(model, record)
            raise


@of_compiled
def fuse(model: nn.Module) -> None:
    """Write the active adapter into the weights until :func:`unfuse`: plain linears, for generation.

    Where s2 changes in between, the layers take that in at the next forward; a compiled model can't look, and needs
    another call of this.

    Raises: ValueError when the base is quantized or the model is sharded.
    """
    record = attachment_of(model)
    check_not_sharded(model, "fuse")
    if record.trains:
        check_can_merge(record)  # before any layer is fused
        with LOCK:
            try:
                for mounted in record.mounts.values():
                    mounted.layer.fuse()
            except BaseException:
                unfuse(model)
                raise


@of_compiled
def unfuse(model: nn.Module) -> None:
    """Copy the base back, bit for bit, so that training can go on."""
    with LOCK:
        for mounted in attachment_of(model).mounts.values():
            mounted.layer.unfuse()
