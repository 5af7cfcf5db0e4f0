"""Models that ZeRO-3 has partitioned send the slices that one process sends."""

import pytest
import torch
from support.checkpoint_engine import CheckpointEngine, app_of, serving, tensors_of
from support.inside import SliceSender
from test_deepspeed import engine_for
from test_slice_sync import prepare
from test_zero_init import partitioned

import s2ft

pytestmark = pytest.mark.deepspeed
pytest.importorskip("deepspeed")


def send(rank, folder, case, url):
    model = partitioned(case)
    s2ft.load_adapter(model, folder / "adapter", trainable=True)
    with SliceSender(model, url, timeout=60) as sender:
        before = sender.sync()
        engine_for(model, 3)
        after = sender.sync()
        same = torch.equal(sender.slices.buffer(), torch.load(folder / "expected.pt"))
    return same and before.nbytes == after.nbytes


@pytest.mark.parametrize("case, layout", [("llama-grouped", "permuted"), ("mixtral", "indexed")])
def test_ranks_of_zero_send_what_one_process_sends(ranks, case, layout, tmp_path):
    prepare(case, layout, tmp_path)
    engine = CheckpointEngine(tmp_path / "base")
    with serving(app_of(engine)) as url:
        assert ranks(send, tmp_path, case, url) == [True, True]
    merged, base = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "base")
    for tensors, expected in zip(engine.written, (merged, merged, base), strict=True):
        assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
