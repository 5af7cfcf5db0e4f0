"""How far the trainer's log-probabilities of sampled tokens are from those of the engine that sampled them.

Both compute with the same weights, by other kernels and in other batches. So they differ by rounding, as they do on the
base. A larger difference says that the engine samples from other weights than those that are trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

QUANTILE = 0.999


class Agreement(NamedTuple):
    """Absolute differences of the log-probabilities of tokens.

    Attributes:
        tokens: How many tokens were compared.
        mean: The mean difference.
        quantile: The difference that one token in a thousand exceeds.
        max: The largest difference.
    """

    tokens: int
    mean: float
    quantile: float
    max: float


def agreement(trainer: Tensor, engine: Tensor, mask: Tensor | None = None) -> Agreement:
    """Compare log-probabilities of the same tokens.

    Args:
        trainer: Those of the trainer, of any shape.
        engine: Those of the engine, of the same shape. A NaN is a token that the engine has no number of; it is left
            out.
        mask: Which tokens count, of the same shape. Default: all.

    Returns:
        The differences.

    Raises:
        ValueError: The shapes differ, or there is no token to compare.

    Example:
        >>> from s2ft.sync.agreement import agreement
        >>> agreement(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])).max
        0.5
    """
    if trainer.shape != engine.shape or (mask is not None and mask.shape != engine.shape):
        shapes = [tuple(one.shape) for one in (trainer, engine, mask) if one is not None]
        raise ValueError(f"trainer, engine and mask must have one shape, got {', '.join(map(str, shapes))}")
    counts = ~engine.isnan() if mask is None else mask.bool() & ~engine.isnan()
    apart = (trainer.double() - engine.double()).abs()[counts]
    if not apart.numel():
        raise ValueError("there is no token to compare: all are masked or without a number of the engine")
    # Tensor.quantile takes 16 million numbers at most.
    rank = min(apart.numel(), 1 + int(QUANTILE * apart.numel()))
    return Agreement(apart.numel(), apart.mean().item(), apart.kthvalue(rank).values.item(), apart.max().item())


@dataclass(frozen=True)
class Rollout:
    """The answers of one generation, with the log-probabilities of their tokens by trainer and engine.

    Attributes:
        step: The number of updates before it.
        prompts: Token ids, padded on the left, int64 [n, p].
        prompt_mask: 1 for tokens, 0 for padding, int64 [n, p].
        answers: Token ids, padded on the right, int64 [n, a].
        answer_mask: 1 for tokens, 0 for padding, int64 [n, a].
        trainer: Log-probabilities of the answers' tokens by the trainer, [n, a].
        engine: The same by the engine, as it sampled them, [n, a].
    """

    step: int
    prompts: Tensor
    prompt_mask: Tensor
    answers: Tensor
    answer_mask: Tensor
    trainer: Tensor
    engine: Tensor

    @property
    def agreement(self) -> Agreement:
        """The differences of this generation."""
        return agreement(self.trainer, self.engine, self.answer_mask)

    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """Return the token ids of each prompt and of its answer, without padding."""
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(self.prompts, self.prompt_mask)]
        answers = [ids[mask.bool()].tolist() for ids, mask in zip(self.answers, self.answer_mask)]
        return list(zip(prompts, answers))

    def padded(self, values: list[list[float]]) -> Tensor:
        """Return numbers of each answer's tokens in the shape of `answers`, with NaN for padding."""
        rows = torch.full(self.answers.shape, float("nan"), dtype=torch.float64)
        for row, mask, numbers in zip(rows, self.answer_mask.bool().cpu(), values):
            row[mask] = torch.tensor(numbers, dtype=torch.float64)
        return rows


def keep_rollouts(trainer: Any) -> list[Rollout]:
    """Keep what a trainer of TRL samples from now on, with both log-probabilities.

    TRL itself logs the mean and the largest difference of each step, as `sampling/sampling_logp_difference/mean` and
    `.../max`. The rollouts also hold the tokens, so that others can score them.

    Args:
        trainer: TRL's GRPOTrainer or RLOOTrainer, or one derived from them, with `use_vllm` and
            `vllm_importance_sampling_correction`, as is TRL's default.

    Returns:
        A list that gets one rollout for each generation of the training. Evaluations are left out.

    Raises:
        ValueError: The trainer does not compute both log-probabilities.
    """
    args = trainer.args
    if not getattr(args, "use_vllm", False) or not getattr(args, "vllm_importance_sampling_correction", False):
        raise ValueError(
            "the trainer's arguments must have use_vllm and vllm_importance_sampling_correction: TRL compares the "
            "log-probabilities of trainer and engine only then"
        )
    generate, kept = trainer._generate_and_score_completions, []

    def generate_and_keep(*given: Any, **options: Any) -> Any:
        step, trains = trainer.state.global_step, trainer.model.training
        output = generate(*given, **options)
        if trains:
            kept.append(_rollout(step, output))
        return output

    trainer._generate_and_score_completions = generate_and_keep
    return kept


def _rollout(step: int, output: dict[str, Any]) -> Rollout:
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    numbers = ("old_per_token_logps", "sampling_per_token_logps")
    # a copy, because TRL shuffles the rows afterwards and frees what it does not need
    return Rollout(step, *(output[name].detach().cpu().clone() for name in names + numbers))


def joint_agreement(rollouts: Sequence[Rollout]) -> Agreement:
    """Compare the log-probabilities of all tokens of several rollouts.

    Args:
        rollouts: The rollouts.

    Returns:
        The differences over all tokens.

    Raises:
        ValueError: There is no token to compare.
    """
    names = ("trainer", "engine", "answer_mask")
    return agreement(*(torch.cat([getattr(one, name).double().flatten() for one in rollouts]) for name in names))


@torch.no_grad()
def trainer_logprobs(trainer: Any, rollout: Rollout) -> Tensor:
    """Score the tokens of a rollout with the trainer's present weights, in the batches in which it trains.

    Args:
        trainer: The trainer that generated it.
        rollout: The rollout.

    Returns:
        Log-probabilities of the answers' tokens, [n, a].
    """
    model = trainer.model
    ids = torch.cat([rollout.prompts, rollout.answers], 1).to(model.device)
    mask = torch.cat([rollout.prompt_mask, rollout.answer_mask], 1).to(model.device)
    size = trainer.args.per_device_train_batch_size
    found, *_ = trainer._get_per_token_logps_and_entropies(model, ids, mask, rollout.answers.shape[1], batch_size=size)
    return found.cpu()
