"""The loss of a causal language model in chunks of tokens, without keeping the logits.

With a large vocabulary, the logits take most of the memory of a step. linear_cross_entropy of torch computes the loss
from the hidden states and the weight of the output layer.

On a CPU, only the tokens that have a label are multiplied. On a GPU, all tokens are multiplied, since the host would
have to wait for their count. Batches of the command line end with the answers, so that few tokens have no label.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.attached.record import uncompiled
from s2ft.distributed import is_spread
from s2ft.files.plain_text import first_line
from s2ft.layers import LINEAR, kind_of
from s2ft.model.running import evaluation_mode, replaced
from s2ft.text.encoding import IGNORED

SCALE = 1024.0  # a power of two: multiplying by it and back is exact
CHUNK = {"cpu": 2**23, "cuda": 2**26}  # number of logits that exist at once
TILE = 256  # on a GPU, the rows of a chunk are a multiple of this, so that its matrix product has full tiles
logger = logging.getLogger(__name__)


class ChunkedLoss:
    """Replaces the output layer and the loss function of a model in forward passes that train on labels.

    The output layer returns its input, and the loss function multiplies by the layer's weight. The logits of such a
    forward pass are therefore hidden states. The result equals the model's own loss if the model does nothing to its
    logits but scale them. :func:`why_not_chunked` checks this.
    """

    def __init__(self, model: nn.Module, in_evaluation: bool = False) -> None:
        self.in_evaluation = in_evaluation
        self.head = model.get_output_embeddings()
        self.head_forward = self.head.forward
        self.enabled = False
        self.trial, self.scale = False, 1.0  # used by why_not_chunked, as is `seen`
        self.seen: Tensor | None = None

    def before(self, model: nn.Module, arguments: tuple, options: Mapping) -> None:
        """Enable the chunked loss for a forward pass with labels."""
        self.enabled = options.get("labels") is not None and (model.training or self.in_evaluation or self.trial)

    def forward(self, hidden: Tensor) -> Tensor:
        """Forward of the output layer."""
        return hidden * self.scale if self.enabled else self.head_forward(hidden)

    def loss(
        self,
        logits: Tensor,  # [rows, positions, width] if enabled, else [rows, positions, vocabulary]
        labels: Tensor,  # [rows, positions]
        vocab_size: int,
        num_items_in_batch=None,
        ignore_index: int = IGNORED,
        shift_labels=None,
        **options,
    ) -> Tensor:
        """Compute the loss with the arguments of transformers' ForCausalLMLoss.

        Returns:
            The mean over all labels, or the sum divided by `num_items_in_batch` if it is given.
        """
        from transformers.loss.loss_utils import ForCausalLMLoss

        if not self.enabled:
            return ForCausalLMLoss(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **options
            )
        self.enabled, self.seen = False, logits.detach() if self.trial else None
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
        targets = targets.to(logits.device)
        if is_spread(self.head.weight):  # the forward of the output layer gathers the weight
            return loss_of_logits(self.head(logits), targets, num_items_in_batch, ignore_index)
        hidden, targets = logits.flatten(0, -2), targets.flatten()
        if hidden.dtype.itemsize > self.head.weight.dtype.itemsize:  # Mamba's head(hidden).float()
            hidden = hidden.to(self.head.weight.dtype)
        labelled = targets != ignore_index
        items = labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if hidden.device.type == "cpu":  # on a GPU the host would have to wait for the number of rows
            hidden, targets = hidden[labelled], targets[labelled]
        with torch.set_grad_enabled(self.trial or torch.is_grad_enabled()):  # a trial runs what the training runs
            return sum_of_losses(hidden, self.head.weight, self.head.bias, targets, ignore_index) / items


def loss_of_logits(
    logits: Tensor,  # [rows, positions, vocabulary]
    targets: Tensor,  # [rows, positions] int64
    items=None,
    ignore_index: int = IGNORED,
) -> Tensor:  # float32
    """Compute the cross entropy of logits.

    Args:
        logits: Logits, shape [rows, positions, vocabulary].
        targets: The token that each position predicts, shape [rows, positions], int64.
        items: What the sum over the tokens is divided by. None is the number of targets.
        ignore_index: Target of the positions that have no loss.

    Returns:
        The loss, a float32 scalar.
    """
    total = F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    return total / ((targets != ignore_index).sum().clamp(min=1) if items is None else items)


def sum_of_losses(
    hidden: Tensor,  # [n, width]
    weight: Tensor,  # [vocabulary, width]
    bias: Tensor | None,  # [vocabulary]
    targets: Tensor,  # [n] int64
    ignore_index: int = IGNORED,
) -> Tensor:  # float32
    """Sum the cross entropy of hidden @ weightᵀ + bias over the rows whose target is not `ignore_index`.

    Gradients are as accurate as those of the plain loss. In bfloat16 the loss of each chunk is rounded to bfloat16,
    which changes the sum by at most 0.5 %; without gradients it is not.

    Args:
        hidden: Input of the output layer, shape [n, width].
        weight: Weight of the output layer, shape [vocabulary, width].
        bias: Bias of the output layer, shape [vocabulary], or None.
        targets: Token ids, shape [n], int64.
        ignore_index: Target of the rows that have no loss.

    Returns:
        The sum, a float32 scalar.

    Example:
        >>> from s2ft.train.loss import sum_of_losses
        >>> hidden, weight = torch.randn(5, 64), model.lm_head.weight
        >>> targets = torch.tensor([3, 8, -100, 1, 2])
        >>> expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
        >>> torch.isclose(sum_of_losses(hidden, weight, None, targets), expected)
        tensor(True)
    """
    rows, options = chunk_of(hidden.device.type, weight.shape[0])
    how: dict[str, Any] = {"reduction": "sum", "ignore_index": ignore_index}
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk, chunk_targets in zip(hidden.split(rows), targets.split(rows)):
        if torch.is_grad_enabled():
            loss = F.linear_cross_entropy(chunk, weight, chunk_targets, linear_bias=bias, options=options, **how)
        else:  # checkpoints are chosen by this
            loss = F.cross_entropy(F.linear(chunk, weight, bias).float(), chunk_targets, **how)
        total = total + loss
    return total


def chunk_of(device: str, vocabulary: int) -> tuple[int, "nn.LinearCrossEntropyOptions"]:
    """Choose how many rows one call of torch's linear_cross_entropy gets, and the options of that call.

    The options stop torch from dividing a chunk further. By default it would divide it into a few rows each, and read
    the weight of the output layer twice for each part.

    Args:
        device: Type of the device, such as "cuda".
        vocabulary: Number of rows of the output layer's weight.

    Returns:
        The number of rows of a chunk and the options.
    """
    rows = max(1, CHUNK.get(device, CHUNK["cuda"]) // vocabulary)
    if device == "cpu":
        return rows, nn.LinearCrossEntropyOptions(chunking_method=None, acc_policy="compact")
    # torch's default policy on a GPU is "compact", but naming it would turn off the sums in float32.
    return rows - rows % TILE or rows, nn.LinearCrossEntropyOptions(chunking_method=None)


@contextlib.contextmanager
def chunked_loss(model: nn.Module, in_evaluation: bool = False) -> Iterator[ChunkedLoss]:
    """Replace the model's loss by :class:`ChunkedLoss` inside the context.

    Args:
        model: A causal language model of transformers for which :func:`why_not_chunked` returns an empty string.
        in_evaluation: Whether the loss is also replaced in evaluation mode. The outputs then have no logits.

    Example:
        >>> from s2ft.train.loss import chunked_loss
        >>> expected = model(input_ids, labels=input_ids).loss
        >>> with chunked_loss(model.train()):
        ...     loss = model(input_ids, labels=input_ids).loss
        >>> torch.isclose(loss, expected)
        tensor(True)
    """
    chunked = ChunkedLoss(model, in_evaluation)
    hook = model.register_forward_pre_hook(chunked.before, with_kwargs=True)  # removed at the end of the context
    with (
        hook,
        replaced(chunked.head, forward=chunked.forward),
        replaced(uncompiled(model), _loss_function=chunked.loss),
    ):
        yield chunked


def loss_in_chunks(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Compute the loss of a batch without keeping the logits."""
    with chunked_loss(model):
        return model(**inputs).loss


