"""Between a model's adapters and the folders of other tools."""

from collections.abc import Sequence

from torch import nn

from s2ft.adapter.formats import lora
from s2ft.adapter.loading import load_adapter
from s2ft.adapter.switch import get_adapter
from s2ft.attached.hosts.compiled import of_compiled
from s2ft.attached.record import attachment_of
from s2ft.model.coupling import Coupling


@of_compiled
def export_lora(
    model: nn.Module, directory, name: str | None = None, rank: int | None = None, rank_pattern: bool = False
) -> None:
    """Save one adapter of `model` as a LoRA folder that PEFT and vLLM load and that adds the same to every weight.

    PEFT and vLLM multiply by base and delta apart: outputs are this model's but for rounding.

    Args: name: which adapter, as in :func:`save_adapter`; the rest as :func:`s2ft.adapter.formats.lora.write`.
    Raises: as both of them.
    """
    record = attachment_of(model)
    if name is None:
        name = record.name if record.name is not None else next(iter(record.active), record.names[0])
    lora.write(get_adapter(model, name), model, directory, rank, rank_pattern)


@of_compiled
def import_lora(
    model: nn.Module, directory, name: str = "default", *, couplings: Sequence[Coupling] | None = None
) -> None:
    """Load a LoRA folder that is S²FT by its structure as adapter `name` and make it active.

    Raises: as :func:`s2ft.adapter.formats.lora.read` and :func:`load_adapter`; the model is then as it was.
    """
    load_adapter(model, lora.read(directory, model, name, couplings))
