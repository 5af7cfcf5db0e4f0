"""The Trainers of s2ft sft, dpo and grpo: TRL's, with the loss, the batches and the checkpoints of s2ft."""

import copy
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler
from trl import DPOTrainer, GRPOTrainer, SFTTrainer

from s2ft.attached.active import without_trainable
from s2ft.distributed import ranks_sharing
from s2ft.foreign import check_mentioned
from s2ft.model.running import evaluation_mode
from s2ft.sync.trl_trainers import with_slices
from s2ft.text.encoding import IGNORED, context_length
from s2ft.text.evaluation import HeldOut, encode_prompts, evaluate
from s2ft.text.prompts import encode_prompt, end_ids
from s2ft.train.batching import BY_LENGTH, Batching, LengthSampler, row_lengths, short_row
from s2ft.train.loss import divides_by_items
from s2ft.train.options import SCHEDULES
from s2ft.train.output import log_failure
from s2ft.train.parallel import devices_of, loading_config, rows_of_update, run_where_weights_are, trains_whole_models
from s2ft.train.trainer import AdapterCheckpoints

logger = logging.getLogger(__name__)


class RunMethods:
    """Mixin for TRL's Trainers in a run: nothing is sent, no update is wasted, a failed evaluation is logged.

    What TRL's constructor changes in a model is undone: at once what no run needs (trained parameters of a quantized
    model are rounded to bfloat16), and by :meth:`restore_model` what only TRL's own loss needs.
    """

    _tag_names: ClassVar[list[str]] = []  # TRL would add tags to the model

    def __init__(self, model, *args: Any, **options: Any) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # as TRL does
        trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        configs = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
        self._before = [(config, dict(vars(config))) for config in configs if config is not None]
        self._inner, self._forward = inner, inner.__dict__.get("forward")
        super().__init__(model, *args, **options)
        if self.args.neftune_noise_alpha is not None:
            check_mentioned(Trainer, "neftune_hook_handle", "transformers", "NEFTune's hook, to remove it")
        for parameter, data in trained.items():
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)

    def restore_model(self) -> None:
        """Give the model its own forward and the values of its configs back, and embeddings without noise."""
        self._inner.__dict__.pop("forward", None)
        if self._forward is not None:
            self._inner.forward = self._forward
        for config, values in self._before:
            vars(config).clear()
            vars(config).update(values)
        noise = getattr(self, "neftune_hook_handle", None)  # checked by the constructor
        if noise is not None:  # transformers removes it after the last step, but not after an error
            noise.remove()
            self._inner.get_input_embeddings().__dict__.pop("neftune_noise_alpha", None)

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def create_model_card(self, *args, **options) -> None:
        """Write no model card into checkpoints. The command writes one beside the adapter."""

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Make the schedule of transformers without its first step, whose learning rate of 0 wastes an update.

        Schedules whose arguments are needed but not given get those of :data:`~s2ft.train.options.SCHEDULES`.
        """
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        name = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
        needed = (
            {"num_decay_steps": max(1, num_training_steps // 10)}
            if name == "warmup_stable_decay"
            else SCHEDULES.get(name, {})
        )
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup > num_training_steps and self.is_world_process_zero():
            logger.warning(
                "warning: the warm-up has %d updates and the run %d, so that it never reaches its learning rate: "
                "lower --warmup-steps",
                warmup,
                num_training_steps,
            )
        skipped = 1 if warmup else 0
        schedule = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=self.optimizer if optimizer is None else optimizer,
            num_warmup_steps=warmup + skipped,
            num_training_steps=num_training_steps + skipped,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs or dict(needed),
        )
        if skipped and isinstance(schedule, LambdaLR):
            schedule = LambdaLR(
                schedule.optimizer, [lambda step, rate=rate: rate(step + 1) for rate in schedule.lr_lambdas]
            )
        self.lr_scheduler, self._created_lr_scheduler = schedule, True
        return schedule

    def evaluate(self, *args, **options):
        """Evaluate. An error is logged and training continues, unless there are other ranks, which would wait."""
        try:
            return super().evaluate(*args, **options)
        except Exception as error:
            if self.args.world_size > 1 or self.args.load_best_model_at_end:
                raise
            log_failure(f"the evaluation at step {self.state.global_step} failed", error)
            return {}


def without_checkpointing(arguments):
    """Return a copy of the arguments for TRL without gradient checkpointing, which the run turns on itself."""
    arguments = copy.copy(arguments)
    arguments.gradient_checkpointing, arguments.gradient_checkpointing_kwargs = False, None
    if hasattr(arguments, "activation_checkpointing"):
        arguments.activation_checkpointing, arguments.activation_checkpointing_kwargs = False, None
    return arguments


# ---- SFT ---------------------------------------------------------------------------------------------------


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
        # A copy for TRL, to which the rows are given ready and which need not know why.
        for_trl = without_checkpointing(arguments)
        for_trl.dataset_kwargs = {"skip_prepare_dataset": True}
        for_trl.packing = for_trl.padding_free = for_trl.eval_packing = False
        for_trl.shuffle_dataset, for_trl.chat_template_path, for_trl.eos_token = False, None, None
        for_trl.assistant_only_loss = for_trl.completion_only_loss = False
        if for_trl.train_sampling_strategy == BY_LENGTH and not batching.by_length:
            for_trl.train_sampling_strategy = "random"
        super().__init__(
            model,
            args=for_trl,
            train_dataset=rows,
            eval_dataset=None if held_out is None else self._whole_batches(held_out.rows, for_trl),
            data_collator=batching.collator,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.trl_loss = needs_trl_loss(arguments)
        if not self.trl_loss:
            self.restore_model()
        if not (self.trl_loss or self._devices.splits_rows):
            # Trainer asks the class. Some say no although they take the divisor, and some take it and ignore it.
            divides = partial(divides_by_items, model, batching.collator([short_row(rows)]))
            self.model_accepts_loss_kwargs = run_where_weights_are("the trial of the loss", model, divides)
        self.processing_class = None  # the Trainer would write the tokenizer's special tokens into the model's config

    # ---- batches -----------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        if self._batching.by_length:
            lengths = row_lengths(self.train_dataset if train_dataset is None else train_dataset)
            self._sampler = LengthSampler(lengths, rows_of_update(self.args), self.args.data_seed)
        else:
            self._sampler = super()._get_train_sampler(train_dataset)
        return self._sampler

    def _run_epoch(self, *args, epoch: int, **options):
        if hasattr(self._sampler, "set_epoch"):  # accelerate does not reach it in a resumed run on several ranks
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
            total = (loss.float() * count).where(count > 0, 0.0)  # the mean of no labels is NaN
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

    def _whole_batches(self, rows: Dataset, arguments) -> Dataset:
        """Add rows without labels, in place of those that two ranks would get, and that would count twice."""
        size = arguments.per_device_eval_batch_size * self._devices.groups if self._devices.groups > 1 else 1
        blank = [{"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}] * (-len(rows) % size)
        return concatenate_datasets([rows, Dataset.from_list(blank, features=rows.features)]) if blank else rows

    def _accuracy(self) -> float:
        data, examples = self._held_out, self._held_out.examples
        model, most = self.accelerator.unwrap_model(self.model), data.max_new_tokens
        fitting = encode_prompts(self._text_tokenizer, examples, context_length(model) - most, data.prompt)
        examples = [examples[number] for number in fitting]
        if ranks_sharing(self.model.parameters()) is None:  # else all devices compute each token together
            examples = examples[self.args.process_index :: self.args.world_size]
        counts = [(0, 0)]
        if examples:
            scored = evaluate(model, self._text_tokenizer, examples, data.task, max_new_tokens=most, prompt=data.prompt)
            counts = [(scored.right, len(scored.records))]
        right, count = map(sum, zip(*gather_object(counts)))
        return right / count


class SFTRunTrainer(AdapterCheckpoints, TokenRowTrainer):
    """:class:`TokenRowTrainer` for an attached model, with the checkpoints of s2ft. The arguments are the same."""


def needs_trl_loss(arguments) -> bool:
    """Return whether the arguments ask for a loss that only TRL has, which computes logits for every position."""
    return arguments.loss_type == "dft" or bool(arguments.router_aux_loss_coef)


# ---- DPO and GRPO ---------------------------------------------------------------------------------------


class Reference(nn.Module):
    """The base of an attached model, as a reference model that needs no memory.

    A call runs the attached model without its trainable adapter, in evaluation mode and without gradients. The class
    has no parameters of its own. Pass it to TRL's DPOTrainer as `ref_model`, where TRL would load the base a second
    time.

    Args:
        model: A model with a trainable adapter.

    Example:
        >>> from s2ft.train.trainers import Reference
        >>> base = model(input_ids).logits
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, ffn_kernel=False, layout="indexed"))
        >>> reference = Reference(model)
        >>> torch.equal(reference(input_ids=input_ids).logits, base), len(list(reference.parameters()))
        (True, 0)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that it is no submodule, which would be moved, wrapped or saved

    @property
    def config(self) -> Any:
        """The config of the attached model."""
        return self._model[0].config

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Run the base. Libraries replace `forward`, for instance for autocast, which the model itself does already."""
        model = self._model[0]
        with torch.no_grad(), evaluation_mode(model), without_trainable(model):
            return model(*args, **inputs)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """The weights that a call runs on, with the adapters below. By their hash TRL finds its cache of results."""
        state = self._model[0].state_dict(*args, **{**options, "keep_vars": True})
        return {name: value.detach() for name, value in state.items()}


class RLTrainer(AdapterCheckpoints, RunMethods):
    """What the two Trainers share: they leave the model, the tokenizer and the arguments as they were."""

    def __init__(self, model, *args: Any, args_of_run, tokenizer, **options: Any) -> None:
        self._given, self._pad_token = tokenizer, tokenizer.pad_token
        super().__init__(model, *args, args=without_checkpointing(args_of_run), processing_class=tokenizer, **options)

    def restore_model(self) -> None:
        """Give the tokenizer its own padding back too, which TRL has changed."""
        super().restore_model()
        self._given.pad_token = self._pad_token


class DPORunTrainer(RLTrainer, DPOTrainer):
    """TRL's DPOTrainer on pairs of token rows. Its reference model is the model itself without the adapter.

    Args:
        model: The model, with a trainable adapter.
        arguments: The DPOArguments.
        pairs: Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        tokenizer: The model's tokenizer.
        held_out: Pairs to evaluate on, or None.
        callbacks: More callbacks.
    """

    def __init__(
        self, model, arguments, pairs, *, tokenizer, held_out=None, callbacks: Sequence[Any] | None = None
    ) -> None:
        super().__init__(
            model,
            ref_model=Reference(model),
            args_of_run=arguments,
            train_dataset=pairs,
            eval_dataset=held_out,
            tokenizer=tokenizer,
            callbacks=list(callbacks or ()),
        )
        self.processing_class = None  # checkpoints need no tokenizer

    def _prepare_dataset(self, dataset, *args: Any, **options: Any):
        """Return the rows as they are: s2ft has encoded them."""
        return dataset


class GRPORunTrainer(RLTrainer, with_slices(GRPOTrainer)):
    """TRL's GRPOTrainer. Its reference model is the model itself without the adapter.

    Answers are generated by the prompts and end tokens of `s2ft generate`: by transformers, or, with
    `arguments.use_vllm`, by vLLM, which gets the trained slices after each update.

    Args:
        model: The model, with a trainable adapter.
        rewards: Functions with TRL's signature, see :func:`s2ft.train.rewards.load_rewards`.
        arguments: The GRPOArguments.
        prompts: Rows with `prompt` and the columns that the rewards need.
        tokenizer: The model's tokenizer, with the chat template to use.
        held_out: Rows to evaluate on, or None.
        callbacks: More callbacks.
        base: Folder of the base for vLLM in this process. Default: where the model was loaded from.
        name: Name of the run for a vLLM server, the same after a resume.
    """

    def __init__(
        self,
        model,
        rewards,
        arguments,
        prompts,
        *,
        tokenizer,
        held_out=None,
        callbacks: Sequence[Any] | None = None,
        base: str | None = None,
        name: str | None = None,
    ) -> None:
        if arguments.use_vllm:
            self.sender_options = {"take_over": arguments.vllm_take_over, "name": name}
            # compiling takes longer than it saves on a CPU, where it needs a C++ compiler too
            llm: dict[str, Any] = {} if torch.accelerator.is_available() else {"enforce_eager": True}
            self.llm_options = llm if base is None else {**llm, "model": base}
        without_beta = copy.copy(arguments)
        without_beta.beta = 0.0  # with a beta, TRL would load the base a second time
        super().__init__(
            model,
            reward_funcs=list(rewards),
            args_of_run=without_beta,
            train_dataset=prompts,
            eval_dataset=held_out,
            tokenizer=tokenizer,
            callbacks=list(callbacks or ()),
        )
        self.beta = self.args.beta = arguments.beta
        self.ref_model = Reference(model) if self.beta else None
        self.eos_token_ids = end_ids(tokenizer, model.generation_config)
        if self.use_vllm:
            self.vllm_generation.generation_kwargs = {
                "stop_token_ids": self.eos_token_ids,
                **self.vllm_generation.generation_kwargs,
            }
        else:
            self.generation_kwargs["eos_token_id"] = self.generation_config.eos_token_id = self.eos_token_ids

    def _tokenize_prompts(self, prompts: list):
        """Return the token ids of prompts, which are those of every other command."""
        return [encode_prompt(self._tokenizer, prompt) for prompt in prompts], None, {}

    # ---- the same rows after a resume ----------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _run_epoch(self, *args: Any, epoch: int, **options: Any):
        """Train an epoch, whose order depends on the seed and the epoch only.

        TRL's own order depends on how many epochs the process has trained, which a resumed run has not.
        """
        if getattr(self._sampler, "shuffle", False):
            self._sampler.generator.manual_seed((self._sampler.seed or 0) + epoch)
        return super()._run_epoch(*args, epoch=epoch, **options)


def refuse_sharding(arguments, command: str) -> None:
    """Raise ValueError if FSDP, DeepSpeed or tensor parallelism would shard the model, or devices would share rows."""
    if not trains_whole_models(arguments) or loading_config(arguments):
        raise ValueError(
            f"{command} does not shard the model: its reference is the same model without the adapter, "
            "which was tried on one device and on several with a whole model each; start it without FSDP, DeepSpeed, "
            "and tensor and context parallelism"
        )