def has_standard_loss(model: nn.Module) -> bool:
    """Return whether a model uses transformers' loss of causal language models."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return getattr(model, "loss_function", None) is ForCausalLMLoss


def divides_by_items(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Whether the model's loss is a sum divided by `num_items_in_batch`, tried on a batch with labels."""
    batch = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with evaluation_mode(model), torch.no_grad():
        try:
            one, two = (model(**batch, num_items_in_batch=torch.tensor(n, device=model.device)).loss for n in (1, 2))
        except TypeError:  # of a forward without further arguments
            return False
    return torch.allclose(one, 2 * two, rtol=1e-2)


def why_not_chunked(model: nn.Module, batch: Mapping[str, Tensor]) -> str:
    """Explain why :func:`chunked_loss` cannot replace the model's own loss.

    The model is run on a batch with both losses, and the results are compared.

    Args:
        model: The model. Its modes are restored.
        batch: Inputs with labels.

    Returns:
        The reason, or an empty string if the losses are equal.

    Example:
        >>> s2ft.train.loss.why_not_chunked(model, {"input_ids": input_ids, "labels": input_ids})
        ''
    """
    head = model.get_output_embeddings()
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    if kind_of(head) is not LINEAR or "forward" in head.__dict__:
        changed = " whose forward was replaced" if "forward" in head.__dict__ else ""
        return f"the output layer is a {'quantized ' * bool(kind_of(head).read_only)}{type(head).__name__}{changed}"
    if not has_standard_loss(model):
        return "the model does not use the standard loss of causal language models"
    with evaluation_mode(model), torch.no_grad():
        try:
            return _difference(model, batch)
        except IndexError as error:  # of a forward that computes a loss of its own from what it takes for logits
            return f"a trial of it failed: {first_line(error)}"


def _difference(model: nn.Module, batch: Mapping[str, Tensor]) -> str:
    expected, seen = model(**batch).loss, []
    with chunked_loss(model) as chunked:
        chunked.trial = True
        for chunked.scale in (1.0, SCALE):
            loss = model(**batch).loss
            if chunked.seen is None:
                return "the model does not call its loss function"
            seen.append((loss, chunked.seen))
            chunked.seen = None
    if not torch.equal(seen[0][1] * SCALE, seen[1][1]):
        return "the model changes its logits by more than a scale"
    tolerance = 1e-4 if expected.dtype == torch.float32 and model.dtype == torch.float32 else 3e-2
    if not torch.isclose(seen[0][0].float(), expected.float(), rtol=tolerance, atol=tolerance):
        return f"the chunked loss is {float(seen[0][0]):.6g}, but the model's own loss is {float(expected):.6g}"
    return ""
