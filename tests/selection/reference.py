"""Scores from a simple computation that stores everything, to compare the metrics with."""

from dataclasses import replace

import torch
from support.inside import couplings_of, projections_of, weight_at


def norms(matrix, projection):
    """The norm of every unit, shape [units], by a loop over the units."""
    matrix = matrix.double().movedim(projection.dim, 0)
    return torch.stack([matrix[projection.elements(torch.tensor([unit]))].norm() for unit in range(projection.count)])


@torch.no_grad()
def stored(model, couplings, batch, mask_at):
    """What passes every projection at the positions that count, and how many positions there are, by its name."""
    seen, hooks = {}, []
    for p in projections_of(couplings):
        path = p.path if p.expert is None else p.path.rpartition(".")[0]

        def keep(module, inputs, output, p=p):
            mask = mask_at(p.path, batch)
            if p.expert is not None:
                seen[p.name] = p, inside(module, p, mask.flatten().bool(), *inputs), int(mask.sum())
            else:
                x = inputs[0] if p.dim == 1 else output
                x = x.flatten(0, -2) if mask is None else x.reshape(*mask.shape, -1)[mask.bool()]
                seen[p.name] = p, x, len(x)

        hooks.append(model.get_submodule(path).register_forward_hook(keep))
    model(**batch) if isinstance(batch, dict) else model(*batch)
    for hook in hooks:
        hook.remove()
    return seen


def inside(module, p, real, hidden, chosen, weights):
    """What passes a projection of an expert, for the tokens routed to it, without padding."""
    gate_up = hidden[(chosen == p.expert).any(1) & real] @ module.gate_up_proj[p.expert].t()
    gate, up = gate_up.chunk(2, -1)
    return gate_up if p.dim == 0 else module.act_fn(gate) * up


def activations(model, couplings, batches, mask_at):
    squares, counts = {}, {}
    for batch in batches:
        for name, (p, x, count) in stored(model, couplings, batch, mask_at).items():
            squares[name] = squares.get(name, 0) + norms(x, replace(p, dim=1)).square()
            counts[name] = counts.get(name, 0) + count
    return {name: (square / counts[name]).sqrt() for name, square in squares.items()}


def gradients(model, couplings, batches):
    """From one full backward for each sequence that has a label."""
    squares = {}
    for batch in batches:
        if "labels" not in batch:  # neither padding nor the token after it
            ids, mask = batch["input_ids"], batch["attention_mask"]
            batch = {**batch, "labels": torch.where(mask * mask.roll(1, 1) == 1, ids, -100)}
        for i in range(len(batch["labels"])):
            one = {name: value[i : i + 1] for name, value in batch.items()}
            if batch["labels"].is_floating_point() or bool((one["labels"] != -100).any()):
                model.zero_grad()
                model(**one)["loss"].backward()
                for p in projections_of(couplings):
                    weight = weight_at(model, p)
                    squares.setdefault(p.name, []).append(norms(weight.view(weight.tensor.grad), p).square())
    model.zero_grad()
    return {name: torch.stack(found).mean(0).sqrt() for name, found in squares.items()}


def scores(
    model,
    metric,
    batches,
    mask_at=lambda path, batch: batch.get("attention_mask") if isinstance(batch, dict) else None,
    couplings=None,
):
    """The scores of all units by the name of the projection."""
    couplings = couplings_of(model, couplings)
    if metric == "gradient":
        return gradients(model, couplings, batches)
    weights = {p.name: norms(weight_at(model, p).matrix.detach(), p) for p in projections_of(couplings)}
    if metric == "weight":
        return weights
    found = activations(model, couplings, batches, mask_at)
    return found if metric == "activation" else {name: weights[name] * found[name] for name in weights}
