"""Options, batches and units that do not fit: one row each, and the model does not change."""

import itertools

import pytest
import torch
from selection import test_calibration_inputs as inputs
from selection.test_calibration_inputs import CASES, CLASSES, mask_of, pixels, sound, text, tokens
from selection.test_metrics import CALIBRATED, IDS, SCORED, assert_untouched, awkward, batch_of, state
from support.inside import METRICS
from support.models import model_of

import s2ft
from s2ft import S2FTConfig

DOWN = "model.layers.1.mlp.down_proj"
EVERY_DOWN = {f"model.layers.{i}.mlp.down_proj": list(range(50)) for i in range(3)}
UNITS = {"units": {DOWN: [1]}}
HEADS = "model.layers.0.self_attn.q_proj"


def never_run():
    pytest.fail("the data were read")
    yield


BAD_UNITS = [  # units, and a key word
    ({DOWN: [52]}, "52 channels"),
    ({HEADS: [4]}, "4 heads"),
    ({DOWN: [1, 1]}, "twice"),
    ({DOWN: [-1]}, DOWN),
    ({DOWN: []}, DOWN),
    ({DOWN: "123"}, DOWN),
    ({DOWN: 3}, DOWN),
    ({DOWN: [1.0]}, DOWN),
    ({}, "at least one"),
    ({"model.layers.9.mlp.down_proj": [1]}, "model.layers.9"),
    ({"lm_head": [1]}, "lm_head"),
]
PLAIN = [  # case, options, arguments, key word
    *(("llama", dict(units=units), {}, word) for units, word in BAD_UNITS),
    *(("llama", dict(d_ratio=0.1, exclude=units), {}, word) for units, word in BAD_UNITS),
    ("llama", UNITS, dict(calibration=[tokens(1, 4)]), "calibrate"),
    ("llama", UNITS, dict(protect=never_run), "protect"),
    ("llama", dict(units="nowhere.json"), {}, "nowhere.json"),
    ("llama", dict(d_ratio=0.1, exclude={DOWN: list(range(50))}), {}, "2 channels"),
    ("llama", dict(d_ratio=0.1, exclude=EVERY_DOWN, selection="weight", allocation="global"), {}, "6 channels"),
    ("llama", dict(d_ratio=0.1, exclude=EVERY_DOWN, budget=145), {}, "144 parameters"),
    ("llama", dict(d_ratio=0.6), dict(protect=never_run), "26 channels"),
    ("llama", dict(d_ratio=0.3, exclude={DOWN: list(range(40))}), dict(protect=never_run), "12 channels"),
    ("llama", dict(d_ratio=0.6, selection="weight", allocation="global"), dict(protect=never_run), "78 channels"),
    ("llama", dict(d_ratio=0.1, protect_ratio=0.3), {}, "protect"),
    ("llama", dict(d_ratio=0.1), dict(protect="file.jsonl"), "str"),
    ("llama", dict(d_ratio=0.1), dict(protect=[{"text": "a"}]), "protect batch 0"),
    ("llama", dict(d_ratio=0.1), dict(protect=[]), "empty"),
    ("llama-grouped", dict(d_ratio=0.1, budget=71), {}, "budget=71"),
    ("llama-grouped", dict(d_ratio=0.001, u_ratio=1, budget=500), {}, "d_ratio"),
    ("llama-grouped", dict(d_ratio=0.1, budget=3 * 52 * 24 + 1), {}, "3,744"),
    ("llama-grouped", dict(o_ratio=0.1, match_lora_rank=1), {}, "match_lora_rank=1"),
    ("llama-grouped", dict(budget=10), {}, "nothing"),
    ("llama", dict(d_ratio=0.5, group=5), {}, "52 channels"),
    ("llama", dict(d_ratio=0.5, group=5), {}, "no whole groups of 5 inputs: leave out d_ratio"),
    ("llama", dict(o_ratio=0.5, group=9), {}, "heads of"),
    ("llama", dict(o_ratio=0.5, group=9), {}, "no whole groups of 9 inputs: leave out o_ratio"),
    ("llama", dict(d_ratio=0.01, group=4), {}, "groups of 4 inputs"),
    ("llama", dict(d_ratio=0.01, group=4), {}, "smallest ratio"),
    ("llama", dict(**UNITS, group=4), {}, "group"),
    *(("llama", dict(d_ratio=0.1, selection=metric), {}, "calibration") for metric in CALIBRATED),
    *(
        ("llama", dict(d_ratio=0.1, selection=metric), dict(calibration=[tokens(1, 4)]), "calibration")
        for metric in METRICS
        if metric not in CALIBRATED
    ),
    *(
        (case, dict(d_ratio=0.1, selection="gradient"), dict(calibration=[{**batch, "labels": None}]), "labels")
        for case, batch in (
            ("vit", CASES["vit"][1][0]),
            ("bert", CASES["bert"][1][0]),
            ("t5", CASES["t5, inputs"][1][0]),
            ("whisper", CASES["whisper, inputs"][1][0]),
            ("clip-text", CASES["clip-text"][1][0]),
            ("clip-vision", CASES["clip-vision"][1][0]),
        )
    ),
    ("clip", dict(d_ratio=0.1, selection="gradient"), dict(calibration=CASES["clip, other length"][1]), "contrastive"),
    (
        "llama",
        dict(d_ratio=0.1, selection="gradient"),
        dict(calibration=[{"input_ids": tokens(2, 8), "labels": tokens(2, 8) * 0 - 100}]),
        "label",
    ),
    (
        "bert",
        dict(d_ratio=0.1, selection="gradient"),
        dict(calibration=[{**text(8), "position_ids": torch.arange(8).expand(2, 8), "labels": tokens(3, 8)}]),
        "position_ids has 2 rows for 3 sequences, and the gradient is taken of one sequence at a time: give batches of one "
        "sequence",
    ),
]


