"""Calibration with other inputs than one text: images, sound, an encoder and a decoder, two towers, and modules that
are not from transformers.

The expected scores come from all activations, stored, and from one backward for each sequence.
"""

import pytest
import torch
from support.models import model_of
from support.pairs import in_turn
from test_metrics import assert_untouched, norms, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import s2ft
from s2ft import Coupling, S2FTConfig
from s2ft.model.coupling import Projection, projections_of
from s2ft.model.registry import couplings_of
from s2ft.selection import METRICS
from s2ft.selection.batches import Calibration
from s2ft.selection.metric import Request

RATIOS = dict(q_ratio=1.0, k_ratio=1.0, v_ratio=1.0, o_ratio=1.0, u_ratio=1.0, g_ratio=1.0, d_ratio=1.0)
CALIBRATED = [name for name, metric in METRICS.items() if metric.calibrated]


def tokens(rows, length, seed=3):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def mask_of(lengths, width, left=False):
    """A mask of shape [rows, width] with as many ones in each row as its length."""
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if left else mask


def pixels(rows):
    return torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(4))


def sound(rows):
    return torch.randn(rows, 5, 14, generator=torch.Generator().manual_seed(5))  # 7 positions of the encoder


def ignored(ids, mask):
    return ids.masked_fill(mask == 0, -100)


def text(width, lengths=(3, 8, 6), left=False):
    """A batch of three sequences, as a tokenizer returns it."""
    return {"input_ids": tokens(3, width), "attention_mask": mask_of(lengths, width, left)}


def decoder(width, lengths, kind):
    """The decoder's part of a batch of three sequences: its inputs, the labels that they are made from, or both."""
    ids, mask = tokens(3, width, seed=6), mask_of(lengths, width)
    inputs = {"decoder_input_ids": ids}
    labels = {"labels": ignored(tokens(3, width, seed=7), mask)}
    return {
        "inputs": {**inputs, "decoder_attention_mask": mask},
        "labels": labels,
        "both": {**inputs, **labels},
        "all": {**inputs, **labels, "decoder_attention_mask": mask},
    }[kind]


def seq2seq(first, width, lengths=(5, 2, 4)):
    """Batches by kind of the decoder's part."""
    return {kind: [{**first, **decoder(width, lengths, kind)}] for kind in ("inputs", "labels", "both", "all")}


CROSS = dict(
    encoder_hidden_states=torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(8)),
    encoder_attention_mask=mask_of((8, 1, 5), 8),
)
CLASSES = torch.tensor([1, 4, 0])
CASES = {  # name: (case of support.models, batches)
    "vit": ("vit", [{"pixel_values": pixels(3), "labels": CLASSES}]),
    "vit, two batches": (
        "vit",
        [{"pixel_values": pixels(3), "labels": CLASSES}, {"pixel_values": -pixels(1), "labels": CLASSES[:1]}],
    ),
    "clip": ("clip", [{**text(10), "pixel_values": pixels(3)}]),  # an image has 10 positions too
    "clip, other length": ("clip", [{**text(8), "pixel_values": pixels(3), "return_loss": True}]),
    "clip, unpaired": ("clip", [{**text(8), "pixel_values": pixels(2)}]),
    "clip-text": ("clip-text", [text(9)]),
    "clip-vision": ("clip-vision", [{"pixel_values": pixels(2)}]),
    "bert": ("bert", [{**text(8), "labels": ignored(tokens(3, 8), mask_of((2, 5, 1), 8))}]),
    "bert, two batches": (
        "bert",
        [{**text(8), "labels": tokens(3, 8)}, {**text(9, left=True), "labels": tokens(3, 9)}],
    ),
    "bert-cross-attention": ("bert-cross-attention", [{**text(8), **CROSS, "labels": tokens(3, 8)}]),
    **{f"t5, {kind}": ("t5", found) for kind, found in seq2seq(text(8), 5).items()},
    **{f"t5, {kind}, equal": ("t5", found) for kind, found in seq2seq(text(8), 8).items()},
    "t5, left": ("t5", [{**text(8, left=True), **decoder(6, (6, 1, 3), "labels")}]),
    "t5, two batches": ("t5-gated", seq2seq(text(8), 5)["labels"] + seq2seq(text(10), 7)["all"]),
    **{f"whisper, {kind}": ("whisper", found) for kind, found in seq2seq({"input_features": sound(3)}, 5).items()},
    **{
        f"whisper, {kind}, equal": ("whisper", found)
        for kind, found in seq2seq({"input_features": sound(3)}, 7).items()
    },
    "whisper, masked frames": (
        "whisper",
        [{"input_features": sound(3), "attention_mask": mask_of((14, 6, 9), 14), **decoder(5, (5, 2, 4), "labels")}],
    ),
}


