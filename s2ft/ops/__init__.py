"""The operators of s2ft.

Each file defines one operator: its schema, its reference in PyTorch, its shape function for torch.compile, its gradient
and its public function. The compiled kernels in csrc/ are registered under the same names.

Kernels and references check their arguments, and raise ValueError; from PyTorch 2.15 on errors of compiled kernels come
as RuntimeError with the same message. A public function checks only what a kernel can't: on a GPU, the entries
of the index of an op that changes a weight.
"""

from s2ft.ops._build import load
from s2ft.ops.act_mul import act_mul
from s2ft.ops.in_place import Slice, effective_units, permute_, scatter_add_, swap_, write_slices_
from s2ft.ops.multi_adapter_linear import multi_adapter_linear, pack_adapters
from s2ft.ops.sliced import indexed_linear, sliced_linear

load()  # the compiled kernels, if there are any

__all__ = [
    "Slice",
    "act_mul",
    "effective_units",
    "indexed_linear",
    "multi_adapter_linear",
    "pack_adapters",
    "permute_",
    "scatter_add_",
    "sliced_linear",
    "swap_",
    "write_slices_",
]
