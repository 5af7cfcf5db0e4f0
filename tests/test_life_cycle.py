"""The life of an adapter: attached, trained, switched off, saved, loaded, merged or refused, removed without a trace.

One test for every kind of layer, layout, dtype and quantization, with s2ft's own functions and in PEFT.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import test_derived_layers as derived
import test_one_sided as one_sided
import torch
from adapter import test_extra_weights as classifiers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from support.inside import couplings_of, projections_of, weight_at
from support.models import (
    ALL_RATIOS,
    CASES,
    FIRST,
    LAYOUTS,
    WHOLE_KEYS,
    inputs_of,
    model_of,
    output_of,
    ratios_for,
    train,
)
from support.pairs import in_turn, pairs, pairs_mostly_slow, rest_slow
from support.peft_modules import MODULES, net_of
from support.quantized import KINDS, RARE, assert_same_contents, contents, forward, quantized
from support.slices import slices
from support.states import with_adapter, with_loaded
from support.tolerances import LOGITS, relative_difference
from torch import nn

import s2ft
from s2ft.peft import S2FTPeftConfig

DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Subject:
    """A model and how it is used.

    Args:
        make: Makes the base; the same each time.
        config: Fields of the config.
        run: Returns the output of a model.
        attach: More arguments of attach.
        is_quantized: The adapter can't be written into the weights.
        is_exact: Nothing moves and nothing is computed in another order, so that outputs are equal, bit for bit.
    """

    make: Callable
    config: dict
    run: Callable = output_of
    attach: dict = field(default_factory=dict)
    is_quantized: bool = False
    is_exact: bool = False

    def assert_close(self, ours, theirs):
        if self.is_exact:
            assert torch.equal(ours, theirs)
        elif ours.dtype is torch.float32:
            assert relative_difference(ours, theirs) <= LOGITS


class Native:
    """s2ft's own functions."""

    def attach(self, model, subject):
        return with_adapter(model, s2ft.S2FTConfig(**subject.config), **subject.attach)

    def load(self, model, folder):
        return with_loaded(model, folder, trainable=True)

    save, off, merge, remove = s2ft.save_adapter, s2ft.disable_adapters, s2ft.merge, s2ft.detach
    save, off, merge, remove = map(staticmethod, (save, off, merge, remove))


class Peft:
    """The same in PEFT."""

    def attach(self, model, subject):
        return get_peft_model(model, S2FTPeftConfig(**subject.config)).eval()

    def load(self, model, folder):
        return PeftModel.from_pretrained(model, folder, "other", is_trainable=True).eval()

    save = staticmethod(lambda model, folder: model.save_pretrained(folder))
    off = staticmethod(lambda model: model.disable_adapter())
    merge = staticmethod(lambda model: model.merge_and_unload())
    remove = staticmethod(lambda model: model.unload())


def fit(model, subject, steps=3):
    """Train a model and return the losses. In float16 the slices get random values, the same each time."""
    trained = list(slices(model).values())
    if trained[0].dtype is torch.float16:
        torch.manual_seed(1)
        return [nn.init.normal_(parameter.data, std=0.02).sum().item() for parameter in trained]
    return train(model, steps, weight_decay=0.01, loss_of=lambda model: subject.run(model).float().square().mean())


def tensors_of(model):
    """All bytes of a model: its state, and what quantized weights consist of."""
    packed = contents(model)
    state = {key: [value] for key, value in model.state_dict().items() if key.rpartition(".weight")[0] not in packed}
    return {key: [value.clone() for value in values] for key, values in {**state, **packed}.items()}


def watch(model, calls):
    """Count the calls of the hooks of all layers with a weight."""
    for path, module in model.named_modules():
        if getattr(module, "weight", None) is not None:
            module.register_forward_hook(lambda *_, path=path: calls.update([path]))


