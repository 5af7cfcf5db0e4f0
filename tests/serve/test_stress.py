"""Two hundred clients of all kinds at once use a server process with twenty adapters."""

import asyncio
import contextlib
import json
import random
from collections import Counter

import httpx
import openai
import pytest
from serve.fleet import alone, save_adapters, text_of
from serve.process import served
from train.tiny import save_tiny, tiny_tokenizer

UNTIED = dict(tie_word_embeddings=False)
PROMPTS = ["Hello", "What is the sum of 3 and 4?"]
TOKENS = 40
DOOMED, LATER = "a19", "later"
GROWTH = 16 << 20  # bytes that two more rounds may add to the memory of the process


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with model/ and adapters/, and the answers that each adapter gives alone."""
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "model", **UNTIED)
    names = save_adapters(work / "adapters", 20, **UNTIED)
    ids = {prompt: tiny_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS}
    answers = {
        (name, prompt): alone(work / "adapters" / name, ids[prompt], TOKENS, **UNTIED)
        for name in names
        for prompt in PROMPTS
    }
    answers |= {("model", prompt): alone(None, ids[prompt], TOKENS, **UNTIED) for prompt in PROMPTS}
    assert len({tuple(tokens) for (_, prompt), tokens in answers.items() if prompt == PROMPTS[0]}) == 21
    return work, answers


class Crowd:
    """The clients of one round and their answers."""

    def __init__(self, server, answers, seed):
        self.server, self.answers, self.draw = server, answers, random.Random(seed)
        self.seen, self.wrong = Counter(), []

    async def round(self):
        kinds = (
            [self.right] * 80
            + [self.streamed] * 40
            + [self.vanishing] * 20
            + [self.vanishing_mute] * 15
            + [self.malformed] * 10
            + [self.unknown] * 10
            + [self.too_long] * 10
            + [self.doomed] * 15
        )
        self.draw.shuffle(kinds)
        limits = httpx.Limits(max_connections=400)
        async with (
            openai.AsyncOpenAI(
                base_url=f"{self.server.url}/v1",
                api_key="none",
                max_retries=0,
                timeout=120,
                http_client=httpx.AsyncClient(limits=limits),
            ) as self.client,
            httpx.AsyncClient(base_url=self.server.url, timeout=120, limits=limits) as self.plain,
        ):
            await asyncio.gather(self.replace(), *(kind() for kind in kinds))

    def job(self, name=None):
        name = name or self.draw.choice([f"a{n}" for n in range(19)] + ["model"])
        prompt, count = self.draw.choice(PROMPTS), self.draw.randint(1, TOKENS)
        return dict(model=name, prompt=prompt, max_tokens=count, temperature=0)

    def check(self, job, text):
        tokens = self.answers[job["model"], job["prompt"]][: job["max_tokens"]]
        if text != text_of(tokens):
            self.wrong.append((job, text))
        self.seen["answered"] += 1

    def refused(self, response, status):
        if response.status_code != status or response.json()["error"]["request_id"] != response.headers["x-request-id"]:
            self.wrong.append((status, response.status_code, response.text))
        self.seen[status] += 1

    async def right(self):
        job = self.job()
        self.check(job, (await self.client.completions.create(**job)).choices[0].text)

    async def streamed(self):
        job = self.job()
        stream = await self.client.completions.create(**job, stream=True)
        self.check(job, "".join([chunk.choices[0].text async for chunk in stream]))

    async def vanishing(self):
        """Disconnect after the first piece of a stream."""
        async with self.plain.stream(
            "POST", "/v1/completions", json={**self.job(), "max_tokens": 200, "stream": True}
        ) as response:
            async for _ in response.aiter_raw():
                break
        self.seen["vanished"] += 1

    async def vanishing_mute(self):
        """Disconnect while the answer is awaited, unless the answer is very fast."""
        with contextlib.suppress(httpx.TimeoutException):
            await self.plain.post(
                "/v1/completions",
                json={**self.job(), "max_tokens": 200},
                timeout=httpx.Timeout(120, read=self.draw.uniform(0.001, 0.02)),
            )
        self.seen["vanished"] += 1

    async def malformed(self):
        content = json.dumps(self.job()).encode()[: self.draw.randint(0, 40)]
        self.refused(await self.plain.post("/v1/completions", content=content), 400)

    async def unknown(self):
        self.refused(await self.plain.post("/v1/completions", json={**self.job(), "model": "a99"}), 404)

    async def too_long(self):
        self.refused(await self.plain.post("/v1/completions", json={**self.job(), "prompt": "a" * 300}), 400)

    async def doomed(self):
        """The response is the adapter's answer, or 404 if the adapter was unloaded."""
        job = self.job(DOOMED)
        response = await self.plain.post("/v1/completions", json=job)
        if response.status_code == 200:
            self.check(job, response.json()["choices"][0]["text"])
        else:
            self.refused(response, 404)

    async def replace(self):
        """Unload an adapter during its answer, which is completed, and load another one under its name."""
        job, text, unloaded = self.job(DOOMED), "", False
        async with self.client.completions.with_streaming_response.create(**job, stream=True) as response:
            async for line in response.iter_lines():
                if not unloaded:
                    unloaded = await self.plain.post("/v1/unload_lora_adapter", json=dict(lora_name=DOOMED))
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        self.check(job, text)
        self.refused(await self.plain.post("/v1/completions", json=self.job(DOOMED)), 404)
        load = dict(lora_name=LATER, lora_path=DOOMED)
        assert (await self.plain.post("/v1/load_lora_adapter", json=load)).status_code == 200
        job = self.job(LATER)
        self.answers[LATER, job["prompt"]] = self.answers[DOOMED, job["prompt"]]
        self.check(job, (await self.client.completions.create(**job)).choices[0].text)


@pytest.mark.slow
def test_two_hundred_clients_of_all_kinds(work):
    work, answers = work
    sizes = []
    with served("--model", work / "model", "--adapters", work / "adapters", "--served-model-name", "model") as server:
        for number in range(4):
            crowd = Crowd(server, answers, number)
            asyncio.run(crowd.round())
            assert crowd.wrong == []
            assert crowd.seen["answered"] >= 120 and crowd.seen["vanished"] == 35
            assert crowd.seen[400] == 20 and crowd.seen[404] >= 11
            server.wait_until_idle()
            for path, body in (
                ("unload_lora_adapter", dict(lora_name=LATER)),
                ("load_lora_adapter", dict(lora_name=DOOMED, lora_path=DOOMED)),
            ):
                assert httpx.post(f"{server.url}/v1/{path}", json=body).status_code == 200
            sizes.append(server.rss())
        server.signal()
        assert server.exit_code() == 0
    assert sizes[-1] - sizes[1] < GROWTH, sizes
    assert not [line for line in server.lines if "Traceback" in line], server.lines
