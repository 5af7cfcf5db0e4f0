"""The tiny base, the chats and the configuration files with which each program trains."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.train.tiny import save_tiny

STEPS, BATCH, LENGTH = 6, 2, 64
RATE = 2e-3
SETTINGS = {"d_ratio": 0.25, "o_ratio": 0.25, "seed": 3}
# The template of tests/train/tiny.py with the marks of the answers, which TRL's loss on answers needs.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Program:
    """A program that trains, and how it is installed and run.

    Attributes:
        packages: What pip installs with what it needs. Packages that are in the environment already are kept.
        alone: What pip installs without what it needs.
        train: Returns the command that trains, from the workplace and the environment's folder of programs.
        adapter: Folder of the trained adapter in the workplace.
        merge: Returns the command that merges the adapter, or None if the program has none.
        merged: Folder of the merged model in the workplace.
        environment: Variables of the commands.
        stand_ins: Modules that are replaced by empty ones, because their wheels need a GPU's build of PyTorch.
        arguments: Arguments of s2ft's trainer that make its optimizer that of the program.
    """

    packages: tuple[str, ...]
    train: Callable[[Path, Path], list]
    adapter: str
    alone: tuple[str, ...] = ()
    merge: Callable[[Path, Path], list] | None = None
    merged: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    stand_ins: tuple[str, ...] = ()
    arguments: dict[str, float] = field(default_factory=dict)


def lay_out(folder: Path) -> None:
    """Write the base and the chats. All chats have LENGTH tokens, so that no program pads a batch in its own way."""
    save_tiny(folder / "base", tie_word_embeddings=False)
    (folder / "base" / "chat_template.jinja").write_text(TEMPLATE)
    data = folder / "data"
    data.mkdir()
    chats = [(f"{10 + a}+{a % 7}=", f"The answer is {10 + a + a % 7}.".ljust(LENGTH - 26, ".")) for a in range(24)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats]
    _write_rows(data / "chats.jsonl", [{"messages": chat} for chat in turns])
    (folder / "sharegpt").mkdir()
    shared = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in chats]
    _write_rows(folder / "sharegpt" / "chats.jsonl", [{"conversations": chat} for chat in shared])


def _write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write(file: Path, values: dict) -> Path:
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def _hugging_face(folder: Path) -> dict:
    """The options that TRL, ms-swift and LlamaFactory share with transformers."""
    return {
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta2": 0.999,  # ms-swift's default is 0.95
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_steps": STEPS,
        "report_to": "none",
    }


# ---- TRL -----------------------------------------------------------------------------------------------


def _trl(folder: Path, programs: Path) -> list:
    config = {
        **_hugging_face(folder),
        "model_name_or_path": str(folder / "base"),
        "dataset_name": str(folder / "data"),
        "assistant_only_loss": True,
        "loss_type": "nll",
        "use_cpu": True,
        "bf16": False,
        "train_sampling_strategy": "sequential",
        "s2ft": SETTINGS,
    }
    file = _write(folder / "trl.yaml", config)
    return [programs / "python", "-m", "s2ft.integrations.trl", "sft", "--config", file]


# ---- Axolotl -------------------------------------------------------------------------------------------


def _axolotl(folder: Path, programs: Path) -> list:
    config = {
        "base_model": str(folder / "base"),
        "plugins": ["s2ft.integrations.axolotl.S2FTPlugin"],
        "adapter": "s2ft",
        "s2ft": SETTINGS,
        "datasets": [{"path": str(folder / "data" / "chats.jsonl"), "ds_type": "json", "type": "chat_template"}],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(folder / "prepared"),
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,
        "val_set_size": 0,
        "output_dir": str(folder / "out"),
        "sequence_len": 128,
        "micro_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": RATE,
        "weight_decay": 0.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "sample_packing": False,
        "logging_steps": 1,
    }
    file = _write(folder / "axolotl.yaml", config)
    return [programs / "axolotl", "train", file, "--launcher", "python"]


def _axolotl_merge(folder: Path, programs: Path) -> list:
    return [programs / "axolotl", "merge-lora", folder / "axolotl.yaml", f"--lora-model-dir={folder / 'out'}"]


# ---- ms-swift ------------------------------------------------------------------------------------------


def _ms_swift(folder: Path, programs: Path) -> list:
    config = {
        **_hugging_face(folder),
        "model": str(folder / "base"),
        "model_type": "llama",
        "template": "chatml",
        "dataset": str(folder / "data" / "chats.jsonl"),
        "external_plugins": str(Path(__file__).parents[2] / "s2ft" / "integrations" / "ms_swift.py"),
        "tuner_type": "s2ft",
        "model_kwargs": {"s2ft": SETTINGS},
        "add_version": False,
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "max_length": 128,
    }
    return [programs / "swift", "sft", _write(folder / "swift.yaml", config)]


def _ms_swift_merge(folder: Path, programs: Path) -> list:
    adapter = folder / "out" / f"checkpoint-{STEPS}"
    return [programs / "swift", "export", "--adapters", adapter, "--merge_lora", "true",
            "--output_dir", folder / "merged"]  # fmt: skip


# ---- LlamaFactory --------------------------------------------------------------------------------------


def _llamafactory(folder: Path, programs: Path) -> list:
    about = {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"chats": about}))
    config = {
        **_hugging_face(folder),
        "model_name_or_path": str(folder / "base"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "s2ft",
        "s2ft": SETTINGS,
        "dataset_dir": str(folder / "data"),
        "dataset": "chats",
        "template": "chatml",
        "cutoff_len": 128,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "bf16": False,
        "use_cpu": True,
    }
    del config["gradient_checkpointing"]
    return [programs / "python", "-m", "s2ft.integrations.llamafactory", "train",
            _write(folder / "llamafactory.yaml", config)]  # fmt: skip


def _llamafactory_merge(folder: Path, programs: Path) -> list:
    config = {
        "model_name_or_path": str(folder / "base"),
        "adapter_name_or_path": str(folder / "out"),
        "finetuning_type": "s2ft",
        "template": "chatml",
        "export_dir": str(folder / "merged"),
        "export_device": "cpu",
        "infer_dtype": "float32",
    }
    return [programs / "python", "-m", "s2ft.integrations.llamafactory", "export",
            _write(folder / "export.yaml", config)]  # fmt: skip


def _llamafactory_v1(folder: Path, programs: Path) -> list:
    rows = {"chats": {"path": str(folder / "sharegpt" / "chats.jsonl"), "source": "local", "converter": "sharegpt"}}
    config = {
        "model": str(folder / "base"),
        "template": "chatml",
        "peft_config": {"name": "s2ft", **SETTINGS},
        "train_dataset": str(_write(folder / "rows.yaml", rows)),
        "output_dir": str(folder / "out"),
        "micro_batch_size": BATCH,
        "cutoff_len": 128,
        "learning_rate": RATE,
        "max_steps": STEPS,
        "bf16": False,
        "batching_workers": 0,
        "enable_activation_checkpointing": False,
    }
    return [programs / "python", "-m", "s2ft.integrations.llamafactory", "sft",
            _write(folder / "llamafactory.yaml", config)]  # fmt: skip


LLAMA_FACTORY = ("llamafactory==0.9.5",)
PROGRAMS = {
    "trl": Program((), _trl, "out"),
    # Axolotl also asks for xformers, bitsandbytes, flash-linear-attention and the cloud storage of four providers.
    # What it imports without a GPU is listed here.
    "axolotl": Program(
        (),
        _axolotl,
        "out",
        (
            *("axolotl==0.19.0", "transformers==5.16.1", "peft==0.20.0", "trl==1.9.0", "accelerate==1.13.0"),
            *("datasets==4.8.4", "huggingface_hub==1.17.0", "tokenizers==0.23.1", "axolotl-contribs-lgpl==0.0.7"),
            *("axolotl-contribs-mit==0.0.6", "pydantic==2.12.5", "pydantic-core==2.41.5", "addict", "fire", "six"),
            *("termcolor", "typer==0.25.1", "einops", "colorama", "python-dotenv==1.0.1", "posthog==6.7.11"),
            *("backoff", "distro", "schedulefree==1.4.1", "art", "numba", "llvmlite", "optimum==1.16.2", "triton"),
            *("evaluate==0.4.1", "kernels<0.18", "fastcore", "wandb", "platformdirs"),
        ),
        _axolotl_merge,
        "out/merged",
        {"AXOLOTL_DO_NOT_TRACK": "1"},
    ),
    "ms-swift": Program(
        ("ms-swift==4.6.0", "transformers==5.16.1"),
        _ms_swift,
        f"out/checkpoint-{STEPS}",
        (),
        _ms_swift_merge,
        "merged",
        {"USE_HF": "1"},
    ),
    "llamafactory": Program(LLAMA_FACTORY, _llamafactory, "out", (), _llamafactory_merge, "merged",
                            stand_ins=("torchaudio",)),
    "llamafactory-v1": Program(LLAMA_FACTORY, _llamafactory_v1, "out", environment={"USE_V1": "1"},
                               stand_ins=("torchaudio",), arguments={"weight_decay": 0.01}),
}  # fmt: skip
