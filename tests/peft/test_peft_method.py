"""S²FT as a method of PEFT on known families: selecting, training, saving, merging and switching."""

import copy
from functools import partial

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from support.models import ALL_RATIOS, T5, model_of, output_of, ratios_for
from support.pairs import in_turn
from support.peft_modules import layers_of
from support.states import assert_same_adapters, same, with_loaded
from support.tolerances import LOGITS, relative_difference
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config

import s2ft
from s2ft.peft import S2FTPeftConfig, from_native, to_native

DENSE = ("llama-grouped", "llama-biased", "phi3-grouped", "gpt2", "gpt-neox", "qwen2-grouped-tied", "bert", "t5", "opt")
RATIOS = dict(o_ratio=0.5, u_ratio=0.1, d_ratio=0.1)


def peft_of(case="llama-grouped", dtype=torch.float32, adapter_name="default", seed=0, autocast=True, **config):
    """A PEFT model with random deltas, so that the adapter changes the output."""
    config = config or ratios_for(case, ALL_RATIOS)
    return get_peft_model(
        model_of(case, dtype),
        S2FTPeftConfig(**config, init_weights=False, seed=seed),
        adapter_name,
        autocast_adapter_dtype=autocast,
    ).eval()


def two_of(case="llama-grouped", dtype=torch.float32, **config):
    """A PEFT model with adapters a and b on different units."""
    config = config or ratios_for(case, ALL_RATIOS)
    model = peft_of(case, dtype, "a", **config)
    model.add_adapter("b", S2FTPeftConfig(**config, init_weights=False, seed=5))
    return model


# ---- choosing ------------------------------------------------------------------------------------------


CHOICES = ({}, {"seed": 3}, {"selection": "weight", "order": "smallest"}, {"budget": 9000}, {"align": 2})


@pytest.mark.parametrize("case, options", in_turn(DENSE, CHOICES))
def test_units_are_those_that_attach_trains(case, options):
    ratios = ratios_for(case, ALL_RATIOS)
    chosen = s2ft.select(model_of(case), s2ft.S2FTConfig(**ratios, **options))
    assert peft_of(case, **{"seed": 0, **ratios, **options}).peft_config["default"].units == chosen.to_dict()


def test_a_reused_config_keeps_its_original_options():
    config = S2FTPeftConfig(d_ratio=0.1)
    first = get_peft_model(model_of("llama-grouped"), config)
    mine = first.peft_config["default"]
    assert mine is config and mine.chosen_by == {"d_ratio": 0.1, "seed": 0}  # PEFT's users read what became of theirs
    assert get_peft_model(model_of("llama-grouped"), config).peft_config["default"] is config
    for case in ("gpt2", "llama-biased"):  # another family; another base of the same shapes
        assert get_peft_model(model_of(case), config).peft_config["default"].base_fingerprint != mine.base_fingerprint
    config.seed = 1
    first.add_adapter("b", config)
    assert first.peft_config["b"].units != mine.units
    config.d_ratio = 0.3
    first.add_adapter("c", config)
    assert {len(numbers) for numbers in first.peft_config["c"].units.values()} == {16}
    many = get_peft_model(model_of("llama"), S2FTPeftConfig(**ALL_RATIOS))  # PEFT shortens such a long target_modules
    many.add_adapter("b", many.peft_config["default"])  # as TRL makes a reference
    assert many.peft_config["b"].units == many.peft_config["default"].units


def test_layers_and_peft_fields_restrict_the_modules():
    def paths(**options):
        return set(peft_of("llama-grouped", **options).peft_config["default"].units)

    assert paths(d_ratio=0.1, layers=[1]) == {"model.layers.1.mlp.down_proj"}
    assert paths(d_ratio=0.1, layers_to_transform=[0, 2]) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 2)}
    assert paths(d_ratio=0.1, layers_to_transform=1, layers_pattern="layers") == {"model.layers.1.mlp.down_proj"}
    assert paths(d_ratio=0.1, exclude_modules=["1.mlp.down_proj"]) == {
        f"model.layers.{i}.mlp.down_proj" for i in (0, 2)
    }
    assert paths(d_ratio=0.1, exclude_modules=r".*\.[01]\..*") == {"model.layers.2.mlp.down_proj"}
    with pytest.raises(ValueError, match="d_ratio: modules_to_save, .* excludes all"):
        paths(d_ratio=0.1, o_ratio=0.5, modules_to_save=["down_proj"])


