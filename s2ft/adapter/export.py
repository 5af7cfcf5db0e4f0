"""Between a model's adapters and LoRA folders."""

import os
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
    model: nn.Module,
    directory: str | os.PathLike,
    name: str | None = None,
    rank: int | None = None,
    rank_pattern: bool | None = None,
) -> None:
    """Save one adapter of a model as a LoRA folder that PEFT and vLLM load.

    The LoRA adds exactly the adapter's numbers to every weight. PEFT and vLLM multiply by the base and by the LoRA
    separately, so outputs differ from this model's by rounding.

    Args:
        model: A model with adapters.
        directory: The folder to write, which is created if it is missing.
        name: The adapter; default: the trainable one, else the active one, else the first one loaded.
        rank: The rank of every module; zeros are appended to reach it. Default: each module has the rank it needs.
        rank_pattern: Whether each module has the rank it needs, which is the default without `rank`. False gives every
            module the rank of the widest one, for programs that read one rank only.

    Raises:
        ValueError: The adapter is unknown, changes experts or convolutions, has extra weights, or needs a higher rank.
            Nothing has been written.

    Example:
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.export_lora(model, "math-lora")
        >>> from peft import PeftModel
        >>> peft_model = PeftModel.from_pretrained(s2ft.detach(model), "math-lora")
    """
    record = attachment_of(model)
    adapter = get_adapter(model, record.default_name if name is None else name)
    lora.write(adapter, directory, model, rank=rank, rank_pattern=rank_pattern)


@of_compiled
def import_lora(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str = "default",
    *,
    couplings: Sequence[Coupling] | None = None,
) -> None:
    """Load a LoRA that has the structure of S²FT as an adapter, and make it active.

    Every rank of the LoRA must be one-hot on the side that S²FT trains, as in a folder that :func:`export_lora` wrote.

    Args:
        model: The LoRA's base model, with or without adapters.
        directory: The LoRA's folder.
        name: The name of the new adapter.
        couplings: The couplings of a model of no known family.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The LoRA has another structure or another base, or the name is taken. The model has not changed.

    Example:
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> s2ft.export_lora(model, "lora")
        >>> base = s2ft.detach(model)
        >>> s2ft.import_lora(base, "lora", "math")
        >>> s2ft.list_adapters(base)
        ['math']
    """
    load_adapter(model, lora.read(directory, model, name, couplings))
