"""Makes small inputs for a model from its config: tokens, images and sound, the richest first.

An input that reaches every tower of a model is worth most. Which inputs a model takes is read from the arguments of
its forward; how many tokens stand for an image is asked from the model itself.
"""

import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from s2ft.model.discovery.twin import token_entries
from s2ft.model.running import evaluation_mode, placed, run_example, seeded, tensors_in

ROWS, LENGTH = 2, 24
FRAMES = 25  # of a recording
LONGEST = 20  # seconds in which inputs with images and sound are tried
MOST_GUESSES = 30  # of the number of tokens that stand for an image of one layout
MEDIA = ("pixel", "patches", "input_features", "input_values")  # words of the names of inputs with images or sound
PATCH = ("patch_size", "model_patch_size")  # entries of configs
Media = dict[str, Tensor]


def runnable_example(model: nn.Module) -> dict[str, Tensor]:
    """Find an input on which the model runs: the first one of :func:`examples_of` that it takes.

    Raises:
        ValueError: The model runs on none; the message says what was tried.
    """
    failed: list[str] = []
    start = time.monotonic()
    for candidate in examples_of(model):
        has_media = any(word in name for word in MEDIA for name in candidate)  # the last resorts, without, are few
        if failed and has_media and time.monotonic() - start > LONGEST:
            continue
        failure = _failure(model, candidate)
        if not failure:
            return candidate
        failed.append(f"{', '.join(candidate)}: {failure}")
    tried = "; ".join(dict.fromkeys(failed)) or "no input: its config names no tokens, images or sound"
    raise ValueError(
        f"{type(model).__name__} does not run on any input that s2ft makes. Tried: {tried}. Pass another as example="
    )


def _failure(model: nn.Module, example: Any) -> str:
    """Run the model once, and say why the example is no good if it is not."""
    try:
        with torch.no_grad(), evaluation_mode(model), seeded(model, 0):
            found = [tensor for tensor in tensors_in(run_example(model, example)) if tensor.numel()]
    except Exception as error:  # models refuse inputs in many ways; every one only rules this input out
        return f"{type(error).__name__}: {str(error)[:200]}"
    # Classes that can't be chosen get the lowest number or minus infinity in some models.
    bad = any(tensor.isnan().any() or not tensor.isfinite().any() for tensor in found)
    return "its output has NaN or infinity" if bad else ""


# ---- candidates -------------------------------------------------------------------------------------------


@dataclass
class _Inputs:
    """What inputs are made from."""

    model: nn.Module
    config: Any
    takes: frozenset[str]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu")

    def tokens(self, length: int | None = None) -> Tensor:
        """Token ids [ROWS, length] that stand for nothing else in the config. Default: LENGTH, or as many as fit."""
        configs = self.configs("text_config", "decoder", "text_encoder")
        size = _first(configs, ("vocab_size", "n_vocab")) or 100
        length = length or min(LENGTH, _first(configs, ("max_position_embeddings", "n_positions")) or LENGTH)
        named = [inside[key] for inside, key in token_entries(self.config.to_dict())]
        tokens = [token for value in named for token in (value if isinstance(value, list) else [value])]
        special = {token for token in tokens if isinstance(token, int)}
        usual = torch.tensor([token for token in range(size) if token not in special] or [0], device="cpu")
        return usual[torch.randint(len(usual), (ROWS, length), generator=self.generator, device="cpu")]

    def configs(self, *names: str) -> list[Any]:
        """The configs of these names inside the config, then the config itself."""
        inside = [getattr(self.config, name, None) for name in names]
        return [config for config in inside if config is not None and hasattr(config, "to_dict")] + [self.config]


