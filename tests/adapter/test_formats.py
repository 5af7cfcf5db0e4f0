"""Formats: golden adapters, import and export of PEFT's LoRA, and the hub."""

import json
import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import call

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hub import fake_hub, uploaded
from support.inside import local_folder, lora, native
from support.models import LAYOUTS, WHOLE_KEYS, fit, model_of, output_of, ratios_for
from support.nets import seeded
from support.pairs import in_turn
from support.states import assert_same_adapters, randomize, same, with_adapter, with_loaded
from support.tolerances import relative_difference
from torch import nn

import s2ft
from s2ft import S2FTConfig, export_lora, get_adapter, import_lora, push_to_hub, read_adapter

FAMILIES = (
    "llama",
    "llama-grouped",
    "llama-multi-query",
    "llama-biased",
    "mistral",
    "qwen2",
    "gemma2",
    "phi",
    "phi3",
    "phi3-grouped",
    "gpt2",
    "gpt2-odd",
    "gpt2-cross-attention",
    "gpt-neox",
    "opt",
    "bert",
    "roberta",
    "vit",
    "t5",
    "whisper",
    "clip",
)


def trained(case, layout="permuted", steps=2, dtype=torch.float32, delta_dtype=None, **ratios):
    return fit(
        with_adapter(
            model_of(case, dtype),
            S2FTConfig(**ratios_for(case, ratios or WHOLE_KEYS), layout=layout, delta_dtype=delta_dtype),
        ),
        steps,
    )


# ---- golden adapters -----------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"
golden = SimpleNamespace(**runpy.run_path(str(GOLDEN / "make.py")))


@pytest.mark.parametrize("trainable", (False, True), ids=("applied", "trainable"))
@pytest.mark.parametrize("name", golden.MODELS)
def test_golden_adapters_load_and_are_saved_again(name, trainable, tmp_path):
    model, adapter = with_loaded(golden.MODELS[name](), GOLDEN / name, trainable=trainable), read_adapter(GOLDEN / name)
    assert s2ft.status(model).adapters == ["golden"]
    assert golden.digests(s2ft.merge(model)) == json.loads((GOLDEN / name / "merged.json").read_text())
    native.write(adapter, tmp_path)
    again = read_adapter(tmp_path)
    assert_same_adapters(again, adapter)
    assert all(getattr(again, one) == getattr(adapter, one) for one in ("config", "fingerprint", "couplings"))


def test_every_golden_folder_is_tested():
    assert {path.parent.name for path in GOLDEN.glob("*/merged.json")} == set(golden.MODELS)


# ---- LoRA, out -----------------------------------------------------------------------------------------


def with_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about missing keys
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize(
    "case,pattern",
    [(case, False) for case in FAMILIES] + [(case, True) for case in ("llama-grouped", "phi3", "gpt2", "bert")],
)
def test_peft_computes_what_the_attached_model_does(case, pattern, tmp_path):
    model = trained(case)
    export_lora(model, tmp_path, rank_pattern=pattern)
    other = with_peft(model_of(case), tmp_path)
    with torch.no_grad():
        expected, found = output_of(model), output_of(other.base_model.model)
        assert relative_difference(output_of(model_of(case)), expected) > 1e-3
    assert relative_difference(found, expected) < 1e-5
    for path, module in other.base_model.model.named_modules():  # exact, bit for bit
        if hasattr(module, "lora_A"):
            assert module.scaling["default"] == 1.0, path
    assert same(s2ft.merge(model), other.merge_and_unload())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case, layout", in_turn(("llama-grouped", "phi3", "gpt2", "gpt-neox", "bert"), LAYOUTS))
def test_export_and_import_give_an_equal_adapter(case, layout, dtype, tmp_path):
    model = trained(case, layout, dtype=dtype, delta_dtype=str(dtype).removeprefix("torch."))
    for i, options in enumerate(({}, {"rank_pattern": False}, {"rank": 100})):
        export_lora(model, tmp_path / str(i), **options)
        for base in (model_of(case, dtype), model):  # with and without adapters
            assert_same_adapters(lora.read(tmp_path / str(i), base), get_adapter(model, "default"))


