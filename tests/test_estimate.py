"""What training will take, counted before anything is attached, against the same model attached and trained."""
import copy
from typing import Any, Dict

import pytest
import torch
from support.models import ALL_RATIOS, CASES, inputs_of, model_of, ratios_for, token_batch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, CLIPConfig

import s2ft
from s2ft import Coupling, Projection, S2FTConfig
from s2ft.estimate import OPTIMIZERS, free_memory, size

KEPT = 0.05   # of the measured bytes kept for backward; what the issue asks for. Where nothing is random they are equal
ROUTED = ("mixtral", "qwen2-moe", "qwen3-moe", "deepseek")   # tokens are dealt to experts otherwise
LAYOUTS = ("permuted", "indexed")


# ---- measuring a real model --------------------------------------------------------------------------------

def bytes_kept(model, run) -> int:
    """Of a real forward, as bench/train_step.py counts: every storage that autograd saves, once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]
           if not is_traceable_wrapper_subclass(t.data)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run(model)   # alive while it is counted, so that no address is taken twice
    total = sum(kept.values())
    del output
    return total


def training_inputs(model) -> Dict[str, Any]:
    """With labels, for a case whose model has a loss."""
    inputs = inputs_of(model)
    if isinstance(model.config, CLIPConfig):
        return {**inputs, "return_loss": True}
    if type(model).__name__.endswith("ForImageClassification"):
        return {**inputs, "labels": torch.tensor([0, 3])}
    if "decoder_input_ids" in inputs:
        return {**inputs, "labels": inputs["decoder_input_ids"]}
    return {**inputs, "labels": inputs["input_ids"]} if model.get_output_embeddings() is not None else inputs


def attached(model, config):
    model = copy.deepcopy(model)
    s2ft.attach(model, config)
    return model.train()


def config_for(case, **more):
    return S2FTConfig(**ratios_for(case, ALL_RATIOS), **more)


def check_kept(case, estimated, measured):
    assert measured > 0
    if case.startswith(ROUTED):
        assert abs(estimated - measured) <= KEPT * measured
    else:
        assert estimated == measured


# ---- kept for backward -------------------------------------------------------------------------------------

PRODUCT = [("permuted", torch.float32), ("indexed", torch.bfloat16),
           *(pytest.param(*both, marks=pytest.mark.slow) for both in (("permuted", torch.bfloat16),
                                                                    ("indexed", torch.float32)))]


@pytest.mark.parametrize("layout,dtype", PRODUCT)
@pytest.mark.parametrize("case", CASES)
def test_kept_is_what_is_measured(case, layout, dtype):
    model, config = model_of(case, dtype), config_for(case, layout=layout)
    inputs = training_inputs(model)
    estimated = s2ft.estimate(model, config, example=inputs)
    check_kept(case, estimated.kept, bytes_kept(attached(model, config), lambda m: m(**inputs)))