def live(subject, way, folder):
    """Live through all of it. Returns the merged model, or None."""
    base = subject.make()
    output, before = subject.run(base).detach(), tensors_of(base)
    kinds, modes = [type(module) for module in base.modules()], [module.training for module in base.modules()]
    flags, model, calls = [parameter.requires_grad for parameter in base.parameters()], base, Counter()
    watch(model, calls)
    subject.run(model)
    expected_calls = Counter(calls)
    model = way.attach(model, subject)
    calls.clear()
    subject.assert_close(subject.run(model), output)
    assert calls == expected_calls
    losses = fit(model, subject)
    assert losses[-1] < losses[0] or output.dtype is torch.float16
    assert all(bool(parameter.any()) for parameter in slices(model).values())
    trained = subject.run(model).detach()
    assert not torch.equal(trained, output)
    with way.off(model):
        subject.assert_close(subject.run(model), output)
    assert torch.equal(subject.run(model), trained)

    way.save(model, folder)
    again = way.load(subject.make(), folder)
    assert torch.equal(subject.run(again), trained)
    merged = None
    if subject.is_quantized:
        with pytest.raises(ValueError, match="quantized"):
            way.merge(model)
        assert torch.equal(subject.run(model), trained)
    else:
        merged = way.merge(copy.deepcopy(model))
        subject.assert_close(subject.run(merged), trained)
        assert_same_contents(tensors_of(way.merge(copy.deepcopy(again))), tensors_of(merged))
        assert_plain(merged, kinds)
    assert fit(again, subject) == fit(copy.deepcopy(model), subject) != losses
    assert torch.equal(subject.run(model), trained)  # nothing is shared with the copy
    removed = way.remove(model)
    calls.clear()
    subject.run(removed)
    assert calls == expected_calls
    assert_same_contents(tensors_of(removed), before)
    assert_plain(removed, kinds)
    assert [module.training for module in removed.modules()] == modes
    assert isinstance(way, Peft) or [parameter.requires_grad for parameter in removed.parameters()] == flags
    return merged


def assert_plain(model, kinds):
    """Nothing of s2ft is left in the model."""
    assert [type(module) for module in model.modules()] == kinds
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


def live_natively(subject, folder):
    merged = live(subject, Native(), folder)
    other = subject.make()
    if merged is None:
        before = tensors_of(other)
        with pytest.raises(ValueError, match="trainable=True"):
            s2ft.load_adapter(other, folder)
        assert_same_contents(tensors_of(other), before)
        assert s2ft.list_adapters(other) == []
    else:
        s2ft.load_adapter(other, folder)
        assert_same_contents(tensors_of(other), tensors_of(merged))
        assert_same_contents(tensors_of(s2ft.merge(other)), tensors_of(merged))
    return merged


def assert_only_trained_units_moved(merged, base, adapter):
    """Frozen entries never move, and no trained one is lost."""
    moved = {name: weight != base.get_parameter(name) for name, weight in merged.named_parameters()}
    for p in projections_of(adapter.couplings or couplings_of(base)):
        if p.name in adapter.deltas:
            change, delta = moved[p.path if p.path in moved else f"{p.path}.weight"], adapter.deltas[p.name]
            by_element = weight_at(base, p).view(change).transpose(0, p.dim)
            mine, trained = p.elements(torch.arange(p.count)), delta.values.transpose(0, p.dim).flatten(1).any(1)
            assert torch.equal(mine[by_element[mine].flatten(1).any(1)], delta.index[trained]), p.name
            # ReLU leaves channels that were never active unchanged, and a router leaves experts that it does not choose
            assert trained.float().mean() >= 0.5 or p.expert is not None
            by_element[mine] = False
    assert not any(change.any() for change in moved.values())


OTHERS = [pytest.param(*row, marks=pytest.mark.slow) for row in pairs(sorted(set(CASES) - set(FIRST)), LAYOUTS, DTYPES)]


