"""Request ids, the access log, the counters by model, and the description of the API."""

import json
import re

import httpx
import pytest
from serve.fleet import BASE, eventually, running, save_adapters
from train.tiny import tiny_model

from s2ft.serve import metrics
from s2ft.serve.options import Limits
from s2ft.serve.record import Record

UNTIED = dict(tie_word_embeddings=False)
GOOD = dict(model="a0", prompt="Hello", max_tokens=3, temperature=0, logit_bias={"2": -100})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(folder, 1, **UNTIED)
    return folder


@pytest.fixture
def log(caplog):
    """A function that waits for so many lines of the access log. They are written after the answers are sent."""
    caplog.set_level("INFO")

    def lines(count):
        def found():
            return [record.getMessage() for record in caplog.records if record.name == "s2ft.serve.access"]

        eventually(lambda: len(found()) >= count, "the log")
        return found()

    return lines


@pytest.fixture(scope="module")
def url(folder):
    with running(folder, tiny_model(**UNTIED)) as (url, _):
        yield url


def complete(url, headers=None, path="/v1/completions", **changes):
    return httpx.post(f"{url}{path}", json={**GOOD, **changes}, headers=headers, timeout=60)


def value_of(url, line):
    """The value of a counter."""
    text = httpx.get(f"{url}/metrics").text
    return float(next((found.split()[-1] for found in text.splitlines() if found.startswith(line + " ")), 0))


def test_each_request_is_a_line_with_its_id(url, log):
    answer = complete(url, {"X-Request-Id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    with httpx.stream("POST", f"{url}/v1/completions", json={**GOOD, "n": 2, "stream": True}) as stream:
        made = stream.headers["x-request-id"]
        stream.read()
    wrong = complete(url, model="unknown\nmodel")
    assert wrong.json()["error"]["request_id"] == wrong.headers["x-request-id"]
    httpx.get(f"{url}/health"), httpx.get(f"{url}/metrics")
    lines = [re.sub(r"^\S+ | \S+$", "", line) for line in log(3)]  # without the time and the seconds
    ids = ["abc-1", made, wrong.headers["x-request-id"]]
    assert re.fullmatch("req-[0-9a-f]{24}", made) and len(set(ids)) == 3
    assert lines == [
        f"{ids[0]} 127.0.0.1 POST /v1/completions 200 model=a0 in=5 out=3",
        f"{ids[1]} 127.0.0.1 POST /v1/completions 200 model=a0 in=5 out=6",
        f"{ids[2]} 127.0.0.1 POST /v1/completions 404 model=- in=0 out=0",
    ]


@pytest.mark.parametrize("sent", ["a b", "a" * 129, "", "a\u00e9", 'a"b'])
def test_an_id_that_is_not_safe_in_a_log_is_replaced(url, sent):
    found = httpx.get(f"{url}/v1/models", headers={b"X-Request-Id": sent.encode("latin-1")})
    assert found.headers.get_list("x-request-id") != [sent] and found.headers["x-request-id"].startswith("req-")


def test_a_path_can_not_write_a_line_of_its_own(url, log):
    httpx.get(f"{url}/a%0Ab%20c")
    (line,) = log(1)
    assert "GET /a%0Ab%20c 404" in line and "\n" not in line


def test_an_unexpected_error_has_the_id_of_its_request(folder, log, caplog, monkeypatch):
    with running(folder, tiny_model(**UNTIED)) as (url, service):
        monkeypatch.setattr(service, "prompt_ids", lambda body, version: 1 / 0)
        answer = complete(url, {"X-Request-Id": "abc-2"})
        assert answer.status_code == 500 and answer.json()["error"]["request_id"] == "abc-2"
        assert answer.headers.get_list("x-request-id") == ["abc-2"]
        assert "abc-2: POST /v1/completions failed" in caplog.text and " 500 model=- " in log(1)[0]


def test_json_lines_and_ignored_parameters(folder, log):
    limits = Limits(ignore_unsupported=True)
    with running(folder, tiny_model(**UNTIED), access_log="json", limits=limits) as (url, _):
        answer = complete(url, {"X-Request-Id": "1"}, tools=[{"type": "function"}], min_tokens=3, echo=False)
        assert answer.status_code == 200 and answer.headers["x-ignored-parameters"] == "tools, min_tokens"
        names = {"a\r\nX-Other: 1": 1, "\u65e5": 2, "\ud800": 3}  # no header can have them
        odd = httpx.post(f"{url}/v1/completions", content=json.dumps({**GOOD, **names}), timeout=60)
        assert odd.status_code == 200 and "x-other" not in odd.headers
        assert odd.headers["x-ignored-parameters"] == "a%0D%0AX-Other%3A%201, %E6%97%A5, %3F"
        assert complete(url, top_k="many").status_code == 400  # a supported one is checked
    found = json.loads(log(3)[0])
    assert found.pop("time") and found.pop("seconds") >= 0
    assert found == {
        "id": "1",
        "client": "127.0.0.1",
        "request": "POST /v1/completions",
        "status": 200,
        "model": "a0",
        "prompt_tokens": 5,
        "generated_tokens": 3,
    }


def test_counters_have_the_name_of_the_model(url):
    lines = {
        's2ft_model_requests_total{model="a0",status="200"}': 1,
        's2ft_model_requests_total{model="a0",status="400"}': 0,
        's2ft_prompt_tokens_total{model="a0"}': 5,
        's2ft_generated_tokens_total{model="a0"}': 3,
        's2ft_model_request_seconds_count{model="a0"}': 1,
        's2ft_requests_total{route="/v1/completions",status="404"}': 1,
    }
    before = {line: value_of(url, line) for line in lines}
    complete(url), complete(url, model="nobody")
    eventually(lambda: {line: value_of(url, line) - before[line] for line in lines} == lines, "the counters")
    assert "nobody" not in httpx.get(f"{url}/metrics").text


def test_the_number_of_counters_is_bounded(monkeypatch):
    monkeypatch.setattr(metrics, "MODELS", 2)
    counters = metrics.Metrics()
    for name in ("a", "b", "c", "d", "a", BASE):
        counters.count("/v1/completions", Record("1", name, 1, 2, 200), 0.1)
    text = counters.text().decode()
    found = set(re.findall(r's2ft_generated_tokens_total\{model="(.*)"\} (.*)', text))
    assert found == {("a", "4.0"), ("b", "2.0"), ("(others)", "6.0")}


def test_the_api_is_described_for_programs(url):
    found = httpx.get(f"{url}/openapi.json").json()
    body = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schemas = found["components"]["schemas"]
    assert "min_p" in schemas[body["$ref"].rpartition("/")[2]]["properties"]
    references = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(found)))
    assert references and references <= schemas.keys()
    page = httpx.get(f"{url}/docs")
    assert page.status_code == 404 and "/openapi.json" in page.json()["error"]["message"]
