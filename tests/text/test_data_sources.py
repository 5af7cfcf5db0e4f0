"""Sources of data: files, folders, saved data sets and names on the hub give the same rows, and bad ones are named."""

import gzip
import json
import lzma
from unittest.mock import Mock

import datasets
import pytest
from support.inside import DataOptions, form_of, load_rows, load_split
from train.tiny import write_jsonl

ROWS = [{"instruction": f"{n}+1=", "output": str(n + 1)} for n in range(6)]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
EXPECTED = [row["instruction"] for row in ROWS]
CSV = "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in ROWS)


def load(*data, **options):
    return load_rows(DataOptions(data=[str(one) for one in data], **options))


def questions(rows):
    return [row["messages"][0]["content"] for row in rows]


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


def splits(path):
    parts = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))
    parts.save_to_disk(path)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text(lines()),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text("\n" + lines().replace("\n", "\n\n")),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1)),
    "data-in-one-line.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines().encode())),
    "rows.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
    "bom.jsonl": lambda path: path.write_text("\ufeff" + lines().replace("\n", "\r\n"), newline=""),
    "rows.csv": lambda path: path.write_text(CSV),
    "rows.tsv": lambda path: path.write_text(CSV.replace(",", "\t")),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(CSV.encode())),
    "rows.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "saved-with-splits": splits,
    "folder": lambda path: (path.mkdir(), (path / "a.jsonl").write_text(lines(ROWS[:3])),
                            datasets.Dataset.from_list(ROWS[3:]).to_parquet(path / "b.parquet")),
    "splits": lambda path: (path.mkdir(), (path / "train.jsonl").write_text(lines()),
                            (path / "test.jsonl").write_text(lines(ROWS[:2]))),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_each_source_gives_the_same_rows_and_the_cache_of_datasets_nothing(tmp_path, name, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
    WRITERS[name](tmp_path / name)
    before = {file for file in cache.rglob("*") if file.is_file()}  # by the writer
    rows = load(tmp_path / name)
    assert questions(rows) == EXPECTED and next(iter(rows))["place"].startswith(str(tmp_path / name))
    assert all(file in before or not file.stat().st_size for file in cache.rglob("*") if file.is_file())  # but locks


def test_cells_and_strings_stay_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n1,007\n2,NA\n3,true\n")
    assert [row["messages"][1]["content"] for row in load(tmp_path / "a.csv")] == ["007", "NA", "true"]
    (tmp_path / "a.jsonl").write_text(
        '{"instruction": "a\u2028b", "output": 10000000000}\n{"question": 1, "answer": 2.5}'
    )
    rows = load(tmp_path / "a.jsonl")
    assert questions(rows) == ["a\u2028b", "1"] and rows[0]["messages"][1]["content"] == "10000000000"


def test_forms_and_files_can_be_mixed(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], CHAT, {"text": "t"}, {"prompt": "5", "completion": "6"}])
    second = write_jsonl(tmp_path / "b.jsonl", ROWS[1:2])
    rows = load(first, second)
    assert [row["place"] for row in rows] == [*(f"{first}, line {n}" for n in (1, 2, 3, 4)), f"{second}, line 1"]
    assert rows[2]["text"] == "t" and (rows[3]["prompt"], rows[3]["completion"]) == ("5", "6")
    assert form_of(rows, DataOptions(data=["a"])) == "chat"


