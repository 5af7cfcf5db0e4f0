"""S²FT adapters in vLLM: the tokens of transformers with merged weights, however an adapter is named, and refusals."""

import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from support.inside import native
from support.states import flip, with_loaded
from support.vllm_models import ADAPTERS, ALL, PROMPTS, SHAPE, phi3, save_adapters, tiny_llama
from support.vllm_offline import offline
from support.vllm_server import vllm_server
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2VLConfig, Qwen2VLForConditionalGeneration

import s2ft

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LORA = ["--enable-lora", "--max-loras", "4", "--max-cpu-loras", "4", "--max-lora-rank", "256"]
GROUPED = {**SHAPE, "num_key_value_heads": 2}


@pytest.fixture(scope="session")
def refused(served, tmp_path_factory):
    """Folders that must be refused, with a part of the reason."""
    made = tmp_path_factory.mktemp("refused")
    other = tiny_llama()
    other.model.layers[2].mlp.up_proj.weight.data[5, 5] += 1e-3
    save_adapters(other, made / "other", {"another": dict(d_ratio=0.03)})
    adapter = s2ft.read_adapter(served.adapters / "wide")
    native.write(replace(adapter, extra_weights={"model.norm.weight": torch.ones(256)}), made / "extra")
    shutil.copytree(served.adapters / "wide", made / "damaged")
    flip(made / "damaged" / native.TENSORS, -5)  # one number is another
    (made / "foreign").mkdir()
    (made / "foreign" / "adapter_config.json").write_text("{}")
    return {
        "damaged": (made / "damaged", "must be ascending|is damaged|sha256 differs"),
        "another": (made / "other" / "adapters" / "another", "another base than the served one: 1 of 4 layers differ"),
        "extra": (made / "extra", "model.norm.weight trained in full.*export the model merged"),
        "foreign": (made / "foreign", ""),
    }


# ---- a server ----------------------------------------------------------------------------------------------


def test_adapters_on_the_command_line_need_no_variable(served, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("VLLM", "S2FT"))]:
        monkeypatch.delenv(name)
    modules = [f"{name}={served.adapters / name}" for name in ADAPTERS]
    with vllm_server(served.base, tmp_path / "log", [*LORA, "--lora-modules", *modules]) as server:
        answers = server.answers(ADAPTERS, PROMPTS)
        assert [name for name in ADAPTERS if answers[name] != served.answers[name]] == []
        assert server.answers(["base"], PROMPTS)["base"] == served.answers["base"]
        assert {model["id"] for model in server.get("v1/models")["data"]} == {"base", *ADAPTERS}


@pytest.mark.parametrize("size", [1, 2])
def test_names_in_requests_loading_by_hand_and_refusals(served, refused, tmp_path, size):
    """Refusals come first: the adapters after them must load, on every rank."""
    (tmp_path / "adapters").mkdir()
    for name in ADAPTERS:
        shutil.copytree(served.adapters / name, tmp_path / "adapters" / name)
    shutil.copytree(refused["damaged"][0], tmp_path / "adapters" / "damaged")
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "S2FT_VLLM_ADAPTERS": str(tmp_path / "adapters")}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(size))
    options = [*LORA, "--tensor-parallel-size", str(size)]
    with vllm_server(served.base, tmp_path / "log", options, environment) as server:
        for name, (folder, reason) in refused.items():
            status, answer = server.post("v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            assert status in (404, 500) and re.search(reason, answer["error"]["message"]), answer
        said = server.complete("damaged", PROMPTS[0])
        assert "HTTP 400" in said and "'damaged' was found but could not be loaded" in said
        for unknown in ("unknown", "../adapters/wide", "no-such-org/adapter"):
            assert "HTTP 404" in server.complete(unknown, PROMPTS[0])
        assert server.answers(ADAPTERS, PROMPTS) == {name: served.answers[name] for name in ADAPTERS}
        assert server.post("v1/unload_lora_adapter", {"lora_name": "wide"})[0] == 200
        body = {"lora_name": "again", "lora_path": str(tmp_path / "adapters" / "wide")}
        assert server.post("v1/load_lora_adapter", body)[0] == 200
        assert server.answers(["again"], PROMPTS)["again"] == served.answers["wide"]
        assert server.answers(["base"], PROMPTS)["base"] == served.answers["base"]


# ---- offline -------------------------------------------------------------------------------------------------


def asked(*adapters):
    """A batch of all prompts to each of these adapters, and to the base for None."""
    return [(adapter, prompt) for adapter in adapters for prompt in PROMPTS]


@pytest.mark.parametrize("in_process", [True, False])
def test_offline_three_adapters_in_one_batch_and_refusals_that_the_engine_survives(
    served, refused, tmp_path, in_process
):
    alone = [asked(refused[name][0]) for name in ("damaged", "another")]
    batches = [*alone, asked(*(served.adapters / name for name in ADAPTERS)), asked(None)]
    processes = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not in_process))}
    answers, _ = offline(served.base, batches, dict(max_loras=3, max_lora_rank=256), processes, added=False)
    assert "damaged" in answers[0] and "another base than the served one" in answers[1]
    assert answers[2] == [row for name in ADAPTERS for row in served.answers[name]]
    assert answers[3] == served.answers["base"]


