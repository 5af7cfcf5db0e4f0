"""The command line under torchrun and each file of examples/accelerate: two processes save the adapter of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import check_same_files
from support.inside import read_log
from support.ranks import RANKS, free_port
from train.tiny import save_tiny, sums, write_jsonl

from s2ft.cli.main import main

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples" / "accelerate").glob("*.yaml"))
ON_CPU = str(ROOT / "tests" / "support" / "fsdp_on_cpu.py")  # on CPUs, accelerate would use DDP instead
KIND = {
    **dict.fromkeys(("zero1", "zero2", "zero3"), "DEEPSPEED"),
    **dict.fromkeys(("fsdp2", "context"), "FSDP"),
    **dict.fromkeys(("ddp", "tensor"), "MULTI_CPU"),
}
SIZES = {"context": "--parallelism_config_cp_size", "tensor": "--parallelism_config_tp_size"}
# torchrun binds a free port itself. One that a test chose could be taken by another process before it is used.
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The arguments of a run without --output, and the adapter of one process. The rows fill whole batches, because
    ranks get rows twice in an incomplete last batch."""
    folder = tmp_path_factory.mktemp("job")
    arguments = [
        *("sft", "--model", str(save_tiny(folder / "model"))),
        *("--data", str(write_jsonl(folder / "data.jsonl", sums(16)))),
        *"--batch-size 4 --micro-batch-size 2 --max-steps 4 --save-steps 2 --learning-rate 0.01".split(),
        *"--d-ratio 0.1 --o-ratio 0.5".split(),
    ]
    assert main([*arguments, "--output", str(folder / "alone")]) == 0
    return arguments, folder / "alone" / "adapter"


def launch(*command):
    done = run(*command)
    assert done.returncode == 0, done.stderr  # all of it: the report of torchrun comes after the error of a rank
    return done.stdout


def environment_of_processes():
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))},
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        # DeepSpeed needs ninja on the path
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }


def run(*command):
    return subprocess.run(
        [sys.executable, "-m", *command], env=environment_of_processes(), capture_output=True, text=True, timeout=300
    )


def torchrun(output, *arguments):
    """Run the command on two ranks. Returns what it prints."""
    return launch(*TORCHRUN, "-m", "s2ft", *arguments, "--output", str(output))


@pytest.mark.slow
def test_torchrun_saves_the_adapter_of_one_process(job, tmp_path):
    arguments, alone = job
    assert torchrun(tmp_path, *arguments).count("adapter:") == 1  # only the first rank prints
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


def options_for(name, processes):
    """The options of accelerate for an example. Of four devices, each two share a row or a weight."""
    options = ["--config_file", str(ROOT / f"examples/accelerate/{name}.yaml"), "--num_processes", str(processes)]
    if name in SIZES and processes > 1:
        options += [SIZES[name], "2", "--parallelism_config_dp_shard_size", str(processes // 2)]
    return options


def run_example(name, processes, *arguments):
    options = [*options_for(name, processes), "--main_process_port", str(free_port())]
    printed = launch("accelerate.commands.launch", *options, ON_CPU, *arguments)
    assert printed.count(f"ran as {KIND[name]}\n") == processes, printed


EACH_EXAMPLE = [
    pytest.param(name, marks=[pytest.mark.slow] + [pytest.mark.deepspeed] * name.startswith("zero"))
    for name in EXAMPLES
]


@pytest.mark.parametrize("name", EACH_EXAMPLE)
@pytest.mark.parametrize("processes", (1, RANKS, 4))
def test_example_saves_the_adapter_of_one_process(job, name, processes, tmp_path):
    arguments, alone = job
    run_example(name, processes, *arguments, *["--micro-batch-size", "1"] * (processes == 4), "--output", str(tmp_path))
    check_same_files(tmp_path / "adapter", alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EACH_EXAMPLE)
def test_example_selects_by_data_evaluates_stops_and_resumes(job, name, tmp_path):
    """What only some devices can compute, since only they have the weights, reaches all of them."""
    arguments = [
        *job[0],
        *"--selection activation --seed 3 --eval-strategy steps --eval-steps 2".split(),
        *("--eval-data", str(write_jsonl(tmp_path / "held-out.jsonl", sums(5)))),  # not as many on each device
        *"--early-stopping-patience 9 --load-best-model-at-end".split(),
    ]
    assert main([*arguments, "--output", str(tmp_path / "alone")]) == 0
    run_example(name, RANKS, *arguments, "--output", str(tmp_path / "out"), "--stop-after", "2")
    run_example(name, RANKS, *arguments, "--output", str(tmp_path / "out"), "--resume")
    check_same_files(tmp_path / "out" / "adapter", tmp_path / "alone" / "adapter", rtol=1e-4, atol=1e-4)
    expected, found = (read_log(tmp_path / name / "log.jsonl") for name in ("alone", "out"))
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected):
        for key in ours.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), (key, ours, theirs)


