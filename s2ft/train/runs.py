"""The Trainer of s2ft sft: TRL's SFTTrainer with the loss, the batches and the checkpoints of s2ft."""

from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer
from trl import SFTTrainer

from s2ft.distributed import ranks_sharing
from s2ft.text.encoding import IGNORED
from s2ft.text.evaluation import evaluate
from s2ft.train.batching import BY_LENGTH, Batching, LengthSampler, row_lengths
from s2ft.train.held_out import HeldOut
from s2ft.train.parallel import devices_of, rows_of_update
from s2ft.train.run_trainer import Changed, RunMethods, without_checkpointing
from s2ft.train.trainer import AdapterCheckpoints


class TokenRowTrainer(RunMethods, SFTTrainer):
    """TRL's SFTTrainer on token rows, with the loss of s2ft where logits are only computed for labels.

    The model can have any trainable parameters, so that other methods can be compared under the same conditions. TRL's
    own loss is used where only it has what the arguments ask for: ``loss_type="dft"`` and
    ``router_aux_loss_coef``. The trainer does not change the tokenizer or the model's config, and sends no telemetry.

    Args:
        model: The model.
        arguments: The SFTArguments.
        rows: The token rows to train on, as :meth:`~s2ft.train.batching.Batching.prepare` returns them.
        batching: How rows become batches.
        tokenizer: The model's tokenizer.
        held_out: Data to evaluate on, or None. If it has a task, its examples are answered at each evaluation.
        callbacks: More callbacks.
    """

    def __init__(
        self,
        model,
        arguments,
        rows,
        batching: Batching,
        *,
        tokenizer,
        held_out: HeldOut | None = None,
        callbacks: Any = None,
    ) -> None:
        self._batching, self._held_out, self._text_tokenizer = batching, held_out, tokenizer
        self._devices = devices_of(arguments)
        self._sampler: LengthSampler | None = None
        self._evaluates, self._evaluated = False, torch.zeros(2)  # sum of the loss, number of labels
        self._changed = Changed(model)
        super().__init__(
            model=model,
            args=_for_trl(arguments, batching),
            train_dataset=rows,
            eval_dataset=held_out.rows if held_out is not None else None,
            data_collator=batching.collator,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self._changed.undo_always()
        self.trl_loss = needs_trl_loss(arguments)
        if not self.trl_loss:
            self.restore_model()
            self.aux_loss_enabled = False
        self.processing_class = None  # the Trainer would write the tokenizer's special tokens into the model's config

    def restore_model(self) -> None:
        """Give the model its own forward and config back, which TRL has changed for its loss."""
        self._changed.undo()

    # ---- batches -----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        if not self._batching.by_length:
            return super()._get_train_sampler(train_dataset)
        lengths = row_lengths(self.train_dataset if train_dataset is None else train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = LengthSampler(lengths, rows_of_update(self.args), seed)
        return self._sampler

    def _run_epoch(self, *args, epoch: int, **options):
        if self._sampler is not None:  # accelerate does not reach the sampler of a resumed run on several ranks
            self._sampler.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **options)

    def training_step(self, model, inputs, *args, **options):
        """Train on a batch. Its tokens are counted before, because a row that is divided is cut in place."""
        self._tokens = self._tokens_of(inputs)
        return super().training_step(model, inputs, *args, **options)

    def _tokens_of(self, inputs) -> torch.Tensor:
        if self.args.include_num_input_tokens_seen == "all":
            return torch.tensor(inputs["input_ids"].numel(), device=self.args.device)
        if "attention_mask" in inputs and not self._devices.splits_rows:
            return inputs["attention_mask"].sum()
        positions = inputs["position_ids"]  # padding is all position 0, and a row of one token has no label
        return (positions > 0).sum() + (positions == 1).sum()

    def _track_num_input_tokens(self, inputs) -> None:
        """Add up tokens without padding, once for all devices that train on the same rows."""
        if self.args.include_num_input_tokens_seen != "no":
            tokens = int(self.accelerator.gather(self._tokens.to(self.args.device)).sum())
            self.state.num_input_tokens_seen += tokens // self._devices.together

    # ---- loss --------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss by the model's forward, whose loss function sft() has replaced, or by TRL."""
        if self.trl_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Compute the loss of a batch, and add it up over all labels."""
        shifted = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
        count = (shifted != IGNORED).sum().to(self.args.device)
        if self._devices.splits_rows:  # by transformers, since TRL would compute whole rows on every device
            loss, logits, labels = Trainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)
            scale = self._devices.count if self.args.average_tokens_across_devices else 1
            total, count = loss.float() / scale, count / self._devices.together
        else:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            total = loss.float() * count
        self._evaluated = self._evaluated.to(loss.device) + torch.stack([total, count.float()])
        return loss, logits, labels

    def _get_num_items_in_batch(self, batch_samples, device):
        """Count the labels by which a loss is divided. An evaluation adds up losses and divides them at the end."""
        return (
            torch.ones((), device=device) if self._evaluates else super()._get_num_items_in_batch(batch_samples, device)
        )

    # ---- evaluation --------------------------------------------------------------------------------------

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **options):
        """Compute the loss, as the mean over all labels, and, with a task, the accuracy."""
        self._evaluated, self._evaluates = torch.zeros(2), True
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        finally:
            self._evaluates = False
        total, count = self.accelerator.reduce(self._evaluated.to(self.args.device), "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)
        if self._held_out is not None and self._held_out.task is not None:
            output.metrics[f"{metric_key_prefix}_accuracy"] = self._accuracy()
        return output

    def _accuracy(self) -> float:
        data, examples = self._held_out, self._held_out.examples
        if ranks_sharing(self.model.parameters()) is None:  # else all devices compute each token together
            examples = examples[self.args.process_index :: self.args.world_size]
        counts = [(0, 0)]
        if examples:
            model = self.accelerator.unwrap_model(self.model)
            scored = evaluate(model, self._text_tokenizer, examples, data.task, data.batch_size, data.max_new_tokens)
            counts = [(scored.right, len(scored.records))]
        counts = gather_object(counts)
        return sum(right for right, _ in counts) / sum(count for _, count in counts)


class SFTRunTrainer(AdapterCheckpoints, TokenRowTrainer):
    """:class:`TokenRowTrainer` for an attached model, with the checkpoints of s2ft. The arguments are the same."""


def needs_trl_loss(arguments) -> bool:
    """Return whether the arguments ask for a loss that only TRL has, which computes logits for every position."""
    return arguments.loss_type == "dft" or bool(arguments.router_aux_loss_coef)


def _for_trl(arguments, batching: Batching):
    """Return a copy of the arguments for TRL, to which the rows are given ready and which need not know why."""
    arguments = without_checkpointing(arguments)
    arguments.dataset_kwargs = {"skip_prepare_dataset": True}
    arguments.packing = arguments.padding_free = arguments.eval_packing = False
    arguments.shuffle_dataset, arguments.chat_template_path, arguments.eos_token = False, None, None
    arguments.assistant_only_loss = arguments.completion_only_loss = False
    if arguments.train_sampling_strategy == BY_LENGTH and not batching.by_length:
        arguments.train_sampling_strategy = "random"
    return arguments