@pytest.mark.parametrize(
    "ratios, steps, rank_pattern",
    [(WHOLE_KEYS, 0, True), (dict(i_ratio=0.1), 1, True), (dict(i_ratio=0.1), 1, False)],
    ids=["deltas of zero", "inputs of every layer", "inputs of every layer, one rank"],
)
def test_what_a_lora_could_be_read_as_survives_the_round_trip(ratios, steps, rank_pattern, tmp_path):
    """The units of a zero delta still belong to the adapter. A LoRA whose ranks take one input each, also in layers
    whose units are outputs, is one of i_ratio."""
    model = fit(with_adapter(model_of("llama"), S2FTConfig(**ratios)), steps)
    export_lora(model, tmp_path, rank_pattern=rank_pattern)
    assert_same_adapters(lora.read(tmp_path, model_of("llama")), get_adapter(model, "default"))


@pytest.mark.parametrize("options,spread", (({}, True), ({"rank_pattern": False}, False)))
def test_the_ranks_of_modules(options, spread, tmp_path):
    """No zeros. Releases of vLLM before 0.32 read no pattern: they need r = lora_alpha, and no higher rank than r."""
    export_lora(trained("llama", steps=1, d_ratio=0.3, o_ratio=0.5), tmp_path, **options)
    config = json.loads((tmp_path / lora.CONFIG).read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["bias"] == "none"
    tensors = load_file(tmp_path / lora.TENSORS)
    ranks = {key: tensor.shape["lora_B" in key] for key, tensor in tensors.items()}
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["rank_pattern"] == config["alpha_pattern"] and bool(config["rank_pattern"]) == spread
    padded = [key for key, tensor in tensors.items() if not bool(tensor.any(int("lora_A" in key)).all())]
    assert (len(set(ranks.values())) > 1) == spread and bool(padded) != spread
    assert lora.describe(tmp_path).startswith("LoRA of rank " + (f"{min(ranks.values())} to " if spread else ""))


def test_a_rank_too_large_for_vllm_is_reported(tmp_path):
    net = nn.Sequential(nn.Linear(4, 600), nn.ReLU(), nn.Linear(600, 4))
    mlp = s2ft.Coupling.ffn(0, up="0", down="2", channels=600)
    s2ft.attach(net, S2FTConfig(u_ratio=0.9, d_ratio=0.01), couplings=[mlp], example=torch.randn(2, 4))
    with pytest.warns(UserWarning, match="rank 540, and vLLM's max_lora_rank is 512 at most"):
        export_lora(net, tmp_path / "a")
    assert json.loads((tmp_path / "a" / lora.CONFIG).read_text())["r"] == 540
    for options, word in (({"rank": 512}, "540.*got 512"), ({"rank": 600, "rank_pattern": True}, "exclude each other")):
        with pytest.raises(ValueError, match=word):
            export_lora(net, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


def test_a_custom_module(tmp_path):
    """A module outside the couplings has a name with the same ending as one inside."""

    def net():
        return seeded(
            lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6)))
        )

    mlp, x = [s2ft.Coupling.ffn(0, up="1.0", down="1.2", channels=20)], torch.randn(3, 6)
    model = randomize(with_adapter(net(), S2FTConfig(u_ratio=0.3, d_ratio=0.2), couplings=mlp, example=x))
    export_lora(model, tmp_path)
    assert relative_difference(with_peft(net(), tmp_path)(x), model(x)) < 1e-5
    import_lora(other := net(), tmp_path, couplings=mlp)
    assert_same_adapters(get_adapter(other, "default"), get_adapter(model, "default"))


# ---- LoRA, in ------------------------------------------------------------------------------------------


