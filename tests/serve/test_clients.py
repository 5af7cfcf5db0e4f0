"""Clients as people have them: OpenAI's client and LangChain, unchanged.

LangChain is in no extra. The tests that need it run after `pip install langchain-openai`.
"""

import openai
import pytest
from serve.fleet import BASE, running, save_adapters
from train.tiny import tiny_model

UNTIED = dict(tie_word_embeddings=False)
QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(folder, 2, **UNTIED)
    with running(folder, tiny_model(**UNTIED)) as (url, _):
        yield f"{url}/v1"


def test_openai(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert {model.id for model in client.models.list()} == {BASE, "a0", "a1"}
        common = dict(
            model="a0", messages=QUESTION, max_completion_tokens=16, temperature=0.9, seed=3, logit_bias={"2": -100}
        )
        whole = client.chat.completions.create(**common, n=2, logprobs=True, top_logprobs=2, top_p=0.9)
        assert whole._request_id and len(whole.choices) == 2
        assert [len(choice.logprobs.content) for choice in whole.choices] == [16, 16]
        again = client.chat.completions.create(**common, top_p=0.9)
        assert again.choices[0].message.content == whole.choices[0].message.content
        stop = whole.choices[0].message.content[4:6]
        cut = client.chat.completions.create(**common, top_p=0.9, stop=[stop, "\n\n"])
        assert cut.choices[0].finish_reason == "stop" and stop not in cut.choices[0].message.content
        chunks = client.chat.completions.create(
            **common, top_p=0.9, stream=True, stream_options={"include_usage": True}
        )
        *parts, last = chunks
        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == again.choices[0].message.content and last.usage == again.usage
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="nobody", messages=QUESTION)
        assert unknown.value.code == "model_not_found" and unknown.value.request_id
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        with pytest.raises(openai.BadRequestError, match="tools are not called"):
            client.chat.completions.create(model="a0", messages=QUESTION, tools=tools)


def test_langchain(url):
    module = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage

    common = dict(base_url=url, api_key="none", model="a1", max_retries=0)
    chat = module.ChatOpenAI(**common, temperature=0.8, seed=4, max_tokens=12, logprobs=True, top_logprobs=2)
    answer = chat.invoke("hi")
    assert answer.response_metadata["model_name"] == "a1" and answer.response_metadata["finish_reason"] in (
        "stop",
        "length",
    )
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert (
        answer.usage_metadata["total_tokens"]
        == answer.usage_metadata["input_tokens"] + answer.usage_metadata["output_tokens"]
    )
    assert "".join(chunk.content for chunk in chat.stream("hi")) == answer.content
    assert [one.content for one in chat.batch(["hi", "hi"])] == [answer.content] * 2
    history = [("system", "Be brief."), ("human", "hi"), answer, ("human", "more")]
    assert chat.invoke(history).usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]
    several = module.ChatOpenAI(**common, temperature=0.8, seed=4, max_tokens=12, n=2).generate([[HumanMessage("hi")]])
    assert len(several.generations[0]) == 2 and several.generations[0][0].text == answer.content
    cut = chat.invoke("hi", stop=[answer.content[3:5]])
    assert answer.content[3:5] not in cut.content
    text = module.OpenAI(**common, temperature=0, max_tokens=8, presence_penalty=0.5, frequency_penalty=0.5)
    assert isinstance(text.invoke("Hello"), str)
