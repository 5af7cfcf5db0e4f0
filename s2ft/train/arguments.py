"""Arguments of TRL's trainers with the defaults of s2ft. Values that cannot work with S²FT are refused."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from trl import DPOConfig, GRPOConfig, SFTConfig

from s2ft.config import LARGEST, option, refuse
from s2ft.sync.trl_trainers import SLEEP

DEFAULT_WARMUP = 100  # updates of the default warm-up, which is at most a tenth of the run
POSITIVE = ("learning_rate", "num_train_epochs", "logging_steps")
FINITE = ("learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2",
          "adam_epsilon")  # fmt: skip
LEAST = {
    **dict.fromkeys(("weight_decay", "max_grad_norm", "save_steps", "save_total_limit", "seed", "data_seed"), 0),
    **dict.fromkeys(("eval_steps", "warmup_steps", "neftune_noise_alpha"), 0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    "max_length": 2,
}
DICTIONARIES = ("model_init_kwargs", "lr_scheduler_kwargs", "gradient_checkpointing_kwargs")
# Arguments that cannot work, with the reason and the way out.
REFUSED = {
    "auto_find_batch_size": "the updates would depend on the memory that is free, so no run could be resumed exactly; "
    "s2ft estimate says which batch fits",
    "use_liger_kernel": "it replaces the FFN after s2ft has attached to it; set kernels: liger instead",
    "optim_target_modules": "it is for optimizers that work on the gradients of whole weights, which s2ft does not "
    "train",
    "save_on_each_node": "the output folder is shared by all machines, and one rank writes it",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed exactly; the adapter is saved in any case",
    "label_smoothing_factor": "the cross entropy of s2ft sft has none, and TRL will drop it too; s2ft dpo has "
    "label_smoothing",
    "include_for_metrics": "the metrics of a run are the loss and, with eval_task, the accuracy",
    "batch_eval_metrics": "the metrics of a run are the loss and, with eval_task, the accuracy",
    "do_predict": "s2ft eval scores answers of a trained model",
    "hub_always_push": "the adapter is uploaded once, at the end",
    "ignore_data_skip": "a resumed run would train on rows again, so it would not equal an uninterrupted one",
    "sync_ref_model": "the reference is the base, which is never trained; there is no second model that could follow "
    "the adapter",
    "enable_jit_checkpoint": "a run that it ends would count as complete; start the command again with --resume, which "
    "goes on from the last checkpoint of --save-steps",
    "use_transformers_continuous_batching": "it keeps buffers of its own for a model that does not change; the answers "
    "are generated in batches by model.generate",
}


@dataclass
class RunArguments:
    """Defaults of s2ft for the arguments of a trainer. The class is a base beside one of TRL's configurations.

    Attributes:
        refused: Arguments that cannot work, with the reason and the way out.

    Raises:
        ValueError: A value is out of range, or cannot work with S²FT. The message names the argument.
    """

    warmup_steps: float | None = field(
        default=None,
        metadata={
            "help": "updates of the linear warm-up; a number below 1 is a share of the run",
            "shown": f"{DEFAULT_WARMUP}, but at most a tenth of the run",
        },
    )
    bf16: bool | None = field(
        default=False, metadata={"help": "multiply in bfloat16 while the weights keep their dtype"}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute activations again in the backward pass: less memory, more time"}
    )
    logging_steps: float = field(default=1, metadata={"help": "updates between two lines of log.jsonl"})
    save_steps: float = field(default=200, metadata={"help": "updates between two checkpoints; 0 writes none"})
    save_total_limit: int | None = field(
        default=2, metadata={"help": "number of checkpoints to keep, the newest ones; 0 keeps all"}
    )
    report_to: None | str | list[str] = field(
        default="none",
        metadata={"help": "more loggers by their names in transformers: tensorboard, wandb, ...", "metavar": "NAME"},
    )
    disable_tqdm: bool | None = field(default=True, metadata={"help": "turn off the trainer's own progress bar"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "remove columns that the model does not take"})
    include_num_input_tokens_seen: str | bool = field(
        default="non_padding", metadata={"help": "which tokens are counted: all, non_padding, no"}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "let DistributedDataParallel look for unused parameters"}
    )

    refused: ClassVar[dict[str, str]] = REFUSED

    def __post_init__(self) -> None:
        _check(self)
        if self.save_steps == 0:
            self.save_strategy, self.save_steps = "no", 500
        self.save_total_limit = self.save_total_limit or None
        self._limited_warmup = self.warmup_steps is None
        self.warmup_steps = DEFAULT_WARMUP if self.warmup_steps is None else self.warmup_steps
        if getattr(self, "activation_checkpointing", True) is None:  # transformers 5.2x has a new name, and warns
            self.activation_checkpointing = self.gradient_checkpointing
            self.gradient_checkpointing_kwargs, self.activation_checkpointing_kwargs = (
                None,
                self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs,
            )
        # Without a GPU, accelerate needs this. Otherwise each process of a launcher would have rank 0.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        if self.data_seed is None:
            self.data_seed = self.seed
        super().__post_init__()
        dictionaries = {name: getattr(self, name, None) or {} for name in DICTIONARIES}
        refuse(
            *(
                (not isinstance(value, dict), f"{name} must be a dictionary, got {value!r}")
                for name, value in dictionaries.items()
            )
        )
        # One process trains on one device, and torchrun or accelerate start several processes. With several visible
        # devices Trainer would choose nn.DataParallel, which copies modules and loses the adapter's state.
        self._n_gpu = min(self.n_gpu, 1)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the number of updates of the warm-up.

        Args:
            num_training_steps: Number of updates of the run.

        Returns:
            The number that `warmup_steps` says. The default is limited to a tenth of the run, because a short run
            would otherwise end before it reaches its learning rate.
        """
        steps = super().get_warmup_steps(num_training_steps)
        return min(steps, num_training_steps // 10) if self._limited_warmup else steps


@dataclass
class SFTArguments(RunArguments, SFTConfig):
    """TRL's SFTConfig with the defaults of s2ft: a larger learning rate, loss on the answers, exact checkpoints.

    Raises:
        ValueError: A value is out of range, or cannot work with S²FT. The message names the argument.

    Example:
        >>> from s2ft.train.arguments import SFTArguments
        >>> arguments = SFTArguments(output_dir="my-run", num_train_epochs=2)
        >>> arguments.learning_rate, arguments.assistant_only_loss, arguments.get_warmup_steps(200)
        (0.0002, True, 20)
    """

    learning_rate: float = field(
        default=2e-4,
        metadata={
            "help": "peak learning rate",
            "shown": "by the model's width, the share that is trained, and the size of the weights",
        },
    )
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "compute the loss on the assistant's turns of a chat only"}
    )

    packing: bool | None = field(
        default=None,
        metadata={
            "help": "pack several rows into one sequence of --max-length tokens; refused where the model would mix up "
            "the rows; an update is then so many packs, with more rows in it",
            "shown": "rows are not packed",
        },
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "order of the rows: group_by_length, random, sequential, batch_rebalance"},
    )

    def __post_init__(self) -> None:
        refuse(
            (
                self.dataset_kwargs,
                f"dataset_kwargs is not used: s2ft prepares the rows itself, got {self.dataset_kwargs!r}; leave it out",
            ),
            (self.packing and self.max_length is None, "packing joins rows up to max_length: give it a number"),
            (
                self.packing and self.packing_strategy == "wrapped",
                "packing_strategy 'wrapped' mixes up rows: rows would see each other; use 'bfd', the default",
            ),
        )
        super().__post_init__()