def test_rows_of_text_need_no_chat_template(tmp_path):
    texts = write_jsonl(tmp_path / "a.jsonl", [{"text": "t"}, {"prompt": "[5] ", "completion": "6"}])
    options = DataOptions(data=[str(texts)])
    assert form_of(load_rows(options), options) == "text"
    assert form_of(load_rows(options), DataOptions(data=["a"], system_prompt="Be brief.")) == "chat"
    whole = load(write_jsonl(tmp_path / "c.jsonl", [{"text": "t"}]))
    assert form_of(whole, DataOptions(data=["a"], system_prompt="Be brief.")) == "text"  # which has no use for it
    lists = write_jsonl(tmp_path / "b.jsonl", [{"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}])
    assert form_of(load(lists), options) == "chat"


def calling(**arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [CHAT["messages"][0], {"role": "assistant", "tool_calls": [call]}]}


def test_values_in_tool_calls_are_exact_and_their_own(tmp_path):
    arguments = {"a": 0.1234567890123456, "b": 2**70, "c": "\u2028 \x00 é", "d": None, "e": 1e-320, "f": "5"}
    expected = [arguments, {"g": [2.5]}, arguments]
    rows = load(write_jsonl(tmp_path / "a.jsonl", [calling(**one) for one in expected]))
    for part in (rows, rows.select([2, 1, 0]), rows.train_test_split(1, seed=0)["train"]):
        found = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in part]
        assert arguments in found and all(one in expected for one in found)


def test_tables_do_not_give_a_tool_the_arguments_of_another(tmp_path):
    rows = [calling(city="Lima"), calling(x=["2"])]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        found = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in load(path)]
        assert found == [{"city": "Lima"}, {"x": ["2"]}]
    plain = [{"instruction": "a", "context": context, "response": "b"} for context in ("c", None)]
    datasets.Dataset.from_list(plain).to_parquet(tmp_path / "b.parquet")  # a null of a row itself is its own
    assert len(load_rows(DataOptions(data=[str(tmp_path / "b.parquet")], field=["input=context"]))) == 2


def test_a_line_whose_only_list_is_a_chat_is_a_row(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": number, "dialog": CHAT["messages"]} for number in (1, 2)])
    rows = load_rows(DataOptions(data=[str(path)], field=["messages=dialog"]))
    assert [row["messages"] for row in rows] == [CHAT["messages"]] * 2


def test_limit_counts_over_all_files(tmp_path):
    files = write_jsonl(tmp_path / "a.jsonl", ROWS[:4]), write_jsonl(tmp_path / "b.jsonl", ROWS[4:])
    assert questions(load(*files, limit=5)) == EXPECTED[:5]


def test_a_slice_without_rows_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train\[:5%\] has none of the 6 rows"):
        load(write_jsonl(tmp_path / "a.jsonl", ROWS), dataset_train_split="train[:5%]")


@pytest.mark.parametrize("split, expected", [("train[:2]", [0, 1]), ("train[50%:]", [3, 4, 5]), ("train[-1:]", [5])])
def test_slice_of_a_split(tmp_path, split, expected):
    for number in range(2):
        write_jsonl(tmp_path / f"{number}.jsonl", ROWS[number * 3 :][:3])
    rows = load_rows(DataOptions(dataset_name=str(tmp_path / "*.jsonl"), dataset_train_split=split))
    assert questions(rows) == [EXPECTED[n] for n in expected]


def test_mixture_has_the_fractions_and_repeats_nothing(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", ROWS)
    second = write_jsonl(tmp_path / "b.jsonl", [{**ROWS[0], "instruction": f"b{n}", "extra": 1} for n in range(9)])
    entries = [
        {"path": str(first), "fraction": 3},
        {"path": "json", "data_files": {"train": str(second)}, "split": "train[1:]", "fraction": 1,
         "columns": ["instruction", "output"]},
    ]  # fmt: skip
    assert questions(load_rows(DataOptions(datasets=entries))) == [*EXPECTED, "b1", "b2"]
    assert questions(load_rows(DataOptions(datasets=entries, limit=4))) == [*EXPECTED[:3], "b1"]
    whole = [{key: value for key, value in entry.items() if key != "fraction"} for entry in entries]
    assert len(load_rows(DataOptions(datasets=whole))) == 14
    assert len(load_rows(DataOptions(datasets=[{**whole[1], "split": "train[:4]"}, whole[0]], limit=2))) == 2
    second.write_text(second.read_text() + "{broken\n")
    with pytest.raises(ValueError, match="line 10: not JSON"):
        load_rows(DataOptions(datasets=entries))
    with pytest.raises(ValueError, match="fraction .* in every entry"):
        load_rows(DataOptions(datasets=[entries[0], whole[1]]))


def test_validation_split_is_seeded_and_disjoint(tmp_path):
    options = DataOptions(data=[str(write_jsonl(tmp_path / "a.jsonl", ROWS))], test_split_size=2)
    first, again, other = ([*map(questions, load_split(options, seed=seed))] for seed in (0, 0, 1))
    assert sorted(sum(first, [])) == EXPECTED and len(first[1]) == 2 and again == first != other


def test_test_split_of_a_named_data_set_is_held_out_if_the_run_evaluates(tmp_path):
    splits(tmp_path / "a")
    for options in (DataOptions(dataset_name=str(tmp_path / "a")), DataOptions(data=[str(tmp_path / "a")])):
        assert questions(load_split(options, seed=0)[1]) == EXPECTED[:2]
        assert load_split(options, seed=0, evaluates=False)[1] is None
    with_data = DataOptions(data=[str(tmp_path / "a")], eval_data=[f"{tmp_path / 'a'}/"], limit=1)
    assert [*map(questions, load_split(with_data, seed=0, eval_limit=4))][1] == EXPECTED[:2]  # not the training rows
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b/train.jsonl", ROWS[:1])
    both = DataOptions(data=[str(tmp_path / "a")], eval_data=[str(tmp_path / "a"), str(tmp_path / "b")])
    assert questions(load_split(both, seed=0)[1]) == [*EXPECTED[:2], EXPECTED[0]]  # all of what is not trained on
    path = str(write_jsonl(tmp_path / "a.jsonl", ROWS))  # whose every split is the whole file
    assert load_split(DataOptions(dataset_name=path), seed=0)[1] is None
    sliced = DataOptions(dataset_name=path, eval_data=[path], dataset_train_split="train[4:]")
    assert [len(part) for part in load_split(sliced, seed=0)] == [2, 6]


def test_name_on_the_hub_is_loaded_once_with_its_options(monkeypatch):
    load_dataset = Mock(return_value=datasets.Dataset.from_list(ROWS))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"dataset_config": "main", "dataset_train_split": "train[:6]", "dataset_revision": "v1"}
    rows = load_rows(DataOptions(dataset_name="org/sums", **options))
    assert questions(rows) == EXPECTED and rows[0]["place"] == "org/sums, row 1"
    (call,) = load_dataset.call_args_list
    assert call.args == ("org/sums", "main")
    assert {"split": "train[:6]", "revision": "v1", "streaming": False}.items() <= call.kwargs.items()
    rows = load_rows(DataOptions(dataset_name="org/sums", limit=2))  # the hub sends what is needed only
    assert questions(rows) == EXPECTED[:2] and load_dataset.call_args.kwargs["streaming"]


def test_name_that_the_hub_does_not_give_is_one_line(monkeypatch):
    error = ConnectionError("Couldn't reach 'org/sums' on the Hub\nsecond line")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(ValueError, match="^.*org/sums.*no such file.*HF_HUB_OFFLINE[^\n]*$"):
        load("org/sums")


# ---- bad rows and files --------------------------------------------------------------------------------


def test_bad_rows_are_counted_and_the_first_shown_or_left_out(tmp_path, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, *[{"instruction": "a", "output": ""} for _ in range(4)]])
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError) as error:
        load(path)
    found = [f"  {path}, line {n}: field 'output' is empty" for n in (7, 8, 9)]
    assert str(error.value).splitlines()[1:] == [*found, "  and 2 more"] and "5 of 11 rows" in str(error.value)
    assert questions(load(path, skip_bad_rows=True)) == EXPECTED
    assert "left out 5 of 11 rows" in caplog.text and found[0] in caplog.text
    path = write_jsonl(path, [{"x": 1}] * 2)
    with pytest.raises(ValueError, match="none of 2 rows can be used:\n.*line 1: needs messages"):
        load(path, skip_bad_rows=True)


