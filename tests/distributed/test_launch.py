"""The command line under torchrun and each file of examples/accelerate: two processes save the adapter of one."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import check_same_files
from support.ranks import RANKS, free_port
from train.tiny import save_tiny, sums, write_jsonl

from s2ft.cli.main import main

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples" / "accelerate").glob("*.yaml"))
ON_CPU = str(ROOT / "tests" / "support" / "fsdp_on_cpu.py")  # on CPUs, accelerate would use DDP instead
# torchrun binds a free port itself. One that a test chose could be taken by another process before it is used.
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))
LEAVES = {"ddp": "optimizer.pt", "fsdp2": "optimizer.bin", "zero2": "zero_to_fp32.py", "zero3": "zero_to_fp32.py"}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The arguments of a run without --output, and the adapter of one process. The rows fill whole batches, because
    ranks get rows twice in an incomplete last batch."""
    folder = tmp_path_factory.mktemp("job")
    arguments = [
        "sft",
        "--model",
        str(save_tiny(folder / "model")),
        "--data",
        str(write_jsonl(folder / "data.jsonl", sums(16))),
        "--batch-size",
        "4",
        "--micro-batch-size",
        "2",
        "--max-steps",
        "4",
        "--save-steps",
        "2",
        "--learning-rate",
        "0.01",
        "--d-ratio",
        "0.1",
        "--o-ratio",
        "0.5",
    ]
    assert main([*arguments, "--output", str(folder / "alone")]) == 0
    return arguments, folder / "alone" / "adapter"


def launch(*command):
    done = run(*command)
    assert done.returncode == 0, done.stderr  # all of it: the report of torchrun comes after the error of a rank
    return done.stdout


def run(*command):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    environment = {
        **inherited,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # DeepSpeed needs ninja on the path
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=300
    )


def torchrun(output, *arguments):
    """Run the command on two ranks. Returns what it prints."""
    return launch(*TORCHRUN, "-m", "s2ft.cli", *arguments, "--output", str(output))


@pytest.mark.slow
def test_torchrun_saves_the_adapter_of_one_process(job, tmp_path):
    arguments, alone = job
    printed = torchrun(tmp_path, *arguments)
    assert printed.count("adapter:") == 1  # only the first rank prints
    check_same_files(tmp_path / "adapter", alone)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--train-sampling-strategy", "random"], ["--packing", "--max-length", "64"]])
def test_two_ranks_resume_exactly_in_a_later_epoch(job, tmp_path, more):
    """An epoch has 4 updates, or fewer of packs. accelerate alone does not tell the sampler the epoch after a resume."""
    arguments = [*job[0], "--max-steps", "7", *more]
    torchrun(tmp_path / "whole", *arguments)
    torchrun(tmp_path / "halves", *arguments, "--stop-after", "5")
    torchrun(tmp_path / "halves", *arguments, "--resume")
    check_same_files(tmp_path / "halves" / "adapter", tmp_path / "whole" / "adapter", exactly=True)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] + [pytest.mark.deepspeed] * name.startswith("zero"))
        for name in EXAMPLES
    ],
)
def test_example_saves_the_adapter_of_one_process(job, name, tmp_path):
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    arguments, alone = job
    launch(
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "examples" / "accelerate" / f"{name}.yaml"),
        "--num_processes",
        str(RANKS),
        "--main_process_port",
        str(free_port()),
        *([ON_CPU] if name == "fsdp2" else ["-m", "s2ft"]),
        *arguments,
        "--output",
        str(tmp_path),
    )
    check_same_files(tmp_path / "adapter", alone, rtol=1e-4, atol=1e-4)
    assert LEAVES[name] in {
        path.name for path in (tmp_path / "checkpoint-4").iterdir()
    }  # this file is written by this way only


def test_every_example_is_tested():
    assert EXAMPLES == sorted(LEAVES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_name_the_option_for_the_number_of_devices_and_do_not_set_it(name):
    text = (ROOT / "examples" / "accelerate" / f"{name}.yaml").read_text()
    assert f"accelerate launch --config_file examples/accelerate/{name}.yaml --num_processes N -m s2ft sft" in text
    assert not re.search("^num_processes", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--batch-size", "3", "--micro-batch-size", "2"],
            "batch_size 3 can't be divided into 2 rows a forward pass on 2 devices",
        ),
        (["--data", "nowhere.jsonl"], "data file nowhere.jsonl doesn't exist"),
    ],
)
def test_a_mistake_is_reported_by_one_rank(job, tmp_path, arguments, message):
    done = run(*TORCHRUN, "-m", "s2ft", *job[0], *arguments, "--output", str(tmp_path / "out"))
    printed = [line for line in done.stderr.splitlines() if "s2ft sft: error:" in line]
    assert done.returncode != 0 and len(printed) == 1 and message in printed[0], done.stderr[-3000:]
    assert not (tmp_path / "out").exists()
