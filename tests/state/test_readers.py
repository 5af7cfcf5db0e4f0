"""Reading an attached model while another thread runs it gives the same values as while nothing runs."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from support.inside import _linear
from torch import Tensor, nn

import s2ft
from s2ft.ops import grouped_linear, indexed_linear, permute_, scatter_add_, sliced_linear, swap_
from state.models import LAYOUTS, fill_slices, make_adapter, ratios, tiny_model, tokens
from state.plain import different_weights, effective_weights, same_bits, weights_of
from state.threads import in_child, in_threads, repeating

READS = 20
WIDE = dict(hidden_size=128, intermediate_size=512)
REFUSED = (ValueError, RuntimeError)
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*not writable.*:UserWarning")


@pytest.fixture(scope="module", params=LAYOUTS)
def attached(request) -> tuple[nn.Module, Tensor]:
    """A model with a trainable adapter, and tokens for a forward of a few milliseconds."""
    model = tiny_model("llama", **WIDE)
    s2ft.attach(model, s2ft.S2FTConfig(**ratios("llama"), layout=request.param))
    fill_slices(model, seed=1)
    return model, tokens(model, batch=8, length=16)


# ---- readers -----------------------------------------------------------------------------------------


def loaded(save) -> object:
    """What torch.load reads from what was saved."""
    file = io.BytesIO()
    torch.save(save, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def values(adapter: s2ft.Adapter) -> dict[str, Tensor]:
    return {name: delta.values for name, delta in adapter.deltas.items()}


def locked(model: nn.Module) -> dict[str, Tensor]:
    with s2ft.stable_weights():
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


READERS = {
    "state_dict": lambda model, folder: {name: tensor.clone() for name, tensor in model.state_dict().items()},
    "saved state_dict": lambda model, folder: loaded(model.state_dict()),
    "saved whole": lambda model, folder: weights_of(loaded(model)),
    "deepcopy": lambda model, folder: weights_of(copy.deepcopy(model)),
    "pickle": lambda model, folder: weights_of(pickle.loads(pickle.dumps(model))),
    "merged copy": lambda model, folder: weights_of(s2ft.merge(copy.deepcopy(model))),
    "detached copy": lambda model, folder: weights_of(s2ft.detach(copy.deepcopy(model))),
    "get_adapter": lambda model, folder: values(s2ft.get_adapter(model, "default")),
    "save_adapter": lambda model, folder: values(
        s2ft.read_adapter(s2ft.save_adapter(model, folder / "adapter") or folder / "adapter")
    ),
    "plain reads inside stable_weights": lambda model, folder: locked(model),
}


@pytest.mark.parametrize("reader", READERS)
def test_reading_while_another_thread_runs_the_model(attached, reader, tmp_path):
    model, ids = attached
    expected = READERS[reader](model, tmp_path)
    with repeating(lambda: model(input_ids=ids)):
        found = [different_weights(expected, READERS[reader](model, tmp_path)) for _ in range(READS)]
    wrong = [one for one in found if one]
    assert not wrong, f"{len(wrong)} of {READS} reads were wrong, the first: {wrong[0][0]}"


# ---- stable_weights ------------------------------------------------------------------------------------


def test_plain_reads_inside_stable_weights_never_see_half_a_switch():
    plain = tiny_model("llama", layers=2, **WIDE)
    adapters = [
        make_adapter(plain, s2ft.S2FTConfig(**ratios("llama"), seed=seed), name, seed)
        for seed, name in ((1, "a"), (2, "b"))
    ]
    states = [effective_weights(plain, [(adapter, 1.0)]) for adapter in adapters] + [weights_of(plain)]
    model = copy.deepcopy(plain)
    for adapter in adapters:
        s2ft.load_adapter(model, adapter)
    wrong = 0

    def switch() -> None:
        for name in ("a", "b", None):
            s2ft.set_adapter(model, name)

    with repeating(switch):
        for _ in range(READS):
            with s2ft.stable_weights():
                found = weights_of(model)
            wrong += all(different_weights(state, found) for state in states)
    assert wrong == 0, f"{wrong} of {READS} reads saw a mixture of two states"


def test_stable_weights_blocks_other_threads_until_it_ends(attached):
    model, ids = attached
    done = threading.Event()

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids)
        done.set()

    with s2ft.stable_weights():
        thread = threading.Thread(target=forward, daemon=True)
        thread.start()
        assert not done.wait(0.2)  # a forward takes much less time
    assert done.wait(60)
    thread.join()


def test_stable_weights_nests_and_everything_works_inside(attached):
    model, ids = attached

    def use() -> None:
        with s2ft.stable_weights(), s2ft.stable_weights():
            model(input_ids=ids, labels=ids).loss.backward()
            s2ft.fuse(model)
            s2ft.unfuse(model)
            s2ft.set_adapter(model, None)
            s2ft.set_adapter(model, "default")
            s2ft.merge(copy.deepcopy(model))
        with pytest.raises(KeyError), s2ft.stable_weights():
            raise KeyError("an error of the reader")

    in_threads([use])
    model.zero_grad()
    in_threads([lambda: model(input_ids=ids)])  # stable_weights was given up


# ---- fork ----------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """Use one thread, because threads of PyTorch do not survive a fork, not even in nn.Linear."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("where", ["slice", "index"])
def test_children_forked_while_another_thread_runs_the_layer(where, one_thread):
    units = dict(start=0, end=64) if where == "slice" else dict(index=torch.arange(0, 128, 2))
    layer = s2ft.S2RowLinear(1024, 1024, bias=False, **units)
    layer.s2.data.normal_()
    base, x = layer.weight.detach().clone(), torch.randn(256, 1024)

    def child() -> str:
        if not same_bits(layer.weight, base):
            return "the weight was changed in the child"
        with torch.no_grad():
            layer(x[:1])
        return "fine" if same_bits(layer.weight, base) else "the child's forward changed the weight"

    with repeating(lambda: layer(x)):
        assert [in_child(child) for _ in range(5)] == ["fine"] * 5
    assert same_bits(layer.weight, base)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_inside_stable_weights_can_run_the_layer():
    layer = s2ft.S2RowLinear(8, 8, start=0, end=2)
    with s2ft.stable_weights():
        assert in_child(lambda: tuple(layer(torch.ones(1, 8)).shape)) == (1, 8)


