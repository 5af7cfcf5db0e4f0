"""The Triton kernels of multi_adapter_linear equal its definition."""

import pytest
import torch
from support import triton_device
from support.tolerances import GEMM

from s2ft.ops import pack_adapters
from s2ft.ops.multi_adapter_linear import reference

pytestmark = triton_device.marks

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

both_dims = pytest.mark.parametrize("dim", (0, 1))


@pytest.fixture(scope="module")
def add():
    """Calls the kernel; tensors may be anywhere, and the result is on the CPU."""
    kernel = triton_device.kernels()["multi_adapter_linear"]

    def run(*tensors, dim):
        return kernel(*[t.to(triton_device.DEVICE) for t in tensors], dim).cpu()

    return run


def bank_of(dim, dtype, inputs, outputs, sizes):
    size = (outputs, inputs)[dim]
    return pack_adapters(
        [(torch.randperm(size)[:n], torch.randn((n, inputs) if dim == 0 else (outputs, n)).to(dtype)) for n in sizes],
        dim,
    )


def check(out, x, y, bank, adapter, dim):
    rtol, atol = GEMM[x.dtype]
    for wide in (x.dtype, torch.float64):
        values, *rest = bank
        expected = reference(x.to(wide), y.to(wide), values.to(wide), *rest, adapter, dim)
        scale = max(1, expected.abs().max().item()) if expected.numel() else 1
        torch.testing.assert_close(out, expected.to(x.dtype), rtol=rtol, atol=atol * scale)


@both_dims
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", (1, 3, 9, 70))  # one by one; less than a tile; several tiles and a remainder
def test_adds_each_sequences_adapter(add, dim, dtype, tokens):
    # The adapters have more units than a step, none, one and a few. The widths are less than a step, odd and several.
    for inputs, outputs in ((48, 56), (37, 145), (130, 45)) if tokens < 70 else ((37, 145),):
        bank = bank_of(dim, dtype, inputs, outputs, (34, 0, 1, 7))
        x, y = torch.randn(6, tokens, inputs).to(dtype), torch.randn(6, tokens, outputs).to(dtype)
        adapter = torch.tensor([3, 0, -1, 1, 0, 2])
        out = add(x, y, *bank, adapter, dim=dim)
        check(out, x, y, bank, adapter, dim)
        assert torch.equal(out[[2, 3]], y[[2, 3]])


@both_dims
@pytest.mark.parametrize("leading", ((7,), (3, 2, 5), (0, 4), (4, 0)), ids=str)
def test_leading_dimensions(add, dim, leading):
    bank = bank_of(dim, torch.float32, 12, 20, (3, 5))
    x, y = torch.randn(*leading, 12), torch.randn(*leading, 20)
    adapter = torch.randint(-1, 2, leading[:1])
    out = add(x, y, *bank, adapter, dim=dim)
    assert out.shape == y.shape
    check(out, x, y, bank, adapter, dim)


@both_dims
def test_a_program_takes_several_shares_of_the_units(add, dim, monkeypatch):
    monkeypatch.setattr("s2ft.ops._triton.multi_adapter_linear.PROGRAMS", 5)
    bank = bank_of(dim, torch.float32, 200, 210, (190, 60))
    for tokens in (1, 20):
        x, y, adapter = torch.randn(2, tokens, 200), torch.randn(2, tokens, 210), torch.tensor([0, 1])
        check(add(x, y, *bank, adapter, dim=dim), x, y, bank, adapter, dim)


@pytest.mark.parametrize(
    "dim, bank", [(d, b) for d in (0, 1) for b in ("no units", "no adapters")] + [(0, "no inputs")]
)
def test_empty_banks(add, dim, bank):
    inputs = 0 if bank == "no inputs" else 16
    x, y, adapter = torch.randn(2, 1, inputs), torch.randn(2, 1, 16), torch.tensor([0, -1])
    if bank == "no adapters":
        packed = torch.empty(0, 16), torch.empty(0, dtype=torch.int64), torch.tensor([0])
        adapter[0] = -1
    else:
        packed = bank_of(dim, torch.float32, inputs, 16, (0, 0) if bank == "no units" else (3,))
    assert torch.equal(add(x, y, *packed, adapter, dim=dim), y)


@both_dims
@pytest.mark.parametrize("tokens", (1, 6))
def test_units_and_adapters_out_of_range_add_nothing(add, dim, tokens):
    values, index, offsets = bank_of(dim, torch.float32, 16, 16, (3, 2))
    index[:] = torch.tensor([99, 4, -1, 2, 7])
    values[[0, 2]] = float("nan")  # of units that must not count
    x, y = torch.randn(4, tokens, 16), torch.randn(4, tokens, 16)
    out = add(x, y, values, index, offsets, torch.tensor([2, 0, -7, 1]), dim=dim)
    assert torch.equal(out[[0, 2]], y[[0, 2]])  # no such adapter
    one = pack_adapters([(index[1:2], values[1:2] if dim == 0 else values[1:2].t())], dim)
    torch.testing.assert_close(out[1:2], reference(x[1:2], y[1:2], *one, torch.tensor([0]), dim))


@pytest.mark.parametrize("offsets", ([0, 99], [-1, 3], [3, 0]), ids=str)
def test_offsets_out_of_range_add_nothing(add, offsets):
    values, index, _ = bank_of(1, torch.float32, 16, 16, (3,))
    for tokens in (1, 5):
        x, y = torch.randn(1, tokens, 16), torch.randn(1, tokens, 16)
        assert torch.equal(add(x, y, values, index, torch.tensor(offsets), torch.tensor([0]), dim=1), y)


@both_dims
def test_nan_in_one_adapter_does_not_change_other_sequences(add, dim):
    bank = bank_of(dim, torch.float32, 16, 16, (5, 5))
    bank[0][5:, 3] = float("nan")
    for tokens in (1, 5):
        x, y, adapter = torch.randn(3, tokens, 16), torch.randn(3, tokens, 16), torch.tensor([0, 1, -1])
        out = add(x, y, *bank, adapter, dim=dim)
        assert out[[0, 2]].isfinite().all() and out[1].isnan().any()


@both_dims
def test_layouts(add, dim):
    bank = bank_of(dim, torch.float32, 12, 20, (4, 6))
    strided = tuple(t.repeat_interleave(2, 0)[::2] for t in bank)
    x, y = torch.randn(12, 5, 3).permute(2, 1, 0), torch.randn(5, 3, 40).transpose(0, 1)[..., ::2]
    adapter = torch.tensor([1, 9, 0, 9, -1, 9])[::2]
    check(add(x, y, *strided, adapter, dim=dim), x, y, bank, adapter, dim)
