"""The metrics: scores of units, at random, by weights, by activations or by gradients.

A metric is a row of `METRICS` here and in s2ft/config.py. Its function returns, for every projection of the request by
name, the score of each unit, shape [count], float64, not negative.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from s2ft.config import S2FTConfig, refuse
from s2ft.distributed import Split, fsdp_follow, full_values, local_part, reshard_all
from s2ft.layers import ObservedExperts, forward_of, kind_of
from s2ft.model.coupling import ONE_SIDED, Coupling, Projection, by_key
from s2ft.model.running import evaluation_mode, forward_hooks, gathered_forwards, remove_new_hooks
from s2ft.model.weights import (
    find,
    layers_that_repack,
    parameter_position,
    put,
    set_repacking,
    split_of_units,
    weight_at,
)
from s2ft.selection.batches import (
    IGNORED,
    Batch,
    Calibration,
    has_decoder_inputs,
    is_causal_lm,
    is_encoder_decoder,
    positions_of,
)

# ---- what metrics and allocations are -------------------------------------------------------------------------------

PIECE = 2**18  # number of elements converted at a time: they fit into the cache, and no copy of a weight is made

Units = dict[str, Tensor]  # a tensor by projection name


@dataclass(frozen=True)
class Request:
    """What a metric scores: the projections of `couplings` that `config` requests."""

    couplings: list[Coupling]  # couplings of the requested layers
    config: S2FTConfig
    model: nn.Module  # None where the metric does not read it
    calibration: Calibration = None  # type: ignore[assignment]  # None where the metric needs no data

    @property
    def projections(self) -> Iterator[Projection]:
        for coupling in self.couplings:
            yield from (projection for projection in coupling.projections if projection.key in self.config.ratios)

    def by_path(self) -> dict[str, list[Projection]]:
        """The projections by the path of their weight, which several may share."""
        return by_key((projection.path, projection) for projection in self.projections)


@dataclass(frozen=True)
class Metric:
    """A way to score units.

    Attributes:
        score: Returns, for every projection of the request by name, the score of each unit, shape [count], float64, not
            negative.
        calibrated: True if the metric needs calibration data.
        ordered: False if the scores have no meaning, so that `order` does not apply.
    """

    score: Callable[[Request], Units]
    calibrated: bool
    ordered: bool = True


# (request, scores, number of units by projection, masks of the allowed units, take the smallest scores) → chosen units
Allocation = Callable[[Request, Units, dict[str, int], Units, bool], Units]


@torch.no_grad()
def squares_by_unit(matrix: Tensor, dim: int, projection: Projection, split: Split | None = None) -> Tensor:
    """Return the sum of squares of every unit of a projection.

    The sums are formed in float32 within a piece of the matrix, and in float64 over the pieces.

    Args:
        matrix: Tensor of shape [O, I] or [O, I, taps].
        dim: Dimension of the units in `matrix`.
        projection: The projection.
        split: How tensor parallelism has split the units; None if it has not. The matrix may then be this rank's part.

    Returns:
        The sums, shape [count], float64, on the matrix's device. With a split, those of other ranks' units are zero.
    """
    rows = max(1, PIECE // max(1, matrix[:1].numel()))
    total = torch.zeros(matrix.shape[dim], dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[0], rows):
        squares = matrix[start : start + rows].to(torch.promote_types(matrix.dtype, torch.float32)).square()
        if dim == 0:
            total[start : start + rows] = squares.flatten(1).sum(1)
        else:
            total += squares.transpose(0, 1).flatten(1).sum(1) if matrix.dim() > 2 else squares.sum(0)
    if split is not None:
        own, part = split.own_elements.to(total.device), total
        total = total.new_zeros(projection.extent)
        total[own] = part if part.numel() == own.numel() else part[own]
    elements = projection.elements(torch.arange(projection.count, device="cpu")).to(total.device)
    return total[elements].view(projection.count, projection.unit).sum(1)


def shared_by_producers(request: Request, scores: Units) -> Units:
    """Give all requested producers of a coupling with the same units one score: the root of their sum of squares.

    Their rankings are then the same and their selections nested, so that each selection is contiguous after
    co-permutation. The consumer keeps its own scores.
    """
    shared = dict(scores)
    for coupling in request.couplings:
        groups = by_key((producer.count, producer.name) for producer in coupling.producers if producer.name in scores)
        for paths in groups.values():
            together = torch.stack([scores[path] for path in paths]).square().sum(0).sqrt()
            shared.update((path, together) for path in paths)
    return shared


def check_finite(user: str, scores: Units) -> None:
    """Raise ValueError for scores that are NaN or infinite. `user` is what needs them, for the message."""
    for path, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{user}: the statistics of {path} are NaN or infinite")


# ---- running a model on calibration data without leaving a trace in it ----------------------------------------------


@contextlib.contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode and take its gradients away for the time of the context.

    A model of FSDP2 has its shards before and afterwards. Afterwards the mode and the forward hooks of every module,
    and requires_grad and the gradient of every parameter, are restored, also after an error.
    """
    reshard_all(model)
    hooks, repacking = forward_hooks(model), layers_that_repack(model)
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        set_repacking(repacking, False)  # which rounds the scales
        model.zero_grad(set_to_none=True)
        with evaluation_mode(model):
            yield
    finally:
        set_repacking(repacking, True)
        remove_new_hooks(hooks)
        reshard_all(model)
        for parameter, required, gradient in parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def run_forward(model: nn.Module, batch: Batch) -> None:
    """Run one forward for its activations, without a loss or a cache, and with one logit per sequence.

    An encoder-decoder without decoder inputs keeps its labels, because it makes the decoder inputs from them.
    """
    known = inspect.signature(model.forward).parameters
    if is_encoder_decoder(model):
        needs_labels = not has_decoder_inputs(batch.named)
    else:  # a custom module may require labels
        needs_labels = "labels" in known and known["labels"].default is inspect.Parameter.empty
    dropped = {"return_loss", "logits_to_keep"} | (set() if needs_labels else {"labels"})
    named = {name: value for name, value in batch.named.items() if name not in dropped}
    kept = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    model(*batch.positional, **{**named, **kept, **_no_cache(model)})


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own loss.

    Raises:
        ValueError: The model has none.
    """
    try:
        output = model(*batch.positional, **{**batch.named, **_no_cache(model)})
    except TypeError as error:
        if "labels" not in str(error):
            raise
        output = None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"selection='gradient' needs a model that computes a loss from labels; {type(model).__name__} does not"
        )
    return loss


def _no_cache(model: nn.Module) -> dict[str, bool]:
    """Return the argument that switches the cache of keys and values off. A cache would keep activations."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def single_sequences(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """Yield the sequences, images or recordings of a batch one by one, with their labels.

    A sequence without a label to predict is left out.

    Raises:
        ValueError: The model needs labels, or it has no loss for a single sequence.
    """
    labels = _labels(model, batch)
    first = 1 if is_causal_lm(model) else 0  # a causal model never predicts the first token
    for i in range(batch.size):
        one = batch.row(i)
        if labels is None:
            yield one
        elif labels.is_floating_point() or bool((labels[i : i + 1].flatten()[first:] != IGNORED).any()):
            yield replace(one, named={**one.named, "labels": labels[i : i + 1]})


def _labels(model: nn.Module, batch: Batch) -> Tensor | None:
    """Return the labels, shape [sequences, ...]. For a causal model without labels they are the tokens.

    If the model takes no labels, the result is None.
    """
    if batch.named.get("labels") is not None:
        return batch.named["labels"]
    if is_causal_lm(model):
        ids, mask = batch.named["input_ids"], batch.named.get("attention_mask")
        if mask is None:
            return ids
        labels = ids.masked_fill(mask == 0, IGNORED)
        labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)  # padding predicts nothing
        return labels
    takes = inspect.signature(model.forward).parameters
    refuse(
        (
            "labels" in takes,
            f"selection='gradient' needs labels in every calibration batch: {type(model).__name__} is not a "
            "causal language model, which could use its tokens as labels",
        ),
        (
            "return_loss" in takes,
            "selection='gradient' computes the loss of one sequence at a time, and the contrastive loss of "
            f"{type(model).__name__} compares the pairs of a batch, so one pair has none. Use "
            "selection='activation' or 'product'",
        ),
    )
    return None


# ---- activation (S²FT-A in the paper) -------------------------------------------------------------------------------


def activation_scores(request: Request) -> Units:
    """Return the activation norm of each unit, as the root mean square over the positions of the calibration data.

    The activation of a producer's unit is its part of the projection's output, before any other operation. The
    activation of a consumer's unit is its part of the input. The norm is the L2 norm over all elements of the unit.
    Positions are tokens, or other positions such as image patches or sound frames. Padding does not
    count. For an expert, tokens that the router sends elsewhere count as zeros. No activation is stored: each is
    reduced to a sum of squares when it is computed.
    """
    sums = _Sums(request)
    with (
        in_evaluation_mode(request.model),
        _experts_observed(request),
        gathered_forwards(request.model),
        ExitStack() as stack,
        torch.no_grad(),
    ):
        for path, projections in request.by_path().items():
            for hook in sums.watch(path, projections):
                stack.callback(hook.remove)
        for batch in request.calibration.batches(request.model):
            run_forward(request.model, batch)
    return sums.scores()


class _Sums:
    """Sums of squares of the units of every projection, and the number of positions in each sum."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # by projection, because an encoder and its decoder have different positions
        self.positions = {
            projection.name: positions_of(request.model, coupling, projection)
            for coupling in request.couplings
            for projection in coupling.projections
        }

    def watch(self, path: str, projections: list[Projection]) -> list:
        """Register hooks that sum the activations of the weight `path`. All projections must be on one side."""
        module = find(self.request.model, path)
        if isinstance(module, ObservedExperts):
            owner = find(self.request.model, path.rpartition(".")[0])

            def count(module: nn.Module, inputs: tuple, output: Any) -> None:
                self._counted(projections, inputs[0])

            return [
                owner.register_forward_hook(count),
                module.register_forward_hook(lambda _, inputs, output: self._add_experts(projections, inputs, output)),
            ]
        consumes = projections[0].dim == 1
        return [
            module.register_forward_hook(
                lambda _, inputs, output: self._add(
                    projections, kind_of(module).features_last(module, inputs[0] if consumes else output)
                )
            )
        ]

    def _counted(self, projections: list[Projection], x: Tensor) -> Tensor:
        """Count the positions of x and return it without padding: [..., features] → [positions, features]."""
        name, x = projections[0].name, local_part(x.detach())  # torch's parallelize_module gives a layer a DTensor
        x = self.request.calibration.without_padding(x, name, self.positions[name])
        for projection in projections:
            self.counts[projection.name] = self.counts.get(projection.name, 0) + len(x)
        return x

    def _add(self, projections: list[Projection], x: Tensor) -> None:
        x = self._counted(projections, x)
        for projection in projections:
            self._add_squares(projection, x)

    def _add_experts(self, projections: list[Projection], inputs: tuple, output: Tensor) -> None:
        """Add what the experts of one weight got or returned. Their rows stand one after the other."""
        x, offsets, tokens = inputs
        ends = [0, *offsets.tolist()]
        for projection in projections:
            expert = cast(int, projection.expert)
            rows = slice(ends[expert], ends[expert + 1])
            values = (output if projection.dim == 0 else x).detach()[rows]
            here = None if tokens is None else tokens[rows]
            positions = self.positions[projection.name]
            values = self.request.calibration.without_padding(values, projection.name, positions, here)
            self._add_squares(projection, values)

    def _add_squares(self, projection: Projection, x: Tensor) -> None:
        squares = squares_by_unit(x, 1, projection, split_of_units(self.request.model, projection))
        self.sums[projection.name] = self.sums.get(projection.name, 0) + squares

    def scores(self) -> Units:
        """Return the scores by projection, shape [count], float64.

        Raises:
            ValueError: A projection was never run, or only on padding.
        """
        scores = {}
        for projection in self.request.projections:
            name, count = projection.name, self.counts.get(projection.name)
            if not count:
                problem = "ran" if count is None else "has more than padding for"
                data = self.request.calibration.name
                user = "" if data == "protect" else f"selection={self.request.config.selection!r}: "
                raise ValueError(f"{user}no {data} batch {problem} {name}")
            # an expert may have received no token
            total = self.sums.get(name, torch.zeros(projection.count, dtype=torch.float64, device="cpu"))
            split = split_of_units(self.request.model, projection)
            if split is not None:  # each rank has the sums of its own units
                total = split.sum(total)
            scores[name] = (total / count).sqrt().cpu()
        return scores


