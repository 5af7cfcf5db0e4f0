"""S²FT inside other training programs, tried with the real ones: python tests/integrations/run.py [NAME ...]

For each program this makes an environment of its own, which takes PyTorch and all packages that the program does not
ask for from this one. There it trains a tiny model by the program's own command. What the program fed to the model is
recorded, and `s2ft.train.fit`, which `s2ft sft` calls, trains on the same batches in the same order. The two adapters
are compared, and so are the program's merged model and s2ft's. The exit status is 1 if a program failed, or if its
adapter differs by more than rounding.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import s2ft
import s2ft.peft
from s2ft import S2FTConfig
from tests.support.inside import RunFolder, RunOptions, SFTArguments, sft
from tests.support.releases import environment as packages_beside
from tests.support.states import same, tensors_of, with_loaded
from tests.train.tiny import MARKED, save_tiny, write_jsonl

TABLE = (Path(__file__).parent / "programs.yaml").read_text()
KNOWN = yaml.safe_load(TABLE)
ROUNDING = 1e-6  # of deltas of about 6 steps at a rate of 0.002, in float32
LENGTH = 64  # tokens of every chat, so that no program pads a batch in its own way


def lay_out(name: str, folder: Path) -> dict:
    """Write the base, the chats and the files of a program. Returns the program's row of programs.yaml."""
    text = TABLE.replace("FOLDER", str(folder)).replace("PROGRAMS", str(environment(name))).replace("ROOT", str(ROOT))
    program = yaml.safe_load(text)["programs"][name]
    save_tiny(folder / "base", tie_word_embeddings=False)
    (folder / "base" / "chat_template.jinja").write_text(MARKED)
    (folder / "data").mkdir(), (folder / "sharegpt").mkdir()
    chats = [(f"{10 + a}+{a % 7}=", f"The answer is {10 + a + a % 7}.".ljust(LENGTH - 26, ".")) for a in range(24)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats]
    write_jsonl(folder / "data" / "chats.jsonl", [{"messages": chat} for chat in turns])
    shared = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in chats]
    write_jsonl(folder / "sharegpt" / "chats.jsonl", [{"conversations": chat} for chat in shared])
    for file, content in program["files"].items():
        (folder / file).write_text(json.dumps(content))  # which is YAML too
    return program


def environment(name: str) -> Path:
    """Make the environment of a program, or take the one that is there. Returns the folder of its programs."""
    program = KNOWN["programs"][name]
    if "packages" not in program and "alone" not in program:
        return Path(sys.executable).parent
    commands = (("install", *program.get("packages", ())), ("install", "--no-deps", *program.get("alone", ())))
    needed = [command for command in commands if command[-1] not in ("install", "--no-deps")]
    # the wheels of the stand-ins need a CUDA build of PyTorch, and text needs nothing of them
    stand_ins = program.get("stand_ins", ())
    return packages_beside(f"integrations/{name.removesuffix('-v1')}", *needed, stand_ins=stand_ins).parent


def run(command: str, folder: Path, program: dict, **variables: str) -> None:
    """Run a command of the program. Its output is shown if it fails."""
    paths = [str(ROOT), *([str(ROOT / "tests" / "integrations" / "capture")] if variables else [])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = folder / "output.log"
    with log.open("a") as output:
        done = subprocess.run(
            command.split(),
            cwd=folder,
            env={**os.environ, **settings, **program.get("environment", {}), **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{log.read_text()[-3000:]}")


def base(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


def trained_by_s2ft(folder: Path, batches: list[dict], program: dict, layout: str, chunked: bool) -> s2ft.Adapter:
    """Train on the recorded batches as `s2ft sft` does."""
    rows = [
        {"input_ids": ids.tolist(), "labels": labels.tolist()}
        for batch in batches
        for ids, labels in zip(batch["input_ids"], batch["labels"])
    ]
    model = base(folder)
    s2ft.attach(model, S2FTConfig(**KNOWN["settings"], layout=layout, ffn_kernel=layout == "permuted"))
    arguments = SFTArguments(
        output_dir=str(folder / "ours"),
        max_steps=KNOWN["steps"],
        per_device_train_batch_size=KNOWN["batch"],
        learning_rate=KNOWN["rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        save_steps=0,
        train_sampling_strategy="sequential",
        **program.get("arguments", {}),
    )
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run_folder = RunFolder(Path(out))
        run_folder.begin(dict(KNOWN["settings"]))
        sft(model, AutoTokenizer.from_pretrained(folder / "base"), Dataset.from_list(rows), arguments, run_folder,
            options=RunOptions(chunked_loss=chunked))  # fmt: skip
    return s2ft.get_adapter(model, "default")


def difference(ours: s2ft.Adapter, theirs: s2ft.Adapter) -> tuple[float, str]:
    """The largest difference of two values of two adapters, and what to say of it."""
    assert ours.deltas.keys() == theirs.deltas.keys(), "other modules are trained"
    pairs = [(delta, theirs.deltas[name]) for name, delta in ours.deltas.items()]
    assert all(torch.equal(one.index, other.index) for one, other in pairs), "other units are trained"
    largest = max(float((one.values - other.values).abs().max()) for one, other in pairs)
    if all(torch.equal(one.values, other.values) for one, other in pairs):
        return largest, "equal, bit for bit"
    return largest, f"differs by {largest:.1e} of {max(float(one.values.abs().max()) for one, _ in pairs):.1e}"


def try_program(name: str, folder: Path) -> bool:
    """Train with the program and with s2ft, and print what came of it. Returns whether the adapters agree."""
    program = lay_out(name, folder)
    captured = folder / "batches.pt"
    run(program["train"], folder, program, S2FT_CAPTURE=str(captured))
    batches = torch.load(captured)
    shapes = {tuple(batch["input_ids"].shape) for batch in batches}
    labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    print(
        f"{name}: {len(batches)} batches of {', '.join(map(str, sorted(shapes)))} tokens, {labels} labels", flush=True
    )
    theirs = s2ft.peft.to_native(PeftModel.from_pretrained(base(folder), str(folder / program["adapter"])))
    found = []
    for layout in ("indexed", "permuted"):
        for chunked in (False, True):
            largest, said = difference(trained_by_s2ft(folder, batches, program, layout, chunked), theirs)
            found.append(largest)
            print(f"  {layout}, {'chunked loss' if chunked else 'loss of all logits'}: {said}", flush=True)
    agrees = len(batches) == KNOWN["steps"] and max(found) <= ROUNDING
    if "merge" in program:
        run(program["merge"], folder, program)
        equal = same(tensors_of(folder / program["merged"]), s2ft.merge(with_loaded(base(folder), theirs)))
        print(f"  merged model: {'equal, bit for bit' if equal else 'differs'}", flush=True)
        agrees = agrees and equal
    return agrees


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(KNOWN['programs'])} (default: all)")
    parser.add_argument("--keep", type=Path, help="a new folder in which the files are kept")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(KNOWN["programs"]))
    if unknown:
        parser.error(f"there is no program {unknown[0]!r}; there are {', '.join(KNOWN['programs'])}")
    names, failed = arguments.names or list(KNOWN["programs"]), []
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.keep / name if arguments.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                agrees = try_program(name, folder)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                print(f"{name}: {error}", flush=True)
                agrees = False
        if not agrees:
            failed.append(name)
    print(f"{len(names) - len(failed)} passed, {len(failed)} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
