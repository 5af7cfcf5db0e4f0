"""Adapters that were unloaded give their units back, once no request needs them. Nothing here needs vLLM."""

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest
from support.inside import retired


@pytest.fixture
def classes(monkeypatch):
    """Stand-ins for vLLM's server and engine."""

    class Engine:
        def __init__(self):
            self.scheduler, self.loaded = SimpleNamespace(requests={}), []

        def add_lora(self, request):
            self.loaded.append(request.lora_int_id)
            return True

        def remove_lora(self, number):
            self.loaded.remove(number)
            return True

        def preprocess_add_request(self, request):
            return request

    class Server:
        def __init__(self, engine):
            async def call_utility_async(method, *args):
                return getattr(engine, method)(*args)

            self.engine, self.lora_requests, self.count = engine, {}, 0
            self.engine_client = SimpleNamespace(engine_core=SimpleNamespace(call_utility_async=call_utility_async))

        async def load_lora_adapter(self, request):
            self.count += 1
            self.engine.add_lora(lora(self.count))
            self.lora_requests[request.lora_name] = lora(self.count)

        async def unload_lora_adapter(self, request):
            if request.lora_name in self.lora_requests:
                del self.lora_requests[request.lora_name]

    module = ModuleType("stand_in_vllm")
    module.Engine, module.Server = Engine, Server
    for cls in (Engine, Server):
        cls.__module__, cls.__qualname__ = "stand_in_vllm", cls.__name__
    monkeypatch.setitem(sys.modules, "stand_in_vllm", module)
    retired.free(Engine)
    retired.tell(Server)
    return Engine, Server


def lora(number):
    return SimpleNamespace(lora_int_id=number, lora_name=f"adapter {number}")


def named(name):
    return SimpleNamespace(lora_name=name)


def test_an_unloaded_adapter_goes_when_the_next_one_comes(classes):
    engine = classes[0]()
    server = classes[1](engine)
    asyncio.run(server.load_lora_adapter(named("a")))
    asyncio.run(server.unload_lora_adapter(named("a")))
    assert engine.loaded == [1]
    asyncio.run(server.load_lora_adapter(named("b")))
    assert engine.loaded == [2]
    with pytest.raises(ValueError, match="'adapter 1' was unloaded"):
        engine.preprocess_add_request(SimpleNamespace(lora_request=lora(1)))
    for other in (None, lora(2)):
        assert engine.preprocess_add_request(SimpleNamespace(lora_request=other)).lora_request is other


def test_an_adapter_stays_as_long_as_requests_need_it(classes):
    engine = classes[0]()
    server = classes[1](engine)
    asyncio.run(server.load_lora_adapter(named("a")))
    engine.scheduler.requests = {"x": SimpleNamespace(lora_request=lora(1)), "y": SimpleNamespace(lora_request=None)}
    asyncio.run(server.load_lora_adapter(named("a")))  # replaced, with a new number
    asyncio.run(server.load_lora_adapter(named("b")))
    assert engine.loaded == [1, 2, 3]
    engine.preprocess_add_request(SimpleNamespace(lora_request=lora(1)))
    engine.scheduler.requests = {}
    asyncio.run(server.load_lora_adapter(named("c")))
    assert engine.loaded == [2, 3, 4]


def test_a_name_that_is_not_there(classes):
    engine = classes[0]()
    asyncio.run(classes[1](engine).unload_lora_adapter(named("a")))
    assert not engine.__dict__.get("s2ft_retired")