@contextmanager
def _experts_observed(request: Request) -> Iterator[None]:
    """Replace the requested parameters of experts by modules, so that hooks see what each expert gets and returns.

    Everything is restored afterwards.
    """
    stacks = {path: found[0] for path, found in request.by_path().items() if found[0].expert is not None}
    with ExitStack() as stack:
        for path, projection in stacks.items():
            parameter, place = find(request.model, path), parameter_position(request.model, path)
            stack.callback(put, request.model, path, parameter, place)  # before put, because an interrupt may follow
            observed, owner = ObservedExperts(parameter, projection.transposed), path.rpartition(".")
            put(request.model, path, observed)
            there, here = (observed, "weight"), (find(request.model, owner[0]), owner[2])
            stack.callback(fsdp_follow, request.model, [(there, here)])
            fsdp_follow(request.model, [(here, there)])
        for path in dict.fromkeys(path.rpartition(".")[0] for path in stacks):
            owner = find(request.model, path)
            if (before := owner.__dict__.get("forward")) is None:
                stack.callback(owner.__dict__.pop, "forward", None)
            else:
                stack.callback(setattr, owner, "forward", before)
            owner.forward = MethodType(forward_of(owner), owner)
        yield


# ---- the other metrics ----------------------------------------------------------------------------------------------


