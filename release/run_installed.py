"""Checks an installed s2ft, in the environment that has it: python -I release/run_installed.py

It runs from a folder of no project, without a compiler. It prints a JSON object: what s2ft says of its build, and how
far training steps with the kernels are from the same steps without them. release/check_wheel.py starts it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ninja")
STEPS = 4
TOLERANCE = 1e-5  # of the largest value: float32, two ways to round the same sums


def forbid_compilers() -> None:
    found = [name for name in COMPILERS if shutil.which(name)]
    assert not found, f"there are compilers on PATH: {', '.join(found)}"


def training() -> dict:
    """Train a small LLaMA for some steps. Returns its losses and trained slices, and checks merging and detaching."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import s2ft

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    s2ft.attach(model, s2ft.S2FTConfig(o_ratio=0.25, d_ratio=0.1, q_ratio=0.25, v_ratio=0.5, u_ratio=0.05))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)  # AdamW would turn a rounding of a gradient near 0 into a whole step
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(0, 97, (2, 24))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] != losses[0]
    slices = [weight.detach().double().flatten().tolist() for weight in trained]
    s2ft.detach(model)
    now = model.state_dict()
    assert base.keys() == now.keys() and all(torch.equal(base[name], now[name]) for name in base), "the base changed"
    return {"losses": losses, "slices": slices, "build": s2ft.build_info(), "file": s2ft.__file__}


def without_kernels() -> dict:
    """The same in a process in which s2ft finds no compiled module."""
    code = (
        "import json, sys; sys.modules['s2ft._C'] = None; import warnings; warnings.simplefilter('ignore')\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import run_installed\n"
        "print(json.dumps(run_installed.training()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_cuda_kernels() -> list[str]:
    """Register the CUDA kernels, as PyTorch does where it finds a GPU. Returns the ops that have them."""
    from s2ft import _C
    from s2ft.ops import _build

    driver, built = _C.cuda_versions()
    assert built >= 13000 and driver >= 0
    _C.register_cuda()
    ops = [op for op, devices in _build.build_info()["ops"].items() if "CUDA" in devices]
    on_cpu = [op for op, devices in _build.build_info()["ops"].items() if "CPU" in devices]
    assert ops and set(on_cpu) <= set(ops), (ops, on_cpu)
    return ops


def main() -> None:
    forbid_compilers()
    begin = time.time()
    import torch

    import s2ft

    seconds = time.time() - begin
    folder = Path(s2ft.__file__).resolve()
    assert folder.is_relative_to(Path(sys.prefix).resolve()), f"s2ft comes from {folder}, not from this environment"
    compiled, reference = training(), without_kernels()
    info = compiled["build"]
    assert info["compiled"] and info["cuda"], info
    assert not reference["build"]["compiled"], reference["build"]
    pairs = [(compiled["losses"], reference["losses"]), *zip(compiled["slices"], reference["slices"], strict=True)]
    difference = max(
        max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(1e-12, max(map(abs, theirs)))
        for ours, theirs in pairs
    )
    assert difference <= TOLERANCE, f"kernels and references differ by {difference:.1e} of the largest value"
    print(
        json.dumps(
            {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "torch_cuda": torch.version.cuda,
                "import_seconds": seconds,
                "difference": difference,
                "archs": info["archs"],
                "cuda_version": info["cuda_version"],
                "cuda_reason": info["cuda_reason"],
                "ops": sum("CPU" in devices for devices in info["ops"].values()),
                "cuda_ops": len(check_cuda_kernels()),
                "processors": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
