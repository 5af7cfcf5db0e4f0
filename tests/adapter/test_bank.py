"""AdapterBank: each sequence of a batch gets the output of its own adapter; the model stays a plain base."""

import copy
import shutil

import pytest
import torch
import torch._dynamo.testing
from support.inside import native
from support.models import WHOLE_KEYS, model_of, output_of, ratios_for, token_batch
from support.states import same
from test_towers import llava
from train.tiny import save_random_adapter

import s2ft
from s2ft import AdapterBank, S2FTConfig

HEADS = dict(q_ratio=0.5, v_ratio=1.0, o_ratio=0.5)
CASES = {
    **dict.fromkeys(
        (
            "llama",
            "llama-grouped",
            "qwen2-grouped-tied",
            "phi3-grouped",
            "gpt2",
            "gpt-neox",
            "opt",
            "gemma2",
            "bert",
            "vit",
            "t5-gated",
            "whisper",
            "clip-text",
        ),
        WHOLE_KEYS,
    ),
    "mixtral": HEADS,
    "qwen2-moe": HEADS,
    "deepseek-v3": HEADS,
}
LIMIT = 1e-5  # relative to the largest logit, in float32
SIDES = (dict(u_ratio=0.2), dict(d_ratio=0.15), dict(v_ratio=1.0), dict(o_ratio=0.5))
LENGTH = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five adapters of the llama case: one for all projections, one for each side of an FFN and of attention."""
    root = tmp_path_factory.mktemp("bank")
    for i, ratios in enumerate((ratios_for("llama", WHOLE_KEYS), *SIDES)):
        save_random_adapter(root / "abcde"[i], model_of("llama"), seed=i, **ratios)
    return root


@pytest.fixture
def model():
    return model_of("llama")


@torch.no_grad()
def alone(case, root, name, run, dtype=torch.float32):
    """What `run` returns for a new model with only this adapter."""
    model = model_of(case, dtype)
    if name is not None:
        s2ft.load_adapter(model, root / name)
    return run(model)


def assert_close(ours, theirs, limit=LIMIT):
    assert ours.shape == theirs.shape and float((ours - theirs).abs().max()) <= limit * float(theirs.abs().max())


def assert_as_alone(case, root, model, names, limit=LIMIT, dtype=torch.float32):
    with torch.no_grad(), AdapterBank(model, root).batch(names):
        batch = output_of(model)
    for row, name in enumerate(names):
        assert_close(batch[row], alone(case, root, name, output_of, dtype)[row], limit)


def assert_plain(model, case="llama"):
    """The model has no trace of s2ft, and its weights equal the base."""
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "_s2ft" not in model.__dict__ and same(model, model_of(case))


def prompts(model, count, padding=(0, 3, 1, 2, 0)):
    """Left-padded prompts."""
    ids = torch.randint(3, model.config.vocab_size, (count, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row in range(count):
        mask[row, : padding[row % len(padding)]] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, inputs, rows=slice(None), **options):
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, **options}
    return model.generate(**{key: value[rows] for key, value in inputs.items()}, **options)[:, LENGTH:]


# ---- equality --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_sequence_gets_the_output_of_its_adapter_alone(case, tmp_path):
    model = model_of(case)
    for seed in range(2):
        save_random_adapter(tmp_path / str(seed), model_of(case), seed=seed, **ratios_for(case, CASES[case]))
    for names in (["0", "1"], [None, "0"], ["1", "1"]):
        assert_as_alone(case, tmp_path, model, names)
    assert_plain(model, case)


def test_half_precision(folder, model):
    """A written adapter rounds base + delta, a bank rounds the output: they differ by a few roundings."""
    assert_as_alone("llama", folder, model_of("llama", torch.bfloat16), ["a", "c"], limit=0.05, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), AdapterBank(model, folder).batch(["a", None]):
        batch = output_of(model)
    assert_close(batch[0].float(), alone("llama", folder, "a", output_of)[0], 0.05)


# ---- generate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    (
        dict(),
        dict(num_beams=3),
        dict(num_beams=4, num_return_sequences=2),
        dict(use_cache=False),
        dict(cache_implementation="static"),
    ),
    ids=str,
)
def test_generates_the_tokens_of_separate_runs(options, folder, model):
    names, inputs = ["a", None, "b", "a", "e"], prompts(model, 5)
    with AdapterBank(model, folder).batch(names):
        batch = generate(model, inputs, **options)
    each = options.get("num_return_sequences", 1)
    assert len({tuple(row.tolist()) for row in batch}) > 1
    for row, name in enumerate(names):
        expected = alone("llama", folder, name, lambda model: generate(model, inputs, slice(row, row + 1), **options))
        assert torch.equal(batch[each * row :][:each], expected)
    assert_plain(model)


def test_an_encoder_decoder_generates(tmp_path):
    """The encoder runs on as many rows as there are sequences, the decoder on as many as there are beams."""
    model = model_of("whisper")
    save_random_adapter(tmp_path / "a", model_of("whisper"), **ratios_for("whisper", WHOLE_KEYS))
    inputs = torch.randn(2, 5, 14)

    def run(model, rows=slice(None)):
        return model.generate(inputs[rows], num_beams=2, do_sample=False, max_new_tokens=5, min_new_tokens=5)

    with AdapterBank(model, tmp_path).batch(["a", None]):
        batch = run(model)
    for row, name in enumerate(("a", None)):
        expected = alone("whisper", tmp_path, name, lambda model: run(model, slice(row, row + 1)))
        assert torch.equal(batch[row : row + 1], expected)


# ---- names and memory ------------------------------------------------------------------------------------


def enter(bank, *names):
    with bank.batch(names):
        pass


def test_names_of_a_directory_and_added_ones(folder, model, tmp_path):
    shutil.copytree(folder, tmp_path / "all")
    (tmp_path / "all" / "no adapter").mkdir()
    bank = AdapterBank(model, tmp_path / "all")
    assert bank.names == list("abcde") and "f" not in bank and bank.loaded == []
    bank.add("more", folder / "b")
    assert bank.names == [*"abcde", "more"] and "no adapter" not in bank and None not in bank
    enter(bank, "more", "c", None)
    bank.remove("more")
    bank.remove("a")
    assert bank.names == [*"bcde"] and "a" not in bank and bank.loaded == ["c"]
    bank.add("a", folder / "b")  # another adapter of this name
    with torch.no_grad(), bank.batch(["a", "b"]):
        output = output_of(model)
    assert_close(output[0], alone("llama", folder, "b", output_of)[0])


@pytest.mark.parametrize("name", ("", "a/b", "../a", ".a", "..", "a\\b", "a\0", "/a", 3), ids=repr)
def test_names_must_not_be_paths(name, folder, model):
    bank = AdapterBank(model, folder)
    for refused in (lambda: bank.add(name, folder / "a"), lambda: enter(bank, "a", name)):
        with pytest.raises(ValueError, match="name must be a word|no adapter called"):
            refused()
    assert name not in bank and bank.loaded == []


def test_the_least_recently_used_are_removed_first(folder, model):
    bank = AdapterBank(model, folder)
    enter(bank, "b", "c", "d")
    limit = bank.loaded_bytes
    bank = AdapterBank(model, folder, limit_bytes=limit)
    enter(bank, "b", "c", "d")
    enter(bank, "b")
    assert bank.loaded == ["c", "d", "b"]
    enter(bank, "d", "e")
    assert "c" not in bank.loaded and bank.loaded[-1] == "e" and bank.loaded_bytes <= limit
    with torch.no_grad(), bank.batch(["c", "e"]):  # c is loaded again
        assert_close(output_of(model)[0], alone("llama", folder, "c", output_of)[0])
    with pytest.raises(ValueError, match=f"more than limit_bytes = {limit:,}"):
        enter(bank, "b", "c", "d", "e")
    assert bank.loaded_bytes <= limit
    enter(bank, "c")


# ---- refused adapters and models -------------------------------------------------------------------------


def test_another_base_is_refused_before_anything_changes(folder, model):
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    bank, before = AdapterBank(model, folder), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="another base"):
        enter(bank, None, "a")
    assert bank.loaded == [] and not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    enter(bank, None)  # only the base runs


def test_experts_and_weights_trained_in_full_are_refused(tmp_path):
    model = model_of("mixtral")
    for name, ratios in (("experts", dict(d_ratio=0.1, o_ratio=0.5)), ("heads", dict(o_ratio=0.5))):
        save_random_adapter(tmp_path / name, model_of("mixtral"), **ratios)
    with_norm = native.read(tmp_path / "heads")
    with_norm.extra_weights["model.norm.weight"] = model.model.norm.weight.detach() * 2
    native.write(with_norm, tmp_path / "normed")
    bank = AdapterBank(model, tmp_path)
    for name, words in (("experts", "linear layers only"), ("normed", "model.norm.weight trained in full")):
        with pytest.raises(ValueError, match=words):
            enter(bank, "heads", name)
    enter(bank, "heads")
    model.config.model_type = "xlnet"  # whose layers get the time first
    for one in (model, torch.nn.TransformerEncoderLayer(8, 2)):
        with pytest.raises(ValueError, match=r"inputs are not \[sequences, ...\]"):
            AdapterBank(one, tmp_path)


def test_an_adapter_of_layers_whose_rows_are_images_is_refused(tmp_path):
    save_random_adapter(tmp_path / "seen", llava(), d_ratio=0.5, towers=["vision"])
    with pytest.raises(ValueError, match="rows are images"):
        enter(AdapterBank(llava(), tmp_path), "seen")


def test_adapters_of_both_sides_of_a_layer_are_refused(folder, model, tmp_path):
    save_random_adapter(tmp_path / "inputs", model_of("llama"), i_ratio=0.2)
    bank = AdapterBank(model, folder)
    bank.add("inputs", tmp_path / "inputs")
    with pytest.raises(ValueError, match="the other side of model.layers.0.self_attn.v_proj"):
        enter(bank, "d", "inputs")


def test_a_model_that_is_not_a_plain_base_is_refused(folder, model):
    bank = AdapterBank(model, folder)
    s2ft.load_adapter(model, folder / "a")
    for refused in (lambda: AdapterBank(model, folder), lambda: enter(bank, "b")):
        with pytest.raises(ValueError, match="is active"):
            refused()
    s2ft.set_adapter(model, None)
    for allowed in (bank, AdapterBank(model, folder)):
        with torch.no_grad(), allowed.batch(["b", "a"]):
            assert_close(output_of(model)[0], alone("llama", folder, "b", output_of)[0])
    s2ft.detach(model)
    s2ft.attach(model, S2FTConfig(d_ratio=0.1, layout="permuted"))
    s2ft.set_adapter(model, None)
    with pytest.raises(ValueError, match="units have moved"):
        enter(bank, "b")


def test_batches_do_not_nest(folder, model):
    bank, other = AdapterBank(model, folder), AdapterBank(model, folder)
    with torch.no_grad(), bank.batch(["a", "b"]):
        before = output_of(model)
        for another in (bank, other):
            with pytest.raises(RuntimeError, match="one batch at a time"):
                enter(another, "c")
        assert torch.equal(output_of(model), before)
    enter(other, "c")
    assert_plain(model)


# ---- exceptions and threads --------------------------------------------------------------------------------


def test_an_exception_does_not_change_the_model(folder, model):
    bank = AdapterBank(model, folder)
    with pytest.raises(KeyboardInterrupt), bank.batch(["a", "b"]):
        raise KeyboardInterrupt
    assert_plain(model)
    with torch.no_grad(), bank.batch(["c", "d"]):
        assert_close(output_of(model)[1], alone("llama", folder, "d", output_of)[1])


def test_a_batch_keeps_an_adapter_that_is_removed_meanwhile(folder, model):
    bank = AdapterBank(model, folder)
    with torch.no_grad(), bank.batch(["a", "b"]):
        before = output_of(model)
        bank.remove("a")
        bank.add("a", folder / "c")
        assert torch.equal(output_of(model), before)
    with torch.no_grad(), bank.batch(["a", "b"]):
        assert_close(output_of(model)[0], alone("llama", folder, "c", output_of)[0])


def test_an_adapter_removed_while_it_is_read_is_used_but_not_kept(folder, model, monkeypatch):
    bank, read = AdapterBank(model, folder), native.read

    def slow(where):
        adapter = read(where)
        bank.remove("b")  # as another thread might do
        return adapter

    expected = alone("llama", folder, "b", output_of)
    monkeypatch.setattr(native, "read", slow)
    with torch.no_grad(), bank.batch([None, "b"]):
        assert_close(output_of(model)[1], expected[1])
    assert bank.loaded == [] and "b" not in bank


# ---- compiled ----------------------------------------------------------------------------------------------


def test_compiled_once_for_all_batches(folder, model):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    bank, ids = AdapterBank(model, folder), token_batch(model, 4)
    enter(bank, *"abcde")  # the capacities grow once
    expected = {name: alone("llama", folder, name, lambda model: model(ids).logits) for name in (None, *"abcde")}
    with torch.no_grad():
        for names in (["a", "b", "c", None], ["e", "e", "a", "d"], ["b"] * 4, [None] * 4, ["c", "d", "e", "a"]):
            bank.remove("e")
            bank.add("e", folder / "e")  # packed anew
            with bank.batch(names):
                output = compiled(ids).logits
            for row, name in enumerate(names):
                assert_close(output[row], expected[name][row])
            assert counter.frame_count == 1
        assert torch.equal(compiled(ids).logits, model(ids).logits)  # outside a batch: the base, in a separate graph
        assert counter.frame_count == 2
        with bank.batch(["a"] * 4):
            compiled(ids)
    assert counter.frame_count == 2


def test_an_adapter_is_checked_without_its_values(folder, model, monkeypatch):
    bank = AdapterBank(model)
    monkeypatch.setattr(native, "read_tensors", None)  # reading all tensors would raise
    assert all(delta.values.is_meta and not delta.index.is_meta for delta in bank.check(folder / "a").deltas.values())
    assert bank.loaded == [] and bank.names == []
