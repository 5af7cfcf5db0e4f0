"""Log-probabilities of given tokens by vLLM's LLM, and how well trainer and engine agree on the base."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from s2ft.attached.reference import without_trainable
from s2ft.model.modes import evaluation_mode
from s2ft.sync.agreement import Rollout, trainer_logprobs


def engine_logprobs(llm: Any, sequences: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
    """Score answers to prompts with the weights that an engine has now.

    Args:
        llm: vLLM's LLM.
        sequences: Token ids of each prompt and of its answer.

    Returns:
        The natural log-probability of each token of each answer, at temperature 1.
    """
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt + answer} for prompt, answer in sequences]
    params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        [place[token].logprob for place, token in zip(output.prompt_logprobs[len(prompt) :], answer)]
        for output, (prompt, answer) in zip(outputs, sequences)
    ]


def scored_on_base(trainer: Any, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Score the tokens of rollouts with the base, by trainer and engine.

    No slices take part. So these log-probabilities differ as the two programs do, and those of trained weights should
    differ no more.

    Args:
        trainer: The trainer after its training, with an attached model and vLLM in the same process. Its engine has
            the base again then.
        rollouts: Rollouts of :func:`s2ft.sync.agreement.keep_rollouts`.

    Returns:
        The rollouts with the log-probabilities of the base.
    """
    llm = trainer.vllm_generation.llm
    by_engine = [one.padded(engine_logprobs(llm, one.sequences())) for one in rollouts]
    with evaluation_mode(trainer.model), without_trainable(trainer.model):
        by_trainer = [trainer_logprobs(trainer, one) for one in rollouts]
    return [replace(one, trainer=ours, engine=its) for one, ours, its in zip(rollouts, by_trainer, by_engine)]
