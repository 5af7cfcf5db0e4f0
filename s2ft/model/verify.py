"""Verifies couplings: with the units of one in another order, the model must give the same outputs as before."""

from typing import Any

import torch
from torch import Tensor, nn

from s2ft.distributed import reshard_all
from s2ft.model.coupling import Coupling
from s2ft.model.discovery.examples import example_of, run_example
from s2ft.model.gathering import gathered_forwards
from s2ft.model.modes import evaluation_mode
from s2ft.model.outputs import tensors_in
from s2ft.model.permutation import Move
from s2ft.model.weights import allow_packing, layers_that_pack, stop_packing, weight_at

# By how much outputs may change, relative to the largest output. Rounding errors of a few layers add up.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
NEED_EXAMPLE = (
    "verify runs the model and needs an input for it: pass example= (a tensor, a tuple of arguments or a dict of "
    "them), or verify=False"
)


class Trial:
    """The outputs of a model on one small input, to compare them with its outputs after a change.

    The model runs in evaluation mode without gradients. Afterwards every module is in its former mode. The outputs of
    the consumers, and of one-sided layers, are compared too, because there an error is largest.
    """

    def __init__(self, model: nn.Module, couplings: list[Coupling], under_way: list[Move], example: Any = None) -> None:
        """Run the model before the change.

        Args:
            model: The model.
            couplings: The couplings whose consumers are compared.
            under_way: A list that contains the moves of a check while it runs, so that the caller can revert them.
            example: Tensor, tuple of arguments or dict of them; default: made from the model's config.

        Raises:
            ValueError: There is no example, the model can't run on it, or it does not reach every coupling.
            TypeError: The example is of another type.
        """
        self.model, self.under_way = model, under_way
        # Quantized weights are integers. Their layers may compute in half precision or on 8-bit activations.
        self.tolerance = max(
            TOLERANCE.get(weight_at(model, coupling.main).tensor.dtype, TOLERANCE[torch.bfloat16])
            for coupling in couplings
        )
        # In half precision, rounding may route a token to another expert, which changes its outputs.
        self.routed = self.tolerance > 1e-4 and any(c.expert is not None for c in couplings)
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
                raise ValueError(f"{NEED_EXAMPLE}. The example made from the config fails: {error}") from error
            raise
        must_run = {"", *(_module_of(coupling) for coupling in couplings if not coupling.is_one_sided)}
        for key, tensors in self.before.items():
            if not tensors and key in must_run:  # nothing is claimed about a one-sided layer
                raise ValueError(
                    f"example must reach every coupling, and this one does not reach {key or 'an output'}: pass "
                    "another as example=, or verify=False"
                )
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                raise ValueError(f"example must give finite numbers, got NaN or infinity at {key or 'the output'}")

    def check(self, couplings: list[Coupling]) -> None:
        """Reorder the units of couplings, run the model, and put the units back.

        Args:
            couplings: One movable coupling, or those of all experts of a layer, which are many and alike.

        Raises:
            ValueError: An output changes by more than rounding. The weights are as before, bit for bit.
        """
        moves = [Move(coupling, _cycle(coupling.count)) for coupling in couplings]
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
                f"{couplings[0]}{others} is not a coupling of this model: with its {couplings[0].count} units "
                f"in another order {moved}. Is a module, a norm or bias (vectors), or the unit wrong?"
            )

    def check_unchanged(self) -> None:
        """Raise ValueError if the model's outputs have changed."""
        moved = self._moved([])
        if moved:
            raise ValueError(f"attach would change what the model computes: {moved}")

    def _moved(self, couplings: list[Coupling]) -> str:
        """The first difference from the outputs before, in words; empty if there is none."""
        for key, tensors in self._run(couplings).items():
            for after, before in zip(tensors, self.before[key]):
                largest = float(before.abs().max())
                difference = self._difference(after, before, every=not self.routed or bool(key))
                if not difference <= self.tolerance * largest:
                    return (
                        f"{'the output of ' + key if key else 'an output of the model'} changes by {difference:.3g}; "
                        f"the largest is {largest:.3g}, and rounding changes it by {self.tolerance * largest:.3g}"
                    )
        return ""

    @staticmethod
    def _difference(after: Tensor, before: Tensor, every: bool) -> float:
        """The largest difference if every element must agree, else the median: half of them must."""
        if after.shape != before.shape:
            return float("inf")
        differences = (after - before).abs()
        return float(differences.max() if every else differences.median())

    def _run(self, couplings: list[Coupling]) -> dict[str, list[Tensor]]:
        """Run the model and return its outputs (key "") and those of the consumers (by path), as float64.

        For experts, the path is that of the module with their weights.
        """
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
            with (
                torch.no_grad(),
                evaluation_mode(self.model),
                torch.random.fork_rng(cuda),
                gathered_forwards(self.model),
            ):
                torch.manual_seed(0)
                output = run_example(self.model, self.example)
        finally:
            allow_packing(self.model, packing)
            reshard_all(self.model)  # so that units move on the shards, not on gathered weights
            for handle in handles:
                handle.remove()
        return {**found, "": [tensor.double() for tensor in tensors_in(output)]}


def _module_of(coupling: Coupling) -> str:
    path = coupling.main.path
    return path if coupling.expert is None else path.rpartition(".")[0]


def _cycle(count: int) -> Tensor:
    """An order [count] in which no unit keeps its place, if there are two or more."""
    units = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    order = torch.empty_like(units)
    order[units] = units.roll(1)
    return order
