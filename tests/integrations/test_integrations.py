"""S²FT inside other programs. TRL is installed here; the other programs are replaced by modules with their interfaces.

``make test-integrations`` runs the real programs, see run.py.
"""

import importlib
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from support.inside import ADAPTER_FORMATS, config_from, main as print_path
from train.tiny import save_tiny, tiny_model

import s2ft
from s2ft import read_adapter
from s2ft.peft import S2FTPeftConfig, to_native

SETTINGS = {"d_ratio": 0.25, "seed": 3}


@pytest.fixture
def fake(monkeypatch):
    """Adds modules with the given names to those that can be imported, and imports one of s2ft.integrations anew."""

    def modules(name, **contents):
        for path, values in contents.items():
            module = ModuleType(path.replace("__", "."))
            module.__path__ = []
            module.__dict__.update(values)
            monkeypatch.setitem(sys.modules, module.__name__, module)
            parent, _, last = module.__name__.rpartition(".")
            if parent:
                monkeypatch.setattr(sys.modules[parent], last, module, raising=False)
        monkeypatch.delitem(sys.modules, f"s2ft.integrations.{name}", raising=False)
        return importlib.import_module(f"s2ft.integrations.{name}")

    yield modules
    for name in ("axolotl", "ms_swift", "llamafactory"):
        sys.modules.pop(f"s2ft.integrations.{name}", None)


# ---- the saved adapter ---------------------------------------------------------------------------------


def test_a_folder_of_peft_becomes_an_adapter_of_s2ft_and_back(tmp_path):
    """Bit for bit, and the base stays as it was."""
    base = tiny_model()
    before, modes = (
        {name: p.clone() for name, p in base.named_parameters()},
        [p.requires_grad for p in base.parameters()],
    )
    trained = get_peft_model(tiny_model(), S2FTPeftConfig(**SETTINGS, init_weights=False))
    trained.save_pretrained(tmp_path / "peft")
    form = ADAPTER_FORMATS["peft"].module
    assert form.matches(tmp_path / "peft") and not ADAPTER_FORMATS["lora"].module.matches(tmp_path / "peft")
    read = form.read(tmp_path / "peft", base, "math")
    assert read.name == "math" and [p.requires_grad for p in base.parameters()] == modes
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    expected = to_native(trained)
    assert_equal(read, expected)
    form.write(read, tmp_path / "again", base)
    assert_equal(form.read(tmp_path / "again", base), expected)
    s2ft.load_adapter(base, read)
    for model in (None, base):
        with pytest.raises(ValueError, match="s2ft export --from-peft .*again --model BASE --output ADAPTER makes"):
            form.read(tmp_path / "again", model)
    with pytest.raises(ValueError, match="--from-peft"):
        read_adapter(tmp_path / "again")


def assert_equal(ours, theirs):
    assert ours.deltas.keys() == theirs.deltas.keys() and len(ours.deltas) == 2
    for name, delta in ours.deltas.items():
        assert delta.values.any() and torch.equal(delta.index, theirs.deltas[name].index)
        assert torch.equal(delta.values, theirs.deltas[name].values)
    assert ours.extra_weights.keys() == theirs.extra_weights.keys()
    assert all(torch.equal(value, theirs.extra_weights[name]) for name, value in ours.extra_weights.items())


# ---- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "s2ft must say what is trained, for example s2ft: {d_ratio: 0.03}, got None"),
        ({}, "s2ft must say what is trained"),
        ("d_ratio", "got 'd_ratio'"),
        ({"d_ratoi": 0.1}, "s2ft has no setting 'd_ratoi'; the nearest one is d_ratio"),
        ({"layout": "permuted"}, "s2ft has no setting 'layout'"),
        ({"d_ratio": 2}, "s2ft: d_ratio must be a number from 0 to 1, got 2"),
        ({"seed": 3}, "s2ft: nothing is selected"),
    ],
)
def test_wrong_settings_are_refused_with_their_place(settings, message):
    with pytest.raises(ValueError) as raised:
        config_from(settings, "s2ft")
    assert message in str(raised.value)


