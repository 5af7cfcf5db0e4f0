"""Likelihood of answers: equal to a direct computation, for any batch size, and with the adapter as it is merged."""

import copy

import pytest
import torch
from train.tiny import tiny_model, tiny_tokenizer

import s2ft
from s2ft.text import likelihood
from s2ft.text.encoding import left_pad
from s2ft.text.examples import Example
from s2ft.text.likelihood import continuation_logprobs, encode_answers, evaluate_likelihood
from s2ft.text.prompts import PromptFormat, encode_prompt
from s2ft.text.tokens import encode_rendered

TOLERANCE = 2e-5  # of sums of up to 20 log-probabilities of about -6 in float32
PAIRS = [
    ([1, 5, 6, 7], [8, 9]),
    ([1, 5, 6, 7], [8, 10]),  # one pass with the row above
    ([1, 5, 6, 7], [8]),  # read from it too
    ([1, 9], [3, 4, 5, 6, 7]),
    ([1], [20]),
    ([2] * 40, [11, 12, 13]),
    ([1, 5, 6, 7], [9, 8, 8]),
    ([4, 4], []),
]
WORDS = {"choices": ("red", "blue green", "grey"), "answer": "grey"}


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.25, o_ratio=0.25))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model


@torch.no_grad()
def direct(model, pairs):
    """Sums in float64, one sequence at a time, of a merged copy: no batch, no padding, no shared pass."""
    merged = s2ft.merge(copy.deepcopy(model)).double()
    found = []
    for context, continuation in pairs:
        logprobs = merged(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
        found.append([logprobs[len(context) - 1 + n, token].item() for n, token in enumerate(continuation)])
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_log_probabilities_equal_a_direct_computation_in_float64(model, batch_size):
    found, expected = continuation_logprobs(model, PAIRS, batch_size), direct(model, PAIRS)
    assert [len(values) for values in found] == [len(continuation) for _, continuation in PAIRS]
    for values, reference in zip(found, expected):
        assert values == pytest.approx(reference, abs=TOLERANCE)


@torch.no_grad()
def test_padding_on_the_left_gives_the_same(model):
    found = continuation_logprobs(model, PAIRS[:-1], 32, padding=3)
    batch = left_pad([[*context, *continuation] for context, continuation in PAIRS[:-1]], pad=7)
    logprobs = model(**batch).logits.log_softmax(-1)
    for row, ((_, continuation), values) in enumerate(zip(PAIRS, found)):
        places = range(-len(continuation) - 1, -1)
        expected = [logprobs[row, place, token].item() for place, token in zip(places, continuation)]
        assert values == pytest.approx(expected, abs=TOLERANCE)


def test_the_token_to_pad_with_changes_nothing(model):
    assert continuation_logprobs(model, PAIRS, 8, padding=0) == continuation_logprobs(model, PAIRS, 8, padding=100)


def test_answers_with_a_common_beginning_share_a_pass(model):
    rows = []
    hook = model.register_forward_pre_hook(
        lambda module, args, inputs: rows.append(inputs["input_ids"].shape[0]), with_kwargs=True
    )
    continuation_logprobs(model, PAIRS[:3], 32)
    hook.remove()
    assert rows == [1]


def test_the_output_layer_runs_only_where_it_is_read(model):
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    continuation_logprobs(model, PAIRS[:3], 32)
    hook.remove()
    assert shapes == [(1, 5, model.config.vocab_size)]


def test_a_model_that_does_not_call_its_output_layer(model, monkeypatch):
    expected = continuation_logprobs(model, PAIRS, 4)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: torch.nn.Linear(2, 2))
    assert continuation_logprobs(model, PAIRS, 4) == [pytest.approx(values, abs=TOLERANCE) for values in expected]