def test_target_modules_and_a_ratio_select_the_units_of_the_projection():
    expected = peft_of("llama-grouped", d_ratio=0.1, v_ratio=0.1 + 0.4, seed=2).peft_config["default"].units
    for targets in (["down_proj"], r".*\.down_proj"):
        units = peft_of("llama-grouped", target_modules=targets, ratio=0.1, seed=2).peft_config["default"].units
        assert units == {path: numbers for path, numbers in expected.items() if "down" in path}
    heads = peft_of("llama-grouped", target_modules=["v_proj", "o_proj"], ratio=0.5)
    shapes = {
        path.rpartition(".")[2]: layer.s2ft_delta["default"].values.shape for path, layer in layers_of(heads).items()
    }
    assert shapes == {"v_proj": (6, 24), "o_proj": (24, 12)}  # one KV head and two query heads of 6


BAD = {
    "nothing": ({}, "nothing is selected"),
    "ratio alone": (dict(ratio=0.1), "give target_modules"),
    "towers": (dict(target_modules=["down_proj"], ratio=0.1, towers=["vision"]), "with target_modules name modules of"),
    "targets alone": (dict(target_modules=["down_proj"]), "target_modules needs ratio"),
    "targets and d_ratio": (dict(target_modules=["down_proj"], d_ratio=0.1), "exclude each other"),
    "ratio and d_ratio": (dict(target_modules=["down_proj"], ratio=0.1, d_ratio=0.1), "exclude each other"),
    "units and ratio": (dict(units={"x": [0]}, ratio=0.1, target_modules=["x"]), "units and ratio exclude each other"),
    "units and d_ratio": (dict(units={"x": [0]}, d_ratio=0.1), "nothing is left for d_ratio"),
    "ratio above one": (dict(target_modules=["down_proj"], ratio=1.5), "ratio must be a number from 0 to 1"),
    "no dim": (dict(target_modules=["down_proj"], ratio=0.1, dim="rows"), "dim must be one of outputs, inputs"),
    "pattern alone": (dict(d_ratio=0.1, layers_pattern="layers"), "needs layers_to_transform"),
    "layers and targets": (dict(target_modules=["down_proj"], ratio=0.1, layers=[0]), "give layers_to_transform"),
    "calibration": (dict(d_ratio=0.1, selection="activation"), r"units=s2ft\.select\(model"),
    "codec": (dict(d_ratio=0.1, codec="auto"), "do not round to the base's file"),
    "groups": (dict(d_ratio=0.1, group=4), r"one by one: give units=s2ft\.select\(model"),
    "no such order": (dict(d_ratio=0.1, order="best"), "order must be one of"),
    "experts not listed": (dict(target_parameters="block.stack", ratio=0.5), "target_parameters must be a list"),
    "experts without a ratio": (dict(target_parameters=["block.stack"]), "needs ratio"),
    "experts and d_ratio": (dict(target_parameters=["block.stack"], d_ratio=0.5), "exclude each other"),
    "unit ranges": (dict(units={"x": "3-1"}), "must be unit numbers such as 0,1,2,17"),
    "endless ranges": (dict(units={"x": "0-999999999"}), "must be unit numbers such as 0,1,2,17"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_configs_are_refused(name):
    fields, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        S2FTPeftConfig(**fields)


UNFIT = {
    "another projection": (
        dict(g_ratio=0.1),
        "gpt2",
        "g_ratio requests a projection that the layers to train do not have",
    ),
    "unknown units": (
        dict(units={"model.layers.9.mlp.down_proj": [0]}),
        "llama",
        "which is not a projection or module",
    ),
    "unit too high": (dict(units={"model.layers.0.mlp.down_proj": [52]}), "llama", "there is no 52"),
    "units and targets": (
        dict(units={"model.layers.0.mlp.down_proj": [0]}, target_modules=["up_proj"]),
        "llama",
        "which is not in target_modules",
    ),
    "targets without units": (
        dict(units={"model.layers.0.mlp.down_proj": [0]}, target_modules=["down_proj"]),
        "llama",
        "units names no unit of it",
    ),
    "dim in a family": (dict(target_modules=["down_proj"], ratio=0.1, dim="outputs"), "llama", "are its inputs"),
    "too small a ratio": (dict(target_modules=["down_proj"], ratio=0.001), "llama", "none of the 52 channels"),
    "embedding": (dict(target_modules=["embed_tokens"], ratio=0.5, dim="inputs"), "llama", "is a Embedding"),
    "no such module": (dict(target_modules=["nowhere"], ratio=0.5), "llama", "not found in the base model"),
    "unknown exclude": (dict(d_ratio=0.1, exclude={"nowhere": [0]}), "llama", "exclude names nowhere"),
}


def loads(change):
    """Load the adapter's weights after a change of them."""

    def call(model):
        tensors = get_peft_model_state_dict(model, adapter_name="a")
        change(tensors)
        set_peft_model_state_dict(model, tensors, adapter_name="a")

    return call


def adds_up(*arguments):
    return lambda model: model.add_weighted_adapter(*arguments)


def merged_two():
    model = two_of()
    model.merge_adapter()
    return model


def two_heads():
    config = dict(d_ratio=0.1, modules_to_save=["lm_head"])
    model = get_peft_model(model_of("llama-grouped"), S2FTPeftConfig(**config), "a")
    model.add_adapter("b", S2FTPeftConfig(**config))
    return model


def other_couplings():
    model = two_of("llama")
    model.peft_config["b"].couplings = []
    return model


def of_no_family():
    return get_peft_model(nn.Sequential(nn.Linear(4, 8)), S2FTPeftConfig(**BY_NAME))


def mixed(names):
    return lambda model: model(torch.ones(4, 3, dtype=torch.int64), adapter_names=names)


BY_NAME, STACK = dict(target_modules=["0"], ratio=0.5, dim="inputs"), dict(target_parameters=["0.weight"], ratio=0.5)
NETS = {  # modules of no family
    "unknown family": (nn.Linear(4, 8), dict(d_ratio=0.5), "all-linear"),
    "groups": (nn.Conv2d(6, 8, 3, groups=2), BY_NAME, "2 groups"),
    "embedding of none": (nn.Embedding(5, 6), BY_NAME, "Embedding"),
    "attention": (nn.MultiheadAttention(8, 2), BY_NAME, "MultiheadAttention"),
    "all of none": (
        nn.MultiheadAttention(8, 2),
        dict(target_modules="all-linear", ratio=0.5),
        "no linear layer can be trained; 0.out_proj of the kind out_proj of",
    ),
    "activation": (nn.ReLU(), BY_NAME, "ReLU"),
    "channels": (
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)),
        dict(d_ratio=0.5, couplings=[s2ft.Coupling.ffn(0, up="0.0", down="0.1", channels=9)]),
        "expected a weight with 9",
    ),
    "couplings": (nn.Linear(4, 8), dict(d_ratio=0.5, couplings=["0"]), "couplings"),
    "experts of an unknown kind": (nn.Bilinear(4, 4, 2), STACK, "Bilinear has none"),
    "experts of two dimensions": (nn.Linear(4, 4), STACK, "2 dimensions, .* name the module .* target_modules"),
    "experts nowhere": (nn.Linear(4, 4), dict(target_parameters=["x"], ratio=0.5), "no .target_parameters. found"),
}
MIX = ["b", "__base__", "a", "b"]
REFUSED = {
    "a tied weight": (
        lambda: model_of("qwen2-grouped-tied"),
        lambda model: get_peft_model(model, S2FTPeftConfig(target_modules=["lm_head"], ratio=0.2)),
        "one tied weight",
    ),
    **{
        name: (
            lambda net=net: nn.Sequential(copy.deepcopy(net)),
            lambda model, fields=fields: get_peft_model(model, S2FTPeftConfig(**fields)),
            message,
        )
        for name, (net, fields, message) in NETS.items()
    },
    **{
        name: (
            lambda case=case: model_of(case),
            lambda model, fields=fields: get_peft_model(model, S2FTPeftConfig(**fields)),
            message,
        )
        for name, (fields, case, message) in UNFIT.items()
    },
    # the shapes are equal, so without a check the wrong channels would change
    "other units": (
        two_of,
        loads(lambda tensors: tensors.update(get_peft_model_state_dict(peft_of(seed=1)))),
        "other units",
    ),
    "a weight is missing": (two_of, loads(lambda tensors: tensors.popitem()), "is missing"),
    "a weight too much": (
        two_of,
        loads(lambda tensors: tensors.update({"base_model.model.x.s2ft_delta.values": torch.zeros(2)})),
        "is left over",
    ),
    "third": (
        two_of,
        lambda model: model.add_adapter("c", S2FTPeftConfig(units={"nowhere": [0]})),
        "is not a projection or module",
    ),
    "name that exists": (two_of, lambda model: model.add_adapter("a", S2FTPeftConfig(d_ratio=0.1)), "already exists"),
    "sum of an unknown": (two_of, adds_up(["a", "x"], [1, 1], "sum"), "x does not exist"),
    "sum of lengths": (two_of, adds_up(["a"], [1, 1], "sum"), "the same length"),
    "sum of NaN": (two_of, adds_up(["a"], [float("nan")], "sum"), "finite"),
    "sum of nothing": (two_of, adds_up([], [], "sum"), "at least 1"),
    "sum of a name": (two_of, adds_up(["a"], [1], "b"), "'b'"),
    "sum by svd": (two_of, adds_up(["a"], [1], "sum", "svd"), "linear"),
    "sum of couplings": (other_couplings, adds_up(["a", "b"], [1, 1], "sum"), "different couplings"),
    "sum of heads": (two_heads, adds_up(["a", "b"], [1, 1], "sum"), "modules_to_save"),
    "no family in native form": (of_no_family, to_native, "family"),
    "a module in no coupling": (
        lambda: peft_of("llama", target_modules=["down_proj", "lm_head"], ratio=0.1),
        to_native,
        "lm_head in no coupling",
    ),
    "no such adapter": (of_no_family, lambda model: to_native(model, "other"), "'other'"),
    "mixed names": (two_of, mixed(MIX[:3]), "adapter_names"),
    "mixed in training": (lambda: two_of().train(), mixed(MIX), "training mode"),
    "mixed while merged": (merged_two, mixed(MIX), "merged"),
    "mixed unknown": (two_of, mixed(["c"] * 4), "non-existing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case):
    make, call, word = REFUSED[case]
    model = make()
    before, adapters = copy.deepcopy(model.state_dict()), set(getattr(model, "peft_config", ()))
    layers = list(layers_of(model))
    with pytest.raises((ValueError, TypeError), match=word):
        call(model)
    assert same(model.state_dict(), before) and list(layers_of(model)) == layers
    assert set(getattr(model, "peft_config", ())) == adapters
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- the forward, merging ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ("llama-grouped", "qwen3-moe"))
def test_a_compiled_model_and_the_plain_one_take_turns(case):
    model = peft_of(case)
    expected, compiled = output_of(model), torch.compile(model, backend="eager")
    assert all(relative_difference(output_of(one), expected) < LOGITS for one in (compiled, model, compiled))


@pytest.mark.parametrize("case", ("llama-grouped", "phi3-grouped", "gpt2"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_merged_equals_trained_bit_for_bit(case, dtype):
    model, base = two_of(case, dtype), model_of(case, dtype)
    for active in (["a"], ["b"], ["a", "b"]):
        model.base_model.set_adapter(active)
        trained = output_of(model)
        for _ in range(3):
            model.merge_adapter(safe_merge=active == ["a"])
            assert torch.equal(output_of(model), trained)
            model.unmerge_adapter()
        assert torch.equal(output_of(model), trained)
    assert same(model.unload().state_dict(), base.state_dict())


@pytest.mark.parametrize("case", (*DENSE, "qwen3-moe"))
def test_peft_computes_what_attach_computes(case, tmp_path):
    model, base = peft_of(case), model_of(case)
    s2ft.load_adapter(base, to_native(model), trainable=True)
    assert relative_difference(output_of(model), output_of(base)) < LOGITS
    back = from_native(model_of(case), s2ft.get_adapter(base, "default"))
    assert torch.equal(output_of(back), output_of(model))
    s2ft.save_adapter(base, tmp_path)
    from_native(back, str(tmp_path), "again", task_type="CAUSAL_LM")
    assert back.peft_config["again"].task_type == "CAUSAL_LM"
    assert same(get_peft_model_state_dict(back, adapter_name="again"), get_peft_model_state_dict(model))
    assert same(get_peft_model_state_dict(back), get_peft_model_state_dict(model))


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_safe_merge_refuses_values_that_are_not_finite(value):
    layer = list(layers_of(two_of()).values())[-1]
    layer.s2ft_delta["b"].values.data.view(-1)[0] = value
    layer.merge(adapter_names=["a"])
    before = layer.base_layer.weight.clone()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="The adapter b seems to be broken"):
        layer.merge(safe_merge=True, adapter_names=["b"])
    assert torch.equal(layer.base_layer.weight, before) and layer.merged_adapters == ["a"]


# ---- training ------------------------------------------------------------------------------------------


def test_float32_deltas_on_a_bfloat16_base_unless_asked_otherwise():
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = peft_of("llama-grouped", torch.bfloat16, autocast=autocast)
        assert {layer.s2ft_delta["default"].values.dtype for layer in layers_of(model).values()} == {dtype}
        assert output_of(model).dtype is torch.bfloat16
        model.add_adapter("b", S2FTPeftConfig(d_ratio=0.1))
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".b." in name)  # it is not active


# ---- saving and loading --------------------------------------------------------------------------------


def test_another_base_is_refused_unless_the_fingerprint_is_removed(tmp_path):
    peft_of().save_pretrained(tmp_path)
    other = model_of("llama-grouped")
    other.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="another base: 1 of 3 layers differ, the first is layer 1"):
        PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    PeftModel.from_pretrained(model_of("llama-grouped", torch.bfloat16), tmp_path)  # another dtype, the same base
    config.base_fingerprint = None
    PeftModel.from_pretrained(copy.deepcopy(other), tmp_path, config=config)


