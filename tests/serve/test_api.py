"""The API, called by the official client and by plain requests: answers, streams, refusals."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serve.fleet import BASE, alone, eventually, running, save_adapters, text_of
from train.tiny import tiny_model, tiny_tokenizer

UNTIED = dict(tie_word_embeddings=False)
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(folder, 3, **UNTIED)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, tiny_model(**UNTIED)) as (url, service):
        yield url, service


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(folder, name, ids, count):
    tokens = alone(None if name == BASE else folder / name, ids, count, **UNTIED)
    return text_of(tokens), tokens


def greedy(client, name, count=10):
    return client.completions.create(model=name, prompt="Hello", max_tokens=count, temperature=0).choices[0].text


def post(server, path, body, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{server[0]}{path}", content=content, timeout=30, **options)


def error_of(response, status, code):
    """The message of an error response. The status, the code and the fields of the response are checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "code", "request_id"} and error["code"] == code
    assert error["request_id"] == response.headers["x-request-id"]
    return error["message"]


# ---- answers -----------------------------------------------------------------------------------------


def test_models_are_base_and_adapters(client):
    assert [model.id for model in client.models.list()] == [BASE, "a0", "a1", "a2"]
    assert client.models.retrieve("a1").id == "a1"


@pytest.mark.parametrize("name", [BASE, "a0", "a1", "a2"])
def test_a_greedy_completion_equals_that_of_the_adapter(client, folder, name):
    text, tokens = expected(folder, name, TOKENIZER("Hello")["input_ids"], 20)
    answer = client.completions.create(model=name, prompt="Hello", max_tokens=20, temperature=0)
    assert answer.choices[0].text == text
    assert answer.usage.to_dict() == {
        "prompt_tokens": 5,
        "completion_tokens": len(tokens),
        "total_tokens": 5 + len(tokens),
    }
    assert answer.choices[0].finish_reason == ("stop" if tokens[-1] == 2 else "length")


def test_chat_uses_the_template(client, folder):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    ids = TOKENIZER("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    text, tokens = expected(folder, "a1", ids, 12)
    answer = client.chat.completions.create(model="a1", messages=messages, max_completion_tokens=12, temperature=0)
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == len(tokens)


def test_streams_have_the_same_text(client, folder):
    text, tokens = expected(folder, "a2", TOKENIZER("Hello")["input_ids"], 20)
    chunks = list(
        client.completions.create(
            model="a2",
            prompt="Hello",
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
    assert chunks[-1].usage.completion_tokens == len(tokens) and chunks[-1].choices == []
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == [
        "stop" if tokens[-1] == 2 else "length"
    ]
    chat = list(
        client.chat.completions.create(
            model="a2", messages=[{"role": "user", "content": "hi"}], max_tokens=8, temperature=0, stream=True
        )
    )
    whole = client.chat.completions.create(
        model="a2", messages=[{"role": "user", "content": "hi"}], max_tokens=8, temperature=0
    )
    assert chat[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chat) == whole.choices[0].message.content


def test_a_stream_ends_with_done(server):
    response = post(server, "/v1/completions", dict(model=BASE, prompt="a", max_tokens=2, stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")


def test_a_prompt_of_tokens(client, folder):
    text, _ = expected(folder, "a0", [50, 60, 70], 10)
    answer = client.completions.create(model="a0", prompt=[50, 60, 70], max_tokens=10, temperature=0)
    assert answer.choices[0].text == text


def test_a_stop_string_ends_the_text(client, folder):
    text, _ = expected(folder, "a1", TOKENIZER("Hello")["input_ids"], 40)
    stop = text[6:8]
    answer = client.completions.create(model="a1", prompt="Hello", max_tokens=40, temperature=0, stop=["never", stop])
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_answer_beside_any_requests(client):
    def draw(seed=5):
        answer = client.completions.create(
            model="a0", prompt="Hello", max_tokens=30, temperature=1.5, top_p=0.9, seed=seed
        )
        return answer.choices[0].text

    first = draw()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, [5, 6, 5, 7, 5, 8])) == [first, draw(6), first, draw(7), first, draw(8)]
    assert len({first, draw(6), draw(7)}) == 3


# ---- refusals ----------------------------------------------------------------------------------------

GOOD = dict(model=BASE, prompt="a", max_tokens=1)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"model": NaN}', b"[" * 100000, b"1" * 5000])
def test_a_body_that_is_not_json(server, content):
    error_of(post(server, "/v1/completions", content), 400, "invalid_json")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(prompt=None), "prompt"),
        (dict(prompt={}), "prompt"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_tokens="3"), "max_tokens"),
        (dict(temperature=3), "temperature"),
        (dict(top_p=-1), "top_p"),
        (dict(seed=2**70), "seed"),
        (dict(stop=""), "stop"),
        (dict(stop=["a"] * 17), "stop"),
        (dict(model=""), "model"),
        (dict(top_k=-2), "top_k"),
        (dict(min_p=1.5), "min_p"),
        (dict(n=0), "n"),
        (dict(n=129), "n"),
        (dict(logprobs=21), "logprobs"),
        (dict(logprobs=True), "logprobs"),
        (dict(presence_penalty=2.5), "presence_penalty"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(logit_bias={"a": 1}), "logit_bias"),
        (dict(logit_bias={"1": 101}), "logit_bias"),
        (dict(logit_bias={"259": 1}), "logit_bias"),
        (dict(min_tokens=3), "min_tokens"),
        (dict(stream="yes"), "stream"),
        (dict(model=None), "model"),
        (dict(prompt=[-1]), "prompt"),
    ],
)
def test_a_field_that_is_wrong_is_named(server, change, words):
    assert words in error_of(post(server, "/v1/completions", {**GOOD, **change}), 400, "invalid_request")


