"""The YAML that `trl sft` takes runs here after one word is changed: the name of the command."""

import pytest
import yaml
from support.pairs import rest_slow
from support.states import same, tensors_of
from train.tiny import assistant, save_tiny, sums, user, write_jsonl

from s2ft.cli.main import main

CONFIGS = {
    # TRL's example of LoRA
    "packing": {
        "dataset_name": "chats",
        "learning_rate": 2.0e-4,
        "num_train_epochs": 1,
        "packing": True,
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eos_token": "<|im_end|>",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "use_peft": True,
        "lora_r": 2,
        "lora_alpha": 16,
        "lora_target_modules": ["q_proj", "v_proj"],
    },
    "mixture": {
        "datasets": [{"path": "chats", "split": "train", "columns": ["messages"]}],
        "test_split_size": 0.25,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "neftune_noise_alpha": 5,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 0.03,
        "optim": "adamw_torch",
        "adam_beta2": 0.95,
        "assistant_only_loss": False,
        "save_total_limit": 1,
        "push_to_hub": False,
        "env": {"TOKENIZERS_PARALLELISM": "false"},
    },
    "model": {
        "datasets": [{"path": "json", "data_files": "chats/train.jsonl", "split": "train"}],
        "streaming": False,
        "dtype": "bfloat16",
        "attn_implementation": "eager",
        "model_init_kwargs": {"low_cpu_mem_usage": True},
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": True,
        "seed": 1,
        "save_strategy": "no",
        "report_to": "none",
    },
}


@pytest.mark.parametrize("name", rest_slow(CONFIGS, ["packing"]))
def test_a_config_of_trl_runs_in_trl_and_here(name, tmp_path, monkeypatch):
    from trl.scripts.sft import main as trl_sft, make_parser

    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    (tmp_path / "chats").mkdir()
    for split, count in (("train", 12), ("test", 4)):
        chats = [{"messages": [user(row["instruction"]), assistant(row["output"])]} for row in sums(count)]
        write_jsonl(tmp_path / f"chats/{split}.jsonl", chats)
    config = {"model_name_or_path": "model", "max_steps": 2, "use_cpu": True, **CONFIGS[name]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", "run.yaml", "--output_dir"]
    trl_sft(*make_parser().parse_args_and_config([*words, "trl"], fail_with_unknown_args=False))
    assert main(["sft", *words, "s2ft"]) == 0 and (tmp_path / "s2ft/adapter/s2ft_config.json").is_file()
    assert main(["sft", "--config", "s2ft/config.yaml", "--output", "again"]) == 0  # a run's own config, fed back
    first, again = (yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("s2ft", "again"))
    assert {**first, "output_dir": ""} == {**again, "output_dir": ""}
    assert same(tensors_of(tmp_path / "s2ft/adapter"), tensors_of(tmp_path / "again/adapter"))