def test_the_base_is_recognized_while_other_adapters_are_merged(tmp_path):
    peft_of().save_pretrained(tmp_path)
    model = two_of()
    model.merge_adapter(["a", "b"])
    merged = copy.deepcopy(model.state_dict())
    weights = {path: layer.base_layer.weight.clone() for path, layer in layers_of(model).items()}
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # PEFT sets the active adapters again
        model.load_adapter(tmp_path, "c")
    assert not torch.equal(
        weights["base_model.model.model.layers.0.mlp.down_proj"],
        model.state_dict()["base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"],
    )
    model.merge_adapter(["a", "b"])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in merged.items())


def test_to_native_keeps_modules_to_save():
    model = get_peft_model(model_of("llama"), S2FTPeftConfig(d_ratio=0.2, modules_to_save=["model.norm"]))
    model.base_model.model.model.norm.modules_to_save["default"].weight.data.mul_(2)
    found = to_native(model)
    assert torch.equal(with_loaded(model_of("llama"), found).model.norm.weight, 2 * model_of("llama").model.norm.weight)
    with pytest.raises(ValueError, match="model.norm.weight trained in full"):
        from_native(model_of("llama"), found)


def test_a_tied_weight_is_trained_with_both_modules_or_refused_in_native_form():
    saved = dict(d_ratio=0.2, modules_to_save=["embed_tokens"])
    with pytest.raises(ValueError, match="shares its weight with lm_head, .* ensure_weight_tying"):
        to_native(peft_of("qwen2-grouped-tied", **saved))
    model = peft_of("qwen2-grouped-tied", ensure_weight_tying=True, **saved)
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.mul_(2)
    assert torch.equal(output_of(with_loaded(model_of("qwen2-grouped-tied"), to_native(model))), output_of(model))