@pytest.mark.parametrize(
    "change", [dict(echo=True), dict(best_of=3), dict(suffix="b"), dict(response_format={"type": "json_object"})]
)
def test_an_unsupported_parameter_is_refused(server, change):
    (name,) = change
    assert error_of(post(server, "/v1/completions", {**GOOD, **change}), 400, "unsupported_parameter").startswith(name)


def test_chat_refuses_what_is_not_text(server):
    good = dict(model=BASE, messages=[{"role": "user", "content": "a"}], max_tokens=1)
    assert post(server, "/v1/chat/completions", {**good, "user": "me", "n": 1, "tools": []}).status_code == 200
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    error_of(
        post(server, "/v1/chat/completions", {**good, "messages": [{"role": "user", "content": image}]}),
        400,
        "invalid_request",
    )
    error_of(post(server, "/v1/chat/completions", {**good, "messages": []}), 400, "invalid_request")
    for wrong in (dict(logprobs=2), dict(top_logprobs=2), dict(logprobs=True, top_logprobs=21)):
        error_of(post(server, "/v1/chat/completions", {**good, **wrong}), 400, "invalid_request")
    error_of(
        post(server, "/v1/chat/completions", {**good, "tools": [{"type": "function"}]}), 400, "unsupported_parameter"
    )


@pytest.mark.parametrize(
    "prompt, code",
    [
        ("", "empty_prompt"),
        ([], "empty_prompt"),
        ([259], "invalid_prompt"),
        ("\ud800", "invalid_prompt"),
        ("a" * 257, "context_length_exceeded"),
    ],
)
def test_invalid_prompts_are_refused(server, prompt, code):
    error_of(post(server, "/v1/completions", {**GOOD, "prompt": prompt}), 400, code)


def test_more_answers_than_the_queue_holds_are_refused(server):
    message = error_of(
        post(server, "/v1/completions", {**GOOD, "prompt": ["a"] * 100, "n": 3}), 400, "too_many_answers"
    )
    assert message == "300 answers requested, but the queue has 256 places"


