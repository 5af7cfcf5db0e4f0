"""save_merged on ranks writes the checkpoint that one process writes by merge and save_pretrained, bit for bit."""

from unittest import mock

import pytest
from conversion.test_streamed import check_equal
from runs import base_on, sharded
from support.models import ALL_RATIOS, model_of, ratios_for
from train.tiny import save_random_adapter

import s2ft

CASES = [  # case, layout, how it is spread, whether the base is on a disk
    ("llama-grouped", "permuted", "fsdp", False),
    ("mixtral", "indexed", "fsdp first", False),
    ("qwen2-grouped-tied", "permuted", "fsdp first", True),
    ("llama-biased", "permuted", "tp", False),
]
SLOW = [
    ("llama-grouped", "permuted", "fsdp", True),
    ("phi3-grouped", "indexed", "tp", True),
    ("gpt2", "permuted", "fsdp", False),
    ("gpt2", "permuted", "fsdp first", True),
    ("mixtral", "permuted", "fsdp", True),
    ("llama-grouped", "permuted", "ddp", True),
    ("llama-grouped", "indexed", "ddp", False),
    ("phi3", "permuted", "fsdp first", False),
    ("qwen2-grouped-tied", "indexed", "tp", False),
    ("phi3-grouped", "permuted", "tp", False),
]


def prepare(case, layout, folder):
    """Save the base of a case, two adapters for it, and the checkpoint that one process merges."""
    model_of(case).save_pretrained(folder / "base")
    model = type(model_of(case)).from_pretrained(folder / "base")
    for name, seed in (("a", 1), ("b", 2)):
        save_random_adapter(folder / name, model, 0.05, name, **ratios_for(case, ALL_RATIOS), layout=layout, seed=seed)
        s2ft.detach(model)
    s2ft.merge(with_adapters(model, folder)).save_pretrained(folder / "expected")


def with_adapters(model, folder):
    """Load adapter a, and b to go on training it; both are active."""
    s2ft.load_adapter(model, folder / "a", "a")
    s2ft.load_adapter(model, folder / "b", "b", trainable=True)
    s2ft.set_adapter(model, {"a": 0.5, "b": 1.0})
    return model


def spread(folder, how):
    model = with_adapters(base_on(how, folder / "base"), folder)
    return sharded(model) if how == "fsdp" else model


def save(rank, folder, how, is_on_disk):
    model = spread(folder, how)
    if not is_on_disk:
        model.config._name_or_path = ""
    s2ft.save_merged(model, folder / "saved")
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "case, layout, how, is_on_disk",
    [
        *CASES,
        *(pytest.param(*more, marks=pytest.mark.slow) for more in SLOW),
        *(
            pytest.param(*more, marks=pytest.mark.deepspeed)
            for more in [("llama-grouped", "permuted", "zero 3", False), ("mixtral", "indexed", "zero 3", True)]
        ),
    ],
)
def test_two_ranks_save_what_one_process_merges(ranks, tmp_path, case, layout, how, is_on_disk):
    prepare(case, layout, tmp_path)
    assert ranks(save, tmp_path, how, is_on_disk) == [["a", "b", "base", "expected", "saved"]] * 2
    check_equal(tmp_path / "saved", tmp_path / "expected")


@pytest.mark.slow
@pytest.mark.parametrize("how, is_on_disk", [("fsdp", False), ("fsdp first", True), ("tp", False)])
def test_four_ranks_save_what_one_process_merges(four_ranks, tmp_path, how, is_on_disk):
    prepare("llama", "permuted", tmp_path)
    four_ranks(save, tmp_path, how, is_on_disk)
    check_equal(tmp_path / "saved", tmp_path / "expected")


# ---- failures --------------------------------------------------------------------------------------------


def save_where_writing_fails(rank, folder, is_on_disk):
    """Fail on the first rank after it has written some tensors. Every rank must end with an error, and can go on."""
    from support.inside import StoredTensor

    model, write, count = spread(folder, "fsdp"), StoredTensor.write, [5]
    if not is_on_disk:
        model.config._name_or_path = ""

    def fail(self, values):
        count[0] -= 1
        if not count[0]:
            raise OSError("no space left on device")
        return write(self, values)

    with mock.patch.object(StoredTensor, "write", fail), pytest.raises((OSError, RuntimeError)) as error:
        s2ft.save_merged(model, folder / "saved")
    left = sorted(path.name for path in folder.iterdir())
    s2ft.save_merged(model, folder / "saved")
    return f"{error.typename}: {error.value}", left


@pytest.mark.parametrize("is_on_disk", (pytest.param(True, marks=pytest.mark.slow), False))
def test_a_failure_of_the_first_rank_ends_all_and_leaves_nothing(ranks, tmp_path, is_on_disk):
    prepare("llama-grouped", "permuted", tmp_path)
    first, second = ranks(save_where_writing_fails, tmp_path, is_on_disk)
    left = ["a", "b", "base", "expected"]
    assert first == ("OSError: no space left on device", left)
    assert second == ("RuntimeError: rank 0 failed: OSError: no space left on device", left)
    check_equal(tmp_path / "saved", tmp_path / "expected")
