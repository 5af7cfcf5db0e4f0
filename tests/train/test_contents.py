"""A run is known again by what it reads: the hash follows every value of a row, the order, and nothing else."""

from datasets import Dataset
from support.inside import count_of_trained, hash_of_base, hash_of_rows


def tokens(*rows, place="data.jsonl"):
    return Dataset.from_list([{"input_ids": row, "labels": row[1:], "place": place} for row in rows])


def test_a_hash_depends_on_values_and_order_and_not_on_the_place():
    rows = [1, 2, 3], [4, 5], [6]
    first = hash_of_rows(tokens(*rows))
    assert first == hash_of_rows(tokens(*rows, place="moved.jsonl"))
    assert first == hash_of_rows(tokens([9], *rows).select([1, 2, 3]))
    others = ([1, 2, 3], [4, 5], [7]), ([4, 5], [1, 2, 3], [6]), ([1, 2, 3], [4, 5]), ([1, 2], [3, 4, 5], [6])
    assert len({first, *(hash_of_rows(tokens(*other)) for other in others)}) == 5


def test_texts_are_told_apart_from_none():
    texts = [[{"prompt": text, "text": None}] for text in ("a", "", None)]
    assert len({hash_of_rows(Dataset.from_list([{"prompt": "b", "text": "c"}, *rows])) for rows in texts}) == 3


def test_held_out_rows_that_are_trained_on_are_counted_as_often_as_they_stand():
    assert count_of_trained(tokens([1, 2], [3, 4], [3, 4]), tokens([3, 4], [5, 6], [3, 4])) == 2


def test_a_base_is_known_by_the_content_of_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = hash_of_base(str(tmp_path))
    (tmp_path / "README.md").write_text("words")
    assert hash_of_base(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"23")
    assert hash_of_base(str(tmp_path)) != first