# ---- memory that can't be written to -------------------------------------------------------------------


def attached_model(layout: str) -> tuple[nn.Module, dict]:
    model = tiny_model("llama")
    s2ft.attach(model, s2ft.S2FTConfig(**ratios("llama"), layout=layout))
    fill_slices(model, seed=1)
    return model, dict(input_ids=tokens(model))


def one_layer(kind: type) -> tuple[nn.Module, dict]:
    layer = kind(16, 16, start=0, end=4)
    layer.s2.data.normal_()
    return layer, dict(input=torch.ones(1, 16))


SHARED = {
    "row": lambda: one_layer(s2ft.S2RowLinear),
    "column": lambda: one_layer(s2ft.S2ColumnLinear),
    **{layout: lambda layout=layout: attached_model(layout) for layout in LAYOUTS},
}


@pytest.mark.parametrize("runs_before", (False, True))
@pytest.mark.parametrize("what", SHARED)
def test_shared_memory_is_refused_before_it_is_written(what, runs_before):
    model, inputs = SHARED[what]()
    if runs_before:
        model(*inputs.values())
    before = weights_of(model)
    with pytest.raises(REFUSED, match="shared"):
        model.share_memory()
        model(*inputs.values())
    assert not different_weights(before, weights_of(model))


def test_a_layer_sent_to_a_process_shares_no_weight_that_it_writes_to():
    """A queue or pipe of torch.multiprocessing moves the tensors that it sends to shared memory."""
    layer, _ = one_layer(s2ft.S2RowLinear)
    base = layer.weight.detach().clone()
    received = pickle.loads(ForkingPickler.dumps(layer))
    for one in (layer, received):
        if one.weight.is_shared():
            with pytest.raises(REFUSED, match="shared"):
                one(torch.ones(1, 16))
        else:
            one(torch.ones(1, 16))
        assert same_bits(one.weight, base)


