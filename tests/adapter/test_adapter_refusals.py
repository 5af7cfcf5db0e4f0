"""What is refused on a model with adapters: one row each, and nothing changes. Damaged files: test_hostile.py."""

import copy
from dataclasses import replace

import pytest
import torch
from adapter import test_extra_weights as extra
from support.inside import add_info, lora, native, restore_adapter
from support.models import fit, model_of
from support.states import randomize, saved_adapter, with_adapter, with_loaded
from torch import nn

import s2ft
from s2ft import S2FTConfig

DOWN = "model.layers.1.mlp.down_proj"


def llama(case="llama"):
    return model_of(case).requires_grad_(True)


def trained(name="mine", case="llama", **options):
    return fit(with_adapter(llama(case), S2FTConfig(**{"d_ratio": 0.1, **options}), name=name), 1)


def loaded(**options):
    """A model with the adapters a and b, of which b is active."""
    model = llama()
    for seed, name in enumerate("ab"):
        s2ft.load_adapter(model, s2ft.get_adapter(trained(name, seed=seed, **options), name), active=name == "b")
    return model


def stacked(**options):
    """Two frozen adapters, one on top of the other."""
    model = llama()
    for seed, name in enumerate("ab"):
        fit(
            with_adapter(
                model, S2FTConfig(d_ratio=0.15, seed=seed, **(options if name == "a" else {})), name, on_top=True
            ),
            1,
        )
        s2ft.freeze_adapter(model)
    return model


def other_base():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 0.5
    return model


def broken(value):
    model = trained()
    model.get_submodule(DOWN).s2.data[0, 0] = value
    return model


def convolutions():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    coupling = s2ft.Coupling.ffn(0, up="0", down="2", channels=8)
    return randomize(with_adapter(net, S2FTConfig(d_ratio=0.3), couplings=[coupling], example=torch.randn(2, 3, 9, 9)))


def load(change=lambda adapter: None, **options):
    """Load the saved adapter after a change of it."""

    def call(model, saved, new):
        adapter = s2ft.read_adapter(saved)
        change(adapter)
        s2ft.load_adapter(model, adapter, **options)

    return call


def on_top(**options):
    return lambda model, saved, new: s2ft.attach(model, S2FTConfig(**options), name="c", on_top=True)


def writes(change):
    """Write the adapter of the model after a change of it."""

    def call(model, saved, new):
        adapter = s2ft.get_adapter(model, s2ft.list_adapters(model)[0])
        native.write(change(adapter) or adapter, new)

    return call


def bias_of(value):
    return writes(lambda adapter: adapter.extra_weights.update({"classifier.bias": value}))


def restores(how):
    """Restore the adapter of a classifier whose head is named in its config, or frozen."""

    def call(model, saved, new):
        other = new.with_name("other")
        extra.train(extra.attached(how)).save_pretrained(other)
        restore_adapter(model, other)

    return call


def modules(name):
    return lambda model, saved, new: s2ft.attach(model, S2FTConfig(d_ratio=0.1, modules_to_save=[name]))


def two_heads():
    return with_loaded(
        extra.train(extra.attached()),
        s2ft.get_adapter(extra.train(extra.attached(name="other")), "other"),
        active=False,
    )


def activate(**weights):
    return lambda model, saved, new: s2ft.set_adapter(model, weights)


