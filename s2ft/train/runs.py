"""The Trainer of s2ft sft: TRL's SFTTrainer with the loss, the batches and the checkpoints of s2ft."""

import copy
import warnings
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer
from trl import SFTTrainer

from s2ft.text.encoding import IGNORED
from s2ft.text.evaluation import evaluate
from s2ft.train.batching import BY_LENGTH, Batching, LengthSampler, row_lengths
from s2ft.train.held_out import HeldOut
from s2ft.train.run_trainer import Changed, RunMethods
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
        self._sampler: LengthSampler | None = None
        self._evaluated = torch.zeros(2)  # sum of the loss, number of labels
        self._changed = Changed(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`(label_smoothing_factor|use_liger_kernel)", FutureWarning)
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
        self.label_smoother = None  # the loss has it
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError("context and sequence parallelism divide rows among devices, which s2ft sft can't do yet")

    def restore_model(self) -> None:
        """Give the model its own forward and config back, which TRL has changed for its loss."""
        self._changed.undo()

    # ---- batches -----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        if not self._batching.by_length:
            return super()._get_train_sampler(train_dataset)
        args = self.args
        update = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        lengths = row_lengths(self.train_dataset if train_dataset is None else train_dataset)
        self._sampler = LengthSampler(lengths, update, args.seed if args.data_seed is None else args.data_seed)
        return self._sampler

    def _run_epoch(self, *args, epoch: int, **options):
        if self._sampler is not None:  # accelerate does not reach the sampler of a resumed run on several ranks
            self._sampler.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **options)

    def _track_num_input_tokens(self, inputs) -> None:
        """Count tokens without padding. Packed batches have no attention mask; their padding is all position 0."""
        if self.args.include_num_input_tokens_seen == "no" or "attention_mask" in inputs:
            return super()._track_num_input_tokens(inputs)
        positions = inputs["position_ids"]
        tokens = (positions > 0).sum() + (positions == 1).sum()  # a row of one token has no label and does not count
        self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())

    # ---- loss --------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss by the model's forward, whose loss function sft() has replaced, or by TRL."""
        if self.trl_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Compute the loss of a batch, and add it up over all labels."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        shifted = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
        count = (shifted != IGNORED).sum().to(loss.device)
        self._evaluated = self._evaluated.to(loss.device) + torch.stack([loss.float() * count, count.float()])
        return loss, logits, labels

    # ---- evaluation --------------------------------------------------------------------------------------

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **options):
        """Compute the loss, as the mean over all labels, and, with a task, the accuracy."""
        self._evaluated = torch.zeros(2)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        total, count = self.accelerator.reduce(self._evaluated.to(self.args.device), "sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / max(count, 1)
        if self._held_out is not None and self._held_out.task is not None:
            output.metrics[f"{metric_key_prefix}_accuracy"] = self._accuracy()
        return output

    def _accuracy(self) -> float:
        data = self._held_out
        examples = data.examples[self.args.process_index :: self.args.world_size]
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
    arguments = copy.copy(arguments)
    arguments.dataset_kwargs = {"skip_prepare_dataset": True}
    arguments.packing = arguments.padding_free = arguments.eval_packing = False
    arguments.shuffle_dataset, arguments.chat_template_path, arguments.eos_token = False, None, None
    arguments.assistant_only_loss = arguments.completion_only_loss = False
    if arguments.train_sampling_strategy == BY_LENGTH and not batching.by_length:
        arguments.train_sampling_strategy = "random"
    arguments.gradient_checkpointing, arguments.gradient_checkpointing_kwargs = False, None  # sft() turns it on
    if hasattr(arguments, "activation_checkpointing"):
        arguments.activation_checkpointing, arguments.activation_checkpointing_kwargs = False, None
    return arguments