# ---- TRL -----------------------------------------------------------------------------------------------


@pytest.fixture
def trl_run(tmp_path):
    save_tiny(tmp_path / "base", tie_word_embeddings=False)
    (tmp_path / "data").mkdir()
    rows = [{"text": f"{a}+{a % 3}={a + a % 3}"} for a in range(8)]
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": str(tmp_path / "base"),
        "dataset_name": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "lora_modules_to_save": ["model.norm"],
        "s2ft": SETTINGS,
    }
    return config, tmp_path


def test_trl_trains_the_adapter_that_an_attached_model_gets_in_its_trainer(trl_run, monkeypatch):
    """Bit for bit. The layout of PEFT's form is indexed, and it has no kernel of the whole FFN."""
    import trl
    from datasets import load_dataset
    from support.inside import trl_main as main

    monkeypatch.setattr(trl, "get_peft_config", trl.get_peft_config)  # is put back after the test
    config, folder = trl_run
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    main(["sft", "--config", str(folder / "run.yaml")])
    base = tiny_model(tie_word_embeddings=False)
    trained = PeftModel.from_pretrained(base, folder / "out")
    assert type(trained.peft_config["default"]) is S2FTPeftConfig
    theirs = to_native(trained)
    model = tiny_model(tie_word_embeddings=False)
    s2ft.attach(model, s2ft.S2FTConfig(**SETTINGS, layout="indexed", ffn_kernel=False, modules_to_save=["model.norm"]))
    for name in ("model_name_or_path", "dataset_name", "lora_modules_to_save", "s2ft"):
        del config[name]
    rows = load_dataset(str(folder / "data"), split="train")
    arguments = trl.SFTConfig(**{**config, "output_dir": str(folder / "attached")})
    tokenizer = __import__("transformers").AutoTokenizer.from_pretrained(folder / "base")
    trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    ours = s2ft.get_adapter(model, "default")
    assert_equal(ours, theirs)
    assert len(ours.extra_weights) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "s2ft must say what is trained"),
        (["--s2ft", "d_ratio=0.1"], "--s2ft must be JSON such as '{\"d_ratio\": 0.03}', got 'd_ratio=0.1'"),
        (["--s2ft", '{"ratoi": 0.1}'], "the nearest one is ratio"),
    ],
)
def test_trl_says_what_is_wrong_with_the_settings_before_it_loads_a_model(options, message, tmp_path):
    from support.inside import trl_main as main

    with pytest.raises(ValueError) as raised:
        main(["sft", "--model_name_or_path", "none", "--output_dir", str(tmp_path / "out"), "--use_cpu", *options])
    assert message in str(raised.value) and not (tmp_path / "out").exists()


# ---- Axolotl -------------------------------------------------------------------------------------------


class Settings(dict):
    """Axolotl's DictDefault: a key that is missing is None."""

    def __getattr__(self, name):
        return self.get(name)


@pytest.fixture
def axolotl(fake):
    base = {"BasePlugin": type("BasePlugin", (), {}), "AdapterCapabilities": lambda name: SimpleNamespace(name=name)}
    return fake("axolotl", axolotl={}, axolotl__integrations={}, axolotl__integrations__base=base)


