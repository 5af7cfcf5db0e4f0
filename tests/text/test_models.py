"""Loading models from folders and GGUF files, with clear errors."""

import json

import pytest
import torch
from cli.test_export import base_of
from support.convert_hf_to_gguf import convert
from support.images import MODELS
from train.tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from s2ft.text.models import load_model, locate


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
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], weight) for key, weight in model.state_dict().items())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "<|im_start|>user\ncrab some text 12 + 3 = 15.\u00e4<|im_end|>"
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert reloaded.special_tokens_map == tokenizer.special_tokens_map
    assert reloaded.chat_template == tokenizer.chat_template


def test_gguf_in_a_folder_is_found(gguf_file):
    assert locate(str(gguf_file.parent)) == (str(gguf_file.parent), {"gguf_file": "tiny.gguf"})


def test_gguf_is_loaded_in_the_dtype_of_the_caller(gguf_file):
    assert load_model(str(gguf_file), "bfloat16")[0].dtype == torch.bfloat16


def test_two_gguf_files_in_a_folder_are_an_error_that_lists_them(tmp_path):
    (tmp_path / "a.gguf").touch(), (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match="several GGUF files .a.gguf, b.gguf.: name one"):
        locate(str(tmp_path))


def test_dtype_auto_keeps_the_dtype_of_the_checkpoint(tmp_path):
    save_tiny(tmp_path / "m", dtype=torch.bfloat16)
    assert load_model(str(tmp_path / "m"))[0].dtype == torch.bfloat16
    assert load_model(str(tmp_path / "m"), "float32")[0].dtype == torch.float32


def test_unknown_dtype():
    with pytest.raises(ValueError, match="dtype must be one of auto, float32"):
        load_model("x", "int3")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "x.gguf"])
def test_missing_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="doesn't exist"):
        load_model(name)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="neither config.json nor a .gguf file"):
        load_model(str(tmp_path))


def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="not a .gguf; give the checkpoint's folder"):
        load_model(str(tmp_path / "model.safetensors"))


def test_broken_gguf_is_one_clear_error(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="can't load a tokenizer from .*bad.gguf"):
        load_model(str(tmp_path / "bad.gguf"))


def test_folder_without_weights(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="can't load a causal language model from"):
        load_model(str(tmp_path))


def test_folder_without_tokenizer(tmp_path):
    save_tiny(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="can't load a tokenizer from"):
        load_model(str(tmp_path))


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
    from transformers import AutoTokenizer

    asked = []

    def model_info(self, name, revision=None, timeout=None):
        asked.append((name, revision))
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *words, **options: asked.append("a file"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"no folder org/none here, and the hub can't be reached \(no network\)"):
        load_model("org/none", revision="v1")
    with pytest.raises(ValueError, match="no folder two words here, and no such model on the hub"):
        load_model("two words")
    assert asked == [("org/none", "v1")]
