"""save_merged under ZeRO-3 writes the checkpoint of one process, from the disk and gathered from the ranks."""

import pytest
from export.test_streamed import check_equal
from test_save_merged import prepared, with_adapters
from test_zero_init import partitioned

import s2ft

pytestmark = pytest.mark.deepspeed
pytest.importorskip("deepspeed")
__all__ = ["prepared"]


def save(rank, folder, case, is_on_disk):
    model = with_adapters(partitioned(case), folder)
    if is_on_disk:
        model.config._name_or_path = str(folder / "base")
    s2ft.save_merged(model, folder / "saved")
    return all(parameter.numel() == 0 for name, parameter in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize(
    "case, layout, is_on_disk", [("llama-grouped", "permuted", False), ("mixtral", "indexed", True)]
)
def test_partitioned_weights_are_saved_as_one_process_merges_them(ranks, prepared, case, layout, is_on_disk):
    folder = prepared(case, layout)
    assert ranks(save, folder, case, is_on_disk) == [True, True]
    check_equal(folder / "saved", folder / "expected")