@dataclass
class RLArguments(RunArguments):
    """What DPO and GRPO share: ten times TRL's learning rate, which is for full fine-tuning, and one model."""

    learning_rate: float = field(
        default=1e-5, metadata={"help": "peak learning rate; too high a one makes the model forget to write"}
    )


@dataclass
class DPOArguments(RLArguments, DPOConfig):
    """TRL's DPOConfig with the defaults of s2ft.

    Raises:
        ValueError: A value is out of range, or cannot work with S²FT. The message names the argument.

    Example:
        >>> from s2ft.train.arguments import DPOArguments
        >>> arguments = DPOArguments(output_dir="my-run", beta=0.2)
        >>> arguments.learning_rate, arguments.loss_type
        (1e-05, ['sigmoid'])
    """

    refused: ClassVar[dict[str, str]] = {**REFUSED, "padding_free": "TRL's DPOTrainer does not do it at present"}


@dataclass
class GRPOArguments(RLArguments, GRPOConfig):
    """TRL's GRPOConfig with the defaults of s2ft.

    Raises:
        ValueError: A value is out of range, or cannot work with S²FT. The message names the argument.

    Example:
        >>> from s2ft.train.arguments import GRPOArguments
        >>> arguments = GRPOArguments(output_dir="my-run", per_device_train_batch_size=4, num_generations=2)
        >>> arguments.updates_per_generation, arguments.beta
        (1, 0.0)
    """

    refused: ClassVar[dict[str, str]] = {
        **REFUSED,
        "chat_template_kwargs": "the adapter would not record it; write it into --chat-template",
        "use_adaptive_entropy": "a resumed run would begin with another coefficient",
    }
    include_num_input_tokens_seen: str | bool = field(
        default="no", metadata={"help": "not used: TRL counts the tokens of prompts and answers"}
    )
    rewards: list[str] = option(
        [],
        "what answers are rewarded for: answer_equal, format, FILE.py:NAME, or FILE.py for all its rewards; their sum "
        "counts, weighted by --reward-weights",
        metavar="REWARD",
    )
    metric_for_best_model: str | None = field(
        default="reward", metadata={"help": "what the best checkpoint has most of; the loss of GRPO says nothing"}
    )
    vllm_take_over: bool = field(
        default=False, metadata={"help": "take the vLLM server from another run that has died while it used the server"}
    )

    def __post_init__(self) -> None:
        self._chosen = self.generation_batch_size, self.steps_per_generation
        refuse(
            (self.use_vllm and self.vllm_enable_sleep_mode, SLEEP),
            (
                not self.num_generations or self.num_generations < 2,
                f"num_generations must be at least 2, since answers to a prompt are compared with each other, got "
                f"{self.num_generations}",
            ),
            (None not in self._chosen, "generation_batch_size and steps_per_generation say the same: give one of them"),
        )
        # TRL checks the numbers at once, but the command divides batch_size among the devices later.
        self.generation_batch_size, self.steps_per_generation = None, self.num_generations
        super().__post_init__()
        self.set_generation(check=False)

    def set_generation(self, check: bool = True) -> None:
        """Set how many answers are generated at once. Call it after the rows of an update or of a pass were changed.

        Args:
            check: Whether numbers that do not fit together are an error.

        Raises:
            ValueError: The numbers do not fit together. The message names them.
        """
        total, steps = self._chosen
        at_once = self.per_device_train_batch_size * self.world_size
        total = total or at_once * (steps or self.gradient_accumulation_steps)
        self.generation_batch_size, self.steps_per_generation = total, max(1, total // at_once)
        if not check:
            return
        divisors = {"num_generations": self.num_generations, "the answers of a forward pass": at_once}
        refuse(
            *(
                (
                    total % number,
                    f"{total} answers are generated at once, which is no multiple of {name}, {number}: the nearest "
                    f"number is {max(1, round(total / number)) * number}; set batch_size to it",
                )
                for name, number in divisors.items()
            )
        )
        cycle = self.updates_per_generation
        name = {"steps": "save_steps", "best": "eval_steps"}.get(self.save_strategy)
        every = cycle if name is None else getattr(self, name) or cycle
        if cycle > 1 and every % cycle:
            raise ValueError(
                f"{name} {every:g} must be a multiple of {cycle}, the updates with the same generated "
                "answers, so that a resumed run has the same answers"
            )

    @property
    def updates_per_generation(self) -> int:
        """Number of updates after which the next one begins with new answers."""
        passes = self.steps_per_generation * self.num_iterations
        return passes // math.gcd(passes, self.gradient_accumulation_steps)


def _check(arguments: Any) -> None:
    given = {one.name: getattr(arguments, one.name) for one in fields(arguments)}
    refuse(
        *(
            (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value),
                f"{name} must be a finite number, got {value!r}",
            )
            for name, value in ((name, given[name]) for name in FINITE)
        )
    )
    positive = [name for name in POSITIVE if name != "num_train_epochs" or arguments.max_steps <= 0]
    limited = {name: least for name, least in LEAST.items() if given.get(name) is not None}
    refuse(
        *((not given[name] > 0, f"{name} must be positive, got {given[name]}") for name in positive),
        *(
            (given[name] < least, f"{name} must be at least {least}, got {given[name]}")
            for name, least in limited.items()
        ),
        *(
            (type(value) is int and value > LARGEST, f"{name} must be at most {LARGEST}, got {value}")
            for name, value in given.items()
        ),
        *((given.get(name), f"{name} does not work here: {reason}") for name, reason in arguments.refused.items()),
        (
            given.get("truncation_mode", "keep_start") != "keep_start",
            "truncation_mode does not work here: a row that is too long is left out or cut at its end, see too_long",
        ),
        (
            arguments.hub_strategy not in ("end", "every_save"),
            f"hub_strategy {arguments.hub_strategy!r} does not work here: the adapter is uploaded once, at the end",
        ),
        (
            arguments.optim.startswith(("galore", "apollo")),
            f"optim {arguments.optim!r} works on the gradients of whole weights, which s2ft does not train: choose "
            "another one, such as adamw_torch_fused",
        ),
    )


ARGUMENTS = {"sft": SFTArguments, "dpo": DPOArguments, "grpo": GRPOArguments}  # by command