def expected_mask(case, path, batch):
    """The mask, shape [sequences, length], of the positions that count at `path`. None if all of them do."""
    of_encoder = path.startswith(("encoder.", "model.encoder.")) or any(
        name in path for name in ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k", "encoder_attn.v")
    )
    if case.startswith("t5"):
        if of_encoder:
            return batch["attention_mask"]
    elif case == "whisper":
        if of_encoder:
            return None
    elif case == "bert-cross-attention" and path.endswith(("crossattention.self.key", "crossattention.self.value")):
        return batch["encoder_attention_mask"]
    elif "vision_model" in path:
        return None
    else:
        return batch.get("attention_mask")
    return batch.get("decoder_attention_mask", batch["labels"] != -100 if "labels" in batch else None)


def stored_activations(model, batches, case):
    """Scores [units] by path, from every activation, stored, with one run of the model for each batch."""
    rows = {}
    for batch in batches:
        for path, (p, x) in run_and_store(model, couplings_of(model), batch).items():
            mask = expected_mask(case, path, batch)
            kept = x.flatten(0, -2) if mask is None else x[mask.bool()]
            rows.setdefault(path, (p, []))[1].append(kept.double())
    return {path: root_mean_square(p, torch.cat(kept)) for path, (p, kept) in rows.items()}


def run_and_store(model, couplings, batch):
    seen, hooks = {}, []
    for p in projections_of(couplings):
        hooks.append(
            model.get_submodule(p.path).register_forward_hook(
                lambda module, inputs, output, p=p: seen.update({p.path: (p, inputs[0] if p.dim == 1 else output)})
            )
        )
    with torch.no_grad():
        if isinstance(batch, dict):
            model(**batch)
        else:
            model(*batch)
    for hook in hooks:
        hook.remove()
    return seen


def root_mean_square(projection, x):
    """The root mean square of every unit, shape [units], for x of shape [positions, features]."""
    return x.unflatten(1, (projection.count, projection.unit)).square().sum((0, 2)).div(len(x)).sqrt()


def plain_gradients(model, batches):
    totals = {}
    for batch in batches:
        for i in range(len(batch["labels"])):
            if bool((batch["labels"][i] != -100).any()):
                model.zero_grad()
                model(**{name: value[i : i + 1] for name, value in batch.items()}).loss.backward()
                for p in projections_of(couplings_of(model)):
                    totals.setdefault(p.path, []).append(norms(model.get_submodule(p.path).weight.grad, p))
    model.zero_grad()
    return {path: torch.stack(found).square().mean(0).sqrt() for path, found in totals.items()}


def checkpoint_blocks(model, **options):
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers 5.2x
    getattr(model, f"{kind}_checkpointing_enable")(options or None)


def scores_of(model, metric, batches, couplings=None):
    request = Request(
        couplings_of(model, couplings),
        S2FTConfig(**RATIOS, selection=metric),
        model,
        Calibration(batches, torch.device("cpu")),
    )
    return METRICS[metric].score(request)


def assert_scores(found, expected):
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        torch.testing.assert_close(found[path], values, rtol=1e-4, atol=1e-8, msg=lambda text: f"{path}: {text}")


