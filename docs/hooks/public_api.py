"""The public names of s2ft, grouped as in the reference, and what is missing in their docstrings.

``python docs/hooks/public_api.py`` prints how many public names are documented in full, and what the others lack. The
test tests/test_public.py and ``make docs`` require all of them.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe
from field_docs import field_texts

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Group:
    """One page of the reference.

    Attributes:
        page: File name of the page, without its ending.
        title: Heading of the page.
        text: One sentence below the heading.
        names: Public names, as they are imported.
    """

    page: str
    title: str
    text: str
    names: tuple[str, ...]


def _of(module: str, names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names.split())


GROUPS = (
    Group("attach", "Attach and merge", "Make a model trainable by S²FT, and make a plain model of it again.",
          _of("s2ft", "attach plan suggested_rate detach merge save_merged weights_on_disk "
              "print_trainable_parameters")),
    Group("config", "Configuration", "One dataclass holds the options of an adapter. Each field is also an option of "
          "`s2ft sft`.", _of("s2ft", "S2FTConfig")),
    Group("adapters", "Adapters", "Save and load adapters, switch between them, combine them, and give them to other "
          "programs.",
          _of("s2ft", "save_adapter load_adapter read_adapter set_adapter disable_adapters list_adapters get_adapter "
              "rename_adapter delete_adapter freeze_adapter combine_adapters set_rounding status Adapter AdapterBank "
              "export_lora import_lora push_to_hub")),
    Group("selection", "Selection", "Choose the units that are trained.", _of("s2ft", "select Selection")),
    Group("couplings", "Couplings", "Describe a model that s2ft does not know.",
          _of("s2ft", "Coupling register_architecture")),
    Group("layers", "Layers", "The trainable layers of the paper's reference code.",
          _of("s2ft", "S2RowLinear S2ColumnLinear")),
    Group("ops", "Operators", "The operators of `s2ft.ops`. Each runs in PyTorch, and in a compiled kernel if there is "
          "one for the device.",
          _of("s2ft.ops", "sliced_linear indexed_linear multi_adapter_linear pack_adapters act_mul effective_units "
              "permute_ swap_ scatter_add_ write_slices_ Slice") + _of("s2ft", "build_info")),
    Group("estimation", "Estimation", "Find out how much memory a training run takes before it starts.",
          _of("s2ft", "estimate Estimate Strategy")),
    Group("peft", "PEFT", "S²FT as a method of PEFT. `import s2ft.peft` registers it.",
          _of("s2ft.peft", "S2FTPeftConfig S2FTPeftModel S2FTPeftLayer to_native from_native")),
    Group("data", "Data and prompts", "Read rows of any form, choose the prompt, and convert rows to tokens.",
          _of("s2ft.text.data", "DataOptions load_rows load_split")
          + _of("s2ft.text.prompts", "PromptFormat prompt_format prompt_for_rows encode_prompt")
          + _of("s2ft.text.encoding", "tokenize_rows Tokenized")),
    Group("training", "Training", "Train with transformers and TRL.",
          _of("s2ft.train.trainer", "S2FTTrainer AdapterCheckpoints") + _of("s2ft.train.arguments", "SFTArguments")
          + _of("s2ft.train.options", "ModelOptions RunOptions ForgettingOptions")),
    Group("forgetting", "Forgetting", "Measure how far a model has moved from its base, and stop in time.",
          _of("s2ft.train.forgetting", "ForgettingMeter")
          + _of("s2ft.text.divergence", "mean_loss BaseDistributions base_switch")
          + _of("s2ft.text.divergence", "DriftMeter prompt_rows")),
    Group("sync", "Slice sync", "Send what is trained to vLLM, which generates the answers of reinforcement learning.",
          _of("s2ft.sync.trl_trainers", "with_slices") + _of("s2ft.sync.sender", "SliceSender Sent")
          + _of("s2ft.sync.slices", "TrainedSlices") + _of("s2ft.sync.sender", "EngineError")),
    Group("serving", "Serving", "Serve a base model and its adapters over HTTP.",
          _of("s2ft.serve.server", "serve build_app") + _of("s2ft.serve.server_options", "ServerOptions")),
)  # fmt: skip


@lru_cache(1)
def package() -> griffe.Module:
    """The package s2ft, read by griffe without importing it."""
    return griffe.load("s2ft", search_paths=[str(ROOT)], docstring_parser="google")


def public_names() -> list[str]:
    """Every public name: those of ``s2ft.__all__``, ``s2ft.ops`` and ``s2ft.peft``, and the ones in GROUPS."""
    found = [f"s2ft.{name}" for name in import_module("s2ft").__all__ if name not in ("__version__", "ops")]
    for module in ("ops", "peft"):
        found += [f"s2ft.{module}.{name}" for name in package()[module].exports]
    return list(dict.fromkeys([*found, *(name for group in GROUPS for name in group.names)]))


def target(name: str) -> griffe.Object:
    """The object that a public name stands for.

    Raises:
        KeyError: There is no such name.
    """
    found = package()[name.removeprefix("s2ft.")]
    if found.is_module:  # an operator has the name of its module
        found = found[found.name]
    return found.final_target if found.is_alias else found


def ungrouped() -> list[str]:
    """Public names that no page of the reference has."""
    grouped = {target(name).path for group in GROUPS for name in group.names}
    return [name for name in public_names() if target(name).path not in grouped]


# ---- what a docstring lacks -------------------------------------------------------------------------------


def lacks(name: str) -> list[str]:
    """What is missing in the docstrings of a public name and of its public methods; empty if nothing is."""
    found = target(name)
    if found.is_class:
        return list(_lacks_of_class(found, name))
    return list(_lacks_of_function(found, name, example=True))


def _lacks_of_class(found: griffe.Class, name: str) -> Iterator[str]:
    text = text_of(found)
    if not text:
        yield f"{name}: no docstring"
    elif ">>>" not in text:
        yield f"{name}: no example"
    explained = _named(found, "parameters") | _named(found, "attributes")
    init = found.all_members.get("__init__")  # that of a base class of this package too
    if init is not None and init.docstring:
        explained |= _named(init, "parameters")
    explained |= {key for key, member in found.members.items() if member.is_attribute and member.docstring}
    explained |= set(field_texts(found))
    for parameter in _parameters(found.parameters):
        if parameter not in explained:
            yield f"{name}: no description of {parameter}"
    for key, member in found.members.items():
        if key.startswith("_") or member.is_alias or _overrides(found, key):
            continue
        if member.is_function:
            yield from _lacks_of_function(member, f"{name}.{key}", example=False)
        elif "property" in member.labels and not text_of(member):
            yield f"{name}.{key}: no docstring"


def _lacks_of_function(found: griffe.Function, name: str, example: bool) -> Iterator[str]:
    text = text_of(found)
    if not text:
        yield f"{name}: no docstring"
        return
    if example and ">>>" not in text:
        yield f"{name}: no example"
    explained, parameters = _named(found, "parameters"), _parameters(found.parameters)
    every = [parameter.name.lstrip("*") for parameter in found.parameters]
    yield from (f"{name}: no description of {key}" for key in parameters if key not in explained)
    yield from (f"{name}: no type of {key}" for key in parameters if found.parameters[key].annotation is None)
    yield from (f"{name}: describes {key}, which is no parameter" for key in explained if key not in every)
    if str(found.returns or "None") not in ("None", "NoReturn") and not _has(found, "returns", "yields"):
        yield f"{name}: no Returns"
    raised = _named(found, "raises")
    yield from (f"{name}: no Raises for {error}" for error in sorted(_raises(found) - raised))


def text_of(found: griffe.Object) -> str:
    """The docstring of an object; empty if there is none."""
    return found.docstring.value.strip() if found.docstring else ""


def _sections(found: griffe.Object) -> list[griffe.DocstringSection]:
    return found.docstring.parse("google", warnings=False) if found.docstring else []


def _has(found: griffe.Object, *kinds: str) -> bool:
    return any(section.kind.value in kinds for section in _sections(found))


def _named(found: griffe.Object, kind: str) -> set[str]:
    """Names with a description in a section of a docstring."""
    entries = [entry for section in _sections(found) if section.kind.value in (kind, f"other {kind}")
               for entry in section.value]  # fmt: skip
    return {str(entry.annotation if kind == "raises" else entry.name).lstrip("*") for entry in entries
            if entry.description}  # fmt: skip


def _parameters(parameters: griffe.Parameters) -> list[str]:
    """Names of the parameters that a docstring must describe: all but self, private ones, and *args and **kwargs."""
    variadic = (griffe.ParameterKind.var_positional, griffe.ParameterKind.var_keyword)
    return [parameter.name for parameter in parameters if parameter.name not in ("self", "cls")
            and not parameter.name.startswith("_") and parameter.kind not in variadic]  # fmt: skip


def _raises(found: griffe.Function) -> set[str]:
    """Names of the errors that a function itself raises."""
    tree = ast.parse(_dedented(found.source))
    raised = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None)
    return {node.func.id for node in raised if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            and node.func.id[0].isupper()}  # fmt: skip


def _dedented(source: str) -> str:
    width = len(source) - len(source.lstrip(" "))
    return re.sub(rf"^ {{{width}}}", "", source, flags=re.MULTILINE)


def _overrides(found: griffe.Class, key: str) -> bool:
    """Whether a method replaces one of PyTorch, transformers or PEFT, and so is described there."""
    kind: Any = import_module(found.module.canonical_path)
    kind = getattr(kind, found.name)
    return any(key in vars(base) for base in kind.__mro__[1:] if not base.__module__.startswith("s2ft"))


def report() -> tuple[int, int, list[str]]:
    """How many public names there are, how many are documented in full, and what the others lack."""
    names = public_names()
    found = {name: lacks(name) for name in names}
    return len(names), sum(not lines for lines in found.values()), [line for lines in found.values() for line in lines]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    total, complete, lines = report()
    print(*lines, *(f"{name}: on no page of the reference" for name in ungrouped()), sep="\n")
    print(f"{complete} of {total} public names are documented in full ({100 * complete / total:.0f} %)")
    sys.exit(complete < total or bool(ungrouped()))
