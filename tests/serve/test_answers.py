"""Sampling parameters, several answers and log probabilities of the API, against the model's own logits."""

import math

import openai
import pytest
import torch
from serve.fleet import BASE, alone, running, save_adapters, text_of
from train.tiny import tiny_model, tiny_tokenizer

import s2ft
from s2ft.serve.service import seed_of
from s2ft.text.sampling import Sampler
from s2ft.text.streams import TokenNames

UNTIED = dict(tie_word_embeddings=False)
IDS = tiny_tokenizer()("Hello")["input_ids"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(folder, 1, **UNTIED)
    return folder


@pytest.fixture(scope="module")
def client(folder):
    with running(folder, tiny_model(**UNTIED)) as (url, _):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield client


@pytest.fixture(scope="module")
def written(folder):
    """The model with the adapter in its weights."""
    model = tiny_model(**UNTIED)
    s2ft.load_adapter(model, folder / "a0")
    return model


@torch.no_grad()
def drawn(model, count, **options):
    """Tokens that a sampler draws from the model's logits, one sequence at a time, and these logits."""
    sampler, tokens, logits = Sampler(**options), [], []
    while len(tokens) < count and tokens[-1:] != [2]:
        logits.append(model(torch.tensor([IDS + tokens])).logits[0, -1])
        tokens.append(sampler.choose(logits[-1], tokens, IDS))
    return tokens, logits


def shown(tokens):
    return text_of(tokens[:-1] if tokens[-1] == 2 else tokens)


PENALTIES = dict(presence_penalty=0.7, frequency_penalty=-0.4)
OURS = dict(top_k=20, min_p=0.02, repetition_penalty=1.3)


def test_all_parameters_reach_the_sampler(client, written):
    options = dict(temperature=1.2, top_p=0.9, seed=11)
    tokens, _ = drawn(written, 24, **options, **PENALTIES, **OURS, logit_bias={70: 3.0, 2: -100.0})
    answer = client.completions.create(
        model="a0",
        prompt="Hello",
        max_tokens=24,
        **options,
        **PENALTIES,
        extra_body=OURS,
        logit_bias={"70": 3, "2": -100},
    )
    assert answer.choices[0].text == shown(tokens)
    without, _ = drawn(written, 24, **options)
    assert without != tokens


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_log_probabilities_are_those_of_the_model(client, written, form):
    messages = [{"role": "user", "content": "hi"}]
    common = dict(model="a0", max_tokens=6, temperature=0, logit_bias={"2": -100})
    if form == "completion":
        found = client.completions.create(prompt="Hello", logprobs=3, **common).choices[0].logprobs
        tokens, logits = drawn(written, 6, logit_bias={2: -100.0})
        logprobs, text = found.token_logprobs, found.tokens
        assert text == [TokenNames(tiny_tokenizer()).key(token) for token in tokens]
        lengths = [1] * 6  # a byte-level tokenizer: each token is a character or a part of one
        assert found.text_offset == [sum(lengths[:n]) for n in range(6)]
        tops = [sorted(top.values(), reverse=True)[:3] for top in found.top_logprobs]
    else:
        found = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=3, **common)
        ids = tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        sampler, tokens, logits = Sampler(logit_bias={2: -100.0}), [], []
        with torch.no_grad():
            for _ in range(6):
                logits.append(written(torch.tensor([ids + tokens])).logits[0, -1])
                tokens.append(sampler.choose(logits[-1], tokens, ids))
        content = found.choices[0].logprobs.content
        logprobs, text = [one.logprob for one in content], [one.token for one in content]
        tops = [[top.logprob for top in one.top_logprobs] for one in content]
        assert b"".join(bytes(one.bytes) for one in content).decode(errors="replace") == text_of(tokens)
    expected = [torch.log_softmax(row.double(), 0) for row in logits]
    assert logprobs == pytest.approx([float(row[token]) for row, token in zip(expected, tokens)], abs=1e-4)
    for row, top in zip(expected, tops):
        assert top == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_a_stream_has_the_log_probabilities_of_the_whole_answer(client):
    body = dict(model="a0", prompt="Hello", max_tokens=12, temperature=0, logprobs=2)
    whole = client.completions.create(**body).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**body, stream=True)]
    parts = [chunk.logprobs for chunk in chunks if chunk.logprobs and chunk.logprobs.tokens]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    for name in ("tokens", "text_offset"):
        assert [value for part in parts for value in getattr(part, name)] == getattr(whole.logprobs, name)
    logprobs = [value for part in parts for value in part.token_logprobs]
    assert logprobs == pytest.approx(whole.logprobs.token_logprobs, abs=1e-4)


def test_n_answers_have_seeds_of_their_own_and_the_prompt_counts_once(client, written):
    body = dict(model="a0", prompt="Hello", max_tokens=10, temperature=1.0, seed=5, n=3)
    answer = client.completions.create(**body)
    expected = [shown(drawn(written, 10, temperature=1.0, seed=seed_of(5, choice))[0]) for choice in range(3)]
    assert [choice.text for choice in answer.choices] == expected and len(set(expected)) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == len(IDS)
    texts = ["", "", ""]
    for chunk in client.completions.create(**body, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_n_chats_stream_with_a_role_each(client):
    body = dict(model=BASE, messages=[{"role": "user", "content": "hi"}], max_tokens=6, temperature=1.0, seed=1, n=2)
    whole = [choice.message.content for choice in client.chat.completions.create(**body).choices]
    texts, roles, ends = ["", ""], [], []
    for chunk in client.chat.completions.create(**body, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
        ends += [choice.index] if choice.finish_reason else []
    assert texts == whole and roles == [0, 1] and sorted(ends) == [0, 1]


def test_several_prompts_have_answers_in_their_order(client, folder):
    answer = client.completions.create(model="a0", prompt=["Hello", "Bye"], n=2, max_tokens=8, temperature=0)
    expected = []
    for prompt in ("Hello", "Bye"):
        tokens = alone(folder / "a0", tiny_tokenizer()(prompt)["input_ids"], 8, **UNTIED)
        expected += [text_of(tokens)] * 2
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == len("Hello") + len("Bye")
    lists = client.completions.create(model="a0", prompt=[[50, 60], [70]], max_tokens=3, temperature=0)
    assert len(lists.choices) == 2


def test_an_answer_of_this_server_can_be_sent_back(client):
    """The official client sends all fields of the answer, also empty ones."""
    messages = [{"role": "user", "content": "hi"}]
    first = client.chat.completions.create(model="a0", messages=messages, max_tokens=4, temperature=0)
    messages += [first.choices[0].message, {"role": "user", "content": "more"}]
    assert client.chat.completions.create(model="a0", messages=messages, max_tokens=4).choices


def test_a_logit_of_minus_infinity_is_sent_as_a_number(written):
    from s2ft.serve.replies import _finite

    assert math.isfinite(_finite(float("-inf"))) and _finite(-1.5) == -1.5


def test_seeds_of_further_answers_are_valid_and_different():
    seeds = [seed_of(seed, choice) for seed in (-(2**63), 0, 2**63 - 1) for choice in range(3)]
    assert len(set(seeds)) == 9 and seed_of(None, 1) is None
    for seed in seeds:
        torch.Generator().manual_seed(seed)
