"""A row that joins or leaves a running batch gets the tokens that it gets alone."""

import random

import pytest
import torch
from serve.fleet import RunningBatch, alone, greedy, greedy_row, save_adapters
from support.inside import Row, rows_interact, tiny_config
from train.tiny import UNTIED, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3TextConfig, Lfm2Config, MambaConfig, MistralConfig

from s2ft import AdapterBank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_adapters(tmp_path_factory.mktemp("adapters"), 4, **UNTIED)


def step(batch, count=5):
    for _ in range(count):
        batch.step()


def prompt(length, seed):
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_rows_join_and_leave_at_any_time(folder):
    """The tokens of a row depend on its adapter only, not on the rows of the same batch."""
    model = tiny_model(**UNTIED)
    batch = RunningBatch(model, AdapterBank(model, folder).batch)
    draw, done = random.Random(0), []
    waiting = [
        (greedy_row(prompt(draw.randint(1, 30), n), draw.choice(["a0", "a1", "a2", "a3", None])), draw.randint(1, 25))
        for n in range(24)
    ]
    wanted = dict(waiting)
    while waiting or batch.rows:
        joining = [row for row, _ in waiting[: draw.randint(0, 3)]]
        waiting = waiting[len(joining) :]
        if joining:
            batch.admit(joining)
        done += [row for row in batch.rows if len(row.tokens) >= wanted[row]]
        batch.keep([row for row in batch.rows if len(row.tokens) < wanted[row]])
        if batch.rows:
            batch.step()
            longest = max(len(row.prompt) + len(row.tokens) for row in batch.rows)
            assert batch._mask.shape[1] < longest + 31  # columns of rows that left are removed soon
    assert len(done) == 24 and batch._cache is None
    for row in done:
        assert row.tokens == alone(row.adapter and folder / row.adapter, row.prompt, len(row.tokens), ends=(), **UNTIED)


@pytest.mark.parametrize("kept, rest", [(0, [9]), (1, [9, 10, 11]), (8, []), (12, [9]), (99, []), (99, [9, 10, 11])])
def test_a_row_that_replaces_another_gets_the_tokens_that_it_gets_alone(kept, rest):
    """The keys of the common beginning are used again, and none of another beginning."""
    model = tiny_model(**UNTIED)
    batch, first = RunningBatch(model), greedy_row(prompt(9, 0))
    batch.replace(first)
    step(batch)
    row = greedy_row([*[*first.prompt, *first.tokens][:kept], *rest] or [5])
    ran = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: ran.append(inputs[0].numel()))
    batch.replace(row)
    step(batch)
    assert batch.rows == [row] and row.tokens == alone(None, row.prompt, 6, ends=(), **UNTIED)
    assert ran[0] == len(row.prompt) - min(kept, 14, len(row.prompt) - 1)  # the last token had no keys yet


def test_an_error_while_joining_does_not_change_the_batch(folder):
    model = tiny_model(**UNTIED)
    batch = RunningBatch(model, AdapterBank(model, folder).batch)
    row = greedy_row(prompt(5, 0), "a0")
    batch.admit([row])
    with pytest.raises(ValueError, match="unknown"):
        batch.admit([greedy_row(prompt(9, 1), "unknown")])
    with pytest.raises(AttributeError):  # when its first token is chosen
        batch.admit([Row(prompt(9, 1), sampler=None)])
    step(batch)
    assert batch.rows == [row] and row.tokens == alone(folder / "a0", row.prompt, 6, ends=(), **UNTIED)


def test_a_row_without_finite_logits_fails_alone(folder):
    model = tiny_model()
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: torch.cat([output[:1], torch.full_like(output[1:], float("nan"))])
    )
    batch = RunningBatch(model)
    rows = [greedy_row([5, 6]), greedy_row([7])]
    batch.admit(rows)
    assert rows[0].tokens and rows[0].failed is None and not rows[1].tokens and "finite" in rows[1].failed


WINDOW = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    sliding_window=6,
    max_position_embeddings=128,
)


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**WINDOW),
        Gemma3TextConfig(**WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ],
    ids=["mistral", "gemma3_text"],
)
def test_layers_with_a_window_use_only_their_window(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = RunningBatch(model)
    rows = [greedy_row([n % 60 for n in range(3, 3 + length)]) for length in (4, 17, 9)]
    batch.admit(rows[:2])
    step(batch, 4)
    batch.admit(rows[2:])
    step(batch, 15)
    batch.keep(rows[1:2])
    batch.replace(greedy_row([*rows[1].prompt, *rows[1].tokens[:9], 7, 8, 9]))  # with the keys of the row before it
    step(batch)
    assert all(row.tokens == greedy(model, row.prompt, len(row.tokens), ends=()) for row in [*rows, *batch.rows])


SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, **UNTIED}


@pytest.mark.parametrize(
    "config",
    [
        Lfm2Config(
            **SMALL,
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            layer_types=["conv", "full_attention"],
        ),
        MambaConfig(**SMALL, state_size=4),
        tiny_config(CONFIG_MAPPING["deepseek_v32"]()),  # keeps an index of keys too
    ],
    ids=["lfm2", "mamba", "deepseek-v3.2"],
)
def test_a_model_whose_cache_has_more_than_keys_and_values_runs_its_rows_alone(config):
    model, row = AutoModelForCausalLM.from_config(config).eval(), greedy_row([3, 4, 5])
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)  # smaller weights repeat tokens
    batch = RunningBatch(model)
    batch.admit([row])
    step(batch)
    assert rows_interact(config) and row.tokens == greedy(model, row.prompt, len(row.tokens), ends=())
