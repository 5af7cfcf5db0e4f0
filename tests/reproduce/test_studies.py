"""Studies measure what they say: time and memory in processes of their own, exact serving, sums, and restored states."""

import copy
import os
import signal

import pytest
import torch
from support.process_functions import allocate, end, fail, peak_of
from train.tiny import tiny_model

pytest.importorskip("trl")
pytest.importorskip("peft")

import s2ft
from s2ft.reproduce import processes, random_models
from s2ft.reproduce.experiment import run_recipe
from s2ft.reproduce.processes import in_own_process, size_of_process
from s2ft.reproduce.random_models import at_least_one_unit, config_of, random_model
from s2ft.reproduce.recipe import options_of, read_recipe
from s2ft.reproduce.states import differing, save_state
from s2ft.reproduce.studies import efficiency, fusion, sequence, serving
from s2ft.reproduce.tasks import task_data
from s2ft.reproduce.timing import interleaved, milliseconds, ratio
from s2ft.reproduce.trial import load
from s2ft.train.out_of_memory import OutOfMemory

MB = 2**20


def made(name, folder, **settings):
    """A smoke run of a recipe. Returns its experiment."""
    found = run_recipe(read_recipe(name), folder / name, settings, smoke=True)
    assert [run.error for run in found.runs] == [None] * len(found.runs)
    assert all(row for run in found.runs for row in run.rows)
    return found


def options(name, folder, **settings):
    recipe = read_recipe(name)
    kind = {"fusion": fusion, "sequence": sequence}[name].KIND
    return options_of(kind.options, recipe.options, recipe.smoke, kind.smoke(folder), settings)


# ---- processes of their own ----------------------------------------------------------------------------


def test_a_process_of_its_own_returns_raises_and_says_why_it_ended():
    assert in_own_process(allocate, 3) == 3
    with pytest.raises(RuntimeError, match="fail failed in its process:(.|\n)*KeyError: 'no such thing'"):
        in_own_process(fail)
    with pytest.raises(OutOfMemory, match="the system ended the process"):
        in_own_process(end, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="the process of end ended with code -15"):
        in_own_process(end, signal.SIGTERM)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux limits the memory of a process")
def test_memory_is_limited_and_its_peak_is_what_was_allocated():
    assert in_own_process(allocate, 50 * MB, limit_bytes=200 * MB) == 50 * MB
    with pytest.raises(OutOfMemory, match="allocate"):
        in_own_process(allocate, 300 * MB, limit_bytes=200 * MB)
    small, large = (in_own_process(peak_of, size) for size in (MB, 101 * MB))
    assert abs(large - small - 100 * MB) < 2 * MB


def test_sizes_without_proc_are_the_peak(monkeypatch):
    monkeypatch.setattr(processes.Path, "exists", lambda self: False)
    assert MB < size_of_process("VmRSS") <= size_of_process("VmHWM") and processes.free_bytes() is None


# ---- times and random models ---------------------------------------------------------------------------


