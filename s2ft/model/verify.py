"""Trying couplings out: with the units of one in another order, the model must compute what it did before."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.model.coupling import Coupling
from s2ft.model.modes import evaluation_mode
from s2ft.model.permutation import Move
from s2ft.model.weights import allow_packing, layers_that_pack, stop_packing, weight_at

# how far outputs may move, of the largest: rounding, which a few layers add up
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
NEED_EXAMPLE = (
    "verify runs the model, and this one needs an input for that: pass example=, a tensor, a tuple of "
    "arguments or a dict of them, or verify=False"
)


class Trial:
    """A model's outputs on one small input, to compare with what it gives after a change.

    Runs in evaluation mode without gradients; afterwards every module's mode is what it was. Besides the
    model's own outputs those of the consumers are compared, where an error is largest.
    """

    def __init__(self, model: nn.Module, couplings: list[Coupling], under_way: list[Move], example: Any = None) -> None:
        """Args:
            model: to run.
            couplings: whose consumers are watched.
            under_way: holds the moves of a check while it runs, so that the caller can take them back.
            example: tensor, tuple of arguments or dict of them; default: made from the model's config.

        Raises:
            ValueError: there is no example that can be run, or it does not reach every coupling.
        """
        self.model, self.under_way = model, under_way
        # quantized weights are integers, whose layers may compute in half precision or on 8-bit activations
        self.tolerance = max(
            TOLERANCE.get(weight_at(model, coupling.consumer).tensor.dtype, TOLERANCE[torch.bfloat16])
            for coupling in couplings
        )
        # in half precision a rounding may send a token to another expert, and then its numbers are others
        self.routed = self.tolerance > 1e-4 and any(c.consumer.expert is not None for c in couplings)
        built = example is None
        self.example = example_of(model) if built else example
        if self.example is None:
            raise ValueError(NEED_EXAMPLE)
        if not isinstance(self.example, (Tensor, tuple, list, dict)):
            raise TypeError(f"example must be a tensor, a tuple or a dict, got {type(example).__name__}")
        try:
            self.before = self._run(couplings)
        except Exception as error:
            if built:
                raise ValueError(f"{NEED_EXAMPLE}. The one made from the config fails: {error}") from error
            raise
        for key, tensors in self.before.items():
            if not tensors:
                raise ValueError(
                    f"the example does not reach {key or 'an output'}, so nothing can be verified there: "
                    "pass another as example=, or verify=False"
                )
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                raise ValueError(f"the example gives NaN or infinity at {key or 'the output'}: pass another")

    def check(self, couplings: list[Coupling]) -> None:
        """Put the units of couplings that can move in another order, run, and put them back.

        Args:
            couplings: more than one where they are the experts of a layer, which are many and alike.
        Raises: ValueError when an output moves by more than rounding; the weights are, bit for bit, as before.
        """
        moves = [Move(coupling, _cycle(coupling.consumer.count)) for coupling in couplings]
        self.under_way.extend(moves)
        for move in moves:
            move.do(self.model)
        moved = self._moved(couplings)
        for move in moves:
            move.undo(self.model)
        self.under_way.clear()
        if moved:
            others = f" or another of the {len(couplings)} experts" if len(couplings) > 1 else ""
            raise ValueError(
                f"{couplings[0]}{others} is not one: with its {couplings[0].consumer.count} units in "
                f"another order {moved}. Is a module, a norm or bias (vectors), or the unit wrong?"
            )

    def check_unchanged(self) -> None:
        """Raises: ValueError when the model's outputs are no longer what they were."""
        moved = self._moved([])
        if moved:
            raise ValueError(f"attach would change what the model computes: {moved}")

    def _moved(self, couplings: list[Coupling]) -> str:
        """What differs from before, in words; empty when nothing does."""
        for key, tensors in self._run(couplings).items():
            for after, before in zip(tensors, self.before[key]):
                largest = float(before.abs().max())
                difference = self._difference(after, before, whole=not self.routed or bool(key))
                if not difference <= self.tolerance * largest:
                    return (
                        f"{'the output of ' + key if key else 'an output of the model'} moves by {difference:.3g}, "
                        f"where the largest is {largest:.3g} and rounding would be {self.tolerance * largest:.3g}"
                    )
        return ""

    @staticmethod
    def _difference(after: Tensor, before: Tensor, whole: bool) -> float:
        """The largest of all differences, or where not whole the median: at least half must agree."""
        if after.shape != before.shape:
            return float("inf")
        differences = (after - before).abs()
        return float(differences.max() if whole else differences.median())

    def _run(self, couplings: list[Coupling]) -> dict[str, list[Tensor]]:
        """Outputs of the model (key "") and of the couplings' consumers (by path), as float64; for experts' weights
        of the module that has them."""
        found: dict[str, list[Tensor]] = {_module_of(coupling): [] for coupling in couplings}
        handles = [
            self.model.get_submodule(path).register_forward_hook(
                lambda module, inputs, output, path=path: found[path].append(output.double())
            )
            for path in found
        ]
        cuda = sorted({p.device for p in self.model.parameters() if p.is_cuda}, key=str)
        packing = layers_that_pack(self.model)
        try:
            stop_packing(self.model, packing)
            with torch.no_grad(), evaluation_mode(self.model), torch.random.fork_rng(cuda):
                torch.manual_seed(0)
                output = _call(self.model, self.example)
        finally:
            allow_packing(self.model, packing)
            for handle in handles:
                handle.remove()
        return {**found, "": [tensor.double() for tensor in _tensors(output)]}