# ---- several adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", (*DENSE, "qwen3-moe"))
def test_weighted_sums_equal_those_of_s2ft(case):
    model = two_of(case)
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "sum")
    model.set_adapter("sum")
    expected = 0.7 * to_native(model, "a") + -0.3 * to_native(model, "b")
    assert_same_adapters(to_native(model, "sum"), expected)
    assert torch.equal(output_of(with_loaded(model_of(case), expected)), output_of(model))


def test_a_sum_keeps_modules_to_save_of_one_adapter():
    model = get_peft_model(model_of("llama-grouped"), S2FTPeftConfig(d_ratio=0.1), "a")
    model.add_adapter("b", S2FTPeftConfig(d_ratio=0.1, modules_to_save=["lm_head"]))
    heads = model.base_model.model.lm_head.modules_to_save
    heads["b"].weight.data += 1
    model.add_weighted_adapter(["a", "b"], [1, 1], "sum")
    assert torch.equal(heads["sum"].weight, heads["b"].weight) and "a" not in heads


# ---- mixed batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ("llama-grouped", "phi3-grouped", "gpt2", "mixtral", "opt"))
@pytest.mark.parametrize("grad", (False, True))
def test_every_row_of_a_mixed_batch_has_its_own_adapter(case, grad):
    model = two_of(case)
    tokens = torch.randint(67, (4, 7))
    expected = []
    for row, name in zip(tokens, MIX):
        if name == "__base__":
            expected.append(model_of(case)(row[None]).logits)
        else:
            model.set_adapter(name)
            expected.append(model(row[None]).logits)
    with torch.set_grad_enabled(grad):
        got = model(tokens, adapter_names=MIX).logits
    assert relative_difference(got, torch.cat(expected)) < LOGITS and got.requires_grad is grad
    assert torch.equal(model(tokens).logits, model(tokens).logits)  # the names are removed