@pytest.mark.parametrize("case, layout, dtype", [*pairs_mostly_slow(FIRST, LAYOUTS, DTYPES), *OTHERS], ids=str)
def test_every_family(case, layout, dtype, tmp_path):
    config = dict(ratios_for(case, WHOLE_KEYS), layout=layout)
    attach = dict(verify=True, example=inputs_of(model_of(case, dtype)) if "cross-attention" in case else None)
    merged = live_natively(Subject(partial(model_of, case, dtype), config, attach=attach), tmp_path)
    assert_only_trained_units_moved(merged, model_of(case, dtype), s2ft.read_adapter(tmp_path))


# A fused weight, a Conv1D, experts, gates in one weight, an encoder and a decoder
SOME = ("gpt-neox", "gpt2", "qwen3-moe", "phi3", "whisper", "llama")
REST = [pytest.param(*row, marks=pytest.mark.slow) for row in pairs(sorted(set(FIRST) - set(SOME)), LAYOUTS, DTYPES)]


@pytest.mark.parametrize("case, layout, dtype", [*pairs_mostly_slow(SOME, LAYOUTS, DTYPES), *REST], ids=str)
def test_inputs_of_every_layer(case, layout, dtype, tmp_path):
    """Each layer of the couplings has inputs of its own, also in fused weights, convolutions and stacked experts."""
    config = dict(i_ratio=0.1, layout=layout)
    attach = dict(verify=True, example=inputs_of(model_of(case, dtype)) if "cross-attention" in case else None)
    base = model_of(case, dtype)
    merged = live_natively(Subject(partial(model_of, case, dtype), config, attach=attach), tmp_path)
    assert_only_trained_units_moved(merged, base, adapter := s2ft.read_adapter(tmp_path))
    weights = {(one.path, one.expert) for one in projections_of(couplings_of(base))}
    assert {(one.path, one.expert) for one in projections_of(adapter.couplings)} == weights


