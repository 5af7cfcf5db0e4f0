"""Two hundred adapters from the output folders of runs, added and removed while they are used."""

import asyncio
import shutil

import httpx
import openai
import pytest
from serve.fleet import alone, eventually, save_adapters, text_of
from serve.process import served
from train.tiny import save_tiny, tiny_tokenizer

UNTIED = dict(tie_word_embeddings=False)
MANY, MORE, GONE, TOKENS = 200, 20, 20, 8


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with model/, runs/ of 200 runs, later/ of 20 more, and the answer that each adapter gives alone."""
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "model", **UNTIED)
    answers, ids = {}, tiny_tokenizer()("Hello")["input_ids"]
    for number, name in enumerate(save_adapters(work / "plain", MANY + MORE, **UNTIED)):
        answers[name] = text_of(alone(work / "plain" / name, ids, TOKENS, **UNTIED))
        run = work / ("runs" if number < MANY else "later") / name
        shutil.copytree(work / "plain" / name, run / "adapter")
        shutil.copytree(work / "plain" / name, run / "checkpoint-2")
        (run / "checkpoint-2" / "trainer_state.json").touch()
        (run / "config.yaml").touch()
    return work, answers


async def ask_all(url, names):
    """The answers of all adapters, asked at once; the error's code where there is none."""
    limits = httpx.Limits(max_connections=300)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120, http_client=httpx.AsyncClient(limits=limits)
    ) as client:

        async def ask(name):
            try:
                answer = await client.completions.create(model=name, prompt="Hello", max_tokens=TOKENS, temperature=0)
                return answer.choices[0].text
            except openai.NotFoundError as error:
                return error.code

        return dict(zip(names, await asyncio.gather(*map(ask, names))))


def listed(url):
    return {model["id"] for model in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]} - {"model"}


@pytest.mark.slow
def test_two_hundred_runs_are_served_added_and_removed(work):
    work, answers = work
    first, later = [f"a{n}" for n in range(MANY)], [f"a{n}" for n in range(MANY, MANY + MORE)]
    arguments = ["--model", work / "model", "--adapters", work / "runs", "--served-model-name", "model"]
    with served(*arguments, "--queue-size", "300", "--access-log", "off") as server:
        assert any(line.startswith(f"serving {MANY} adapters: a0, ") for line in server.lines), server.lines
        assert listed(server.url) == set(first)

        async def change_while_asking():
            asking = asyncio.create_task(ask_all(server.url, first))
            for name in later:
                await asyncio.to_thread(shutil.copytree, work / "later" / name, work / "runs" / name)
            found = await asking
            for name in first[:GONE]:
                await asyncio.to_thread(shutil.rmtree, work / "runs" / name)
            return found

        assert asyncio.run(change_while_asking()) == {name: answers[name] for name in first}
        left = first[GONE:] + later
        assert listed(server.url) == set(left)
        found = asyncio.run(ask_all(server.url, [*left, *first[:GONE], "checkpoint-2"]))
        gone = dict.fromkeys([*first[:GONE], "checkpoint-2"], "model_not_found")
        assert found == {name: answers[name] for name in left} | gone
        expected = [f"s2ft_adapters {len(left)}.0"] + [
            f's2ft_model_requests_total{{model="{name}",status="200"}} {count}.0'
            for name, count in ((first[0], 1), (first[-1], 2), (later[0], 1))
        ]

        def counted():  # after the answers are sent
            text = httpx.get(f"{server.url}/metrics", timeout=60).text
            return all(line in text for line in expected)

        eventually(counted, "the counters")
        server.signal()
        assert server.exit_code() == 0
    assert not [line for line in server.lines if "Traceback" in line], server.lines
