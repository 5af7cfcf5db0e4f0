"""A plugin of pytest that puts S²FT's rows in the place of those of PEFT's methods, in PEFT's own tests.

A test's rows are the lists that its parametrize marks hold. Tests that PEFT runs on LoRA alone, without rows or behind
a look at the config's class, and that hold for S²FT as well run with S²FT under LoRA's name.
"""

import importlib
import importlib.machinery
import json
import os
import re
import sys
import types
from typing import Any

import pytest
from reasons import SKIPPED, reason_for

from s2ft.peft import S2FTPeftConfig


class Stand:
    """Makes an S2FTPeftConfig of what PEFT's tests give a config of any method. A class: they ask for subclasses."""

    def __new__(cls, **given: Any) -> S2FTPeftConfig:
        fields = {key: value for key, value in given.items() if key not in ("r", "lora_alpha", "lora_dropout")}
        if "init_lora_weights" in fields:
            fields["init_weights"] = fields.pop("init_lora_weights")
        if fields.get("task_type") == "SEQ_CLS":
            return S2FTPeftConfig(**{"d_ratio": 0.5, **fields})
        if fields.get("target_modules") is None:  # a model of a known family
            return S2FTPeftConfig(**{"d_ratio": 0.5, "o_ratio": 0.5, **fields})
        return S2FTPeftConfig(**{"ratio": 0.5, "dim": "inputs", **fields})


INPUTS, OUTPUTS = dict(ratio=0.5, dim="inputs"), dict(ratio=0.5, dim="outputs")


def on(model: str, **rows: dict[str, Any]) -> list:
    return [(f"{model} {name.replace('_', ' ')} S2FT", model, S2FTPeftConfig, fields) for name, fields in rows.items()]


CUSTOM = [
    *on(
        "MLP",
        name={"target_modules": "lin0", **INPUTS},
        one={"target_modules": ["lin0"], **OUTPUTS},
        last={"target_modules": ["lin1"], **INPUTS},
        both={"target_modules": ["lin0", "lin1"], **OUTPUTS},
        all_linear={"target_modules": "all-linear", **INPUTS},
        saved={"target_modules": ["lin0"], "modules_to_save": ["lin1"], **OUTPUTS},
        targeted_and_saved={"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"], **INPUTS},
        by_weight={
            "target_modules": ["lin0", "lin1"],
            "selection": "weight",
            "order": "smallest",
            "ratio": 0.7,
            "dim": "outputs",
        },
        all_units={"target_modules": ["lin0", "lin1"], "ratio": 1.0, "dim": "inputs"},
        by_hand={"units": {"lin0": [1, 2, 7, 9], "lin1": [0, 3, 4, 19]}, "dim": "inputs"},
    ),
    *on("MLP2", one={"target_modules": ["lin0"], **INPUTS}, both={"target_modules": ["lin0", "lin1"], **OUTPUTS}),
    *on(
        "MLP_LayerNorm",
        both={"target_modules": ["lin0", "lin1"], **INPUTS},
        saved={"target_modules": ["lin0"], "modules_to_save": ["layernorm1"], **OUTPUTS},
    ),
    *on(
        "EmbConv1D",
        conv1d_inputs={"target_modules": ["conv1d"], "ratio": 1.0, "dim": "inputs"},
        conv1d_outputs={"target_modules": ["conv1d"], "ratio": 1.0, "dim": "outputs"},
        both={"target_modules": ["conv1d", "lin0"], "ratio": 1.0, "dim": "inputs"},
        saved={"target_modules": ["lin0"], "modules_to_save": ["emb"], **INPUTS},
    ),
    *on(
        "Conv1d",
        conv={"target_modules": ["conv1d"], "ratio": 1.0, "dim": "inputs"},
        both={"target_modules": ["conv1d", "lin0"], "ratio": 1.0, "dim": "outputs"},
    ),
    *on(
        "Conv1dBigger",
        inputs={"target_modules": ["conv1d"], **INPUTS},
        outputs={"target_modules": ["conv1d"], **OUTPUTS},
    ),
    *on(
        "Conv2d",
        inputs={"target_modules": ["conv2d"], **INPUTS},
        outputs={"target_modules": ["conv2d"], **OUTPUTS},
        both={"target_modules": ["conv2d", "lin0"], **OUTPUTS},
    ),
    *on("Conv2d1x1", conv={"target_modules": ["conv2d"], "ratio": 1.0, "dim": "inputs"}),
    *on("Conv2d2", both={"target_modules": ["conv2d", "lin0"], **INPUTS}),
    *on(
        "Conv3d",
        inputs={"target_modules": ["conv3d"], **INPUTS},
        outputs={"target_modules": ["conv3d"], **OUTPUTS},
        both={"target_modules": ["conv3d", "lin0"], **INPUTS},
    ),
]
RANDOM = dict(init_weights=False)
SEVERAL = [
    (
        "S2FT Same",
        "s2ft",
        S2FTPeftConfig,
        {"target_modules": ["lin0"], **INPUTS, **RANDOM},
        {"target_modules": ["lin0"], **INPUTS, **RANDOM},
    ),
    (
        "S2FT Other units",
        "s2ft",
        S2FTPeftConfig,
        {"target_modules": ["lin0"], **OUTPUTS, **RANDOM},
        {"target_modules": ["lin0"], **OUTPUTS, **RANDOM, "seed": 1},
    ),
    (
        "S2FT Different",
        "s2ft",
        S2FTPeftConfig,
        {"target_modules": ["lin0"], **INPUTS, **RANDOM},
        {"target_modules": ["lin1"], **OUTPUTS, **RANDOM},
    ),
    (
        "S2FT Overlapping",
        "s2ft",
        S2FTPeftConfig,
        {"target_modules": ["lin0"], **OUTPUTS, **RANDOM},
        {"target_modules": ["lin0", "lin1"], **OUTPUTS, **RANDOM, "seed": 2},
    ),
]
# Few units, for the LoRA that a test makes of them has rank 4 or 8.
DECODERS = [
    (S2FTPeftConfig, {"task_type": "CAUSAL_LM", "d_ratio": 0.08, "o_ratio": 0.125}),
    (
        S2FTPeftConfig,
        {"task_type": "CAUSAL_LM", "q_ratio": 0.125, "u_ratio": 0.08, "d_ratio": 0.08, "selection": "weight"},
    ),
    (
        S2FTPeftConfig,
        {
            "task_type": "CAUSAL_LM",
            "ratio": 0.08,  # the modules that a model has of these
            "target_modules": ["q_proj", "down_proj", "c_proj", "fc_out", "fc2"],
        },
    ),
]