def random_scores(request: Request) -> Units:
    """Return a seeded random ranking of the units of each projection. The first unit drawn has the highest score.

    Producers with the same units share a ranking. Their selections are therefore nested and contiguous after
    co-permutation. The consumer has a ranking of its own. The seed of a draw contains the kind of coupling,
    the layer, the side and the number of units. So the units of a layer do not depend on the other layers and
    projections that are trained, and two such couplings of one layer draw the same units.

    With allocation "global", scores are compared between layers. Each unit then gets a random number between 0 and 1 of
    its own. The units with the highest ones are a draw from all units of all layers, without replacement.
    """
    over_layers = request.config.allocation == "global"
    scores = {}
    for coupling in request.couplings:
        for projection in coupling.projections:
            if projection.key in request.config.ratios:
                side, count = ("producers", "consumer")[projection.dim], projection.count
                purpose = f"{request.config.seed}/{coupling.kind}/{coupling.layer}/{side}/{count}"
                purpose += "" if projection.expert is None else f"/{projection.expert}"
                purpose += f"/{projection.path}" if projection.key in ONE_SIDED else ""  # a layer has many of one kind
                purpose += "/global" if over_layers else ""
                seed = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little") >> 1
                generator = torch.Generator().manual_seed(seed)
                if over_layers:
                    scores[projection.name] = torch.rand(count, dtype=torch.float64, generator=generator, device="cpu")
                else:
                    drawn = torch.randperm(count, generator=generator, device="cpu")
                    scores[projection.name] = (count - 1 - drawn.argsort()).double()
    return scores