def test_prompt_and_answer_have_to_fit_the_context(server):
    error_of(
        post(server, "/v1/completions", {**GOOD, "prompt": "a" * 250, "max_tokens": 7}), 400, "context_length_exceeded"
    )
    answer = post(server, "/v1/completions", {**GOOD, "prompt": "a" * 250, "max_tokens": 6}).json()
    assert answer["usage"]["total_tokens"] <= 256
    without = {name: value for name, value in GOOD.items() if name != "max_tokens"}
    assert post(server, "/v1/completions", {**without, "prompt": "a" * 250}).status_code == 200


@pytest.mark.parametrize("name", ["unknown", "../a0", "a0/", "a0/../a1", ".", "..", "\0", "a" * 5000, "/", "a0\n"])
def test_unknown_models_are_404_whatever_they_look_like(server, name):
    error_of(post(server, "/v1/completions", {**GOOD, "model": name}), 404, "model_not_found")


def test_unknown_routes_and_methods(server):
    error_of(httpx.get(f"{server[0]}/nowhere"), 404, "not_found")
    error_of(httpx.get(f"{server[0]}/v1/completions/"), 404, "not_found")
    error_of(httpx.get(f"{server[0]}/v1/completions"), 405, "method_not_allowed")
    error_of(httpx.get(f"{server[0]}/v1/models/unknown"), 404, "model_not_found")


def test_an_unexpected_error_is_json_without_details(server, monkeypatch):
    monkeypatch.setattr(server[1], "prompt_ids", lambda body, version: {}["secret"])
    assert "secret" not in error_of(post(server, "/v1/completions", GOOD), 500, "internal_error")


def test_the_error_of_a_chat_template_is_returned(server, monkeypatch):
    monkeypatch.setattr(server[1]._prompter(None).tokenizer, "chat_template", "{{ raise_exception('users first') }}")
    body = dict(model=BASE, messages=[{"role": "assistant", "content": "a"}])
    assert "users first" in error_of(post(server, "/v1/chat/completions", body), 400, "invalid_messages")


def test_keys_sizes_and_limits(folder):
    from s2ft.serve.options import Limits

    limits = Limits(api_key="secret", max_body_bytes=1000, max_tokens=5)
    with running(folder, tiny_model(**UNTIED), limits=limits) as server:
        right = {"Authorization": "Bearer secret"}
        for headers in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer s\xe9cret".encode("latin-1")},
        ):
            error_of(post(server, "/v1/completions", GOOD, headers=headers), 401, "invalid_api_key")
        assert post(server, "/v1/completions", GOOD, headers=right).status_code == 200
        assert httpx.get(f"{server[0]}/health").json()["status"] == "ok"
        error_of(post(server, "/v1/completions", {**GOOD, "prompt": "a" * 1000}, headers=right), 413, "body_too_large")
        parts = httpx.post(f"{server[0]}/v1/completions", content=iter([b"a" * 600, b"a" * 600]), headers=right)
        error_of(parts, 413, "body_too_large")
        error_of(post(server, "/v1/completions", {**GOOD, "max_tokens": 6}, headers=right), 400, "max_tokens_exceeded")


# ---- adapters at run time ----------------------------------------------------------------------------


def load(server, name, path):
    return post(server, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})


def unload(server, name):
    return post(server, "/v1/unload_lora_adapter", {"lora_name": name})


def test_loading_and_unloading(folder, server, client):
    assert load(server, "other", "a1").status_code == 200
    text, _ = expected(folder, "a1", TOKENIZER("Hello")["input_ids"], 10)
    assert greedy(client, "other") == text
    error_of(load(server, "other", "a1"), 400, "name_taken")
    error_of(load(server, BASE, "a1"), 400, "name_taken")
    assert unload(server, "other").status_code == 200
    error_of(unload(server, "other"), 404, "model_not_found")
    error_of(post(server, "/v1/completions", {**GOOD, "model": "other"}), 404, "model_not_found")


