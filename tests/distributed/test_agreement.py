"""Ranks that would train different units get an error, and a call on a single rank does not block."""

import pytest
import torch
import torch.distributed as dist
from runs import attached, check_same_files, sharded, train
from support.inside import distributed
from support.models import model_of
from support.ranks import patience

import s2ft


def error_of(act, *kinds):
    try:
        act()
    except kinds or (RuntimeError,) as error:
        return str(error)
    return ""


def attach_on_all_ranks(rank, seeds, scales, names):
    """Attach on every rank. Returns the error message, and whether a refused model is unchanged."""
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj.weight.data.mul_(scales[rank])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = error_of(lambda: s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2, seed=seeds[rank]), names[rank]))
    same = before.keys() == model.state_dict().keys() and all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )
    dist.barrier()
    return message, same and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "seeds, scales, word", [((0, 1), (1, 1), "its selection is "), ((0, 0), (1, 2), "the base is ")]
)
def test_ranks_that_differ_get_an_error_and_stay_unchanged(ranks, seeds, scales, word):
    answers = ranks(attach_on_all_ranks, seeds, scales, ("one", "one"))
    messages = [message for message, _ in answers if message]
    assert len(messages) == 1 and word in messages[0] and "on rank 0" in messages[0] and "on rank 1" in messages[0]
    assert all(same for message, same in answers if message)
    assert ranks(attach_on_all_ranks, (3, 3), (1, 1), ("one", "one")) == [("", False)] * 2  # the next call succeeds


def attach_after_an_error(rank):
    if rank == 0:
        dist.barrier()  # the second rank attaches first, so that the first one gets the error
    error = error_of(lambda: s2ft.attach(model_of("llama"), s2ft.S2FTConfig(d_ratio=0.2, seed=rank)))
    if rank == 1:
        dist.barrier()
    assert bool(error) == (rank == 0)
    model = model_of("llama")
    with patience(20):
        return s2ft.attach(model.to("meta") if rank else model, s2ft.S2FTConfig(d_ratio=0.2)).unproved


def test_a_rank_without_weights_attaches_after_ranks_differed(ranks):
    assert ranks(attach_after_an_error) == ["", ""]


def test_adapters_of_different_names_may_differ(ranks):
    assert [message for message, _ in ranks(attach_on_all_ranks, (0, 1), (1, 2), ("first", "second"))] == ["", ""]


def attach_alone(rank):
    if rank == 1:
        attached("llama")
    dist.barrier()
    if rank == 0:
        attached("llama")


def test_attaching_on_one_rank_alone_does_not_wait(ranks):
    ranks(attach_alone)


def agree(rank, values):
    return error_of(lambda: distributed.check_all_ranks_agree("selection", values[rank]))


def test_a_disagreement_is_an_error_on_every_rank(ranks):
    assert ranks(agree, ["a", "a"]) == ["", ""]
    words = "the ranks differ in their selection (2 on 2 ranks): a on rank 0, b on rank 1"
    assert ranks(agree, ["a", "b"]) == [words] * 2 and ranks(agree, ["c", "c"]) == ["", ""]


# ---- saving ----------------------------------------------------------------------------------------------


def save_on_first_alone(rank, directory):
    model = train(sharded(attached("llama")), rank, steps=1)
    message = ""
    if rank == 0:
        with patience(seconds=0.5):
            message = error_of(lambda: s2ft.save_adapter(model, directory / "alone"))
    dist.barrier()
    s2ft.save_adapter(model, directory / "both")
    return message


def test_saving_a_sharded_model_on_a_single_rank_writes_nothing_and_names_the_cause(ranks, tmp_path):
    assert "waited for rank 1: it did not call this within 0.5 s." in ranks(save_on_first_alone, tmp_path)[0]
    assert not (tmp_path / "alone").exists()
    s2ft.save_adapter(train(attached("llama"), steps=1), tmp_path / "expected")
    check_same_files(tmp_path / "both", tmp_path / "expected")


def save_where_it_fails(rank, directory):
    model = train(sharded(attached("llama")), rank, steps=1)
    message = error_of(lambda: s2ft.save_adapter(model, directory / "file"), OSError, RuntimeError)
    s2ft.save_adapter(model, directory / "good")
    return message, (directory / "good" / "s2ft_config.json").exists()


def test_the_other_ranks_raise_the_error_of_the_first_rank(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    (first, good), (second, there) = ranks(save_where_it_fails, tmp_path)
    assert "exists" in first and second.startswith("rank 0 failed: FileExistsError") and good and there


def test_shards_of_trained_parameters_are_refused(tmp_path):
    """FSDP version 1 and other libraries leave such shards: empty or flat ones."""
    for part in (torch.empty(0), torch.zeros(5), torch.zeros(0, 24)):
        model = attached("llama")
        model.model.layers[0].mlp.up_proj.s2 = torch.nn.Parameter(part)
        with pytest.raises(ValueError, match=r"up_proj.s2 has shape .* this is a shard, so nothing is saved"):
            s2ft.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