def mapped(folder: Path, mode: str, shape: tuple[int, ...] = (16, 16)) -> Tensor:
    """A tensor in a memory-mapped file: mode "r" is read-only, "c" copies on write."""
    path = folder / "weight.bin"
    np.random.default_rng(0).standard_normal(shape).astype("float32").tofile(path)
    return torch.from_numpy(np.memmap(path, dtype="float32", mode=mode, shape=shape))


def linear_on(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def model_on(folder: Path, mode: str) -> nn.Module:
    """A model whose down projection is memory-mapped."""
    model = tiny_model("llama")
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(mapped(folder, mode, tuple(down.weight.shape)), requires_grad=False)
    return model


def adapter_for(folder: Path, mode: str) -> tuple[nn.Module, s2ft.Adapter]:
    model = model_on(folder, mode)
    return model, make_adapter(copy.deepcopy(model), s2ft.S2FTConfig(d_ratio=0.2), "a", seed=1)


def attach_to(folder: Path, mode: str, layout: str) -> None:
    model = model_on(folder, mode)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2, layout=layout))
    model(input_ids=tokens(model))


INDEX = torch.tensor([1, 3])
ONES = torch.ones(16, 2)
WRITERS = {
    "from_module": lambda folder, mode: s2ft.S2RowLinear.from_module(linear_on(mapped(folder, mode)), 0, 4)(
        torch.ones(1, 16)
    ),
    "attach, permuted": lambda folder, mode: attach_to(folder, mode, "permuted"),
    "attach, indexed": lambda folder, mode: attach_to(folder, mode, "indexed"),
    "load_adapter": lambda folder, mode: s2ft.load_adapter(*adapter_for(folder, mode)),
    "sliced_linear": lambda folder, mode: sliced_linear(torch.ones(1, 16), mapped(folder, mode), ONES, 0, 1),
    "the reference": lambda folder, mode: _linear.reference(
        torch.ones(1, 16), mapped(folder, mode), ONES, 0, 1, None, None
    ),
    "indexed_linear": lambda folder, mode: indexed_linear(torch.ones(1, 16), mapped(folder, mode), ONES, INDEX, 1),
    "grouped_linear": lambda folder, mode: grouped_linear(
        torch.ones(1, 16), mapped(folder, mode)[None], ONES, INDEX, torch.tensor([1], dtype=torch.int32), 1, 2
    ),
    "swap_": lambda folder, mode: swap_(mapped(folder, mode), INDEX, ONES.clone(), 1),
    "permute_": lambda folder, mode: permute_(mapped(folder, mode), torch.arange(16).flip(0), 1),
    "scatter_add_": lambda folder, mode: scatter_add_(mapped(folder, mode), [INDEX], [ONES], 1, [1.0]),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_read_only_weight_is_refused(writer, tmp_path):
    answer = in_child(lambda: WRITERS[writer](tmp_path, "r"))
    assert isinstance(answer, REFUSED) and "read-only" in str(answer), repr(answer)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_weight_in_a_private_mapping_works_and_its_file_does_not_change(writer, tmp_path):
    WRITERS[writer](tmp_path, "c")
    content = np.fromfile(tmp_path / "weight.bin", dtype="float32")
    expected = np.random.default_rng(0).standard_normal(content.shape).astype("float32")
    assert np.array_equal(content, expected)


# ---- the PyTorch reference -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_of_this_with_the_pytorch_reference():
    environment = {**os.environ, "S2FT_TEST_KERNELS": "reference"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    process = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        timeout=600,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.returncode == 0, process.stdout
