"""The Trainer of s2ft finetune. It skips learning rate 0, and it scores answers when it evaluates."""

from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR

from s2ft.text.evaluation import evaluate
from s2ft.train.held_out import HeldOut
from s2ft.train.output import log_failure
from s2ft.train.trainer import S2FTTrainer


class RunTrainer(S2FTTrainer):
    """S2FTTrainer that also measures accuracy by greedy generation. Each rank answers its share of the questions.

    Args:
        *args: The arguments of :class:`~s2ft.train.trainer.S2FTTrainer`.
        tokenizer: The model's tokenizer.
        held_out: Data to evaluate on. If it has a task, its examples are answered at each evaluation.
        **options: The keyword arguments of :class:`~s2ft.train.trainer.S2FTTrainer`.
    """

    def __init__(self, *args, tokenizer, held_out: HeldOut | None, **options) -> None:
        super().__init__(*args, **options)
        self._tokenizer, self._held_out = tokenizer, held_out

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Make the schedule of transformers without its first step.

        The first step of a warm-up has learning rate 0, which wastes an update. ``args.warmup_steps`` counts this step
        too.
        """
        if self.lr_scheduler is None and self.args.warmup_steps:
            schedule = super().create_scheduler(num_training_steps + 1, optimizer)
            if isinstance(schedule, LambdaLR):
                self.lr_scheduler = LambdaLR(schedule.optimizer, [_one_later(rate) for rate in schedule.lr_lambdas])
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(self, *args, **options):
        """Evaluate. An error is logged and training continues, unless there are other ranks, which would wait."""
        try:
            return super().evaluate(*args, **options)
        except Exception as error:
            if self.args.world_size > 1:
                raise
            log_failure(f"the evaluation at step {self.state.global_step} failed", error)
            return {}

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **options):
        """Compute the loss and, with a task, the accuracy."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self._held_out is not None and self._held_out.task is not None:
            output.metrics[f"{metric_key_prefix}_accuracy"] = self._accuracy()
        return output

    def _accuracy(self) -> float:
        data = self._held_out
        examples = data.examples[self.args.process_index :: self.args.world_size]
        counts = [(0, 0)]
        if examples:
            model = self.accelerator.unwrap_model(self.model)
            scored = evaluate(model, self._tokenizer, examples, data.task, data.batch_size, data.max_new_tokens)
            counts = [(scored.right, len(scored.records))]
        counts = gather_object(counts)
        return sum(right for right, _ in counts) / sum(count for _, count in counts)


def _one_later(rate):
    return lambda step: rate(step + 1)
