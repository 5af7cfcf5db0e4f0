"""Calibration with other inputs than one text: images, sound, an encoder and a decoder, two towers, and modules that
are not from transformers.

The expected scores come from all activations, stored, and from one backward for each sequence.
"""

from functools import partial

import pytest
import torch
from selection import reference
from selection.test_metrics import (
    assert_scores,
    assert_untouched,
    checkpoint_blocks,
    scores_of as scores_of_ratios,
    state,
)
from support.inside import Projection
from support.models import model_of
from support.pairs import in_turn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertForSequenceClassification, LlamaForSequenceClassification

import s2ft
from s2ft import Coupling, S2FTConfig

RATIOS = dict(q_ratio=1.0, k_ratio=1.0, v_ratio=1.0, o_ratio=1.0, u_ratio=1.0, g_ratio=1.0, d_ratio=1.0)


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


scores_of = partial(scores_of_ratios, **RATIOS)


# ---- scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_a_simple_computation_and_the_model_does_not_change(name):
    case, batches = CASES[name]
    model = model_of(case).train()
    for metric in ("activation", "product"):
        expected = reference.scores(model, metric, batches, partial(expected_mask, case))
        before = state(model)
        assert_scores(scores_of(model, metric, batches), expected)
        assert_untouched(model, before)


WITH_LABELS = [name for name, (case, batches) in CASES.items() if all("labels" in batch for batch in batches)]


@pytest.mark.parametrize(
    "name, checkpointing", in_turn(WITH_LABELS, (None, dict(use_reentrant=False), dict(use_reentrant=True)))
)
def test_gradient_scores_equal_those_of_one_sequence_at_a_time(name, checkpointing):
    case, batches = CASES[name]
    model = model_of(case).train()
    next(model.parameters()).requires_grad_(False)
    expected = reference.scores(model, "gradient", batches)
    if checkpointing:
        checkpoint_blocks(model, **checkpointing)
    before = state(model)
    assert_scores(scores_of(model, "gradient", batches), expected)
    assert_untouched(model, before)
    assert not any(value.requires_grad for batch in batches for value in batch.values())


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
    model = kind(kind.config_class(**{**SMALL, "num_labels": 5 if values.dim() == 1 else 1})).eval()
    batches = [{**text(8), "labels": values}]
    assert_scores(scores_of(model, "gradient", batches), reference.scores(model, "gradient", batches))


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


LABELLED = [{"x": ROWS, "labels": torch.tensor([2, 0, 1, 1])}]


class Scored(Perceptron):
    """Returns a loss, like a model of transformers."""

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(super().forward(x), labels)}


@pytest.mark.parametrize(
    "make, batches, plain, metric",
    (
        (Perceptron, [ROWS], [(ROWS,)], "activation"),
        (Perceptron, [GRID], [(GRID,)], "activation"),
        (Perceptron, [GRID] * 2, [(GRID,)], "activation"),
        (Perceptron, [{"x": GRID, "attention_mask": mask_of((5, 2), 5)}], [(GRID[:1],), (GRID[1:, :2],)], "activation"),
        (Perceptron, [(ROWS, SCALE)], [(ROWS, SCALE)], "activation"),
        (Perceptron, [{"scale": SCALE, "x": ROWS}], [(ROWS, SCALE)], "activation"),
        (Perceptron, DataLoader(TensorDataset(ROWS, SCALE), batch_size=3), [(ROWS, SCALE)], "activation"),
        (Convolutional, [pixels(3)], [(pixels(3),)], "activation"),
        (Scored, LABELLED, LABELLED, "gradient"),
    ),
)
def test_any_module(make, batches, plain, metric):
    """The forward of Scored requires the labels, also where only activations are measured."""
    model = make().eval()
    assert_scores(scores_of(model, metric, batches, [MLP]), reference.scores(model, metric, plain, couplings=[MLP]))
    assert s2ft.select(model, S2FTConfig(d_ratio=0.2, selection="product"), batches, couplings=[MLP])