def test_axolotl_adds_and_loads_the_adapter(axolotl, tmp_path):
    plugin = axolotl.S2FTPlugin()
    assert plugin.get_input_args() == "s2ft.integrations.axolotl.S2FTArgs"
    assert [one.name for one in plugin.get_adapter_capabilities()] == ["s2ft"]
    cfg = Settings(adapter="s2ft", s2ft=SETTINGS, lora_modules_to_save=["model.norm"])
    model, config = plugin.load_adapter(tiny_model(), cfg)
    assert config.ratios == {} and config.units and config.modules_to_save == ["model.norm"]  # the units are selected
    assert config.task_type == "CAUSAL_LM" and model.get_nb_trainable_parameters()[0] > 0
    model.save_pretrained(tmp_path / "saved")
    cfg["lora_model_dir"] = str(tmp_path / "saved")
    loaded, _ = plugin.load_adapter(tiny_model(), cfg, inference=True)
    assert not any(one.requires_grad for one in loaded.parameters())
    again, _ = plugin.load_adapter(tiny_model(), cfg)
    assert any(one.requires_grad for one in again.parameters())
    none, config = plugin.load_adapter(tiny_model(), cfg, config_only=True)
    assert none is None and config.d_ratio == SETTINGS["d_ratio"]
    assert plugin.load_adapter(tiny_model(), Settings(adapter="lora")) is None


def test_axolotl_checks_its_file(axolotl):
    check = axolotl.S2FTArgs.check_s2ft
    assert check({"adapter": "s2ft", "s2ft": SETTINGS})["merge_method"] == "legacy"
    assert "merge_method" not in check({"adapter": "lora"})
    for data, message in (
        ({"adapter": "lora", "s2ft": SETTINGS}, "adapter is 'lora'"),
        ({"adapter": "s2ft"}, "s2ft must say what is trained"),
        ({"adapter": "s2ft", "s2ft": SETTINGS, "load_in_4bit": True}, "load_in_4bit and adapter: s2ft exclude"),
        ({"adapter": "s2ft", "s2ft": SETTINGS, "merge_method": "memory_efficient"}, "merges LoRA only"),
    ):
        with pytest.raises(ValueError, match=message):
            check(data)


# ---- ms-swift ------------------------------------------------------------------------------------------


def test_ms_swift_gets_a_tuner(fake):
    tuners = {}
    module = fake("ms_swift", swift={}, swift__tuner_plugin={"PeftTuner": object, "tuners_map": tuners})
    assert tuners == {"s2ft": module.S2FTTuner}
    for given in ({"s2ft": SETTINGS}, json.dumps({"s2ft": SETTINGS})):
        args = SimpleNamespace(model_kwargs=given, task_type="causal_lm", modules_to_save=[])
        model = module.S2FTTuner.prepare_model(args, tiny_model())
        assert model.peft_config["default"].peft_type == "S2FT" and model.peft_config["default"].task_type
    with pytest.raises(ValueError, match=r'model_kwargs\["s2ft"\] must say what is trained'):
        module.S2FTTuner.prepare_model(
            SimpleNamespace(model_kwargs=None, task_type=None, modules_to_save=[]), tiny_model()
        )


