"""s2ft: fine-tune large models by structured sparsity (S²FT, NeurIPS 2024, arXiv 2412.06289)."""
from s2ft._build import build_info
from s2ft.version import __version__
from s2ft import ops
from s2ft.adapter import (Adapter, AdapterBank, delete_adapter, disable_adapters, export_lora, fuse_adapters,
                          get_adapter, import_lora, list_adapters, load_adapter, push_to_hub, read_adapter,
                          rename_adapter, save_adapter, set_adapter, status)
from s2ft.arch import register_architecture
from s2ft.config import S2FTConfig
from s2ft.convert import attach, detach, fuse, merge, plan, select, unfuse
from s2ft.coupling import Coupling, Projection, Vector
from s2ft.estimate import Estimate, estimate
from s2ft.layers import S2ColumnLinear, S2RowLinear
from s2ft.ops._lock import stable_weights
from s2ft.report import print_trainable_parameters
from s2ft.selection import Selection

__all__ = ["Adapter", "AdapterBank", "Coupling", "Estimate", "Projection", "S2ColumnLinear", "S2FTConfig",
           "S2RowLinear", "Selection", "Vector", "__version__", "attach", "build_info", "delete_adapter", "detach",
           "disable_adapters", "estimate", "export_lora", "fuse", "fuse_adapters", "get_adapter", "import_lora",
           "list_adapters", "load_adapter", "merge", "ops", "plan", "print_trainable_parameters", "push_to_hub",
           "read_adapter", "register_architecture", "rename_adapter", "save_adapter", "select", "set_adapter",
           "stable_weights", "status", "unfuse"]
