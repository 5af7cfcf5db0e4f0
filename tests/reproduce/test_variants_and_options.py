"""What a run trains is resolved before it, and mistakes in options, data and questions are found before it."""

import json

import pytest
import torch
from support.models import model_of

import s2ft
from s2ft.cli.main import main
from s2ft.reproduce.best import KeepBest
from s2ft.reproduce.experiment import run_recipe
from s2ft.reproduce.judge import read_questions
from s2ft.reproduce.methods import prepare
from s2ft.reproduce.recipe import read_recipe
from s2ft.reproduce.smoke import smoke_data, smoke_model
from s2ft.reproduce.trial import float32_weights, load
from s2ft.reproduce.variants import check_variants, resolve, trained_parameters


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return smoke_model(tmp_path_factory.mktemp("tiny"))


VARIANTS = {
    "s2ft": {"method": "s2ft", "options": {"d_ratio": 0.5}},
    "by activation": {"method": "s2ft", "options": {"d_ratio": 0.5, "selection": "activation", "order": "smallest"}},
    "lora": {"method": "lora", "learning_rate": [1e-4, 1e-3]},
    "full": {},
}


@pytest.mark.parametrize("method,options", [
    ("s2ft", {"d_ratio": 0.1, "o_ratio": 0.25}),
    ("s2ft", {"d_ratio": 0.1, "allocation": "global"}),
    ("s2ft", {"d_ratio": 0.3, "selection": "weight", "order": "smallest"}),
    ("lora", {"r": 4}),
    ("dora", {"r": 4}),
    ("rslora", {"r": 4}),
    ("shira", {"r": 4}),
    ("miss", {"r": 4}),
    ("full", {}),
])  # fmt: skip
def test_the_number_of_parameters_is_known_before_the_model_is_loaded(method, options):
    with torch.device("meta"):
        hollow = type(model_of("llama"))(model_of("llama").config)
    assert trained_parameters(hollow, method, options) == prepare(model_of("llama"), method, options).trainable


def test_variants_can_train_the_same_number_of_parameters(tiny):
    variants = check_variants(VARIANTS)
    free, equal = resolve(tiny, variants), resolve(tiny, variants, variants["s2ft"])
    assert free["s2ft"]["parameters"] == 2 * 32 * 32 == equal["s2ft"]["parameters"]
    assert free["by activation"]["parameters"] == equal["by activation"]["parameters"]
    assert equal["lora"]["parameters"] <= 2048 < free["lora"]["parameters"]
    assert equal["lora"]["options"]["r"] == 2 and equal["lora"]["options"]["lora_alpha"] == 4
    assert equal["full"]["parameters"] == free["full"]["parameters"] > 20_000
    assert equal["lora"]["learning_rate"] == [1e-4, 1e-3]


def test_methods_are_chosen_by_name_or_method():
    assert list(check_variants(VARIANTS, ["s2ft"])) == ["s2ft", "by activation"]
    assert list(check_variants(VARIANTS, ["by activation", "full"])) == ["by activation", "full"]


