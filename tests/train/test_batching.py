"""Batches: packed rows have the losses of rows that are padded, or packing is refused; rows are grouped by length."""

import pytest
import torch
from datasets import Dataset
from support.inside import (
    LengthSampler,
    PackedCollator,
    SFTArguments,
    TokenCollator,
    choose_batching,
    chunked_loss,
    row_lengths,
    updates_of,
    why_not_packed,
)
from support.tolerances import GEMM
from train.test_loss import gradients
from train.tiny import tiny_model
from transformers import AutoModelForCausalLM, FalconH1Config, Mamba2Config, MistralConfig, MixtralConfig, RwkvConfig

import s2ft

SMALL = dict(vocab_size=259, hidden_size=32, num_hidden_layers=2)
HEADS = dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
CONFIGS = {
    "sliding window": MistralConfig(**SMALL, **HEADS, sliding_window=4),
    "experts": MixtralConfig(**SMALL, **HEADS, num_local_experts=4),
    "recurrent": Mamba2Config(**SMALL, num_heads=8, head_dim=8, n_groups=1),
    "attention and recurrent": FalconH1Config(**SMALL, **HEADS, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8),
}


def model_of(name, dtype=torch.float32):
    if name == "full attention":
        return tiny_model(dtype=dtype)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype).eval()


def token_rows(count=6, longest=24):
    """Rows of two turns each, of different lengths."""
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(count):
        length = int(torch.randint(6, longest, (1,), generator=generator))
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        labels = [token if index % 5 in (2, 3) or index == 0 else -100 for index, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def packs(rows):
    """Two packs of rows, as TRL makes them."""
    return [
        {
            **{key: [token for row in part for token in row[key]] for key in ("input_ids", "labels")},
            "seq_lengths": [len(row["input_ids"]) for row in part],
        }
        for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :])
    ]


def loss_and_gradients(model, batch):
    """The loss of the chunked loss, and the gradient of each trained parameter."""
    with chunked_loss(model.train()):
        return gradients(model, batch)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["full attention", "sliding window", "experts"])
def test_packed_rows_have_the_loss_and_the_gradients_of_rows_apart(name, attention, flat):
    model, rows = model_of(name), token_rows()
    model.set_attn_implementation(attention)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2, v_ratio=0.5))
    expected, theirs = loss_and_gradients(model, TokenCollator(0)(rows))
    assert theirs
    rtol, atol = GEMM[torch.float32]
    for batch in (PackedCollator(0, flat)(packs(rows)), PackedCollator(0, flat)(rows)):
        loss, ours = loss_and_gradients(model, batch)
        torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
        torch.testing.assert_close(ours, theirs, rtol=10 * rtol, atol=10 * atol)
    assert why_not_packed(model, rows, PackedCollator(0, flat)) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flat", [True, False])
def test_a_model_that_mixes_up_rows_is_seen(flat, dtype):
    """The positions are taken away, so that each row attends to the rows before it."""
    model, rows = model_of("full attention", dtype), token_rows()
    assert why_not_packed(model, rows, PackedCollator(0, flat)) == ""
    expected = model(**TokenCollator(0)(rows)).loss

    model.register_forward_pre_hook(lambda _, args, options: (args, options | {"position_ids": None}), with_kwargs=True)
    assert why_not_packed(model, rows, PackedCollator(0, flat)) == "a row depends on the row before it"
    assert not torch.isclose(model(**PackedCollator(0, flat)(packs(rows))).loss, expected, rtol=1e-3)


