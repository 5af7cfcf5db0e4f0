"""Codecs: one table of formats, one test for each hazard."""

from functools import partial

import pytest
import torch
from support.inside import TYPES_OF_GGUF, Nf4, codec_of
from support.models import model_of

import s2ft

OUTPUTS, INPUTS = 16, 512
FLOAT8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- formats: a codec and random files ---------------------------------------------------------------------


def random_bytes(shape, generator):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def float8(shape, generator):
    found = random_bytes(shape, generator)
    return torch.where((found & 0x7F) == 0x7F, 0, found).view(FLOAT8)  # no NaN


def words(shape, generator):
    return random_bytes((*shape[:-1], shape[-1] * 4), generator).view(torch.int32)


def gguf_file(name, generator, dtype):
    codec = TYPES_OF_GGUF[name]
    return codec, random_bytes((OUTPUTS, codec.size * INPUTS // (256 if name.endswith("_K") else 32)), generator)


def fp8_file(strategy, shape, generator, dtype, tile=None):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": tile}
    scale = torch.rand(shape, generator=generator).to(dtype) + 0.01
    return codec_of(weights), {"weight": float8((OUTPUTS, INPUTS), generator), "weight_scale": scale}


def nvfp4_file(generator, dtype):
    return codec_of({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}), {
        "weight_packed": random_bytes((OUTPUTS, INPUTS // 2), generator),
        "weight_scale": (float8((OUTPUTS, INPUTS // 16), generator).view(torch.uint8) & 0x7F).view(FLOAT8),
        "weight_global_scale": torch.rand(1, generator=generator) * 1000 + 1,
    }


def integer_file(bits, group, generator, dtype, symmetric=True):
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    packed = {
        "weight_packed": words((OUTPUTS, INPUTS * bits // 32), generator),
        "weight_scale": torch.rand((OUTPUTS, INPUTS // group), generator=generator).to(dtype) + 0.01,
        "weight_shape": torch.tensor([OUTPUTS, INPUTS]),
    }
    if not symmetric:
        packed["weight_zero_point"] = words((OUTPUTS * bits // 32, INPUTS // group), generator)
    return codec_of(weights), packed


def int8_file(generator, dtype):
    scale = torch.rand((OUTPUTS, 1), generator=generator).to(dtype) + 0.01
    weight = random_bytes((OUTPUTS, INPUTS), generator).view(torch.int8)
    return codec_of({"num_bits": 8, "type": "int", "strategy": "channel"}), {"weight": weight, "weight_scale": scale}


def nf4_file(nested, generator, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn((OUTPUTS, INPUTS), generator=generator).to(dtype)
    packed, state = functional.quantize_4bit(values, quant_type="nf4", compress_statistics=nested)
    found = {"weight": packed, **state.as_dict(packed=True)}
    if not nested:  # so that the largest value of a block does not tell the scale
        found["absmax"] = found["absmax"] * (1 + torch.rand(found["absmax"].shape, generator=generator))
    return Nf4(found), found


FORMATS = {
    **{name: partial(gguf_file, name) for name in TYPES_OF_GGUF},
    "fp8 by tensor": partial(fp8_file, "tensor", (1,)),
    "fp8 by channel": partial(fp8_file, "channel", (OUTPUTS, 1)),
    "fp8 by block": partial(fp8_file, "block", (2, 6), tile=(10, 100)),
    "nvfp4": nvfp4_file,
    "int4 by group": partial(integer_file, 4, 128),
    "int4 with zeros": partial(integer_file, 4, 32, symmetric=False),
    "int8 by group": partial(integer_file, 8, 64),
    "int8 by channel": int8_file,
    "nf4": partial(nf4_file, False),
    "nf4 nested": partial(nf4_file, True),
}
# Bytes of a file that no encoding changes: of a block of GGUF the first and last byte, else the tensors' names.
SHARED = {
    "Q4_K": (0, 16),
    "Q5_K": (0, 16),
    "Q6_K": (192, 210),
    "fp8 by tensor": ["weight_scale"],
    "fp8 by channel": ["weight_scale"],
    "fp8 by block": ["weight_scale"],
    "nvfp4": ["weight_global_scale"],
    "int4 by group": ["weight_shape"],
    "int4 with zeros": ["weight_zero_point"],
    "int8 by channel": ["weight_scale"],
    "nf4 nested": ["absmax", "nested_absmax", "nested_quant_map", "quant_map"],
}
every_format = pytest.mark.parametrize("name", FORMATS)


def made(name, dtype=torch.bfloat16, seed=0):
    """A codec and a file all of whose values are finite."""
    codec, packed = FORMATS[name](torch.Generator().manual_seed(seed), dtype)
    if isinstance(packed, torch.Tensor):  # the scales of random bytes are any number
        packed = sane(codec, packed)
    assert codec.decode(packed).isfinite().all()
    return codec, packed


def sane(codec, packed):
    """GGUF bytes with scales between 0.5 and 1, and positive and negative ones."""
    data = packed.unflatten(-1, (-1, codec.size)).clone()
    places = {"MXFP4": [], "Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q4_1": [0, 2], "Q5_1": [0, 2]}
    for place in places.get(codec.name, [0]):
        half = data[..., place : place + 2].contiguous().view(torch.int16) & -0x7C01 | 0x3800
        data[..., place : place + 2] = half.view(torch.uint8)
    if codec.name == "MXFP4":
        data[..., 0] = 126 + data[..., 0] % 4
    return data.flatten(-2)


def tensors(packed):
    return packed if isinstance(packed, dict) else {"": packed}


def same(one, other):
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(
        value.dtype == other[key].dtype and torch.equal(value.view(torch.uint8), other[key].view(torch.uint8))
        for key, value in one.items()
    )


def encoded(codec, values, packed):
    return codec.pack(codec.nearest(values, codec.unpack(packed)), packed)


def moved(codec, packed, size=0.3, seed=1):
    """The values of a file, each moved by a share of the values' size."""
    values = codec.decode(packed).float()
    return values + size * values.std() * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))


# ---- decode equals the format's own library ------------------------------------------------------------


def equal_bits(got, expected):
    """Whether numbers are equal bit for bit. A NaN is any NaN."""
    number = ~expected.isnan()
    kind = torch.int32 if expected.dtype == torch.float32 else torch.int16
    return (
        got.dtype == expected.dtype
        and torch.equal(got.isnan(), ~number)
        and torch.equal(got.view(kind)[number], expected.view(kind)[number])
    )


@pytest.mark.parametrize("name", TYPES_OF_GGUF)
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
def test_gguf_decodes_as_its_library(name):
    import gguf

    codec, packed = FORMATS[name](torch.Generator().manual_seed(0), None)
    kind = gguf.GGMLQuantizationType[name]
    ends = torch.stack([torch.full_like(packed[0], value) for value in (0, 0x7B, 0x80, 0xFF)])
    packed = torch.cat([packed, sane(codec, packed), ends])
    assert equal_bits(codec.decode(packed), torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind)))


COMPRESSED = {
    "fp8 by tensor": "float-quantized",
    "fp8 by channel": "float-quantized",
    "fp8 by block": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "int4 by group": "pack-quantized",
    "int4 with zeros": "pack-quantized",
    "int8 by group": "pack-quantized",
    "int8 by channel": "int-quantized",
}
ARGUMENTS = {
    "fp8 by tensor": dict(num_bits=8, type="float", strategy="tensor"),
    "fp8 by channel": dict(num_bits=8, type="float", strategy="channel"),
    "fp8 by block": dict(num_bits=8, type="float", strategy="block", block_structure=[10, 100]),
    "nvfp4": dict(num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "int4 by group": dict(num_bits=4, type="int", strategy="group", group_size=128),
    "int4 with zeros": dict(num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
    "int8 by group": dict(num_bits=8, type="int", strategy="group", group_size=64),
    "int8 by channel": dict(num_bits=8, type="int", strategy="channel"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_decode_as_their_library(name, dtype):
    base = pytest.importorskip("compressed_tensors.compressors.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = quantization.QuantizationArgs(**ARGUMENTS[name])
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    codec, packed = made(name, dtype)
    library = base.BaseCompressor.get_value_from_registry(COMPRESSED[name])
    assert equal_bits(codec.decode(packed), library.decompress(packed, scheme)["weight"])
    assert type(codec_of(arguments.model_dump())) is type(codec)  # what a checkpoint's config has


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "nf4 nested"])
def test_nf4_decodes_as_its_library(name, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    codec, packed = made(name, dtype)
    state = {key: value for key, value in packed.items() if key != "weight"}
    state = functional.QuantState.from_dict(state, torch.device("cpu"))
    assert equal_bits(codec.decode(packed), functional.dequantize_4bit(packed["weight"], state))


# ---- encode ----------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_decoded_is_encoded_to_the_same_bytes(name, dtype):
    codec, packed = FORMATS[name](torch.Generator().manual_seed(2), dtype)
    if isinstance(packed, torch.Tensor):
        packed = packed.repeat(8, 1) ^ random_bytes((8 * OUTPUTS, packed.shape[1]), torch.Generator().manual_seed(3))
        packed = packed[codec.decode(packed).isfinite().all(1)]
        assert len(packed)
    assert same(encoded(codec, codec.decode(packed), packed), packed)


@every_format
@pytest.mark.parametrize("size", [0.01, 0.3, 10.0])
def test_no_other_code_is_nearer(name, size):
    codec, packed = made(name)
    values = moved(codec, packed, size)
    blocks = codec.unpack(encoded(codec, values, packed))
    distance = (codec.scaled(codec.levels[blocks.codes.int()], blocks.scales).float().flatten(-2) - values).abs()
    for level in codec.levels[codec.levels.isfinite()]:
        other = codec.scaled(torch.full(blocks.codes.shape, float(level)), blocks.scales).float().flatten(-2)
        assert (distance <= (other - values).abs()).all(), float(level)


@every_format
def test_scales_of_a_block_are_changed_for_the_better(name):
    codec, packed = made(name)
    values = moved(codec, packed) * 4  # out of the range of the present scales
    before = codec.unpack(packed)
    shape = before.codes.shape
    distances = torch.stack(
        [
            (codec.scaled(torch.full(shape, float(level)), before.scales).float() - values.view(shape)).abs()
            for level in codec.levels[codec.levels.isfinite()]
        ]
    )
    kept = distances.amin(0).square().sum(-1)  # the least error without other scales
    error = (codec.decode(encoded(codec, values, packed)).float() - values).view(shape).square().sum(-1)
    assert (error <= kept * (1 + 1e-6)).all() and (codec.block > 1) == bool((error < kept * 0.99).any())


@every_format
@pytest.mark.parametrize("values", ["zeros", "one value", "huge", "tiny", "one of them"])
def test_blocks_at_the_edge(name, values):
    codec, packed = made(name)
    now = codec.decode(packed).float()
    values = {
        "zeros": torch.zeros_like(now),
        "one value": torch.full_like(now, 0.37),
        "huge": now.sign() * 1e30,
        "tiny": now.sign() * 1e-30,
        "one of them": torch.zeros_like(now).index_fill_(1, torch.tensor([5]), 3.0),
    }[values]
    got = codec.decode(encoded(codec, values, packed)).float()
    assert got.isfinite().all() and ((got - values).norm() <= (now - values).norm()).item()
    if codec.block > 1 and values.abs().max() < 1e10 and name != "int4 with zeros":  # zero points stay
        assert ((got - values).norm() <= 0.3 * values.norm() + 1e-6).item()


@pytest.mark.parametrize("name", SHARED)
def test_what_blocks_share_stays(name):
    codec, packed = made(name)
    found = encoded(codec, moved(codec, packed, 10.0), packed)
    if isinstance(packed, torch.Tensor):
        first, end = SHARED[name]
        one, other = (data.unflatten(-1, (-1, codec.size)) for data in (packed, found))
        assert torch.equal(one[..., first:end], other[..., first:end])
    else:
        assert all(same(packed[key], found[key]) for key in SHARED[name])
    assert not same(packed, found)


@pytest.mark.parametrize(
    "changes", [{"num_bits": 3}, {"actorder": "group"}, {"strategy": "token"}, {"type": "float", "group_size": 32}]
)
def test_a_format_without_a_codec_is_refused(changes):
    with pytest.raises(ValueError, match="NVFP4, and INT4 and INT8"):
        codec_of({**ARGUMENTS["int4 by group"], **changes})
    codec_of({**ARGUMENTS["int4 by group"], "actorder": "static"})  # changes the calibration alone


# ---- some rows or columns ------------------------------------------------------------------------------------

SOME = {
    "rows": (torch.tensor([1, 2, 9]), 0),
    "whole blocks of columns": (torch.cat([torch.arange(128, 256), torch.arange(384, 512)]), 1),
    "single columns": (torch.tensor([0, 3, 40, 41, 300]), 1),
}


@every_format
@pytest.mark.parametrize("some", SOME)
def test_some_units_change_and_no_others(name, some):
    index, dim = SOME[some]
    codec, packed = made(name)
    blocks = codec.unpack(packed)
    part = blocks.take(index, dim)
    assert torch.equal(codec.values(part), codec.decode(packed).index_select(dim, index))
    values = moved(codec, packed).index_select(dim, index)
    new = codec.nearest(values, part)
    changed = codec.pack(blocks.put(index, dim, new), packed)
    got, others = codec.decode(changed), torch.ones(codec.decode(packed).shape[dim], dtype=torch.bool)
    others[index] = False
    assert torch.equal(got.index_select(dim, index), codec.values(new))
    assert not torch.equal(codec.values(new), codec.values(part))
    left = others.nonzero().squeeze(1)
    assert torch.equal(got.index_select(dim, left), codec.decode(packed).index_select(dim, left))
    assert same(codec.pack(codec.unpack(packed), packed), packed)
    if isinstance(packed, torch.Tensor):  # in another order in memory
        assert same(codec.added(packed.t().contiguous().t(), index, dim, values - codec.values(part).float()), changed)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_weight_of_one_block_is_changed(dim):
    codec = TYPES_OF_GGUF["Q4_1"]
    packed = sane(codec, random_bytes((1, codec.size), torch.Generator().manual_seed(0)))
    values, index = moved(codec, packed, 5.0), torch.arange(32 if dim else 1)
    found = codec.added(packed, index, dim, values - codec.decode(packed))
    assert same(found, encoded(codec, values, packed)) and not same(found, packed)


@every_format
def test_single_columns_keep_the_scales(name):
    codec, packed = made(name)
    blocks, (index, dim) = codec.unpack(packed), SOME["single columns"]
    part = blocks.take(index, dim)
    new = codec.nearest(codec.values(part).float() * 3, part)
    assert all(torch.equal(one, other) for one, other in zip(new.scales, part.scales))


@every_format
def test_a_value_that_is_no_number_keeps_its_code(name):
    """Training goes on to a loss of NaN, which the trainer reports; the codec does not stop it at every step."""
    codec, packed = made(name)
    blocks, values = codec.unpack(packed), codec.decode(packed).float()
    values[:] = float("nan")
    new = codec.nearest(values, blocks)
    assert torch.equal(new.codes, blocks.codes)
    assert all(torch.equal(one, other) for one, other in zip(new.scales, blocks.scales))


def test_nf4_blocks_of_two_outputs_are_refused():
    packed, state = pytest.importorskip("bitsandbytes.functional").quantize_4bit(torch.randn(4, 96), quant_type="nf4")
    with pytest.raises(ValueError, match="whole blocks of 64 weights, got 96"):
        Nf4({"weight": packed, **state.as_dict(packed=True)})


def test_a_codec_that_has_no_packed_base_says_so(caplog):
    s2ft.attach(model_of("llama"), s2ft.S2FTConfig(d_ratio=0.2, codec="auto"))
    assert "codec='auto' does nothing here" in caplog.text
