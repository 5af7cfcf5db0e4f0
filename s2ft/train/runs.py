"""The Trainer of s2ft finetune: it never trains at learning rate 0, and it scores answers when it evaluates."""

from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR

from s2ft.text.evaluation import evaluate
from s2ft.train.held_out import HeldOut
from s2ft.train.output import log_failure
from s2ft.train.trainer import S2FTTrainer


class RunTrainer(S2FTTrainer):
    """Adds eval_accuracy, by greedy generation, to eval_loss; every rank answers its share of the questions."""

    def __init__(self, *args, tokenizer, held_out: HeldOut | None, **options) -> None:
        """held_out: where it names a task its examples are answered at each evaluation."""
        super().__init__(*args, **options)
        self._tokenizer, self._held_out = tokenizer, held_out

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Transformers' schedule from its second step on. Its warm-up begins with an update at learning rate 0, which
        is a wasted update, and the whole run if it has only one. ``args.warmup_steps`` counts that step too."""
        if self.lr_scheduler is None and self.args.warmup_steps:
            whole = super().create_scheduler(num_training_steps + 1, optimizer)
            if isinstance(whole, LambdaLR):
                self.lr_scheduler = LambdaLR(whole.optimizer, [_one_later(rate) for rate in whole.lr_lambdas])
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(self, *args, **options):
        """As Trainer's; but an evaluation that fails is logged and training goes on, unless other ranks wait for it."""
        try:
            return super().evaluate(*args, **options)
        except Exception as error:
            if self.args.world_size > 1:
                raise
            log_failure(f"the evaluation at step {self.state.global_step} failed", error)
            return {}

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **options):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self._held_out is not None and self._held_out.task is not None:
            output.metrics[f"{metric_key_prefix}_accuracy"] = self._accuracy()
        return output

    def _accuracy(self) -> float:
        of = self._held_out
        mine = of.examples[self.args.process_index :: self.args.world_size]
        found = [(0, 0)]
        if mine:
            model = self.accelerator.unwrap_model(self.model)
            scored = evaluate(model, self._tokenizer, mine, of.task, of.batch_size, of.max_new_tokens)
            found = [(scored.right, len(scored.records))]
        found = gather_object(found)
        return sum(right for right, _ in found) / sum(count for _, count in found)


def _one_later(rate):
    return lambda step: rate(step + 1)
