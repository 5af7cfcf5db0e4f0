"""s2ft export and info: every format on a tiny model, loaded again by the library that reads the format."""

import json
import re

import peft
import pytest
import torch
from support.commands import s2ft_command
from support.convert_hf_to_gguf import convert
from support.inside import load_model, lora, native
from train.tiny import ASK, OTHER, base_of, save_random_adapter, tiny_tokenizer
from transformers import AutoTokenizer

from s2ft import read_adapter

RATIOS = dict(q_ratio=0.5, v_ratio=0.5, o_ratio=0.25, u_ratio=0.1, d_ratio=0.2)


def make_adapter(model_folder, folder, **info):
    save_random_adapter(folder, load_model(str(model_folder))[0], name="tiny", info=info, **RATIOS)


@pytest.fixture(scope="module")
def work(work):
    make_adapter(work / "model", work / "adapter", prompt={**TRAINED, "system": "Kürze!"})
    return work


def test_lora_and_back(work, tmp_path, capsys):
    assert (
        s2ft_command(
            "export",
            work / "adapter",
            "--model",
            work / "model",
            "--format",
            "lora",
            "--no-rank-pattern",
            "--output",
            tmp_path / "lora",
        )
        == 0
    )
    assert "LoRA of rank 16 (vLLM" in capsys.readouterr().out
    peft.PeftModel.from_pretrained(load_model(str(work / "model"))[0], tmp_path / "lora")  # the prompt is left alone
    assert (
        s2ft_command(
            "export",
            "--from-lora",
            tmp_path / "lora",
            "--model",
            work / "model",
            "--name",
            "back",
            "--output",
            tmp_path / "adapter",
        )
        == 0
    )
    ours, theirs = read_adapter(work / "adapter"), read_adapter(tmp_path / "adapter")
    assert theirs.name == "back" and theirs.selection == ours.selection and theirs.info["base_dtype"] == "float32"
    assert theirs.info["prompt"] == ours.info["prompt"]
    assert all(torch.equal(delta.values, theirs.deltas[path].values) for path, delta in ours.deltas.items())


TRAINED = {"form": "chat", "template": OTHER, "system": 'Say "yes".\n'}
PROMPT = '<|endoftext|>system\nSay "yes".\n<|im_end|>\n<|endoftext|>user\n2+3?<|im_end|>\n<|endoftext|>assistant\n'


@pytest.mark.parametrize("kind", ["without", "another", "gguf"])
def test_other_programs_get_the_prompt_of_the_training(kind, tmp_path, capsys, caplog):
    """The template is the adapter's, not the base's, and its system prompt is the default.

    The base has no chat template, another one, or is a GGUF file.
    """
    base, adapter = base_of(tmp_path / "model"), tmp_path / "adapter"
    if kind == "without":
        (base / "chat_template.jinja").unlink()
    if kind == "gguf":
        base = convert(base, tmp_path / "model.gguf")
    make_adapter(base, adapter, prompt=TRAINED)
    caplog.set_level("INFO")
    assert s2ft_command("export", adapter, "--model", base, "--format", "merged", "--output", tmp_path / "out") == 0
    _, tokenizer = load_model(str(tmp_path / "out"))
    assert tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True) == PROMPT
    own = [{"role": "system", "content": "No."}, *ASK]
    assert tokenizer.apply_chat_template(own, tokenize=False).startswith("<|endoftext|>system\nNo.<|im_end|>")
    assert "with its system prompt as the default" in caplog.text
    assert s2ft_command("export", adapter, "--model", base, "--output", tmp_path / "lora") == 0
    # vLLM reads the template there
    template, tokenizer = (tmp_path / "lora/chat_template.jinja").read_text(), load_model(str(base))[1]
    assert "the chat template is the one that" in caplog.text
    text = tokenizer.apply_chat_template(ASK, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text == PROMPT


def test_an_adapter_of_plain_text_leaves_the_template_of_the_base(work, tmp_path):
    make_adapter(work / "model", tmp_path / "adapter", prompt={"form": "text", "template": None, "system": None})
    assert (
        s2ft_command(
            "merge", "--model", work / "model", "--adapter", tmp_path / "adapter", "--output", tmp_path / "out"
        )
        == 0
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tiny_tokenizer().chat_template
    assert s2ft_command("export", tmp_path / "adapter", "--model", work / "model", "--output", tmp_path / "lora") == 0
    assert not (tmp_path / "lora/chat_template.jinja").exists()


# ---- info ----------------------------------------------------------------------------------------------


def test_info_prints_everything(work, capsys):
    assert s2ft_command("info", work / "adapter") == 0
    printed = capsys.readouterr().out
    adapter = read_adapter(work / "adapter")
    size = sum(path.stat().st_size for path in (work / "adapter").iterdir())
    words = f"{adapter.parameters:,} parameters, {size:,} bytes", adapter.selection.digest, "layout permuted"
    assert [one for one in words if one not in printed] == []
    assert re.search(r"model.layers.0.self_attn.q_proj +2 heads +16 rows +float32", printed)


def test_info_describes_the_prompt_and_the_training_and_escapes_control_characters(work, tmp_path, capsys):
    adapter = read_adapter(work / "adapter")
    training = {"method": "sft", "data": [], "epochs": 2}
    adapter.info = {"prompt": TRAINED, "training": training, "note\x1b[2J": "first\nadapter 'other'\x07"}
    native.write(adapter, tmp_path)
    assert s2ft_command("info", tmp_path) == 0
    printed = capsys.readouterr().out
    for words in (
        f"prompt: chat, template of {len(OTHER)} characters, system prompt 'Say \"yes\".\\\\n'",
        "training: method sft, epochs 2\n",
        r"note\x1b[2J: first\nadapter 'other'\x07",
    ):
        assert words in printed and "\x1b" not in printed


def test_info_of_a_lora_names_the_option_that_imports_it(tmp_path, capsys):
    (tmp_path / lora.CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    assert s2ft_command("info", tmp_path) == 2 and "--from-lora" in capsys.readouterr().err