@pytest.mark.parametrize(
    "variants,message",
    [
        ({"a": {"method": "lroa"}}, "variant a: there is no method 'lroa'; did you mean lora"),
        ({"a": {"method": "s2ft", "option": {}}}, "variant a: there is no 'option'; did you mean options"),
        ({"a": 3}, "variant a must hold lines"),
        ({"full": {"options": 3}}, "variant full: options must hold lines"),
        ({"full": {"learning_rate": 0}}, "variant full: learning_rate must be positive"),
        ({"full": {"learning_rate": []}}, "variant full: learning_rate must be positive"),
    ],
)
def test_wrong_variants(variants, message):
    with pytest.raises(ValueError, match=message):
        check_variants(variants)
    with pytest.raises(ValueError, match="there is no variant or method 'dora' in this recipe: it has s2ft"):
        check_variants(VARIANTS, ["dora"])


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"variants.s2ft.options.d_raito": 0.1}, "variant s2ft: an option is no field of S2FTConfig"),
        ({"variants.s2ft.options": {"d_ratio": 0.001}}, "variant s2ft: d_ratio=0.001 selects none"),
        ({"variants.lora.options": {"rank": 3}}, "variant lora: method lora does not take an option"),
        ({"tests": ["nosuch"]}, "'nosuch' is neither a suite"),
        ({"tests": "mine.json"}, "'mine.json' is neither a suite"),
        ({"train": "nosuch.json"}, "train: there is no file .*nosuch.json"),
        ({"data": "nosuch"}, "data nosuch is no folder"),
        ({"questions": "nosuch"}, "questions: there is no file"),
        ({"learning_rate": [0.0]}, "learning_rate must be positive"),
        ({"betas": [0.9]}, "betas must be two numbers"),
        ({"validation_rows": 0}, "best needs held-out rows: set validation_rows"),
        ({"eval_steps": None}, "best needs evaluations: set eval_steps"),
        ({"eval_from": 1.0}, "eval_from must be a share"),
        ({"equal_to": "s2f"}, "equal_to: there is no 's2f'; did you mean s2ft"),
        ({"tests": [], "validation_rows": 0, "best": False, "eval_steps": None}, "nothing would be measured"),
        ({"schedule": "linaer"}, "schedule must be one of linear"),
        ({"model": "no/such/model/here"}, "no/such/model/here"),
    ],
)
def test_mistakes_are_found_before_a_model_is_trained(tmp_path, settings, message, monkeypatch):
    monkeypatch.setattr("s2ft.reproduce.studies.accuracy.measure", lambda *arguments: pytest.fail("a run began"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_recipe(read_recipe("commonsense"), tmp_path / "out", settings, smoke=True)
    assert not list(tmp_path.glob("out/runs"))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["reproduce"], "name a recipe: "),
        (["reproduce", "comonsense"], "did you mean commonsense"),
        (["reproduce", "commonsense", "--set", "epochs"], "--set must be NAME=VALUE"),
        (["reproduce", "commonsense", "--set", "epoch=1"], "there is no 'epoch'; did you mean epochs"),
        (["reproduce", "commonsense", "--method", "galore"], "no variant or method 'galore'"),
        (["reproduce", "commonsense"], "--data names the folder of the data files"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_list_and_the_options(capsys):
    assert main(["reproduce", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in ("commonsense", "arithmetic", "instruction", "selection", "projections"):
        assert f"{name}: " in printed
    assert main(["reproduce", "arithmetic", "--options", "--set", "epochs=1"]) == 0
    printed = capsys.readouterr().out
    assert "\nepochs: 1.0\n" in printed and "# rows of an update\nbatch_size: 64\n" in printed


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "is empty"),
        ("{", "line 1: not JSON"),
        ('{"question_id": 1}', "line 1: needs question_id and a list turns"),
        ('{"turns": ["a"]}', "line 1: needs question_id"),
        ("[]", "line 1: needs question_id"),
        ('{"question_id": 1, "turns": []}', "line 1: needs question_id"),
        ('\n{"question_id": 1, "turns": [3]}', "line 2: turns must be texts"),
    ],
)
def test_questions_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize("method", ("s2ft", "lora", "full"))
def test_the_best_parameters_are_put_back_bit_for_bit(method):
    model = prepare(model_of("llama"), method, {"d_ratio": 0.1} if method == "s2ft" else None).model
    keeper = KeepBest(model)
    assert keeper.restore() is None
    wanted, state = None, type("State", (), {"global_step": 0})()
    for step, loss in ((80, 2.0), (160, 1.0), (240, 1.0), (320, float("nan")), (400, 3.0)):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        state.global_step = step
        keeper.on_evaluate(None, state, None, {"eval_loss": loss})
        if step == 160:
            wanted = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert keeper.restore() == 160 and keeper.loss == 1.0
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())