def examples_of(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Iterate over inputs that a model of transformers may run on, those that reach most of it first.

    Args:
        model: The model.

    Yields:
        Arguments of the model's forward by name, on the device and in the precision of the model.
    """
    if getattr(model, "config", None) is None or not hasattr(model.config, "to_dict"):
        return
    inputs = _Inputs(model, model.config, frozenset(inspect.signature(model.forward).parameters))
    for example in _candidates(inputs):
        named = {name: value for name, value in example.items() if name in inputs.takes}
        if named:
            yield placed(model, named)


def _candidates(inputs: _Inputs) -> Iterator[dict[str, Tensor]]:
    images = _media(inputs, "get_image_features", _images)
    sounds = _media(inputs, "get_audio_features", _sounds)
    if "input_ids" in inputs.takes:
        both = [{"image": image, "audio": sound} for image in images for sound in sounds]
        for media in (*both[:4], *({"image": image} for image in images), *({"audio": sound} for sound in sounds)):
            yield from itertools.islice(_with_text(inputs, media), MOST_GUESSES)
    for values, _ in (*images, *sounds):
        yield from _decoded(inputs, values)
    for length in (LENGTH, 64, 8):
        tokens = inputs.tokens(length)
        masked = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        boxes = {"bbox": torch.zeros(*tokens.shape, 4, dtype=torch.int64), "qformer_input_ids": tokens}
        for values in (masked, {"input_ids": tokens}, {**masked, **boxes}, {"inputs": tokens}):
            yield from _decoded(inputs, values)
    yield from _codebooks(inputs)


def _decoded(inputs: _Inputs, values: Media) -> list[Media]:
    """With inputs of the decoder if there is one, and without."""
    takes = "decoder_input_ids" in inputs.takes
    return [{**values, "decoder_input_ids": inputs.tokens(8)}, values] if takes else [values]


def _codebooks(inputs: _Inputs) -> Iterator[Media]:
    """Tokens of several codebooks at each place, as models of sound have them."""
    count = _first(inputs.configs("decoder_config", "decoder"), ("num_codebooks", "num_channels"))
    if count is None:
        return
    for depth in (count, count + 1):
        tokens = torch.stack([inputs.tokens(8) for _ in range(depth)], dim=-1)
        yield {"input_ids": tokens}
        yield {"input_ids": inputs.tokens(), "decoder_input_ids": tokens}
    yield {"input_ids": torch.cat([inputs.tokens(8) for _ in range(count)])}


# ---- images and sound -------------------------------------------------------------------------------------


# Images or sound for ROWS rows, with the number of tokens that stand for them in a row: None if it is not known, 0 if
# the model refuses to encode them.
Medium = tuple[Media, int | None]
_TOKEN_KEYS = {
    "image": (
        "image_token_id",
        "image_token_index",
        "media_token_id",
        "im_token_id",
        "image_token",
        "boi_token_id",
        "image_patch_id",
        "video_token_index",
    ),
    "audio": ("audio_token_id", "audio_token_index", "audio_token"),
}
# Entries of configs that say how many tokens stand for an image.
_HINTS = (
    "num_query_tokens",
    "image_seq_length",
    "image_seq_len",
    "mm_tokens_per_image",
    "num_image_tokens",
    "latent_query_num",
)
_GUESSES = (4, 1, 16, 9, 64, 25, 49, 36, 17, 5, 8, 2, 3, 6, 10, 12, 18, 32, 100, 144, 196, 256)


def _media(inputs: _Inputs, method: str, layouts: Callable[[_Inputs], Iterator[Media]]) -> list[Medium]:
    """Images or sound in the layouts that the model encodes, by its method; in all layouts if there are none."""
    found = [{name: value for name, value in layout.items() if name in inputs.takes} for layout in layouts(inputs)]
    model: Any = inputs.model
    owners = (model, getattr(model, "model", None), getattr(model, "base_model", None))
    encode = next((getattr(owner, method) for owner in owners if hasattr(owner, method)), None)
    media = [(values, encode and _tokens_for(encode, model, values)) for values in found if values]
    return [(values, tokens) for values, tokens in media if tokens] or media


def _tokens_for(encode: Callable, model: nn.Module, values: Media) -> int:
    """How many tokens a row of images or sound becomes, or 0 if the model can't encode it."""
    takes = {*inspect.signature(encode).parameters, "pixel_values", "input_features", "input_values"}
    given = {name: value for name, value in values.items() if name in takes}
    try:
        with torch.no_grad(), evaluation_mode(model):
            found = encode(**placed(model, given))
    except Exception:  # another layout may fit
        return 0
    features = getattr(found, "pooler_output", None)
    features = found if features is None else features
    while isinstance(features, (tuple, list)) and features and isinstance(features[0], (tuple, list)):
        features = features[0]
    parts = list(features if isinstance(features, (tuple, list)) else [features])
    if not parts or not all(isinstance(part, Tensor) and part.dim() for part in parts):
        return 0
    return sum(part.numel() // part.shape[-1] for part in parts) // ROWS


def _with_text(inputs: _Inputs, media: dict[str, Medium]) -> Iterator[Media]:
    """Images and sound with text in which tokens stand for them."""
    ids = [_first(inputs.configs("text_config"), _TOKEN_KEYS[kind]) for kind in media]
    values = {name: value for given, _ in media.values() for name, value in given.items()}
    numbers = [tokens for _, tokens in media.values()]
    configs = inputs.configs("vision_config", "text_config")
    hints = {getattr(config, key, None): None for config in configs for key in _HINTS}
    tiles = next((value.shape[1] for value in values.values() if value.dim() == 5), 1)
    likely = [hint * tiles for hint in hints if isinstance(hint, int) and hint * tiles < 600]
    guesses = [[count] * len(media) for count in (*likely, *_GUESSES)]
    if None in ids and "image_embeds_position_mask" not in inputs.takes:
        guesses = [[0] * len(media)]
    elif all(numbers):
        guesses = [cast("list[int]", numbers)]
    elif numbers[0] is not None:  # the model has refused a layout
        guesses = guesses[: max(len(likely), 1)]
    for counts in guesses:
        tokens, kinds = _text_around(inputs, ids, counts)
        extra = {
            "attention_mask": torch.ones_like(tokens),
            "token_type_ids": (kinds > 0).long(),
            "mm_token_type_ids": kinds,
            "qformer_input_ids": inputs.tokens(8),
            "image_attention_mask": torch.ones(*tokens.shape, 1, dtype=torch.int64),
            "image_embeds_position_mask": (kinds == 1).long(),
            "bbox": torch.zeros(*tokens.shape, 4, dtype=torch.int64),
        }
        yield from _decoded(inputs, {"input_ids": tokens, **values, **extra})
    yield from _decoded(inputs, {"input_ids": inputs.tokens(), **values})


def _text_around(inputs: _Inputs, ids: list[int | None], counts: list[int]) -> tuple[Tensor, Tensor]:
    """Token ids with `counts` tokens of these ids in the midst, and for each token: 0 text, 1 image, 3 sound."""
    start = _first(inputs.configs("text_config"), ("vision_start_token_id", "boi_token_id", "image_start_token_id"))
    tokens = inputs.tokens(LENGTH + sum(counts))
    kinds = torch.zeros_like(tokens)
    place = 3
    for token, count in zip(ids, counts):
        if start is not None and start != token:
            tokens[:, place - 1] = start
        if token is not None:
            tokens[:, place : place + count] = token
        kinds[:, place : place + count] = 1 if token == ids[0] else 3
        place += count + 3
    return tokens, kinds


def _images(inputs: _Inputs) -> Iterator[Media]:
    vision = inputs.configs("vision_config", "vision_tower_config", "vq_config", "encoder", "image_config")
    channels = _first(vision, ("num_channels", "in_channels", "in_chans")) or 3
    if "image_grid_thw" in inputs.takes:
        yield from _patches_in_a_grid(inputs, vision, channels)
    if "image_position_ids" in inputs.takes or "spatial_shapes" in inputs.takes:
        yield from _patches_with_places(inputs, vision, channels)
    if "flattened_patches" in inputs.takes:
        patches = inputs.normal(ROWS, 16, 2 + channels * _side(vision, PATCH, 16) ** 2)
        patches[..., :2] = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5))  # rows and columns
        yield {"flattened_patches": patches}
    if "pixel_values" in inputs.takes:
        for side in dict.fromkeys((_side(vision, ("image_size", "img_size", "input_size"), 32), 32, 64, 224)):
            yield from _pictures(inputs, channels, side)


