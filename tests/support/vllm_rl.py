"""Training runs whose answers vLLM generates, each in a process of its own: `python vllm_rl.py NAME FOLDER …`.

The folder holds a base with a tokenizer, see :func:`save_base`. A scenario ends with an AssertionError if something is
wrong.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from support.vllm_transfer import OFFLINE, parameters, same

ROOT = Path(__file__).parents[2]
RATIOS = dict(q_ratio=0.13, v_ratio=0.26, o_ratio=0.13, u_ratio=0.02, g_ratio=0.01, d_ratio=0.03)


def save_base(folder, dtype="float32"):
    """Write a tiny LLaMA with a tokenizer."""
    from train.tiny import tiny_tokenizer

    from support.vllm_models import tiny_llama

    model = tiny_llama(initializer_range=0.05).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(scenario: str, folder: Path, *words, **environment: str) -> dict:
    """Run a scenario. Returns what it prints in its last line, as JSON.

    Raises:
        AssertionError: It failed; the message has the end of its output.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables = {**os.environ, **OFFLINE, "PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
    command = [sys.executable, __file__, scenario, str(folder), *map(str, words)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- in the process --------------------------------------------------------------------------------------


def model_in(form: str, folder: str, dtype: torch.dtype, **ratios):
    """The base with an adapter: attached in a layout, or in PEFT's form."""
    from transformers import AutoModelForCausalLM

    import s2ft

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ratios = ratios or RATIOS
    if form == "peft":
        from peft import get_peft_model

        from s2ft.peft import S2FTPeftConfig

        return get_peft_model(model, S2FTPeftConfig(**ratios, task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    s2ft.attach(model, s2ft.S2FTConfig(**ratios, layout=form))
    return model


def merged_tensors(model) -> dict[str, torch.Tensor]:
    """The tensors of the merged model. The model does not change."""
    import copy

    import s2ft

    while hasattr(model, "module"):
        model = model.module
    made = copy.deepcopy(model)
    made = made.merge_and_unload() if hasattr(made, "merge_and_unload") else s2ft.merge(made)
    return {
        name: one
        for name, one in made.state_dict().items()
        if not made.config.tie_word_embeddings or "lm_head" not in name
    }


def has_merged(llm, model) -> bool:
    """Whether the engine's parameters are those that its own loader makes of the merged checkpoint."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    before = parameters(llm)
    runner.get_model().load_weights(iter(merged_tensors(model).items()))
    return same(before, parameters(llm))


def engine(folder, dtype="float32", **options):
    """vLLM's LLM of a base, for slices."""
    from vllm import LLM

    fixed = dict(max_model_len=256, enforce_eager=True, max_num_seqs=4, max_num_batched_tokens=256)
    return LLM(folder, dtype=dtype, weight_transfer_config={"backend": "s2ft"}, **{**fixed, **options})


def syncs(folder, form="permuted", dtype="float32", served="", steps="50"):
    """Train, and compare all tensors of the engine after each sync. At the end they are those at the start."""
    from s2ft.sync import SliceSender

    torch.manual_seed(0)
    model = model_in(form, folder, getattr(torch, dtype))
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    llm = engine(folder, served or dtype)
    first = parameters(llm)
    data = torch.randint(3, model.config.vocab_size, (2, 16))
    equal = 0
    with SliceSender(model, llm) as sender:
        for _ in range(int(steps)):
            sent = sender.sync()
            if (served or dtype) == dtype:
                equal += has_merged(llm, model)
            model(input_ids=data, labels=data).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    size = sum(one.numel() * getattr(torch, served or dtype).itemsize for one in trained)
    assert sent.nbytes <= 1.05 * size
    assert same(first, parameters(llm)), "the base is not restored"
    print(json.dumps({"equal": equal, "steps": int(steps), "bytes": sent.nbytes, "slices": size}))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
