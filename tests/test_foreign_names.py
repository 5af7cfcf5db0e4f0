"""Names of other packages whose absence would skip a check: without the name the check refuses."""

import ast
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import s2ft
from tests.support import inside
from tests.support.foreign_names import BY_READ, PUBLIC, WITH_DEFAULT, WITHOUT_DEFAULT
from tests.support.inside import MissingForeignName, check_mentioned, read


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def without_it(*args):
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


def names_loaded(model):
    inside.conversions_of(model)


def choose_attention(model):
    inside.has_varlen_attention(model)


def look_for_partitions(model):
    inside.is_partitioned(model.lm_head.weight)


def look_for_master_copies(model):
    inside.has_master_copy(model.lm_head.weight)


def look_for_engine(model):
    inside.check_not_in_engine(model, "this")


def unpack_for_cpu(model):
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 64)
    layer.load_state_dict(nn.Linear(64, 64).state_dict())
    inside.unpack(layer.to("cpu"))


def look_for_split_layers(model):
    from torch.distributed.tensor import distribute_tensor

    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), one_rank()))
    inside.is_split(model.lm_head)


def attach_sharded(model):
    from torch.distributed.fsdp import fully_shard

    attach(fully_shard(model, mesh=one_rank()))


def one_rank():
    return torch.distributed.init_device_mesh("cpu", (1,))


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
ZERO = "deepspeed.runtime.zero"
LINKS = "deepspeed.utils.mixed_precision_linkage"
PARTITIONS = f"{ZERO}.partition_parameters"
ROWS = [
    Row("torch", NEURAL, "_replicate_for_data_parallel", "_is_replica", attach, "copies of DataParallel"),
    Row(
        "torch",
        "torch.distributed.tensor",
        "distribute_module",
        "_distribute_module_applied",
        look_for_split_layers,
        "layers that tensor parallelism has split",
    ),
    Row(
        "torch",
        "torch.distributed.fsdp._fully_shard._fsdp_param_group",
        "FSDPParam",
        "orig_dtype",
        attach_sharded,
        "parameters that FSDP2 has read",
    ),
    Row("accelerate", HOOKS, "add_hook_to_module", "_hf_hook", check_offloaded, "offloaded weights"),
    Row("accelerate", f"{HOOKS}.AlignDevicesHook", "__init__", "offload", check_offloaded, "offloaded weights"),
    Row("accelerate", f"{HOOKS}.SequentialHook", "__init__", "hooks", check_offloaded, "several hooks of a module"),
    Row("transformers", MODEL, "_hf_peft_config_loaded", "_hf_peft_config_loaded", switch, "adapters of transformers"),
    Row("transformers", MODEL, "_keys_to_ignore_on_save", "_keys_to_ignore_on_save", names_saved, "unsaved weights"),
    Row("transformers", MODEL, "_get_dtype_plan", "_get_dtype_plan", float32, "weights kept in float32"),
    Row("transformers", MODEL, "_get_dtype_plan", "_get_dtype_plan", wanted_dtypes, "weights kept in float32"),
    Row(
        "transformers",
        "transformers.core_model_loading",
        "revert_weight_conversion",
        "_weight_conversions",
        names_loaded,
        "names in the model's checkpoint",
    ),
    Row(
        "transformers",
        "transformers.PreTrainedConfig",
        "_attn_implementation",
        "_attn_implementation",
        choose_attention,
        "the kernel of attention",
    ),
    Row(
        "compressed-tensors",
        "compressed_tensors.quantization.lifecycle.apply",
        "apply_quantization_config",
        "quantization_scheme",
        attach,
        "modules of quantized weights",
    ),
    Row(
        "bitsandbytes",
        "bitsandbytes.functional",
        "_convert_weight_packed_for_cpu",
        "packing_format_for_cpu",
        unpack_for_cpu,
        "weights repacked for the CPU",
    ),
    *(
        Row("deepspeed", PARTITIONS, "Init", name, look_for_partitions, "partitioned parameters")
        for name in ("ds_id", "ds_shape", "ds_numel")
    ),
    Row("deepspeed", LINKS, "link_hp_params", "_hp_mapping", look_for_master_copies, "copies in ZeRO-1 and ZeRO-2"),
    Row(
        "deepspeed",
        f"{ZERO}.stage3",
        "DeepSpeedZeroOptimizer_Stage3",
        "_z3_optimizer",
        look_for_master_copies,
        "copies in ZeRO-3",
    ),
    Row(
        "deepspeed",
        f"{ZERO}.parameter_offload",
        "ZeROOrderedDict",
        "ZeROOrderedDict",
        look_for_engine,
        "models in the engine of ZeRO-3",
    ),
]


