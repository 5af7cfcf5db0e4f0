"""Rows that are divided among devices (context parallelism): the models and options that allow it."""

import torch
from torch import nn

from s2ft.model.modes import evaluation_mode
from s2ft.text.collator import SplitCollator
from s2ft.train.loss import has_standard_loss, loss_of_logits
from s2ft.train.parallel import devices_of, run_where_weights_are

TRIAL = 16  # tokens of the row in the trial of a model


def check_divided_rows(model: nn.Module, arguments) -> None:
    """Check that the devices of a run can divide its rows among them, if they are to.

    accelerate refuses models whose attention is not over all earlier positions. This function refuses what it does not
    see, because the run would train something else without an error.

    Args:
        model: The model. It is run on a short row.
        arguments: The SFTArguments of the run.

    Raises:
        ValueError: An option or the model needs whole rows.
    """
    devices = devices_of(arguments)
    if devices.sequence > 1:
        raise ValueError(
            "DeepSpeed's sequence parallelism (sp_size) shifts the labels itself, which s2ft sft has done already: "
            "take context parallelism (examples/accelerate/context.yaml), or S2FTTrainer"
        )
    if not devices.splits_rows:
        return
    for name in ("packing", "padding_free", "router_aux_loss_coef"):
        if getattr(arguments, name):
            raise ValueError(
                f"{name} needs whole rows, and each row is divided among devices ({devices}): leave it out"
            )
    if arguments.loss_type == "dft":
        raise ValueError(f"loss_type 'dft' needs whole rows, and each row is divided among devices ({devices})")
    reason = _why_not_divided(model)
    if reason:
        raise ValueError(
            f"the rows of this model can't be divided among devices ({devices}): {reason}. Tensor parallelism and "
            "FSDP2 leave rows whole"
        )


def _why_not_divided(model: nn.Module) -> str:
    attention = model.config.get_text_config()._attn_implementation
    if attention != "sdpa":
        return f"its attention is {attention!r}, and PyTorch divides that of --attn-implementation sdpa only"
    if getattr(model, "_is_stateful", False):
        return "its layers have a state that goes along the row"
    if not has_standard_loss(model):
        return "it does not use the standard loss of causal language models"
    return run_where_weights_are("the trial of divided rows", model, lambda: _try_shifted_labels(model))


def _try_shifted_labels(model: nn.Module) -> str:
    """Return why the model's loss would not be that of the labels beside each position."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(model.config.get_text_config().vocab_size, (2, TRIAL), generator=generator).tolist()
    batch = SplitCollator(0, 1)([{"input_ids": tokens, "labels": labels}])
    batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    with evaluation_mode(model), torch.no_grad():
        found = model(**batch)
        expected = loss_of_logits(found.logits, batch["shift_labels"])
        moved = model(**{**batch, "position_ids": batch["position_ids"] + torch.arange(TRIAL, device=model.device)})
    exact = found.logits.dtype == torch.float32
    if not torch.isclose(found.loss.float(), expected, rtol=1e-5 if exact else 1e-2):
        return "its loss does not take the labels beside each position (shift_labels)"
    if torch.equal(moved.logits, found.logits):
        return "it does not take the positions of the tokens (position_ids)"
    return ""