def _module_of(coupling: Coupling) -> str:
    path = coupling.consumer.path
    return path if coupling.consumer.expert is None else path.rpartition(".")[0]


def _cycle(count: int) -> Tensor:
    """An order [count] in which every unit takes another's place (of two or more)."""
    units = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    order = torch.empty_like(units)
    order[units] = units.roll(1)
    return order


def _call(model: nn.Module, example: Any) -> Any:
    """On copies, for a model may write into its inputs."""
    if isinstance(example, dict):
        return model(**{name: _copied(value) for name, value in example.items()})
    values = example if isinstance(example, (tuple, list)) else (example,)
    return model(*map(_copied, values))


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _tensors(output: Any, name: str = "") -> Iterator[Tensor]:
    """Floating-point tensors of a model's output; attention weights and caches lie by heads, which may move."""
    if "attentions" in name or "cache" in name or "past" in name:
        return
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from _tensors(value, str(key))
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value, name)


# ---- an input made from a transformers model's config ---------------------------------------------------


def example_of(model: nn.Module, rows: int = 2, length: int = 8, device: Any = None) -> dict[str, Tensor] | None:
    """A small batch for a transformers model: token ids, pixels or sound, as its config has them; None for others.

    Args:
        rows: sequences, images or recordings. length: tokens of a sequence. device: default: the model's.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        return None
    takes = inspect.signature(model.forward).parameters
    names = [main]
    if "pixel_values" in takes and hasattr(config, "vision_config"):
        names.append("pixel_values")
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    values = {
        name: _value(name, config, rows, length, torch.Generator().manual_seed(0)) for name in dict.fromkeys(names)
    }
    if any(value is None for value in values.values()):
        return None
    return {
        name: value.to(device or weight.device, weight.dtype if value.is_floating_point() else None)
        for name, value in values.items()
    }


def _value(name: str, config: Any, rows: int, length: int, generator: torch.Generator) -> Tensor | None:
    text, vision = getattr(config, "text_config", None) or config, getattr(config, "vision_config", None) or config
    if name in ("input_ids", "decoder_input_ids") and hasattr(text, "vocab_size"):
        return torch.randint(text.vocab_size, (rows, length), generator=generator)
    if name == "pixel_values" and hasattr(vision, "image_size"):
        size = vision.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return torch.randn(rows, getattr(vision, "num_channels", 3), height, width, generator=generator)
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        return torch.randn(rows, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    return None
