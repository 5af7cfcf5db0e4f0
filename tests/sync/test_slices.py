"""What is sent: the slices of the checkpoint's tensors, with the numbers that merging writes."""

import pytest
import torch
from support.checkpoint_engine import CheckpointEngine, tensors_of
from support.models import ALL_RATIOS, CASES, model_of, ratios_for

import s2ft
from s2ft.sync.slices import TrainedSlices
from s2ft.sync.wire import to_message

FAST = ("llama-grouped", "gpt2", "mixtral", "qwen2-grouped-tied")
ALL = [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def sent(slices, folder):
    """The tensors of an engine after it has got these slices, which checks the base's hashes."""
    engine = CheckpointEngine(folder, slices.dtype)
    names = {str(slices.dtype).removeprefix("torch."): slices.dtype}
    info = {"sender": "me", "dtype": next(iter(names)), "slices": to_message(slices.specs)}
    engine.init_weight_transfer_engine({"init_info": {**info, "transport": {"kind": "direct"}, "take_over": False}})
    engine.start_weight_update()
    engine.update_weights({"update_info": {"sender": "me", "step": 0, "tensor": slices.buffer()}})
    return engine


def check(slices, folder, merge):
    engine = sent(slices, folder / "base")
    merge().save_pretrained(folder / "merged")
    expected = tensors_of(folder / "merged")
    assert engine.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(engine.weights[name], tensor.to(slices.dtype)), name
    changed = [name for name, tensor in expected.items() if not torch.equal(tensor, tensors_of(folder / "base")[name])]
    assert set(changed) <= {spec.name for spec in slices.specs} and changed


@pytest.mark.parametrize("layout", ["permuted", "indexed"])
@pytest.mark.parametrize("case", ALL)
def test_slices_of_an_attached_model_are_those_of_the_merged_checkpoint(case, layout, tmp_path):
    model = model_of(case)
    model.save_pretrained(tmp_path / "base")
    s2ft.attach(model, s2ft.S2FTConfig(**ratios_for(case, ALL_RATIOS), layout=layout))
    slices = TrainedSlices.of(model)
    randomize(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert slices.numel == trained == slices.buffer().numel()
    check(slices, tmp_path, lambda: s2ft.merge(model))


@pytest.mark.parametrize("case", ALL)
def test_slices_of_a_peft_model_are_those_of_the_merged_checkpoint(case, tmp_path):
    from peft import get_peft_model

    from s2ft.peft import S2FTPeftConfig

    model = model_of(case)
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, S2FTPeftConfig(**ratios_for(case, ALL_RATIOS)), autocast_adapter_dtype=False)
    slices = TrainedSlices.of(model)
    randomize(model)
    assert slices.numel == sum(p.numel() for p in model.parameters() if p.requires_grad)
    check(slices, tmp_path, model.merge_and_unload)
