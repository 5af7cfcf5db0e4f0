"""Reading an attached model while another thread runs or trains it gives the same values as while nothing runs."""

import copy
import pickle
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from support.models import LAYOUTS
from support.states import randomize, saved_and_loaded, with_adapter
from torch import Tensor, nn

import s2ft
from s2ft.ops import permute_, scatter_add_, swap_
from state.models import make_adapter, ratios, tiny_model, tokens
from state.plain import differences, same_bits, weights_of
from state.threads import in_child, repeating

READS = 20
REFUSED = (ValueError, RuntimeError)
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*not writable.*:UserWarning")


def attached_model(layout: str, **changes: int) -> nn.Module:
    config = s2ft.S2FTConfig(**ratios("llama"), layout=layout)
    return randomize(with_adapter(tiny_model("llama", **changes), config), 1, 0.1)


@pytest.fixture(scope="module", params=LAYOUTS)
def attached(request) -> tuple[nn.Module, Tensor]:
    """A model with a trainable adapter, and tokens for a forward of a few milliseconds."""
    model = attached_model(request.param, hidden_size=128, intermediate_size=512)
    ids = tokens(model, batch=8, length=16)
    model(input_ids=ids)
    return model, ids


# ---- readers -----------------------------------------------------------------------------------------


def values(adapter: s2ft.Adapter) -> dict[str, Tensor]:
    return {name: delta.values for name, delta in adapter.deltas.items()}


def base(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.endswith(".s2")}


READERS = {
    "deepcopy": lambda model, folder: weights_of(copy.deepcopy(model)),
    "merged copy": lambda model, folder: weights_of(s2ft.merge(copy.deepcopy(model))),
    "get_adapter": lambda model, folder: values(s2ft.get_adapter(model, "default")),
    "save_adapter": lambda model, folder: values(
        s2ft.read_adapter(s2ft.save_adapter(model, folder / "adapter") or folder / "adapter")
    ),
}
READERS_OF_THE_BASE = {
    "state_dict": lambda model, folder: {name: tensor.clone() for name, tensor in model.state_dict().items()},
    "saved state_dict": lambda model, folder: saved_and_loaded(model.state_dict()),
    "saved whole": lambda model, folder: weights_of(saved_and_loaded(model)),
    "pickle": lambda model, folder: weights_of(pickle.loads(pickle.dumps(model))),
    "detached copy": lambda model, folder: weights_of(s2ft.detach(copy.deepcopy(model))),
}


@pytest.mark.parametrize("reader", READERS | READERS_OF_THE_BASE)
def test_reading_while_another_thread_runs_the_model(attached, reader, tmp_path):
    """A forward with gradients writes the slices. Where only the base is read, the other thread also changes them."""
    model, ids = attached
    trained = [p for p in model.parameters() if p.requires_grad]

    def train() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.optim.SGD(trained, lr=1e-3).step()
        model.zero_grad()

    if reader in READERS:
        read, run = READERS[reader], lambda: model(input_ids=ids)
    else:
        read, run = lambda *given: base(READERS_OF_THE_BASE[reader](*given)), train
    expected = read(model, tmp_path)
    with repeating(run):
        found = [differences(expected, read(model, tmp_path)) for _ in range(READS)]
    wrong = [one for one in found if one]
    assert not wrong, f"{len(wrong)} of {READS} reads were wrong, the first: {wrong[0][0]}"


# ---- memory that can't be written to -------------------------------------------------------------------


def one_layer(kind: type) -> tuple[nn.Module, dict]:
    layer = kind(16, 16, start=0, end=4)
    layer.s2.data.normal_()
    return layer, dict(input=torch.ones(1, 16))


SHARED = {
    "row": lambda: one_layer(s2ft.S2RowLinear),
    "column": lambda: one_layer(s2ft.S2ColumnLinear),
    **{
        layout: lambda layout=layout: (model := attached_model(layout), {"input_ids": tokens(model)})
        for layout in LAYOUTS
    },
}


@pytest.mark.parametrize("runs_before", (False, True))
@pytest.mark.parametrize("what", SHARED)
def test_shared_memory_is_refused_before_it_is_written(what, runs_before):
    model, inputs = SHARED[what]()
    if runs_before:
        model(*inputs.values())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(REFUSED, match="shared"):
        model.share_memory()
        model(*inputs.values())
    assert not differences(before, model.state_dict())


def test_a_layer_sent_to_a_process_shares_no_weight_that_it_writes_to():
    """A queue or pipe of torch.multiprocessing moves the tensors that it sends to shared memory."""
    layer, _ = one_layer(s2ft.S2RowLinear)
    base = layer.weight.detach().clone()
    for one in (layer, pickle.loads(ForkingPickler.dumps(layer))):
        if one.weight.is_shared():
            with pytest.raises(REFUSED, match="shared"):
                one(torch.ones(1, 16))
        else:
            one(torch.ones(1, 16))
        assert same_bits(one.base_weight(), base)


def mapped(folder: Path, mode: str, shape: tuple[int, ...] = (16, 16)) -> Tensor:
    """A tensor in a memory-mapped file: mode "r" is read-only, "r+" shared, "c" copies on write."""
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


def load_into(model: nn.Module) -> None:
    s2ft.load_adapter(model, make_adapter(copy.deepcopy(model), s2ft.S2FTConfig(d_ratio=0.2), "a", seed=1))


def attach_to(folder: Path, mode: str, layout: str) -> None:
    model = with_adapter(model_on(folder, mode), s2ft.S2FTConfig(d_ratio=0.2, layout=layout))
    model(input_ids=tokens(model))


INDEX = torch.tensor([1, 3])
ONES = torch.ones(16, 2)
WRITERS = {
    "from_module": lambda folder, mode: s2ft.S2RowLinear.from_module(linear_on(mapped(folder, mode)), 0, 4)(
        torch.ones(1, 16)
    ),
    "attach, permuted": lambda folder, mode: attach_to(folder, mode, "permuted"),
    "attach, indexed": lambda folder, mode: attach_to(folder, mode, "indexed"),
    "load_adapter": lambda folder, mode: load_into(model_on(folder, mode)),
    "swap_": lambda folder, mode: swap_(mapped(folder, mode), INDEX, ONES.clone(), 1),
    "permute_": lambda folder, mode: permute_(mapped(folder, mode), torch.arange(16).flip(0), 1),
    "scatter_add_": lambda folder, mode: scatter_add_(mapped(folder, mode), [INDEX], [ONES], 1, [1.0]),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork, and reads /proc")
@pytest.mark.parametrize(
    "writer, mode, words",
    [
        *((writer, "r", "read-only") for writer in WRITERS),
        *((writer, "r+", "shared with other processes ({}") for writer in WRITERS if not writer.endswith("_")),
    ],
)
def test_a_file_mapped_for_reading_or_for_all_processes_is_refused(writer, mode, words, tmp_path):
    answer = in_child(lambda: WRITERS[writer](tmp_path, mode))
    assert isinstance(answer, REFUSED) and words.format(tmp_path) in str(answer), repr(answer)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_weight_in_a_private_mapping_works_and_its_file_does_not_change(writer, tmp_path):
    WRITERS[writer](tmp_path, "c")
    content = np.fromfile(tmp_path / "weight.bin", dtype="float32")
    assert np.array_equal(content, np.random.default_rng(0).standard_normal(content.shape).astype("float32"))
