"""Arguments of s2ft dpo and s2ft grpo: those of TRL with the defaults of s2ft."""

from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig, GRPOConfig

from s2ft.sync.trl import SLEEP
from s2ft.train.arguments import RunArguments

LEARNING_RATE = 1e-5  # ten times TRL's default, which is for full fine-tuning
NO_SYNC = "the reference is the base, which is never trained; there is no second model that could follow the adapter"
REFUSED_BY_GRPO = {
    "use_transformers_continuous_batching": "it keeps buffers of its own for a model that does not change; the answers "
    "are generated in batches by model.generate",
    "sync_ref_model": NO_SYNC,
    "label_smoothing_factor": "it is for the cross entropy of s2ft sft",
}
REFUSED_BY_DPO = {
    "sync_ref_model": NO_SYNC,
    "label_smoothing_factor": "it is for the cross entropy of s2ft sft; the losses of preferences have label_smoothing",
    "padding_free": "TRL's DPOTrainer does not do it at present",
}


def _peak_rate() -> Any:
    return field(
        default=LEARNING_RATE, metadata={"help": "peak learning rate; too high a one makes the model forget to write"}
    )


@dataclass
class DPOArguments(RunArguments, DPOConfig):
    """TRL's DPOConfig with the defaults of s2ft.

    Raises:
        ValueError: A value is out of range, or cannot work with S²FT. The message names the argument.

    Example:
        >>> from s2ft.train.rl_arguments import DPOArguments
        >>> arguments = DPOArguments(output_dir="my-run", beta=0.2)
        >>> arguments.learning_rate, arguments.loss_type
        (1e-05, ['sigmoid'])
    """

    learning_rate: float = _peak_rate()

    def __post_init__(self) -> None:
        _refuse(self, REFUSED_BY_DPO)
        super().__post_init__()


@dataclass
class GRPOArguments(RunArguments, GRPOConfig):
    """TRL's GRPOConfig with the defaults of s2ft.

    Raises:
        ValueError: A value is out of range, or cannot work with S²FT. The message names the argument.

    Example:
        >>> from s2ft.train.rl_arguments import GRPOArguments
        >>> arguments = GRPOArguments(output_dir="my-run", per_device_train_batch_size=4, num_generations=2)
        >>> arguments.updates_per_generation, arguments.beta
        (1, 0.0)
    """

    learning_rate: float = _peak_rate()
    include_num_input_tokens_seen: str | bool = field(
        default="no", metadata={"help": "not used: TRL counts the tokens of prompts and answers"}
    )
    vllm_transport: str = field(
        default="auto",
        metadata={
            "help": "how a vLLM server gets the trained slices after each update: file (a server on this machine) "
            "or http",
            "choices": ["auto", "file", "http"],
        },
    )
    vllm_take_over: bool = field(
        default=False, metadata={"help": "take the vLLM server from another run that has died while it used the server"}
    )

    def __post_init__(self) -> None:
        _refuse(self, REFUSED_BY_GRPO)
        if self.use_vllm and self.vllm_enable_sleep_mode:
            raise ValueError(SLEEP)
        if not self.num_generations or self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2, since answers to a prompt are compared with each other, got "
                f"{self.num_generations}"
            )
        self._chosen = self.generation_batch_size, self.steps_per_generation
        if None not in self._chosen:
            raise ValueError("generation_batch_size and steps_per_generation say the same: give one of them")
        # TRL checks the numbers at once, but the command divides batch_size among the devices later.
        self.generation_batch_size, self.steps_per_generation = None, self.num_generations
        super().__post_init__()
        self.set_generation(check=False)

    def set_generation(self, check: bool = True) -> None:
        """Set how many answers are generated at once. Call it after the rows of an update and of a pass are set.

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
        for number, name in ((self.num_generations, "num_generations"), (at_once, "the answers of a forward pass")):
            if total % number:
                raise ValueError(
                    f"{total} answers are generated at once, which is no multiple of {name}, {number}: the nearest "
                    f"number is {max(1, round(total / number)) * number}; set batch_size to it"
                )
        self._check_saving()

    def _check_saving(self) -> None:
        cycle = self.updates_per_generation
        writes = str(getattr(self.save_strategy, "value", self.save_strategy)) == "steps"
        if writes and self.save_steps >= 1 and self.save_steps % cycle:
            below, above = self.save_steps // cycle * cycle, -(-self.save_steps // cycle) * cycle
            nearest = f"{below:g} or {above:g}" if below else f"{above:g}"
            raise ValueError(
                f"save_steps {self.save_steps:g} must be a multiple of {cycle}, the updates with the same generated "
                f"answers, so that a resumed run has the same answers: the nearest is {nearest}"
            )

    @property
    def updates_per_generation(self) -> int:
        """Number of updates that use the same generated answers."""
        return max(1, self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps)


def _refuse(arguments: Any, refused: dict[str, str]) -> None:
    for name, reason in refused.items():
        if getattr(arguments, name, None):
            raise ValueError(f"{name} does not work here: {reason}")
