"""What a CUDA graph would contain, without a GPU: PyTorch is made to say that a graph is being captured."""

import pytest
import torch
from support.gpu import small_model

import s2ft.attached.active
import s2ft.layers.base


@pytest.fixture
def written_in_capture(monkeypatch):
    """A list of how many slices each write has had, while PyTorch says that a graph is being captured."""
    counts = []
    write_slices_ = s2ft.layers.base.write_slices_

    def counted(slices):
        counts.append(len(slices))
        write_slices_(slices)

    def capture():
        monkeypatch.setattr(s2ft.layers.base, "write_slices_", counted)
        for module in (s2ft.layers.base, s2ft.attached.active):
            monkeypatch.setattr(module, "is_being_captured", lambda tensor: True)
        return counts

    return capture


@pytest.mark.parametrize("trains", (False, True), ids=("decoding", "training"))
def test_a_graph_writes_each_slice_once_in_a_replay(trains, written_in_capture):
    model, ids = small_model("cpu")
    slices = sum(name.endswith(".s2") for name, _ in model.named_parameters())
    model(input_ids=ids)
    counts = written_in_capture()
    with torch.set_grad_enabled(trains):
        model(input_ids=ids)
    assert counts == [slices]


def test_a_layer_that_is_captured_alone_writes_its_slice_itself(written_in_capture):
    """Also after a capture of the whole model: what the model wrote is in that graph, and not in this one."""
    model, ids = small_model("cpu")
    down = model.model.layers[0].mlp.down_proj
    model(input_ids=ids)
    counts = written_in_capture()
    with torch.no_grad():
        model(input_ids=ids)
        counts.clear()
        down(torch.ones(1, down.weight.shape[1], dtype=torch.bfloat16))
    assert counts == [1]


def test_a_forward_that_fails_in_a_capture_leaves_no_layer_without_its_write(written_in_capture):
    model, ids = small_model("cpu")
    down = model.model.layers[0].mlp.down_proj
    model(input_ids=ids)
    counts = written_in_capture()
    with torch.no_grad(), pytest.raises(IndexError):
        model(input_ids=ids + 100_000)
    counts.clear()
    with torch.no_grad():
        down(torch.ones(1, down.weight.shape[1], dtype=torch.bfloat16))
    assert counts == [1] and not model._forward_hooks


def test_a_model_that_was_never_run_is_not_captured(written_in_capture):
    """The copy of the base would be in the graph, and from the second replay on it would be base + delta."""
    model, ids = small_model("cpu")
    written_in_capture()
    with pytest.raises(RuntimeError, match="run the model once before you capture it"):
        model(input_ids=ids)
