"""Running a model without leaving a trace in it, inputs to run it on, and comparing what it returns.

After deepspeed.zero.Init a parameter is empty on every rank, and only an engine gathers it for a forward. Selections
that run the model come before the engine. They run it inside :func:`gathered_forwards`.
"""

import inspect
import random
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from s2ft.distributed import full_shape, is_partitioned

# ---- modes, buffers, attributes and random states -------------------------------------------------------------------


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the context, and restore the mode of each module afterwards.

    Args:
        model: Any module. Its modules may be in different modes.

    Example:
        >>> model = model.train()
        >>> with s2ft.model.running.evaluation_mode(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Give a module or an object other attributes inside the context. Afterwards it has its own again, or none.

    They are written into its ``__dict__``: a wrapper does not pass them on to what it wraps.

    Args:
        owner: A Python module, an nn.Module or any object with a ``__dict__``.
        **values: The attributes.

    Example:
        >>> from s2ft.model.running import replaced
        >>> with replaced(model, forward=lambda input_ids: "replaced"):
        ...     model(input_ids)
        'replaced'
        >>> "forward" in vars(model)
        False
    """
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            own.pop(name, None)
        own.update(before)


def forward_hooks(model: nn.Module) -> list[tuple[dict, set]]:
    """Return the dicts of forward hooks and pre-hooks of all modules, and their keys of now."""
    return [(one, set(one)) for module in model.modules() for one in (module._forward_pre_hooks, module._forward_hooks)]


def remove_new_hooks(found: list[tuple[dict, set]]) -> None:
    """Remove the hooks of s2ft that :func:`forward_hooks` has not seen.

    An interrupt may come when PyTorch has registered a hook, before anyone has the handle that removes it. Hooks of
    others stay: transformers registers some in the first forward, and counts on them in all later ones.
    """
    for hooks, keys in found:
        for key in hooks.keys() - keys:
            function = getattr(hooks[key], "func", hooks[key])  # of a partial
            if str(getattr(function, "__module__", "")).partition(".")[0] == "s2ft":
                hooks.pop(key, None)


class Snapshot:
    """Modes, children, attributes, buffers and hooks of modules, and which parameters train, as when this was made.

    :meth:`restore` can be called any number of times, and an interrupt in it does no harm: the next call finishes it.
    """

    def __init__(
        self, model: nn.Module, modes_only: Collection[nn.Module] = (), trained: Iterable[Tensor] = ()
    ) -> None:
        """Remember them.

        Args:
            model: The model.
            modes_only: Modules of which only the mode and the buffers are remembered.
            trained: Parameters that require a gradient.
        """
        self.trained = list(trained)
        # BigBird's forward replaces modules
        self.modules = [(module, module.training, dict(module._modules)) for module in model.modules()]
        self.hooks = forward_hooks(model)
        whole = [module for module in model.modules() if module not in modes_only]
        whole += [one.__dict__["plain"] for one in modes_only if "plain" in one.__dict__]  # whose forward a layer runs
        self.attributes = [(module, _public(module)) for module in whole]
        self.buffers = [(module, dict(module._buffers)) for module in model.modules()]
        # Layers of bitsandbytes move their scales from the weight to their `state` when they run first.
        objects = [*model.parameters(), *(module.__dict__.get("state") for module in whole)]
        self.objects = [(one, dict(vars(one))) for one in objects if getattr(one, "__dict__", None)]
        found = {id(one): one for _, buffers in self.buffers for one in buffers.values() if one is not None}
        self.values = [(one, one.clone()) for one in found.values() if not (one.is_inference() or one.is_meta)]

    def changed_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """Copy the buffers of a model whose values are no longer those of this snapshot, by name."""
        values = {id(buffer): value for buffer, value in self.values}
        changed = {}
        for name, buffer in model.named_buffers():
            if id(buffer) not in values or not torch.equal(buffer, values[id(buffer)]):
                changed[name] = buffer.detach().clone()
        return changed

    def restore(self) -> None:
        """Give the modules what they had."""
        for parameter in self.trained:
            parameter.requires_grad_(True)
        for module, training, children in self.modules:
            module.training = training
            module._modules.update(children)
        remove_new_hooks(self.hooks)
        for module, attributes in self.attributes:
            for name in _public(module).keys() - attributes.keys():
                module.__dict__.pop(name, None)
            module.__dict__.update(attributes)
        for thing, attributes in self.objects:
            vars(thing).update(attributes)
        for module, buffers in self.buffers:
            module._buffers.update(buffers)
            for name in module._buffers.keys() - buffers.keys():
                module._buffers.pop(name, None)
        for buffer, value in self.values:
            if not torch.equal(buffer, value):  # BatchNorm's kernels don't raise the version of their statistics
                buffer.detach().copy_(value)


def _public(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, all random numbers start from a seed; afterwards the random states are as before."""
    states = random.getstate(), numpy.random.get_state()
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    try:
        with torch.random.fork_rng(sorted(devices, key=str)):
            generators = [torch.cuda.default_generators[device.index] for device in devices]
            for generator in (torch.random.default_generator, *generators):
                generator.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed)
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


