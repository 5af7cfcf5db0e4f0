"""The page of supported models, made from the models that the tests run."""

import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]

INTRODUCTION = """# Supported models

A model is supported if s2ft knows the couplings of its `model_type` (the entry of that name in its `config.json`). This
table is made from the {cases} small models that the tests run; a new family is in it as soon as it has tests.

- *Family*: the file in `s2ft/model/families`, or the function of `BY_FUNCTION` in its `decoders.py`, that lists the
  couplings.
- *Tests*: models of the types with *all* run in all tests. A type with *declaration* has the same modules as another
  type of its family. `tests/test_model_types.py` checks that the couplings are right for it: attach keeps the output,
  every layer of a block trains, merge keeps the trained output, and detach restores the weights.
- *Projections*: q, k, v and o are trained by attention heads; u (up), g (gate) and d (down) by FFN channels; l are
  other linear layers, by single inputs or outputs. Linear attention, state spaces and convolutions in place of
  attention have the letters of attention. A gate of an attention's output belongs to q.
- *move*: the layout `permuted` brings the selected units together, so that they are one slice of the weight.
  *stay*: the units are trained at their places, through an index, with either layout. Heads stay if several query
  heads share a key/value head (*grouped queries*), or if another module numbers them (*numbered*): a table of position
  biases, or norms for single heads. A layer that shares its units with no other one (*one-sided*) stays too. The
  results are the same.
- *LoRA*: `s2ft export --format lora` writes adapters that PEFT and vLLM load. Every model can be merged into a plain
  checkpoint.
- Bases that are quantized by bitsandbytes or torchao are tested with `llama`. Other families use the same layers;
  weights of experts that are stacked in one parameter are not quantized by these libraries.

A model that is not here can be trained too: [All model types](model-types.md) shows what s2ft finds in other models of
transformers. Describe your own with [couplings](reference/couplings.md), or let s2ft find them.

| model type | family | tests | tested configurations | projections | channels | heads | LoRA |
|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The page, in Markdown."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from support.aliases import ROWS

    torch.set_num_threads(1)
    by_type = makers()
    return INTRODUCTION.format(cases=sum(map(len, by_type.values()))) + "\n".join(
        row(model_type, couplings(by_type[model_type]), "declaration" if model_type in ROWS else "all")
        for model_type in sorted(by_type)
    ) + "\n"  # fmt: skip


def makers() -> dict[str, dict[str, Callable]]:
    """The functions that make the models of the table, by model type and case: those that all tests run, and those of
    types whose declaration is tested."""
    from support.aliases import GROUPED, ROWS, alias_of, missing
    from support.models import CASES, model_of

    found = defaultdict(dict)
    for case, config in CASES.items():
        found[config().model_type][case] = partial(model_of, case)
    for model_type in ROWS:
        if not missing(model_type):
            found[model_type][model_type] = partial(alias_of, model_type)
            if model_type in GROUPED:
                found[model_type][f"{model_type}-grouped"] = partial(alias_of, model_type, num_key_value_heads=2)
    return found


def couplings(cases: dict[str, Callable]) -> dict[str, list]:
    """The couplings of the models of these cases."""
    from s2ft.model.registry import couplings_of

    return {case: couplings_of(make()) for case, make in cases.items()}


def row(model_type: str, cases: dict[str, list], tests: str) -> str:
    """One line of the table.

    Args:
        model_type: The model type.
        cases: The couplings of its tested configurations, by case.
        tests: The tests that run it.
    """
    from s2ft.model.families.decoders import BY_FUNCTION
    from s2ft.model.registry import FAMILIES

    base, declare = min(cases, key=len), FAMILIES[model_type]
    found = {
        case: [each for coupling in couplings for each in coupling.projections] for case, couplings in cases.items()
    }
    keys = {projection.key for projections in found.values() for projection in projections}
    experts = any(projection.expert is not None for projections in found.values() for projection in projections)
    cells = [
        f"`{model_type}`",
        declare.__name__ if declare in BY_FUNCTION.values() else declare.__module__.rpartition(".")[2],
        tests,
        ", ".join(variant(case, base) for case in cases),
        " ".join(key for key in "qkvougdl" if key in keys),
        places(cases, "ugdl"),
        places(cases, "qkvo"),
        "not for experts" if experts else "yes",
    ]
    return f"| {' | '.join(cells)} |"


def variant(case: str, base: str) -> str:
    """The name of a configuration, without the family's."""
    return case.removeprefix(base).strip("-").replace("-", " ") or "default"


def places(cases: dict[str, list], keys: str) -> str:
    """Whether the units of projections move or stay, and when."""
    found = {place(coupling) for couplings in cases.values() for coupling in couplings if coupling.main.key in keys}
    return ", ".join(sorted(found))


def place(coupling) -> str:
    """Whether the units of a coupling move or stay."""
    if coupling.movable:
        return "move"
    if coupling.consumer is None or not coupling.producers:
        return "stay (one-sided)"
    return "stay (numbered)" if coupling.fixed else "stay (grouped queries)"
