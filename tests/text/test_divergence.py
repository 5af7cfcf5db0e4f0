"""Loss and divergence equal a direct computation, for every kind of model, and leave no trace in the model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support.inside import BaseDistributions, base_switch, divergence, divergences, mean_loss
from support.models import CASES, model_of
from support.pairs import rest_slow
from support.states import randomize, with_adapter
from train.tiny import tiny_model

import s2ft

CONFIG = s2ft.S2FTConfig(d_ratio=0.2)


def rows_of(model, lengths=(9, 5, 7), first=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    rows = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [-100] * first + ids[first:]} for ids in rows]


@torch.no_grad()
def direct(model, rows):
    """Log-probabilities in float64 at the labelled positions, row by row without padding, and the labels."""
    found, labels = [], []
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        targets = torch.tensor(row["labels"][1:])
        found.append(logits[targets != -100].log_softmax(-1))
        labels.append(targets[targets != -100])
    return torch.cat(found), torch.cat(labels)


def direct_loss(model, rows):
    return float(F.nll_loss(*direct(model, rows)))


def direct_kl(base, tuned):
    return float((base.exp() * (base - tuned)).sum(-1).mean())


@pytest.mark.parametrize(
    "case",
    rest_slow(
        [c for c in CASES if not c.startswith(("vit", "clip", "t5", "whisper", "bert", "roberta"))],
        ("llama", "gemma2", "gemma3", "granite", "cohere", "gpt2-odd", "mixtral"),
    ),
)
def test_loss_and_divergence_of_every_family_equal_a_direct_computation(case):
    model = model_of(case)
    check_loss_and_divergence(model, rows_of(model), 2, 1e-5, 1e-3)


def check_loss_and_divergence(model, rows, batch_size, of_loss, of_kl):
    """Before and after training. `of_loss` and `of_kl` are relative tolerances."""
    base, _ = direct(model, rows)
    s2ft.attach(model, CONFIG)
    distributions = BaseDistributions.of(model, rows, batch_size)
    assert mean_loss(model, rows, batch_size) == pytest.approx(direct_loss(model, rows), rel=of_loss)
    assert distributions.kl(model) == pytest.approx(0, abs=1e-6)
    randomize(model, std=0.3)
    assert mean_loss(model, rows, batch_size) == pytest.approx(direct_loss(model, rows), rel=of_loss)
    assert distributions.kl(model) == pytest.approx(direct_kl(base, direct(model, rows)[0]), rel=of_kl, abs=2e-6)


@pytest.mark.parametrize("batch_size", (1, 2, 8))
def test_neither_the_batches_nor_the_chunks_change_the_numbers(batch_size, monkeypatch):
    model, calls = tiny_model().requires_grad_(False), []
    rows = rows_of(model, (40, 3, 17, 25, 9), first=1)
    monkeypatch.setitem(divergence.LOGITS, "cpu", 7 * model.config.vocab_size)
    check_loss_and_divergence(model, rows, batch_size, 1e-6, 1e-4)
    model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[1]))
    BaseDistributions.of(model, rows, batch_size).kl(model)
    mean_loss(model, rows, batch_size)
    assert max(call for call in calls if call != 1) <= 40 and sum(call <= 7 for call in calls) > 10


def test_the_layers_below_the_head_run_once_for_each_batch(monkeypatch):
    model, runs = tiny_model(), []
    monkeypatch.setitem(divergence.LOGITS, "cpu", model.config.vocab_size)  # one position at a time
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    mean_loss(model, rows_of(model, (9, 9, 9, 9)), 2)
    assert len(runs) == 2


def test_a_model_with_a_bfloat16_head_is_summed_in_float32():
    model = tiny_model(dtype=torch.bfloat16)
    check_loss_and_divergence(model, rows_of(model, (64,) * 16, first=1), 16, 2e-4, 2e-2)


def test_full_fine_tuning_keeps_a_copy_of_the_trained_head():
    """The head is tied to the embeddings here, so that training changes it."""
    model = tiny_model()
    rows = rows_of(model, (20, 30))
    base, _ = direct(model, rows)
    distributions = BaseDistributions.of(model, rows)
    randomize(model, std=0.05)
    assert distributions.kl(model) == pytest.approx(direct_kl(base, direct(model, rows)[0]), rel=1e-4)


def lora(model, **options):
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options))


def attached(model):
    return with_adapter(model, s2ft.S2FTConfig(d_ratio=0.2, modules_to_save=["lm_head"]))


WAYS = {
    "PEFT": lambda model: lora(model, target_modules=["q_proj", "down_proj"]),
    "PEFT, head": lambda model: lora(model, target_modules=["q_proj", "lm_head"]),
    "PEFT, saved head": lambda model: lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "transformers": lambda model: (
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])) or model
    ),
    "s2ft, saved head": attached,
}


@pytest.mark.parametrize("way", WAYS)
def test_adapters_are_switched_off_for_the_base(way, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0", raising=False)  # newer than installed
    model = tiny_model(tie_word_embeddings=False)
    rows = rows_of(model, (20, 30))
    base, _ = direct(model, rows)
    model = randomize(WAYS[way](model).eval(), std=0.1)
    tuned, _ = direct(model, rows)
    assert BaseDistributions.of(model, rows).kl(model) == pytest.approx(direct_kl(base, tuned), rel=1e-3)
    assert mean_loss(model, rows) == pytest.approx(direct_loss(model, rows), rel=1e-6)
    assert torch.equal(direct(model, rows)[0], tuned)


@torch.no_grad()
def test_virtual_tokens_of_a_learned_prompt_are_no_positions():
    model = tiny_model()
    rows = rows_of(model, (20, 30))
    base, labels = direct(model, rows)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = randomize(get_peft_model(model, config).eval(), std=0.5)
    logits = [model(torch.tensor([row["input_ids"]])).logits[0, 3:-1] for row in rows]
    tuned = torch.cat([one[2:] for one in logits]).double().log_softmax(-1)  # the first label is that of token 3
    assert mean_loss(model, rows) == pytest.approx(float(F.nll_loss(tuned, labels)), rel=1e-5)
    assert BaseDistributions.of(model, rows).kl(model) == pytest.approx(direct_kl(base, tuned), rel=1e-3)


def test_what_peft_trains_is_the_same_afterwards():
    model = lora(tiny_model(), target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    BaseDistributions.of(model, rows_of(model))
    assert all(parameter.requires_grad == ("lora_B" in name) for name, parameter in model.named_parameters())


def test_the_base_of_a_loaded_adapter(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    rows = rows_of(model, (20, 30))
    base, _ = direct(model, rows)
    s2ft.save_adapter(randomize(attached(model), std=0.1), tmp_path / "adapter")
    expected = direct_kl(base, direct(model, rows)[0])
    s2ft.load_adapter(s2ft.detach(model), tmp_path / "adapter")
    assert BaseDistributions.of(model, rows).kl(model) == pytest.approx(expected, rel=1e-4)
    with base_switch(model)():
        assert torch.equal(direct(model, rows)[0], base)


def test_the_base_is_measured_in_the_middle_of_a_training():
    """Nothing is written or drawn: a graph from before can still be used, modes and hooks are what they were."""
    model = tiny_model(attention_dropout=0.5)
    rows = rows_of(model)
    s2ft.attach(model, CONFIG)
    before = copy.deepcopy(model.state_dict())
    randomize(model, std=0.3).train()
    loss = model(torch.tensor([rows[0]["input_ids"]]), labels=torch.tensor([rows[0]["input_ids"]])).loss
    state = torch.get_rng_state()
    BaseDistributions.of(model, rows).kl(model)
    mean_loss(model, rows)
    assert torch.equal(torch.get_rng_state(), state) and model.training and model.model.layers[0].training
    assert not model.lm_head._forward_pre_hooks and "forward" not in model.model.__dict__
    loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items() if name not in trained)


def test_a_compiled_model_is_measured_without_compiling():
    model = tiny_model()
    compiled = torch.compile(model, backend=lambda *_: pytest.fail("compiled"))
    assert mean_loss(compiled, rows_of(model)) == mean_loss(model, rows_of(model))


def test_a_token_that_the_base_never_writes_adds_nothing():
    base = torch.tensor([[0.0, float("-inf")]])
    assert divergences(base, torch.tensor([[0.5, 0.5]]).log()).item() == pytest.approx(0.6931, abs=1e-4)
    assert divergences(base, base).item() == 0
    assert divergences(torch.tensor([[0.5, 0.5]]).log(), base).item() == float("inf")
    assert divergences(torch.tensor([[float("nan"), 0.0]]), base).isnan().all()


@pytest.mark.parametrize(
    "make, rows, batch_size, message",
    (
        (tiny_model, [], 8, "none of the 0 rows"),
        (tiny_model, [{"input_ids": [5, 6], "labels": [5, -100]}], 8, "none of the 1 rows"),
        (tiny_model, [{"input_ids": [5, 6]}], 8, r"row 0 .*labels, got \['input_ids'\]"),
        (tiny_model, [[5, 6]], 8, "row 0 .*got list"),
        (tiny_model, [{"input_ids": [5, 6], "labels": [5]}], 8, r"\(2,\) and \(1,\)"),
        (tiny_model, [{"input_ids": [5] * 300, "labels": [5] * 300}], 8, "row 0 has 300 tokens.*256"),
        (tiny_model, [], 0, "batch_size .*0"),
        (lambda: model_of("t5"), [], 8, "T5"),
    ),
)
def test_what_cant_be_measured_is_named(make, rows, batch_size, message):
    with pytest.raises(ValueError, match=message):
        mean_loss(make(), rows, batch_size)