@torch.no_grad()
def lora_of_peft(case, folder, change=lambda model: None, **options):
    """A folder that PEFT wrote."""
    config = peft.LoraConfig(**{**dict(r=4, lora_alpha=4, target_modules=["down_proj"]), **options})
    model = peft.get_peft_model(model_of(case), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.zero_()
    change(model)
    model.save_pretrained(folder)
    return model


def made_of(a=None, b=None):
    """Fill each matrix of a LoRA with these entries, and one without any at random."""

    def change(model):
        for name, matrix in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                entries = a if ".lora_A." in name else b
                for place, value in entries.items() if entries else ((..., torch.randn_like(matrix)),):
                    matrix[place] = value

    return change


UNITS = {(0, 7): 1, (1, 3): 1, (3, 11): 1}  # columns 7, 3 and 11 in this order, and one unused rank
one_hot, random_lora = made_of(UNITS), made_of()


REFUSED = {
    "random": (random_lora, {}, "ordinary LoRA .*down_proj.* does not have the structure of S²FT.*merge it by PEFT"),
    "twice": (made_of({(0, 7): 1, (1, 7): 1}), {}, "two ranks of lora_A"),
    "infinite": (made_of(UNITS, {(0, 0): float("inf")}), {}, "lora_B is not finite"),
    "factor": (made_of({**UNITS, (3, 11): 0.5}), {}, "rank 3 of lora_A must be 1"),
    "parts of heads": (made_of(b={(1, 0): 1, (13, 1): 1}), dict(target_modules=["q_proj"]), "belongs to no whole unit"),
    "scaled": (one_hot, dict(lora_alpha=8), "ordinary LoRA .lora_alpha is 8 and r 4.*merge it by PEFT"),
    "scaled by a root": (one_hot, dict(use_rslora=True), "'use_rslora' is True"),
    "embedding": (random_lora, dict(target_modules=["embed_tokens"]), "embed_tokens"),
    "head": (one_hot, dict(target_modules=["lm_head"]), "lm_head"),
    "dora": (one_hot, dict(use_dora=True), "'use_dora' is True"),
    "bias": (one_hot, dict(bias="all"), "'bias' is 'all'"),
    "saved": (one_hot, dict(modules_to_save=["lm_head"]), "'modules_to_save' is"),
    "nothing": (lambda model: None, {}, "changes nothing"),
}


def spoil(folder, tensors=lambda tensors: None, config=lambda config: None):
    found = load_file(folder / lora.TENSORS)
    tensors(found)
    save_file(found, folder / lora.TENSORS)
    content = json.loads((folder / lora.CONFIG).read_text())
    config(content)
    (folder / lora.CONFIG).write_text(json.dumps(content))


A0, B0 = (f"base_model.model.model.layers.0.mlp.down_proj.lora_{side}.weight" for side in "AB")
SPOILT = {
    "no B": (dict(tensors=lambda t: t.pop(B0)), "has no lora_B"),
    "foreign": (dict(tensors=lambda t: t.update(x=torch.ones(1))), "'x' is not the A or B"),
    "shape": (dict(tensors=lambda t: t.update({A0: torch.zeros(4, 3)})), "do not fit its weight"),
    "integers": (dict(tensors=lambda t: t.update({A0: t[A0].long()})), "must be a floating-point matrix"),
    "unknown module": (
        dict(tensors=lambda t: t.update({key.replace("mlp.down_proj", "mlp"): t.pop(key) for key in (A0, B0)})),
        "'model.layers.0.mlp' is not a linear layer of this model",
    ),
    "kind": (dict(config=lambda c: c.update(peft_type="LOHA")), "peft_type is 'LOHA'"),
    "unknown": (dict(config=lambda c: c.update(shiny=True)), "'shiny' is True"),
    "pattern": (dict(config=lambda c: c.update(rank_pattern={"(a+)+$": 4})), "alpha_pattern is {} and rank_pattern"),
}


def refused_loras():
    """Change of the LoRA, its options, change of its folder, key word."""
    for name, (change, options, word) in REFUSED.items():
        yield pytest.param(change, options, lambda folder: None, word, id=name)
    for name, (how, word) in SPOILT.items():
        yield pytest.param(one_hot, {}, lambda folder, how=how: spoil(folder, **how), word, id=name)
    yield pytest.param(
        one_hot,
        {},
        lambda folder: (folder / lora.TENSORS).rename(folder / "adapter_model.bin"),
        "run code",
        id="pickle",
    )


def test_a_lora_of_peft_in_any_order_of_ranks(tmp_path):
    expected = lora_of_peft("llama", tmp_path, one_hot).merge_and_unload()
    model = model_of("llama")
    import_lora(model, tmp_path, "from-lora")
    assert get_adapter(model, "from-lora").selection["model.layers.0.mlp.down_proj"].tolist() == [3, 7, 11]
    assert same(s2ft.merge(model), expected)


@pytest.mark.parametrize("change, options, damage, word", refused_loras())
def test_other_loras_are_refused_and_do_not_change_the_model(change, options, damage, word, tmp_path):
    lora_of_peft("llama", tmp_path, change, **options)
    damage(tmp_path)
    model = model_of("llama")
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        import_lora(model, tmp_path)
    assert s2ft.status(model).adapters == [] and same(model, model_of("llama"))


@pytest.mark.parametrize(
    "options", (dict(lora_alpha=32, r=16), dict(use_dora=True), {}), ids=("scaled", "dora", "plain")
)
def test_an_ordinary_lora_given_to_load_adapter_says_what_it_is_and_what_to_do(options, tmp_path):
    """It was "lora_alpha must equal r", and with r = alpha "use s2ft.import_lora", which refused it in turn."""
    lora_of_peft("llama", tmp_path, random_lora, **options)
    with pytest.raises(ValueError, match="is an ordinary LoRA .*merge_and_unload"):
        s2ft.load_adapter(model_of("llama"), tmp_path)


def test_a_lora_of_s2ft_given_to_load_adapter_names_the_call_that_reads_it(tmp_path):
    export_lora(randomize(with_adapter(model_of("llama"), S2FTConfig(d_ratio=0.1, q_ratio=0.5))), tmp_path)
    with pytest.raises(ValueError, match=r"s2ft.import_lora\(model, folder\) loads it"):
        s2ft.load_adapter(model_of("llama"), tmp_path)
    assert import_lora(model_of("llama"), tmp_path).trainable > 0


@pytest.mark.parametrize("of", (lambda model: model, lambda model: model.get_base_model()), ids=("whole", "inside"))
def test_a_model_of_peft_is_told_which_model_takes_an_adapter(of, tmp_path):
    s2ft.save_adapter(with_adapter(model_of("llama"), S2FTConfig(d_ratio=0.1)), tmp_path)
    wrapped = peft.get_peft_model(model_of("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for change in (lambda: s2ft.load_adapter(of(wrapped), tmp_path), lambda: s2ft.attach(of(wrapped), S2FTConfig())):
        with pytest.raises(ValueError, match="PEFT.*pass model.unload"):
            change()
    s2ft.load_adapter(wrapped.unload(), tmp_path)


# ---- the hub -------------------------------------------------------------------------------------------

FILES = {native.CONFIG, native.TENSORS}


@pytest.fixture
def api(monkeypatch):
    return fake_hub(monkeypatch, "org/adapter")


def test_what_is_pushed(api, tmp_path):
    model = trained("llama")
    push_to_hub(model, "adapter", token="t", private=True, revision="dev", message="m")
    assert api.call_args_list == [call(token="t")]
    assert api().create_commit.call_args.kwargs["commit_message"] == "m"
    api().create_repo.assert_called_once_with("adapter", private=True, exist_ok=True)
    api().create_branch.assert_called_once_with("org/adapter", branch="dev", exist_ok=True)
    assert uploaded(api).keys() == FILES | {"README.md"}
    api().file_exists.return_value = True
    push_to_hub(model, "org/adapter")
    assert uploaded(api).keys() == FILES  # the card in the repository stays
    s2ft.save_adapter(model, tmp_path / "saved")
    (tmp_path / "saved/README.md").write_text("by hand")
    push_to_hub(tmp_path / "saved", "org/adapter")
    assert uploaded(api)["README.md"] == b"by hand"
    (tmp_path / "saved" / native.TENSORS).write_bytes(b"")
    api.reset_mock()
    for name, words in ((None, "truncated or damaged"), ("math", "a folder holds one")):
        with pytest.raises(ValueError, match=words):
            push_to_hub(tmp_path / "saved", "org/broken", name)
    assert not api.mock_calls


def test_a_local_folder_is_preferred_and_a_missing_adapter_is_reported(api, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/adapter").mkdir(parents=True)
    assert [name for name in ("org/adapter", "org/..") if local_folder(name) != Path(name)] == []
    for name in ("./org/none", "/none", "none", "a/b/c", "../up", "~/none", Path("org/none")):
        with pytest.raises(FileNotFoundError, match=f"adapter {Path(name).expanduser()} doesn't exist$"):
            local_folder(name)
    assert not api.mock_calls
    api.download.return_value = str(GOLDEN / "schema-1")
    assert local_folder("org/other@v1", local_files_only=True) == GOLDEN / "schema-1"
    options = api.download.call_args.kwargs
    assert set(options.pop("allow_patterns")) == FILES and options == dict(revision="v1", local_files_only=True)
    api.download.side_effect = OSError("404 Client Error.\nRepository Not Found for url")
    with pytest.raises(FileNotFoundError, match="org/none doesn't exist as a folder, and the hub.*404 Client Error.$"):
        local_folder("org/none")
    monkeypatch.setenv("HOME", str(tmp_path))
    native.write(read_adapter(GOLDEN / "schema-1"), "~/mine")
    assert native.read(tmp_path / "mine").name == read_adapter("~/mine").name