OWN_FORWARD = Subject(
    derived.make_net,
    dict(u_ratio=0.3, d_ratio=0.3, layout="indexed"),
    lambda model: model(derived.EXAMPLE),
    dict(couplings=[derived.COUPLING], example=derived.EXAMPLE),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_whose_class_has_a_forward_of_its_own(layout, tmp_path):
    live_natively(replace(OWN_FORWARD, config={**OWN_FORWARD.config, "layout": layout}), tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", one_sided.SIDES)
def test_layers_that_share_no_units(side, layout, tmp_path):
    options = dict(couplings=one_sided.couplings(side), example=one_sided.batch())
    config = dict(l_ratio=0.25, u_ratio=0.1, d_ratio=0.2, layout=layout)
    live_natively(Subject(one_sided.net, config, lambda model: model(**one_sided.batch())["logits"], options), tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_units_by_hand(layout, tmp_path):
    """They are unsorted, not nested, and of a single projection in one layer."""
    block = "model.layers.1.mlp"
    units = {f"{block}.down_proj": [7, 3, 51], f"{block}.up_proj": [0, 1, 2], f"{block}.gate_proj": [2, 40]}
    units["model.layers.2.self_attn.o_proj"] = [3]
    live_natively(Subject(partial(model_of, "llama"), dict(units=units, layout=layout)), tmp_path)
    assert s2ft.read_adapter(tmp_path).selection.to_dict() == {path: sorted(found) for path, found in units.items()}


@pytest.mark.parametrize("layout, dtype", list(zip(LAYOUTS, DTYPES)), ids=str)
def test_a_head_that_is_trained_in_full(layout, dtype, tmp_path):
    live_natively(
        Subject(
            lambda: classifiers.classifier().to(dtype).eval(),
            dict(d_ratio=0.1, modules_to_save=["classifier"], layout=layout),
            lambda model: model(classifiers.IDS).logits,
        ),
        tmp_path,
    )


QUANTIZED = dict(
    **dict(q_ratio=0.5, k_ratio=0.25, v_ratio=0.5, o_ratio=0.5, u_ratio=0.2, g_ratio=0.1, d_ratio=0.15),
    layout="indexed",
    ffn_kernel=False,  # the kernel rounds differently
)


@pytest.mark.parametrize("kind, dtype", in_turn(KINDS, DTYPES), ids=str)
def test_quantized_weights(kind, dtype, tmp_path):
    make = partial(quantized, kind, dtype)
    live_natively(Subject(make, QUANTIZED, forward, dict(verify=True), is_quantized=True, is_exact=True), tmp_path)


# ---- in PEFT -------------------------------------------------------------------------------------------

DENSE = ("llama-grouped", "llama-biased", "phi3-grouped", "gpt2", "gpt-neox", "qwen2-grouped-tied", "bert", "t5", "opt")


def frozen(make):
    """A weight that needs a gradient changes how PyTorch folds batches."""
    return lambda *given: make(*given).requires_grad_(False)


@pytest.mark.parametrize("case, dtype", in_turn(DENSE, (*DTYPES, torch.float16)), ids=str)
def test_every_family_in_peft(case, dtype, tmp_path):
    if case == "t5" and dtype is torch.float16:
        pytest.skip("T5 of transformers keeps some weights in float32 there")
    live(Subject(partial(frozen(model_of), case, dtype), ratios_for(case, ALL_RATIOS), is_exact=True), Peft(), tmp_path)


@pytest.mark.parametrize("case", ("mixtral", "qwen3-moe"))
def test_experts_in_peft(case, tmp_path):
    config = dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ratio=0.2)
    live(Subject(partial(model_of, case), config), Peft(), tmp_path)


@pytest.mark.parametrize("kind, dim", [(kind, dim) for kind in MODULES for dim in ("inputs", "outputs")])
def test_modules_of_no_family_in_peft(kind, dim, tmp_path):
    config = dict(target_modules=["0"], ratio=0.4, dim=dim)
    make, x = partial(net_of, kind), MODULES[kind]()[1]
    live(Subject(frozen(make), config, lambda model: model(x), is_exact=True), Peft(), tmp_path)


@pytest.mark.parametrize("kind", rest_slow(KINDS, set(KINDS) - {*RARE, "torchao-int4"}))
def test_quantized_weights_in_peft(kind, tmp_path):
    subject = Subject(
        lambda: prepare_model_for_kbit_training(quantized(kind), use_gradient_checkpointing=False),
        dict(o_ratio=0.5, u_ratio=0.2, d_ratio=0.2),
        forward,
        is_quantized=True,
    )
    live(subject, Peft(), tmp_path)


# ---- compiled ------------------------------------------------------------------------------------------


def shortened(model):
    """One block of a model is enough, and is compiled sooner."""
    del model.model.layers[1:]
    model.config.num_hidden_layers, model.config.use_cache = 1, False
    return model


SHORT_LLAMA = Subject(lambda: shortened(model_of("llama-grouped")), ratios_for("llama-grouped", ALL_RATIOS))
BOTH_SIDES = dict(o_ratio=0.5, u_ratio=0.2, layout="indexed", ffn_kernel=False)
COMPILED = {
    **{kind: (Native(), Subject(lambda kind=kind: shortened(quantized(kind)), BOTH_SIDES, forward)) for kind in KINDS},
    "own forward": (Native(), OWN_FORWARD),
    "PEFT": (Peft(), SHORT_LLAMA),
}


@pytest.mark.parametrize("name", rest_slow(COMPILED, ("nf4", "PEFT")))
def test_one_graph_has_the_gradients_of_the_model_that_is_not_compiled(name):
    torch._dynamo.reset()
    way, subject = COMPILED[name]
    model, found = way.attach(subject.make(), subject).train(), []
    # PEFT's weights hold base + delta after a forward that is not compiled: then the graph would break
    for called in (torch.compile(model, fullgraph=name != "own forward", backend="aot_eager"), model):
        model.zero_grad()
        subject.run(called).square().mean().backward()
        found.append([parameter.grad for parameter in slices(model).values()])
    assert all(gradient.any() for gradient in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)