def test_the_model_of_smoke_runs_is_always_the_same(tmp_path):
    first, second = (smoke_model(tmp_path / name) for name in "ab")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "llama" and first != second
    assert s2ft.text.models.load_model(first)[0].num_parameters() < 50_000


def test_full_fine_tuning_of_bfloat16_weights_keeps_float32_ones(tmp_path):
    """Small updates are not lost, and the scored weights are the float32 ones, rounded once."""
    settings = {"methods": ["full"], "seeds": [0], "dtype": "bfloat16", "learning_rate": 1e-5, "tests": []}
    settings |= {"score_base": False, "questions": None, "kl": False, "other_text": None, "eval_steps": None}
    recipe, losses = read_recipe("instruction"), {}
    for name, more in (("float32", {}), ("bfloat16", {"full_in_float32": False})):
        found = run_recipe(recipe, tmp_path / name, {**settings, **more, "max_steps": 12, "epochs": 1}, smoke=True)
        assert found.failed == []
        losses[name] = found.runs[0].rows[0]
        assert len(list((tmp_path / name).glob("runs/*/log.jsonl"))) == 1
    assert losses["float32"]["held_out_loss"] != losses["bfloat16"]["held_out_loss"]


def test_float32_weights_are_rounded_back_and_buffers_stay():
    model = model_of("llama").to(torch.bfloat16)
    model.register_buffer("frequencies", torch.rand(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with float32_weights(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        with torch.no_grad():
            model.lm_head.weight.add_(1e-6)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)


def test_float16_is_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match="train in bfloat16 or float32, and the weights are float16"):
        load(tiny, "float16", "alpaca")


def test_a_warm_up_that_is_longer_than_the_run_is_an_error(tmp_path):
    settings = {"methods": ["s2ft"], "seeds": [0], "warmup_steps": 100}
    found = run_recipe(read_recipe("arithmetic"), tmp_path / "out", settings, smoke=True)
    assert "warmup_steps 100 must be below the number of updates, and 32 rows are 4" in found.failed[0].error


def test_questions_of_the_tests_in_the_training_data_are_counted(tmp_path, caplog):
    smoke_data(tmp_path / "data")
    rows = json.loads((tmp_path / "data" / "dataset" / "AddSub" / "test.json").read_text())
    train = json.loads((tmp_path / "data" / "ft-training_set" / "math_10k.json").read_text())
    leaked = [rows[0], {**rows[1], "instruction": rows[1]["instruction"] + " "}]
    (tmp_path / "train.json").write_text(json.dumps([*train, *leaked]))
    settings = {"methods": ["s2ft"], "seeds": [0], "train": [str(tmp_path / "train.json")], "tests": ["AddSub", "AQuA"]}
    found = run_recipe(read_recipe("arithmetic"), tmp_path / "out", settings, smoke=True)
    questions = {row["instruction"] for row in train}
    known = 2 + sum(row["instruction"] in questions for row in rows[2:])
    assert found.runs[0].rows[0]["trained_on_tests"] == known
    assert f"questions of the tests are in the training data: {known} of AddSub" in caplog.text
    assert f"the questions of {known} rows of the tests are in the training data" in found.tables[0].notes


def test_the_plan_is_printed_and_nothing_is_written(tmp_path, capsys, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    smoke_data(tmp_path / "data")
    arguments = ["reproduce", "arithmetic", "--model", tiny, "--data", "data", "--method", "lora", "full", "--dry-run"]
    assert main([*arguments, "--seeds", "7", "--set", "variants.lora.options.r=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "lora rate 0.0002 seed 7: 2,816 parameters, to be made",
        "full rate 1e-05 seed 7: 26,912 parameters, to be made",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert main([*arguments, "--smoke"]) == 2 and "dry_run and smoke exclude" in capsys.readouterr().err
