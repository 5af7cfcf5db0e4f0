"""Loading models from folders and GGUF files, with clear errors."""

import json
import shutil
from unittest.mock import Mock

import gguf
import pytest
import torch
from support.convert_hf_to_gguf import convert
from support.images import MODELS
from support.inside import load_model, locate, reader_class
from support.states import same
from train.tiny import base_of, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, RwkvConfig


@pytest.fixture
def gguf_file(tmp_path):
    """A two-layer Llama as GGUF, its matrices in a packed type, with a tokenizer."""
    (tmp_path / "packed").mkdir()
    return convert(base_of(tmp_path / "model"), tmp_path / "packed/tiny.gguf", "q8_0")


def test_gguf_is_loaded_as_a_plain_model_that_saves_and_reloads_bit_for_bit(gguf_file, tmp_path):
    model, tokenizer = load_model(str(gguf_file))
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    model.save_pretrained(tmp_path / "saved"), tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert same(again, model)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "<|im_start|>user\ncrab some text 12 + 3 = 15.\u00e4<|im_end|>"
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reloaded.special_tokens_map == tokenizer.special_tokens_map
    assert reloaded.chat_template == tokenizer.chat_template


def test_the_file_is_parsed_once(gguf_file, monkeypatch):
    reader, parsed = gguf.GGUFReader, Mock(wraps=reader_class())
    monkeypatch.setattr("s2ft.codecs.gguf_file.reader_class", lambda: parsed)
    load_model(str(gguf_file))
    assert parsed.call_count == 1 and gguf.GGUFReader is reader


def test_gguf_in_a_folder_is_found_and_loaded_in_the_dtype_of_the_caller(gguf_file, tmp_path):
    assert locate(str(gguf_file.parent)) == (str(gguf_file.parent), {"gguf_file": "tiny.gguf"})
    shutil.copy(gguf_file, tmp_path)
    (tmp_path / "config.json").write_text("{}")  # as many repositories of the hub have it
    assert locate(str(tmp_path)) == (str(tmp_path), {"gguf_file": "tiny.gguf"})
    assert load_model(str(gguf_file), "bfloat16")[0].dtype == torch.bfloat16


def test_dtype_auto_keeps_the_dtype_of_the_checkpoint(tmp_path):
    save_tiny(tmp_path / "m", dtype=torch.bfloat16)
    assert load_model(str(tmp_path / "m"))[0].dtype == torch.bfloat16
    assert load_model(str(tmp_path / "m"), "float32")[0].dtype == torch.float32


def without(pattern):
    """A writer of a checkpoint's folder that lacks files."""
    return lambda folder: [file.unlink() for file in save_tiny(folder).glob(pattern)]


def lacking_a_layer(folder):
    save_tiny(folder)
    config = json.loads((folder / "config.json").read_text())
    layers = {"num_hidden_layers": config["num_hidden_layers"] + 1, "layer_types": None}
    (folder / "config.json").write_text(json.dumps({**config, **layers}))


def file(name, content=b""):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "name, write, kind, message",
    [
        *((name, None, FileNotFoundError, "doesn't exist") for name in ("./nowhere", "/no/where", "a/b/c", "x.gguf")),
        ("", None, ValueError, "neither config.json nor a .gguf"),
        ("", lambda folder: (file("a.gguf")(folder), file("b.gguf")(folder)), ValueError, "a.gguf, b.gguf"),
        ("a.safetensors", file("a.safetensors"), ValueError, "not a .gguf"),
        ("bad.gguf", file("bad.gguf", b"not a model"), ValueError, "load a tokenizer from .*bad.gguf"),
        ("", without("model.safetensors"), ValueError, "load a causal language model"),
        ("", without("tokenizer*"), ValueError, "load a tokenizer"),
        ("", lacking_a_layer, ValueError, "lacks weights of the model, such as model.layers.2"),
    ],
)
def test_what_is_no_model_is_named(name, write, kind, message, tmp_path):
    if write:
        write(tmp_path)
    with pytest.raises(kind, match=message):
        load_model(str(tmp_path / name) if write or not name else name)
    with pytest.raises(ValueError, match="dtype .*float32"):
        load_model("x", "int3")


def test_a_recurrent_model_that_ignores_padding_and_caches_refuses_both(tmp_path):
    config = RwkvConfig(vocab_size=259, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
    save_tiny(tmp_path), AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, ids = load_model(str(tmp_path))[0], torch.tensor([[0, 5, 6]])
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)
    for ignored in ({"attention_mask": (ids > 0).long()}, {"past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match="padding before a row, and transformers' cache"):
            model(ids, **ignored)
    assert torch.equal(model(ids, attention_mask=torch.tensor([[1, 1, 0]])).logits, model(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_of_images_and_text_is_loaded_whole(name, tmp_path):
    if name == "qwen2_5_vl":
        pytest.importorskip("torchvision", reason="its processor needs torchvision")
    model, processor = MODELS[name]()
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path))
    assert type(loaded) is type(model) and tokenizer("a")["input_ids"] == processor.tokenizer("a")["input_ids"]
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_a_name_that_the_hub_lacks_is_one_line_before_any_file_is_asked_for(monkeypatch):
    """from_pretrained would ask for each file several times, and wait in between."""
    import huggingface_hub

    asked = Mock(side_effect=ConnectionError("no network"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"no folder org/none here, and the hub can't be reached \(no network\)"):
        load_model("org/none", revision="v1")
    with pytest.raises(ValueError, match="no folder two words here, and no such model on the hub"):
        load_model("two words")
    assert [(call.args, call.kwargs["revision"]) for call in asked.call_args_list] == [(("org/none",), "v1")]