# ---- scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_activation_scores_equal_those_of_stored_activations(name):
    case, batches = CASES[name]
    model = model_of(case)
    expected = stored_activations(model, batches, case)
    assert_scores(scores_of(model, "activation", batches), expected)
    weights = {
        p.path: norms(model.get_submodule(p.path).weight.detach(), p) for p in projections_of(couplings_of(model))
    }
    assert_scores(scores_of(model, "product", batches), {path: weights[path] * expected[path] for path in weights})


WITH_LABELS = [name for name, (case, batches) in CASES.items() if all("labels" in batch for batch in batches)]


@pytest.mark.parametrize("name, checkpointing", in_turn(WITH_LABELS, (False, True)))
def test_gradient_scores_equal_those_of_one_sequence_at_a_time(name, checkpointing):
    case, batches = CASES[name]
    model = model_of(case)
    expected = plain_gradients(model, batches)
    if checkpointing:
        checkpoint_blocks(model)
    assert_scores(scores_of(model, "gradient", batches), expected)


@pytest.mark.parametrize("name", ("vit", "bert", "t5, labels", "whisper, labels"))
def test_reentrant_checkpointing_needs_no_input_with_a_gradient(name):
    case, batches = CASES[name]
    model = model_of(case)
    expected = plain_gradients(model, batches)
    checkpoint_blocks(model, use_reentrant=True)
    assert_scores(scores_of(model, "gradient", batches), expected)
    assert not any(value.requires_grad for batch in batches for value in batch.values())


@pytest.mark.parametrize(
    "case, batches", (("whisper", CASES["whisper, labels"][1]), ("opt", [{**text(8), "labels": tokens(3, 8)}]))
)
def test_checkpointing_does_not_turn_dropout_on(case, batches):
    model = model_of(case)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.5  # used by a function that reads the block's training flag
    expected = plain_gradients(model, batches)
    checkpoint_blocks(model)
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    assert_scores(scores_of(model, "gradient", batches), expected)
    assert functions == [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]


def test_padding_of_an_encoder_decoder_does_not_count():
    """The scores depend neither on the values in padding nor on its length."""
    model = model_of("t5")
    batch = {**text(8, (3, 8, 6)), **decoder(5, (5, 2, 4), "all")}
    longer = {**text(11, (3, 8, 6)), **decoder(9, (5, 2, 4), "all")}
    for name, mask in (
        ("input_ids", "attention_mask"),
        ("decoder_input_ids", "decoder_attention_mask"),
        ("labels", "decoder_attention_mask"),
    ):
        longer[name] = longer[name].clone()
        longer[name][longer[mask].bool()] = batch[name][batch[mask].bool()]
    for metric in CALIBRATED:
        expected = scores_of(model, metric, [batch])
        for path, values in scores_of(model, metric, [longer]).items():
            torch.testing.assert_close(values, expected[path], rtol=1e-3, atol=1e-7)


def test_a_sequence_without_a_label_is_left_out():
    for name in ("bert", "t5, labels"):
        case, (batch,) = CASES[name]
        model = model_of(case)
        without = {**batch, "labels": batch["labels"].clone()}
        without["labels"][1] = -100
        others = {name: value[[0, 2]] for name, value in batch.items()}
        assert_scores(scores_of(model, "gradient", [without]), scores_of(model, "gradient", [others]))


def test_a_batch_may_be_only_the_main_input():
    for case, value in (("vit", pixels(2)), ("clip-vision", pixels(2)), ("bert", tokens(2, 7))):
        model = model_of(case)
        named = [{model.main_input_name: value}]
        assert_scores(scores_of(model, "activation", [value]), scores_of(model, "activation", named))


SMALL = dict(
    hidden_size=24,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=67,
    pad_token_id=0,
    num_labels=5,
)


