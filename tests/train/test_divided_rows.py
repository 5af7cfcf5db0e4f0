"""Rows that are divided among devices: batches, and what is refused because it needs whole rows."""

from dataclasses import replace

import pytest
import torch
from train.tiny import tiny_model

pytest.importorskip("trl")

from transformers.loss.loss_utils import ForCausalLMLoss

from s2ft.text.collator import SplitCollator
from s2ft.train import divided_rows
from s2ft.train.arguments import SFTArguments
from s2ft.train.divided_rows import check_divided_rows
from s2ft.train.parallel import Devices

ROWS = [{"input_ids": [5, 6, 7, 8, 9], "labels": [5, -100, -100, 8, 9]}, {"input_ids": [3, 4], "labels": [-100, 4]}]


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    monkeypatch.setattr(divided_rows, "devices_of", lambda arguments: Devices(2, context=2))


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
    from s2ft.text.collator import TokenCollator

    model = tiny_model().eval()
    with torch.no_grad():
        expected = model(**TokenCollator(pad=0)(ROWS)).loss
        assert torch.isclose(model(**SplitCollator(pad=0, multiple=4)(ROWS)).loss, expected)


@pytest.mark.parametrize(
    "option", [{"packing": True}, {"padding_free": True}, {"loss_type": "dft"}, {"router_aux_loss_coef": 0.1}]
)
def test_options_that_need_whole_rows_are_refused(option, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(option))}.* needs whole rows.*2 context parallel"):
        check_divided_rows(tiny_model(), arguments_for(tmp_path, **option))


def ignoring(name):
    """A model whose forward drops an input."""
    model = tiny_model()
    forward = model.forward
    model.forward = lambda **inputs: forward(**{key: value for key, value in inputs.items() if key != name})
    return model


def with_eager_attention():
    return tiny_model(attn_implementation="eager")


def with_state():
    model = tiny_model()
    model._is_stateful = True
    return model


def with_own_loss():
    model = tiny_model()
    model.loss_function = lambda *args, **options: ForCausalLMLoss(*args, **options)
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (with_eager_attention, "its attention is 'eager'"),
        (with_state, "a state that goes along the row"),
        (with_own_loss, "does not use the standard loss"),
        (lambda: ignoring("shift_labels"), "does not take the labels beside each position"),
        (lambda: ignoring("position_ids"), "does not take the positions"),
    ],
)
def test_models_that_would_train_something_else_are_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_divided_rows(make(), arguments_for(tmp_path))


def test_other_models_are_taken_and_whole_rows_are_not_checked(tmp_path, monkeypatch):
    check_divided_rows(tiny_model(), arguments_for(tmp_path))
    monkeypatch.setattr(divided_rows, "devices_of", lambda arguments: replace(Devices(2), tensor=2))
    check_divided_rows(with_state(), arguments_for(tmp_path, packing=True))


def test_sequence_parallelism_of_deepspeed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(divided_rows, "devices_of", lambda arguments: Devices(2, sequence=2))
    with pytest.raises(ValueError, match="sp_size.*context.yaml"):
        check_divided_rows(tiny_model(), arguments_for(tmp_path))
