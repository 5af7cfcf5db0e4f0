"""The scheduler: jobs that wait, run or are dropped, and the jobs that an error ends."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from serve.fleet import eventually
from support.inside import Adapters, ApiError, Engine, Job, Sampler, TextStream, tiny_config
from train.tiny import tiny_model, tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM


class FakeBank:
    """Adapters by name that change nothing. A batch holds at most `limit` of them."""

    def __init__(self, limit=100):
        self.names, self.limit, self.batches = set(), limit, []

    def check(self, folder):
        return SimpleNamespace(info={})

    def add(self, name, folder):
        self.names.add(name)

    def remove(self, name):
        self.names.remove(name)

    @contextmanager
    def batch(self, names):
        used = {name for name in names if name is not None}
        if len(used) > self.limit or used - self.names:
            raise ValueError(f"can't mix {used}")
        self.batches.append(list(names))
        yield


class Gate:
    """Makes a model wait before every pass until the test releases it."""

    def __init__(self, model):
        self.passes, self.entered = threading.Semaphore(0), threading.Event()
        model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.entered.set()
        assert self.passes.acquire(timeout=30)

    def open(self):
        self.passes.release(100_000)


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "s2ft_config.json").touch()
        (tmp_path / name / "s2ft_adapter.safetensors").touch()
    return tmp_path


@contextmanager
def engine_over(folder, bank=None, gated=False, model=None, **options):
    model = tiny_model() if model is None else model
    engine = Engine(model, Adapters(bank or FakeBank(), [folder]), **options)
    gate = Gate(model) if gated else None
    engine.start()
    try:
        yield (engine, gate) if gated else engine
    finally:
        if gate:
            gate.open()
        engine.stop()


@contextmanager
def busy_engine(folder, bank=None, **options):
    """An engine that runs a job while others arrive, its gate, and the client of this job."""
    with engine_over(folder, bank, gated=True, **options) as (engine, gate):
        first = Client(engine)
        assert gate.entered.wait(30)
        yield engine, gate, first


class Client:
    """One job and the events that it received."""

    def __init__(self, engine, adapter=None, prompt=(5, 6, 7), max_tokens=4, **options):
        self.events, self.done = [], threading.Event()
        self.job = Job(
            prompt,
            max_tokens,
            Sampler(**options),
            TextStream(tiny_tokenizer()),
            frozenset(),
            self.receive,
            (None if adapter is None else engine.adapters.acquire(adapter)),
        )
        engine.submit(self.job)

    def receive(self, event):
        self.events.append(event)
        if event.last:
            self.done.set()

    def last(self):
        assert self.done.wait(30)
        assert [event.last for event in self.events] == [False] * (len(self.events) - 1) + [True]
        return self.events[-1]


def users(engine):
    return sum(served.users for served in engine.adapters._served.values())


def batches_of(folder, jobs, limit=100, **options):
    """Answer jobs, the arguments of their clients, that arrive while another one runs. Returns each batch's adapters."""
    bank = FakeBank(limit)
    with busy_engine(folder, bank, **options) as (engine, gate, first):
        clients = [Client(engine, *job) for job in jobs]
        gate.open()
        assert all(client.last().finish == "length" for client in [first, *clients])
    return bank.batches


def test_jobs_of_several_adapters_share_a_batch(folder):
    largest = max(batches_of(folder, [("a",), ("b",), (None,), ("a",)]), key=len)
    assert len(largest) == 5 and len(set(largest)) == 3


def test_the_queue_is_bounded_and_cancelled_jobs_leave_it(folder):
    with busy_engine(folder, max_batch_size=1, queue_size=2) as (engine, gate, running):
        waiting = [Client(engine, "a"), Client(engine, "b")]
        with pytest.raises(ApiError) as refused:
            Client(engine, "c")
        assert refused.value.status == 429 and refused.value.headers["Retry-After"]
        engine.cancel(waiting[0].job)
        last = Client(engine, "c")
        gate.open()
        assert running.last().finish == waiting[1].last().finish == last.last().finish == "length"
        assert waiting[0].events == []
        eventually(lambda: not users(engine), "free adapters")


