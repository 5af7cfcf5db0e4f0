"""s2ft: fine-tune large models by structured sparsity (S²FT, NeurIPS 2024, arXiv 2412.06289)."""
from s2ft._build import build_info
from s2ft.version import __version__
from s2ft import ops
from s2ft.adapter import load_adapter, save_adapter, set_adapter, status
from s2ft.arch import register_architecture
from s2ft.config import S2FTConfig
from s2ft.convert import attach, detach, fuse, merge, plan, select, unfuse
from s2ft.coupling import Coupling, Projection, Vector
from s2ft.layers import S2ColumnLinear, S2RowLinear
from s2ft.selection import Selection

__all__ = ["Coupling", "Projection", "S2ColumnLinear", "S2FTConfig", "S2RowLinear", "Selection", "Vector",
           "__version__", "attach", "build_info", "detach", "fuse", "load_adapter", "merge", "ops", "plan",
           "register_architecture", "save_adapter", "select", "set_adapter", "status", "unfuse"]