def _side(configs: list[Any], keys: tuple[str, ...], default: int) -> int:
    """The size of an image or of a patch, the larger one if it has several."""
    size = _first(configs, keys, whole=False)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    return (max(size) if isinstance(size, (list, tuple)) else size) or default


def _pictures(inputs: _Inputs, channels: int, side: int) -> Iterator[Media]:
    sizes = torch.tensor([[side, side]] * ROWS)
    flat = inputs.normal(ROWS, channels, side, side)
    more = {"image_sizes": sizes, "high_res_pixel_values": inputs.normal(ROWS, channels, 2 * side, 2 * side)}
    yield {"pixel_values": flat, **more}
    yield {"pixel_values": flat}
    for tiles in (1, 5, 3, 2, 4):
        values = inputs.normal(ROWS, tiles, channels, side, side)
        ones = torch.ones(ROWS, tiles, side, side, dtype=torch.int64)
        yield {
            "pixel_values": values,
            "pixel_attention_mask": ones.bool(),
            "image_sizes": sizes,
            "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.int64),
            "aspect_ratio_mask": torch.ones(ROWS, 1, tiles, dtype=torch.int64),
        }


def _patches_in_a_grid(inputs: _Inputs, vision: list[Any], channels: int) -> Iterator[Media]:
    """Patches one after another, and the sizes of the grid of each image in patches."""
    merge = _first(vision, ("spatial_merge_size", "merge_size")) or 2
    frames = _first(vision, ("temporal_patch_size",)) or 1
    patch = _side(vision, PATCH, 16)
    side = 2 * merge
    count = ROWS * side * side
    grid = torch.tensor([[1, side, side]] * ROWS)
    more = {"image_grid_thw": grid, "image_merge_sizes": torch.tensor([merge] * ROWS)}
    for shape in ((channels * frames * patch * patch,), (channels * patch * patch,), (channels, patch, patch)):
        yield {"pixel_values": inputs.normal(count, *shape), **more}
        yield {"pixel_values": inputs.normal(1, count, *shape), **more}