def test_rows_of_other_lengths_do_not_share_a_batch_where_the_length_changes_what_is_computed():
    """A rotary embedding that scales with the longest row of its batch."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    scaled = tiny_model(rope_parameters=rope, max_position_embeddings=8)
    alone = [continuation_logprobs(scaled, [pair], 1)[0] for pair in PAIRS]
    assert continuation_logprobs(scaled, PAIRS, 32) == [pytest.approx(values, abs=TOLERANCE) for values in alone]


def test_the_model_is_restored(model):
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    continuation_logprobs(model, PAIRS, 4)
    assert model.training and not any(row.fused for row in s2ft.status(model).rows)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.eval()


# ---- answers of examples -------------------------------------------------------------------------------


def message(text, **fields):
    return Example(({"role": "user", "content": text},), "", **fields)


@pytest.mark.parametrize("form", ["{}", "The answer is {}.", "the correct answer is {}"])
def test_answers_have_the_tokens_of_training(form):
    tokenizer = tiny_tokenizer()
    pairs = encode_answers(tokenizer, message("Which?"), ("red", "grey"), form)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "Which?"}])
    for (context, continuation), answer in zip(pairs, ("red", "grey")):
        assert context[: len(prompt)] == prompt and context == pairs[0][0]
        assert tokenizer.decode(context[len(prompt) :] + continuation) == form.format(answer)
    assert tokenizer.decode(pairs[0][1]) == "red" + form.split("{}")[1]


def test_a_token_over_the_border_belongs_to_the_answer(monkeypatch):
    """If the tokenizer merges the space with the answer, the space is part of what is compared, for every answer."""

    def merged(tokenizer, rendered):
        rows = encode_rendered(tokenizer, rendered)
        space, letter = tokenizer.encode(" r")
        return [
            ([n for n, after in zip(ids, [*ids[1:], 0]) if (n, after) != (space, letter)], labels)
            for ids, labels in rows
        ]

    tokenizer = tiny_tokenizer()
    plain = encode_answers(tokenizer, message("Which?"), ("red", "grey"), "is {}")
    monkeypatch.setattr(likelihood, "encode_rendered", merged)
    pairs = encode_answers(tokenizer, message("Which?"), ("red", "grey"), "is {}")
    assert pairs[0][0] == pairs[1][0] == plain[0][0][:-1]
    assert [tokenizer.decode(ids) for _, ids in pairs] == ["red", " grey"]


def test_the_likeliest_answer_is_chosen(model):
    tokenizer, rows = tiny_tokenizer(), [message("a", **WORDS), message("b" * 50, **WORDS), message("c", **WORDS)]
    result = evaluate_likelihood(model, tokenizer, rows, "choices", batch_size=2)
    for example, record in zip(rows, result.records):
        prompt = encode_prompt(tokenizer, list(example.conversation))
        expected = direct(model, [(prompt, tokenizer.encode(answer)) for answer in WORDS["choices"]])
        sums = dict(zip(WORDS["choices"], map(sum, expected)))
        assert record.logprobs == pytest.approx(sums, abs=TOLERANCE)
        assert record.generated == max(sums, key=sums.get) and record.right == (record.generated == "grey")
        by_character = {answer: value / len(answer) for answer, value in sums.items()}
        assert record.right_if_normalized == (max(by_character, key=by_character.get) == "grey")
    assert result.accuracy == result.right / 3 and result.to_dict()["records"][0]["logprobs"]


def test_a_sum_prefers_short_answers_and_the_mean_does_not(monkeypatch):
    values = {"no": [-3.0], "a long answer": [-2.0, -2.0]}
    monkeypatch.setattr(likelihood, "continuation_logprobs", lambda *_: list(values.values()))
    row = message("q", choices=tuple(values), answer="a long answer")
    by_sum, by_length = (
        evaluate_likelihood(tiny_model(), tiny_tokenizer(), [row], "choices", length_normalized=normalized)
        for normalized in (False, True)
    )
    assert by_sum.records[0].generated == "no" and not by_sum.records[0].right
    assert by_length.records[0].generated == "a long answer" and by_length.accuracy == 1
    assert by_sum.records[0].right_if_normalized and by_sum.records[0].logprobs == {"no": -3.0, "a long answer": -4.0}


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_results_do_not_depend_on_the_batch_size(model, batch_size):
    question = "Which {}? Answer1: x Answer2: y Answer3: z\n\nAnswer format: answer1/answer2/answer3"
    rows = [message(question.format("a" * n), answer=f"answer{1 + n % 3}") for n in range(1, 8)]
    found, expected = (
        evaluate_likelihood(model, tiny_tokenizer(), rows, "commonsense", batch_size=size) for size in (batch_size, 3)
    )
    assert found.accuracy == expected.accuracy
    for one, other in zip(found.records, expected.records):
        assert one.generated == other.generated and one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


def test_plain_text_prompts_begin_with_the_tokens_of_training(model):
    tokenizer = tiny_tokenizer()
    row = Example("2+3=", "5", choices=("5", "6"))
    pairs = encode_answers(tokenizer, row, ("5", "6"), "{}", PromptFormat("text"))
    assert pairs == [(encode_prompt(tokenizer, "2+3="), tokenizer.encode(answer)) for answer in ("5", "6")]
    assert len(evaluate_likelihood(model, tokenizer, [row], "choices", prompt=PromptFormat("text")).records) == 1


def test_rows_longer_than_the_context_are_counted(model):
    rows = [message("x" * 400, **WORDS), message("x", **WORDS)]
    result = evaluate_likelihood(model, tiny_tokenizer(), rows, "choices")
    assert result.left_out == 1 and len(result.records) == 1
    with pytest.raises(ValueError, match="none of 1 rows fits"):
        evaluate_likelihood(model, tiny_tokenizer(), rows[:1], "choices")


def test_wrong_arguments():
    rows = [message("x", **WORDS)]
    for settings, text in (
        ({"batch_size": 0}, "batch_size must be"),
        ({"answer_form": "so"}, "answer_form must have {}"),
    ):
        with pytest.raises(ValueError, match=text):
            evaluate_likelihood(tiny_model(), tiny_tokenizer(), rows, "choices", **settings)
    with pytest.raises(ValueError, match="is a number"):
        evaluate_likelihood(tiny_model(), tiny_tokenizer(), [message("2+3=", answer="5")], "arithmetic")