@pytest.mark.parametrize("kind", (BertForSequenceClassification, LlamaForSequenceClassification))
@pytest.mark.parametrize("values", (CLASSES, torch.tensor([[0.5], [-1.0], [-100.0]])))
def test_labels_of_whole_sequences(kind, values):
    """Labels are classes [n] or numbers [n, 1]. Among numbers, -100 is a value like any other."""
    config = {BertForSequenceClassification: BertConfig, LlamaForSequenceClassification: LlamaConfig}[kind]
    model = kind(config(**{**SMALL, "num_labels": 5 if values.dim() == 1 else 1})).eval()
    batches = [{**text(8), "labels": values}]
    totals = {}
    for i in range(3):
        model.zero_grad()
        model(**{name: value[i : i + 1] for name, value in batches[0].items()}).loss.backward()
        for p in projections_of(couplings_of(model)):
            totals.setdefault(p.path, []).append(norms(model.get_submodule(p.path).weight.grad, p))
    model.zero_grad()
    assert_scores(
        scores_of(model, "gradient", batches),
        {path: torch.stack(found).square().mean(0).sqrt() for path, found in totals.items()},
    )


# ---- modules that are not from transformers -----------------------------------------------------------


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x, scale=None, attention_mask=None):
        hidden = torch.relu(self.up(x))
        return self.down(hidden if scale is None else hidden * scale)


class Convolutional(nn.Module):
    """After the convolution the channels are the last dim, as in ConvNeXt. A position is a pixel."""

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.down = nn.Conv2d(3, 6, 3), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, image, /):
        return self.down(torch.relu(self.up(self.conv(image).movedim(1, -1)))).mean((1, 2))


MLP = Coupling("ffn", 0, (Projection("u", "up", 10, 1, 0),), Projection("d", "down", 10, 1, 1))
ROWS, GRID, SCALE = torch.randn(4, 6), torch.randn(2, 5, 6), torch.rand(4, 10)


@pytest.mark.parametrize(
    "make, batch, plain",
    (
        (Perceptron, ROWS, (ROWS,)),
        (Perceptron, GRID, (GRID,)),
        (Perceptron, (ROWS, SCALE), (ROWS, SCALE)),
        (Perceptron, {"scale": SCALE, "x": ROWS}, (ROWS, SCALE)),
        (Convolutional, pixels(3), (pixels(3),)),
        (lambda: nn.Sequential(Perceptron()), [ROWS], (ROWS,)),
    ),
)
def test_any_module(make, batch, plain):
    model = make().eval()
    prefix = "0." if isinstance(model, nn.Sequential) else ""
    up, down = Projection("u", f"{prefix}up", 10, 1, 0), Projection("d", f"{prefix}down", 10, 1, 1)
    coupling = Coupling("ffn", 0, (up,), down)
    expected = {
        path: root_mean_square(p, x.flatten(0, -2).double())
        for path, (p, x) in run_and_store(model, [coupling], plain).items()
    }
    found = scores_of(model, "activation", [batch], [coupling])
    assert_scores(found, expected)
    assert_scores(scores_of(model, "activation", [batch] * 2, [coupling]), expected)
    assert s2ft.select(model, S2FTConfig(d_ratio=0.2, selection="product"), [batch], couplings=[coupling])


def test_any_module_with_an_attention_mask():
    model, mask = Perceptron(), mask_of((5, 2), 5)
    short = scores_of(model, "activation", [GRID[:1], GRID[1:, :2]], [MLP])
    assert_scores(scores_of(model, "activation", [{"x": GRID, "attention_mask": mask}], [MLP]), short)


def test_any_module_from_a_loader():
    model = Perceptron()
    loader = DataLoader(TensorDataset(ROWS, SCALE), batch_size=3)  # its batches are lists
    assert_scores(scores_of(model, "activation", loader, [MLP]), scores_of(model, "activation", [(ROWS, SCALE)], [MLP]))


class Scored(Perceptron):
    """Returns a loss, like a model of transformers."""

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(super().forward(x), labels)}


