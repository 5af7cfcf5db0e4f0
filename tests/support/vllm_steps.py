"""A program that serves a base offline and answers what a test asks: python vllm_steps.py QUESTIONS ANSWERS

QUESTIONS is a JSON file: the base's folder, options of LLM, and steps. A step is an adapter's name and folder, several
of these in one batch, or None for the base. The answer to a step is the token ids of each prompt, or the error's text.
With `missing`, a name of vLLM that s2ft needs is taken for missing.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update({"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})
FIXED = dict(dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=16, max_num_batched_tokens=256)


def main(questions: Path, answers: Path) -> None:
    asked = json.loads(questions.read_text())
    if asked.get("missing"):
        from support.inside import loading

        loading.NEEDED += (tuple(asked["missing"]),)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(asked["base"], **{**FIXED, "skip_tokenizer_init": True, "enable_lora": True, **asked["options"]})
    params = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
    numbers, found = {}, []
    for step in asked["steps"]:
        adapters = step if step and isinstance(step[0], list) else [step]
        prompts, requests = [], []
        for one in adapters:
            prompts += [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
            number = one and numbers.setdefault(tuple(one), len(numbers) + 1)
            requests += [one and LoRARequest(one[0], number, one[1])] * len(asked["prompts"])
        try:
            done = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
            found.append([list(one.outputs[0].token_ids) for one in done])
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
