"""Sources of data: files, folders, saved data sets and names on the hub give the same rows, and bad ones are named."""

import gzip
import json
import lzma

import datasets
import pytest
from train.tiny import write_jsonl

from s2ft.text.data import DataOptions, form_of, load_rows, load_split

ROWS = [{"instruction": f"{n}+1=", "output": str(n + 1)} for n in range(6)]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def load(*data, **options):
    return load_rows(DataOptions(data=[str(one) for one in data], **options))


def questions(rows):
    return [row["messages"][0]["content"] for row in rows]


CSV = "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in ROWS)
EXPECTED = [row["instruction"] for row in ROWS]


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


def saved_dict(path):
    datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2])
    ).save_to_disk(path)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text(lines()),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text(lines()),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1)),
    "data-in-one-line.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines().encode())),
    "rows.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
    "bom.jsonl": lambda path: path.write_text("\ufeff" + lines().replace("\n", "\r\n"), newline=""),
    "rows.csv": lambda path: path.write_text(CSV),
    "rows.tsv": lambda path: path.write_text(CSV.replace(",", "\t")),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "not-packed.csv.gz": lambda path: path.write_text(CSV),
    "rows.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "saved-with-splits": saved_dict,
    "folder": lambda path: (path.mkdir(), (path / "a.jsonl").write_text(lines(ROWS[:3])),
                            datasets.Dataset.from_list(ROWS[3:]).to_parquet(path / "b.parquet")),
    "splits": lambda path: (path.mkdir(), (path / "train.jsonl").write_text(lines()),
                            (path / "test.jsonl").write_text(lines(ROWS[:2]))),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("name", WRITERS)
def test_each_source_gives_the_same_rows(tmp_path, name, streaming):
    WRITERS[name](tmp_path / name)
    rows = load(tmp_path / name, streaming=streaming)
    assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
    assert questions(rows) == EXPECTED
    assert next(iter(rows))["place"].startswith(str(tmp_path / name))


def test_cells_of_csv_files_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n1,007\n2,NA\n3,true\n")
    assert [row["messages"][1]["content"] for row in load(tmp_path / "a.csv")] == ["007", "NA", "true"]


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a\u2028b", "output": "x"}\n')
    assert questions(load(tmp_path / "a.jsonl")) == ["a\u2028b"]


def test_forms_and_files_can_be_mixed(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], CHAT, {"text": "t"}, {"prompt": "5", "completion": "6"}])
    rows = load(first, write_jsonl(tmp_path / "b.jsonl", ROWS[1:2]))
    assert [row["place"] for row in rows] == [
        *(f"{first}, line {n}" for n in (1, 2, 3, 4)),
        f"{tmp_path / 'b.jsonl'}, line 1",
    ]
    assert rows[2]["text"] == "t" and (rows[3]["prompt"], rows[3]["completion"]) == ("5", "6")
    assert form_of(rows, DataOptions(data=["a"])) == "chat"