def weight_scores(request: Request) -> Units:
    """Return the L2 norm of each unit's weights: its rows in a producer's weight, its columns in the consumer's.

    This is S²FT-W of the paper. Biases do not count. Weights that are spread over ranks are gathered, one at a time.
    """
    scores = {}
    for projections in request.by_path().values():
        with weight_at(request.model, projections[0]).full() as weight:
            for projection in projections:
                matrix = weight_at(request.model, projection).view(weight)
                scores[projection.name] = squares_by_unit(matrix, projection.dim, projection).sqrt().cpu()
    return {projection.name: scores[projection.name] for projection in request.projections}


def product_scores(request: Request) -> Units:
    """Return the product of each unit's weight norm and activation norm in a projection (S²FT-S in the paper)."""
    activations = activation_scores(request)
    return {path: weights * activations[path] for path, weights in weight_scores(request).items()}


# ---- gradient (S²FT-G in the paper) ---------------------------------------------------------------------


def gradient_scores(request: Request) -> Units:
    """Return the gradient norm of each unit's weights, as the root mean square over the calibration sequences.

    A norm is the L2 norm of the gradient of one sequence's loss with respect to the unit's weights in the projection.
    Sequences (images, recordings) are processed one by one, so that the score does not depend on their batches. Squared
    norms are summed, because a sum of gradients would need a second copy of the weights. Only one weight gradient
    exists at a time: it is reduced and deleted as soon as the backward has computed it. If the model is sharded, every
    rank runs it on the same sequences, and each gradient of a weight is gathered.
    """
    return root_mean_squares(
        request, lambda gradient, projection: squares_by_unit(gradient, projection.dim, projection)
    )