def encoder_decoder():
    """Both sides have the same number of layers, because the cache in generate has as many as the encoder."""
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(T5Config(**{**T5, "num_decoder_layers": 2}, tie_word_embeddings=False))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


decoder = partial(model_of, "llama-grouped")


@pytest.mark.parametrize(
    "make, modules_to_save, num_beams",
    ((decoder, None, 1), (decoder, None, 3), (decoder, ["lm_head"], 3), (encoder_decoder, ["lm_head"], 3)),
)
def test_generate_mixed(make, modules_to_save, num_beams):
    """modules_to_save need exactly one name per row, but an encoder runs before there are beams."""
    config = dict(**ratios_for("llama-grouped", ALL_RATIOS)) if make is decoder else dict(d_ratio=0.2)
    config = dict(config, modules_to_save=modules_to_save, init_weights=False)
    model = get_peft_model(make(), S2FTPeftConfig(**config), "a").eval()
    model.add_adapter("b", S2FTPeftConfig(**config, seed=5))
    for name, parameter in model.named_parameters():
        if "s2ft_delta" in name:
            parameter.data.mul_(4)  # large enough to change the tokens
        elif "modules_to_save" in name:
            parameter.data.normal_(std=0.3)
    tokens = torch.randint(3, 67, (4, 5))
    settings = dict(max_new_tokens=6, do_sample=False, num_beams=num_beams, pad_token_id=0, eos_token_id=None)
    expected = []
    for row, name in zip(tokens, MIX):
        model.set_adapter("a" if name == "__base__" else name)
        expected.append((make() if name == "__base__" else model).generate(input_ids=row[None], **settings)[0])
    got = model.generate(input_ids=tokens, adapter_names=MIX, **settings)
    assert torch.equal(got, torch.stack(expected)) and len({tuple(row.tolist()) for row in got}) == 4