def test_rows_of_text_need_no_chat_template(tmp_path):
    texts = write_jsonl(tmp_path / "a.jsonl", [{"text": "t"}, {"prompt": "[5] ", "completion": "6"}])
    options = DataOptions(data=[str(texts)])
    assert form_of(load_rows(options), options) == "text"
    assert form_of(load_rows(options), DataOptions(data=["a"], system_prompt="Be brief.")) == "chat"
    lists = write_jsonl(tmp_path / "b.jsonl", [{"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}])
    assert form_of(load(lists), options) == "chat"


def test_tool_calls_keep_their_own_arguments_only(tmp_path):
    def call(**arguments):
        return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    chats = [{"messages": [CHAT["messages"][0], call(**arguments)]} for arguments in ({"a": 1}, {"b": [2.5]})]
    rows = load(write_jsonl(tmp_path / "a.jsonl", chats))
    assert [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows] == [{"a": 1}, {"b": [2.5]}]


@pytest.mark.parametrize("streaming", [False, True])
def test_values_in_tool_calls_are_exact(tmp_path, streaming):
    arguments = {"a": 0.1234567890123456, "b": 2**63, "c": "\u2028 \x00 é", "d": None, "e": 1e-320, "f": "5"}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    chats = [{"messages": [CHAT["messages"][0], {"role": "assistant", "tool_calls": [call]}]}] * 2 + [CHAT]
    rows = load(write_jsonl(tmp_path / "a.jsonl", chats), streaming=streaming)
    parts = [rows] if streaming else [rows, rows.select([1, 0]), rows.train_test_split(1, seed=0)["train"]]
    for part in parts:
        found = [row["messages"][1].get("tool_calls") for row in part]
        assert [call] in found and all(one in ([call], None) for one in found)
    big = [{"messages": [CHAT["messages"][0], {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": {"a": 2**70}}}]}]}]  # fmt: skip
    with pytest.raises(ValueError, match="line 1: a whole number has more than 64 bits"):
        list(load(write_jsonl(tmp_path / "b.jsonl", big), streaming=streaming))


def test_limit_counts_over_all_files(tmp_path):
    first, second = (
        write_jsonl(tmp_path / name, rows) for name, rows in (("a.jsonl", ROWS[:4]), ("b.jsonl", ROWS[4:]))
    )
    assert questions(load(first, second, limit=5)) == EXPECTED[:5]
    assert questions(load(first, second, limit=2, streaming=True)) == EXPECTED[:2]


@pytest.mark.parametrize("split, expected", [("train[:2]", [0, 1]), ("train[50%:]", [3, 4, 5]), ("train[-1:]", [5])])
def test_slice_of_a_split(tmp_path, split, expected):
    rows = load_rows(DataOptions(dataset_name=str(write_jsonl(tmp_path / "a.jsonl", ROWS)), dataset_train_split=split))
    assert questions(rows) == [EXPECTED[n] for n in expected]


def test_unknown_split_names_those_there_are(tmp_path):
    WRITERS["splits"](tmp_path / "a")
    with pytest.raises(ValueError, match="a has no split 'validation'; it has 'train', 'test'"):
        load_rows(DataOptions(dataset_name=str(tmp_path / "a"), dataset_train_split="validation"))


def test_mixture_has_the_fractions_and_repeats_nothing(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", ROWS)
    second = write_jsonl(tmp_path / "b.jsonl", [{**ROWS[0], "instruction": f"b{n}", "extra": 1} for n in range(9)])
    entries = [
        {"path": str(first), "fraction": 3},
        {"path": "json", "data_files": {"train": str(second)}, "split": "train[1:]", "fraction": 1,
         "columns": ["instruction", "output"]},
    ]  # fmt: skip
    assert questions(load_rows(DataOptions(datasets=entries))) == [*EXPECTED, "b1", "b2"]
    whole = [{key: value for key, value in entry.items() if key != "fraction"} for entry in entries]
    assert len(load_rows(DataOptions(datasets=whole))) == 14
    with pytest.raises(ValueError, match="fraction must be a positive number in every entry or in none"):
        load_rows(DataOptions(datasets=[entries[0], whole[1]]))


def test_streamed_mixture_draws_by_the_fractions(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [{**ROWS[0], "instruction": "a"}] * 300)
    second = write_jsonl(tmp_path / "b.jsonl", [{**ROWS[0], "instruction": "b"}] * 300)
    entries = [{"path": str(first), "fraction": 0.75}, {"path": str(second), "fraction": 0.25}]
    drawn = questions(load_rows(DataOptions(datasets=entries, streaming=True)).take(200))
    assert drawn == questions(load_rows(DataOptions(datasets=entries, streaming=True)).take(200))
    assert 120 < drawn.count("a") < 180


def test_validation_split_is_seeded_and_disjoint(tmp_path):
    options = DataOptions(data=[str(write_jsonl(tmp_path / "a.jsonl", ROWS))], test_split_size=2)
    (train, held_out), again, other = (load_split(options, seed=seed) for seed in (0, 0, 1))
    assert sorted(questions(train) + questions(held_out)) == EXPECTED and len(held_out) == 2
    assert [questions(part) for part in again] == [questions(train), questions(held_out)] != [*map(questions, other)]


def test_test_split_of_a_named_data_set_is_held_out_if_the_run_evaluates(tmp_path):
    WRITERS["saved-with-splits"](tmp_path / "a")
    options = DataOptions(dataset_name=str(tmp_path / "a"))
    assert questions(load_split(options, seed=0)[1]) == EXPECTED[:2]
    assert load_split(options, seed=0, evaluates=False)[1] is None
    with_data = DataOptions(data=[str(tmp_path / "a")], eval_data=[str(tmp_path / "a")], limit=1)
    assert [len(part) for part in load_split(with_data, seed=0, eval_limit=4)] == [1, 4]


def test_bad_rows_are_counted_and_the_first_shown(tmp_path):
    rows = [*ROWS, *({"instruction": "a", "output": ""} for _ in range(4))]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value).splitlines() == [
        "5 of 11 rows can't be used; correct them, or leave them out with skip_bad_rows (--skip-bad-rows):",
        *(f"  {path}, line {n}: field 'output' is empty" for n in (7, 8, 9)),
        "  and 2 more",
    ]


def test_bad_rows_are_left_out_if_asked(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], {"instruction": "a"}, ROWS[1]])
    assert questions(load(path, skip_bad_rows=True)) == EXPECTED[:2]
    assert f"left out 1 of 3 rows that can't be used:\n  {path}, line 2: field 'output' is missing" in caplog.text
    assert questions(load(path, skip_bad_rows=True, streaming=True)) == EXPECTED[:2]


def test_streamed_bad_row_is_an_error_when_it_is_read(tmp_path):
    rows = load(write_jsonl(tmp_path / "a.jsonl", [ROWS[0], {"instruction": "a"}]), streaming=True)
    with pytest.raises(ValueError, match="line 2: field 'output' is missing"):
        list(rows)


def test_no_row_left_says_why(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"x": 1}] * 2)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="none of 2 rows can be used:\n.*line 1: needs messages"):
            load(path, skip_bad_rows=True, streaming=streaming)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b" \n\n", "a.jsonl is empty"),
        ("a.json", b"[]", "has no rows"),
        ("a.jsonl", json.dumps(ROWS[0]).encode() + b"\n\n{broken\n", "a.jsonl, line 3: not JSON"),
        ("a.json", b'[\n{"instruction": "a", "output": "b"},\n{"instruction": }]', "a.json, line 3: not JSON"),
        ("a.jsonl", b'{"instruction": "\xff"}', "not UTF-8"),
        ("a.json", b"[" * 100000, "a.json, row 1: it is nested too deeply"),
        ("a.json", json.dumps(ROWS)[:-1].encode() + b"," + b"[" * 100000, "a.json, row 7: it is nested too deeply"),
        ("a.jsonl", lines(ROWS[:2]).encode() + b'{"a": ' + b"[" * 100000, "a.jsonl, line 3: it is nested too deeply"),
        ("a.jsonl", b'{"instruction": "a", "output": ' + b"9" * 6000 + b"}", "a.jsonl, line 1: a number is too long"),
        ("a.parquet", b"no parquet", "a.parquet can't be read as parquet"),
        ("a.csv", b'question,answer\n"a,b\n', "a.csv can't be read as csv"),
        ("a.jsonl.gz", gzip.compress(lines().encode(), mtime=0)[:40], "can't be read"),
        ("a.txt", b"plain", "a.txt is plain text: write JSON lines"),
    ],
)
def test_file_that_can_not_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_missing_files_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json doesn't exist"):
        load(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="has no file of the kinds .json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no data file matches .*\*.jsonl"):
        load(tmp_path / "*.jsonl")
    with pytest.raises(ValueError, match="no data was given"):
        load()