@pytest.mark.parametrize("path", ["../a1", "/etc", "a1/../../x", ".", "x\0y"])
def test_paths_stay_inside_the_folder(server, path):
    error_of(load(server, "new", path), 400, "invalid_path")


def test_links_that_lead_outside_are_not_loaded(folder, server, tmp_path):
    shutil.copytree(folder / "a0", tmp_path / "a0")
    (folder / "link").symlink_to(tmp_path)
    error_of(load(server, "new", "link/a0"), 400, "invalid_path")


def test_a_path_is_refused_as_a_name(server):
    for name in ("a/b", "..", ".x", "a\\b"):
        error_of(load(server, name, "a1"), 400, "invalid_name")


def test_a_folder_without_a_valid_adapter_is_not_served(folder, server):
    for path in ("nowhere", "a" * 4000):
        assert len(error_of(load(server, "new", path), 404, "adapter_not_found")) < 300
    shutil.copytree(folder / "a0", folder / "deep" / "broken")
    tensors = folder / "deep" / "broken" / "s2ft_adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    message = error_of(load(server, "broken", "deep/broken"), 400, "invalid_adapter")
    assert str(folder) not in message
    error_of(post(server, "/v1/completions", {**GOOD, "model": "broken"}), 404, "model_not_found")


def test_a_broken_adapter_fails_only_its_own_requests(folder, server):
    shutil.copytree(folder / "a0", folder / "torn")
    tensors = folder / "torn" / "s2ft_adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(
                    lambda name: post(server, "/v1/completions", {**GOOD, "model": name}),
                    ["torn", "a0", BASE, "torn", "a1", "a2"],
                )
            )
        assert [answer.status_code for answer in answers] == [400, 200, 200, 400, 200, 200]
        assert str(folder) not in error_of(answers[0], 400, "invalid_adapter")
    finally:
        shutil.rmtree(folder / "torn")


def test_an_adapter_of_another_base_is_refused_with_the_reason(folder, server):
    save_adapters(folder / "other", 1, seed=5, **UNTIED)
    (folder / "other/a0").rename(folder / "foreign")
    try:
        message = error_of(post(server, "/v1/completions", {**GOOD, "model": "foreign"}), 400, "invalid_adapter")
        assert "was trained on another base" in message and str(folder) not in message
    finally:
        shutil.rmtree(folder / "foreign"), shutil.rmtree(folder / "other")


def test_new_folders_are_found_and_deleted_ones_are_not_served(folder, server, client):
    shutil.copytree(folder / "a2", folder / "later")
    text, _ = expected(folder, "a2", TOKENIZER("Hello")["input_ids"], 10)
    assert greedy(client, "later") == text
    shutil.rmtree(folder / "later")
    shutil.copytree(folder / "a1", folder / "later")  # another adapter with the same name
    text, _ = expected(folder, "a1", TOKENIZER("Hello")["input_ids"], 10)
    assert greedy(client, "later") == text
    shutil.rmtree(folder / "later")
    error_of(post(server, "/v1/completions", {**GOOD, "model": "later"}), 404, "model_not_found")
    assert "later" not in [model.id for model in client.models.list()]


def test_removed_adapters_leave_nothing_in_the_bank(server):
    service = server[1]
    eventually(lambda: not service.engine.running and not service.engine.waiting, "an idle server")
    versions = service.engine.adapters._known.values()
    eventually(lambda: all(version.users == 0 for version in versions), "adapters without users")
    assert set(service.engine.adapters.bank.names) == {version.bank_name for version in versions}


def test_metrics(server):
    text = httpx.get(f"{server[0]}/metrics").text
    for line in (
        's2ft_requests_total{route="/v1/completions",status="200"}',
        "s2ft_generated_tokens_total",
        "s2ft_queue_length 0.0",
        "s2ft_running 0.0",
        "s2ft_batch_size_bucket",
        "s2ft_request_seconds_bucket",
    ):
        assert line in text
