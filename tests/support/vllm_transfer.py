"""Scenarios of slice sync inside vLLM's LLM, each run in a process of its own: `python vllm_transfer.py NAME FOLDER …`.

The folder is one of support/vllm_models.py. A scenario ends with an AssertionError if something is wrong.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from support.inside import SliceSpec, hashes_of, to_message
from support.sources import ROOT

OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}


def run(scenario: str, served, tmp_path: Path, *words, **environment: str) -> str:
    """Run a scenario. Returns what it prints.

    Args:
        scenario: Name of a function of this file.
        served: See support/vllm_models.py.
        tmp_path: A folder for files.
        words: More arguments of the function, as texts.
        environment: More variables.

    Raises:
        AssertionError: It failed; the message has the end of its output.
    """
    (tmp_path / "served").write_bytes(pickle.dumps(served))
    return run_program(__file__, scenario, tmp_path / "served", *words, **environment)


def run_program(file, *words, **environment: str) -> str:
    """Run a file of tests/support with these words. Returns what it prints, or raises an AssertionError."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables = {**os.environ, **OFFLINE, "PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
    command = [sys.executable, file, *map(str, words)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


# ---- in the process --------------------------------------------------------------------------------------


def engine(folder, dtype="float32", **options):
    """Make vLLM's LLM of a base, for slices."""
    from vllm import LLM

    fixed = dict(max_model_len=256, enforce_eager=True, max_num_seqs=4, max_num_batched_tokens=256)
    backend = {"weight_transfer_config": {"backend": "s2ft"}, "skip_tokenizer_init": True}
    return LLM(str(folder), dtype=dtype, **{**fixed, **backend, **options})


def tokens(llm, count=24):
    """Greedy answers to the prompts."""
    from vllm import SamplingParams

    from support.vllm_models import PROMPTS

    options = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], options, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in done]


def parameters(llm) -> list[dict[str, torch.Tensor]]:
    """Copies of the parameters of all workers."""
    return llm.collective_rpc(_parameters)


def _parameters(worker):
    return {name: one.detach().clone() for name, one in worker.model_runner.get_model().named_parameters()}


def load(llm, tensors) -> None:
    """Let all workers load the tensors of a checkpoint."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:  # vLLM passes no tensors to other processes
        torch.save(dict(tensors), file.name)
        llm.collective_rpc(_load, args=(file.name,))


def _load(worker, path):
    worker.model_runner.get_model().load_weights(iter(torch.load(path).items()))


def same(left, right) -> bool:
    """Whether all parameters of all workers have the same bits."""
    return all(torch.equal(one[name], other[name]) for one, other in zip(left, right, strict=True) for name in other)


def base_of(served, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The base's tensors."""
    from safetensors.torch import load_file

    return {name: tensor.to(dtype) for name, tensor in load_file(served.base / "model.safetensors").items()}


