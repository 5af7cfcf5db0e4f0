"""Discovery from end to end: a twin and an example, proposals, trials, and what becomes of every weight."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.distributed import full_shape
from s2ft.model.discovery.attention import attention_blocks
from s2ft.model.discovery.examples import check_example, example_of, runnable_example
from s2ft.model.discovery.ffn import ffn_blocks
from s2ft.model.discovery.proposal import Block
from s2ft.model.discovery.report import Discovery
from s2ft.model.discovery.rest import Findings
from s2ft.model.discovery.settle import Outcome, settle
from s2ft.model.discovery.stacks import stack_blocks
from s2ft.model.discovery.structure import Structure
from s2ft.model.discovery.trial import Trial
from s2ft.model.discovery.twin import copied, twins_of

COPIED_WITH_EXAMPLE = 20_000_000  # parameters up to which a transformers model is tried on the user's own example
REMEMBERED = 8  # results that are kept, because plan, select and attach often follow each other
_FOUND: dict[tuple, Discovery] = {}
PROPOSERS = (attention_blocks, stack_blocks, ffn_blocks)


def discover(model: nn.Module, example: Any = None) -> Discovery:
    """Find the couplings of a model, by trials on a tiny twin of it. The model does not change.

    Args:
        model: Any model. Its weights are not read, so it may be on the meta device.
        example: Input for the model: a tensor, a tuple of arguments or a dict of them. A transformers model needs none.

    Returns:
        The couplings, and what becomes of every weight of the blocks. It prints as a table.

    Raises:
        ValueError: The model has no config and no example is given, no example runs, the output is random, or nothing
            in the model can be trained. The message says what was tried.
        TypeError: The example is of another type.
    """
    key = _key(model) if example is None else None
    if key not in _FOUND:
        found = search(model, trial_of(model, example))
        if key is None:
            return found
        if len(_FOUND) >= REMEMBERED:
            _FOUND.pop(next(iter(_FOUND)))
        _FOUND[key] = found
    found = _FOUND[key]
    return Discovery(list(found.couplings), list(found.weights))


def _key(model: nn.Module) -> tuple | None:
    """What decides the result of a search without an example: the classes and sizes of all modules, and the config."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return None
    modules = tuple((path, type(module)) for path, module in model.named_modules())
    sizes = tuple((path, tuple(full_shape(parameter))) for path, parameter in model.named_parameters())
    return modules, sizes, config.to_json_string()


def search(model: nn.Module, trial: Trial) -> Discovery:
    """Find the couplings of a model, by trials on a twin of it.

    Raises:
        ValueError: Nothing in the model can be trained.
    """
    structure = Structure(model, trial.called)
    findings = Findings(structure, trial)
    for propose in PROPOSERS:
        outcomes = _settled(trial, propose)
        structure.refused = trial.structure.refused
        for block in list(propose(structure)):
            outcome = outcomes.get(block.key) or Outcome(None, None, "the twin has no block like it")
            findings.add(block, outcome)
    findings.add_one_sided()
    found = findings.discovery()
    if not found.couplings:
        raise ValueError(f"{type(model).__name__}: s2ft finds nothing that it can train.\n{found}")
    return found


def _settled(trial: Trial, propose: Callable[[Structure], Iterator[Block]]) -> dict[str, Outcome]:
    """The outcomes of the twin's blocks by key. Layers of couplings are not proposed again, and those of others are."""
    structure, taken, outcomes = trial.structure, set(trial.structure.taken), {}
    while True:
        blocks: dict[str, list[Block]] = {}
        for block in propose(structure):
            blocks.setdefault(block.key, []).append(block)
        found = {key: settle(trial, alike) for key, alike in blocks.items() if key not in outcomes}
        outcomes |= found
        refused = {key for key, outcome in found.items() if outcome.status is None}
        if not refused:
            break
        structure.refused |= refused
        structure.taken = set(taken)
    for key, alike in blocks.items():
        for block in alike:
            for coupling in outcomes[key].couplings(block):
                structure.taken.update(projection.path for projection in coupling.projections)
    return outcomes


# ---- the twin and its input ------------------------------------------------------------------------------------


def trial_of(model: nn.Module, example: Any = None) -> Trial:
    """Make a twin of a model and find an input that it runs on.

    Raises:
        ValueError: See :func:`discover`.
        TypeError: The example is of another type.
    """
    check_example(example)
    own = not hasattr(getattr(model, "config", None), "to_dict")
    if own and example is None:
        raise ValueError(
            f"{type(model).__name__} is not a model of transformers, so s2ft can't make an input for it: pass example= "
            "(a tensor, a tuple of arguments or a dict of them), so that s2ft finds the couplings by trials; or "
            "describe them in couplings=[s2ft.Coupling.ffn(...), ...]"
        )
    size = sum(full_shape(parameter).numel() for parameter in model.parameters())
    if example is not None and (own or size <= COPIED_WITH_EXAMPLE):
        return _trial_on(model, example)
    tried: list[str] = []
    for twin in twins_of(model, tried):
        for make in (runnable_example, example_of):
            try:
                return Trial(twin, make(twin))
            except Exception as error:  # models refuse inputs in many ways
                tried.append(f"{type(error).__name__}: {error}")
    if example is not None:
        return _trial_on(model, example)
    raise ValueError(
        f"s2ft finds no couplings of {type(model).__name__}: no small copy of it runs. Tried: {'; '.join(tried)}. Pass "
        "an input as example=, or describe the couplings in couplings=[s2ft.Coupling.ffn(...), ...]"
    )


def _trial_on(model: nn.Module, example: Any) -> Trial:
    """Try out on a copy of the model in float64, because an input of the model may not fit a smaller one."""
    try:
        return Trial(copied(model), _in_float64(example))
    except Exception as error:  # models refuse inputs in many ways
        raise ValueError(
            f"example must be an input that {type(model).__name__} runs on. On a float64 copy of the model: "
            f"{type(error).__name__}: {error}"
        ) from error


def _in_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {name: _in_float64(one) for name, one in value.items()}
    return type(value)(map(_in_float64, value)) if isinstance(value, (tuple, list)) else value
