"""Training through the codec: the file holds, bit for bit, what the model has computed with."""

import json
import shutil
import statistics
from functools import partial
from unittest import mock

import pytest
import torch
from conversion.test_packed import KINDS, RATIOS, make_base
from support import models
from support.inside import (
    PackedLinear,
    S2FTTrainer,
    TrainedSlices,
    export_packed,
    forwards,
    load_below,
    load_model,
    loss_in_chunks,
    rates,
    record_of,
)
from support.states import merged_state as plain, same, with_adapter, with_loaded
from support.tolerances import GEMM
from transformers import TrainerCallback, TrainingArguments

import s2ft
from s2ft import S2FTConfig
from s2ft.cli.main import main

TOKENS = torch.arange(24).view(2, 12) + 5
INPUTS = {f"{key}_ratio": 0.0 for key in "qkvougd"} | {"i_ratio": 0.5}


def config_of(model, **changes):
    heads = {"o_ratio": 1.0} if model.config.hidden_size == 32 else {}  # heads of 8 in groups of 32
    return S2FTConfig(**{**RATIOS, "codec": "auto", **heads, **changes})


def attached(file, dtype="bfloat16", **changes):
    model = load_model(str(file), dtype)[0]
    return with_adapter(model, config_of(model, **changes))


def load_plain(file):
    """The same model with the same units, trained without the codec."""
    return attached(file, "float32", layout="indexed", group=None, codec="none")


def exported(model, base, folder, dtype):
    """The model of the file that an export of the adapter writes."""
    s2ft.save_adapter(model, folder / "adapter")
    export_packed(str(base), folder / "adapter", folder / "tuned.gguf")
    return load_model(str(folder / "tuned.gguf"), dtype)[0]


train, fit = (
    partial(function, lr=0.02, loss_of=lambda model: model(input_ids=TOKENS, labels=TOKENS).loss)
    for function in (models.train, models.fit)
)


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    return make_base(tmp_path_factory.mktemp(request.param), request.param, **KINDS[request.param])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("small"), "q4_1")


def test_a_delta_below_half_a_step_gets_lost_and_the_rate_knows_it(base):
    model = attached(base, "float32", layout="indexed", group=None)
    roundings = [mounted.layer.rounding for mounted in record_of(model).mounts.values()]
    for rounding in roundings:
        signs = torch.randn(rounding.base.shape).sign() * rounding.half_step
        little, much = (
            float(((rounding(by * signs) - rounding.base) * signs / signs.square()).mean() / by) for by in (0.1, 6)
        )
        assert abs(little) < 0.4 and 0.5 < much < 1.2, (rounding.codec.name, little, much)
    half = statistics.median(rounding.half_step for rounding in roundings)
    by_rule, least = s2ft.suggested_rate(load_plain(base), 30), rates.rate_for_file(half, 30)
    assert s2ft.suggested_rate(model, 30) == max(by_rule, least)
    assert rates.rate_for_file(half, 300) < least


@pytest.mark.parametrize(("layout", "ratios"), [("permuted", {}), ("indexed", {}), ("indexed", INPUTS)])
def test_the_merged_file_is_what_training_multiplied_by(base, tmp_path, layout, ratios):
    dtype = "float32" if layout == "indexed" else "bfloat16"
    rtol, atol = GEMM[getattr(torch, dtype)]
    model = attached(base, dtype, layout=layout, **ratios)
    slices = TrainedSlices.of(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    sent = slices.buffer()
    logits = model(input_ids=TOKENS).logits
    tuned, trained = exported(model, base, tmp_path, dtype), plain(model)
    assert all(torch.equal(value, trained[name]) for name, value in tuned.state_dict().items())
    for spec, values in zip(slices.specs, sent.split([spec.numel for spec in slices.specs])):
        assert torch.equal(trained[spec.name].index_select(spec.dim, spec.index), values.view(spec.values_shape))
    before = load_model(str(base), dtype)[0].state_dict()
    assert sum(not torch.equal(value, before[name]) for name, value in trained.items()) > 10
    torch.testing.assert_close(tuned(input_ids=TOKENS).logits, logits, rtol=rtol, atol=atol)


def test_the_gradient_is_that_of_the_multiplied_weight(small):
    """Straight-through: the gradient of s2 is the one that a plain model with the same weights has."""
    model = fit(attached(small, "float32", layout="indexed"), 1)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    other = load_model(str(small), "float32")[0]
    other.load_state_dict(plain(model))
    other(input_ids=TOKENS, labels=TOKENS).loss.backward()
    delta = s2ft.get_adapter(model, "default").deltas["model.layers.1.mlp.down_proj"]
    gradient = other.model.layers[1].mlp.down_proj.weight.grad.index_select(1, delta.index)
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj.s2.grad, gradient)