def test_a_cancelled_job_leaves_the_batch_and_the_others_go_on(folder):
    with engine_over(folder, gated=True) as (engine, gate):
        gone, stays = Client(engine, "a", max_tokens=200), Client(engine, "b", max_tokens=200)
        gate.passes.release(10)
        eventually(lambda: len(stays.events) >= 2 and engine.running == 2, "two rows")
        engine.cancel(gone.job)
        gate.passes.release(3)
        eventually(lambda: engine.running == 1, "one row")
        gate.open()
        assert stays.last().finish == "length" and len(stays.job.tokens) == 200 and len(gone.job.tokens) < 20


def test_an_unloaded_adapter_serves_its_jobs_to_the_end(folder):
    bank = FakeBank()
    with engine_over(folder, bank, gated=True, max_batch_size=1) as (engine, gate):
        running, waiting = Client(engine, "a"), Client(engine, "a")
        assert gate.entered.wait(30)
        engine.adapters.unload("a")
        with pytest.raises(ApiError, match="no model 'a'"):
            Client(engine, "a")
        assert "a#0" in bank.names
        gate.open()
        assert running.last().finish == waiting.last().finish == "length"
        eventually(lambda: bank.names == {"b#1", "c#2"}, "a bank without it")


@pytest.mark.parametrize(
    "error, status, code",
    [
        (ValueError("is damaged"), 400, "invalid_adapter"),
        (FileNotFoundError("/place/b"), 404, "model_not_found"),
        (MemoryError("no memory is left"), 503, "adapter_failed"),
    ],
)
def test_an_adapter_that_can_not_be_loaded_fails_only_its_own_jobs(folder, error, status, code):
    class Broken(FakeBank):
        def batch(self, names):
            if "b#1" in names:
                raise error
            return super().batch(names)

    with busy_engine(folder, Broken()) as (engine, gate, first):
        good, bad, other = Client(engine, "a"), Client(engine, "b"), Client(engine, "c")
        gate.open()
        assert good.last().finish == other.last().finish == first.last().finish == "length"
        found = bad.last().error
        assert (found.status, found.code) == (status, code) and "/place" not in found.message
        assert ("b" in engine.adapters.refused) == (status == 400)


def test_a_job_waits_until_the_bank_has_room(folder):
    batches = batches_of(folder, [("a", (5,), 9), *((name,) for name in (*"bcabc", None))], limit=1)
    assert all(len({name for name in names if name}) <= 1 for names in batches)
    assert [name for names in batches for name in names if name][:9] == ["a#0"] * 9  # none was loaded beside it
    assert len(batches) < 120  # and does not look again at every token


def test_an_error_of_the_model_fails_only_its_batch(folder, caplog):
    model = tiny_model()
    fail = threading.Event()

    def maybe(*_):
        if fail.is_set():
            fail.clear()
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(maybe)
    with engine_over(folder, gated=True, model=model) as (engine, gate):
        first = Client(engine, "a", max_tokens=50)
        gate.passes.release(3)
        eventually(lambda: len(first.events) >= 2, "tokens")
        fail.set()
        gate.open()
        assert first.last().error.code == "model_failed" and Client(engine, "a").last().finish == "length"
        eventually(lambda: not users(engine), "free adapters")


def test_a_batch_has_no_more_tokens_than_allowed(folder):
    # each of the six has 7 tokens of the batch's 30
    batches = batches_of(folder, [*[("a",)] * 6, ("b", [5] * 30, 3)], max_batch_tokens=30)
    assert max(map(len, batches)) == 4
    assert all(len(names) == 1 for names in batches if "b#1" in names)


def test_stopping_fails_the_remaining_jobs(folder):
    with engine_over(folder, gated=True, max_batch_size=1) as (engine, gate):
        clients = [Client(engine, "a", max_tokens=200), Client(engine, "b")]
        assert gate.entered.wait(30)
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        eventually(lambda: engine._stopped, "the stop")
        gate.passes.release(1000)
        stopper.join(30)
        assert all(client.last().error.status == 503 for client in clients)
        with pytest.raises(ApiError, match="shutting down"):
            Client(engine)


def test_models_with_rows_that_depend_on_each_other_run_one_at_a_time(folder, caplog):
    models, blocks = [tiny_model(), tiny_model()], tiny_config(CONFIG_MAPPING["blt"]())  # makes patches of tokens
    models[0].config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    models[1].config.rope_parameters = {"full_attention": {"rope_type": "longrope"}}
    for one in (*models, AutoModelForCausalLM.from_config(blocks).eval()):
        assert Engine(one, Adapters(FakeBank(), [folder])).max_batch_size == 1 and "one runs at a time" in caplog.text
