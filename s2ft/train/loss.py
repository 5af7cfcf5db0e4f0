"""The loss of a causal language model without its logits, which with a large vocabulary are what a step keeps most of.
torch's linear_cross_entropy goes through the tokens in pieces.

On a CPU only the tokens that bear a loss are multiplied. On a GPU all are, since the host would wait to count them; the
command line's batches end with the answers, so that few are multiplied in vain.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.distributed import is_sharded
from s2ft.layers import LINEAR, kind_of
from s2ft.text.encoding import IGNORED

SCALE = 1024.0  # a power of two: multiplying by it and back is exact
PIECE = {"cpu": 2**23, "cuda": 2**26}  # logits alive at once
TILE = 256  # on a GPU, rows of a piece are a multiple of this, so that its matrix product has no ragged tiles
logger = logging.getLogger(__name__)


class ChunkedLoss:
    """Stands between a model's output layer and its loss function in a forward that trains on labels; what such a
    forward returns as logits is none.

    The output layer hands its input through, what the model does to logits is done to that, and the loss function
    multiplies by the layer's weight itself. This is the model's own loss where the model does nothing to logits but
    scale them; :func:`why_not` tries that out.
    """

    def __init__(self, model: nn.Module) -> None:
        self.head = model.get_output_embeddings()
        self.plain = self.head.forward
        self.on, self.trial, self.scale, self.seen = False, False, 1.0, None  # the last three are for trying it out

    def before(self, model: nn.Module, arguments: tuple, options: Mapping) -> None:
        self.on = options.get("labels") is not None and (model.training or self.trial)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.scale if self.on else self.plain(hidden)

    def loss(
        self,
        logits: Tensor,  # [rows, positions, width] where it is on, else of the vocabulary
        labels: Tensor,  # [rows, positions]
        vocab_size: int,
        num_items_in_batch=None,
        ignore_index: int = IGNORED,
        shift_labels=None,
        **options,
    ) -> Tensor:
        """In the place of transformers' ForCausalLMLoss, with its arguments; the mean, or the sum over all items."""
        from transformers.loss.loss_utils import ForCausalLMLoss

        if not self.on:
            return ForCausalLMLoss(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **options
            )
        self.on, self.seen = False, logits.detach() if self.trial else None
        if is_sharded(self.head.weight):  # its own forward gathers it
            return ForCausalLMLoss(
                self.head(logits), labels, vocab_size, num_items_in_batch, ignore_index, shift_labels
            )
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
        hidden, targets = logits.flatten(0, -2), targets.to(logits.device).flatten()
        bearing = targets != ignore_index
        items = bearing.sum() if num_items_in_batch is None else num_items_in_batch
        if hidden.device.type == "cpu":  # on a GPU the host would wait there to learn how many rows are left
            hidden, targets = hidden[bearing], targets[bearing]
        return sum_of_losses(hidden, self.head.weight, self.head.bias, targets, ignore_index) / items


def sum_of_losses(
    hidden: Tensor,  # [n, width]
    weight: Tensor,  # [vocabulary, width]
    bias: Tensor | None,  # [vocabulary]
    targets: Tensor,  # [n] int64
    ignore_index: int = IGNORED,
) -> Tensor:  # float32
    """Sum the cross entropy of hidden @ weightᵀ + bias over the rows whose target is not `ignore_index`.

    Gradients have the plain loss's accuracy. In bfloat16 the value is a sum of numbers that are rounded to it, one a
    piece: off by 0.2 % at most.
    """
    rows, options = piece_of(hidden.device.type, weight.shape[0])
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(hidden.split(rows), targets.split(rows)):
        total = total + F.linear_cross_entropy(
            part, weight, wanted, linear_bias=bias, reduction="sum", ignore_index=ignore_index, options=options
        )
    return total


def piece_of(device: str, vocabulary: int) -> tuple[int, "nn.LinearCrossEntropyOptions"]:
    """Choose how many rows one call of torch's linear_cross_entropy gets, and the options of that call.

    torch must not cut a piece further. Its own choice is a few rows, since it takes a piece for the whole batch, and
    every cut reads the output layer's weight twice again.

    Args:
        device: the type of the device, such as "cuda".
        vocabulary: the number of rows of the output layer's weight.
    """
    rows = max(1, PIECE.get(device, PIECE["cuda"]) // vocabulary)
    if device == "cpu":
        return rows, nn.LinearCrossEntropyOptions(chunking_method=None, acc_policy="balanced")
    # The policy stays torch's: it is "compact" there, but a policy that is named gives up the sums in float32.
    return rows - rows % TILE or rows, nn.LinearCrossEntropyOptions(chunking_method=None)


@contextlib.contextmanager
def chunked_loss(model: nn.Module) -> Iterator[ChunkedLoss]:
    """Inside, the model's loss is :class:`ChunkedLoss`."""
    fused, before = ChunkedLoss(model), model.__dict__.get("_loss_function")
    hook = model.register_forward_pre_hook(fused.before, with_kwargs=True)
    fused.head.forward, model.loss_function = fused.forward, fused.loss
    try:
        yield fused
    finally:
        hook.remove()
        del fused.head.forward, model._loss_function
        if before is not None:
            model.loss_function = before


def why_not(model: nn.Module, batch: Mapping[str, Tensor]) -> str:
    """Why :func:`chunked_loss` is not this model's own loss, in words; empty where it is. Runs the model on `batch`."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = model.get_output_embeddings()
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    if kind_of(head) is not LINEAR or "forward" in head.__dict__:
        changed = " whose forward was replaced" if "forward" in head.__dict__ else ""
        return f"the output layer is a {'quantized ' * bool(kind_of(head).read_only)}{type(head).__name__}{changed}"
    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return "the model has a loss of its own"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _difference(model, batch)
    finally:
        model.train(was_training)


def _difference(model: nn.Module, batch: Mapping[str, Tensor]) -> str:
    expected, seen = model(**batch).loss, []
    with chunked_loss(model) as fused:
        fused.trial = True
        for fused.scale in (1.0, SCALE):
            loss = model(**batch).loss
            if fused.seen is None:
                return "its loss function is not called"
            seen.append((loss, fused.seen))
            fused.seen = None
    if not torch.equal(seen[0][1] * SCALE, seen[1][1]):
        return "the model does more to its logits than to scale them"
    tolerance = 1e-4 if expected.dtype == torch.float32 and model.dtype == torch.float32 else 3e-2
    if not torch.isclose(seen[0][0].float(), expected.float(), rtol=tolerance, atol=tolerance):
        return f"it gives {float(seen[0][0]):.6g} where the model's own loss is {float(expected):.6g}"
    return ""
