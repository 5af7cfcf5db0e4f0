"""Which rows form a batch: rows of similar length padded, rows in a random order padded, or rows packed into one.

Packed rows need an attention that keeps them apart. :func:`why_not_packed` tries it on the model. Attention over
sequences of different lengths (flash or flex attention on a GPU) then needs no padding at all, which is the default
there. Elsewhere the rows of a batch have similar lengths. TRL packs the rows.

Tried in place of what is here: the collators of TRL and DataCollatorWithFlattening of transformers compute logits for
every position, which halves the speed, and pad no packs; LengthGroupedSampler trains from long to short rows again
and again.
"""

import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from s2ft.foreign import read
from s2ft.model.running import evaluation_mode
from s2ft.text.collator import PackedCollator, SplitCollator, TokenCollator
from s2ft.text.generation import takes_left_padding
from s2ft.train.parallel import devices_of, rows_of_update, run_where_weights_are

logger = logging.getLogger(__name__)
BY_LENGTH = "group_by_length"  # a value of transformers' train_sampling_strategy
VARLEN = ("flash", "flex")  # attention that computes nothing between the rows of one sequence, by its name
JITTER = 0.2  # lengths that differ by less than this share can be in one update
TRIAL = 48  # tokens of a row in the trial of packing
AMONG = 64  # rows of which the shortest is tried


@dataclass(frozen=True)
class Batching:
    """How the rows of a run become batches.

    Attributes:
        collator: Makes a batch of rows.
        packed: Whether the rows of the training data are packed before the training.
        by_length: Whether the rows of a batch have similar lengths.
        why: The reason, for the log.
    """

    collator: Callable[[Sequence[Mapping]], dict]
    packed: bool
    by_length: bool
    why: str

    def prepare(self, rows, arguments):
        """Shuffle and pack the rows if the arguments say so.

        Args:
            rows: The token rows, a Dataset.
            arguments: The SFTArguments of the run.

        Returns:
            The rows of the training.
        """
        rows = rows.select_columns(["input_ids", "labels"])
        if self.packed:
            from trl import pack_dataset

            if arguments.shuffle_dataset:
                rows = rows.shuffle(seed=arguments.seed)
            rows = pack_dataset(rows, arguments.max_length, arguments.packing_strategy)
        return rows.shuffle(seed=arguments.seed) if arguments.shuffle_dataset else rows

    def line(self, rows: int, packs: int) -> str:
        """Return one line about the batches.

        Args:
            rows: Number of rows.
            packs: Number of packs.
        """
        return f"batches: {f'{rows:,} rows in {packs:,} packs, ' if self.packed else ''}{self.why}"


def choose_batching(model: nn.Module, pad: int, rows, arguments, all_logits: bool = False) -> Batching:
    """Choose how rows become batches. All devices must call this.

    Args:
        model: The model. It is run on two short rows if rows may be packed.
        pad: The token id to pad with.
        rows: The token rows, a Dataset.
        arguments: The SFTArguments. `packing` None and the default `train_sampling_strategy` leave the choice to this
            function.
        all_logits: Whether batches have labels for all positions, which TRL's own loss needs.

    Raises:
        ValueError: `packing` or `padding_free` is set, and the model mixes up packed rows.
    """
    multiple = arguments.pad_to_multiple_of if isinstance(arguments.pad_to_multiple_of, int) else 1
    by_length, varlen = arguments.train_sampling_strategy == BY_LENGTH, has_varlen_attention(model)
    keep = takes(model, "logits_to_keep") and not all_logits
    devices = devices_of(arguments)
    if devices.splits_rows:
        collator = SplitCollator(pad, math.lcm(multiple, 2 * devices.context))
        return Batching(collator, False, by_length, f"padded, each row divided among {devices.context} devices")
    asked = "packing" if arguments.packing else "padding_free" if arguments.padding_free else ""
    packed = PackedCollator(pad, arguments.padding_free or varlen, keep, multiple)
    reason = None  # not tried
    if asked or (arguments.packing is None and by_length and varlen):
        reason = run_where_weights_are("the trial of packing", model, partial(why_not_packed, model, rows, packed))
    if asked and reason:
        raise ValueError(f"{asked} would mix up rows in this model: {reason}; leave {asked} out, rows are then padded")
    if arguments.packing:
        return Batching(packed, True, False, f"packed to at most {arguments.max_length:,} tokens")
    if reason == "":
        return Batching(packed, False, by_length, f"without padding, {_attention(model)} keeps rows apart")
    left = run_where_weights_are("the trial of padding", model, partial(takes_left_padding, model))
    collator = TokenCollator(pad, keep and left, multiple, "left" if left else "right")
    because = f" ({_attention(model)} would mix up rows without padding: {reason})" if reason else ""
    order = "of similar length" if by_length else f"in {arguments.train_sampling_strategy} order"
    return Batching(collator, False, by_length, f"padded{'' if left else ' on the right'}, rows {order}{because}")


def updates_of(arguments: Any, rows: Any) -> int:
    """Return the number of updates of a run, which is approximate if rows are packed.

    Args:
        arguments: The SFTArguments.
        rows: The token rows, a Dataset.
    """
    if arguments.max_steps > 0:
        return arguments.max_steps
    count = math.ceil(sum(row_lengths(rows)) / arguments.max_length) if arguments.packing else len(rows)
    return math.ceil(math.ceil(count / rows_of_update(arguments)) * arguments.num_train_epochs)


