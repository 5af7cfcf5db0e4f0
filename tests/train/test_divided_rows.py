"""Rows that are divided among devices: batches, and what is refused because it needs whole rows."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from support.inside import Devices, SFTArguments, SplitCollator, TokenCollator, check_divided_rows, parallel
from train.tiny import tiny_model

WHOLE = {"packing": True, "padding_free": True, "loss_type": "dft", "router_aux_loss_coef": 0.1}
ROWS = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, -100, -100, 8, 9]}, {"input_ids": [3, 4], "labels": [-100, 4]}]


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    monkeypatch.setattr(parallel, "devices_of", lambda arguments: Devices(2, context=2))


def arguments_for(folder, **changes):
    return SFTArguments(output_dir=str(folder), **changes)


def test_rows_are_padded_on_the_right_and_labels_are_shifted_before_the_division():
    batch = SplitCollator(pad=0, multiple=4)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [3, 4, 0, 0, 0, 0, 0, 0]]
    assert batch["shift_labels"].tolist() == [[-100, -100, 8, 9] + [-100] * 4, [4] + [-100] * 7]
    assert torch.equal(batch["labels"], batch["shift_labels"]) and batch["labels"] is not batch["shift_labels"]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert bool(batch["attention_mask"].all())  # so that no model makes a mask of all pairs of positions


def test_the_loss_is_that_of_padded_rows():
    model = tiny_model().eval()
    with torch.no_grad():
        expected = model(**TokenCollator(pad=0)(ROWS)).loss
        assert torch.isclose(model(**SplitCollator(pad=0, multiple=4)(ROWS)).loss, expected)


def ignoring(name):
    """A model whose forward drops an input."""
    model = tiny_model()
    forward = model.forward
    model.forward = lambda **inputs: forward(**{key: value for key, value in inputs.items() if key != name})
    return model


def with_attribute(name, value):
    model = tiny_model()
    setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    "make, option, message",
    [
        *((tiny_model, {name: value}, f"{name}.* whole rows.*2 context parallel") for name, value in WHOLE.items()),
        (lambda: tiny_model(attn_implementation="eager"), {}, "attention is 'eager'"),
        (lambda: with_attribute("_is_stateful", True), {}, "a state"),
        (lambda: with_attribute("loss_function", lambda *args, **options: None), {}, "standard loss"),
        (lambda: ignoring("shift_labels"), {}, "labels beside each position"),
        (lambda: ignoring("position_ids"), {}, "the positions"),
    ],
)
def test_options_and_models_that_would_train_something_else_are_refused(make, option, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_divided_rows(make(), arguments_for(tmp_path, **option))


def test_other_models_are_taken_and_whole_rows_are_not_checked(tmp_path, monkeypatch):
    check_divided_rows(tiny_model(), arguments_for(tmp_path))
    monkeypatch.setattr(parallel, "devices_of", lambda arguments: replace(Devices(2), tensor=2))
    check_divided_rows(with_attribute("_is_stateful", True), arguments_for(tmp_path, packing=True))


def test_deepspeeds_sequence_parallelism_is_refused(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(parallel, "_parallelism", lambda arguments: Mock(cp_size=1, sp_size=2, tp_enabled=False))
    with pytest.raises(ValueError, match="sp_size.*context.yaml"):
        parallel.devices_of(arguments_for(tmp_path))