def arguments_for(**changes):
    return SFTArguments(output_dir="run", **{"max_length": 64, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name, reason",
    [("recurrent", "takes no position_ids"), ("attention and recurrent", "row before it|can't keep packed sequences")],
)
def test_packing_is_refused_where_rows_would_be_mixed_up(name, reason, dtype):
    model, rows = model_of(name, dtype), token_rows()
    for changes in ({"packing": True}, {"padding_free": True}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} would mix up rows in this model: .*({reason})"):
            choose_batching(model, 0, rows, arguments_for(**changes))
    assert isinstance(choose_batching(model, 0, rows, arguments_for()).collator, TokenCollator)


def test_the_default_is_grouping_by_length_and_no_padding_where_attention_knows_rows(monkeypatch):
    model, rows = tiny_model(), token_rows()
    found = choose_batching(model, 0, rows, arguments_for())
    assert found.by_length and "similar length" in found.line(6, 6)
    found = choose_batching(model, 0, rows, arguments_for(train_sampling_strategy="random"))
    assert not found.by_length and "random order" in found.line(6, 6)
    monkeypatch.setattr("s2ft.train.batching.has_varlen_attention", lambda model: True)
    found = choose_batching(model, 0, rows, arguments_for())
    assert isinstance(found.collator, PackedCollator) and found.collator.flat and not found.packed
    assert "without padding, sdpa" in found.line(6, 6)
    found = choose_batching(model_of("recurrent"), 0, rows, arguments_for())
    assert isinstance(found.collator, TokenCollator) and "would mix up rows without padding" in found.why


def test_a_model_that_padding_on_the_left_changes_gets_it_on_the_right():
    model, rows = AutoModelForCausalLM.from_config(RwkvConfig(**SMALL, attention_hidden_size=32)).eval(), token_rows(2)
    found = choose_batching(model, 0, rows, arguments_for(per_device_train_batch_size=2))
    assert "padded on the right" in found.why
    batch = found.collator(rows)
    alone = [model(**found.collator([row])) for row in rows]
    counts = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in rows])
    expected = (torch.stack([one.loss for one in alone]) * counts).sum() / counts.sum()
    torch.testing.assert_close(model(**batch).loss, expected)
    assert batch["labels"][:, 0].tolist() == [-100, -100] and 0 in batch["attention_mask"][:, -1]


def test_rows_are_packed_and_counted():
    model, rows = tiny_model(), Dataset.from_list(token_rows(12))
    # the last update of each epoch is smaller
    assert updates_of(arguments_for(per_device_train_batch_size=5, num_train_epochs=3), rows) == 9
    arguments = arguments_for(packing=True, per_device_train_batch_size=1, num_train_epochs=1)
    assert updates_of(arguments, rows) <= len(choose_batching(model, 0, rows, arguments).prepare(rows, arguments)) < 12
    batching = choose_batching(model, 0, rows, arguments)
    packed = batching.prepare(rows, arguments)
    assert sorted(length for row in packed for length in row["seq_lengths"]) == sorted(row_lengths(rows))
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 64 for row in packed)
    assert f"12 rows in {len(packed)} packs, packed to at most 64 tokens" in batching.line(len(rows), len(packed))


def test_only_positions_that_predict_a_label_get_logits():
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, -100]}, {"input_ids": [9, 10], "labels": [9, 10]}]
    batch = PackedCollator(0)(rows)
    assert batch["logits_to_keep"].tolist() == [1, 4] and batch["shift_labels"].tolist() == [[7, 10]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 6] and batch["seq_idx"].tolist() == [[0, 0, 0, 0, 1, 1]]
    batch = PackedCollator(0, flat=False)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch["shift_labels"].tolist() == [[-100, 7, -100, -100], [10, -100, -100, -100]]
    assert PackedCollator(0)([{"input_ids": [5, 6], "labels": [-100, -100]}])["shift_labels"].tolist() == [[-100]]


def test_padded_rows_end_together_and_their_first_token_has_no_label():
    rows = token_rows(4)
    batch = TokenCollator(pad=0, multiple=8)(rows)
    assert batch["input_ids"].shape[1] % 8 == 0 and batch["labels"].shape[1] == batch["logits_to_keep"]
    every = TokenCollator(pad=0, keep_logits=False)(rows)["labels"]
    assert all(labels[-len(row["labels"]) :].tolist() == [-100, *row["labels"][1:]] for row, labels in zip(rows, every))
    assert (every != -100).sum() == (batch["labels"] != -100).sum()


def test_the_order_by_length_depends_on_the_seed_and_the_epoch_only():
    lengths = torch.randint(5, 500, (403,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthSampler(lengths, rows=8, seed=1)
    first = list(sampler)
    torch.rand(3)  # the global random state does not matter
    assert list(sampler) == first and sorted(first) == list(range(403))
    sampler.set_epoch(1)
    assert list(sampler) != first and list(LengthSampler(lengths, rows=8, seed=2)) != first
    assert lengths[first[0]] == max(lengths)

    def padded(order):
        return sum(8 * max(lengths[row] for row in order[start : start + 8]) for start in range(0, 400, 8))

    assert padded(first) < 1.1 * sum(lengths) < 0.7 * padded(list(range(403)))


def test_the_reason_names_an_error_of_the_model(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model.model), "forward", lambda *args, **options: 1 / 0)
    assert why_not_packed(model, token_rows()) == "it fails on packed rows: division by zero"