def test_offline_limits_name_the_option(served):
    wide, small = (asked(served.adapters / name) for name in ("wide", "down-o"))
    answers, _ = offline(served.base, [wide, small], dict(max_lora_rank=32), added=False)
    assert "--max-lora-rank is 32: set it to " in answers[0] and answers[1] == served.answers["down-o"]
    answers, _ = offline(served.base, [small], dict(max_lora_rank=256, lora_target_modules=["o_proj"]), added=False)
    assert "--lora-target-modules is o_proj. Add down_proj" in answers[0]


def test_a_release_without_a_name_says_so_and_serves_exported_adapters(served, tmp_path):
    s2ft.export_lora(with_loaded(tiny_llama(), served.adapters / "wide"), tmp_path / "exported")
    batches, missing = [asked(tmp_path / "exported"), asked(None)], ["vllm.lora.utils", "a_name_of_another_release"]
    answers, printed = offline(served.base, batches, dict(max_lora_rank=256), added=False, missing=missing)
    assert answers == [served.answers["wide"], served.answers["base"]]
    assert "S²FT adapters are not available in this vLLM" in printed
    assert "has no vllm.lora.utils.a_name_of_another_release" in printed and "s2ft export --format lora" in printed


# ---- other models --------------------------------------------------------------------------------------------


def saved(model, tmp_path, **ratios):
    return save_adapters(model.float().eval(), tmp_path, {"a": ratios}, scale=0.05)


def test_several_projections_in_one_weight(tmp_path):
    model, ratios = phi3()
    phi = saved(model, tmp_path, **ratios)
    answers, _ = offline(phi.base, [asked(phi.adapters / "a"), asked(None)], dict(max_lora_rank=256), added=False)
    assert answers == [phi.answers["a"], phi.answers["base"]]


def test_the_language_model_of_a_vision_model(tmp_path):
    """Its names differ three times: in transformers, in the checkpoint, and in vLLM."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = dict(GROUPED, vocab_size=512, max_position_embeddings=1024, rope_parameters=rope)
    vision = dict(depth=2, embed_dim=64, hidden_size=128, num_heads=2, mlp_ratio=2)
    tokens = dict(vision_start_token_id=501, vision_end_token_id=502, vision_token_id=503, image_token_id=504)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, video_token_id=505, **tokens)
    vlm = saved(Qwen2VLForConditionalGeneration(config), tmp_path, **ALL)
    assert all("language_model" in name for name in s2ft.read_adapter(vlm.adapters / "a").deltas)
    options = dict(max_lora_rank=256, language_model_only=True)
    answers, _ = offline(vlm.base, [asked(vlm.adapters / "a"), asked(None)], options, added=False)
    assert answers == [vlm.answers["a"], vlm.answers["base"]]


def test_experts_are_refused(tmp_path):
    """vLLM's experts beside LoRA need a GPU: nothing of a mixture is run here."""
    config = MixtralConfig(**GROUPED, vocab_size=512, max_position_embeddings=1024, num_local_experts=4)
    mixture = saved(MixtralForCausalLM(config), tmp_path, o_ratio=0.25, d_ratio=0.1)
    options = dict(max_lora_rank=256, lora_target_modules=["o_proj", "qkv_proj"])
    answers, _ = offline(mixture.base, [asked(mixture.adapters / "a")], options, added=False)
    assert "is the weight of experts, which are not served as adapters: export the model merged" in answers[0]
