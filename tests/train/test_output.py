"""The output folder: a run neither loses nor mixes in files of another run."""

from contextlib import nullcontext

import pytest
from support.inside import RunFolder, read_log


def test_overwriting_removes_only_the_earlier_run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin({"a": 1})
    folder.log.write_text("{}\n"), (tmp_path / "checkpoint-3").mkdir(), (tmp_path / "notes.txt").touch()
    folder.begin({"a": 2})
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "notes.txt"}


def test_a_resumed_run_must_have_the_options_of_the_run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin({"training.seed": 5, "model": "a"}, config="model: a\n")
    assert folder.config.read_text() == "model: a\n"
    folder.begin({"training.seed": 5, "model": "a"}, resume=True)
    for options, said in (
        ({"training.seed": 5, "model": "b"}, "model was 'a', is 'b'"),
        ({"model": "a"}, "seed was 5"),
    ):
        with pytest.raises(ValueError, match=said):
            folder.begin(options, resume=True)


def test_a_resumed_run_must_read_the_rows_of_the_run_and_may_hold_out_others(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    folder.begin({"a": 1}, contents={"training rows": "1", "held-out rows": "2"})
    folder.begin({"a": 1}, resume=True, contents={"training rows": "1"})  # it evaluates no more
    with pytest.raises(ValueError, match="the training rows have changed since the run"):
        folder.begin({"a": 1}, resume=True, contents={"training rows": "3"})
    other = {"training rows": "1", "held-out rows": "3"}
    with pytest.raises(ValueError, match="the held-out rows have changed"):
        folder.begin({"a": 1}, resume=True, contents=other)
    folder.begin({"a": 1}, resume=True, contents=other, may_change=["held-out rows"])
    assert "the held-out rows have changed" in caplog.text


def test_a_run_of_an_earlier_version_which_has_no_hashes_goes_on(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin({"a": 1})
    folder.begin({"a": 1}, resume=True, contents={"training rows": "1"})


def division(devices, micro, passes):
    return {
        "groups_of_devices": devices,
        "training.batch_size": devices * micro * passes,
        "training.per_device_train_batch_size": micro,
        "training.gradient_accumulation_steps": passes,
    }


@pytest.mark.parametrize(
    "now, said",
    [
        (division(4, 2, 1), ""),
        (division(2, 2, 2), ""),
        (division(1, 8, 1), ""),
        (division(2, 2, 1), "training.batch_size was 8, is 4"),
        (division(4, 1, 2), "per_device_train_batch_size was 2, is 1"),  # the same devices: the sums need not differ
    ],
)
def test_a_run_goes_on_with_the_same_rows_on_another_number_of_devices(tmp_path, now, said):
    folder = RunFolder(tmp_path)
    folder.begin(division(4, 2, 1))
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        folder.begin(now, resume=True)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100000])
def test_options_that_can_not_be_read_name_the_file(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run.json"):
        RunFolder(tmp_path).begin({}, resume=True)


@pytest.mark.parametrize("line", ["3", '{"ste', '{"loss": 1}', '{"step": "1"}', "[" * 100000])
def test_a_log_is_read_up_to_the_first_invalid_line(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]


@pytest.mark.parametrize(
    "make, options, kind, message",
    [
        (lambda path: None, {"resume": True}, FileNotFoundError, "holds no run to resume"),
        (lambda path: path.touch(), {}, FileExistsError, "is a file"),
        (
            lambda path: (path.mkdir(), (path / "thesis.tex").touch()),
            {"overwrite": True},
            FileExistsError,
            "isn't empty",
        ),
    ],
)
def test_a_folder_that_a_run_can_not_use_is_refused_and_not_touched(tmp_path, make, options, kind, message):
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message), RunFolder(tmp_path / "out").reserved(**options):
        raise AssertionError
    assert sorted(tmp_path.rglob("*")) == before
