"""multi_adapter_linear against LoRA's two batched products and addition. The adapters have the same number of bytes.

LoRA's matrices are already in the order of the batch, so that gathering them takes no time. They are measured in both
layouts: as in PEFT (A [r, in], B [out, r]) and transposed. In bfloat16 they are measured in float32 too, which is how
PEFT makes them; then they have twice the bytes. Floor: reading the bank at the speed of a copy.
"""

import torch
from case import Case

from s2ft.ops import multi_adapter_linear

WIDTH, UNITS, RANK = 2048, 64, 32


def block(rows: int, columns: int, copies: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random numbers, the same for every adapter, because drawing those of 10,000 adapters would take minutes."""
    return torch.randn(rows, columns, device=device).to(dtype).repeat(copies, 1, 1)


def cases(device: str):
    for dtype in (torch.float32, torch.bfloat16):
        for adapters, tokens in ((1, 1), (10, 1), (100, 1), (1000, 1), (10000, 1), (8, 256)):
            yield from cases_of(device, dtype, adapters, tokens)


def cases_of(device: str, dtype: torch.dtype, adapters: int, tokens: int):
    x, y = (torch.randn(adapters, tokens, WIDTH, device=device).to(dtype) for _ in range(2))
    a, b = block(RANK, WIDTH, adapters, dtype, device), block(WIDTH, RANK, adapters, dtype, device)
    values = block(UNITS, WIDTH, adapters, dtype, device).view(-1, WIDTH)
    index = torch.cat([torch.randperm(WIDTH)[:UNITS] for _ in range(adapters)]).to(device)
    offsets = torch.arange(adapters + 1, device=device) * UNITS
    adapter = torch.randperm(adapters, device=device)

    def lora():
        return y + torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))

    def lora_transposed(
        a=a.view(adapters, WIDTH, RANK), b=b.view(adapters, RANK, WIDTH)
    ):  # the values do not matter, only the layout
        return y + torch.bmm(torch.bmm(x, a), b)

    rivals = {"LoRA": lora, "LoRA, transposed": lora_transposed}
    if dtype != torch.float32:
        wide_a, wide_b = a.float(), b.float()

        def lora_float32():
            return y + torch.bmm(torch.bmm(x.float(), wide_a.transpose(1, 2)), wide_b.transpose(1, 2)).to(dtype)

        rivals["LoRA, float32"] = lora_float32
    for dim in (1, 0):

        def ours(dim=dim):
            return multi_adapter_linear(x, y, values, index, offsets, adapter, dim)

        yield Case(
            "multi_adapter_linear",
            f"{str(dtype)[6:]}, {adapters:,} adapters, {tokens} tokens, dim {dim}",
            ours,
            rivals,
            moved=0 if tokens > 1 else values.numel() * values.element_size(),
        )
