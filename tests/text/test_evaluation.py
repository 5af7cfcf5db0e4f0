"""Evaluation: greedy generation in batches equals that of single prompts and restores the model."""

import pytest
import torch
from serve.fleet import greedy
from support.inside import (
    Example,
    contiguous_head,
    encode_prompt,
    evaluation_evaluate as evaluate,
    examples_of,
    generate,
    generation_mode,
    normalised,
)
from support.states import randomize, with_adapter
from train.tiny import sums, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, RwkvConfig

import s2ft


@pytest.fixture
def model():
    return randomize(with_adapter(tiny_model(), s2ft.S2FTConfig(d_ratio=0.25, o_ratio=0.25)), std=0.5)


def examples(count=5):
    return list(examples_of(normalised(row, {}) for row in sums(count)))


@pytest.mark.parametrize("pads", ["left", "never", "scaled"])
def test_batches_equal_single_prompts_in_order(model, pads):
    """A model that ignores the mask of padding, or whose positions scale with the batch, gets one prompt at a time."""
    if pads == "never":
        config = RwkvConfig(vocab_size=259, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
        model = AutoModelForCausalLM.from_config(config).eval()
    elif pads == "scaled":
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "factor": 4.0}
        rope |= {"rope_theta": 10.0, "original_max_position_embeddings": 48}
        model = randomize(tiny_model(rope_parameters=rope), std=0.5)
    tokenizer = tiny_tokenizer()
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": "a" * n}]) for n in (3, 30, 1, 12, 7)]
    single = [generate(model, tokenizer, [prompt], 1, 8)[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts, 2, 8) == single


def test_generation_equals_that_of_the_trained_model(model):
    tokenizer = tiny_tokenizer()
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "a"}])
    tokens = greedy(model, prompt, 6)
    whole, cut = (
        tokenizer.decode(some, skip_special_tokens=True).strip() for some in (tokens, tokens[: tokens.index(tokens[3])])
    )
    assert generate(model, tokenizer, [prompt], 1, 6) == [whole]
    model.generation_config.eos_token_id = tokens[3]  # an end token that the tokenizer does not call special
    assert generate(model, tokenizer, [prompt], 1, 6) == [cut]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_penalties_of_the_checkpoint_are_not_applied(model, num_beams):
    tokenizer = tiny_tokenizer()
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": "a" * n}]) for n in (3, 7)]
    expected = generate(model, tokenizer, prompts, 2, 12, num_beams=num_beams)
    other = {"repetition_penalty": 8.0, "no_repeat_ngram_size": 1, "length_penalty": -9.0, "early_stopping": True}
    model.generation_config.update(**other, min_length=300, num_beams=2, num_return_sequences=2, do_sample=True)
    assert generate(model, tokenizer, prompts, 2, 12, num_beams=num_beams) == expected


def test_generation_restores_the_model_which_trains_on(model):
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generate(model, tiny_tokenizer(), [[3, 4, 5]], 1, 4)
    with pytest.raises(RuntimeError), generation_mode(model):
        assert model.lm_head._forward_pre_hooks
        raise RuntimeError
    assert model.training and not model.lm_head._forward_pre_hooks
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained == [parameter for key, parameter in model.named_parameters() if key.endswith("s2")]
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def test_a_frozen_head_has_a_contiguous_input_and_the_same_logits():
    model, ids, seen = tiny_model().requires_grad_(False), torch.randint(3, 200, (4, 7)), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].is_contiguous()))
    expected = model(ids, logits_to_keep=2).logits
    with contiguous_head(model):
        logits = model(ids, logits_to_keep=2).logits
    assert seen == [False, True]  # if the model packs its positions itself, the hook can be removed from s2ft
    torch.testing.assert_close(logits, expected)


def test_accuracy_counts_right_records(monkeypatch):
    monkeypatch.setattr("s2ft.text.evaluation.generate", lambda *_, **__: ["The answer is 0.", "3", "4", "", "no 4"])
    result = evaluate(tiny_model(), tiny_tokenizer(), examples(), "arithmetic", max_new_tokens=4)
    assert [record.right for record in result.records] == [True, False, True, False, False]
    assert result.accuracy == 2 / 5 and result.to_dict()["right"] == 2 and "2 of 5" in str(result)


def test_prompts_longer_than_the_context_are_counted():
    rows = [*examples(2), Example(({"role": "user", "content": "x" * 400},), "5", "5")]
    result = evaluate(tiny_model(), tiny_tokenizer(), rows, "arithmetic", max_new_tokens=4)
    assert result.left_out == 1 and len(result.records) == 2 and "1 rows left out" in str(result)


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("arithmetic", {"batch_size": 0}, "batch_size"),
        ("arithmetic", {"num_beams": 0}, "num_beams"),
        ("commonsense", {}, "no answer word"),
    ],
)
def test_what_can_not_be_scored_is_an_error_before_generation(task, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model(), tiny_tokenizer(), [Example("x", "5")], task, **options)
