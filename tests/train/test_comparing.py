"""s2ft compare: the same rows for each method, no run made twice, honest words, and one line for a mistake."""

import json
import shutil
import sys

import pytest
from train.tiny import save_tiny, sums, write_jsonl

pytest.importorskip("trl")
pytest.importorskip("peft")

from support.inside import TokenRowTrainer, best_rate, report

from s2ft.cli.main import main

OPTIONS = "--max-steps 2 --batch-size 4 --d-ratio 0.1 --test-split-size 4 --rates 1 --lora-r 2"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("compare")
    save_tiny(work / "model")
    write_jsonl(work / "data.jsonl", sums(20))
    write_jsonl(work / "other.jsonl", [{"text": "A heron stands in the water and waits."}])
    return work


def compare(work, words, output="out"):
    """Make the runs in this process: another one would import everything again. Return status, lines and runs made."""
    made, runs = [], work / output / "runs.jsonl"
    files = ["--model", work / "model", "--data", work / "data.jsonl", "--output", work / output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "s2ft.train.comparing.own_process", lambda words: made.append(words[-3:]) or main(["compare", *words])
        )
        status = main(["compare", *map(str, files), *words.split()])
    return status, [json.loads(line) for line in (runs.read_text().splitlines() if runs.exists() else [])], made


@pytest.fixture(scope="module")
def compared(work):
    """The lines of three methods, and the batches of each in their order."""
    batches, step = [], TokenRowTrainer.training_step

    def recorded(self, model, inputs, *args, **options):
        batches.append((str(self.args.output_dir), inputs["input_ids"].tolist()))
        return step(self, model, inputs, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenRowTrainer, "training_step", recorded)
        words = f"{OPTIONS} --methods s2ft lora full --seeds 0 1 --forgetting-data {work / 'other.jsonl'}"
        status, lines, _ = compare(work, words)
    assert status == 0
    return words, lines, batches


def test_each_method_gets_the_same_batches_of_a_seed_and_the_same_held_out_rows(compared):
    _, lines, batches = compared
    found = {}
    for folder, ids in batches:
        found.setdefault(tuple(folder.rpartition("/")[2].split("-")), []).append(ids)
    for seed in "01":
        assert found["s2ft", "1", seed] == found["lora", "1", seed] == found["full", "1", seed]
    assert found["s2ft", "1", "0"] != found["s2ft", "1", "1"]
    before = [line["loss_before"] for line in lines]
    assert before == pytest.approx([before[0]] * 6, abs=1e-5) and {line["rows"] for line in lines} == {4}


def test_every_quantity_of_each_method_is_measured(work, compared):
    _, lines, _ = compared
    for line in lines:
        assert line["loss_after"] != pytest.approx(line["loss_before"], abs=1e-6) and line["forgetting"] != 0
        assert line["updates"] == 2 and line["peak_mib"] > 0 and line["seconds_per_step"] > 0 and line["rate"] > 0
    trained = {line["method"]: line["trained"] for line in lines}
    assert trained["lora"] == 2 * 2 * (2 * 32 + 2 * (32 + 16) + 2 * (32 + 64))  # rank 2 on q, k, v, up and down
    assert trained["s2ft"] < trained["full"]
    written = json.loads((work / "out/compare.json").read_text())
    assert set(written["best"]) == {"s2ft", "lora", "full"} and written["runs"]


def test_no_run_is_made_twice_and_a_new_seed_makes_its_own_runs_only(work, compared, capsys):
    words, lines, _ = compared
    assert compare(work, words) == (0, lines, [])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("S²FT", "LoRA", "full fine-tuning", "S²FT against LoRA:", "s a step"))
    assert compare(work, words.replace("lora full --seeds 0", "--seeds 2"))[2] == [["s2ft", "1", "2"]]
    other = words.replace("s2ft lora full --seeds 0 1", "lora") + " --weight-decay 0.1"
    assert compare(work, other)[2] == [["lora", "1", "0"]]