def mixed(first: dict[str, Any], second: dict[str, Any]) -> list:
    return [("S2FT", S2FTPeftConfig(**first, **RANDOM), S2FTPeftConfig(**second, **RANDOM))]


def one(*modules: str, **fields: Any) -> dict[str, Any]:
    return {"target_modules": list(modules), **INPUTS, **fields}


MIXED = {
    "test_mixed_adapter_batches_different_target_layers": mixed(one("lin0"), one("lin1")),
    "test_mixed_adapter_batches_multiple_modules_to_save": mixed(
        one("lin0", modules_to_save=["lin1"]), one("lin0", modules_to_save=["lin1"])
    ),
    "test_mixed_adapter_batches_unsupported_layer_raises": mixed(
        one("lin0", modules_to_save=["gru"]), one("lin0", modules_to_save=["gru"])
    ),
    "test_mixed_adapter_batches_partly_overlapping_target_layers": mixed(one("lin0"), one("lin0", "lin1")),
    "test_mixed_adapter_batches_lora_conv1d_emb": mixed(one("conv1d", "lin0", ratio=1.0), one("conv1d", ratio=1.0)),
    "test_mixed_adapter_batches_lora_conv2d": mixed(one("conv2d"), one("conv2d", seed=1)),
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises": [("S2FT", S2FTPeftConfig(**one("lin0"), **RANDOM))],
    "test_mixed_adapter_batches_lora_opt_timing": [(*mixed({"d_ratio": 0.5}, {"d_ratio": 0.5})[0], 4.0)],
}
ROWS = {  # by the names of the parameters
    "test_name, model_id, config_cls, config_kwargs": CUSTOM,
    "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": SEVERAL,
    "config_cls,config_kwargs": DECODERS,
    "config_cls": [Stand],
    "config0": [S2FTPeftConfig(**one("lin0"), **RANDOM)],
    "test_name, config0, config1": [
        *mixed(one("lin0"), one("lin0", seed=1)),
        *mixed(one("lin0"), one("lin0", ratio=1.0)),
    ],
}
# Tests that say LoRA, or look whether the config is one: what has to be S²FT there, in which module.
AS_LORA = {"LoraConfig": Stand}
PRETEND = {
    **dict.fromkeys(
        (
            "test_add_adapter_rejects_duplicate_name_without_mutation",
            "test_delete_adapter_with_multiple_adapters_works",
            "test_delete_adapter_multiple_adapters_with_modules_to_save",
            "test_weight_bias_attributes",
            "test_multiple_adapters_automatic_modules_to_save",
            "test_multiple_adapters_mixed_modules_to_save_merging_adapters",
            "test_multiple_adapters_same_modules_to_save_merging_adapters_raises",
            "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
            "test_add_weighted_adapter_negative_weight_negates_adapter",
            "test_add_weighted_adapter_subtraction_with_negative_weights",
            "test_multiple_adapters_no_needless_copy_modules_to_save",
            "test_existing_model_card",
            "test_non_existing_model_card",
            "test_save_embedding_layers_excludes_similarly_named_sibling",
            "test_load_does_not_overwrite_similarly_named_sibling",
            "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
            "test_requires_grad_modules_to_save_default",
            "test_requires_grad_modules_to_save_disabling",
            "test_requires_grad_modules_to_save_multiple_adapters",
            "test_requires_grad_follows_inference_mode_modules_to_save",
            "test_requires_grad_lora_different_targets",
            "test_requires_grad_lora_same_targets",
            "test_requires_grad_lora_conv2d",
        ),
        {"tests.test_custom_models": AS_LORA},
    ),
    "test_mixed_adapter_batches": {
        "tests.test_decoder_models": {"LoraConfig": S2FTPeftConfig},
        "tests.testing_common": {"RoadConfig": S2FTPeftConfig},
    },
    "test_generate_with_mixed_adapter_batches": {
        "tests.test_decoder_models": {"LoraConfig": S2FTPeftConfig},
        "tests.testing_common": {"LoraConfig": S2FTPeftConfig},
    },
    "test_weighted_combination_of_adapters": {"tests.testing_common": {"IA3Config": S2FTPeftConfig}},
}
RESULTS: dict[str, tuple] = {}  # outcome and reason by test


