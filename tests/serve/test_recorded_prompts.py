"""Chats use the prompt that the adapter was trained with."""

from dataclasses import replace

import httpx
import pytest
from serve.fleet import BASE, alone, running, save_adapters, text_of
from train.tiny import tiny_model, tiny_tokenizer

import s2ft
from s2ft.adapter.formats import native

UNTIED = dict(tie_word_embeddings=False)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(folder, 4, **UNTIED)
    formats = [
        {"form": "chat", "template": TEMPLATE, "system": "Be brief."},
        {"form": "chat", "template": TEMPLATE, "system": None},
        {"form": "text", "template": None, "system": None},
    ]
    for number, found in enumerate(formats):
        adapter = s2ft.read_adapter(folder / f"a{number}")
        native.write(replace(adapter, info={**adapter.info, "prompt": found}), folder / f"a{number}")
    return folder


def test_each_adapter_has_its_own_prompt_and_the_base_the_tokenizers(folder, caplog):
    caplog.set_level("INFO")
    own = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with running(folder, tiny_model(**UNTIED)) as (url, _):
        assert "chats use the template of the training, not the base's own, with a0, a1" in caplog.messages
        for name, prompt in ((BASE, own), ("a0", "[s]Be brief.[u]hi[a]"), ("a1", "[u]hi[a]"), ("a2", own), ("a3", own)):
            ids = tiny_tokenizer()(prompt, add_special_tokens=False)["input_ids"]
            tokens = alone(None if name == BASE else folder / name, ids, 12, **UNTIED)
            body = dict(model=name, messages=MESSAGES, max_tokens=12, temperature=0)
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            assert answer["usage"]["prompt_tokens"] == len(ids), name
            assert answer["choices"][0]["message"]["content"] == text_of(tokens), name
        system = dict(model="a0", messages=[{"role": "system", "content": "Sing."}, *MESSAGES], max_tokens=1)
        answer = httpx.post(f"{url}/v1/chat/completions", json=system).json()
        assert answer["usage"]["prompt_tokens"] == len("[s]Sing.[u]hi[a]")


def test_a_prompt_that_can_not_be_read_refuses_the_adapter(folder, tmp_path, caplog):
    adapter = s2ft.read_adapter(folder / "a3")
    native.write(replace(adapter, info={"prompt": {"form": "verse"}}), tmp_path / "odd")
    native.write(adapter, tmp_path / "good")
    with running(tmp_path, tiny_model(**UNTIED)) as (url, _):
        assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == [BASE, "good"]
    assert "not served: odd: the prompt that the adapter records can't be read: form must be one of" in caplog.text