def test_runs_on_a_file_whose_content_changed_are_made_again_and_share_no_table(work, tmp_path, caplog):
    place = shutil.copytree(work / "model", tmp_path / "model").parent
    words = f"{OPTIONS} --methods s2ft"
    write_jsonl(place / "data.jsonl", sums(20))
    _, first, _ = compare(place, words)
    write_jsonl(place / "data.jsonl", [{**row, "output": "None."} for row in sums(20)])
    status, lines, made = compare(place, words)
    assert status == 0 and made == [["s2ft", "1", "0"]] and lines[0] == first[0]
    assert lines[1]["loss_before"] != first[0]["loss_before"]
    assert "1 run in" in caplog.text and "the training rows and the held-out rows changed" in caplog.text
    assert len(json.loads((place / "out/compare.json").read_text())["runs"]) == 1
    config = json.loads((place / "model/config.json").read_text())
    (place / "model/config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert compare(place, words)[2] == [["s2ft", "1", "0"]] and "the files of the model changed" in caplog.text


def test_rows_that_change_during_the_runs_make_no_table(work, tmp_path, monkeypatch, capsys):
    hashes = iter("12")
    monkeypatch.setattr("s2ft.train.comparing.hash_of_base", lambda *_: next(hashes))
    assert compare(work, f"{OPTIONS} --methods s2ft", tmp_path)[0] == 2
    assert "changed during the runs" in capsys.readouterr().err and not (tmp_path / "compare.json").exists()


def line_of(method, rate, seed, loss, **values):
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "loss_before": 3.0,
        "rows": 4,
        "updates": 2,
        "samples": [],
        "loss_after": loss,
        "seconds_per_step": 1.0,
        "peak_mib": 100.0,
        "trained": 10,
        **values,
    }


def test_the_best_rate_is_never_one_that_diverged_and_chance_is_not_called_better():
    ours = [line_of("s2ft", rate, seed, loss) for rate, seed, loss in
            ((1.0, 0, 2.0), (1.0, 1, 2.2), (2.0, 0, float("nan")), (2.0, 1, 1.0))]  # fmt: skip
    theirs = [line_of("lora", 1.0, seed, loss, seconds_per_step=1.5) for seed, loss in ((0, 2.1), (1, 2.15))]
    best = {"s2ft": best_rate(ours), "lora": best_rate(theirs)}
    assert (best["s2ft"]["rate"], best["s2ft"]["edge"], best["lora"]["edge"]) == (1.0, "smallest", "")
    text = report(ours + theirs, best)
    assert "S²FT by rate: loss 2.1000 at 1, nan at 2" in text and "loss: no clear difference" in text
    assert "s a step: S²FT is better by 0.50" in text
    assert "the best rate of S²FT is the smallest that was tried" in text and "one seed" not in text
    losses = {"s2ft": (1.0, 1.0, 4.0), "lora": (3.6, 3.6, 3.6)}  # the means differ, and one seed of three is worse
    far = {name: [line_of(name, 1.0, *pair) for pair in enumerate(losses[name])] for name in losses}
    assert "loss: no clear difference" in report(far["s2ft"], {name: best_rate(far[name]) for name in far})
    worse = {"s2ft": best_rate(ours[:1]), "lora": best_rate([line_of("lora", 1.0, 0, 1.5)])}
    assert "loss: LoRA is better by 0.5000" in (text := report(ours, worse)) and "one seed" in text


@pytest.mark.parametrize("words, said", [
    (f"{OPTIONS} --methods s2ft prefix", "method must be one of s2ft, lora"),
    (OPTIONS.replace("--test-split-size 4", ""), "needs held-out rows"),
    (f"{OPTIONS} --beta 0.1", "there is no option --beta"), (f"{OPTIONS} --rates 0", "rates must be above 0"),
    (f"{OPTIONS} --resume", "resume_from_checkpoint is an option of s2ft sft"),
    (f"{OPTIONS} --methods full --load-in-4bit", "can't be trained in full"),
])  # fmt: skip
def test_a_mistake_is_one_line_before_any_run(work, capsys, words, said):
    assert compare(work, words, "never") == (2, [], []) and not (work / "never").exists()
    assert said in capsys.readouterr().err


def test_a_folder_with_other_files_is_refused_and_a_failed_run_ends_the_command(work, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").write_text("")
    assert compare(work, OPTIONS, tmp_path)[0] == 2 and "holds no comparison" in capsys.readouterr().err
    monkeypatch.setattr(sys, "executable", "false")  # as a process that fails
    (tmp_path / "out/logs").mkdir(parents=True)  # of a first run that failed
    (tmp_path / "out/.lock").touch()
    with pytest.raises(SystemExit, match="1"):
        main(["compare", "--model", str(work / "model"), "--data", str(work / "data.jsonl"), "--output", str(tmp_path / "out"),
              *OPTIONS.split()])  # fmt: skip