# ZeRO-3 is known by three names: a class without one of them still mentions the others.
MARKS = {"ds_id": lambda it: it.ds_id, "ds_shape": lambda it: it.ds_shape, "ds_numel": lambda it: it.ds_numel}


@pytest.fixture
def one_rank_group():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def marked(row):
    marks = [pytest.mark.deepspeed] if row.package == "deepspeed" else []
    return pytest.param(row, marks=marks, id=f"{row.name}-{row.use.__name__}")


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.parametrize("row", map(marked, ROWS))
def test_without_its_name_a_check_refuses(row, monkeypatch):
    pytest.importorskip(row.package.replace("-", "_"))
    owner = pytest.importorskip(row.owner) if row.owner.islower() else pkgutil.resolve_name(row.owner)
    row.use(tiny_llama())  # with the name nothing is refused
    model = tiny_llama()
    found = getattr(owner, row.attribute)
    if row.attribute == row.name:
        for kind in (*getattr(owner, "__mro__", [owner]), type(model)):  # a class and those that it has the name from
            if row.name in vars(kind):
                monkeypatch.delattr(kind, row.name)
        model.__dict__.pop(row.name, None)
    else:
        others = {name: method for name, method in MARKS.items() if name != row.name}
        renamed = type("Renamed", (found,), others) if isinstance(found, type) else without_it
        monkeypatch.setattr(owner, row.attribute, renamed)
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


TREES = [ast.parse(path.read_text()) for path in ROOT.rglob("*.py")]
TABLE = {**WITH_DEFAULT, **PUBLIC}


def test_every_private_name_of_another_package_is_in_the_table():
    own = {*own_names(TREES), "_s2ft_values"}
    found = {row for tree in TREES for row in names_read(tree) if is_private(row[0]) and row[0] not in own}
    assert {name for name, _ in found} - set(TABLE) - set(BY_READ) - WITHOUT_DEFAULT == set()
    assert {name for name, default in found if default} - set(TABLE) == set()


def test_the_table_has_no_name_that_is_not_read_any_more():
    read_names = {name for tree in TREES for name, _ in names_read(tree)}
    written = {node.value for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {*TABLE, *BY_READ, *WITHOUT_DEFAULT} - read_names - written == set()


def checked_names(function):
    """The names that s2ft gives a function of s2ft.foreign."""
    for node in (node for tree in TREES for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
            yield from (one.value for one in node.args[1:2] if isinstance(one, ast.Constant))


def test_each_name_that_is_refused_has_a_row():
    refused = {name for name, foreign in TABLE.items() if foreign.when_gone == "refused"}
    assert set(checked_names("check_mentioned")) <= refused
    assert set(checked_names("read")) == set(BY_READ)
    others = {"neftune_hook_handle", "cpu_linear"}  # tested below, and in vllm_plugin/test_transfer_guard.py
    assert refused | set(BY_READ) == {row.name for row in ROWS} | others
    assert {foreign.when_gone for foreign in TABLE.values()} == {"refused", "closed"}


SWALLOWED = {"AttributeError", "ImportError", "Exception", "BaseException"}


def swallows(node):
    """Whether a statement goes on after an AttributeError or an ImportError inside it."""
    if isinstance(node, ast.With):
        calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
        suppressed = [arg for call in calls if getattr(call.func, "id", "") == "suppress" for arg in call.args]
        return any(getattr(arg, "id", "") in SWALLOWED for arg in suppressed)
    if not isinstance(node, ast.Try):
        return False
    for handler in node.handlers:
        caught = {one.id for one in ast.walk(handler.type) if isinstance(one, ast.Name)} if handler.type else SWALLOWED
        if caught & SWALLOWED and not any(isinstance(one, ast.Raise) for one in ast.walk(handler)):
            return True
    return False


def test_no_error_about_a_private_name_is_swallowed():
    """Names without a default rely on Python's error."""
    hidden = {
        name
        for node in (node for tree in TREES for node in ast.walk(tree) if swallows(node))
        for statement in node.body
        for name, _ in names_read(statement)
    }
    assert hidden & WITHOUT_DEFAULT == set()