def test_pattern_stands_for_the_files_that_match_it(tmp_path):
    for name, rows in (("b.jsonl", ROWS[3:]), ("a.jsonl", ROWS[:3])):
        write_jsonl(tmp_path / name, rows)
    assert questions(load(tmp_path / "*.jsonl")) == EXPECTED
    sliced = load_rows(DataOptions(dataset_name=str(tmp_path / "*.jsonl"), dataset_train_split="train[:4]"))
    assert questions(sliced) == EXPECTED[:4]


def test_name_on_the_hub_is_loaded_once_with_its_options(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: calls.append((args, options)) or
                        datasets.Dataset.from_list(ROWS))  # fmt: skip
    rows = load_rows(
        DataOptions(
            dataset_name="org/sums", dataset_config="main", dataset_train_split="train[:6]", dataset_revision="v1"
        )
    )
    assert questions(rows) == EXPECTED and rows[0]["place"] == "org/sums, row 1" and len(calls) == 1
    assert calls[0][0] == ("org/sums", "main")
    assert {"split": "train[:6]", "revision": "v1", "streaming": False}.items() <= calls[0][1].items()


def test_name_that_the_hub_does_not_give_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("Couldn't reach 'org/sums' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError) as error:
        load("org/sums")
    assert "org/sums can't be loaded: there is no such file or folder here" in str(error.value)
    assert "HF_HUB_OFFLINE" in str(error.value) and "\n" not in str(error.value)


def test_reading_files_leaves_the_cache_of_datasets_alone(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
    for name in ("rows.parquet", "rows.csv.gz", "rows.jsonl.gz"):
        WRITERS[name](tmp_path / name)
        before = {file for file in cache.rglob("*") if file.is_file()}
        assert questions(load(tmp_path / name)) == EXPECTED
        assert {file for file in cache.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": ["a"], "dataset_name": "b"}, "data and dataset_name both say what to train on"),
        ({"datasets": [{"name": "a"}]}, "datasets, entry 1: needs 'path'"),
        ({"datasets": [{"path": "a", "weight": 1}]}, "datasets, entry 1: unknown key 'weight'; known are path"),
        ({"field": ["reply"]}, "field must be OUR_NAME=NAME_IN_THE_DATA"),
        ({"field": {"reply": "output"}}, "field: 'reply' is no field of s2ft; choose from messages"),
        ({"field": ["output=a", "input=a"]}, "field: 'a' has two meanings"),
        ({"too_long": "drop"}, "too_long must be one of leave_out, cut"),
        ({"test_split_size": 1.5}, "test_split_size must be a share between 0 and 1 or a number of rows"),
        ({"test_split_size": 0.1, "eval_data": "b"}, "test_split_size and eval_data both say"),
    ],
)
def test_options_that_contradict_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)
