"""Slice sync in SGLang, by its custom weight loader. It was tested with stand-ins and has not run inside SGLang.

Start the engine with ``--custom-weight-loader s2ft.sync.sglang.load``. Then
``engine.update_weights_from_tensor(tensors, load_format="s2ft.sync.sglang.load", flush_cache=True)`` calls
:func:`load` in each of its processes. :func:`tensors_of` makes the tensors from a message of slice sync.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from s2ft.sync.receiver import Receiver

MESSAGE, NUMBERS = "s2ft.message", "s2ft.numbers"
_receivers: WeakKeyDictionary[nn.Module, Receiver] = WeakKeyDictionary()


def tensors_of(message: Mapping[str, Any], numbers: Tensor | None = None) -> list[tuple[str, Tensor]]:
    """Make what SGLang hands to :func:`load`.

    Args:
        message: The beginning of a run, see :meth:`s2ft.sync.receiver.Receiver.bind`, or an update, see
            :meth:`s2ft.sync.receiver.Receiver.update`, without a tensor.
        numbers: The numbers of an update, in the order of the slices.

    Returns:
        Pairs of a name and a tensor.

    Example:
        >>> from s2ft.sync.sglang import tensors_of
        >>> [name for name, _ in tensors_of({"sender": "a", "step": 1}, torch.ones(4))]
        ['s2ft.message', 's2ft.numbers']
    """
    text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    return [(MESSAGE, text)] + ([] if numbers is None else [(NUMBERS, numbers.detach().contiguous())])


@torch.no_grad()
def load(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take a message of slice sync: SGLang's custom weight loader.

    Args:
        model: SGLang's model in this process, with `load_weights`.
        named_tensors: What :func:`tensors_of` made.

    Raises:
        ValueError: The tensors are not those of a message, the base is another one, or a slice has no place. The
            weights are as before.
        RuntimeError: The engine is bound to another sender or to none. The weights are as before.

    Example:
        >>> from s2ft.sync.sglang import load, tensors_of
        >>> from s2ft.sync.wire import SliceSpec, hashes_of, to_message
        >>> class Model(torch.nn.Linear):
        ...     def load_weights(self, tensors):
        ...         for name, tensor in tensors:
        ...             self.get_parameter(name).data.copy_(tensor)
        >>> engine, index = Model(4, 4), torch.tensor([2])
        >>> spec = SliceSpec("weight", (4, 4), 0, index, hashes_of(engine.weight[index], 0))
        >>> load(engine, tensors_of({"sender": "a", "dtype": "float32", "slices": to_message([spec])}))
        >>> load(engine, tensors_of({"sender": "a", "step": 1}, torch.ones(4)))
        >>> engine.weight[2].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    tensors = dict(named_tensors)
    if MESSAGE not in tensors or not tensors.keys() <= {MESSAGE, NUMBERS}:
        raise ValueError(
            f"s2ft.sync.sglang.load takes what tensors_of makes, not tensors named {', '.join(map(str, tensors))}"
        )
    try:
        message = json.loads(bytes(tensors[MESSAGE].cpu().numpy()))
    except ValueError as error:
        raise ValueError(f"the message of slice sync is damaged: {error}") from error
    receiver = _receivers.get(model)
    if receiver is None:
        receiver = _receivers[model] = Receiver(model, ranks=_Processes())
    if "slices" in message:
        receiver.bind(message)
    else:
        receiver.update({**message, **({"tensor": tensors[NUMBERS]} if NUMBERS in tensors else {})})


class _Processes:
    """The processes of the engine: those of torch's default group."""

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return [value]
        values: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
        return values