# ---- the tensors in what a model returns, and by how much two of them differ ----------------------------------------

SAMPLE = 4096  # entries of a row that its spread is read from
SHORT = 64  # shorter rows are joined


def tensors_in(output: Any, name: str = "") -> Iterator[Tensor]:
    """Iterate over the floating-point and complex tensors of a model's output.

    Attention weights and caches are left out, because heads that are reordered change them.
    """
    if "attentions" in name or "cache" in name or "past" in name:
        return
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.is_complex():
            yield output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from tensors_in(value, str(key))
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_in(value, name)


def largest_change(now: Iterable[Tensor], then: Iterable[Tensor]) -> float:
    """The largest of :func:`changes` over pairs of tensors; infinity if there are more on one side."""
    now, then = list(now), list(then)
    pairs = [float(changes(*pair).max()) for pair in zip(now, then)]
    return max([*pairs, 0.0]) if len(now) == len(then) else torch.inf


def changes(now: Tensor, then: Tensor) -> Tensor:
    """By how much each entry of a tensor has changed, as a share of its size and of its row's usual size.

    A row is as large as its smaller entries: values that stand for "never", such as the lowest number of a dtype, hide
    nothing. NaN equals NaN, and infinity equals infinity.

    Args:
        now: The tensor after a change.
        then: The tensor before it.

    Returns:
        Shares [rows, entries] or [1], float64; infinity where only one entry is a number, or for another shape.
    """
    if now.shape != then.shape or now.dtype != then.dtype:
        return torch.tensor([torch.inf])
    if not now.numel():
        return torch.zeros(1)
    now, then = _rows(now), _rows(then)
    same = (now == then) | (now.isnan() & then.isnan())
    if bool(same.all()):
        return torch.zeros(1)
    found = (now - then).abs() / (then.abs() + _usual_size(then))
    return found.nan_to_num(torch.inf, torch.inf).masked_fill(same, 0.0)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor in float64 as rows of at least SHORT entries, if it has as many."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    tensor = torch.view_as_real(tensor).flatten(-2) if tensor.is_complex() else tensor
    dims = tensor.dim()
    while dims > 0 and tensor.shape[dims - 1 :].numel() < SHORT:
        dims -= 1
    length = tensor.shape[max(dims - 1, 0) :].numel()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).reshape(-1, length).double()


