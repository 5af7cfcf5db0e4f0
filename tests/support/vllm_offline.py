"""Answers of an engine in a process of its own: `python vllm_offline.py JOB.json`, see :func:`offline`."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.sources import ROOT
from support.vllm_models import TOKENS

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "skip_tokenizer_init": True,
    "enable_lora": True,
    "max_loras": 4,
    "max_cpu_loras": 8,
    "max_lora_rank": 1,
}
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
}
MARK = "ANSWERS "

Request = tuple[str | None, Sequence[int]]  # the adapter's folder, None for the base, and a prompt


def offline(
    model: Path,
    batches: Sequence[Sequence[Request]],
    options: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    scores: bool = False,
    compiled: bool = False,
    added: bool = True,
    missing: Sequence[str] = (),
) -> tuple[list[list[list] | str], str]:
    """Answer batches greedily with `vllm.LLM`.

    Args:
        model: The base's folder.
        batches: The requests of each batch. All of a batch are answered at once.
        options: Options of LLM that differ from OPTIONS.
        environment: More variables.
        scores: Return the log-probabilities of each prompt's tokens from the second on, in place of answers.
        compiled: Trace the model with torch.compile, which vLLM's CPU backend switches off for LoRA.
        added: Add an adapter before its first batch. Else the first request that names it does.
        missing: A module of vLLM and a name in it that s2ft needs, which is taken for missing.

    Returns:
        The token ids of each batch, or the error as a text, and all that the engine printed.
    """
    job = {
        "model": str(model),
        "options": {**OPTIONS, **(options or {})},
        "scores": scores,
        "compiled": compiled,
        "added": added,
        "missing": missing,
        "batches": [[(folder and str(folder), list(prompt)) for folder, prompt in batch] for batch in batches],
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        variables = {**os.environ, **VARIABLES, **(environment or {})}
        done = subprocess.run(
            [sys.executable, __file__, file.name], env=variables, capture_output=True, text=True, timeout=600
        )
    printed = done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"the engine ended with {done.returncode}:\n{printed[-8000:]}")
    return json.loads(lines[-1].removeprefix(MARK)), printed


def compile_with_lora() -> None:
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, config: Any) -> None:
        original(cls, config)
        config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["missing"]:
        from support.inside import loading

        loading.NEEDED += (tuple(job["missing"]),)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    if job["compiled"]:
        compile_with_lora()
    engine = LLM(job["model"], **job["options"])
    scores = {"prompt_logprobs": 0} if job["scores"] else {}
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, **scores)
    known: dict[str, LoRARequest] = {}
    answers: list[Any] = []
    for batch in job["batches"]:
        try:
            for folder in (folder for folder, _ in batch if folder):
                if folder not in known:
                    request = LoRARequest(Path(folder).name, len(known) + 1, folder)
                    if job["added"]:
                        engine.llm_engine.add_lora(request)
                    known[folder] = request
            found = engine.generate(
                [{"prompt_token_ids": prompt} for _, prompt in batch],
                sampling,
                lora_request=[folder and known[folder] for folder, _ in batch],
                use_tqdm=False,
            )
            answers.append(
                [
                    [
                        entries[token].logprob
                        for token, entries in zip(one.prompt_token_ids[1:], one.prompt_logprobs[1:])
                    ]
                    if scores
                    else list(one.outputs[0].token_ids)
                    for one in found
                ]
            )
        except Exception as error:
            answers.append(f"{type(error).__name__}: {error}")
    if job["compiled"]:
        from torch._dynamo.utils import counters

        print(f"\ngraphs: {counters['stats']['unique_graphs']}, breaks: {len(counters['graph_break'])}")
    print(f"\n{MARK}{json.dumps(answers)}", flush=True)


if __name__ == "__main__":
    main()
