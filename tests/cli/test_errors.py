"""A user's mistake gives one clear line on stderr and exit status 2, and writes nothing."""

import json
import os
import re
import subprocess
import sys

import pytest
from train.tiny import save_tiny, sums, write_jsonl

from s2ft.cli.main import COMMANDS, main, set_up_logging
from s2ft.cli.parse import GROUPS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "data.jsonl", sums(4))


def error_line(capsys, *arguments):
    """Run a command that must fail. Returns its one error on stderr, with the lines that list bad rows."""
    assert main([str(argument) for argument in arguments]) == 2
    before, *error = re.split(r"^s2ft \w+: error: ", capsys.readouterr().err, flags=re.MULTILINE)
    assert len(error) == 1 and all(line.startswith("  ") for line in error[0].splitlines()[1:])
    return error[0]


def sft(capsys, tiny, data, output, *more):
    return error_line(capsys, "sft", "--model", tiny, "--data", data, "--output", output, *more)


def test_missing_data_file(capsys, tiny, tmp_path):
    assert "nowhere.json doesn't exist" in sft(capsys, tiny, tmp_path / "nowhere.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_empty_data_file(capsys, tiny, tmp_path):
    (tmp_path / "a.jsonl").touch()
    assert "a.jsonl is empty" in sft(capsys, tiny, tmp_path / "a.jsonl", tmp_path / "out")


def test_data_that_is_not_json_names_the_line(capsys, tiny, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\noops\n')
    assert "a.jsonl, line 2: not JSON" in sft(capsys, tiny, tmp_path / "a.jsonl", tmp_path / "out")


def test_data_without_the_fields_names_them(capsys, tiny, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a"}])
    assert "it has 'question'" in sft(capsys, tiny, path, tmp_path / "out")


def test_ratio_outside_its_range(capsys, tiny, data, tmp_path):
    assert "d_ratio must be a number from 0 to 1" in sft(capsys, tiny, data, tmp_path / "out", "--d-ratio", "1.5")


def test_ratio_that_selects_nothing(capsys, tiny, data, tmp_path):
    sft(capsys, tiny, data, tmp_path / "out", "--layers", "7")
    out = ["--output", tmp_path / "out"]
    training = ["--model", tiny, "--data", data, *out]
    for command in (
        ["sft", *training],
        ["dpo", *training],
        ["grpo", *training, "--rewards", "exact"],
        ["select", "--model", tiny, *out],
        ["plan", tiny],
        ["estimate", tiny],
    ):
        message = error_line(capsys, *command, "--d-ratio", "0", "--q-ratio=0.0")
        assert "nothing is selected: q_ratio, d_ratio must be above 0, got 0" in message
    assert not (tmp_path / "out").exists()


def test_fsdp_without_a_gpu(capsys, tiny, data, tmp_path, monkeypatch):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        with monkeypatch.context() as environment:
            environment.setenv(name, "true")
            message = sft(capsys, tiny, data, tmp_path / "out", "--use-cpu")
        assert "use examples/accelerate/ddp.yaml or torchrun" in message


def test_output_that_holds_another_run(capsys, tiny, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text("{}")
    assert "holds another run" in sft(capsys, tiny, data, tmp_path / "out")


def test_nothing_to_resume(capsys, tiny, data, tmp_path):
    assert "holds no run to resume" in sft(capsys, tiny, data, tmp_path / "out", "--resume")


def test_every_prompt_longer_than_the_context(capsys, tiny, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "x" * 400, "output": "y"}])
    assert "none of 1 rows fits" in sft(capsys, tiny, path, tmp_path / "out")
    assert "none of 1 prompts fits" in error_line(
        capsys,
        "eval",
        "--model",
        tiny,
        "--data",
        write_jsonl(path, [{"instruction": "x" * 400, "output": "5"}]),
        "--task",
        "arithmetic",
        "--max-new-tokens",
        4,
    )


def test_model_without_the_projection_of_the_default_ratio(capsys, data, tmp_path):
    from train.tiny import tiny_tokenizer
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 259, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    message = sft(capsys, tmp_path / "model", data, tmp_path / "out")
    assert "it has l, so set l_ratio" in message and not (tmp_path / "out").exists()


def test_model_that_does_not_exist(capsys, data, tmp_path):
    assert "model ./nowhere doesn't exist" in sft(capsys, "./nowhere", data, tmp_path / "out")


@pytest.mark.parametrize("command", ["eval", "merge"])
def test_adapter_that_does_not_exist(capsys, tiny, data, tmp_path, command):
    rest = {"eval": ["--data", data, "--task", "arithmetic"], "merge": ["--output", tmp_path / "out"]}[command]
    message = error_line(capsys, command, "--model", tiny, "--adapter", tmp_path / "nowhere", *rest)
    assert "nowhere" in message and not (tmp_path / "out").exists()


def test_info_on_a_folder_without_adapter(capsys, tmp_path):
    assert f"{tmp_path} is not an S²FT adapter" in error_line(capsys, "info", tmp_path)
    assert f"{tmp_path / 'nosuch'} doesn't exist" in error_line(capsys, "info", tmp_path / "nosuch")


def test_merge_into_an_existing_folder(capsys, tiny, tmp_path):
    message = error_line(capsys, "merge", "--model", tiny, "--adapter", "x", "--output", tmp_path)
    assert f"output {tmp_path} exists" in message


def test_eval_with_an_unknown_task(capsys, tiny, data):
    assert "task must be one of" in error_line(capsys, "eval", "--model", tiny, "--data", data, "--task", "poetry")


def test_eval_on_data_that_can_not_be_scored(capsys, tiny, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])
    assert "has no number" in error_line(capsys, "eval", "--model", tiny, "--data", path, "--task", "arithmetic")


def test_eval_does_not_overwrite(capsys, tiny, data, tmp_path):
    (tmp_path / "r.json").touch()
    assert "r.json exists" in error_line(
        capsys, "eval", "--model", tiny, "--data", data, "--task", "arithmetic", "--output", tmp_path / "r.json"
    )


def test_the_traceback_option_raises_the_error(tiny, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        main(["info", str(tmp_path), "--traceback"])
    monkeypatch.setenv("S2FT_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["info", str(tmp_path)])


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert "there is no command 'trian'" in capsys.readouterr().err


def test_unknown_option(capsys, tiny):
    with pytest.raises((SystemExit, ValueError)) as error:
        main(["eval", "--model", str(tiny), "--data", "x", "--task", "arithmetic", "--colour", "red", "--traceback"])
    assert "--colour" in str(error.value) or error.value.code == 2


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_version(capsys):
    import s2ft

    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == f"s2ft {s2ft.__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(capsys, command):
    with pytest.raises(SystemExit) as leave:
        main([command, "--help"])
    assert leave.value.code == 0 and f"s2ft {command}" in capsys.readouterr().out


def help_of(capsys, command):
    with pytest.raises(SystemExit) as leave:
        main([command, "--help"])
    assert leave.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_every_option_is_shown_once_and_read_in_both_spellings(capsys):
    from dataclasses import fields

    from s2ft import S2FTConfig
    from s2ft.cli.parse import parse
    from s2ft.cli.select import SelectArguments

    printed = help_of(capsys, "select").split("options: -h")[1].split("example:")[0]
    for field in [field for kind in (SelectArguments, S2FTConfig) for field in fields(kind)]:
        name = f"no-{field.name}" if field.default is True else field.name
        assert len(re.findall(rf" --{name.replace('_', '-')}(?= [^-])", printed)) >= 1, name
        assert f"--{name}" not in printed or "_" not in name
        assert field.metadata["help"].split(";")[0].split(" (")[0] in printed or field.default is True
    for spelling in ("--d-ratio", "--d_ratio"):
        (config,) = parse("select", "", [S2FTConfig], [spelling, "0.5", "--ffn_kernel", "false"])
        assert config.d_ratio == 0.5 and config.ffn_kernel is False


def test_help_has_groups_choices_units_and_an_example(capsys):
    printed = help_of(capsys, "select")
    places = [printed.index(f"{group}: --") for group in GROUPS]
    assert places == sorted(places)
    for words in (
        "--selection {random,weight,activation,product,gradient}",
        "(default: 8 rows)",
        "(default: 1 % of the rows, at least 16)",
        "--no-ffn-kernel compute act(gate) * up of the FFN in separate steps",
    ):
        assert words in printed
    for command in COMMANDS:
        assert f"example: s2ft {command} " in help_of(capsys, command)


WITH_TRL = ("sft", "dpo", "grpo")  # the help of these lists TRL's options


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS if command not in WITH_TRL)]
)
def test_help_does_not_import_pytorch(arguments):
    code = f"""
import sys
from s2ft.cli.main import main
try:
    main({arguments!r})
except SystemExit as leave:
    assert leave.code == 0
print([name for name in ("torch", "transformers", "numpy", "matplotlib", "accelerate") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


@pytest.mark.parametrize("everything", [False, True])
def test_only_errors_of_other_libraries_are_shown(everything):
    code = f"""
