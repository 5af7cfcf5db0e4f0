"""Adapters on a model that is spread over ranks are restored, loaded, switched, deleted and merged as on one process."""

import pytest
import torch
from runs import attached, base_on, check_same_files, logits, run_on, train
from support.inside import full_tensors
from support.models import model_of
from support.states import with_loaded

import s2ft

SETTINGS = (None, "a", {"a": 0.5, "b": 2.0}, "c", {"b": 0.5, "c": 1.0}, {"a": 1.0, "b": 1.0}, None)
WAYS = [
    ("fsdp", "llama-grouped", "merge b"),
    ("fsdp", "mixtral", "merge half of a"),
    ("fsdp", "phi3", "merge b"),
    ("fsdp first", "llama-grouped", "merge half of a"),
    ("fsdp of transformers", "llama-grouped", "merge b"),
    ("tp", "llama-biased", "merge b"),
]
SLOW = [
    ("fsdp", "qwen2-grouped-tied", "merge b"),
    ("fsdp", "gpt2", "merge b"),
    ("fsdp first", "mixtral", "merge b"),
    ("tp", "llama-grouped", "merge half of a"),
]
ZERO = [("zero 1", "llama-grouped"), ("zero 3", "llama-grouped"), ("zero 3", "mixtral"), ("zero 1", "gpt2")]


def use(rank, how, folder, end):
    """Returns the outputs with several settings of the adapters, the status, and the weights after a merge."""
    model = with_loaded(base_on(how, folder / "base"), folder / "a", "a")  # into weights that may be spread later
    s2ft.attach(model, s2ft.read_adapter(folder / "b").config, "b")
    run = run_on(how, model)
    seen = [logits(model, run)]
    s2ft.attached.loading.restore_adapter(
        model, folder / "b"
    )  # after a forward, of which FSDP2 still has gathered weights
    s2ft.load_adapter(model, folder / "c", "c", active=False)
    for setting in SETTINGS:
        s2ft.set_adapter(model, setting)
        seen.append(logits(model, run))
    s2ft.save_adapter(model, folder / how / str(rank if how == "tp" else 0), "b")
    status = str(s2ft.status(model))
    if how.startswith("zero"):
        return seen, status, {}
    s2ft.set_adapter(model, "b")
    seen.append(logits(model, run))
    if end != "merge b":
        s2ft.delete_adapter(model, "b")
        assert s2ft.list_adapters(model) == ["a", "c"]
    s2ft.set_adapter(model, {"merge b": "b", "merge half of a": {"a": 0.5}}[end])
    return seen, status, full_tensors(dict(s2ft.merge(model).named_parameters()))


@pytest.mark.parametrize(
    "how, case, end",
    [
        *WAYS,
        *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW),
        *(pytest.param(*one, "merge b", marks=pytest.mark.deepspeed) for one in ZERO),
    ],
)
def test_adapters_are_used_as_on_one_process(ranks, how, case, end, tmp_path):
    """Adapter c has a norm that is trained in full."""
    model_of(case).save_pretrained(tmp_path / "base")
    norm = "transformer.ln_f" if case == "gpt2" else "model.norm"
    for seed, (name, more) in enumerate({"a": {}, "b": {}, "c": dict(modules_to_save=[norm])}.items()):
        s2ft.save_adapter(train(attached(case, seed=seed, **more), steps=2, lr=0.1), tmp_path / name)
    expected, expected_status, merged = use(0, "one process", tmp_path, end)
    assert len({float(one.sum()) for one in expected}) >= len(set(map(str, SETTINGS)))
    for rank, (seen, status, weights) in enumerate(ranks(use, how, tmp_path, end)):
        assert status == expected_status
        check_same_files(tmp_path / how / str(rank if how == "tp" else 0), tmp_path / "one process" / "0", exactly=True)
        for one, other in zip(seen, expected):
            if how.startswith("fsdp"):
                assert torch.equal(one, other)
            else:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(value, merged[name]) for name, value in weights.items())
        assert len(seen) >= len(SETTINGS) + 1 and (how.startswith("zero") or weights.keys() == merged.keys())
