"""attach, select, plan: make a model train its selected units, or say what it would train."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from s2ft.adapter.adapter import ON_TOP_OF
from s2ft.attached.active import apart_from_active, parameters_to_save, switch
from s2ft.attached.mounting import check_can_move, check_one_place, starting_from_base, trained_couplings
from s2ft.attached.proof import mount_proved
from s2ft.attached.record import (
    check_new_name,
    check_parallelism,
    check_sentence_model,
    check_unattached,
    find_record,
    new_record,
    on_unwrapped,
    unwrapped,
)
from s2ft.attached.report import Report
from s2ft.config import S2FTConfig
from s2ft.model.coupling import Coupling
from s2ft.model.discovery import Discovery
from s2ft.model.parts import couplings_in_towers
from s2ft.model.registry import find_couplings
from s2ft.ops._build import warn_without_cuda_kernels
from s2ft.selection import Selection, select as select_units, with_protect_ratio, with_units


def attach(
    model: nn.Module,
    config: S2FTConfig,
    name: str = "default",
    calibration: Iterable[Any] | None = None,
    *,
    couplings: Sequence[Coupling] | None = None,
    verify: bool | None = None,
    example: Any = None,
    protect: Iterable[Any] | None = None,
    on_top: bool = False,
) -> Report:
    """Make the selected units the only trainable weights of a model, in place.

    The slices start at zero, so the model computes what the base computes. All other parameters are frozen. In layout
    `permuted` the units of each coupling that can move are put in a common new order, which needs no permutation at run
    time (S²FT paper, section 3.2); in layout `indexed` nothing moves. Loaded adapters are switched off and stay loaded.
    A model can have one trainable adapter.

    With ``on_top=True`` the active adapters stay active, and the new one is trained on top of them, on units that none
    of them trains. Their values in the weights stay as they are, so every earlier state can be restored bit for bit by
    :func:`s2ft.set_adapter`. :func:`s2ft.freeze_adapter` makes a trained adapter one of them.

    Args:
        model: Any model of transformers, or any model with `couplings` or an `example`, without a trainable adapter.
            Its weights are floating-point, or for layout `indexed` quantized by bitsandbytes or torchao.
        config: What to train.
        name: Name of the new adapter.
        calibration: Batches for selections that need data, see :func:`select`.
        couplings: Couplings of a model of no known family; default: those that s2ft finds by trials on a small copy of
            it, see `s2ft couplings`. Their layers are nn.Linear, Conv1D of transformers,
            nn.Conv1d to nn.Conv3d with one group, or expert stacks; each layer is in one coupling. The adapter stores
            them, so that loading needs none.
        verify: Whether attach proves itself: it runs the plain model on `example` with random values written into the
            selected units, and the attached model with the same values in its slices. The outputs must be the same
            up to rounding, in evaluation and in training mode, and each slice must get a gradient. Default: where
            there is an example; the report tells what was not proved. True makes it an error that something can't be.
            False saves the time of a few forwards of some tokens, and loses the only check of the couplings on the
            model itself: a model whose code differs from what its family or the search expects would compute
            something else, silently.
        example: Input for `verify`, and for the search for couplings: a tensor, a tuple of arguments, or a dict of
            them. Couplings that it does not reach are an error. Default: made from the config of a transformers model.
        protect: Batches of data, as for `calibration`, whose text the base must not forget, see :func:`select`.
        on_top: Whether the active adapters stay active. A selection that reads weights or data then reads the model
            with them, and their units are added to the config's `exclude`. Nothing changes if none is active.

    Returns:
        A report of what is trained. It prints as a table.

    Raises:
        TypeError: `config` is not an S2FTConfig, or `verify` or `on_top` is not a bool.
        ValueError: Something can't be trained as asked, the name is taken, or an output changes by more than
            rounding. The model is unchanged.
        RuntimeError: Ranks of torch.distributed disagree on the selection or on the base model.

    Example:
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25))
        >>> print(report)
        projection        layers  units per layer     parameters  dtype
        mlp.down_proj          2  13 of 128 channels       1,664  float32
        self_attn.o_proj       2  1 of 4 heads             2,048  float32
        adapter 'default', layout permuted: 3,712 of 86,336 parameters are trained (4.30%)
    """
    for option, value in (("verify", verify), ("on_top", on_top)):
        if not (isinstance(value, bool) or value is None and option == "verify"):
            raise TypeError(f"{option} must be True or False, got {value!r}")
    check_sentence_model(model)  # needs the wrapper
    model = unwrapped(model)
    config = with_protect_ratio(with_units(config), protect is not None)  # the adapter stores what was used
    record = find_record(model)
    if record is not None and record.trainable is not None:
        raise ValueError(
            f"{record.trainable!r} is trainable, and one adapter can be: freeze_adapter, merge or detach first"
        )
    check_new_name(record, name)
    if record is None:  # finds the couplings, and reads the weights once, for the fingerprint
        record = new_record(model, couplings, example, config)
    elif couplings is not None and find_couplings(model, couplings, example, config).couplings != record.couplings:
        raise ValueError("couplings differ from those of the loaded adapters: leave the argument out")
    elif config.units is None and config.trains_inputs != any(one.key == "i" for one in record.projections.values()):
        raise ValueError("adapters of i_ratio and of other ratios do not go into one model")
    if any(parameter.is_cuda for parameter in model.parameters()):
        warn_without_cuda_kernels()
    parameters_to_save(model, record.couplings, config.modules_to_save)  # raises, before the calibration runs
    choosable = couplings_in_towers(model, record.couplings, config)
    below, selection = dict(record.active) if on_top else {}, None
    if below:  # metrics read the model with the adapters that are active, below the new one
        config = apart_from_active(record, config, choosable)
        selection = select_units(choosable, config, model, calibration, protect)
    with starting_from_base(model, record):
        if selection is None:  # metrics read the base
            selection = select_units(choosable, config, model, calibration, protect)
        mount_proved(model, record, config, selection, name, verify, example)
        if below:
            switch(model, record, {**below, name: 1.0})
            record.add_info({ON_TOP_OF: below})
    return Report.of(model)


@on_unwrapped
def select(
    model: nn.Module,
    config: S2FTConfig,
    calibration: Iterable[Any] | None = None,
    *,
    couplings: Sequence[Coupling] | None = None,
    example: Any = None,
    protect: Iterable[Any] | None = None,
) -> Selection:
    """Return the units that :func:`attach` would train. The model does not change.

    Args:
        model: Model without adapters.
        config: What to train.
        calibration: A DataLoader or any iterable of batches, which is read once. The selections `activation`,
            `product` and `gradient` need it. A batch of a transformers model is a dict of tensors (input_ids
            [sequences, tokens], attention_mask, labels; pixel_values; input_features and decoder_input_ids), or a
            tensor of the model's main input. A batch of another model is a tensor, a tuple or a dict of its forward's
            arguments. Labels are used for the gradient only: causal models use the tokens if there are none, and all
            other models need them.
        couplings: As for :func:`attach`.
        example: As for :func:`attach`. Nothing but the search for couplings uses it.
        protect: Batches of data, as for `calibration`, whose text the base must not forget. Of each projection's
            units, the share `protect_ratio` that the base needs most on these data is never chosen.

    Returns:
        The selection. It prints as a table, and has `save` and `load`.

    Raises:
        TypeError: `config` is not an S2FTConfig.
        ValueError: As for :func:`attach`.

    Example:
        >>> config = s2ft.S2FTConfig(d_ratio=0.1, selection="activation")
        >>> selection = s2ft.select(model, config, [input_ids])
        >>> selection["model.layers.0.mlp.down_proj"].shape
        torch.Size([13])
        >>> protected = s2ft.select(model, config, [input_ids], protect=[input_ids.flip(1)])
        >>> protected == selection
        False
    """
    return _chosen(model, config, calibration, couplings, example, protect)[1]


@on_unwrapped
def plan(
    model: nn.Module,
    config: S2FTConfig,
    calibration: Iterable[Any] | None = None,
    *,
    couplings: Sequence[Coupling] | None = None,
    example: Any = None,
    protect: Iterable[Any] | None = None,
) -> Report:
    """Return a report of what :func:`attach` would train. The model does not change.

    A selection that reads no weights (random, or units given by hand) can be planned on a model on the meta device.

    Args:
        model: Model without adapters.
        config: What to train.
        calibration: As for :func:`select`.
        couplings: As for :func:`attach`.
        example: As for :func:`attach`. Nothing but the search for couplings uses it.
        protect: As for :func:`select`.

    Returns:
        The report. It prints as a table.

    Raises:
        TypeError: `config` is not an S2FTConfig.
        ValueError: As for :func:`attach`.

    Example:
        >>> s2ft.plan(model, s2ft.S2FTConfig(d_ratio=0.1)).trainable
        1664
    """
    found, selection = _chosen(model, config, calibration, couplings, example, protect)
    if config.layout == "permuted":
        check_can_move(model, trained_couplings(found.couplings, selection))
    return Report.planned(model, found.couplings, config, selection, found.is_custom, found.weights)


def _chosen(
    model: nn.Module,
    config: S2FTConfig,
    calibration: Iterable[Any] | None,
    couplings: Sequence[Coupling] | None,
    example: Any,
    protect: Iterable[Any] | None,
) -> tuple[Discovery, Selection]:
    """Return the couplings of a model without adapters, and the units that the config selects."""
    config = with_units(config)
    check_unattached(model)
    check_parallelism(model)
    found = find_couplings(model, couplings, example, config)
    parameters_to_save(model, found.couplings, config.modules_to_save)  # raises for unknown modules
    choosable = couplings_in_towers(model, found.couplings, config)
    selection = select_units(choosable, config, model, calibration, protect)
    check_one_place(model, choosable, selection)
    return found, selection