def takes(model: nn.Module, name: str) -> bool:
    """Return whether the model's forward has a parameter of this name."""
    return name in inspect.signature(type(model).forward).parameters


def has_varlen_attention(model: nn.Module) -> bool:
    """Return whether the attention of a model on a GPU computes nothing between the rows of one sequence."""
    return _attention(model).startswith(VARLEN) and next(model.parameters()).is_cuda


def _attention(model: nn.Module) -> str:
    found = read(model.config, "_attn_implementation", "transformers", "the kernel of a model's attention")
    return str(found or "attention").removeprefix("paged|")


def why_not_packed(model: nn.Module, rows, collator: PackedCollator = PackedCollator(0)) -> str:
    """Explain why rows of one sequence would not be kept apart by the model, by a trial on two short rows.

    The logits of a row must not change with the row before it in the sequence, and must be those of the row alone.

    Args:
        model: The model. Its modes are restored.
        rows: Token rows. The first two are tried.
        collator: Makes the batches of the run.

    Returns:
        The reason, or an empty string if the rows are kept apart.

    Example:
        >>> from s2ft.train.batching import why_not_packed
        >>> why_not_packed(model, [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10]}])
        ''
    """
    if not takes(model, "position_ids"):
        return f"{type(model).__name__} takes no position_ids"
    first, *second = (list(row["input_ids"][:TRIAL]) for row in itertools.islice(rows, 2))
    second = second[0] if second else first
    other = [(token + 1) % model.config.get_text_config().vocab_size for token in first]
    with evaluation_mode(model), torch.no_grad():
        try:
            alone = _last_logits(model, collator, [second])
            after, after_other = (_last_logits(model, collator, [before, second]) for before in (first, other))
        except Exception as error:  # the model's code may not take packed rows at all
            return f"it fails on packed rows: {str(error).strip().split(chr(10))[0] or type(error).__name__}"
    exact = model.dtype == torch.float32
    scale = float(alone.std())
    if float((after - after_other).abs().max()) > (1e-4 if exact else 1e-2) * scale:
        return "a row depends on the row before it"
    if float((after - alone).abs().max()) > (1e-3 if exact else 1e-1) * scale:
        return "a packed row gets other logits than the row alone"
    return ""


def _last_logits(model: nn.Module, collator: PackedCollator, rows: list[list[int]]) -> Tensor:
    """Return the logits of the last of some rows that are packed, [tokens, vocabulary]."""
    ids = [token for row in rows for token in row]
    batch = replace(collator, chosen_logits=False, multiple=1)(
        [{"input_ids": ids, "labels": ids, "seq_lengths": [len(row) for row in rows]}]
    )
    del batch["labels"], batch["shift_labels"]
    batch = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return model(**batch).logits[0, -len(rows[-1]) :].float()


class LengthSampler(Sampler[int]):
    """Order rows so that the rows of an update have similar lengths, in an order that depends only on seed and epoch.

    The rows are sorted by their lengths times a random number, so that each epoch has other updates, and the updates
    are shuffled. The longest rows come first, so that too little memory shows at once. The sampler of transformers
    draws from the global random state, which differs after a resume, and does not shuffle the updates.

    Args:
        lengths: Length of each row in tokens.
        rows: Rows of one update.
        seed: Seed of the order.

    Example:
        >>> from s2ft.train.batching import LengthSampler
        >>> order = list(LengthSampler([3, 9, 4, 8], rows=2, seed=0))
        >>> sorted(order[:2]), sorted(order[2:])
        ([1, 3], [0, 2])
    """

    def __init__(self, lengths: Sequence[int], rows: int, seed: int) -> None:
        self.lengths, self.rows, self.seed, self.epoch = lengths, rows, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        lengths = torch.tensor(self.lengths, dtype=torch.float64)
        varied = lengths * (1 + JITTER * torch.rand(len(lengths), generator=generator, dtype=torch.float64))
        order = varied.argsort(descending=True)
        longest = int(lengths.argmax())
        order = [longest, *(row for row in order.tolist() if row != longest)]
        updates = [order[start : start + self.rows] for start in range(0, len(order), self.rows)]
        whole = len(order) // self.rows  # an incomplete update stays the last one
        shuffled = [0, *(1 + torch.randperm(max(whole - 1, 0), generator=generator)).tolist()][:whole]
        yield from (row for update in [*shuffled, *range(whole, len(updates))] for row in updates[update])


def short_row(rows) -> Mapping[str, Sequence[int]]:
    """Return the shortest of the first token rows. A trial of the model on it takes the least time.

    Args:
        rows: Token rows.
    """
    return min(itertools.islice(rows, AMONG), key=lambda row: len(row["input_ids"]))


def row_lengths(rows: Any) -> list[int]:
    """Return the number of tokens of each row of a Dataset, without making Python lists of the tokens."""
    from pyarrow import compute

    batches = rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    return [length for batch in batches for length in compute.list_value_length(batch["input_ids"]).to_pylist()]
