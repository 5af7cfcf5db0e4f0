"""How the devices of a run share its work: different rows, parts of the weights, or parts of each row.

The sizes are those of accelerate's ParallelismConfig, from the trainer's arguments or from `accelerate launch`, and
those of transformers' DistributedConfig in `model_init_kwargs`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from s2ft.config import refuse
from s2ft.distributed import decide, has_values, is_spread
from s2ft.model.running import evaluation_mode, gathered_forwards
from s2ft.text.collator import SplitCollator
from s2ft.train.loss import has_standard_loss, loss_of_logits


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        count: Number of devices.
        tensor: Devices that share each weight matrix and train on the same rows (tensor parallelism).
        context: Devices that share each row (context parallelism).
    """

    count: int
    tensor: int = 1
    context: int = 1

    @property
    def together(self) -> int:
        """Number of devices that train on the same rows."""
        return self.tensor * self.context

    @property
    def groups(self) -> int:
        """Number of groups of devices that train on different rows."""
        return self.count // self.together

    @property
    def splits_rows(self) -> bool:
        """Whether several devices share each row."""
        return self.context > 1

    def __str__(self) -> str:
        if self.together == 1:
            return f"{self.count} device{'s' * (self.count != 1)}"
        kinds = ("tensor", "context")
        how = " × ".join(f"{getattr(self, kind)} {kind} parallel" for kind in kinds if getattr(self, kind) > 1)
        return f"{self.groups} group{'s' * (self.groups != 1)} of {self.together} devices ({how})"