def test_every_example_is_tested():
    assert EXAMPLES == sorted(KIND)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("processes", (1, 2, 8))
def test_accelerate_takes_each_example_for_any_number_of_devices(name, processes, monkeypatch, caplog):
    """accelerate reads the file, warns of nothing and would start the processes: nothing is started here."""
    from accelerate.commands import launch as command

    started = []
    for way in ("deepspeed_launcher", "multi_gpu_launcher", "simple_launcher"):
        monkeypatch.setattr(command, way, lambda arguments, way=way: started.append((way, arguments)))
    command.launch_command(command.launch_command_parser().parse_args([*options_for(name, processes), "-m", "s2ft"]))
    (way, arguments), *others = started
    assert way == ("deepspeed_launcher" if name.startswith("zero") else "multi_gpu_launcher")
    assert not others and not caplog.records
    shared = 2 if processes > 1 else 1
    assert (
        vars(arguments).items()
        >= {
            "num_processes": processes,
            "use_fsdp": KIND[name] == "FSDP",
            **({"zero_stage": int(name[-1])} if name.startswith("zero") else {}),
            "parallelism_config_tp_size": shared if name == "tensor" else 1,
            "parallelism_config_cp_size": shared if name == "context" else 1,
        }.items()
    )


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_machines_and_resumes_when_it_is_started_again(job, tmp_path):
    """Tasks of a stand-in for srun are processes of this machine."""
    script = [str(ROOT / "examples" / "slurm" / "sft.sbatch"), str(ROOT / "examples" / "accelerate" / "ddp.yaml")]
    variables = {"SLURM_NNODES": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "first,second"}
    folders = [str(ROOT / "tests" / "support" / "slurm"), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**environment_of_processes(), **variables, "PATH": os.pathsep.join(folders)}
    for more in (["--stop-after", "2"], []):
        command = ["bash", *script, *job[0][1:], "--output", str(tmp_path / "out"), *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    check_same_files(tmp_path / "out" / "adapter", job[1])
    assert [line["step"] for line in read_log(tmp_path / "out" / "log.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_processes_resume_with_rewards_and_train_on_pairs_as_one(job, tmp_path):
    model = job[0][job[0].index("--model") + 1]
    common = ["--model", model, "--max-steps", "4", "--batch-size", "8", "--lr", "0.01", "--save-steps", "2"]
    pairs = [{"question": f"{a}+1=", "chosen": str(a + 1), "rejected": "no idea"} for a in range(16)]
    dpo = ["dpo", "--data", str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), *common]
    torchrun(tmp_path / "pairs", *dpo)
    assert main([*dpo, "--output", str(tmp_path / "alone")]) == 0
    check_same_files(tmp_path / "pairs" / "adapter", tmp_path / "alone" / "adapter")
    (tmp_path / "mine.py").write_text(
        "def short(completions, **_):\n    return [-len(c[0]['content']) for c in completions]\n"
    )
    tasks = write_jsonl(tmp_path / "tasks.jsonl", [{"question": f"{a}+1="} for a in range(8)])
    grpo = [
        *("grpo", "--data", str(tasks), "--rewards", f"{tmp_path / 'mine.py'}:short", "--beta", "0.1"),
        *("--num-generations", "4", "--max-completion-length", "8", *common),
    ]
    torchrun(tmp_path / "whole", *grpo)
    torchrun(tmp_path / "half", *grpo, "--stop-after", "2")
    torchrun(tmp_path / "half", *grpo, "--resume")
    check_same_files(tmp_path / "half" / "adapter", tmp_path / "whole" / "adapter", exactly=True)


def test_the_slurm_script_is_valid():
    subprocess.run(["bash", "-n", str(ROOT / "examples" / "slurm" / "sft.sbatch")], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--batch-size", "3", "--micro-batch-size", "2"],
            "batch_size 3 must be a multiple of 4: of per_device_train_batch_size 2 × gradient_accumulation_steps 1 × "
            "2 devices",
        ),
        (["--data", "nowhere.jsonl"], "data file nowhere.jsonl doesn't exist"),
    ],
)
def test_a_mistake_is_reported_by_one_rank(job, tmp_path, arguments, message):
    done = run(*TORCHRUN, "-m", "s2ft", *job[0], *arguments, "--output", str(tmp_path / "out"))
    printed = [line for line in done.stderr.splitlines() if "s2ft sft: error:" in line]
    assert done.returncode != 0 and len(printed) == 1 and message in printed[0], done.stderr[-3000:]
    assert not (tmp_path / "out").exists()
