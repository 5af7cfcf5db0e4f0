"""The weight transfer engine of one worker of vLLM. vLLM imports this module when the backend ``s2ft`` is chosen."""

from collections.abc import Iterable, Sequence
from dataclasses import make_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from s2ft.sync.places import NoPlace, Place
from s2ft.sync.receiver import Receiver
from s2ft.sync.wire import SliceSpec
from s2ft.vllm.compatibility import logger, private
from s2ft.vllm.transfer import BACKEND, is_packed

_UNQUANTIZED = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "UnquantizedFusedMoEMethod")


# What a trainer says, at the start or in an update. `s2ft.sync.receiver.Receiver` checks it; another field is an error.
FIELDS = ("sender", "dtype", "slices", "take_over", "step", "values", "tensor", "base", "idle")
Message: Any = make_dataclass(
    "Message", [(name, Any, None) for name in FIELDS], bases=(WeightTransferInitInfo, WeightTransferUpdateInfo)
)


class S2FTWeightTransferEngine(WeightTransferEngine):
    """Writes slices into the weights of one worker."""

    init_info_cls = update_info_cls = Message
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> None:
        """Make the engine; vLLM does so after it has loaded the model."""
        super().__init__(config, vllm_config, device, model)
        self.receiver = Receiver(model, self._load, _gather, self._check)

    def init_transfer_engine(self, init_info: Any) -> None:
        """Bind to a trainer."""
        self.receiver.bind(vars(init_info))
        logger.info("s2ft: the weights are %s", self.receiver.serving)

    def start_weight_update(self) -> None:
        """Nothing: an update is one message."""

    def receive_weights(self, update_info: Any) -> None:
        """Write one update."""
        self.receiver.update(vars(update_info))
        logger.info("s2ft: the weights are %s", self.receiver.serving)

    def finish_weight_update(self) -> None:
        """Nothing: an update is one message."""

    def shutdown(self) -> None:
        """Restore the base and forget the trainer."""
        self.receiver.close()

    # ---- what vLLM knows of its weights ------------------------------------------------------------------

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        with private("vllm.model_executor.model_loader.mtp_validation", "disable_mtp_completeness_check")():
            try:
                self.model.load_weights(tensors)
            except Exception as error:
                reason = "" if isinstance(error, NoPlace) else self._why_not()
                if reason:
                    raise NoPlace(reason) from error
                raise

    def _why_not(self) -> str:
        """Why no weights can be written at all, if so."""
        if self.model_config.quantization:
            return (
                f"this engine's weights are quantized ({self.model_config.quantization}), and slices are written into "
                "weights of floating-point numbers: serve the base without quantization, or use the layers that hold "
                "slices"
            )
        if any(is_packed(module) and not module.weight.numel() for module in self.model.modules()):
            return (
                "the CPU backend of this engine has packed its weights: start it with the weight transfer backend "
                f"{BACKEND!r}, so that s2ft leaves them unpacked"
            )
        return ""

    def _check(self, found: Sequence[Place], specs: Sequence[SliceSpec]) -> None:
        """Raise NoPlace for places that the model does not compute with."""
        reason = self._why_not()
        if reason and {place.slice_number for place in found} != set(range(len(specs))):
            raise NoPlace(reason)
        problems = {
            parameter.untyped_storage().data_ptr(): problem
            for module in self.model.modules()
            if (problem := _packed(module))
            for parameter in module._parameters.values()
            if parameter is not None
        }
        for place in found:
            problem = problems.get(place.view.untyped_storage().data_ptr())
            if problem:
                raise NoPlace(f"{specs[place.slice_number].name}: {problem}")


def _packed(module: nn.Module) -> str:
    method = getattr(module, "quant_method", None)
    if method is not None and type(method).__name__ not in _UNQUANTIZED:
        return (
            f"this layer's weight is quantized or packed ({type(method).__name__}), and slices are written into "
            "weights of floating-point numbers: serve the base without quantization"
        )
    if is_packed(module):
        return "the CPU backend computes with a packed copy of this weight"
    if type(module).__name__ == "RoutedExperts" and next(module.parameters()).device.type == "cpu":
        return "the CPU backend packs the weights of experts, so that nothing can be written into them"
    return ""


def _gather(value: Any) -> list[Any]:
    """Return the values of all workers of this engine."""
    world = private("vllm.distributed.parallel_state", "get_world_group")()
    values = [value] * world.world_size
    if world.world_size > 1:
        torch.distributed.all_gather_object(values, value, group=world.cpu_group)
    return values