def test_the_base_comes_back_and_training_goes_on(small, tmp_path):
    model = load_model(str(small), "bfloat16")[0]
    base = {name: value.clone() for name, value in model.state_dict().items()}
    with_adapter(model, config_of(model))(input_ids=TOKENS)
    assert same(plain(model), base)  # without an update the base is computed with
    train(model, 2)
    s2ft.save_adapter(model, tmp_path / "adapter")
    logits = model(input_ids=TOKENS).logits
    again = with_loaded(load_model(str(small), "bfloat16")[0], tmp_path / "adapter", trainable=True)
    assert torch.equal(again(input_ids=TOKENS).logits, logits)
    assert same(s2ft.detach(model), base)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_layers_that_keep_their_blocks_train_as_unpacked_ones(base, tmp_path, dtype):
    one, two = attached(base, dtype, layout="indexed"), load_model(str(base), dtype, keep_packed=True)[0]
    kept = sum(isinstance(layer, PackedLinear) for layer in two.modules())
    other = load_model(str(base), dtype, keep_packed=True, attn_implementation="eager")[0]
    assert other.config._attn_implementation == "eager"
    assert kept >= 14 and s2ft.estimate(two, config_of(two, layout="indexed"), 1, 8).peak
    two = with_adapter(two, config_of(two, layout="indexed"))
    ours, theirs = train(two), train(one)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-2) and ours[-1] < ours[0]
    tuned = exported(two, base, tmp_path, "float32")
    for path, layer in two.named_modules():
        if getattr(layer, "rounding", None) is not None:
            weight = layer.kind.matrix(layer)
            weight.index_add_(
                layer.dim, layer.selected_units(), (layer.rounding(layer.s2) - layer.rounding.base).detach()
            )
            assert torch.equal(weight, tuned.get_submodule(path).weight), path


def test_layers_that_keep_their_blocks_compile_without_a_graph_break(tmp_path):
    base = make_base(tmp_path, "q4_1", num_hidden_layers=1)
    model = load_model(str(base), "bfloat16", keep_packed=True)[0]
    model = with_adapter(model, config_of(model, layout="indexed"))
    logits = torch.compile(model, backend="eager", fullgraph=True)(TOKENS).logits
    assert torch.allclose(logits, model(TOKENS).logits)
    logits.sum().backward()


