"""multi_adapter_linear: every sequence gets the output of the weight that is merged with its own adapter."""

import sys

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import GEMM
from torch.utils._python_dispatch import TorchDispatchMode

from s2ft.ops import multi_adapter_linear, pack_adapters
from s2ft.ops.multi_adapter_linear import reference, without_waiting

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))
SIZES = (3, 0, 1, 8, 17)  # units of each adapter
# leading dimensions of x: decode, prefill, packed tokens, one adapter for many tokens, empty
LEADING = ((7,), (7, 1), (5, 6), (2, 70), (90,), (400,), (3, 2, 2), (0, 4), (4, 0))


class Case:
    """A bank of adapters of different sizes, and a batch that names them."""

    def __init__(
        self, dim, dtype=torch.float64, leading=(7,), inputs=37, outputs=53, sizes=SIZES, device="cpu", names=None
    ):
        size = (outputs, inputs)[dim]
        self.dim, self.dtype = dim, dtype
        self.deltas = [
            (
                torch.randperm(size, device=device)[:n],
                torch.randn((n, inputs) if dim == 0 else (outputs, n), device=device).to(dtype),
            )
            for n in sizes
        ]
        self.bank = pack_adapters(self.deltas, dim)
        self.x = torch.randn(*leading, inputs, device=device).to(dtype).requires_grad_()
        self.y = torch.randn(*leading, outputs, device=device).to(dtype).requires_grad_()
        self.adapter = torch.randint(-1, len(sizes), leading[:1]) if names is None else torch.tensor(names)
        self.adapter = self.adapter.to(device)

    def call(self, x=None, y=None):
        return multi_adapter_linear(
            self.x if x is None else x, self.y if y is None else y, *self.bank, self.adapter, self.dim
        )

    def expected(self):
        """The definition: one sequence at a time, with full delta matrices."""
        rows = []
        for x, y, name in zip(self.x, self.y, self.adapter.tolist()):
            full = torch.zeros(self.y.shape[-1], self.x.shape[-1], dtype=self.dtype, device=self.x.device)
            if name >= 0:
                index, delta = self.deltas[name]
                full.index_copy_(self.dim, index, delta)
            rows.append(y + F.linear(x, full))
        return torch.stack(rows) if rows else self.y * 1


def assert_close(got, expected, dtype):
    rtol, atol = GEMM[dtype]
    largest = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol * max(1, largest))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_equals_each_sequence_by_itself(dim, dtype, leading, device):
    case = Case(dim, dtype, leading, device=device)
    y = case.y.clone()
    with torch.no_grad():
        assert_close(case.call(), case.expected(), dtype)
    assert torch.equal(case.y, y)  # the op returns a new tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("width", (1, 15, 16, 64, 65, 130, 4097))
def test_widths_and_blocks(dim, dtype, width):
    """Whole vectors, remainders, several blocks of outputs or units, and 1 to 4 tokens of one adapter at once."""
    inputs, outputs = (width, 200) if dim == 0 else (200, width)
    case = Case(dim, dtype, (11,), inputs, outputs, (150, 2, 5), names=[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, -1])
    with torch.no_grad():
        assert_close(case.call(), case.expected(), dtype)


@pytest.mark.parametrize("dim", (0, 1))
def test_thousands_of_adapters(dim):
    sizes = torch.randint(0, 9, (3000,)).tolist()
    case = Case(dim, torch.float32, (3000,), 64, 48, sizes, names=torch.randperm(3000).tolist())
    with torch.no_grad():
        assert_close(case.call(), case.expected(), torch.float32)


def test_sequences_without_an_adapter_do_not_change():
    case = Case(1, torch.bfloat16, (4, 3), names=[-1, 0, -1, 1])
    out = case.call()
    assert torch.equal(out[[0, 2, 3]], case.y[[0, 2, 3]])  # adapter 1 is empty


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_kernel_and_reference_agree(dim, dtype):
    case = Case(dim, dtype, (9, 5))
    with torch.no_grad():
        assert_close(case.call(), reference(case.x, case.y, *case.bank, case.adapter, dim), dtype)


