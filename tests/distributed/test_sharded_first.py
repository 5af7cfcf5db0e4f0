"""FSDP2 was applied before attach: the same training, selection, switching and merging as in one process."""

import pytest
import torch
from runs import batches, check_same_files, logits, sharded, train
from support.models import ALL_RATIOS, model_of, ratios_for

import s2ft

WAYS = {
    "blocks": {},
    "root": {"blocks": False},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"offload": True},
}
CASES = ("llama-grouped", "qwen2-grouped-tied", "gpt2", "mixtral", "phi3")


def config_for(case, layout, **changes):
    return s2ft.S2FTConfig(**{**ratios_for(case, ALL_RATIOS), "layout": layout, **changes})


def calibration_for(config, model):
    return batches(model, 2) if config.selection in ("activation", "product", "gradient") else None


def attach_to(model, case, layout, **changes):
    config = config_for(case, layout, **changes)
    s2ft.attach(model, config, calibration=calibration_for(config, model))
    return model


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Adapters that one process trained, by case, layout and changes of the config."""
    made = {}

    def get(case, layout, **changes):
        key = repr((case, layout, changes))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("alone")
            model = attach_to(model_of(case), case, layout, **changes)
            train(model)
            s2ft.save_adapter(model, made[key])
        return made[key]

    return get


def base_of(model):
    return {key: value.full_tensor().detach().clone() for key, value in model.named_parameters()}


def is_base(model, base):
    now = dict(model.named_parameters())
    return now.keys() == base.keys() and all(torch.equal(now[key].full_tensor(), value) for key, value in base.items())


def train_and_save(rank, case, layout, way, directory, ran=False, checkpointing=None, changes={}):
    """Shard, attach, train and save, then detach. Returns whether the base is unchanged, bit for bit."""
    model = sharded(model_of(case), **WAYS[way])
    if ran:
        logits(model)
        model.reshard()
    base = base_of(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    attach_to(model, case, layout, **changes)
    train(model, rank)
    s2ft.save_adapter(model, directory)
    s2ft.detach(model)
    return is_base(model, base)


@pytest.mark.parametrize(
    "case, way, layout",
    [
        ("llama-grouped", "blocks", "permuted"),
        ("llama-grouped", "root", "indexed"),
        ("qwen2-grouped-tied", "kept", "permuted"),
        ("gpt2", "blocks", "indexed"),
        ("mixtral", "blocks", "permuted"),
        ("mixtral", "blocks", "indexed"),
        ("phi3", "offloaded", "permuted"),
    ],
)
def test_two_ranks_train_and_save_the_adapter_of_one_process(ranks, alone, case, way, layout, tmp_path):
    assert ranks(train_and_save, case, layout, way, tmp_path) == [True, True]
    check_same_files(tmp_path, alone(case, layout))