import logging
from s2ft.cli.main import set_up_logging
set_up_logging({everything})
for name in ("torchao", "bitsandbytes.backends", "torch.utils._pytree", "s2ft.train"):
    logging.getLogger(name).warning(name + " warns")
    logging.getLogger(name).error(name + " fails")
logging.getLogger("s2ft.train").info("s2ft tells")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert sum(line.endswith(" fails") for line in lines) == 4 and "s2ft tells" in lines
    assert sum(line.endswith(" warns") for line in lines) == (4 if everything else 1) and "s2ft.train warns" in lines


SUGGESTIONS = [
    (["eval", "--lr", "1"], "there is no option --lr (see s2ft eval --help)"),
    (["eval", "--model_name_or_path=m"], "there is no option --model_name_or_path; did you mean --model?"),
    (["eval", "--max-new-token", "1"], "did you mean --max-new-tokens?"),
    (["eval", "--bf16"], "did you mean --dtype bfloat16?"),
    (["sft", "--learning-rat", "1"], "did you mean --learning-rate? (see s2ft sft --help)"),
    (["sft", "--selection", "wieght"], "got 'wieght'; did you mean weight?"),
    (["finetune", "--optimizer", "adamw_torch_fusd"], "did you mean adamw_torch_fused?"),
    (["export", "--format", "gguff"], "(see s2ft export --help)"),
    (["export", "--lora-rank", "3"], "there is no option --lora-rank; did you mean --rank?"),
    (["train"], "there is no command 'train'; did you mean sft? (see s2ft --help)"),
    (["evaluate"], "did you mean eval?"),
    (["push"], "did you mean sft --push-to-hub?"),
    (["fuse"], "did you mean combine?"),
    (["finetnue"], "did you mean finetune?"),
    (["--verison"], "there is no option '--verison'"),
]
VALUES = [
    (["--epochs", "many"], "--epochs must be a number, got 'many'"),
    (["--batch-size", "1.5"], "--batch-size must be a whole number, got '1.5'"),
    (["--max-steps", str(10**30)], "max_steps must be at most 4294967295"),
    (["--limit", "0"], "limit must be at least 1, got 0"),
    (["--eval-limit", "0"], "eval_limit must be at least 1, got 0"),
    (["--schedule", "sine"], "--schedule must be one of linear, cosine, "),
    (["--dtype", "int8"], "--dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
    (["--overwrite", "perhaps"], "--overwrite must be true or false, got 'perhaps'"),
    (["--d-ratio"], "--d-ratio: expected one argument"),
]


@pytest.mark.parametrize(
    "arguments, message", SUGGESTIONS, ids=lambda value: " ".join(value)[:30] if type(value) is list else ""
)
def test_an_unknown_name_is_answered_with_the_closest_one(arguments, message, capsys):
    needed = {name: ["--model", "m", "--data", "d", "--output", "o"] for name in ("sft", "finetune")}
    needed["eval"] = ["--model", "m", "--data", "d", "--task", "arithmetic"]
    needed["export"] = ["a", "--model", "m", "--output", "o"]
    command, *rest = arguments
    assert main([command, *needed.get(command, []), *rest]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message", VALUES, ids=lambda value: " ".join(value)[:30] if type(value) is list else ""
)
def test_a_wrong_value_is_one_line(arguments, message, capsys):
    assert main(["sft", "--model", "m", "--data", "d", "--output", "o", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("s2ft sft: error: ") and printed.endswith(" (see s2ft sft --help)\n")
    assert message in printed and printed.count("\n") == 1


def test_a_wrong_name_is_reported_before_a_missing_option(capsys):
    assert main(["eval", "--model_name_or_path", "m"]) == 2
    assert "no option --model_name_or_path; did you mean --model?" in capsys.readouterr().err
    assert main(["generate", "--model", "./nowhere", "--prompt", "--- a line"]) == 2
    assert "./nowhere doesn't exist" in capsys.readouterr().err


def test_missing_options_are_named(capsys):
    assert main(["select", "--d-ratio", "0.1"]) == 2
    assert capsys.readouterr().err == "s2ft select: error: missing: --model, --output (see s2ft select --help)\n"


def test_a_dtype_has_a_short_name():
    from s2ft.cli.parse import parse
    from s2ft.cli.select import SelectArguments

    (options,) = parse("select", "", [SelectArguments], ["--model", "m", "--output", "o", "--dtype", "bf16"])
    assert options.dtype == "bfloat16"


def test_data_that_python_can_not_read(capsys, tiny, tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100000)
    assert "deep.json, row 1: it is nested too deeply" in sft(capsys, tiny, tmp_path / "deep.json", tmp_path / "out")
    (tmp_path / "half.jsonl").write_text('{"instruction": "\\ud800", "output": "x"}\n')
    assert "half.jsonl, line 1: field 'instruction'" in sft(capsys, tiny, tmp_path / "half.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_that_no_tokenizer_can_encode(capsys, tiny, tmp_path):
    assert "prompt is not valid Unicode" in error_line(capsys, "generate", "--model", tiny, "--prompt", "a\udc80")
    (tmp_path / "prompt.txt").write_bytes(b"\xff")
    assert "prompt.txt is not UTF-8" in error_line(
        capsys, "generate", "--model", tiny, "--prompt-file", tmp_path / "prompt.txt"
    )


def test_an_output_folder_in_use_names_the_process(capsys, tiny, data, tmp_path):
    from s2ft.train.output import RunFolder

    with RunFolder(tmp_path / "out").reserved():
        for more in ([], ["--overwrite"], ["--resume"]):
            if more:
                (tmp_path / "out/run.json").write_text("{}")
            message = sft(capsys, tiny, data, tmp_path / "out", *more)
            assert f"out is in use: process {os.getpid()} on " in message


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at x] . PytorchStreamWriter failed writing file data/0"),
        RuntimeError("Error while serializing: I/O error: No space left on device"),
    ],
)
def test_a_file_that_can_not_be_written_is_one_line_and_exit_1(capsys, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr("s2ft.cli.info.describe", full)
    assert main(["info", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("s2ft info: error: ")
    with pytest.raises(type(error)):
        main(["info", str(tmp_path), "--traceback"])


def test_other_errors_are_raised(tmp_path, monkeypatch):
    monkeypatch.setattr("s2ft.cli.info.describe", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info", str(tmp_path)])


LESS_THAN_A_CHECKPOINT = 16_000  # bytes, and more than run.json and the rows of the data
FULL = """
import contextlib, io, json, resource, sys
from s2ft.cli.main import main
for size, arguments in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))   # as on a full disk
    words = io.StringIO()
    with contextlib.redirect_stderr(words), contextlib.redirect_stdout(io.StringIO()):
        status = main(arguments)
    print(json.dumps([status, words.getvalue().splitlines()[-1:]]))
"""


@pytest.mark.slow
def test_the_error_of_a_full_disk_in_training_names_the_kept_checkpoint(tiny, data, tmp_path):
    train = [
        "sft",
        "--model",
        str(tiny),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "out"),
        "--max-steps",
        "4",
        "--batch-size",
        "2",
        "--micro-batch-size",
        "2",
        "--save-steps",
        "2",
        "--d-ratio",
        "1",
    ]
    runs = [
        (LESS_THAN_A_CHECKPOINT, train),
        (1 << 30, [*train, "--resume", "--stop-after", "2"]),
        (LESS_THAN_A_CHECKPOINT, [*train, "--resume"]),
    ]
    done = subprocess.run([sys.executable, "-c", FULL, json.dumps(runs)], capture_output=True, text=True)
    (first, (words,)), (stopped, _), (last, (resumed,)) = map(json.loads, done.stdout.splitlines())
    assert (first, stopped, last) == (1, 0, 1) and "Traceback" not in done.stderr
    assert words.startswith("s2ft sft: error: ")
    assert words.endswith("no checkpoint was written, so the run starts again")
    assert resumed.endswith("checkpoint-2 is kept: go on from it with --resume")


@pytest.mark.parametrize("module", ["s2ft", "s2ft.cli"])
def test_error_of_a_process_is_one_line_and_exit_2(tmp_path, module):
    done = subprocess.run([sys.executable, "-m", module, "info", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert json.dumps(str(tmp_path))[1:-1] in done.stderr


def test_bars_of_other_libraries_are_off_in_a_log(monkeypatch):
    """tqdm reads its variable once, when it is imported. A bar that a library draws itself would be one endless line."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    for imported, expected in ((True, None), (False, "1")):
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
        (monkeypatch.setitem if imported else monkeypatch.delitem)(sys.modules, "tqdm", *([sys] if imported else []))
        set_up_logging(False)
        assert os.environ.get("TQDM_DISABLE") == expected
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
