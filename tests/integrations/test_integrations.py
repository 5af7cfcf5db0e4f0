"""S²FT inside other programs. TRL is installed here; the other programs are replaced by modules with their interfaces.

``make test-integrations`` runs the real programs, see run.py.
"""

import importlib
import importlib.util
import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from support.inside import ADAPTER_FORMATS, config_from
from support.states import assert_same_adapters, with_adapter
from train.tiny import save_tiny, tiny_model, write_jsonl

import s2ft
from s2ft import read_adapter
from s2ft.peft import S2FTPeftConfig, to_native

SETTINGS = {"d_ratio": 0.25, "seed": 3}


@pytest.fixture
def program(monkeypatch):
    """Adds modules that a program has, by their paths with the names in them, and imports s2ft's module of it anew."""

    def imported(name, modules):
        for path in sorted({one[: end.start()] for one in modules for end in re.finditer(r"\.|$", one)}):
            module = ModuleType(path)
            module.__path__ = []
            module.__dict__.update(modules.get(path, {}))
            monkeypatch.setitem(sys.modules, path, module)
            parent, _, last = path.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, module)
        monkeypatch.delitem(sys.modules, f"s2ft.integrations.{name}", raising=False)
        return importlib.import_module(f"s2ft.integrations.{name}")

    yield imported
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
    assert_same_adapters(read, expected)
    assert len(read.deltas) == 2 and all(delta.values.any() for delta in read.deltas.values())
    form.write(read, tmp_path / "again", base)
    assert_same_adapters(form.read(tmp_path / "again", base), expected)
    s2ft.load_adapter(base, read)
    for model in (None, base):
        with pytest.raises(ValueError, match="s2ft export --from-peft .*again --model BASE --output ADAPTER makes"):
            form.read(tmp_path / "again", model)
    with pytest.raises(ValueError, match="--from-peft"):
        read_adapter(tmp_path / "again")


# ---- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "s2ft must say what is trained, for example s2ft: {d_ratio: 0.03}, got None"),
        ({}, "s2ft must say what is trained"),
        ("d_ratio", "got 'd_ratio'"),
        ({"d_ratoi": 0.1}, "s2ft has no setting 'd_ratoi'; did you mean d_ratio"),
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


def test_trl_trains_the_adapter_that_an_attached_model_gets_in_its_trainer(tmp_path, monkeypatch):
    """Bit for bit. The layout of PEFT's form is indexed, and it has no kernel of the whole FFN."""
    import trl
    from datasets import load_dataset
    from support.inside import trl_main as main
    from transformers import AutoTokenizer

    monkeypatch.setattr(trl, "get_peft_config", trl.get_peft_config)  # is put back after the test
    monkeypatch.chdir(save_tiny(tmp_path, tie_word_embeddings=False))
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data/rows.jsonl", [{"text": f"{a}+{a % 3}={a + a % 3}"} for a in range(8)])
    config = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    theirs = {"model_name_or_path": ".", "dataset_name": "data", "output_dir": "out", "s2ft": SETTINGS}
    with pytest.raises(ValueError, match="did you mean d_ratio"):
        main(
            ["sft", "--model_name_or_path", "none", "--output_dir", "wrong", "--use_cpu", "--s2ft", '{"d_raito": 0.1}']
        )
    assert not (tmp_path / "wrong").exists()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, **theirs, "lora_modules_to_save": ["model.norm"]}))
    main(["sft", "--config", "run.yaml"])
    trained = PeftModel.from_pretrained(tiny_model(tie_word_embeddings=False), "out")
    model = with_adapter(
        tiny_model(tie_word_embeddings=False),
        s2ft.S2FTConfig(**SETTINGS, layout="indexed", ffn_kernel=False, modules_to_save=["model.norm"]),
    )
    arguments, rows = trl.SFTConfig("attached", **config), load_dataset("data", split="train")
    trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(".")).train()
    ours = s2ft.get_adapter(model, "default")
    assert_same_adapters(ours, to_native(trained))
    assert len(ours.extra_weights) == 1 and all(delta.values.any() for delta in ours.deltas.values())


# ---- Axolotl -------------------------------------------------------------------------------------------


class Settings(dict):
    """Axolotl's DictDefault: a key that is missing is None."""

    def __getattr__(self, name):
        return self.get(name)


@pytest.fixture
def axolotl(program):
    base = {"BasePlugin": type("BasePlugin", (), {}), "AdapterCapabilities": lambda name: SimpleNamespace(name=name)}
    return program("axolotl", {"axolotl.integrations.base": base})


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