def pytest_configure(config: pytest.Config) -> None:
    """Stands in for diffusers, of which the tests' common part imports a class that these matrices have no use for."""
    if importlib.util.find_spec("diffusers") is None:
        module = types.ModuleType("diffusers")
        module.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = module
        importlib.import_module("tests.testing_common")
        del sys.modules["diffusers"]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.definition.originalname
    for mark in metafunc.definition.iter_markers("parametrize"):
        rows = MIXED.get(name) if "config" in str(mark.args[0]) else None
        rows = rows or ROWS.get(mark.args[0])
        if rows is not None and isinstance(mark.args[1], list):
            mark.args[1][:] = rows
            metafunc.definition.s2ft = True


def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    """Leaves out what is of other methods, with its reason; what is neither that nor run on S²FT fails."""
    kept, gone = [], []
    for item in items:
        reason = reason_for(item.name)
        name = re.sub(r"^tests/", "", item.nodeid)
        if reason is not None:
            RESULTS[name] = ("left out", reason)
            gone.append(item)
        elif item.originalname not in PRETEND and not _takes_rows(item):
            RESULTS[name] = ("failed", "neither run on S²FT nor left out for a reason: see reasons.py")
            gone.append(item)
        else:
            kept.append(item)
    config.hook.pytest_deselected(items=gone)
    items[:] = kept


def _takes_rows(item: pytest.Item) -> bool:
    return any(
        value in (S2FTPeftConfig, Stand) or isinstance(value, S2FTPeftConfig)
        for value in getattr(getattr(item, "callspec", None), "params", {}).values()
        if isinstance(value, (type, S2FTPeftConfig))
    )


@pytest.fixture(autouse=True)
def under_loras_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    common = importlib.import_module("tests.testing_common")
    monkeypatch.setattr(common, "_skip_if_conv1d_not_supported", lambda *args: None)  # S²FT takes Conv1D
    # what it skips and changes is for BEFT alone
    monkeypatch.setattr("tests.test_decoder_models.check_beft_config", lambda *args: None)
    for module, names in PRETEND.get(request.node.originalname, {}).items():
        for name, value in names.items():
            monkeypatch.setattr(importlib.import_module(module), name, value)
    if (
        "requires_grad" in request.node.originalname
        and request.instance is not None
        and hasattr(request.instance, "check_requires_grad")
    ):
        check = request.instance.check_requires_grad
        monkeypatch.setattr(
            request.instance,
            "check_requires_grad",
            lambda model, *names: check(
                model, *{re.sub(r"lora_[AB]\.(\w+)\.weight", r"s2ft_delta.\1.values", name) for name in names}
            ),
        )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = re.sub(r"^tests/", "", report.nodeid)
    if report.skipped:
        words = str(report.longrepr[2]).removeprefix("Skipped: ")
        RESULTS[name] = (
            ("skipped", SKIPPED[words])
            if words in SKIPPED
            else ("failed", f"skipped for a reason that is not in reasons.py: {words}")
        )
    elif report.failed or report.when == "call":
        RESULTS[name] = ("failed" if report.failed else "passed", "")


def pytest_terminal_summary(terminalreporter) -> None:
    with open(os.environ["S2FT_UPSTREAM_REPORT"], "w", encoding="utf-8") as file:
        json.dump(RESULTS, file)
