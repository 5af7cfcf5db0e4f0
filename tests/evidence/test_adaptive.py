"""An adaptive run ends in one ordinary adapter that gives the trained weights bit for bit."""

import pytest
import torch
from support.models import model_of
from train.tiny import tiny_model, tiny_tokenizer

import s2ft
from bench.evidence import adaptive
from bench.evidence.adaptive import batches_of, train_adaptively
from s2ft.reproduce.methods import prepare
from s2ft.reproduce.training import train
from s2ft.train.arguments import SFTArguments
from s2ft.train.demo import problem_set, token_rows
from s2ft.train.output import RunFolder

CONFIG = s2ft.S2FTConfig(d_ratio=0.1, u_ratio=0.05, v_ratio=0.5)


@pytest.fixture(scope="module")
def rows():
    return token_rows(tiny_tokenizer(), problem_set(10, False, 0)).map(
        lambda row: {k: v[:40] + v[-20:] for k, v in row.items()}
    )


def arguments(folder, **more):
    defaults = dict(
        output_dir=str(folder),
        learning_rate=1e-2,
        max_steps=6,
        per_device_train_batch_size=2,
        warmup_steps=2,
        save_steps=0,
        lr_scheduler_type="linear",
    )
    return SFTArguments(**{**defaults, **more})