def devices_of(arguments: Any) -> Devices:
    """Return how the devices of a run share its work.

    Args:
        arguments: Arguments of one of TRL's trainers.

    Raises:
        ValueError: The number of devices can't be divided so, or the kinds of parallelism can't be used or combined.

    Example:
        >>> from s2ft.train.arguments import SFTArguments
        >>> from s2ft.train.parallel import devices_of
        >>> str(devices_of(SFTArguments(output_dir="my-run")))
        '1 device'
    """
    config, loading = _parallelism(arguments), loading_config(arguments)
    tensor = 1
    if loading:
        others = (loading.get("fsdp_size") or 1) * (loading.get("dp_replicate_size") or 1)
        planned = loading.get("tp_plan") is not None  # without a size, transformers takes all devices for the plan
        tensor = loading.get("tp_size") or (arguments.world_size // others if planned else 1)
    found = Devices(arguments.world_size, tensor, 1 if config is None else config.cp_size)
    refuse(
        (
            config is not None and config.sp_size > 1,
            "DeepSpeed's sequence parallelism (sp_size) shifts the labels itself, which s2ft sft has done already: "
            "take context parallelism (examples/accelerate/context.yaml), or S2FTTrainer",
        ),
        (
            tensor > 1 and found.splits_rows,
            "tensor parallelism can't be combined with context or sequence parallelism: transformers splits the "
            "weights when it loads them, and accelerate splits rows only of models that it shards itself; choose one",
        ),
        (
            found.count % found.together,
            f"{found.count} devices can't be divided into groups of {found.together}: start a multiple of "
            f"{found.together} processes",
        ),
    )
    return found


def rows_of_update(arguments: Any) -> int:
    """Return the number of rows of one update, over all devices.

    Args:
        arguments: Arguments of one of TRL's trainers.
    """
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * devices_of(arguments).groups


def loading_config(arguments: Any) -> dict[str, Any] | None:
    """Return how `from_pretrained` splits the weights while it loads them (transformers' DistributedConfig), or None.

    It is the `distributed_config` in `model_init_kwargs`. Without one, tensor parallelism that `accelerate launch` or
    the trainer's `parallelism_config` ask for is made one, because accelerate leaves it to the loading of the model.

    Args:
        arguments: Arguments of one of TRL's trainers.

    Raises:
        ValueError: accelerate would shard the model again.
    """
    given = (getattr(arguments, "model_init_kwargs", None) or {}).get("distributed_config")
    config = _parallelism(arguments)
    if given is None and config is not None and config.tp_enabled:
        given = {"tp_size": config.tp_size, "fsdp_size": config.dp_shard_size}
        if config.dp_replicate_enabled:
            given["dp_replicate_size"] = config.dp_replicate_size
    if given is None:
        return None
    sharding = _uses_fsdp(arguments)
    if sharding or _uses_deepspeed(arguments):
        name = "FSDP" if sharding else "DeepSpeed"
        raise ValueError(
            f"transformers splits the weights while it loads them ({given}), and {name} would split them again: use "
            "examples/accelerate/tensor.yaml, whose dp_shard_size shards over the other devices"
        )
    return dict(given)


def run_where_weights_are(what: str, model: nn.Module, run: Callable[[], Any]) -> Any:
    """Run a model before the training on the devices that have its weights, and give the result to the others.

    Args:
        what: Name of the result, for messages.
        model: The model. It may be on the meta device, or spread over the devices.
        run: Runs the model and returns a value that JSON has.

    Returns:
        The value.
    """

    def gathered() -> Any:
        with gathered_forwards(model):
            return run()

    return decide(what, has_weights(model), gathered).value


def has_weights(model: nn.Module) -> bool:
    """Return whether this device can run the model: its weights are here, or spread over the devices."""
    return all(has_values(parameter) for parameter in model.parameters())


def model_is_spread(model: nn.Module) -> bool:
    """Return whether the weights are spread over the devices already, before a Trainer prepares the model."""
    return any(is_spread(parameter) for parameter in model.parameters())


def check_can_shard(arguments: Any) -> None:
    """Raise ValueError if accelerate is to share a model between processors: it would use DDP, with hollow models."""
    if arguments.use_cpu and (_uses_fsdp(arguments) or _parallelism(arguments) is not None):
        raise ValueError(
            "accelerate shares a model (FSDP, tensor and context parallelism) between GPUs only, and none is used: use "
            "examples/accelerate/ddp.yaml or torchrun, where each process has the whole model"
        )


def trains_whole_models(arguments: Any) -> bool:
    """Return whether accelerate leaves the model whole on each device."""
    config = _parallelism(arguments)
    divided = config is not None and config.total_size > config.dp_replicate_size
    return not (divided or _uses_fsdp(arguments) or _uses_deepspeed(arguments))


def _uses_deepspeed(arguments: Any) -> bool:
    return bool(arguments.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def _uses_fsdp(arguments: Any) -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or bool(arguments.fsdp)


def _parallelism(arguments: Any):
    """Return accelerate's ParallelismConfig of the arguments or of `accelerate launch`, or None."""
    given = arguments.parallelism_config
    if given is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        from accelerate import ParallelismConfig

        given = ParallelismConfig()
    return given


# ---- rows that are divided among devices ----------------------------------------------------------------


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
    if not devices.splits_rows:
        return
    given = [name for name in ("packing", "padding_free", "router_aux_loss_coef") if getattr(arguments, name)]
    given += ["loss_type 'dft'"] * (arguments.loss_type == "dft")
    if given:
        raise ValueError(
            f"{given[0]} needs whole rows, and each row is divided among devices ({devices}): leave it out"
        )
    reason = _why_not_divided(model)
    if reason:
        raise ValueError(
            f"the rows of this model can't be divided among devices ({devices}): {reason}. Tensor parallelism and "
            "FSDP2 leave rows whole"
        )


# Values of transformers' `layer_types` whose only tie between the tokens of a row is attention. Others are refused.
DIVIDED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def _why_not_divided(model: nn.Module) -> str:
    attention = model.config.get_text_config()._attn_implementation
    if attention != "sdpa":
        return f"its attention is {attention!r}, and PyTorch divides that of --attn-implementation sdpa only"
    if has_state(model):
        return "its layers have a state that goes along the row"
    if not has_standard_loss(model):
        return "it does not use the standard loss of causal language models"
    return run_where_weights_are("the trial of divided rows", model, lambda: _try_shifted_labels(model))


def has_state(model: nn.Module) -> bool:
    """Return whether layers carry a state or a convolution along the row, as Mamba and linear attention do."""
    if getattr(model, "_is_stateful", False):  # older releases of transformers mark such models, 5.25 does not
        return True
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return bool(layer_types - DIVIDED_LAYERS) or any(isinstance(module, nn.Conv1d) for module in model.modules())


def _try_shifted_labels(model: nn.Module) -> str:
    """Return why the model's loss would not be that of the labels beside each position."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    tokens, labels = torch.randint(size, (2, TRIAL), generator=generator, device="cpu").tolist()
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