def changed(name, **values):
    """The case, and its batch with other values. None removes a value."""
    batch = {**CASES[name][1][0], **values}
    return CASES[name][0], [{key: value for key, value in batch.items() if value is not None}]


BATCHES = [  # case, calibration, key word: for each metric that needs data
    ("llama", [], "empty"),
    ("llama", [{"input_ids": IDS, "attention_mask": IDS * 0}], "no tokens"),
    ("llama", {"input_ids": IDS}, "dict"),
    ("llama", IDS, "Tensor"),
    ("llama", 3, "int"),
    ("llama", [IDS, "text"], "batch 1"),
    ("llama", [{"attention_mask": IDS}], "input_ids"),
    ("llama", [IDS[0]], "(8,)"),
    ("llama", [IDS.float()], "float32"),
    ("llama", [{"input_ids": IDS, "attention_mask": IDS[:, 1:]}], "attention_mask"),
    ("llama", [{"input_ids": IDS, "labels": IDS[:1]}], "labels"),
    ("llama", [IDS, IDS + 1000], "out of range"),
    ("vit", [{"labels": CLASSES}], "NoneType"),
    ("vit", [pixels(1)[0]], "(3, 12, 12)"),
    ("vit", [{"pixel_values": pixels(rows), "labels": CLASSES[:rows]} for rows in (2, 0)], "batch 1"),
    ("vit", [{"pixel_values": pixels(2).byte()}], "uint8"),
    ("vit", [tokens(2, 7)], "pixel_values"),
    ("vit", [(pixels(2), CLASSES)], "tuple"),
    ("clip-vision", [{"pixel_values": pixels(1).tolist()}], "list"),
    (*changed("vit", labels=CLASSES[:2]), "(2,)"),
    (*changed("vit", labels=[1, 4, 0]), "list"),
    (*changed("clip", attention_mask=mask_of((3, 8, 6), 8)), "(3, 10)"),
    (*changed("bert", labels=tokens(3, 7)), "labels"),
    ("whisper", [{"labels": tokens(2, 5)}], "input_features"),
    ("whisper", [{"input_features": sound(2)[0]}], "(5, 14)"),
    (*changed("whisper, labels", attention_mask=mask_of((14, 6), 14)), "attention_mask"),
    ("t5", [text(8)], "decoder_input_ids"),
    ("whisper", [sound(2)], "decoder_input_ids"),
    (*changed("t5, inputs", decoder_input_ids=tokens(2, 5)), "(2, 5)"),
    (*changed("t5, inputs", decoder_attention_mask=mask_of((2, 2, 2), 4)), "decoder_attention_mask"),
    (*changed("t5, labels", decoder_attention_mask=mask_of((2, 2, 2), 4)), "decoder_attention_mask"),
    (*changed("t5, both", labels=tokens(3, 4)), "labels"),
    (*changed("t5, labels", labels=tokens(2, 5)), "labels"),
]
ROWS = [
    *PLAIN,
    *(
        (case, dict(d_ratio=0.1, o_ratio=0.4, selection=metric), dict(calibration=batches), word)
        for metric, (case, batches, word) in zip(itertools.cycle(CALIBRATED), BATCHES)
    ),
    (
        "t5",
        dict(d_ratio=0.1, selection="activation"),
        dict(calibration=changed("t5, inputs", decoder_attention_mask=mask_of((0, 0, 0), 5))[1]),
        "padding",
    ),
]


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_what_does_not_fit_is_refused_and_does_not_change_the_model(number):
    case, options, arguments, word = ROWS[number]
    model = awkward() if case == "llama" else model_of(case).train()
    before = state(model)
    arguments = {name: value() if callable(value) else value for name, value in arguments.items()}
    with pytest.raises((ValueError, TypeError, IndexError, FileNotFoundError)) as error:
        s2ft.attach(model, S2FTConfig(**options), **arguments)
    assert word in str(error.value), error.value
    assert_untouched(model, before)
    assert s2ft.status(model).adapters == []


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("metric", SCORED)
def test_the_error_for_statistics_that_are_not_finite_names_the_projection(metric, value):
    model = awkward()
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = value
    with pytest.raises(ValueError, match=f"{metric}.*model.layers.* NaN or infinite"):
        s2ft.select(
            model,
            S2FTConfig(u_ratio=0.1, d_ratio=0.1, selection=metric),
            [batch_of(model)] if metric in CALIBRATED else None,
        )
    assert [module.training for module in model.model.layers] == [True, False, True]


MODULE = [  # a batch of a model that is not from transformers, and a key word
    ("text", "str"),
    ({"x": [1.0]}, "none"),
    ({}, "none"),
    (torch.tensor(1.0), "none"),
    ((inputs.ROWS[:0], inputs.ROWS), "(0, 6)"),
    ({"x": inputs.GRID, "attention_mask": mask_of((1, 2, 3), 5)}, "mask"),
]


@pytest.mark.parametrize("batch, word", MODULE)
def test_bad_batches_for_any_module_are_refused(batch, word):
    model = inputs.Perceptron()
    before = state(model)
    config = S2FTConfig(u_ratio=0.1, d_ratio=0.1, selection="activation")
    with pytest.raises(ValueError) as error:
        s2ft.select(model, config, [batch], couplings=[inputs.MLP])
    assert word in str(error.value)
    assert_untouched(model, before)