def run(model, rows, folder, phases=3, config=CONFIG, **more):
    options = {
        name: more.pop(name) for name in ("max_steps", "lr_scheduler_type", "eval_strategy", "packing") if name in more
    }
    return train_adaptively(
        model,
        tiny_tokenizer(),
        rows,
        arguments(folder, **options),
        config,
        RunFolder(folder),
        phases=phases,
        recent=2,
        **more,
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("layout", ("permuted", "indexed"))
def test_the_adapter_gives_the_trained_weights_on_a_fresh_base_bit_for_bit(rows, tmp_path, dtype, layout, monkeypatch):
    merged = []
    merge = s2ft.merge
    monkeypatch.setattr(s2ft, "merge", lambda model: merged.append(weights(merge(model))))
    model = tiny_model(dtype=dtype)
    base = weights(model)
    config = s2ft.S2FTConfig(d_ratio=0.1, u_ratio=0.05, v_ratio=0.5, layout=layout)
    found = run(model, rows, tmp_path, config=config)
    assert len(merged) == 3 and not all(torch.equal(merged[0][name], merged[2][name]) for name in base)
    s2ft.save_adapter(model, tmp_path / "adapter")
    fresh = tiny_model(dtype=dtype)
    s2ft.load_adapter(fresh, str(tmp_path / "adapter"))
    monkeypatch.undo()
    for one in (model, fresh):
        assert all(torch.equal(value, merged[2][name]) for name, value in weights(s2ft.merge(one)).items())
    plain = tiny_model(dtype=dtype)
    s2ft.load_adapter(plain, found.adapter)
    s2ft.set_adapter(plain, None)
    assert all(torch.equal(value, base[name]) for name, value in weights(s2ft.detach(plain)).items())


def test_it_is_trained_on_as_any_adapter(rows, tmp_path):
    model = tiny_model()
    run(model, rows, tmp_path)
    expected = weights(s2ft.merge(model))
    model = tiny_model()
    found = run(model, rows, tmp_path)
    s2ft.detach(model)
    s2ft.load_adapter(model, found.adapter, trainable=True)
    assert s2ft.status(model).trainable == "default"
    assert all(torch.equal(value, expected[name]) for name, value in weights(s2ft.merge(model)).items())


def test_both_sizes_are_reported(rows, tmp_path):
    model = tiny_model()
    found = run(model, rows, tmp_path, selection="random")
    one = s2ft.plan(tiny_model(), CONFIG).trainable
    assert found.slice_parameters == one and all(phase.trained == one for phase in found.phases)
    assert one < found.union_parameters <= 3 * one and found.union_parameters == found.adapter.parameters
    units = sum(units.numel() for units in found.adapter.selection.units.values())
    assert sum(phase.new for phase in found.phases) == units and found.phases[0].again == 0
    assert [phase.steps for phase in found.phases] == [2, 2, 2] and found.trained.steps == 6
    assert [line["step"] for line in found.trained.log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert found.adapter.info["adaptive"]["selection"] == "random"


def test_one_phase_is_an_ordinary_run(rows, tmp_path):
    model = tiny_model()
    found = run(model, rows, tmp_path, phases=1, max_steps=5)
    plain = tiny_model()
    units = s2ft.select(
        plain, s2ft.S2FTConfig(d_ratio=0.1, u_ratio=0.05, v_ratio=0.5, selection="gradient"), batches_of(rows.take(2))
    )
    prepared = prepare(plain, "s2ft", {"d_ratio": 0.0, "units": units})
    train(prepared, tiny_tokenizer(), rows, arguments(tmp_path, max_steps=5), RunFolder(tmp_path / "plain"))
    assert found.adapter.selection == units and found.slice_parameters == found.union_parameters
    expected = weights(s2ft.merge(plain))
    assert all(torch.equal(value, expected[name]) for name, value in weights(s2ft.merge(model)).items())


@pytest.mark.parametrize("kind", ("linear", "cosine", "constant_with_warmup"))
def test_the_learning_rate_goes_on_over_the_phases(rows, tmp_path, kind):
    rates = []
    for phases in (1, 4):
        model = tiny_model()
        found = run(model, rows, tmp_path / str(phases), phases=phases, lr_scheduler_type=kind, selection="random")
        rates.append([line["learning_rate"] for line in found.trained.log if "loss" in line])
    assert rates[0] == rates[1] and len(rates[0]) == 6


def test_units_are_chosen_by_the_rows_before(rows, tmp_path, monkeypatch):
    seen = []
    choose = adaptive.choose

    def watch(model, name, config, calibration, protect):
        seen.append([batch["input_ids"][0].tolist() for batch in calibration])
        return choose(model, name, config, calibration, protect)

    monkeypatch.setattr(adaptive, "choose", watch)
    run(tiny_model(), rows, tmp_path)  # 6 updates of 2 rows in 3 phases: rows 0 to 3, 4 to 7, 8, 9, 0, 1
    ids = rows["input_ids"]
    assert seen == [[ids[0], ids[1]], [ids[2], ids[3]], [ids[6], ids[7]]]


def test_experts_and_packed_projections(rows, tmp_path):
    for case in ("mixtral", "phi3-grouped"):
        base = model_of(case)
        small = rows.map(lambda row: {name: [i % 67 if i >= 0 else i for i in ids] for name, ids in row.items()})
        config = s2ft.S2FTConfig(d_ratio=0.2, v_ratio=0.5)
        found = run(base, small, tmp_path / case, phases=2, config=config, max_steps=2)
        assert found.union_parameters >= found.slice_parameters > 0
        before = weights(model_of(case))
        assert all(torch.equal(value, before[name]) for name, value in weights(s2ft.detach(base)).items())


def test_a_failure_leaves_the_base(rows, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            begun.append(1)
            if len(begun) == 4:  # in the second phase
                raise OSError("disk full")

    begun = []
    model = tiny_model()
    with pytest.raises(OSError, match="disk full"):
        run(model, rows, tmp_path, callbacks=[Fails()])
    base = weights(tiny_model())
    assert all(torch.equal(value, base[name]) for name, value in weights(model).items())
    s2ft.attach(model, CONFIG)


def test_what_cannot_work_is_refused_before_training(rows, tmp_path):
    for more, message in (
        (dict(phases=7), "phases must be at most 6, got 7"),
        (dict(phases=0), "phases must be a whole number of at least 1, got 0"),
        (
            dict(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps"),
            "depends on more than the number of updates",
        ),
        (dict(selection="nothing"), "name must be one of"),
        (dict(selection="shielded"), "shielded needs protect data"),
    ):
        model = tiny_model()
        with pytest.raises(ValueError, match=message):
            run(model, rows, tmp_path, **more)
        s2ft.attach(model, CONFIG)  # it is as it was
    with pytest.raises(ValueError, match="leave packing out"):
        run(tiny_model(), rows, tmp_path, packing=True)
    with pytest.raises(ValueError, match="rows is empty"):
        run(tiny_model(), rows.select([]), tmp_path)
