"""A sharded model sends the slices that one process sends: every rank takes part, and the first one sends."""

import pytest
import torch
from runs import base_on, run_on
from support.checkpoint_engine import CheckpointEngine, app_of, serving, tensors_of
from support.inside import EngineError, SliceSender
from support.models import ALL_RATIOS, model_of, ratios_for
from support.states import with_loaded
from train.tiny import save_random_adapter

import s2ft

CASES = [
    ("llama-grouped", "permuted", "fsdp"),
    ("mixtral", "indexed", "fsdp first"),
    ("gpt2", "permuted", "ddp"),
    ("llama-biased", "permuted", "tp"),
]
SLOW = [
    ("mixtral", "permuted", "fsdp"),
    ("qwen2-grouped-tied", "indexed", "fsdp"),
    ("llama-grouped", "indexed", "tp"),
    ("phi3", "permuted", "fsdp first"),
]


def spread(folder, how):
    model = with_loaded(base_on(how, folder / "base"), folder / "adapter", trainable=True)
    return model if how == "zero 3" else run_on(how, model)


def send(rank, folder, how, url):
    model = spread(folder, how)
    with SliceSender(model, url, timeout=60) as sender:
        sent = sender.sync()
        if how == "zero 3":
            run_on(how, model)
        again = sender.sync()
        same = torch.equal(sender.slices.buffer(), torch.load(folder / "expected.pt"))
    return same and sent.nbytes == again.nbytes


def prepare(case, layout, folder):
    """Save the base, an adapter for it, and the numbers that one process sends."""
    from support.inside import TrainedSlices

    model = model_of(case)
    model.save_pretrained(folder / "base")
    save_random_adapter(folder / "adapter", model, 0.05, **ratios_for(case, ALL_RATIOS), layout=layout)
    torch.save(TrainedSlices.of(model).buffer(), folder / "expected.pt")
    s2ft.merge(model).save_pretrained(folder / "merged")


@pytest.mark.parametrize(
    "case, layout, how",
    [
        *CASES,
        *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW),
        *(
            pytest.param(*one, marks=pytest.mark.deepspeed)
            for one in [("llama-grouped", "permuted", "zero 3"), ("mixtral", "indexed", "zero 3")]
        ),
    ],
)
def test_ranks_send_what_one_process_sends(ranks, case, layout, how, tmp_path):
    prepare(case, layout, tmp_path)
    engine = CheckpointEngine(tmp_path / "base")
    with serving(app_of(engine)) as url:
        assert ranks(send, tmp_path, how, url) == [True, True]
    merged, base = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "base")
    assert len(engine.written) == 3 and engine.calls.count("init") == 1
    for tensors, expected in zip(engine.written, (merged, merged, base)):
        assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []


def refused(rank, folder, url):
    with pytest.raises((EngineError, RuntimeError)) as error:
        SliceSender(spread(folder, "ddp"), url, timeout=60).sync()
    return str(error.value)


def test_the_refusal_of_the_engine_is_an_error_on_every_rank(ranks, tmp_path):
    prepare("llama-grouped", "permuted", tmp_path)
    engine = CheckpointEngine(tmp_path / "base")
    engine.weights["model.layers.0.mlp.down_proj.weight"] += 1
    with serving(app_of(engine)) as url:
        first, second = ranks(refused, tmp_path, url)
    words = "base is not that of the slices"
    assert words in first and "rank 0 failed" in second and words in second