def merged_of(served, name, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The tensors with an adapter merged, in a model of the dtype."""
    found = served.merged(name, dtype).state_dict()
    return {key: found[key].contiguous() for key in base_of(served) if key in found}  # experts have other names there


def slices_of(served, name, dtype=torch.float32):
    """The specs of an adapter's slices, and the merged numbers."""
    import s2ft

    base, merged = base_of(served, dtype), merged_of(served, name, dtype)
    specs = []
    for path, delta in s2ft.read_adapter(served.adapters / name).deltas.items():
        weight = base[f"{path}.weight"]
        hashes = hashes_of(weight.index_select(delta.dim, delta.index), delta.dim)
        specs.append(SliceSpec(f"{path}.weight", tuple(weight.shape), delta.dim, delta.index, hashes))
    return specs, torch.cat([merged[one.name].index_select(one.dim, one.index).reshape(-1) for one in specs])


def init(llm, specs, sender="a", dtype=torch.float32, **more):
    """Bind the engine to a sender."""
    info = {"sender": sender, "dtype": str(dtype).removeprefix("torch."), "slices": to_message(specs), **more}
    llm.init_weight_transfer_engine({"init_info": info})


def update(llm, **info):
    """Send one update."""
    llm.start_weight_update()
    llm.update_weights({"update_info": info})
    llm.finish_weight_update()


@contextmanager
def refused(words: str):
    """Expect an error with these words."""
    try:
        yield
    except Exception as error:
        assert words in str(error), f"expected {words!r}, got {type(error).__name__}: {error}"
    else:
        raise AssertionError(f"nothing was refused, expected {words!r}")


# ---- scenarios -------------------------------------------------------------------------------------------


def exact(served, dtype="float32", size="1", lora="") -> None:
    """After each update all tensors are the merged ones; the base returns."""
    import base64

    kind = getattr(torch, dtype)
    options = {"enable_lora": True, "max_lora_rank": 16} if lora else {}
    llm = engine(served.base, dtype, tensor_parallel_size=int(size), **options)
    before, first = parameters(llm), tokens(llm)
    assert dtype != "float32" or first == served.answers["base"]
    for name in ("down-o", "wide", "other"):
        specs, numbers = slices_of(served, name, kind)
        init(llm, specs, dtype=kind)
        assert same(parameters(llm), before)
        update(llm, sender="a", step=1, values=base64.b64encode(numbers.view(torch.uint8).numpy().tobytes()).decode())
        after = parameters(llm)
        if dtype == "float32":
            assert tokens(llm) == served.answers[name]
        update(llm, base=True, sender="a")
        assert same(parameters(llm), before) and tokens(llm) == first
        load(llm, merged_of(served, name, kind))
        assert same(after, parameters(llm)), name
        assert not same(after, before)
        load(llm, base_of(served, kind))
        assert same(parameters(llm), before)


def bad_input(served) -> None:
    """Each bad message is refused, and the weights are as before."""
    llm = engine(served.base)
    before = parameters(llm)
    specs, numbers = slices_of(served, "down-o")
    good = dict(sender="a", step=1, tensor=numbers)
    with refused("start_weight_update must be called before update_weights"):
        llm.update_weights({"update_info": good})
    with refused("an update of sender 'a' before init"):
        update(llm, **good)
    wrong = replace(specs[3], hashes=specs[3].hashes + 1)
    unknown = replace(specs[0], name="model.layers.9.mlp.down_proj.weight")
    for words, given, more in (
        (f"1 of 8 slices differ, the first is {wrong.name}", [*specs[:3], wrong, *specs[4:]], {}),
        ("is float32 in this engine, and the slices are sent as bfloat16", specs, {"dtype": torch.bfloat16}),
        ("named 'layers.9'", [unknown, *specs], {}),
        ("unexpected keyword argument 'extra'", specs, {"extra": 1}),
    ):
        with refused(words):
            init(llm, given, **more)
    assert same(parameters(llm), before)
    init(llm, specs)
    update(llm, **good)
    written = parameters(llm)
    with refused("so sender 'b' is refused: release it"):
        init(llm, specs, "b")
    for words, change in (
        ("3 numbers of torch.float32 came, and the slices have", {"tensor": torch.zeros(3)}),
        ("so sender 'b' is refused: release it", {"sender": "b"}),
        ("step 0 of 'a' is older than step 1", {"step": 0}),
    ):
        with refused(words):
            update(llm, **{**good, **change})
    assert same(parameters(llm), written)
    llm.start_weight_update()  # a client that dies here does no harm
    init(llm, specs, "b", take_over=True)
    assert same(parameters(llm), before)
    update(llm, **{**good, "sender": "b"})
    assert same(parameters(llm), written)
    llm.shutdown_weight_transfer_engine()
    assert same(parameters(llm), before) and tokens(llm) == served.answers["base"]


def packed(served) -> None:
    """Without the plugin's unpacked weights nothing can be written, and the reason is named."""
    import s2ft.vllm.transfer

    s2ft.vllm.transfer._leave_unpacked = lambda: None
    s2ft.vllm.transfer.install()
    llm = engine(served.base)
    with refused("the CPU backend of this engine has packed its weights: start it with the weight transfer backend"):
        init(llm, slices_of(served, "down-o")[0])
    assert tokens(llm) == served.answers["base"]


def experts(served) -> None:
    """The CPU backend packs experts: slices of theirs are refused by name, those of attention are written."""
    import s2ft
    from support.inside import TrainedSlices
    from support.vllm_models import type_of

    llm = engine(served.base)
    before = parameters(llm)
    model = type_of(served.base).from_pretrained(served.base, dtype=torch.float32)
    s2ft.load_adapter(model, served.adapters / "experts", trainable=True)
    with refused("packs the weights of experts, so that nothing can be written into them"):
        init(llm, TrainedSlices.of(model, torch.float32).specs)
    assert same(parameters(llm), before) and tokens(llm) == served.answers["base"]
    specs, numbers = slices_of(served, "attention")
    init(llm, specs)
    update(llm, sender="a", step=1, tensor=numbers)
    assert tokens(llm) == served.answers["attention"]
    update(llm, base=True, sender="a")
    assert same(parameters(llm), before)


def not_chosen(served) -> None:
    """An engine without the backend packs its weights as ever."""
    from support.inside import is_packed

    llm = engine(served.base, weight_transfer_config=None)
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    assert sum(is_packed(module) for module in model.modules()) == 4 * 4 + 2  # with lm_head and the embedding


def dropped(served) -> None:
    """Weights that were dropped, as by sleep mode of level 2, are noticed; after a reload the run goes on."""
    llm = engine(served.base)
    before = parameters(llm)
    specs, numbers = slices_of(served, "down-o")
    init(llm, specs)
    update(llm, sender="a", step=1, tensor=numbers)
    llm.collective_rpc(_drop)
    with refused("was changed by others since the last update. After sleep mode of level 2"):
        update(llm, sender="a", step=2, tensor=numbers)
    llm.collective_rpc("reload_weights")
    assert same(parameters(llm), before)
    update(llm, sender="a", step=2, tensor=numbers)
    assert tokens(llm) == served.answers["down-o"]
    update(llm, base=True, sender="a")
    assert same(parameters(llm), before)


def _drop(worker):
    for one in worker.model_runner.get_model().parameters():
        one.data.zero_()


def paused(served) -> None:
    """Requests in the middle of their answers: refused without a pause; with one they go on with new weights."""
    from vllm import SamplingParams

    from support.vllm_models import PROMPTS

    llm = engine(served.base)
    specs, numbers = slices_of(served, "down-o")
    init(llm, specs)
    core = llm.llm_engine.engine_core
    options = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request("one", {"prompt_token_ids": PROMPTS[3]}, options)
    for _ in range(6):
        llm.llm_engine.step()
    before = parameters(llm)
    with refused("requests are running, so the weights are not changed: pause the engine first"):
        update(llm, sender="a", step=1, tensor=numbers)
    assert same(parameters(llm), before)
    core.engine_core.pause_scheduler(mode="keep", clear_cache=False)
    update(llm, sender="a", step=1, tensor=numbers)
    core.engine_core.resume_scheduler()
    done = []
    while not done:
        done = [one for one in llm.llm_engine.step() if one.finished]
    answer = list(done[0].outputs[0].token_ids)
    begun = served.answers["base"][3][: len(answer)]
    assert 5 <= next(n for n, (a, b) in enumerate(zip(answer, begun)) if a != b) < 12
    update(llm, base=True, sender="a")
    load(llm, merged_of(served, "down-o"))
    goes_on = llm.generate(
        [{"prompt_token_ids": PROMPTS[3] + answer[:6]}],
        SamplingParams(temperature=0, max_tokens=18, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    assert list(goes_on[0].outputs[0].token_ids) == answer[6:], "old keys and values were used"


if __name__ == "__main__":
    globals()[sys.argv[1]](pickle.loads(Path(sys.argv[2]).read_bytes()), *sys.argv[3:])