DEEP = b"[" * 100000
BAD_FILES = {  # content, and words of the message
    "empty.jsonl": (b"", "empty"),
    "blank.jsonl": (b" \n\n", "empty"),
    "none.json": (b"[]", "no rows"),
    "broken.jsonl": (json.dumps(ROWS[0]).encode() + b"\n\n{broken\n", "line 3: not JSON.*character 2"),
    "broken.json": (b'[\n{"instruction": "a", "output": "b"},\n{"instruction": }]', "line 3: not JSON"),
    "latin.jsonl": (b'{"instruction": "\xff"}', "UTF-8"),
    "deep.json": (DEEP, "nested"),
    "deep.jsonl": (lines(ROWS[:2]).encode() + b'{"a": ' + DEEP, "line 3.*nested"),
    "long.jsonl": (b'{"instruction": "a", "output": ' + b"9" * 6000 + b"}", "line 1.*number is too long"),
    "a.parquet": (b"no parquet", "can't be read as parquet"),
    "a.csv": (b'question,answer\n"a,b\n', "can't be read as csv"),
    "not-packed.csv.gz": (CSV.encode(), "can't be read as csv"),
    "cut.jsonl.gz": (gzip.compress(lines().encode(), mtime=0)[:40], "can't be read"),
    "a.txt": (b"plain", "plain text: write JSON lines"),
    "a.xlsx": (b"PK\x03\x04\xc0", "a spreadsheet: save it as CSV"),
    "long.csv.gz": (gzip.compress(b"question,answer\n1,2\n" + b"3," * 2**25 + b"4", 1), "line 3 has more than 64 MiB"),
    "comma.csv": (b"question,answer\nWhat is 1, 2?,3\n", "more fields than the first line"),
    "A.CSV": (b'question,answer\n"a,b\n', "can't be read as csv"),
    "no-header.csv": (b"What is 1?,one\nWhat is 2?,two\n", "What is 1"),
    "control.jsonl": (b'{"question": "a\x01b", "answer": "c"}', "control character .character 16"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_file_that_can_not_be_read_is_named(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){name}.*{message}"):
        load(tmp_path / name)


def test_the_semicolons_of_a_spreadsheet_divide_its_fields(tmp_path):
    (tmp_path / "a.csv").write_text("question;answer\n2,5 + 1;3,5\n")
    assert load(tmp_path / "a.csv")[0]["messages"][1]["content"] == "3,5"


def test_what_is_read_as_a_word_or_left_out_is_said(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("question,answer,note\n1,NaN,a\n2,3,b\n")
    (tmp_path / "b.xlsx").write_bytes(b"PK")
    assert len(load(tmp_path)) == 2
    assert "'answer' say NaN" in caplog.text and "b.xlsx" in caplog.text and "note" not in caplog.text
    (tmp_path / "a.csv").rename(tmp_path / "train.csv")
    write_jsonl(tmp_path / "extra.jsonl", ROWS)
    assert len(load(tmp_path)) == 2 and "b.xlsx, extra.jsonl: not read" in caplog.text


@pytest.mark.parametrize(
    "data, options, kind, message",
    [
        (["nowhere.json"], {}, FileNotFoundError, "nowhere.json"),
        (["empty"], {}, ValueError, "no file of the kinds"),
        (["*.jsonl"], {}, FileNotFoundError, "matches"),
        ([], {}, ValueError, "no data"),
        (["splits"], {"dataset_train_split": "validation"}, ValueError, "validation.*'train', 'test'"),
        (["a"], {"dataset_name": "b"}, ValueError, "data and dataset_name"),
        ([], {"datasets": [{"name": "a"}]}, ValueError, "entry 1.*path"),
        ([], {"datasets": [{"path": "a", "weight": 1}]}, ValueError, "entry 1.*weight"),
        ([], {"field": ["reply"]}, ValueError, "field.*reply"),
        ([], {"field": {"reply": "output"}}, ValueError, "reply"),
        ([], {"field": ["output=a", "input=a"]}, ValueError, "two meanings"),
        ([], {"too_long": "drop"}, ValueError, "too_long.*leave_out"),
        ([], {"test_split_size": 1.5}, ValueError, "test_split_size"),
        ([], {"test_split_size": 0.1, "eval_data": "b"}, ValueError, "test_split_size.*eval_data"),
    ],
)
def test_data_that_is_not_there_and_options_that_contradict_are_named(tmp_path, data, options, kind, message):
    (tmp_path / "empty").mkdir()
    WRITERS["splits"](tmp_path / "splits")
    with pytest.raises(kind, match=message):
        load(*(tmp_path / one for one in data), **options)