def test_training_begins_without_rounding_and_ends_with_it(small, tmp_path):
    model, shares = attached(small, "float32"), []
    rounding = next(layer.rounding for layer in model.modules() if hasattr(layer, "s2"))

    class Note(TrainerCallback):
        def on_step_begin(self, *arguments, **options):
            shares.append(rounding.share)

        def on_prediction_step(self, *arguments, **options):
            assert rounding.share == 1

    rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 40
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=10,
        use_cpu=True,
        report_to="none",
        learning_rate=0.01,
        eval_strategy="steps",
        eval_steps=5,
    )
    trainer = S2FTTrainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2], callbacks=[Note()])
    trainer.train()
    assert shares == pytest.approx([0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]) and rounding.share == 1
    tuned, trained = exported(model, small, tmp_path, "float32"), plain(model)
    assert all(torch.equal(value, trained[name]) for name, value in tuned.state_dict().items())
    with mock.patch.object(trainer, "compute_loss", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert rounding.share == 1  # also after an error
    s2ft.set_rounding(model, 0)
    whole = s2ft.get_adapter(model, "default")
    assert same(plain(model), s2ft.merge(with_loaded(load_model(str(small), "float32")[0], whole)))
    with pytest.raises(ValueError, match="share must be between 0 and 1, got 2"):
        s2ft.set_rounding(model, 2)
    s2ft.merge(model), trainer.remove_callback(Note)
    assert trainer.evaluate()["eval_loss"] > 0


def test_an_adapter_that_ends_its_training_computes_what_the_file_holds(small, tmp_path):
    model = fit(attached(small, "float32"), 2)
    before, above = model(TOKENS).logits, load_model(str(small), "float32")[0]
    s2ft.save_adapter(model, tmp_path)
    s2ft.freeze_adapter(model)
    load_below(above, [str(tmp_path)], "above")
    for one in (model, above):
        torch.testing.assert_close(one(TOKENS).logits, before, rtol=1e-5, atol=1e-6)


def test_a_loaded_adapter_stays_in_the_units_that_are_trained_through_the_codec(small):
    other = s2ft.get_adapter(fit(attached(small, "float32", codec="none"), 2), "default")
    model = fit(attached(small, "float32"), 3)
    alone, base = plain(model), load_model(str(small), "float32")[0].state_dict()
    s2ft.load_adapter(model, other, "other", active=False)
    s2ft.set_adapter(model, {"default": 1.0, "other": 1.0})
    theirs = plain(with_loaded(load_model(str(small), "float32")[0], other))
    for name, value in plain(model).items():
        torch.testing.assert_close(value, alone[name] + theirs[name] - base[name], rtol=1e-5, atol=1e-6)
    s2ft.set_adapter(model, "default")
    assert same(plain(model), alone)


def test_a_folder_with_one_file_is_that_file(small, tmp_path):
    shutil.copy(small, tmp_path / "model.gguf")
    assert attached(tmp_path, "float32").model.layers[0].mlp.down_proj.rounding is not None
    shutil.copy(small, tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="several GGUF files"):
        attached(tmp_path, "float32")


def test_a_merge_that_is_interrupted_leaves_the_adapter(small, monkeypatch):
    model, base = fit(attached(small, "float32"), 2), load_model(str(small), "float32")[0].state_dict()
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(forwards, "clear_record", mock.Mock(side_effect=KeyboardInterrupt))
        s2ft.merge(model)
    assert s2ft.status(model).active == {} and s2ft.list_adapters(model) == ["default"]
    assert all(torch.equal(value, base[name]) for name, value in s2ft.detach(model).state_dict().items())


def test_auto_is_nothing_for_a_plain_base(small):
    model = attached(small.parent / "checkpoint", "float32", layout="indexed")
    assert {layer.rounding for layer in model.modules() if hasattr(layer, "s2")} == {None}


@pytest.mark.parametrize("config, said", [({}, 0), ({"group": 16}, 1), ({"group": None, "o_ratio": 0.0}, 1)])
def test_scales_that_stay_are_said_once(small, caplog, config, said):
    attached(small, **config)
    assert [record.getMessage().count("group=32") for record in caplog.records if "scales" in record.msg] == [1] * said


PLANS = {
    "--group 32": "Q4_1 in 2 weights, such as model.layers.0.mlp.down_proj: one scale for 32 inputs, which changes",
    "--group 16": "one scale for 32 inputs, which stays where some are trained; --group 32 trains all",
    "--u-ratio 0.5 --d-ratio 0": "which changes with them",
    "--i-ratio 0.5 --d-ratio 0": "--group 32 trains all",
}


def test_plan_and_estimate_know_the_blocks(small, capsys):
    packed, config = load_model(str(small), keep_packed=True)[0], S2FTConfig(d_ratio=0.5, layout="indexed")
    peak = s2ft.estimate(packed, config, 1, 8, loss=loss_in_chunks, use_cache=False, device="cpu").peak
    words = [str(small), "--d-ratio", "0.5", "--ratios", "0.5"]
    sizes = ["--batch-size", "1", "--max-length", "8", "--device", "cpu", "--json"]
    assert main(["estimate", *words, "--keep-packed", *sizes]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["peak"] == peak
    for options, said in PLANS.items():
        assert main(["plan", *words, "--codec", "auto", *options.split()]) == 0 and said in capsys.readouterr().out


@pytest.mark.parametrize(
    "mistake, error, words",
    [
        ("changed", ValueError, "codec: the weight of model.layers.1.mlp.down_proj is not that of .*model.gguf"),
        ("gone", FileNotFoundError, "model.gguf"),
    ],
)
def test_a_base_that_is_not_the_files_is_refused_and_nothing_is_attached(small, tmp_path, mistake, error, words):
    model = load_model(shutil.copy(small, tmp_path / "model.gguf").as_posix(), "float32")[0]
    if mistake == "changed":
        model.model.layers[1].mlp.down_proj.weight.data[3] += 1e-3
    else:
        (tmp_path / "model.gguf").unlink()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=words):
        s2ft.attach(model, config_of(model))
    assert same(model, before)


def test_a_diverged_slice_is_seen(small):
    model = attached(small, "float32")
    torch.nn.init.constant_(model.model.layers[0].mlp.down_proj.s2, float("nan"))
    assert model(input_ids=TOKENS).logits.isnan().all()


def test_the_demo_ends_in_a_file(tmp_path):
    base = make_base(tmp_path, "q4_1", max_position_embeddings=1024)
    demo = "--steps 2 --batch-size 2 --held-out 1 --max-new-tokens 2 --d-ratio 0 --o-ratio 0.5 --keep-quantized"
    assert main(["demo", "--model", str(base), "--output", str(tmp_path / "demo"), *demo.split()]) == 0
    assert (tmp_path / "demo/tuned.gguf").read_bytes() != base.read_bytes()
    deltas = s2ft.read_adapter(tmp_path / "demo").deltas
    assert deltas and all(name.endswith("o_proj") for name in deltas)  # a ratio of 0 is no default