def test_each_round_runs_all_steps_and_the_order_changes():
    seen = []
    times = interleaved({name: lambda name=name: seen.append(name) for name in "abc"}, rounds=8, warmup=1)
    assert all(len(seconds) == 8 for seconds in times.values())
    rounds = ["".join(seen[start : start + 3]) for start in range(0, 27, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 1
    with pytest.raises(ValueError, match="rounds at least 1, got 1 and 0"):
        interleaved({"a": print}, rounds=0)


def test_medians_and_ratios():
    times = {"a": [2.0, 4.0, 9.0], "b": [1.0, 4.0, 3.0]}
    assert milliseconds(times["a"]) == 4000 and ratio(times, "a", "b") == 2  # the median of 2, 1 and 3


def test_ratios_that_select_nothing_are_raised_to_one_unit():
    hollow = random_model(config_of(efficiency.SMALL), "float32", "meta")
    found = at_least_one_unit(hollow, {"v_ratio": 0.026, "o_ratio": 0.026, "u_ratio": 0.01, "d_ratio": 0.3})
    assert found == {"v_ratio": 0.25, "o_ratio": 0.25, "u_ratio": 0.01, "d_ratio": 0.3}
    plan = s2ft.plan(hollow, s2ft.S2FTConfig(**found))
    assert plan.trainable == 64 * 16 * 2 + 64 * 1 + 64 * 38  # v and o: one head of 16; u: 1 of 128 channels; d: 38


def test_config_of_a_folder_a_file_and_fields(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for source in (str(tmp_path), str(tmp_path / "config.json"), {"model_type": "llama", "hidden_size": 32}):
        assert config_of(source).hidden_size == 32 and config_of(source).architectures == ["LlamaForCausalLM"]
    for wrong, message in (
        ({"hidden_size": 32}, "must have model_type"),
        ({"model_type": "vit"}, "no causal language model of type 'vit'"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(wrong)
    with pytest.raises(FileNotFoundError, match=r"config none.json doesn't exist"):
        config_of("none.json")
    assert random_models.random_model(config_of(str(tmp_path)), "bfloat16").dtype == torch.bfloat16


# ---- efficiency ----------------------------------------------------------------------------------------


def test_smoke_of_efficiency(tmp_path):
    found = made("efficiency", tmp_path)
    rows = {run.labels["method"]: run.rows[0] for run in found.runs}
    assert set(rows) == {"s2ft-paper", "full"}
    for row in rows.values():
        assert row["status"] == "ok" and row["peak_bytes"] > 0 and len(row["steps_ms"]) == 2
        assert all(row[f"{part}_ms"] > 0 for part in ("forward", "backward", "update", "step"))
    assert rows["full"]["trained"] > 10 * rows["s2ft-paper"]["trained"]
    assert [row[:2] for row in found.tables[0].rows] == [[2, 8]]


def test_a_lack_of_memory_is_a_cell(tmp_path):
    settings = {"methods": ["full"], "batches": [2, 200_000], "lengths": [8], "memory": "300MB", "steps": 1}
    found = made("efficiency", tmp_path, **settings)
    latency, memory = found.tables[:2]
    assert [row[2] == "OOM" for row in latency.rows] == [False, True]
    assert [row[2] == "OOM" for row in memory.rows] == [False, True]
    assert "OOM" in latency.text() and [run.status for run in found.runs] == ["done", "done"]


def test_methods_take_turns_and_wrong_options_are_found_before_a_run():
    recipe = read_recipe("efficiency")
    settings = {**recipe.options, **{key: one for key, one in recipe.smoke.items() if key != "methods"}, "rounds": 2}
    runs = efficiency.plan(options_of(efficiency.EfficiencyOptions, settings, {"methods": ["s2ft", "full"]}))
    order = [run.labels["method"] for run in runs]
    assert order == ["s2ft-paper", "s2ft", "full", "s2ft", "full", "s2ft-paper"]
    for change, message in (
        ({"variants.s2ft.options": {"d_ratioo": 1}}, "variant s2ft: .*d_ratioo"),
        ({"variants.lora.options": {"rank": 8}}, "variant lora: .*rank"),
        ({"lengths": [4096]}, "lengths must be at most 2048, the context"),
        ({"batches": []}, "batches must be one or more numbers"),
        ({"memory": "much"}, "memory must be a size"),
        ({"device": "tpu"}, "device must be one of cpu, cuda"),
    ):
        with pytest.raises(ValueError, match=message):
            efficiency.plan(options_of(efficiency.EfficiencyOptions, settings, change))


@pytest.mark.slow
def test_every_variant_of_efficiency_runs(tmp_path):
    methods = list(read_recipe("efficiency").options["variants"])
    found = made("efficiency", tmp_path, methods=methods, dtype="bfloat16")
    assert [run.rows[0]["status"] for run in found.runs] == ["ok"] * 6


# ---- serving -------------------------------------------------------------------------------------------


def test_smoke_of_serving(tmp_path):
    found = made("serving", tmp_path)
    switch, parallel = ([run.rows[0] for run in found.runs if run.labels["measure"] == name] for name in
                        ("switch", "parallel"))  # fmt: skip
    assert all(row["exact"] and row["s2ft_ms"] > 0 and row["lora_ms"] > 0 for row in switch) and len(switch) == 2
    assert all(row["restored"] and row["difference"] < 1e-4 for row in parallel) and len(parallel) == 2


def test_serving_finds_one_changed_bit():
    options = serving.ServingOptions(channels=4, rank=2)
    base = serving.base_of(64, options, "float32")
    adapters = serving.random_adapters(base, 2, 4)
    model = copy.deepcopy(base)
    for adapter in adapters:
        s2ft.load_adapter(model, adapter)
    assert serving._is_exact(model, base, adapters)
    s2ft.set_adapter(model, "1")
    weight = model.model.norm.weight
    weight.data[0] = torch.nextafter(weight.data[0], torch.tensor(9.0))
    assert not serving._is_exact(model, base, adapters)


def test_drift_of_lora_is_the_largest_difference_to_the_base():
    options = serving.ServingOptions(channels=4, rank=2)
    base = serving.base_of(64, options, "bfloat16")
    lora = serving.lora_of(base, 2, 2)
    lora.merge_adapter(["0"])
    lora.base_model.model.model.norm.weight.data[0] += 0.5
    assert serving._drift(lora, base) == 0.5


def test_options_of_serving():
    for change, message in (
        ({"widths": [100]}, "widths must be multiples of 64"),
        ({"numbers": [1]}, "numbers must be one or more numbers of at least 2"),
        ({"measures": ["latency"]}, "measures must be switch or parallel"),
        ({"widths": [64], "channels": 999}, "channels must be at most 176 at width 64"),
    ):
        with pytest.raises(ValueError, match=message):
            serving.ServingOptions(**change)


# ---- fusion --------------------------------------------------------------------------------------------


def test_smoke_of_fusion(tmp_path):
    found = made("fusion", tmp_path)
    rows = {run.labels["pair"]: run.rows for run in found.runs}
    assert [row["weights"] for row in rows["disjoint"]] == ["1, 0", "0, 1", "1, 1", "0.5, 0.5"]
    assert rows["disjoint"][0]["shared"] == 0 and rows["overlapping"][0]["shared"] == 100 and len(rows["base"]) == 1
    assert all({"commonsense", "arithmetic", "average"} <= row.keys() for of in rows.values() for row in of)


def test_the_sum_of_two_loras_is_the_sum_of_their_products(tmp_path):
    chosen = options("fusion", tmp_path, **{"lora.target_modules": ["down_proj"]})
    known = next(run for run in fusion.plan(chosen) if run.labels["pair"] == "lora").configuration
    loaded = load(chosen.model, "float32", chosen.prompt)
    base, seen = copy.deepcopy(loaded.model), {}
    sums = [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)]
    for weights, model, _ in fusion._lora_pair(loaded, chosen, known, sums, tmp_path / "run"):
        layer = model.base_model.model.model.layers[1].mlp.down_proj
        with torch.no_grad():
            inputs = torch.eye(layer.in_features)
            seen[weights] = (layer(inputs) - base.model.layers[1].mlp.down_proj(inputs)).double()
    first, second, both = seen.values()
    assert first.abs().max() > 0 and second.abs().max() > 0 and not torch.equal(first, second)
    torch.testing.assert_close(both, 0.7 * first - 0.3 * second, rtol=1e-4, atol=1e-6)


def test_options_of_fusion(tmp_path):
    for change, message in (
        ({"pairs": ["same"]}, "pairs must be of disjoint, overlapping, lora, got same"),
        ({"weights": [[1, 0]]}, "weights must not be 0"),
        ({"weights": [[1]]}, "weights must be pairs of numbers"),
        ({"learning_rate": {"s2ft": {"arithmetic": 1}}}, "learning_rate.* must have a rate for"),
        ({"tasks": {"a": {"train": "x", "tests": "y"}}}, "tasks must be two, got a"),
        ({"tasks.arithmetic": {"train": "x"}}, "task arithmetic lacks tests"),
        ({"tasks.arithmetic.trian": "x"}, "task arithmetic: there is no 'trian'; did you mean train"),
    ):
        with pytest.raises(ValueError, match=message):
            options("fusion", tmp_path, **change)


# ---- tasks in a row ------------------------------------------------------------------------------------


def test_smoke_of_sequence(tmp_path):
    found = made("sequence", tmp_path)
    rows = {run.labels["method"]: run.rows for run in found.runs}
    assert {name: of[-1].get("restored") for name, of in rows.items()} == {
        "s2ft-disjoint": "5 of 5",
        "lora": None,
        "lora-merged": None,
    }
    for of in rows.values():
        assert [row["after"] for row in of] == ["boolq", "piqa", "arithmetic", "hellaswag", "winogrande"]
        assert [len(row.keys() & {one["after"] for one in of}) for row in of] == [1, 2, 3, 4, 5]
        assert all(row["kl"] > 0 and row["forgetting"] != 0 for row in of)
        assert {"final", "backward_transfer", "own_state"} <= of[-1].keys()
    kept = [path.name for path in (tmp_path / "sequence" / "runs").glob("s2ft*/adapters/*")]
    assert sorted(kept) == sorted(row["after"] for row in rows["lora"])
    assert not list((tmp_path / "sequence").rglob("states"))


def test_transfer_is_computed_from_the_matrix():
    scores = [{"a": 50.0}, {"a": 40.0, "b": 80.0}, {"a": 60.0, "b": 50.0, "c": 70.0}]
    assert sequence.transfer(scores) == {"final": 60.0, "backward_transfer": (10 - 30) / 2, "own_state": 200 / 3}


@pytest.mark.parametrize("change", ["bit", "zero", "dtype", "name"])
def test_every_difference_of_a_state_is_found(change, tmp_path):
    model = tiny_model()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[0, 0] = 0.0
    save_state(model, tmp_path / "state.safetensors")
    assert differing(model, tmp_path / "state.safetensors") == []
    if change == "bit":
        weight.data[3, 3] = torch.nextafter(weight.data[3, 3], torch.tensor(9.0))
    elif change == "zero":
        weight.data[0, 0] = -0.0
    elif change == "dtype":
        model.model.layers[1].mlp.up_proj.to(torch.float64)
    else:
        model.register_buffer("more", torch.ones(1))
    expected = "more" if change == "name" else "model.layers.1.mlp.up_proj.weight"
    assert differing(model, tmp_path / "state.safetensors") == [expected]


def test_a_state_that_is_not_restored_fails_the_run(tmp_path, monkeypatch):
    """The check of the recipe can fail: here an adapter was changed after it was saved."""
    save = s2ft.save_adapter

    def saved(model, folder, name):
        save(model, folder, name)
        adapter = s2ft.read_adapter(folder)
        next(iter(adapter.deltas.values())).values[0, 0] += 1.0
        other = tiny_of(model)
        s2ft.load_adapter(other, adapter)
        save(other, folder, name)

    def tiny_of(model):
        return s2ft.detach(copy.deepcopy(model))

    monkeypatch.setattr(s2ft, "save_adapter", saved)
    settings = {"methods": ["s2ft-disjoint"], "other_text": None}
    found = run_recipe(read_recipe("sequence"), tmp_path / "out", settings, smoke=True)
    assert "is not restored: 1 weights differ, such as model.layers.0.mlp.down_proj.weight" in found.runs[0].error


def test_a_task_takes_the_rows_that_contain_its_text(tmp_path):
    chosen = options("sequence", tmp_path, limit=3)
    loaded = load(chosen.model, "float32", chosen.prompt)
    data = task_data(chosen, "boolq", loaded, 0, tmp_path / "rows")
    texts = [loaded.tokenizer.decode(row["input_ids"]) for row in data.train]
    assert len(texts) == 3 and all("Answer format: true/false" in text for text in texts)
    chosen.tasks["boolq"]["where"] = "nowhere"
    with pytest.raises(ValueError, match="task boolq: no row of .* contains 'nowhere'"):
        task_data(chosen, "boolq", loaded, 0, tmp_path / "rows")


def test_options_of_sequence(tmp_path):
    for change, message in (
        ({"variants.lora.mode": "on_top"}, "variant lora: mode on_top needs method s2ft, got 'lora'"),
        ({"variants.full.mode": "merge"}, "variant full: full fine-tuning has no adapter to merge"),
        ({"variants.lora.mode": "on top"}, "variant lora: mode must be one of on_top, continue, merge"),
        ({"variants.s2ft-disjoint.options": {"d_ratio": 0.3}}, "5 tasks of d_ratio=0.3 on disjoint units are more"),
        ({"equal_to": "dora"}, "equal_to: there is no 'dora'"),
        ({"tasks": {"a": {"train": "x", "tests": "y"}}}, "tasks must be at least two, got a"),
    ):
        with pytest.raises(ValueError, match=message):
            sequence.plan(options("sequence", tmp_path, methods=None, **change))
