"""After any sequence of operations, an attached model agrees with its status, and detach restores the base."""

import pytest
import torch

import s2ft
from state import machine


def test_random_sequences():  # 2,000: the suite `histories` of release/suites.py
    machine.prepare()
    failures = machine.run_all(12)
    shown = "\n".join(str(machine.shorten(failure)) for failure in failures[:3])
    assert not failures, f"{len(failures)} sequences failed:\n{shown}"


@torch.no_grad()
def flip_one_bit(model):
    weight = next(model.parameters())
    weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(torch.inf, dtype=weight.dtype))


def leave_an_attribute(model):
    model.model.left_over = 1


def freeze_a_weight(model):
    next(model.parameters()).requires_grad_(False)


@pytest.mark.parametrize("damage", [flip_one_bit, leave_an_attribute, freeze_a_weight], ids=lambda f: f.__name__)
def test_the_machine_finds_changes_that_detach_leaves_behind(monkeypatch, damage):
    def detach(model):
        damage(original(model))
        return model

    original, state = s2ft.detach, machine.State(llama_seed())
    machine.attach(state)
    machine.check(state)
    monkeypatch.setattr(s2ft, "detach", detach)
    with pytest.raises(machine.Wrong, match="a detached copy is not the base"):
        machine.check(state)


def test_the_machine_finds_a_weight_that_differs_from_the_base():
    state = machine.State(llama_seed())
    machine.attach(state)
    active = dict(state.status.active)
    machine.check_output(state, active)
    with torch.no_grad():
        for layer in state.model.modules():
            if isinstance(layer, (s2ft.S2RowLinear, s2ft.S2ColumnLinear)):
                layer.weight.mul_(1.5)
    with pytest.raises(machine.Wrong, match="the logits are off"):
        machine.check_output(state, active)
    with pytest.raises(machine.Wrong, match="merged with"):
        machine.check_merged(state, active)


def llama_seed() -> int:
    """A seed whose sequence starts from a LLaMA in float32."""
    return next(
        seed
        for seed in range(1000)
        if machine.Setting.of(seed).case == "llama" and machine.Setting.of(seed).dtype == torch.float32
    )