def test_any_module_with_a_loss():
    model, labels = Scored(), torch.tensor([2, 0, 1, 1])
    found = scores_of(model, "gradient", [{"x": ROWS, "labels": labels}], [MLP])
    squares = 0
    for i in range(4):
        model.zero_grad()
        model(ROWS[i : i + 1], labels[i : i + 1])["loss"].backward()
        squares = squares + model.down.weight.grad.double().square().sum(0)
    torch.testing.assert_close(found["down"], (squares / 4).sqrt(), rtol=1e-4, atol=1e-9)
    assert scores_of(model, "activation", [{"x": ROWS, "labels": labels}], [MLP])  # its forward requires labels


# ---- the model does not change; errors ----------------------------------------------------------------


def select(model, metric, batches, couplings=None):
    return s2ft.select(model, S2FTConfig(d_ratio=0.1, o_ratio=0.4, selection=metric), batches, couplings=couplings)


@pytest.mark.parametrize("name", ("vit", "clip", "clip-vision", "bert", "t5, labels", "whisper, all"))
@pytest.mark.parametrize("metric", CALIBRATED)
def test_selecting_does_not_change_the_model(metric, name):
    case, batches = CASES[name]
    model = model_of(case).train()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    if metric == "gradient" and name.startswith("clip"):
        with pytest.raises(ValueError):
            select(model, metric, batches)
    else:
        select(model, metric, batches)
    assert_untouched(model, before)


def changed(name, **values):
    """The case's batch with other values. None removes a value."""
    batch = {**CASES[name][1][0], **values}
    return CASES[name][0], [{key: value for key, value in batch.items() if value is not None}]


