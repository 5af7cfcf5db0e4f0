"""Names that clients say: which folders and repositories they find, and which they never find. Without vLLM."""

import asyncio
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from support.inside import native, path_of, resolver
from support.models import model_of
from support.vllm_modules import fake_modules
from train.tiny import save_random_adapter

import s2ft


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A directory with an adapter, a folder of another format, and an adapter beside the directory."""
    folder = tmp_path_factory.mktemp("adapters")
    save_random_adapter(folder / "inside" / "math", model_of("llama"), name="a", d_ratio=0.1)
    native.write(s2ft.read_adapter(folder / "inside" / "math"), folder / "secret")
    native.write(s2ft.read_adapter(folder / "inside" / "math"), folder / "inside" / "run" / "adapter")
    (folder / "inside" / "lora").mkdir()
    (folder / "inside" / "lora" / "adapter_config.json").write_text("{}")
    (folder / "inside" / "link").symlink_to(folder / "secret")
    return folder / "inside"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    envs = SimpleNamespace(VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, VLLM_USE_MODELSCOPE=False)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(envs=envs))


def found(name, adapters, hub=()):
    return path_of(name, [] if adapters is None else [adapters], frozenset(hub))


def test_folders_of_the_directory_are_found_by_their_names(adapters):
    assert found("math", adapters) == str(adapters / "math")
    assert found("run", adapters) == str(adapters / "run"), "the output folder of a run"
    (state := adapters / "math/trainer_state.json").touch()
    assert found("math", adapters) is None, "a checkpoint"
    state.unlink()
    assert found("lora", adapters) is None and found("unknown", adapters) is None, "other resolvers are asked"


ESCAPES = ("../secret", "..", ".", "", "math/../../secret", "/etc", "..\\secret", "link", "math\0", "./math", "~",
           "math/", "a" * 5000)  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_no_name_leads_out_of_the_directory(adapters, name):
    assert found(name, adapters) is None and found(str(adapters.parent / "secret"), adapters) is None


def test_the_hub_is_asked_for_names_on_the_list_only(adapters, monkeypatch):
    resolve = Mock(return_value=adapters / "math")
    monkeypatch.setattr("s2ft.files.reading.local_folder", resolve)
    right = ["org/math", "org/math@v2", "other/one"]
    wrong = ["other/two", "evil/org", "org", "org/a/b", "../org/x", "other/one/../two"]
    assert [found(name, None, ("org", "other/one")) for name in (*right, *wrong)] == [*right, *[None] * 6]
    assert [call.args[0] for call in resolve.call_args_list] == right


# ---- in vLLM -------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """A stand-in of vLLM's registry."""
    known = {}
    found = SimpleNamespace(register_resolver=known.__setitem__, get_resolver=known.__getitem__)
    modules = {
        "vllm.lora.resolver": dict(LoRAResolverRegistry=found, LoRAResolver=object),
        "vllm.lora.request": dict(LoRARequest=SimpleNamespace),
    }
    fake_modules(monkeypatch, modules)
    return found


def test_vllm_gets_a_request_for_a_name_that_is_found(registry, adapters, monkeypatch):
    monkeypatch.setenv(resolver.DIRECTORY, str(adapters))
    resolver.install()
    ours = registry.get_resolver(resolver.NAME)
    assert asyncio.run(ours.resolve_lora("/models/base", "math")).lora_path == str(adapters / "math")
    assert asyncio.run(ours.resolve_lora("/models/base", "unknown")) is None


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (resolver.DIRECTORY, "/no/such/directory", "S2FT_VLLM_ADAPTERS must name directories"),
        (resolver.HUB, "org/../x", "S2FT_VLLM_HUB must list owners and repositories"),
        (resolver.HUB, "*", "S2FT_VLLM_HUB must list owners and repositories"),
    ],
)
def test_variables_that_are_not_valid(registry, monkeypatch, variable, value, message):
    for name in (resolver.DIRECTORY, resolver.HUB):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        resolver.install()
