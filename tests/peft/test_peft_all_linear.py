"""target_modules="all-linear" and other wide choices: what is trained, what is left out, and that it is said."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.models import model_of, output_of
from support.peft_modules import Router, injected, layers_of
from support.tolerances import LOGITS, relative_difference
from torch import nn
from transformers import HubertConfig, HubertForCTC

from s2ft.peft import S2FTPeftConfig


def names_of(model):
    return set(model.peft_config["default"].units)


@pytest.mark.parametrize("case", ("bert", "vit", "opt", "llama-grouped", "gpt2", "deepseek-v3"))
def test_all_linear_trains_what_lora_trains(case):
    base = model_of(case)
    model = injected(copy.deepcopy(base), target_modules="all-linear", ratio=0.5)
    config = model.peft_config["default"]
    assert not config.skipped
    if case != "deepseek-v3":  # in which PEFT makes "all-linear" mean the stacked experts too
        lora = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear", r=2))
        assert set(layers_of(model)) == {name for name, module in lora.named_modules() if hasattr(module, "lora_A")}
    coupled = {name for name in layers_of(model) if name.removeprefix("base_model.model.") not in config.uncoupled}
    assert coupled and all(layers_of(model)[f"base_model.model.{name}"].dim == 1 for name in config.uncoupled)


def test_small_layers_are_left_out_with_a_warning(tmp_path):
    base = model_of("llama-grouped")
    with pytest.warns(UserWarning, match=r"12 of 21 layers are not trained: 12 with less than one unit at ratio=0.05"):
        model = injected(copy.deepcopy(base), target_modules="all-linear", ratio=0.05)
    config = model.peft_config["default"]
    assert len(config.skipped) == 12 and all("self_attn" in name for name in config.skipped)
    assert len(names_of(model)) == 9
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert again.peft_config["default"].skipped == config.skipped and names_of(again) == names_of(model)
    assert relative_difference(output_of(again), output_of(model)) <= LOGITS


def test_parts_of_a_packed_weight_are_left_out_alone():
    with pytest.warns(UserWarning, match=r"attn.*qkv_proj\.k"):
        model = injected(model_of("phi3-grouped"), target_modules=["qkv_proj"], ratio=0.2)
    assert {name.rpartition(".")[2] for name in names_of(model)} == {"q"}
    assert {name.rpartition(".")[2] for name in model.peft_config["default"].skipped} == {"k", "v"}


def test_a_family_that_is_declared_later_does_not_change_an_adapter():
    name, case = "model.layers.0.self_attn.o_proj", "llama-grouped"
    as_heads = injected(model_of(case), units={name: [0, 2]})
    assert layers_of(as_heads).popitem()[1].s2ft_delta["default"].values.shape == (24, 12)
    single = injected(
        model_of(case),
        units={name: [0, 2]},
        target_modules=["o_proj"],
        exclude_modules=["1.self_attn.o_proj", "2.self_attn.o_proj"],
        uncoupled=[name],
        chosen_by={"ratio": 0.1, "seed": 0},
    )
    assert layers_of(single).popitem()[1].s2ft_delta["default"].values.shape == (24, 2)


# ---- layers that can't be trained, and derived ones -----------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied = nn.Linear(8, 11, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        return self.tied(self.two(torch.relu(self.one(self.attention(x, x, x)[0]))))


def test_all_linear_leaves_out_what_could_not_be_trained_or_merged():
    with pytest.warns(
        UserWarning, match=r"2 of 4 layers .* out_proj of nn.MultiheadAttention.* \(attention.out_proj\)"
    ):
        model = injected(Net(), target_modules="all-linear", ratio=0.5)
    assert names_of(model) == {"one", "two"}
    assert model.peft_config["default"].skipped == ["attention.out_proj", "tied"]
    with pytest.raises(
        ValueError, match="attention.out_proj is a NonDynamicallyQuantizableLinear, out_proj of nn.Multi"
    ):
        injected(Net(), target_modules=["out_proj"], ratio=0.5)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.out = Router(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        logits, weights = self.router(x)
        return self.out(logits * weights)


def test_layers_with_a_forward_of_their_own():
    x = torch.randn(4, 6)
    model = injected(Routed(), target_modules="all-linear", ratio=0.5)
    model.add_adapter("b", S2FTPeftConfig(target_modules="all-linear", ratio=0.5, seed=1, init_weights=False))
    outputs = {"__base__": Routed()(x), "default": model(x)}
    model.set_adapter("b")
    outputs["b"] = model(x)
    model.eval()
    mixed = model(x, adapter_names=["b", "__base__", "default", "b"])
    expected = torch.stack([outputs[name][i] for i, name in enumerate(("b", "__base__", "default", "b"))])
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(model.merge_and_unload()(x), outputs["b"])


class Reader(nn.Module):
    """Reads the weight of its layer, as the routers of some mixtures do."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.called(nn.functional.linear(x.to(self.called.weight.dtype), self.read.weight))


def test_all_linear_leaves_out_layers_that_never_run():
    with pytest.warns(UserWarning, match=r"1 whose weight is used without running the layer \(0.read\)"):
        model = injected(nn.Sequential(Reader()), target_modules="all-linear", ratio=0.5)
    assert names_of(model) == {"0.called"}


def test_all_linear_leaves_out_a_head_that_peft_cannot_save(tmp_path):
    base = HubertForCTC(
        HubertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=20,
            vocab_size=9,
            conv_dim=(8,),
            conv_stride=(2,),
            conv_kernel=(4,),
            num_conv_pos_embedding_groups=2,
            num_conv_pos_embeddings=4,
        )
    )
    with pytest.warns(UserWarning, match="that is a head"):
        model = injected(copy.deepcopy(base), target_modules="all-linear", ratio=0.5)
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(base, tmp_path).peft_config["default"].skipped == ["lm_head"]