def _patches_with_places(inputs: _Inputs, vision: list[Any], channels: int) -> Iterator[Media]:
    """Patches of each image with their places in it."""
    patch = _side(vision, PATCH, 16)
    side = 2 * (_first(vision, ("spatial_merge_size", "pooling_kernel_size", "downsample_factor")) or 2)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1).repeat(ROWS, 1, 1)  # column, row
    yield {
        "pixel_values": inputs.normal(ROWS, side * side, channels * patch * patch),
        "image_position_ids": places,
        "pixel_position_ids": places,
        "pixel_attention_mask": torch.ones(ROWS, side * side, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[side, side]] * ROWS),
    }


def _sounds(inputs: _Inputs) -> Iterator[Media]:
    audio = inputs.configs("audio_config", "encoder_config", "audio_encoder_config", "encoder", "speech_config")
    keys = (
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "n_mels",
        "input_dim",
        "feature_size",
    )
    bins = (_first(audio, keys) or 80) * (_first(audio, ("num_stacked_frames",)) or 1)
    positions = _first(audio, ("max_source_positions",))
    most = 2 * positions if positions else 128  # Whisper takes 3000 and no other number
    for steps in dict.fromkeys((most, 128, 256) if most <= 3000 else (128, 256, most)):
        for shape in ((bins, steps), (steps, bins), (steps, 2 * bins), (steps, 4 * bins)):
            ones = torch.ones(ROWS, steps, dtype=torch.int64)
            masks = dict.fromkeys(("input_features_mask", "feature_attention_mask"), ones)
            alone = [] if "input_ids" in inputs.takes else [{"attention_mask": ones, **masks}]
            yield from ({"input_features": inputs.normal(ROWS, *shape), **more} for more in (*alone, masks, {}))
    strides = _first(audio, ("conv_stride",), whole=False)
    samples = FRAMES * (math.prod(strides) if isinstance(strides, (list, tuple)) else 320)
    for sizes in ((samples,), (1, samples)):
        yield {"input_values": inputs.normal(ROWS, *sizes)}
        yield {"input_values": inputs.normal(ROWS, *sizes), "padding_mask": torch.ones(ROWS, samples).bool()}


# ---- reading configs --------------------------------------------------------------------------------------


def _first(configs: list[Any], keys: tuple[str, ...], whole: bool = True) -> Any:
    """The first entry of these keys that a config has; with `whole`, the first whole number."""
    for config in configs:
        for key in keys:
            value = getattr(config, key, None)
            if value is not None and (not whole or (isinstance(value, int) and not isinstance(value, bool))):
                return value
    return None
