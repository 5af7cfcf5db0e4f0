"""The options of a training command say how its base model is loaded."""

import importlib.util
import json
import shutil

import pytest
import torch
from support.inside import (
    ModelOptions,
    SFTArguments,
    check_dtype,
    export,
    fit_layout,
    hollow_model,
    load_base,
    quantization_config,
)
from support.states import with_adapter
from train.tiny import save_tiny, tiny_model

import s2ft

NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128))


def arguments(tmp_path, **changes):
    return SFTArguments(output_dir=str(tmp_path), use_cpu=True, **changes)


WORDS = {  # options of the model, arguments of the trainer → what load_model gets
    (): {"dtype": "auto", "revision": "main", "trust_remote_code": False, "quantization": None},
    (("model_revision", "v2"), ("dtype", "bfloat16")): {"revision": "v2", "dtype": "bfloat16"},
    (("trust_remote_code", True),): {"trust_remote_code": True},
    (("keep_packed", True),): {"keep_packed": True},
    (("attn_implementation", "eager"),): {"attn_implementation": "eager"},
    (("model_init_kwargs", '{"dtype": "float16", "rope_theta": 3, "revision": "v3"}'),): {
        "dtype": "float16",
        "rope_theta": 3,
        "revision": "v3",
    },
}


@pytest.mark.parametrize("given", WORDS, ids=str)
def test_every_option_reaches_the_loader(given, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "s2ft.train.base_model.load_model", lambda *words, **options: seen.update(options, words=words) or (1, 2)
    )
    of_trainer = {name: value for name, value in given if name in ("trust_remote_code", "model_init_kwargs")}
    of_model = {name: value for name, value in given if name not in of_trainer}
    load_base(ModelOptions("name", **of_model), arguments(tmp_path, **of_trainer))
    seen["dtype"] = seen["words"][1]
    assert seen["words"][0] == "name" and {name: seen[name] for name in WORDS[given]} == WORDS[given]


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_is_quantized_while_it_is_loaded_trains_in_place(bits, tiny, tmp_path, caplog):
    caplog.set_level("INFO")
    model, _ = load_base(ModelOptions(tiny, **{f"load_in_{bits}bit": True}), arguments(tmp_path))
    assert type(model.model.layers[0].mlp.down_proj).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    config = fit_layout(s2ft.S2FTConfig(d_ratio=0.2), model, chosen=False)
    assert config.layout == "indexed" and "layout indexed" in caplog.text
    s2ft.attach(model, config)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(value.grad.abs().sum() > 0 for value in model.parameters() if value.requires_grad)
    chosen = s2ft.S2FTConfig(d_ratio=0.2)
    assert fit_layout(chosen, model, chosen=True) is chosen  # attach explains why this cannot work


@NEEDS_BITSANDBYTES
def test_the_options_of_bitsandbytes_have_trls_names():
    options = ModelOptions("m", load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True,
                           dtype="float32", bnb_4bit_quant_storage="bfloat16")  # fmt: skip
    config = quantization_config(options)
    assert config.bnb_4bit_compute_dtype == torch.float32 and config.bnb_4bit_quant_type == "fp4"
    assert config.bnb_4bit_use_double_quant and config.bnb_4bit_quant_storage == torch.bfloat16


def test_special_tokens_must_be_in_the_vocabulary(tiny, tmp_path):
    _, tokenizer = load_base(ModelOptions(tiny), arguments(tmp_path, eos_token="<|endoftext|>"))
    assert tokenizer.eos_token == "<|endoftext|>"
    with pytest.raises(ValueError, match="eos_token '<no>' is not in the vocabulary"):
        load_base(ModelOptions(tiny), arguments(tmp_path, eos_token="<no>"))


def test_float16_trains_with_a_loss_scaler(tmp_path, monkeypatch):
    """The Trainer reads mixed_precision. On the CPU there is no scaler, so only the arguments are looked at."""
    model = tiny_model().half()
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        check_dtype(model, arguments(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
    check_dtype(model, found := arguments(tmp_path))
    assert found.fp16 and found.mixed_precision == "fp16"
    model.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match="must not be in float16"):
        check_dtype(model, found)


CODE = {
    "own_config.py": """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "own_code.py": """
import transformers
from .own_config import OwnConfig
class LlamaForCausalLM(transformers.LlamaForCausalLM):
    config_class = OwnConfig
""",
}


def test_code_of_a_checkpoint_runs_only_if_it_is_trusted(tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny, tmp_path / "own")
    for name, text in CODE.items():
        (folder / name).write_text(text)
    config = {
        **json.loads((folder / "config.json").read_text()),
        "model_type": "own",
        "auto_map": {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_code.LlamaForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_base(ModelOptions(str(folder)), arguments(tmp_path))
    model, _ = load_base(ModelOptions(str(folder)), arguments(tmp_path, trust_remote_code=True))
    assert type(model).__module__.endswith("own_code")
    s2ft.save_adapter(with_adapter(model, s2ft.S2FTConfig(d_ratio=0.1)), tmp_path / "adapter")
    monkeypatch.setenv("S2FT_TRUST_REMOTE_CODE", "1")  # the other commands have no option for it
    export(str(folder), tmp_path / "adapter", tmp_path / "merged")
    assert type(hollow_model(str(tmp_path / "merged"))).__module__.endswith("own_code")


@pytest.mark.parametrize("rank", (0, 1))
def test_fsdp_loads_the_weights_on_the_first_rank_of_a_machine_only(rank, tiny, tmp_path, monkeypatch):
    of_trainer = arguments(tmp_path)
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    for name, value in {**dict.fromkeys(names, "true"), "FSDP_VERSION": "2", "LOCAL_RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("s2ft.distributed.is_distributed", lambda: True)
    model, _ = load_base(ModelOptions(tiny), of_trainer)
    assert {parameter.is_meta for parameter in model.parameters()} == {rank > 0}
