"""Log-probabilities of given tokens by vLLM's LLM."""

from collections.abc import Sequence
from typing import Any


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