def test_ms_swift_gets_a_tuner_and_finds_the_package_trl(program, monkeypatch):
    """It loads a plugin by its path, and puts its folder, which has a trl.py, first into Python's path."""
    tuners = {}
    module = program("ms_swift", {"swift.tuner_plugin": {"PeftTuner": object, "tuners_map": tuners}})
    assert tuners == {"s2ft": module.S2FTTuner}
    for given in ({"s2ft": SETTINGS}, json.dumps({"s2ft": SETTINGS})):
        args = SimpleNamespace(model_kwargs=given, task_type="causal_lm", modules_to_save=[])
        model = module.S2FTTuner.prepare_model(args, tiny_model())
        assert model.peft_config["default"].peft_type == "S2FT" and model.peft_config["default"].task_type
    args.model_kwargs = None
    with pytest.raises(ValueError, match=r'model_kwargs\["s2ft"\] must say what is trained'):
        module.S2FTTuner.prepare_model(args, tiny_model())
    file = f"{s2ft.__path__[0]}/integrations/ms_swift.py"
    monkeypatch.setattr(sys, "path", [file.rpartition("/")[0], *sys.path])
    spec = importlib.util.spec_from_file_location("_swift_external", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert importlib.util.find_spec("settings") is None  # a module of that folder


# ---- LlamaFactory --------------------------------------------------------------------------------------


@pytest.fixture
def llamafactory(program, monkeypatch):
    """A function that runs a command with what the file says. Returns the calls, and the second version's plugins."""
    calls, plugins = [], {}
    monkeypatch.setattr(sys, "argv", ["x"])

    class Plugin:
        def __init__(self, name):
            self.name = name

        def register(self):
            return lambda function: plugins.setdefault(self.name, function)

    def called(name, result):
        return lambda *words: calls.append((name, *(words or [result()]))) or (words or [None])[0]

    def run(given, *words, second=False):
        read = lambda: sys.modules["llamafactory.hparams.parser"].read_args()  # noqa: E731
        peft = {"PeftPlugin": Plugin, "load_adapter": called("load", None)}
        modules = {
            "llamafactory.extras.misc": {"is_env_enabled": lambda name: second},
            "llamafactory.launcher": {"launch": called("launch", read)},
            "llamafactory.hparams.parser": {"read_args": lambda args: given},
            "llamafactory.model.adapter": {"LoraConfig": None},
            "llamafactory.train.tuner": {"run_exp": called("train", read)},
            "llamafactory.v1.launcher": {
                "main": called("v1", lambda: sys.argv[1:]),
                "launch": called("v1 launch", lambda: sys.argv[1:]),
            },
            "llamafactory.v1.plugins.model_plugins.peft": peft,
        }
        program("llamafactory", modules).main(words)
        return calls, plugins

    return run


def test_llamafactory_trains_what_its_file_says_and_runs_other_commands_and_files(llamafactory):
    calls, _ = llamafactory({"finetuning_type": "s2ft", "s2ft": SETTINGS, "stage": "sft"}, "train", "run.yaml")
    assert calls == [("train", {"finetuning_type": "lora", "stage": "sft"})]
    lora = {"r": 8, "target_modules": ["q_proj"], "lora_alpha": 16, "modules_to_save": {"norm"}}
    config = sys.modules["llamafactory.model.adapter"].LoraConfig(task_type="CAUSAL_LM", **lora)
    assert (config.d_ratio, config.seed, config.modules_to_save) == (0.25, 3, ["norm"])
    llamafactory({"finetuning_type": "s2ft", "adapter_name_or_path": "a"}, "export", "run.yaml")
    llamafactory({"finetuning_type": "lora"}, "train", "run.yaml")
    llamafactory(["--stage", "sft"], "chat")
    assert calls[1] == ("launch", {"finetuning_type": "lora", "adapter_name_or_path": "a"})
    assert calls[2:] == [("train", {"finetuning_type": "lora"}), ("launch", ["--stage", "sft"])]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"finetuning_type": "lora", "s2ft": SETTINGS}, "finetuning_type is 'lora'"),
        ({"finetuning_type": "s2ft", "do_train": True}, "s2ft must say what is trained"),
        ({"finetuning_type": "s2ft", "s2ft": {"d_rati": 1}}, "did you mean d_ratio"),
    ],
)
def test_llamafactory_refuses_wrong_files_before_it_loads_a_model(llamafactory, given, message):
    with pytest.raises(ValueError, match=message):
        llamafactory(given, "train", "run.yaml")


def test_llamafactory_second_version_has_a_plugin(llamafactory):
    llamafactory(None, "sft", "run.yaml", second=True)
    calls, plugins = llamafactory(None, "chat", "run.yaml", second=True)
    assert calls == [("v1", ["sft", "run.yaml"]), ("v1 launch", ["chat", "run.yaml"])]
    model = plugins["s2ft"](tiny_model(), {"name": "s2ft", **SETTINGS}, True)
    assert model.peft_config["default"].peft_type == "S2FT"
    base = tiny_model()
    assert plugins["s2ft"](base, {"name": "s2ft", "adapter_name_or_path": "a"}, False) is base
    assert calls[-1] == ("load", base, "a", False)