WAITING = ("_local_scalar_dense", "nonzero", "unique", "_unique2", "item", "masked_select", "equal", "is_nonzero")


class NoWaiting(TorchDispatchMode):
    """Fails if the host would have to wait for a number from the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function.overloadpacket.__name__ in ("index", "index_put", "index_put_") and any(
            entry is not None and entry.dtype in (torch.bool, torch.uint8) for entry in args[1]
        )
        assert function.overloadpacket.__name__ not in WAITING and not by_mask, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dim", (0, 1))
def test_the_check_for_waiting_can_fail(dim):
    case = Case(dim)
    with torch.no_grad(), NoWaiting(), pytest.raises(AssertionError, match="unique"):
        reference(case.x, case.y, *case.bank, case.adapter, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize(
    "leading, sizes",
    (
        ((7,), SIZES),
        ((5, 6), SIZES),
        ((3, 2, 2), SIZES),
        ((0, 4), SIZES),
        ((4, 0), SIZES),
        ((3, 2), ()),
        ((3, 2), (0, 0)),
        ((3,), (30,) * 40),
        ((2, 300), (30,) * 40),
    ),
    ids=str,
)  # the last two have so many units that each sequence gathers its own
def test_the_reference_for_a_gpu_does_not_wait(dim, dtype, leading, sizes):
    case = Case(dim, dtype, leading, sizes=sizes or SIZES)
    if not sizes:
        case.bank, case.deltas = (case.bank[0][:0], case.bank[1][:0], torch.tensor([0])), []
        case.adapter = torch.full(leading[:1], -1)
    with torch.no_grad():
        y = case.y.clone()
        with NoWaiting():
            out = without_waiting(case.x, case.y, *case.bank, case.adapter, dim)
        assert_close(out, case.expected(), dtype)
        assert torch.equal(case.y, y)


@pytest.mark.parametrize("dim", (0, 1))
def test_the_reference_for_a_gpu_in_pieces(dim, monkeypatch):
    monkeypatch.setattr(sys.modules[without_waiting.__module__], "PIECE", 45)
    case = Case(dim, torch.float32, (3, 2))
    with torch.no_grad():
        assert_close(without_waiting(case.x, case.y, *case.bank, case.adapter, dim), case.expected(), torch.float32)


@pytest.mark.parametrize("count", (4, 40))  # adapters: 4 take one product, 40 take a product for each sequence
@pytest.mark.parametrize("dim", (0, 1))
def test_the_reference_for_a_gpu_skips_numbers_out_of_range(dim, count):
    case = Case(dim, torch.float32, (5, 2), sizes=(30,) * count, names=[0, 1, 2, 3, -1])
    values, index, offsets = (tensor.clone() for tensor in case.bank)
    case.adapter[[2, 3]] = torch.tensor([count, -5])
    index[[0, 3]] = torch.tensor([-1, 999])
    with torch.no_grad():
        out = without_waiting(case.x, case.y, values, index, offsets, case.adapter, dim)
        where, delta = case.deltas[0]
        kept = torch.tensor([unit not in (0, 3) for unit in range(30)])
        case.deltas[0] = where[kept], delta.transpose(0, dim)[kept].transpose(0, dim)
        case.adapter[[2, 3]] = -1
        assert_close(out, case.expected(), torch.float32)
        offsets[1:3] = torch.tensor([99999, 7])  # adapters 0 to 2 have no valid range
        assert torch.equal(without_waiting(case.x, case.y, *case.bank[:2], offsets, case.adapter, dim)[:2], case.y[:2])


@pytest.mark.parametrize("count", (4, 40))
@pytest.mark.parametrize("dim", (0, 1))
def test_nan_in_one_adapter_does_not_change_other_sequences(dim, count):
    case = Case(dim, torch.float32, (4, 2), sizes=(30,) * count, names=[0, 1, -1, 2])
    values = case.bank[0].clone()
    values[30:60, 3] = float("nan")
    with torch.no_grad():
        out = without_waiting(case.x, case.y, values, *case.bank[1:], case.adapter, dim)
        assert_close(out[[0, 2, 3]], case.expected()[[0, 2, 3]], torch.float32)
    assert out[1].isnan().any()


@pytest.mark.parametrize("dim", (0, 1))
def test_layouts(dim):
    case = Case(dim, torch.float32, (6, 4))
    x, y = case.x.detach(), case.y.detach()
    strided = x.repeat_interleave(2, -1)[..., ::2], y.transpose(0, 1).contiguous().transpose(0, 1)
    case.bank = tuple(t.repeat_interleave(2, 0)[::2] for t in case.bank)
    case.adapter = case.adapter.repeat_interleave(3)[::3]
    assert_close(case.call(*strided), case.call(x, y), torch.float32)


@pytest.mark.parametrize("dim", (0, 1))
def test_gradcheck_opcheck_compile(dim):
    case = Case(dim, leading=(4, 2))
    assert torch.autograd.gradcheck(case.call, (case.x, case.y))
    assert torch.autograd.gradgradcheck(case.call, (case.x, case.y))
    torch.library.opcheck(torch.ops.s2ft.multi_adapter_linear.default, (case.x, case.y, *case.bank, case.adapter, dim))
    compiled = torch.compile(lambda x, y: case.call(x, y) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.x, case.y), case.call() * 2)
    compiled(case.x, case.y).sum().backward()
    with torch.no_grad():
        assert torch.equal(torch.compile(case.call, fullgraph=True, backend="aot_eager")(case.x, case.y), case.call())


@pytest.mark.parametrize("dim", (0, 1))
def test_autocast_uses_the_dtype_of_y(dim):
    case = Case(dim, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.call(x=case.x.float())
    assert out.dtype is torch.bfloat16
    assert_close(out, case.call(), torch.bfloat16)


BAD = {
    "adapter high": (dict(adapter=torch.tensor([0, 5])), "adapter has 5, outside -1..4"),
    "adapter low": (dict(adapter=torch.tensor([0, -2])), "adapter has -2"),
    "adapter length": (dict(adapter=torch.tensor([0])), "adapter must"),
    "index high": (dict(index=torch.full((29,), 99)), "index has 99"),
    "index low": (dict(index=torch.full((29,), -1)), "index has -1"),
    "offsets": (dict(offsets=torch.tensor([0, 3, 3, 4, 12, 99])), "offsets of adapter 4 are 12 and 99"),
    "offsets reversed": (dict(offsets=torch.tensor([3, 0, 3, 4, 12, 29])), "offsets of adapter 0 are 3 and 0"),
    "values": (dict(values=torch.ones(29, 5)), "values .* shape"),
    "y": (dict(y=torch.ones(3, 53)), "shape"),
    "dim": (dict(dim=2), "dim must be 0"),
    "gradient": (dict(values=torch.ones(29, 53, requires_grad=True)), "a bank is frozen"),
}


@pytest.mark.parametrize("compiled", (True, False), ids=("kernel", "reference"))
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad, compiled):
    case = Case(1, torch.float32, (2,), names=[0, 4])
    values, index, offsets = case.bank
    args = dict(
        x=case.x.detach(), y=case.y.detach(), values=values, index=index, offsets=offsets, adapter=case.adapter, dim=1
    )
    change, message = BAD[bad]
    if not compiled and bad == "gradient":
        pytest.skip("the public function's own check")
    with pytest.raises(ValueError, match=message):
        (multi_adapter_linear if compiled else reference)(**{**args, **change})


def test_mixed_dtypes_raise():
    case = Case(0, torch.float32)
    with pytest.raises(TypeError, match="give all one dtype"):
        case.call(x=case.x.bfloat16())


def test_pack_adapters_refuses_an_index_of_another_length():
    with pytest.raises(ValueError, match=r"index must have shape \(4,\)"):
        pack_adapters([(torch.arange(3), torch.ones(5, 4))], 1)