NAMES = ("", ".hidden", "a/b", "a\\b", "x\ny", "a" * 501, 3, None, "a\0")
NAMED = {
    "attach": (llama, lambda model, name: s2ft.attach(model, S2FTConfig(d_ratio=0.1), name=name)),
    "rename": (loaded, lambda model, name: s2ft.rename_adapter(model, "a", name)),
    "combine": (loaded, lambda model, name: s2ft.combine_adapters(model, {"a": 1.0}, name)),
}
REFUSED = {
    "another base": (other_base, load(), "1 of 3 layers"),
    "another family": (lambda: llama("qwen3"), load(), "another"),
    "another size": (lambda: llama("llama-odd"), load(), "another model"),
    "a unit twice": (
        llama,
        load(lambda adapter: adapter.deltas[DOWN].index[1:2].copy_(adapter.deltas[DOWN].index[:1])),
        "index",
    ),
    "another selection": (
        lambda: trained(seed=1),
        lambda model, saved, new: restore_adapter(model, saved),
        "selection",
    ),
    "a device of a trainable one": (llama, load(trainable=True, device="cpu"), "device"),
    "no units": (loaded, lambda model, *_: s2ft.attach(model, S2FTConfig(o_ratio=0.01), name="new"), "o_ratio"),
    "units by hand of an active one": (
        stacked,
        lambda model, *rest: on_top(units={DOWN: s2ft.get_adapter(model, "b").selection[DOWN][:1].tolist()})(
            model, *rest
        ),
        "'b'",
    ),
    "too few units beside active ones": (stacked, on_top(d_ratio=0.9), "exclude"),
    "a head of an active one": (
        lambda: stacked(modules_to_save=["lm_head"]),
        on_top(d_ratio=0.05, modules_to_save=["lm_head"]),
        "lm_head.weight",
    ),
    "info of NaN": (trained, lambda model, *_: add_info(model, {"a": float("nan")}), "JSON"),
    "info of tensors": (trained, lambda model, *_: add_info(model, {"a": torch.ones(1)}), "JSON"),
    "info of none": (loaded, lambda model, *_: add_info(model, {"a": 1}), "trains no adapter"),
    "info to save": (trained, lambda model, saved, new: s2ft.save_adapter(model, new, info={"a": 1e999}), "JSON"),
    "NaN": (lambda: broken(float("nan")), lambda model, saved, new: s2ft.save_adapter(model, new), DOWN),
    "infinity": (lambda: broken(float("inf")), lambda model, saved, new: s2ft.save_adapter(model, new), DOWN),
    "lines in a name": (trained, writes(lambda adapter: replace(adapter, name="two\nlines")), "slashes"),
    "hub": (trained, lambda model, saved, new: model.save_pretrained(new, push_to_hub=True), "s2ft.push_to_hub"),
    "lora of experts": (lambda: trained(case="mixtral"), lambda model, _, new: s2ft.export_lora(model, new), "merged"),
    "lora of convolutions": (convolutions, lambda model, _, new: s2ft.export_lora(model, new), "merged"),
    "lora of a head": (
        lambda: trained(modules_to_save=["lm_head"]),
        lambda model, _, new: s2ft.export_lora(model, new),
        "merged",
    ),
    "lora of another base": (
        other_base,
        lambda model, saved, new: lora.write(s2ft.read_adapter(saved), new, model),
        "another base",
    ),
    # weights that are trained in full
    "a frozen head": (lambda: extra.attached("frozen"), restores("named"), "classifier.bias"),
    "a trained head": (lambda: extra.attached("named"), restores("frozen"), "classifier.bias"),
    "two of one weight": (two_heads, activate(default=1.0, other=1.0), "both"),
    "half of a weight": (two_heads, activate(other=0.5), "not 0.5"),
    "sum with half of one": (
        two_heads,
        lambda model, *_: s2ft.combine_adapters(model, {"default": 0.5}, "sum"),
        "trained in full",
    ),
    "no such module": (extra.classifier, modules("nothing"), "'nothing'"),
    "a module of slices": (extra.classifier, modules("dense"), "slices"),
    "a module without weights": (extra.classifier, modules("dropout"), "floating-point"),
    "integers": (two_heads, bias_of(torch.zeros(3, dtype=torch.int64)), "F64"),
    "nothing to save": (two_heads, bias_of(torch.zeros(0)), "empty"),
    # names
    **{
        f"{what} {name!a:.9}": (make, lambda model, saved, new, call=call, name=name: call(model, name), "a word")
        for what, (make, call) in NAMED.items()
        for name in NAMES
    },
    **{f"load {name!a:.9}": (llama, load(name=name), "a word") for name in NAMES if name is not None},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_adapter(trained(), tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case, saved, tmp_path):
    make, call, word = REFUSED[case]
    model = make()
    before, status = copy.deepcopy(model.state_dict()), s2ft.status(model)
    required = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError) as error:
        call(model, saved, tmp_path / "new")
    assert word in str(error.value) and not (tmp_path / "new").exists()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert s2ft.status(model) == status and [parameter.requires_grad for parameter in model.parameters()] == required
