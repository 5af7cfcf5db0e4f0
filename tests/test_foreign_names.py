"""Names of other packages whose absence would skip a check: without the name the check refuses."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import s2ft
from tests.support import inside
from tests.support.foreign_names import WITH_DEFAULT, WITHOUT_DEFAULT
from tests.support.inside import MissingForeignName, check_mentioned, read


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def without_it(function):
    """A function that a release without the name could have."""


def attach(model):
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.25))


def check_offloaded(model):
    inside.check_not_offloaded(model)


def switch(model):
    inside.base_switch(model)


def names_saved(model):
    inside.saved_names(model)


def float32(model):
    inside.keep_in_float32(model)


def wanted_dtypes(model):
    inside.wanted_dtypes(model, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """A private name: without it `use` must refuse.

    Attributes:
        package: The package, whose modules `owner` is in.
        owner: Path of the class or module that has or uses the name.
        attribute: What is replaced: the name itself, or the function that sets it.
        name: The name.
        use: The code of s2ft that needs it.
        what: What s2ft finds by it.
    """

    package: str
    owner: str
    attribute: str
    name: str
    use: object
    what: str


NEURAL = "torch.nn.Module"
HOOKS = "accelerate.hooks"
MODEL = "transformers.PreTrainedModel"
ROWS = [
    Row("torch", NEURAL, "_replicate_for_data_parallel", "_is_replica", attach, "copies of DataParallel"),
    Row("accelerate", HOOKS, "add_hook_to_module", "_hf_hook", check_offloaded, "offloaded weights"),
    Row("accelerate", f"{HOOKS}.AlignDevicesHook", "__init__", "offload", check_offloaded, "offloaded weights"),
    Row("accelerate", f"{HOOKS}.SequentialHook", "__init__", "hooks", check_offloaded, "several hooks of a module"),
    Row("transformers", MODEL, "_hf_peft_config_loaded", "_hf_peft_config_loaded", switch, "adapters of transformers"),
    Row("transformers", MODEL, "_keys_to_ignore_on_save", "_keys_to_ignore_on_save", names_saved, "unsaved weights"),
    Row("transformers", MODEL, "_get_dtype_plan", "_get_dtype_plan", float32, "weights kept in float32"),
    Row("transformers", MODEL, "_get_dtype_plan", "_get_dtype_plan", wanted_dtypes, "weights kept in float32"),
]


def owner_of(path):
    owner = None
    for part in path.split("."):
        owner = __import__(part) if owner is None else getattr(owner, part)
    return owner


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}-{row.use.__name__}")
def test_without_its_name_a_check_refuses(row, monkeypatch):
    pytest.importorskip(row.package)
    if row.owner.startswith(HOOKS):
        pytest.importorskip(HOOKS)
    model = tiny_llama()
    row.use(tiny_llama())  # with the name nothing is refused
    owner = owner_of(row.owner)
    if row.attribute == row.name:
        for kind in type(model).__mro__:  # the class and those that it has the name from
            if row.name in vars(kind):
                monkeypatch.delattr(kind, row.name)
        model.__dict__.pop(row.name, None)
    else:
        monkeypatch.setattr(owner, row.attribute, without_it)
    with pytest.raises(MissingForeignName, match=rf"{row.package} \d.* has no '{row.name}'.*install a release"):
        row.use(model)


def test_neftunes_handle_is_looked_for_in_the_trainer():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    check_mentioned(transformers.Trainer, "neftune_hook_handle", "transformers", "NEFTune's hook")
    with pytest.raises(MissingForeignName, match="neftune_gone"):
        check_mentioned(transformers.Trainer, "neftune_gone", "transformers", "NEFTune's hook")


@pytest.mark.parametrize("made", ["conv", "layer_types"])
def test_layers_with_a_state_are_found_without_the_flag_of_transformers(made):
    """transformers 5.25 marks no model as stateful any more."""
    model = tiny_llama()
    assert not inside.has_state(model)
    if made == "conv":
        model.conv = nn.Conv1d(1, 1, 2)
    else:
        model.config.layer_types = ["linear_attention"]
    assert inside.has_state(model)


def test_a_name_that_is_there_is_read():
    assert read(SimpleNamespace(_name=3), "_name", "torch", "a number") == 3
    with pytest.raises(MissingForeignName, match="nothing_of_this_name .unknown release. has no '_name'"):
        read(SimpleNamespace(), "_name", "nothing_of_this_name", "a number")


def test_models_without_accelerate_need_no_names_of_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "accelerate.hooks", raising=False)
    check_offloaded(nn.Linear(2, 2))


# ---- the table of names is complete ---------------------------------------------------------------------

ROOT = Path(s2ft.__file__).parent


def is_private(name):
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def own_names(trees):
    """The names that s2ft itself defines."""
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr


def names_read(tree):
    """Private names that a file reads, each with whether a default stands in for it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, False
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("s2ft"):
            yield from ((part, False) for part in (*node.module.split("."), *(alias.name for alias in node.names)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            if node.func.id in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant):
                yield node.args[1].value, node.func.id == "hasattr" or len(node.args) > 2


def test_every_private_name_of_another_package_is_in_the_table():
    trees = [ast.parse(path.read_text()) for path in ROOT.rglob("*.py")]
    own = {*own_names(trees), "_s2ft_values"}
    found = {row for tree in trees for row in names_read(tree) if is_private(row[0]) and row[0] not in own}
    assert {name for name, _ in found} - set(WITH_DEFAULT) - WITHOUT_DEFAULT == set()
    assert {name for name, default in found if default} - set(WITH_DEFAULT) == set()


def test_each_name_that_is_refused_has_a_row():
    refused = {name for name, foreign in WITH_DEFAULT.items() if foreign.when_gone == "refused"}
    assert refused <= {row.name for row in ROWS}
