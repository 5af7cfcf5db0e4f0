"""The Trainers of s2ft dpo and s2ft grpo: TRL's, with one model in memory and with exact checkpoints."""

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl import DPOTrainer, GRPOTrainer
from trl.trainer.utils import RepeatSampler

import s2ft
from s2ft.text.prompts import encode_prompt, end_ids
from s2ft.train.parallel import devices_of, loading_config
from s2ft.train.reference import Reference
from s2ft.train.run_trainer import Changed, RunTrainer


class RLTrainer(RunTrainer):
    """What the two Trainers share: they leave the model, the tokenizer and the arguments as they were."""

    def __init__(self, model, *args: Any, args_of_run, tokenizer, **options: Any) -> None:
        self._changed, self._given, self._pad_token = Changed(model), tokenizer, tokenizer.pad_token
        super().__init__(model, *args, args=_for_trl(args_of_run), processing_class=tokenizer, **options)
        self._changed.undo_always()

    def restore_model(self) -> None:
        """Give the model its own forward and config back, and the tokenizer its own padding, which TRL has changed."""
        self._changed.undo()
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

    Raises:
        ValueError: The model would be sharded.
    """

    def __init__(
        self, model, arguments, pairs, *, tokenizer, held_out=None, callbacks: Sequence[Any] | None = None
    ) -> None:
        refuse_sharding(arguments, "s2ft dpo")
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


class GRPORunTrainer(RLTrainer, GRPOTrainer):
    """TRL's GRPOTrainer. Its reference model is the model itself without the adapter.

    Answers are generated with the adapter fused into the weights, by the prompts and end tokens of `s2ft generate`.

    Args:
        model: The model, with a trainable adapter.
        rewards: Functions with TRL's signature, see :func:`s2ft.train.rewards.load_rewards`.
        arguments: The GRPOArguments.
        prompts: Rows with `prompt` and the columns that the rewards need.
        tokenizer: The model's tokenizer, with the chat template to use.
        held_out: Rows to evaluate on, or None.
        callbacks: More callbacks.

    Raises:
        ValueError: The model would be sharded.
    """

    def __init__(
        self, model, rewards, arguments, prompts, *, tokenizer, held_out=None, callbacks: Sequence[Any] | None = None
    ) -> None:
        refuse_sharding(arguments, "s2ft grpo")
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
        self.generation_kwargs["eos_token_id"] = self.generation_config.eos_token_id = self.eos_token_ids

    def _tokenize_prompts(self, prompts: list):
        """Return the token ids of prompts. A text begins as a text of the training does, and has no end token."""
        if isinstance(prompts[0], str):
            return [encode_prompt(self._tokenizer, prompt) for prompt in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    def _generate_single_turn(self, *args: Any, **options: Any):
        with fused(self.model):
            return super()._generate_single_turn(*args, **options)

    # ---- the same rows after a resume ----------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        if not isinstance(sampler := super()._get_train_sampler(dataset), RepeatSampler):
            return sampler
        self._epochs = EpochSampler(sampler)
        return self._epochs

    def _run_epoch(self, *args: Any, epoch: int, **options: Any):
        self._epochs.set_epoch(epoch)  # accelerate does not reach the sampler of a resumed run on several ranks
        return super()._run_epoch(*args, epoch=epoch, **options)


class EpochSampler(torch.utils.data.Sampler):
    """TRL's sampler, whose order depends on the seed and the epoch only.

    TRL's own order depends on how many epochs the process has trained, which a resumed run has not.

    Args:
        sampler: TRL's sampler.
    """

    def __init__(self, sampler: RepeatSampler) -> None:
        self.sampler = sampler
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration has the order of."""
        self.epoch = epoch

    def __iter__(self):
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed((self.sampler.seed or 0) + self.epoch)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


@contextmanager
def fused(model):
    """Hold the trainable adapter in the weights inside the context. Each token is then a plain matrix product."""
    s2ft.fuse(model)
    try:
        yield
    finally:
        s2ft.unfuse(model)


def refuse_sharding(arguments, command: str) -> None:
    """Raise ValueError if FSDP, DeepSpeed or tensor parallelism would shard the model, or devices would share rows."""
    sharded = [name for name in ("fsdp", "deepspeed") if getattr(arguments, name, None)]
    state = arguments.distributed_state
    kind = str(getattr(getattr(state, "distributed_type", None), "value", "")).lower()
    if any(name in kind for name in ("fsdp", "deepspeed")):
        sharded.append(kind)
    if (devices := devices_of(arguments)).together > 1 or loading_config(arguments):
        sharded.append(str(devices))
    if sharded:
        raise ValueError(
            f"{command} does not shard the model ({sharded[0]}): its reference is the same model without the adapter, "
            "which was tried on one device and on several with a whole model each; start it without FSDP, DeepSpeed, "
            "and tensor and context parallelism"
        )


def _for_trl(arguments):
    """Return a copy of the arguments for TRL. The functions of s2ft turn checkpointing on; see sft.checkpointing."""
    arguments = copy.copy(arguments)
    arguments.gradient_checkpointing, arguments.gradient_checkpointing_kwargs = False, None
    if hasattr(arguments, "activation_checkpointing"):
        arguments.activation_checkpointing, arguments.activation_checkpointing_kwargs = False, None
    return arguments