def root_mean_squares(request: Request, squares: Callable[[Tensor, Projection], Tensor]) -> Units:
    """Return a root mean square over the calibration sequences, for every unit.

    Args:
        request: What is scored, with calibration data.
        squares: (gradient of one sequence's loss with respect to a weight as outputs × inputs, projection) → the square
            of each unit's statistic, shape [count], float64.

    Returns:
        The scores by projection, shape [count], float64.

    Raises:
        ValueError: The model has no loss, no sequence has a label, or a projection gets no gradient.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    with (
        in_evaluation_mode(request.model),
        gathered_forwards(request.model) as gathered,
        ExitStack() as stack,
        torch.enable_grad(),
    ):
        request.model.requires_grad_(False)
        for weight, projections in _weights(request):
            leaf = gathered.leaf(weight).requires_grad_(True)
            collect = partial(_collect, request.model, projections, squares, sums)
            stack.callback(leaf.register_post_accumulate_grad_hook(collect).remove)
        for batch in request.calibration.batches(request.model):
            for sequence in single_sequences(request.model, batch):
                loss_of(request.model, sequence).backward()
                count += 1
    refuse(
        (not count, "no calibration sequence has a label to predict, so its loss has no gradient"),
        *(
            (
                projection.name not in sums,
                f"selection='gradient': the loss has no gradient with respect to {projection.name}",
            )
            for projection in request.projections
        ),
    )
    return {path: (total / count).sqrt().cpu() for path, total in sums.items()}


def _weights(request: Request) -> list[tuple]:
    """Return every weight with its projections. A tied weight has several."""
    found: dict[int, tuple] = {}
    for projection in request.projections:
        handle = weight_at(request.model, projection)
        weight = handle.tensor
        if not weight.is_floating_point() or handle.read_only:
            raise ValueError(f"selection='gradient' needs gradients of weights, and {projection.path} is quantized")
        found.setdefault(id(weight), (weight, []))[1].append(projection)
    return list(found.values())


def _collect(
    model: nn.Module,
    projections: list[Projection],
    squares: Callable[[Tensor, Projection], Tensor],
    sums: dict[str, Tensor],
    weight: nn.Parameter,
) -> None:
    """Add the squares of a weight's units to `sums`, and delete the gradient."""
    with full_values(cast(Tensor, weight.grad)) as gradient:
        for projection in projections:
            found = squares(weight_at(model, projection).view(gradient), projection)
            sums[projection.name] = sums.get(projection.name, 0) + found
    weight.grad = None


METRICS: dict[str, Metric] = {
    "random": Metric(random_scores, calibrated=False, ordered=False),
    "weight": Metric(weight_scores, calibrated=False),
    "activation": Metric(activation_scores, calibrated=True),
    "product": Metric(product_scores, calibrated=True),
    "gradient": Metric(gradient_scores, calibrated=True),
}
