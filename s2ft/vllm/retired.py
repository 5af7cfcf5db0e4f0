"""Adapters that were unloaded or replaced over HTTP give their units back.

vLLM's server only forgets the name of an adapter that is unloaded, because requests may still run with it. Its workers
learn nothing. With a budget of units they could take ever fewer new adapters. So the server tells the engine, and the
engine removes the adapter when the next one is loaded and no request needs it any more.
"""

import functools
import logging
from typing import Any

from s2ft.vllm.compatibility import private, when_imported

logger = logging.getLogger("vllm.s2ft")

FEATURE = "units of adapters that were unloaded"
SERVER, ENGINE = "vllm.entrypoints.openai.models.serving", "vllm.v1.engine.core"


def install() -> None:
    """Tell the engine about adapters that no new request can name.

    Raises:
        MissingInVLLM: This release of vLLM lacks a module that is needed.
    """
    when_imported(SERVER, FEATURE, lambda: tell(private(SERVER, "OpenAIServingModels")))
    when_imported(ENGINE, FEATURE, lambda: free(private(ENGINE, "EngineCore")))


def tell(server: Any) -> None:
    """Change the class of the server that has the names.

    Args:
        server: vLLM's OpenAIServingModels.
    """
    module, name = server.__module__, server.__qualname__
    changed = {
        method: _telling(private(module, f"{name}.{method}")) for method in ("load_lora_adapter", "unload_lora_adapter")
    }
    for method, function in changed.items():
        setattr(server, method, function)


def _telling(original: Any) -> Any:
    @functools.wraps(original)
    async def changed(self: Any, request: Any, *args: Any, **options: Any) -> Any:
        before = self.lora_requests.get(request.lora_name)
        answer = await original(self, request, *args, **options)
        now = self.lora_requests.get(request.lora_name)
        if before is not None and (now is None or now.lora_int_id != before.lora_int_id):
            try:
                await self.engine_client.engine_core.call_utility_async("s2ft_retire", before.lora_int_id)
            except Exception as error:  # the adapter is unloaded; its units are taken until the engine ends
                logger.warning("s2ft: %s are not free: %s", FEATURE, error)
        return answer

    return changed


def free(engine: Any) -> None:
    """Change the class of the engine that has the requests.

    Args:
        engine: vLLM's EngineCore.
    """
    module, name = engine.__module__, engine.__qualname__
    add, remove = private(module, f"{name}.add_lora"), private(module, f"{name}.remove_lora")
    check = private(module, f"{name}.preprocess_add_request")

    def s2ft_retire(self: Any, lora_id: int) -> None:
        _retired(self).add(lora_id)

    @functools.wraps(add)
    def add_lora(self: Any, lora_request: Any) -> bool:
        for number in _retired(self) - _in_use(self):
            _retired(self).remove(number)
            _gone(self).add(number)
            remove(self, number)
        return add(self, lora_request)

    @functools.wraps(check)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        asked = request.lora_request
        if asked is not None and asked.lora_int_id in _gone(self):  # it was on its way when the adapter was unloaded
            raise ValueError(f"the adapter {asked.lora_name!r} was unloaded")
        return check(self, request)

    engine.s2ft_retire, engine.add_lora, engine.preprocess_add_request = s2ft_retire, add_lora, preprocess_add_request


def _retired(engine: Any) -> set[int]:
    return engine.__dict__.setdefault("s2ft_retired", set())


def _gone(engine: Any) -> set[int]:
    return engine.__dict__.setdefault("s2ft_gone", set())


def _in_use(engine: Any) -> set[int]:
    """The adapters of all requests that are not finished."""
    asked = [request.lora_request for request in engine.scheduler.requests.values()]
    return {one.lora_int_id for one in asked if one is not None}