def _usual_size(rows: Tensor) -> Tensor:
    """The usual size of each row's entries, [rows, 1]: for normal numbers about their standard deviation."""
    sample = rows[:, :: rows.shape[1] // SAMPLE | 1]
    counts = sample.isfinite() & (sample != 0)
    for sign in (1, -1):  # a value that stands for "never" is the least or the largest, and is there often
        signed = (sign * sample).masked_fill(~counts, torch.inf)
        least = signed == signed.amin(1, keepdim=True)
        counts &= ~(least & (least.sum(1, keepdim=True) > 1))
    usual = 3 * sample.abs().masked_fill(~counts, torch.nan).nanquantile(0.25, dim=1, keepdim=True)
    return usual.nan_to_num(0.0).maximum(1e-6 * usual.nanmedian().nan_to_num(0.0))


# ---- weights that ZeRO-3 has partitioned ----------------------------------------------------------------------------


@contextmanager
def gathered_forwards(model: nn.Module) -> Iterator["Gathered"]:
    """Inside, the model's forward and backward run on gathered weights. Every rank must run them on the same inputs.

    The weights of a block are gathered when it starts and freed when it ends, those outside the blocks for the whole
    forward. For the backward a weight is gathered again, each time that an operation needs it. Gathered weights are
    tensors of their own: the parameters stay partitioned. Nothing happens for a model that is not partitioned.

    Args:
        model: The model. Its modules must not be exchanged inside.

    Returns:
        A context manager that yields an object with the leaves to which gradients are added.
    """
    gathered = Gathered()
    with ExitStack() as stack:
        if any(map(is_partitioned, model.parameters())):
            stack.callback(gathered.restore_all)
            for module, owners in _units(model):
                stack.callback(module.register_forward_pre_hook(partial(gathered.before, owners), prepend=True).remove)
                stack.callback(module.register_forward_hook(gathered.after, always_call=True).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(gathered.pack, gathered.unpack))
        yield gathered


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield modules, with the modules whose parameters are gathered for their forwards.

    That is a block with everything inside, because a forward may read the weights of modules below without running
    them, the model with everything outside the blocks, and each other module by itself: a model may run it without
    running the block around it.
    """
    blocks = dict(_blocks(model))
    inside = {module for found in blocks.values() for module in found}
    yield model, [module for module in model.modules() if module not in inside]
    for module in model.modules():
        if module is not model:
            yield module, blocks.get(module, [module])


def _blocks(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from ((block, list(block.modules())) for block in child.children())
        else:
            yield from _blocks(child)


class Gathered:
    """What is gathered now, and which saved tensors of a graph stand for weights that were freed."""

    def __init__(self) -> None:
        self.leaves: dict[int, Tensor] = {}  # by the id of the parameter
        self.replaced: list[list[tuple[nn.Module, str, nn.Parameter]]] = []  # one list for each forward under way
        self.by_storage: dict[int, tuple[nn.Parameter, int]] = {}  # parameter, offset of its values in the storage

    def leaf(self, weight: Tensor) -> Tensor:
        """The leaf to which the backward adds a weight's gradient: the weight, or for a partitioned one a stand-in.

        A stand-in has the full shape and no memory. It requires a gradient if it is asked to.
        """
        if not is_partitioned(weight):
            return weight
        if id(weight) not in self.leaves:
            self.leaves[id(weight)] = weight.new_zeros(()).detach().expand(full_shape(weight))
        return self.leaves[id(weight)]

    def before(self, owners: list[nn.Module], module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook: gather the parameters of these modules, unless they are gathered already."""
        self.replaced.append([])
        found: dict[int, Any] = {}  # a tied weight is gathered once
        for owner in owners:
            for name, parameter in list(owner._parameters.items()):
                if parameter is not None and is_partitioned(parameter):
                    if id(parameter) not in found:
                        found[id(parameter)] = self.full(parameter)
                    self.replaced[-1].append((owner, name, parameter))
                    owner._parameters[name] = found[id(parameter)]

    def after(self, module: nn.Module | None = None, inputs: Any = None, output: Any = None) -> None:
        """Forward hook: put the parameters back, and free what was gathered."""
        freed: dict[int, Any] = {}
        for owner, name, parameter in self.replaced.pop() if self.replaced else ():
            freed[id(parameter)] = owner._parameters[name]
            owner._parameters[name] = parameter
        for full in freed.values():
            self.by_storage.pop(full.untyped_storage().data_ptr(), None)

    def restore_all(self) -> None:
        """Put all parameters back, after a forward that was interrupted."""
        while self.replaced:
            self.after()

    def full(self, parameter: nn.Parameter) -> Tensor:
        """Gather a parameter into a tensor of its own, whose gradient goes to the parameter's leaf if it wants one."""
        full = _gather(parameter)
        self.by_storage[full.untyped_storage().data_ptr()] = parameter, cast(int, full.storage_offset())
        leaf = self.leaves.get(id(parameter))
        if leaf is None or not leaf.requires_grad:
            return nn.Parameter(full, requires_grad=False)
        return _Differentiable.apply(leaf, full)

    def pack(self, saved: Tensor) -> Any:
        """Keep the name of a weight in place of the weight, which would stay in memory until the backward."""
        if saved.layout != torch.strided or (storage := saved.untyped_storage().data_ptr()) not in self.by_storage:
            return saved
        parameter, offset = self.by_storage[storage]
        return parameter, saved.size(), saved.stride(), saved.storage_offset() - offset

    def unpack(self, packed: Any) -> Tensor:
        """Return a saved tensor; a weight is gathered again."""
        if isinstance(packed, Tensor):
            return packed
        parameter, size, stride, offset = packed
        full = _gather(parameter)
        return full.as_strided(size, stride, full.storage_offset() + offset)


def _gather(parameter: Any) -> Tensor:
    parameter.all_gather([parameter])
    full = parameter.data
    parameter.partition([parameter])  # frees nothing as long as `full` is used
    return full


class _Differentiable(torch.autograd.Function):
    """A weight whose gradient goes to a leaf. The graph keeps the leaf, not the weight."""

    @staticmethod
    def forward(ctx, leaf: Tensor, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


# ---- one plain batch of any size, from the config of a model --------------------------------------------------------


def example_of(model: nn.Module, rows: int = 2, length: int = 8, device: Any = None) -> dict[str, Tensor] | None:
    """Make a small batch for a transformers model from its config: token ids, pixels or sound.

    Args:
        model: The model.
        rows: Number of sequences, images or recordings.
        length: Number of tokens of a sequence.
        device: Device of the batch; default: that of the model.

    Returns:
        The arguments of the model's forward by name, or None if they can't be made.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main is None:
        return None
    takes = inspect.signature(model.forward).parameters
    more = {
        "pixel_values": hasattr(config, "vision_config"),
        "decoder_input_ids": getattr(config, "is_encoder_decoder", False),
    }
    names = dict.fromkeys([main, *(name for name, is_wanted in more.items() if is_wanted and name in takes)])
    values: dict[str, Any] = {
        name: _value(name, config, rows, length, torch.Generator().manual_seed(0)) for name in names
    }
    return None if any(value is None for value in values.values()) else placed(model, values, device)


def placed(model: nn.Module, values: dict[str, Tensor], device: Any = None) -> dict[str, Tensor]:
    """The tensors on a device, by default that of the model, and in the precision of the model."""
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return {
        name: value.to(device or weight.device, weight.dtype if value.is_floating_point() else None)
        for name, value in values.items()
    }


def _value(name: str, config: Any, rows: int, length: int, generator: torch.Generator) -> Tensor | None:
    text, vision = getattr(config, "text_config", None) or config, getattr(config, "vision_config", None) or config
    if name in ("input_ids", "decoder_input_ids") and hasattr(text, "vocab_size"):
        return torch.randint(text.vocab_size, (rows, length), generator=generator, device="cpu")
    if name == "pixel_values" and hasattr(vision, "image_size"):
        size = vision.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return torch.randn(rows, getattr(vision, "num_channels", 3), height, width, generator=generator, device="cpu")
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        return torch.randn(
            rows, config.num_mel_bins, 2 * config.max_source_positions, generator=generator, device="cpu"
        )
    return None


def check_example(example: Any) -> None:
    """Raise TypeError unless an example is None or has a type of an input of a model."""
    if example is not None and not isinstance(example, (Tensor, tuple, list, dict)):
        raise TypeError(f"example must be a tensor, a tuple or a dict, got {type(example).__name__}")


def run_example(model: nn.Module, example: Any) -> Any:
    """Run the model on copies of the example, because a model may write into its inputs."""
    return call_model(model, tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), example))


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Run the model on a dict, a tuple or a tensor."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