WRONG = {  # case, batches, message
    "no pixels": (
        "vit",
        [{"labels": CLASSES}],
        "batch 0 needs pixel_values, ViTForImageClassification's main input, "
        r"floating-point pixels of shape \[images, .*got NoneType \(it has labels\)",
    ),
    "one image": ("vit", [pixels(1)[0]], r"needs pixel_values, .*got shape \(3, 12, 12\)"),
    "no images": (
        "vit",
        [{"pixel_values": pixels(rows), "labels": CLASSES[:rows]} for rows in (2, 0)],
        r"batch 1 needs pixel_values, .*got shape \(0, 3, 12, 12\)",
    ),
    "bytes": ("vit", [{"pixel_values": pixels(2).byte()}], "needs pixel_values, .*of torch.uint8"),
    "ids for images": ("vit", [tokens(2, 7)], r"needs pixel_values, .*it has input_ids"),
    "a tuple": ("vit", [(pixels(2), CLASSES)], "must be a dict of tensors or a tensor of pixel_values, got tuple"),
    "a list": ("clip-vision", [{"pixel_values": pixels(1).tolist()}], "needs pixel_values, .*got list"),
    "classes": (
        *changed("vit", labels=CLASSES[:2]),
        r"batch 0: labels must have shape \(3, ...\) to fit pixel_values \(3, 3, 12, 12\), got \(2,\)",
    ),
    "classes as a list": (*changed("vit", labels=[1, 4, 0]), "labels must have shape .* got list"),
    "clip's mask": (
        *changed("clip", attention_mask=mask_of((3, 8, 6), 8)),
        r"attention_mask must have shape \(3, 10\) to fit input_ids",
    ),
    "bert's labels": (
        *changed("bert", labels=tokens(3, 7)),
        r"labels must have shape \(3, 8\) to fit input_ids \(3, 8\)",
    ),
    "no sound": ("whisper", [{"labels": tokens(2, 5)}], "batch 0 needs input_features, WhisperForConditional"),
    "flat sound": ("whisper", [{"input_features": sound(2)[0]}], r"needs input_features, .*got shape \(5, 14\)"),
    "frames": (
        *changed("whisper, labels", attention_mask=mask_of((14, 6), 14)),
        r"attention_mask must have shape \(3, ...\) to fit input_features",
    ),
    "no decoder inputs": ("t5", [text(8)], "needs decoder_input_ids, or labels to make them from, for the decoder of"),
    "sound without decoder inputs": ("whisper", [sound(2)], r"needs decoder_input_ids, .*\(it has input_features\)"),
    "decoder rows": (
        *changed("t5, inputs", decoder_input_ids=tokens(2, 5)),
        r"decoder_input_ids must have shape \(3, ...\) to fit input_ids \(3, 8\), got \(2, 5\)",
    ),
    "decoder mask": (
        *changed("t5, inputs", decoder_attention_mask=mask_of((2, 2, 2), 4)),
        r"decoder_attention_mask must have shape \(3, 5\) to fit decoder_input_ids",
    ),
    "decoder mask by labels": (
        *changed("t5, labels", decoder_attention_mask=mask_of((2, 2, 2), 4)),
        r"decoder_attention_mask must have shape \(3, 5\) to fit labels",
    ),
    "decoder labels": (
        *changed("t5, both", labels=tokens(3, 4)),
        r"labels must have shape \(3, 5\) to fit decoder_input_ids",
    ),
    "label rows": (*changed("t5, labels", labels=tokens(2, 5)), r"labels must have shape \(3, ...\) to fit input_ids"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("metric", CALIBRATED)
def test_bad_batches_raise_and_do_not_change_the_model(metric, wrong):
    case, batches, message = WRONG[wrong]
    model = model_of(case).train()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        select(model, metric, batches)
    assert_untouched(model, before)


NEED_LABELS = {"vit": "vit", "bert": "bert", "t5": "t5, inputs", "whisper": "whisper, inputs"}


@pytest.mark.parametrize("case", NEED_LABELS)
def test_gradient_needs_labels_except_for_causal_models(case):
    _, batches = changed(NEED_LABELS[case], labels=None)
    with pytest.raises(ValueError, match="needs labels in every calibration batch: .* is not a causal language model"):
        select(model_of(case), "gradient", batches)


def test_gradient_refuses_a_contrastive_loss():
    case, batches = CASES["clip, other length"]
    with pytest.raises(ValueError, match="contrastive loss of CLIPModel compares the pairs of a batch, so one pair"):
        select(model_of(case), "gradient", batches)


@pytest.mark.parametrize("case", ("clip-text", "clip-vision"))
def test_gradient_refuses_a_model_without_a_loss(case):
    with pytest.raises(ValueError, match="needs a model that computes a loss from labels; CLIP.*Model does not"):
        select(model_of(case), "gradient", CASES[case][1])


def test_a_decoder_with_only_padding_raises():
    case, batches = changed("t5, inputs", decoder_attention_mask=mask_of((0, 0, 0), 5))
    with pytest.raises(ValueError, match="no calibration batch has more than padding for decoder.block.0"):
        select(model_of(case), "activation", batches)


MODULE_WRONG = {
    "text": ("text", "batch 0 must be a tensor, a tuple of tensors or a dict of them, got str"),
    "no tensors": ({"x": [1.0]}, "must have tensors whose first dim is the batch, none of them empty, got none"),
    "nothing": ({}, "got none"),
    "a number": (torch.tensor(1.0), "got none"),
    "an empty one": ((ROWS[:0], ROWS), r"none of them empty, got shapes \[\(0, 6\), \(4, 6\)\]"),
    "a mask of other rows": (
        {"x": GRID, "attention_mask": mask_of((1, 2, 3), 5)},
        r"up has activations of shape \(2, 5, 10\), which the mask of shape \(3, 5\) does not",
    ),
}


@pytest.mark.parametrize("wrong", MODULE_WRONG)
def test_bad_batches_for_any_module_raise(wrong):
    batch, message = MODULE_WRONG[wrong]
    model = Perceptron()
    before = state(model)
    config = S2FTConfig(u_ratio=0.1, d_ratio=0.1, selection="activation")
    with pytest.raises(ValueError, match=message):
        s2ft.select(model, config, [batch], couplings=[MLP])
    assert_untouched(model, before)
