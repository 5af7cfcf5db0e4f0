"""Tokens of the base in a batch with adapters, with a stand-in of vLLM's wrapper for processors."""

import sys
from types import ModuleType

import torch
from support.inside import base_rows


class PunicaWrapperCPU:
    """Takes the slot -1 as the last one, as vLLM's does."""

    token_lora_indices = torch.tensor([1, -1, 0, -1])

    def _shrink_prefill(self, y, x, w_t_all, scale):
        y.copy_(scale * torch.einsum("bi,bri->br", x, w_t_all[self.token_lora_indices]))

    _shrink_decode = _shrink_prefill


def test_tokens_of_the_base_get_no_adapter(monkeypatch):
    module = ModuleType(base_rows.MODULE)
    module.PunicaWrapperCPU = PunicaWrapperCPU
    monkeypatch.setitem(sys.modules, base_rows.MODULE, module)
    x, a, wrapper = torch.randn(4, 8), torch.randn(2, 3, 8), PunicaWrapperCPU()
    before, after = torch.empty(4, 3), torch.empty(4, 3)
    wrapper._shrink_decode(before, x, a, 2.0)
    assert before[1].any()
    base_rows.install()
    for shrink in (wrapper._shrink_prefill, wrapper._shrink_decode):
        shrink(after.fill_(1), x, a, 2.0)
        assert torch.equal(after[[0, 2]], before[[0, 2]]) and not after[[1, 3]].any()
