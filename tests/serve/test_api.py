"""The API, called by the official client and by plain requests: answers, streams, refusals, adapters at run time."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import openai
import prometheus_client
import pytest
import torch
from serve.fleet import BASE, alone, eventually, running, save_adapters, text_of
from support.inside import Sampler, access, native
from support.states import flip
from train.tiny import UNTIED, tiny_model, tiny_tokenizer

import s2ft

TOKENIZER = tiny_tokenizer()
OWN = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"  # the tokenizer's prompt of CHAT
CHAT = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters a0, a1 and a2. The last one was trained with a prompt of its own."""
    folder = save_adapters(tmp_path_factory.mktemp("adapters"), 3, **UNTIED)
    adapter = s2ft.read_adapter(folder / "a2")
    prompt = {"form": "chat", "template": TEMPLATE, "system": "Be brief."}
    native.write(replace(adapter, info={**adapter.info, "prompt": prompt}), folder / "a2")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, tiny_model(**UNTIED)) as (url, service):
        yield url, service


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(folder, name, prompt, count):
    ids = TOKENIZER(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
    tokens = alone(None if name == BASE else folder / name, ids, count, **UNTIED)
    return text_of(tokens), tokens, ids


def greedy(client, name, count=10):
    return client.completions.create(model=name, prompt="Hello", max_tokens=count, temperature=0).choices[0].text


def post(server, path, body, **options):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{server[0]}{path}", content=content, timeout=30, **options)


def error_of(response, status, code):
    """The message of an error response. The status, the code and the fields of the response are checked."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "code", "request_id"} and error["code"] == code
    assert error["request_id"] == response.headers["x-request-id"]
    return error["message"]


# ---- answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [BASE, "a0", "a1", "a2"])
def test_answers_whole_and_in_chunks_are_those_of_the_adapter_alone(client, folder, name):
    assert [model.id for model in client.models.list()] == [BASE, "a0", "a1", "a2"]
    text, tokens, ids = expected(folder, name, "Hello", 20)
    body = dict(model=name, prompt="Hello", max_tokens=20, temperature=0)
    finish, usage = "stop" if tokens[-1] == 2 else "length", dict(prompt_tokens=len(ids), completion_tokens=len(tokens))
    whole = client.completions.create(**body)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text, finish)
    assert whole.usage.to_dict() == {**usage, "total_tokens": sum(usage.values())}
    *chunks, last = client.completions.create(**body, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == text and last.usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == [finish]
    for prompt in (ids, ["Hello"]):  # token ids, and the list that LangChain sends
        assert client.completions.create(**{**body, "prompt": prompt}).choices[0].text == text


@pytest.mark.parametrize("name, prompt", [(BASE, OWN), ("a0", OWN), ("a2", "[s]Be brief.[u]hi[a]")])
def test_chats_use_the_prompt_of_the_training(client, folder, name, prompt):
    text, tokens, ids = expected(folder, name, prompt, 12)
    body = dict(model=name, messages=CHAT, max_completion_tokens=12, temperature=0)
    whole = client.chat.completions.create(**body)
    assert whole.choices[0].message.content == text and whole.usage.prompt_tokens == len(ids)
    chunks = list(client.chat.completions.create(**body, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    again = [*CHAT, whole.choices[0].message, *CHAT]  # with all fields of the answer, also empty ones
    assert client.chat.completions.create(model=name, messages=again, max_tokens=2).choices


def test_a_stop_string_ends_the_text(client, folder):
    text, _, _ = expected(folder, "a1", "Hello", 40)
    stop = text[6:8]
    answer = client.completions.create(model="a1", prompt="Hello", max_tokens=40, temperature=0, stop=["never", stop])
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_answer_beside_any_requests(client, folder):
    options = dict(temperature=1.5, top_p=0.9, seed=5)
    model, sampler, tokens = tiny_model(**UNTIED), Sampler(**options, top_k=40, min_p=0.01), []
    s2ft.load_adapter(model, folder / "a0")
    ids = TOKENIZER("Hello")["input_ids"]
    with torch.no_grad():
        while len(tokens) < 30 and tokens[-1:] != [2]:
            tokens.append(sampler.choose(model(torch.tensor([ids + tokens])).logits[0, -1]))

    def draw(seed):
        body = dict(model="a0", prompt="Hello", max_tokens=30, extra_body=dict(top_k=40, min_p=0.01))
        return client.completions.create(**body, **{**options, "seed": seed}).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(draw, [5, 6, 5, 7, 5, 8]))
    assert found[0] == found[2] == found[4] == text_of(tokens) and len(set(found)) == 4


def test_two_hundred_requests_at_once_are_not_mixed_up(client, folder):
    names, prompts = [BASE, "a0", "a1", "a2"], ["Hello", "What is the sum of 3 and 4?"]
    asked = [(name, prompt, 1 + number) for number in range(25) for name in names for prompt in prompts]
    tokens = {(name, prompt): expected(folder, name, prompt, 25)[1] for name in names for prompt in prompts}

    def ask(name, prompt, count):
        body = dict(model=name, prompt=prompt, max_tokens=count, temperature=0)
        if count % 3:
            return client.completions.create(**body).choices[0].text
        stream = client.completions.create(**body, stream=True)
        if count % 2:
            return "".join(chunk.choices[0].text for chunk in stream)
        next(stream), stream.close()  # a client that leaves

    with ThreadPoolExecutor(40) as pool:
        for (name, prompt, count), text in zip(asked, pool.map(lambda one: ask(*one), asked)):
            assert text in (None, text_of(tokens[name, prompt][:count]))


# ---- refusals ----------------------------------------------------------------------------------------

GOOD = dict(model=BASE, prompt="a", max_tokens=1)
INVALID, UNSUPPORTED = "invalid_request", "unsupported_parameter"
BAD = [  # a change of a completion, the code, and one word of the message
    (dict(prompt=None), INVALID, "prompt"),
    (dict(prompt=["a", "b"]), INVALID, "prompt"),
    (dict(prompt=[-1]), INVALID, "prompt"),
    (dict(max_tokens=0), INVALID, "max_tokens"),
    (dict(max_tokens="3"), INVALID, "max_tokens"),
    (dict(temperature=3), INVALID, "temperature"),
    (dict(top_p=-1), INVALID, "top_p"),
    (dict(top_k=-2), INVALID, "top_k"),
    (dict(min_p=1.5), INVALID, "min_p"),
    (dict(seed=2**70), INVALID, "seed"),
    (dict(stop=""), INVALID, "stop"),
    (dict(stop=["a"] * 17), INVALID, "stop"),
    (dict(min_tokens=3), INVALID, "min_tokens"),
    (dict(stream="yes"), INVALID, "stream"),
    (dict(model=""), INVALID, "model"),
    (dict(model=None), INVALID, "model"),
    (dict(n=2), UNSUPPORTED, "vllm"),
    (dict(logprobs=1), UNSUPPORTED, "vllm"),
    (dict(presence_penalty=0.5), UNSUPPORTED, "vllm"),
    (dict(frequency_penalty=-1), UNSUPPORTED, "vllm"),
    (dict(repetition_penalty=1.1), UNSUPPORTED, "vllm"),
    (dict(logit_bias={"1": 5}), UNSUPPORTED, "vllm"),
    (dict(echo=True), UNSUPPORTED, "echo"),
    (dict(best_of=3), UNSUPPORTED, "best_of"),
    (dict(suffix="b"), UNSUPPORTED, "suffix"),
    (dict(response_format={"type": "json_object"}), UNSUPPORTED, "response_format"),
    (dict(prompt=""), "empty_prompt", "tokens"),
    (dict(prompt=[]), "empty_prompt", "tokens"),
    (dict(prompt=[259]), "invalid_prompt", "259"),
    (dict(prompt="\ud800"), "invalid_prompt", "surrogate"),
    (dict(prompt="a" * 257), "context_length_exceeded", "256"),
    (dict(prompt="a" * 250, max_tokens=7), "context_length_exceeded", "7"),
]


BAD_CHATS = [
    (
        dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        INVALID,
        "content",
    ),
    (dict(messages=[]), INVALID, "messages"),
    (dict(tools=[{"type": "function"}]), UNSUPPORTED, "tools"),
    (dict(logprobs=True), UNSUPPORTED, "vllm"),
    (dict(top_logprobs=2), UNSUPPORTED, "vllm"),
]
GOOD_CHAT = dict(model=BASE, messages=CHAT, max_tokens=1, user="me", n=1, tools=[], logprobs=False)
TABLE = [("completions", GOOD, *row) for row in BAD] + [("chat/completions", GOOD_CHAT, *row) for row in BAD_CHATS]


@pytest.mark.parametrize("path, good, change, code, word", TABLE, ids=lambda value: str(value)[:30])
def test_a_field_that_is_wrong_or_not_supported_is_named(server, path, good, change, code, word):
    assert word in error_of(post(server, f"/v1/{path}", {**good, **change}), 400, code)
    assert post(server, f"/v1/{path}", good).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"model": NaN}', b"[" * 100000, b"1" * 5000])
def test_a_body_that_is_not_json(server, content):
    error_of(post(server, "/v1/completions", content), 400, "invalid_json")


@pytest.mark.parametrize("name", ["unknown", "../a0", "a0/", "a0/../a1", ".", "..", "\0", "a" * 5000, "/", "a0\n"])
def test_unknown_models_are_404_whatever_they_look_like(server, name):
    error_of(post(server, "/v1/completions", {**GOOD, "model": name}), 404, "model_not_found")


def test_unknown_routes_and_methods(server):
    for path in ("nowhere", "v1/completions/", "docs"):
        error_of(httpx.get(f"{server[0]}/{path}"), 404, "not_found")
    error_of(httpx.get(f"{server[0]}/v1/completions"), 405, "method_not_allowed")
    error_of(httpx.get(f"{server[0]}/v1/models/unknown"), 404, "model_not_found")


def test_an_unexpected_error_is_json_without_details_and_that_of_a_template_is_returned(server, monkeypatch):
    monkeypatch.setattr(server[1].prompter(None).tokenizer, "chat_template", "{{ raise_exception('users first') }}")
    body = dict(model=BASE, messages=[{"role": "assistant", "content": "a"}])
    assert "users first" in error_of(post(server, "/v1/chat/completions", body), 400, "invalid_messages")
    monkeypatch.setattr(server[1], "prompt_ids", lambda body, prompter: {}["secret"])
    assert "secret" not in error_of(post(server, "/v1/completions", GOOD), 500, "internal_error")


def test_keys_sizes_and_limits(folder):
    limits = dict(api_key="secret", max_body_bytes=1000, max_tokens_limit=5)
    with running(folder, tiny_model(**UNTIED), **limits) as server:
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
    assert greedy(client, "other") == expected(folder, "a1", "Hello", 10)[0]
    for name in ("other", BASE):
        error_of(load(server, name, "a1"), 400, "name_taken")
    assert unload(server, "other").status_code == 200
    error_of(unload(server, "other"), 404, "model_not_found")
    error_of(post(server, "/v1/completions", {**GOOD, "model": "other"}), 404, "model_not_found")
    assert load(server, "other", "a0").status_code == 200  # another adapter with the same name
    assert greedy(client, "other") == expected(folder, "a0", "Hello", 10)[0]
    assert unload(server, "other").status_code == 200


def damaged(folder, name):
    """A copy of a0 in the folder, with another byte in its first delta."""
    shutil.copytree(folder / "a0", folder / name)
    file = folder / name / "s2ft_adapter.safetensors"
    flip(file, 8 + int.from_bytes(file.read_bytes()[:8], "little") + 1)


@pytest.mark.parametrize(
    "name, path, status, code",
    [
        *(
            ("new", path, 400, "invalid_path")
            for path in ("../a1", "/etc", "a1/../../x", ".", "x\0y", "link/a0", "run")
        ),
        *((name, "a1", 400, "invalid_name") for name in ("a/b", "..", ".x", "a\\b")),
        *(("new", path, 404, "adapter_not_found") for path in ("nowhere", "a" * 4000)),
        ("new", "deep/flipped", 400, "invalid_adapter"),
        ("new", "deep/foreign", 400, "invalid_adapter"),
    ],
)
def test_what_can_not_be_loaded_is_refused_without_the_path(folder, server, tmp_path, name, path, status, code):
    (folder / "deep").mkdir(), (folder / "run").mkdir()
    try:
        shutil.copytree(folder / "a0", tmp_path / "a0")
        (folder / "link").symlink_to(tmp_path)
        (folder / "run/adapter").symlink_to(tmp_path / "a0")  # leads outside, too
        damaged(folder, "deep/flipped")
        save_adapters(tmp_path / "other", 1, seed=5, **UNTIED)
        shutil.copytree(tmp_path / "other/a0", folder / "deep/foreign")
        message = error_of(load(server, name, path), status, code)
        assert str(folder) not in message and len(message) < 300
        error_of(post(server, "/v1/completions", {**GOOD, "model": "new"}), 404, "model_not_found")
    finally:
        (folder / "link").unlink(), shutil.rmtree(folder / "deep"), shutil.rmtree(folder / "run")


def test_an_adapter_whose_folder_changes_is_refused_until_it_is_loaded_again(folder, server, client):
    shutil.copytree(folder / "a1", folder / "deep/later")
    try:
        assert load(server, "later", "deep/later").status_code == 200
        assert greedy(client, "later") == expected(folder, "a1", "Hello", 10)[0]
        shutil.rmtree(folder / "deep/later")
        error_of(post(server, "/v1/completions", {**GOOD, "model": "later"}), 409, "adapter_changed")
        shutil.copytree(folder / "a0", folder / "deep/later")
        assert "load it again" in error_of(
            post(server, "/v1/completions", {**GOOD, "model": "later"}), 409, "adapter_changed"
        )
        assert unload(server, "later").status_code == load(server, "later", "deep/later").status_code == 200
        assert greedy(client, "later") == expected(folder, "a0", "Hello", 10)[0]
        assert unload(server, "later").status_code == 200
    finally:
        shutil.rmtree(folder / "deep")


def test_removed_adapters_leave_nothing_in_the_bank(server):
    service = server[1]
    eventually(lambda: not service.engine.running and not service.engine.waiting, "an idle server")
    adapters = service.engine.adapters
    eventually(lambda: len(adapters.bank.names) == len(adapters.names) == 3, "adapters without users")


# ---- the log, counters, description ------------------------------------------------------------------


def value_of(server, line):
    """The value of a counter."""
    text = httpx.get(f"{server[0]}/metrics").text
    return float(next((found.split()[-1] for found in text.splitlines() if found.startswith(line + " ")), 0))


def test_counters_have_the_name_of_the_model(server):
    lines = {
        's2ft_model_requests_total{model="a0",status="200"}': 1,
        's2ft_prompt_tokens_total{model="a0"}': 1,
        's2ft_generated_tokens_total{model="a0"}': 1,
        's2ft_model_request_seconds_count{model="a0"}': 1,
        's2ft_requests_total{route="/v1/completions",status="404"}': 1,
        "s2ft_first_token_seconds_count": 1,
    }
    before = {line: value_of(server, line) for line in lines}
    for model in ("a0", "nobody"):
        post(server, "/v1/completions", {**GOOD, "model": model})
    eventually(lambda: {line: value_of(server, line) - before[line] for line in lines} == lines, "the counters")
    assert "nobody" not in httpx.get(f"{server[0]}/metrics").text and value_of(server, "s2ft_adapters") == 3


def test_adapters_loaded_under_ever_new_names_do_not_fill_the_memory_with_counters(monkeypatch):
    monkeypatch.setattr(access, "MOST_COUNTED", 2)
    metrics = access.Metrics()
    for name in ("a", "b", "c", "d", "a"):
        record = access.RequestRecord("id", model=name, generated_tokens=2, status=200)
        metrics.count("/v1/completions", record, seconds=0.1)
    text = prometheus_client.generate_latest(metrics.registry).decode()
    counted = dict(re.findall(r's2ft_generated_tokens_total\{model="(.*)"\} (.*)', text))
    assert counted == {"a": "4.0", "b": "2.0", "(others)": "4.0"}


def lines_of(caplog, count):
    """So many lines of the access log. They are written after the answers are sent."""

    def found():
        return [record.getMessage() for record in caplog.records if record.name == "s2ft.serve.access"]

    eventually(lambda: len(found()) >= count, "the log")
    return found()


def test_each_request_is_a_line_with_its_id_and_no_path_can_write_one(server, caplog):
    caplog.set_level("INFO")
    assert post(server, "/v1/completions", GOOD, headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for sent in ("a b", "a" * 129, 'a"b'):  # not safe in a log
        assert httpx.get(f"{server[0]}/health", headers={"X-Request-Id": sent}).headers["x-request-id"][:4] == "req-"
    httpx.get(f"{server[0]}/a%0Ab%20c")
    first, second = lines_of(caplog, 2)
    assert re.fullmatch(rf"\S+ abc-1 127.0.0.1 POST /v1/completions 200 model={BASE} in=1 out=1 \S+s", first)
    assert "GET /a%0Ab%20c 404" in second and "\n" not in second


def test_json_lines_and_ignored_parameters(folder, caplog):
    caplog.set_level("INFO")
    with running(folder, tiny_model(**UNTIED), access_log="json", ignore_unsupported=True) as server:
        odd = {"a\r\nX-Other: 1": 1, "\u65e5": 2, "\ud800": 3}  # no header can have these names
        changes = dict(model="a0", tools=[{"type": "function"}], n=3, echo=False, **odd)
        answer = post(server, "/v1/completions", {**GOOD, **changes}, headers={"X-Request-Id": "1"})
        assert answer.status_code == 200 and "x-other" not in answer.headers
        assert answer.headers["x-ignored-parameters"] == "n, tools, a%0D%0AX-Other%3A%201, %E6%97%A5, %3F"
        assert post(server, "/v1/completions", {**GOOD, "top_k": "many"}).status_code == 400  # a supported one
        found = json.loads(lines_of(caplog, 1)[0])
    assert (found["id"], found["status"], found["model"], found["generated_tokens"]) == ("1", 200, "a0", 1)


def test_the_api_is_described_for_programs(server):
    found = httpx.get(f"{server[0]}/openapi.json").json()
    body = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schemas = found["components"]["schemas"]
    assert "min_p" in schemas[body["$ref"].rpartition("/")[2]]["properties"]
    references = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(found)))
    assert references and references <= schemas.keys()
