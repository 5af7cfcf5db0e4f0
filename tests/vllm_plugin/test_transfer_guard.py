"""The engine core's part of slice sync, with a stand-in for vLLM's core: idle engines, errors, caches, dead clients."""

import functools
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from support.inside import MissingForeignName, compatibility, loading, transfer
from support.vllm_modules import fake_modules


class Core:
    """An engine core with two workers."""

    def __init__(self, running=0, asleep=(), replicas=1, paused=False, can_reset=True):
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=replicas))
        self.is_scheduler_paused = lambda: paused
        self.workers, self.batch_queue, self.resets = [Mock(), Mock()], None, []
        self.scheduler = SimpleNamespace(has_unfinished_requests=lambda: running, reset_encoder_cache=lambda: None)
        self.model_executor = SimpleNamespace(sleeping_tags=set(asleep), reset_encoder_cache=lambda: None)
        self.can_reset = can_reset

    def reset_prefix_cache(self, **options):
        self.resets.append(options)
        return self.can_reset

    def call(self, method, timeout=None, args=(), kwargs=None):
        return [method(worker, *args, **(kwargs or {})) for worker in self.workers]

    def rpc(self, method, **kwargs):
        return transfer._guarded_call(self, self.call, method, None, (), kwargs)

    def methods(self):
        return [name for name, *_ in self.workers[1].method_calls]


def test_an_update_tells_the_workers_whether_requests_run_and_forgets_the_cache():
    core = Core()
    core.rpc("update_weights", update_info={"step": 1})
    core.workers[0].update_weights.assert_called_once_with(update_info={"step": 1, "idle": True})
    assert core.resets == [{"reset_running_requests": True, "reset_connector": True}]
    busy = Core(running=1)
    busy.rpc("update_weights", update_info=[{"step": 1}, {"step": 1}])
    busy.workers[0].update_weights.assert_called_once_with(update_info=[{"step": 1, "idle": False}] * 2)
    assert not busy.resets


def test_an_error_of_one_worker_is_raised_after_all_have_answered_and_the_cache_is_forgotten():
    core = Core()
    core.workers[0].update_weights.side_effect = KeyError("x")
    with pytest.raises(ValueError, match="KeyError: 'x'"):
        core.rpc("update_weights", update_info={})
    assert core.methods() == ["update_weights"] and len(core.resets) == 1  # the call may have restored the base


def test_the_update_of_a_client_that_died_is_finished():
    core = Core()
    core.rpc("start_weight_update")
    core.rpc("init_weight_transfer_engine", init_info={})
    core.rpc("start_weight_update")
    core.rpc("update_weights", update_info={})
    core.rpc("finish_weight_update")
    core.rpc("start_weight_update")
    core.rpc("shutdown_weight_transfer_engine")
    names = [name.split("_")[0] for name in core.methods()]
    assert names == ["start", "init", "finish", "start", "update", "finish", "start", "finish", "shutdown"]


@pytest.mark.parametrize(
    "core, words",
    [
        (Core(asleep={"weights"}), "asleep: wake the engine up first"),
        (Core(replicas=2), "data parallel replicas takes slices while it is paused: pause it first"),
        (Core(can_reset=False), "answers may mix old and new weights: call reset_prefix_cache"),
    ],
)
def test_an_update_that_is_refused(core, words):
    with pytest.raises(RuntimeError, match=words):
        core.rpc("update_weights", update_info={})
    for other in (Core(asleep={"kv_cache"}), Core(replicas=2, paused=True)):
        other.rpc("update_weights", update_info={})
        assert other.methods() == ["update_weights"]


def test_only_engines_with_the_backend_are_changed(monkeypatch):
    chosen = SimpleNamespace(weight_transfer_config=SimpleNamespace(backend="s2ft"))
    other = SimpleNamespace(weight_transfer_config=SimpleNamespace(backend="nccl"))
    assert transfer.is_chosen(chosen) and not transfer.is_chosen(other)
    assert not transfer.is_chosen(None) and not transfer.is_chosen(SimpleNamespace(weight_transfer_config=None))
    packed, config = [], [chosen]

    def pack(layer, remove_weight):
        packed.append(layer)
        layer.cpu_linear = functools.partial(torch.nn.functional.linear)

    utils = SimpleNamespace(dispatch_cpu_unquantized_gemm=pack)
    found = {"": utils, "dispatch_cpu_unquantized_gemm": pack, "get_current_vllm_config_or_none": lambda: config[0]}
    for module in (compatibility, transfer):
        monkeypatch.setattr(module, "private", lambda module, name="": found[name])
    transfer._leave_unpacked()
    linear, conv = torch.nn.Linear(2, 2), torch.nn.Conv1d(2, 2, 4)
    utils.dispatch_cpu_unquantized_gemm(linear, remove_weight=True)
    assert not packed and linear.cpu_linear is torch.nn.functional.linear and not transfer.is_packed(linear)
    utils.dispatch_cpu_unquantized_gemm(conv, remove_weight=True)
    config[0] = other
    utils.dispatch_cpu_unquantized_gemm(linear, remove_weight=True)
    assert packed == [conv, linear] and transfer.is_packed(linear)


def test_a_release_that_names_its_packed_copies_otherwise_is_refused(monkeypatch):
    utils = SimpleNamespace(dispatch_cpu_unquantized_gemm=lambda layer: None)
    config = SimpleNamespace(weight_transfer_config=SimpleNamespace(backend="s2ft"))
    found = {**vars(utils), "": utils, "get_current_vllm_config_or_none": lambda: config}
    for module in (compatibility, transfer):
        monkeypatch.setattr(module, "private", lambda module, name="": found[name])
    transfer._leave_unpacked()
    with pytest.raises(MissingForeignName, match="vllm .* has no 'cpu_linear', by which s2ft finds weights of which"):
        utils.dispatch_cpu_unquantized_gemm(torch.nn.Linear(2, 2))


class PunicaWrapperCPU:
    """Takes the slot -1 as the last one, as vLLM's does."""

    token_lora_indices = torch.tensor([1, -1, 0, -1])

    def _shrink_prefill(self, y, x, w_t_all, scale):
        y.copy_(scale * torch.einsum("bi,bri->br", x, w_t_all[self.token_lora_indices]))

    _shrink_decode = _shrink_prefill


def test_tokens_of_the_base_get_no_adapter_on_processors(monkeypatch):
    fake_modules(monkeypatch, {loading.PUNICA: {"PunicaWrapperCPU": PunicaWrapperCPU}})
    x, a, wrapper = torch.randn(4, 8), torch.randn(2, 3, 8), PunicaWrapperCPU()
    before, after = torch.empty(4, 3), torch.empty(4, 3)
    wrapper._shrink_decode(before, x, a, 2.0)
    assert before[1].any()
    loading._leave_base_out()
    for shrink in (wrapper._shrink_prefill, wrapper._shrink_decode):
        shrink(after.fill_(1), x, a, 2.0)
        assert torch.equal(after[[0, 2]], before[[0, 2]]) and not after[[1, 3]].any()
