"""Selections are saved to files, loaded from files and adapter folders, and printed as tables."""

import json
import os

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.inside import AdapterFolderCONFIG as CONFIG, reading, record_of
from support.models import ALL_RATIOS, model_of
from support.states import with_adapter

import s2ft
from s2ft import Selection

UNITS = st.dictionaries(
    st.text("abc.1é", min_size=1, max_size=9),
    st.sets(st.integers(0, 2**40), min_size=1, max_size=9),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=30)
@given(units=UNITS)
def test_round_trip(units, tmp_path_factory):
    selection = Selection({path: torch.tensor(sorted(numbers)) for path, numbers in units.items()})
    path = tmp_path_factory.mktemp("selection") / "s.json"
    selection.save(path)
    assert Selection.load(path) == selection and [p.name for p in path.parent.iterdir()] == ["s.json"]


def test_loading_from_an_adapter_folder(tmp_path):
    model = with_adapter(model_of("llama"), s2ft.S2FTConfig(**ALL_RATIOS))
    s2ft.save_adapter(model, tmp_path)
    assert (
        record_of(with_adapter(model_of("llama"), s2ft.S2FTConfig(d_ratio=0.1, exclude=str(tmp_path)))).config.exclude
        == Selection.load(tmp_path).to_dict()
        == record_of(model).selection.to_dict()
    )
    config = json.loads((tmp_path / "s2ft_config.json").read_text())
    config["projections"]["model.layers.0.mlp.down_proj"]["units"][0] = 3
    (tmp_path / "s2ft_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not those that were saved"):
        Selection.load(tmp_path)


HOSTILE = {
    "pipe": os.mkfifo,
    "deep": lambda path: path.write_text("[" * 10**5),
    "folder": os.mkdir,
    "nothing": lambda path: None,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "key twice": lambda path: path.write_text('{"schema": 1, "schema": 1, "units": {"a": [1]}, "digest": ""}'),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "huge": lambda path: (path.touch(), os.truncate(path, reading.MAX_CONFIG + 1)),
}
WRONG = {
    "not JSON": ("{", "not JSON"),
    "no object": ("[]", "contains a list"),
    "another file": ({"a": 1}, "must have schema, units and digest"),
    "more": ({"schema": 1, "units": {}, "digest": "", "x": 0}, "must have schema, units and digest"),
    "newer": ({"schema": 2, "units": {"a": [0]}, "digest": ""}, "schema 2; this s2ft reads schema 1"),
    "units a list": ({"schema": 1, "units": [0], "digest": ""}, "by module path"),
    "no units": ({"schema": 1, "units": {}, "digest": ""}, "at least one"),
    "empty": ({"schema": 1, "units": {"a": []}, "digest": ""}, "a must have a list of unit numbers"),
    "text": ({"schema": 1, "units": {"a": ["1"]}, "digest": ""}, "a must have a list of unit numbers"),
    "bool": ({"schema": 1, "units": {"a": [True]}, "digest": ""}, "a must have a list of unit numbers"),
    "negative": ({"schema": 1, "units": {"a": [-1]}, "digest": ""}, "a must have a list of unit numbers"),
    "twice": ({"schema": 1, "units": {"a": [1, 1]}, "digest": ""}, "names a unit twice"),
    "digest": ({"schema": 1, "units": {"a": [1]}, "digest": "0"}, "not those that were saved"),
}


@pytest.mark.parametrize("wrong", (*HOSTILE, *WRONG))
def test_wrong_files_are_refused(wrong, tmp_path):
    """Before they are read, because reading a pipe or a device never ends; as a file and in an adapter's folder."""
    content, word = WRONG.get(wrong, (HOSTILE.get(wrong), ""))
    for source, path in ((tmp_path / "s.json", tmp_path / "s.json"), (tmp_path, tmp_path / CONFIG)):
        if callable(content):
            content(path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        for load in (Selection.load, lambda file: s2ft.attach(model_of("llama"), s2ft.S2FTConfig(units=str(file)))):
            with pytest.raises((ValueError, FileNotFoundError)) as error:
                load(source)
            assert str(source) in str(error.value) and (source == tmp_path or word in str(error.value))
