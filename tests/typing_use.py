"""The public API as a program with strict types uses it. `make types` checks this file; nothing runs it."""

from pathlib import Path

import torch
from torch import Tensor, nn

import s2ft


def one_adapter(model: nn.Module, input_ids: Tensor, folder: Path) -> nn.Module:
    config = s2ft.S2FTConfig(d_ratio=0.03, o_ratio=0.25, selection="weight", layout="permuted")
    share: float = s2ft.plan(model, config).share
    selection: s2ft.Selection = s2ft.select(model, config)
    trained: int = s2ft.attach(model, s2ft.S2FTConfig(units=selection.to_dict()), name="math").trainable
    rate: float = s2ft.suggested_rate(model, updates=100)
    s2ft.print_trainable_parameters(model)
    s2ft.save_adapter(model, folder)
    s2ft.detach(model)
    print(s2ft.load_adapter(model, folder, name="again").share, rate)
    s2ft.set_adapter(model, "again")
    s2ft.set_adapter(model, {"again": 0.5})
    s2ft.set_adapter(model, None)
    s2ft.set_rounding(model, 0.5)
    with s2ft.disable_adapters(model):
        model(input_ids)
    names: list[str] = s2ft.list_adapters(model)
    adapter: s2ft.Adapter = s2ft.get_adapter(model, names[0])
    s2ft.rename_adapter(model, "again", "math")
    print(s2ft.status(model), share, trained, adapter)
    s2ft.freeze_adapter(model)
    s2ft.delete_adapter(model, "math")
    s2ft.save_merged(model, folder / "merged", base="org/base", max_shard_size="2GB")
    return s2ft.merge(model)


def on_the_meta_device(model: nn.Module, folder: Path) -> s2ft.Selection:
    with s2ft.weights_on_disk(model, folder) as same:
        return s2ft.select(same, s2ft.S2FTConfig(d_ratio=0.03, selection="weight"))


@s2ft.register_architecture("my_model")
def couplings(model: nn.Module) -> list[s2ft.Coupling]:
    alone = s2ft.Coupling.one_sided(0, path="head", count=8, side="outputs")
    return [s2ft.Coupling.ffn(0, up="up", down="down", channels=32), alone]


def many_adapters(model: nn.Module, folder: Path) -> None:
    bank = s2ft.AdapterBank(model)
    first: s2ft.Adapter = s2ft.read_adapter(folder / "a")
    bank.add(first.name, folder / "a")
    bank.check(folder / "b")
    s2ft.combine_adapters(model, {"a": 0.5, "b": 0.5}, name="both")
    s2ft.export_lora(model, folder / "lora")
    s2ft.import_lora(model, folder / "lora", name="lora")
    print(s2ft.push_to_hub(model, "someone/adapter"), s2ft.__version__)


def layers_and_ops() -> Tensor:
    rows = s2ft.S2ColumnLinear(8, 16, start=0, end=4)
    columns = s2ft.S2RowLinear(16, 8, start=0, end=4, delta_dtype=torch.float32)
    x: Tensor = columns(rows(torch.randn(2, 8)))
    return s2ft.ops.act_mul(x, x, "silu")


def memory(model: nn.Module) -> int:
    spread: s2ft.Strategy = s2ft.Strategy("fsdp2", offload="all")
    found: s2ft.Estimate = s2ft.estimate(
        model, s2ft.S2FTConfig(d_ratio=0.1), batch=1, length=128, strategy=spread, devices=2
    )
    info: dict[str, object] = s2ft.build_info()
    return found.parameters + len(info)
