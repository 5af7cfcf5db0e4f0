"""A Trainer that also scores answers when it evaluates."""
from accelerate.utils import gather_object

from s2ft.train.evaluate import HeldOut, evaluate
from s2ft.train.trainer import S2FTTrainer


class ScoredTrainer(S2FTTrainer):
    """Adds eval_accuracy, by greedy generation, to eval_loss; every rank answers its share of the questions."""

    def __init__(self, *args, tokenizer, held_out: HeldOut | None, **options) -> None:
        """held_out: where it names a task its examples are answered at each evaluation."""
        super().__init__(*args, **options)
        self._tokenizer, self._held_out = tokenizer, held_out

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **options):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self._held_out is not None and self._held_out.task is not None:
            output.metrics[f"{metric_key_prefix}_accuracy"] = self._accuracy()
        return output

    def _accuracy(self) -> float:
        of = self._held_out
        mine = of.examples[self.args.process_index::self.args.world_size]
        found = [(0, 0)]
        if mine:
            model = self.accelerator.unwrap_model(self.model)
            scored = evaluate(model, self._tokenizer, mine, of.task, of.batch_size, of.max_new_tokens)
            found = [(scored.right, len(scored.records))]
        found = gather_object(found)
        return sum(right for right, _ in found) / sum(count for _, count in found)