def test_ms_swift_finds_the_package_trl_after_it_has_loaded_the_plugin_by_its_path(fake, capsys, monkeypatch):
    """It puts the plugin's folder first into the path, and that folder has a trl.py."""
    fake("ms_swift", swift={}, swift__tuner_plugin={"PeftTuner": object, "tuners_map": {}})
    print_path(["ms_swift"])
    file = capsys.readouterr().out.strip()
    monkeypatch.setattr(sys, "path", [file.rpartition("/")[0], *sys.path])
    assert importlib.util.find_spec("settings") is not None  # the folder's
    spec = importlib.util.spec_from_file_location("_swift_external", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert importlib.util.find_spec("settings") is None


# ---- LlamaFactory --------------------------------------------------------------------------------------


class PeftPlugin:
    """The registry of LlamaFactory's second version."""

    found: dict = {}

    def __init__(self, name):
        self.name = name

    def register(self):
        return lambda function: self.found.setdefault(self.name, function)


@pytest.fixture
def llamafactory(fake):
    calls = []

    def read():
        return sys.modules["llamafactory.hparams.parser"].read_args()

    def module(given, second=False):
        merged = {
            "PeftPlugin": PeftPlugin,
            "load_adapter": lambda model, path, is_train: calls.append(("load", path, is_train)) or model,
        }
        names = {
            "llamafactory": {},
            "llamafactory__extras": {},
            "llamafactory__extras__misc": {"is_env_enabled": lambda name: second},
            "llamafactory__launcher": {"launch": lambda: calls.append(("launch", read()))},
            "llamafactory__hparams": {},
            "llamafactory__hparams__parser": {"read_args": lambda args: given},
            "llamafactory__model": {},
            "llamafactory__model__adapter": {"LoraConfig": None},
            "llamafactory__train": {},
            "llamafactory__train__tuner": {"run_exp": lambda: calls.append(("train", read()))},
            "llamafactory__v1": {},
            "llamafactory__v1__launcher": {
                "main": lambda: calls.append(("v1", sys.argv[1:])),
                "launch": lambda: calls.append(("v1 launch", sys.argv[1:])),
            },
            "llamafactory__v1__plugins": {},
            "llamafactory__v1__plugins__model_plugins": {},
            "llamafactory__v1__plugins__model_plugins__peft": merged,
        }
        return fake("llamafactory", **names)

    return module, calls


def test_llamafactory_trains_what_its_file_says(llamafactory, monkeypatch):
    module, calls = llamafactory
    monkeypatch.setattr(sys, "argv", ["x"])
    module({"finetuning_type": "s2ft", "s2ft": SETTINGS, "stage": "sft"}).main(["train", "run.yaml"])
    assert calls == [("train", {"finetuning_type": "lora", "stage": "sft"})]
    lora = {
        "r": 8,
        "target_modules": ["q_proj"],
        "lora_alpha": 16,
        "modules_to_save": {"norm"},
        "inference_mode": False,
    }
    config = sys.modules["llamafactory.model.adapter"].LoraConfig(task_type="CAUSAL_LM", **lora)
    assert (config.d_ratio, config.seed, config.modules_to_save) == (0.25, 3, ["norm"])


def test_llamafactory_runs_other_commands_and_files(llamafactory, monkeypatch):
    module, calls = llamafactory
    monkeypatch.setattr(sys, "argv", ["x"])
    module({"finetuning_type": "s2ft", "adapter_name_or_path": "a"}).main(["export", "run.yaml"])
    module({"finetuning_type": "lora"}).main(["train", "run.yaml"])
    module(["--stage", "sft"]).main(["chat"])
    assert calls[0] == ("launch", {"finetuning_type": "lora", "adapter_name_or_path": "a"})
    assert calls[1:] == [("train", {"finetuning_type": "lora"}), ("launch", ["--stage", "sft"])]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"finetuning_type": "lora", "s2ft": SETTINGS}, "finetuning_type is 'lora'"),
        ({"finetuning_type": "s2ft", "do_train": True}, "s2ft must say what is trained"),
        ({"finetuning_type": "s2ft", "s2ft": {"d_rati": 1}}, "the nearest one is d_ratio"),
    ],
)
def test_llamafactory_refuses_wrong_files_before_it_loads_a_model(llamafactory, monkeypatch, given, message):
    module, calls = llamafactory
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ValueError, match=message):
        module(given).main(["train", "run.yaml"])
    assert calls == []


def test_llamafactory_second_version_has_a_plugin(llamafactory, monkeypatch):
    module, calls = llamafactory
    monkeypatch.setattr(sys, "argv", ["x"])
    module(None, second=True).main(["sft", "run.yaml"])
    module(None, second=True).main(["chat", "run.yaml"])
    assert calls == [("v1", ["sft", "run.yaml"]), ("v1 launch", ["chat", "run.yaml"])]
    add = PeftPlugin.found["s2ft"]
    model = add(tiny_model(), {"name": "s2ft", **SETTINGS}, True)
    assert model.peft_config["default"].peft_type == "S2FT"
    base = tiny_model()
    assert add(base, {"name": "s2ft", "adapter_name_or_path": "a"}, False) is base
    assert calls[-1] == ("load", "a", False)
