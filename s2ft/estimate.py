"""How much memory training takes, counted in one step on tensors without data.

A copy of the model that holds shapes only gets S²FT's own layers and runs a forward, a backward and a step of the
optimizer as PyTorch's fake tensors, which take the kernels and dtypes of the device and compute nothing. What
autograd saves on the way is what it would save of a real model, storage by storage. Tensors that depend on no weight
are real: token ids, masks, positions, and which expert gets which token.
"""
import copy
import inspect
import re
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from s2ft.arch import couplings_of
from s2ft.config import S2FTConfig
from s2ft.coupling import Coupling
from s2ft.mounting import RECORD, Attachment, mount
from s2ft.selection import METRICS
from s2ft.selection import select as select_units
from s2ft.verify import example_of
from s2ft.weights import is_quantized

OUTSIDE = "loss"   # the part for what is saved in no module's forward but the model's own
LOSSES = ("labels", "return_loss")

Optimizer = Union[str, Callable[[List[Tensor]], torch.optim.Optimizer]]


# ---- the result ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    """What a layer, or another part of the model, takes: bytes, but for `trained`."""

    name: str
    parameters: int   # frozen ones and deltas; a tied weight where it comes first
    buffers: int
    trained: int      # numbers
    gradients: int
    optimizer: int
    kept: int         # for backward


@dataclass(frozen=True)
class Estimate:
    """What training will take, in bytes; prints as a table, a line for each part and alike layers in one."""

    parts: List[Part]
    batch: int               # sequences, images or recordings of one forward
    length: Optional[int]    # tokens of each; None where inputs are no tokens
    device: str
    peak: int                # most that is alive at once in a step, everything together
    peak_in: str             # forward, backward or optimizer: where
    resident: int            # of it, what is on the device already: the weights of a model that is loaded
    free: Optional[int]      # on the device now; None where that isn't known
    notes: Tuple[str, ...]   # what the numbers rest on

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def buffers(self) -> int:
        return sum(part.buffers for part in self.parts)

    @property
    def trained(self) -> int:
        """Numbers, not bytes."""
        return sum(part.trained for part in self.parts)

    @property
    def gradients(self) -> int:
        return sum(part.gradients for part in self.parts)

    @property
    def optimizer(self) -> int:
        return sum(part.optimizer for part in self.parts)

    @property
    def kept(self) -> int:
        """What autograd saves in one forward for the backward, each storage once, without parameters and buffers."""
        return sum(part.kept for part in self.parts)

    @property
    def fits(self) -> Optional[bool]:
        """Whether what is not there yet fits into the memory that is free; None where that isn't known."""
        return None if self.free is None else self.peak - self.resident <= self.free

    def to_dict(self) -> Dict[str, Any]:
        """For JSON."""
        sums = ("parameters", "buffers", "trained", "gradients", "optimizer", "kept", "fits")
        return {**asdict(self), "notes": list(self.notes), **{name: getattr(self, name) for name in sums}}

    def summary(self) -> str:
        """A short paragraph: what is needed, of what, and whether it fits."""
        inputs = f"{self.batch}" if self.length is None else f"{self.batch} × {self.length} tokens"
        return (f"training takes {size(self.peak)} of memory at most: parameters {size(self.parameters + self.buffers)}, "
                f"gradients {size(self.gradients)}, optimizer {size(self.optimizer)}, {size(self.kept)} kept for "
                f"backward (batch of {inputs}) and what the {self.peak_in} needs for a moment. {self._verdict()}")

    def _verdict(self) -> str:
        needed = self.peak - self.resident
        more = f" more, beside the {size(self.resident)} that are loaded," if self.resident else ""
        if self.free is None:
            return f"How much is free on {self.device} is not known."
        if self.fits:
            return f"{size(self.free)} are free on {self.device}: it fits."
        return (f"It will not fit: {size(needed)}{more} are needed, and {size(self.free)} are free on {self.device}. "
                "A smaller batch, shorter rows, gradient checkpointing, or a smaller dtype need less.")

    def __str__(self) -> str:
        rows = [("part", "parameters", "trained", "gradients", "optimizer", "kept for backward")]
        rows += [(name, *_columns(part)) for name, part in _folded(self.parts)]
        rows.append(("in all", *_columns(self)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) if i else cell.ljust(width)
                           for i, (cell, width) in enumerate(zip(row, widths))) for row in rows]
        return "\n".join([*lines, self.summary(), *(f"note: {note}" for note in self.notes)])


def _columns(part: Union[Part, Estimate]) -> Tuple[str, ...]:
    return (size(part.parameters + part.buffers), f"{part.trained:,}", size(part.gradients), size(part.optimizer),
            size(part.kept))


def _folded(parts: List[Part]) -> Iterator[Tuple[str, Part]]:
    """Consecutive parts that differ in one number of their names only as one line: its name, and one of them."""
    runs: List[List[Part]] = []
    for part in parts:
        if runs and re.sub(r"\d+", "#", part.name) == re.sub(r"\d+", "#", runs[-1][0].name) \
                and replace(part, name="") == replace(runs[-1][0], name=""):
            runs[-1].append(part)
        else:
            runs.append([part])
    for run in runs:
        last = re.findall(r"\d+", run[-1].name)
        yield (f"{run[0].name} to {last[-1]}, each" if len(run) > 1 else run[0].name), run[0]


def size(number: int) -> str:
    """Bytes for people."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 2**power:
            return f"{number / 2**power:,.{2 if power == 30 else 1}f} {unit}"
    return f"{number} B"


# ---- the estimate ----------------------------------------------------------------------------------------

def estimate(model: nn.Module, config: S2FTConfig, batch: Optional[int] = None, length: Optional[int] = None, *,
             optimizer: Optimizer = "adamw", gradient_checkpointing: Union[bool, str] = False,
             autocast: Optional[torch.dtype] = None, dtype: Optional[torch.dtype] = None,
             device: Union[str, torch.device, None] = None, logits: Optional[int] = None, accumulation: int = 1,
             use_cache: Optional[bool] = None, example: Any = None, loss: Optional[Callable[[nn.Module, Any], Tensor]] = None,
             couplings: Optional[Sequence[Coupling]] = None) -> Estimate:
    """How many bytes training `model` with `config` will take, layer by layer, before anything is attached or loaded.

    Args:
        model: as for :func:`attach`, without adapters; on the meta device, or with weights, of which nothing is
            read, copied or changed. Hooks on it and checkpointing that is switched on are taken along.
        config: what to train. Units of all selections are counted as if chosen at random, the same number in every
            layer: metrics need data, and sizes depend on the number alone.
        batch: sequences, images or recordings of one forward on one device.
        length: tokens of each, for a model that takes token ids (of encoder-decoders on both sides).
        optimizer: a key of OPTIMIZERS, or a class or function that makes a torch optimizer of a list of parameters.
        gradient_checkpointing: True or "non-reentrant", or "reentrant".
        autocast: the dtype of torch.autocast around the forward.
        dtype: of the weights, where they will be loaded in another one than `model` has now.
        device: "cpu" or "cuda". Default: where a model with weights is, else a GPU where there is one.
        logits: at how many positions of each row, where not at all: the model's logits_to_keep.
        accumulation: forwards to a step; with more than one the gradients lie beside the next forward.
        use_cache: whether keys and values go through a cache, as the model's config has it by default in a plain loop;
            transformers' Trainer and the command line train without.
        example: a tensor, a tuple of arguments or a dict of them that the model is run on, labels too, instead of
            inputs made from its config by batch and length.
        loss: of (model, inputs), what to differentiate. Default: the model's own loss where it gives one, with
            labels made for inputs that are; else all its outputs.
        couplings: as for :func:`attach`.
    Returns: an :class:`Estimate`.
    Raises: ValueError or TypeError naming the argument; ValueError where the model's course depends on its weights,
        or what :func:`attach` would refuse.
    """
    _check(config, batch, length, example, accumulation, logits, loss)
    if use_cache not in (None, True, False):
        raise TypeError(f"use_cache must be True, False or None, got {use_cache!r}")
    device, kernels, notes = _place(model, device)
    twin, trained = _twin(model, config, dtype, couplings)
    if gradient_checkpointing:
        _checkpoint(twin, gradient_checkpointing)
    _forget_data(twin, kernels)
    with torch.random.fork_rng([kernels] if kernels.type == "cuda" else []):
        inputs, made = (example, False) if example is not None else (_inputs(twin, batch, length, logits, kernels), True)
        inputs = _with_cache(twin, inputs, use_cache)
        step = _Step(twin.train(), trained, inputs, loss, kernels, autocast, made)
        step.run(_maker(optimizer, kernels), accumulation)
    if config.selection != "random":
        notes += (f"selection={config.selection!r} is counted as random, {config.allocation} allocation as uniform",)
    resident = _resident(model, device) if dtype is None else 0
    return Estimate(step.parts(), *_shape_of(inputs), str(device), *step.peak(), resident, free_memory(device), notes + step.notes)


def _check(config: Any, batch: Any, length: Any, example: Any, accumulation: Any, logits: Any, loss: Any) -> None:
    if not isinstance(config, S2FTConfig):
        raise TypeError(f"config must be an S2FTConfig, got {type(config).__name__}")
    for name, value, needed in (("batch", batch, example is None), ("length", length, False), ("logits", logits, False),
                                ("accumulation", accumulation, True)):
        if value is None and not needed:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if example is not None:
        given = [name for name, value in (("batch", batch), ("length", length), ("logits", logits)) if value is not None]
        if given:
            raise ValueError(f"example says what the model is run on: leave out {', '.join(given)}")
        if not isinstance(example, (Tensor, tuple, list, dict)):
            raise TypeError(f"example must be a tensor, a tuple or a dict, got {type(example).__name__}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of (model, inputs), got {type(loss).__name__}")


def _place(model: nn.Module, device: Any) -> Tuple[torch.device, torch.device, Tuple[str, ...]]:
    """The device to train on, the one whose kernels are asked, and a note where they are not the same."""
    here = {tensor.device for tensor in model.parameters()} - {torch.device("meta")}
    gpu = torch.cuda.is_available()
    if device is None:
        device = next(iter(here)) if len(here) == 1 else "cuda" if gpu else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    if device.type == "cuda" and not gpu:
        return device, torch.device("cpu"), ("no GPU is here to ask which kernels it takes, so the CPU's are counted",)
    return device, device, ()


def _resident(model: nn.Module, device: torch.device) -> int:
    return _bytes_of(tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.device.type == device.type)


def _shape_of(inputs: Any) -> Tuple[int, Optional[int]]:
    """Batch, and length where there are tokens."""
    named = inputs if isinstance(inputs, dict) else dict(enumerate(inputs if isinstance(inputs, (tuple, list)) else [inputs]))
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.dim()}
    if not tensors:
        raise ValueError("example has no tensor with a batch dimension")
    of_tokens = [value for value in tensors.values() if value.dim() == 2 and not value.is_floating_point()]
    return len(next(iter(tensors.values()))), of_tokens[0].shape[1] if of_tokens else None


# ---- a model without data --------------------------------------------------------------------------------

def _twin(model: nn.Module, config: S2FTConfig, dtype: Optional[torch.dtype],
          couplings: Optional[Sequence[Coupling]]) -> Tuple[nn.Module, Attachment]:
    """A copy on the meta device with trainable layers in place. Quantized weights are not copied but shared."""
    if RECORD in model.__dict__:
        raise ValueError(f"{type(model).__name__} has an S²FT adapter already: detach or merge it first")
    wanted = _wanted_dtypes(model, dtype)
    memo: Dict[int, Any] = {}
    for module in model.modules():
        quantized = is_quantized(module)
        for name, tensor in _tensors_of(module):
            if id(tensor) not in memo:
                keep = quantized and name == "weight"
                memo[id(tensor)] = _shared(tensor) if keep else _hollow(tensor, wanted.get(id(tensor), tensor.dtype))
        if quantized:
            memo.update({id(scales): scales for scales in _scales(module)})
    twin = copy.deepcopy(model, memo)
    found = couplings_of(twin, couplings)
    record = Attachment(found, {"layers": {}}, {}, given=couplings is not None)   # of no base: nothing is compared
    plain = config if config.units is not None else replace(config, selection="random", order="largest",
                                                           allocation="uniform")
    mount(twin, record, config, select_units(found, plain, twin), "estimate")
    return twin, record


def _tensors_of(module: nn.Module) -> List[Tuple[str, Tensor]]:
    """A module's own parameters, buffers, and tensors that are neither."""
    everything = (*module._parameters.items(), *module._buffers.items(), *vars(module).items())
    return [(name, tensor) for name, tensor in everything if isinstance(tensor, Tensor)]


def _scales(module: nn.Module) -> List[Any]:
    """What a layer of bitsandbytes knows about its weight beside it."""
    return [value for value in (getattr(module.weight, "quant_state", None), getattr(module, "quant_state", None))
            if value is not None]


def _hollow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape on the meta device."""
    if is_traceable_wrapper_subclass(tensor) or type(tensor.data) is not Tensor:
        raise ValueError(f"weights of type {type(tensor.data).__name__} can't be counted: give the model as it is before "
                         "it is sharded or wrapped")
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="meta")
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _shared(weight: Tensor) -> Tensor:
    """A parameter of its own on the data of a quantized one."""
    made = nn.Parameter(weight.detach(), requires_grad=False)
    made.__dict__.update(vars(weight))
    return made


def _wanted_dtypes(model: nn.Module, dtype: Optional[torch.dtype]) -> Dict[int, torch.dtype]:
    """By tensor, of the floating-point weights that loading in `dtype` would cast; some stay in float32."""
    if dtype is None:
        return {}
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    wanted = {}
    for name, tensor in model.state_dict(keep_vars=True).items():   # buffers that aren't saved are not loaded either
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            kept = next((there for pattern, there in plan.items() if re.search(rf"(^|\.){pattern}(\.|$)", name)), dtype)
            wanted[id(tensor)] = kept
    return wanted


def _forget_data(twin: nn.Module, device: torch.device) -> None:
    """Put fake tensors of `device` in the place of all tensors."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: Dict[int, Tuple[Tensor, Tensor]] = {}   # with the old one, so that its id stays taken

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = (_fake(tensor, mode, device), tensor)
        return made[id(tensor)][0]

    for module in twin.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)})


def _fake(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    if is_traceable_wrapper_subclass(tensor.data):
        made = mode.from_tensor(tensor.data)
    else:
        with mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        made.__dict__.update({name: _fake(value, mode, device) if isinstance(value, Tensor) else value
                              for name, value in vars(tensor).items()})
    return made


def _checkpoint(twin: nn.Module, kind: Any) -> None:
    if kind not in (True, "reentrant", "non-reentrant"):
        raise ValueError(f"gradient_checkpointing must be True, False, 'reentrant' or 'non-reentrant', got {kind!r}")
    if not getattr(twin, "supports_gradient_checkpointing", False):
        raise ValueError(f"gradient_checkpointing: {type(twin).__name__} does not support it")
    name = "activation" if hasattr(twin, "activation_checkpointing_enable") else "gradient"   # transformers 5.2x
    options = {"use_reentrant": kind == "reentrant", "preserve_rng_state": False}
    getattr(twin, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": options})


# ---- inputs ----------------------------------------------------------------------------------------------

def _inputs(twin: nn.Module, batch: int, length: Optional[int], logits: Optional[int],
            device: torch.device) -> Dict[str, Any]:
    """Inputs by the model's config, with labels where it takes some that can be made."""
    inputs = example_of(twin, batch, length or 1, device)
    if inputs is None:
        raise ValueError(f"{type(twin).__name__} is no model of transformers whose inputs s2ft can make: pass example=")
    tokens = [value for name, value in inputs.items() if name.endswith("input_ids")]
    if tokens and length is None:
        raise ValueError("length must be given for a model that takes tokens, got None")
    takes = inspect.signature(twin.forward).parameters
    if logits is not None and ("logits_to_keep" not in takes or logits > (length or 0)):
        why = f"rows have {length} tokens" if "logits_to_keep" in takes else f"{type(twin).__name__} gives all it has"
        raise ValueError(f"logits={logits} asks for so many positions of a row, but {why}")
    if "labels" in takes and "decoder_input_ids" in inputs:
        inputs["labels"] = inputs.pop("decoder_input_ids")   # made from them again
    elif "labels" in takes and tokens and twin.get_output_embeddings() is not None:
        inputs["labels"] = tokens[0] if logits is None else tokens[0][:, -logits:]
    elif "return_loss" in takes:
        inputs["return_loss"] = True
    if logits is not None:
        inputs["logits_to_keep"] = logits
    return inputs


def _with_cache(twin: nn.Module, inputs: Any, use_cache: Optional[bool]) -> Any:
    """Tell the model, where it is said and has one."""
    if use_cache is None or not isinstance(inputs, dict) or "use_cache" not in inspect.signature(twin.forward).parameters:
        return inputs
    return {**inputs, "use_cache": use_cache}


def _call(twin: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return twin(**inputs)
    return twin(*inputs) if isinstance(inputs, (tuple, list)) else twin(inputs)


def _can_be_labelled(twin: nn.Module, inputs: Dict[str, Any]) -> bool:
    """Whether labels are taken and not there yet."""
    return "labels" in inspect.signature(twin.forward).parameters and not any(name in inputs for name in LOSSES)


def _labelled(inputs: Dict[str, Any], output: Any) -> Dict[str, Any]:
    """The inputs with labels of the shape that the logits ask for, where it is that of a class for all or for each token."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() not in (2, 3):
        return inputs
    dtype = logits.dtype if logits.shape[-1] == 1 else torch.int64   # one value is regression
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    return {**inputs, "labels": torch.zeros(logits.shape[:-1], dtype=dtype, device=device)}


# ---- one step --------------------------------------------------------------------------------------------

class _Step:
    """One step of training a model without data, and what is counted in it."""

    def __init__(self, twin: nn.Module, record: Attachment, inputs: Any, loss: Optional[Callable], device: torch.device,
                 autocast: Optional[torch.dtype], made: bool) -> None:
        self.twin, self.inputs, self.loss = twin, inputs, loss
        self.autocast = _autocast(device, autocast)
        self.trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        self.part_of = _part_names(twin)
        self.within: List[str] = []       # parts whose forward runs, the innermost last
        self.kept: Counter = Counter()    # by part
        self.optimizer: Dict[Tensor, int] = {}
        self.notes: Tuple[str, ...] = ()
        self.memory = _Memory(twin, device)
        for name, module in twin.named_modules():
            module.register_forward_pre_hook(partial(self._enter, self.part_of[name]))
            module.register_forward_hook(self._leave, always_call=True)
        for path in {p.consumer.path.rpartition(".")[0] for p in record.couplings if p.consumer.expert is not None}:
            twin.get_submodule(path).register_forward_pre_hook(partial(_deal_tokens, device), with_kwargs=True)
        if made and loss is None and _can_be_labelled(twin, inputs):
            self.inputs = _labelled(inputs, self._guarded(self._look))

    def _enter(self, part: str, module: nn.Module, inputs: tuple) -> None:
        self.within.append(part)

    def _leave(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        self.within.pop()

    def _look(self) -> Any:
        with torch.no_grad(), self.autocast():
            return _call(self.twin, self.inputs)

    def run(self, make: Callable[[List[Tensor]], torch.optim.Optimizer], accumulation: int) -> None:
        with self.memory:
            for number in range(min(accumulation, 2)):
                self.memory.phase = "forward"
                outputs = self._guarded(partial(self._forward, first=number == 0))
                self.memory.phase = "backward"
                self._guarded(partial(_backward, outputs))
                del outputs
            self.memory.phase = "optimizer"
            self._guarded(partial(self._update, make))

    def _forward(self, first: bool) -> List[Tensor]:
        saved = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)
        with saved if first else nullcontext(), self.autocast():
            if self.loss is not None:
                return self._differentiable(self.loss(self.twin, self.inputs))
            output = _call(self.twin, self.inputs)
            loss = output.get("loss") if isinstance(output, dict) else None
            return self._differentiable(output if loss is None else loss)

    def _differentiable(self, output: Any) -> List[Tensor]:
        found = [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not found:
            raise ValueError(f"nothing that {type(self.twin).__name__} gives depends on what is trained")
        return found

    def _save(self, tensor: Tensor) -> Tensor:
        for storage in _storages(tensor):
            if self.memory.is_new(storage, "saved"):
                self.kept[self.within[-1] if self.within else OUTSIDE] += storage.nbytes()
        return tensor

    def _update(self, make: Callable[[List[Tensor]], torch.optim.Optimizer]) -> None:
        optimizer = make(list(self.trained.values()))
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {type(optimizer).__name__}")
        with self.memory.scalars_are(1.0):   # a step's course may depend on a norm; what it holds does not
            optimizer.step()
        seen: Set[int] = set()
        for parameter, state in optimizer.state.items():
            self.optimizer[parameter] = _bytes_of((leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)), seen)

    def _guarded(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(f"{type(self.twin).__name__} can't be counted without its weights: what it does in "
                             f"{self.within[-1] if self.within else self.memory.phase} depends on what it computes "
                             f"({error})") from error

    def peak(self) -> Tuple[int, str]:
        """Bytes and where. The optimizer's state is there in every step but the first."""
        most = {phase: own + (sum(self.optimizer.values()) if phase != "optimizer" else 0)
                for phase, own in self.memory.peaks.items()}
        phase = max(most, key=most.get)
        return _bytes_of([*self.twin.parameters(), *self.twin.buffers()]) + most[phase], phase

    def parts(self) -> List[Part]:
        """In the order of the model."""
        sums: Dict[str, Counter] = {name: Counter() for name in dict.fromkeys(self.part_of.values())}
        seen: Set[int] = set()
        for kind, tensors in (("parameters", self.twin.named_parameters()), ("buffers", self.twin.named_buffers())):
            for name, tensor in tensors:
                sums[self.part_of[name.rpartition(".")[0]]][kind] += _bytes_of([tensor], seen)
        for name, parameter in self.trained.items():
            counted = sums[self.part_of[name.rpartition(".")[0]]]
            counted["trained"] += parameter.numel()
            counted["gradients"] += 0 if parameter.grad is None else _bytes_of([parameter.grad])
            counted["optimizer"] += self.optimizer.get(parameter, 0)
        for name, kept in self.kept.items():
            sums[name]["kept"] += kept
        columns = ("parameters", "buffers", "trained", "gradients", "optimizer", "kept")
        outside = sums.pop(OUTSIDE)
        parts = [Part(name, *(counted[column] for column in columns)) for name, counted in (*sums.items(), (OUTSIDE, outside))]
        return [part for part in parts if any(getattr(part, column) for column in columns)]


def _plain(output: Any) -> Any:
    """A model's output as what pytrees know."""
    return dict(output) if isinstance(output, dict) else output


def _backward(outputs: List[Tensor]) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def _autocast(device: torch.device, dtype: Optional[torch.dtype]) -> Callable:
    if dtype is None:
        return nullcontext
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be torch.bfloat16 or torch.float16, got {dtype!r}")
    return partial(torch.autocast, device.type, dtype)


def _deal_tokens(device: torch.device, experts: nn.Module, inputs: tuple, named: Dict[str, Any]) -> Tuple[tuple, Dict]:
    """Give every expert as many tokens: what a router chooses depends on weights, what is kept on the sum only."""
    def dealt(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_floating_point():
            return value
        return torch.arange(value.numel(), device=device).reshape(value.shape) % experts.num_experts
    return tuple(map(dealt, inputs)), {name: dealt(value) for name, value in named.items()}


def _part_names(model: nn.Module) -> Dict[str, str]:
    """By module, the part it belongs to: a layer, that is up to the first number in its name; what lies beside
    layers by the first of its names that no layer has; OUTSIDE for the model itself."""
    paths = [name for name, _ in model.named_modules(remove_duplicate=False)]
    layers = {path: found[0] for path in paths if (found := re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", path))}
    around = {parent for layer in set(layers.values()) for parent in _above(layer)} | {""}

    def part(path: str) -> str:
        if path in layers:
            return layers[path]
        return next((one for one in reversed([path, *_above(path)]) if one not in around), path) or OUTSIDE
    return {path: part(path) for path in paths}


def _above(path: str) -> List[str]:
    """Of a.b.c: a.b, a and the model itself, ""."""
    names = path.split(".")
    return [".".join(names[:i]) for i in range(len(names) - 1, -1, -1)]


# ---- memory ----------------------------------------------------------------------------------------------

class _Memory(TorchDispatchMode):
    """How many bytes of storages on the device are alive, the model's own left out, and the most in each phase."""

    def __init__(self, twin: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.device, self.phase, self.alive, self.peaks = device, "", 0, Counter()
        self._seen: Dict[str, Set[int]] = {"alive": set(), "saved": set()}
        own = [storage for tensor in [*twin.parameters(), *twin.buffers()] for storage in _storages(tensor)]
        self._own = {storage._cdata for storage in own}
        self._scalar: Optional[float] = None

    def is_new(self, storage: torch.UntypedStorage, how: str) -> bool:
        """Whether it is neither the model's nor seen before, as long as it lives."""
        key, seen = storage._cdata, self._seen[how]
        if key in self._own or key in seen:
            return False
        seen.add(key)
        weakref.finalize(storage, seen.discard, key)
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self._scalar is not None and function is torch.ops.aten._local_scalar_dense.default and not _is_real(args[0]):
            return self._scalar
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device.type:
                for storage in _storages(leaf):
                    self._watch(storage)
        return output

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if self.is_new(storage, "alive"):
            self.alive += storage.nbytes()
            self.peaks[self.phase] = max(self.peaks[self.phase], self.alive)
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, number: int) -> None:
        self.alive -= number

    @contextmanager
    def scalars_are(self, value: float) -> Iterator[None]:
        """What is asked for as a number has this value inside."""
        self._scalar = value
        try:
            yield
        finally:
            self._scalar = None


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) is Tensor


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """One, or those of a wrapper's inner tensors."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


def _bytes_of(tensors, seen: Optional[Set[int]] = None) -> int:
    """Of their storages, each once, without those already seen."""
    seen, total = set() if seen is None else seen, 0
    for tensor in tensors:
        for storage in _storages(tensor):
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
    return total


def free_memory(device: torch.device) -> Optional[int]:
    """Bytes that are free on a GPU, or available on the host, within its control group; None where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    sources = (_available_on_host(), _left_in_group())
    return min((number for number in sources if number is not None), default=None)


def _available_on_host() -> Optional[int]:
    try:
        with open("/proc/meminfo") as file:
            found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    except OSError:
        return None


def _left_in_group() -> Optional[int]:
    """Of version 2; files that were read count as used there and are given back when needed."""
    try:
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as current, \
                open("/sys/fs/cgroup/memory.stat") as stat:
            cached = re.search(r"^inactive_file (\d+)$", stat.read(), re.MULTILINE)
            return int(most.read()) - int(current.read()) + (int(cached[1]) if cached else 0)
    except (OSError, ValueError):   # no group, or "max"
        return None


# ---- optimizers ------------------------------------------------------------------------------------------

def _bitsandbytes(name: str, parameters: List[Tensor]) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(f"optimizer {name} needs the package bitsandbytes, which is not installed") from None
    return getattr(bitsandbytes.optim, name)(parameters)


OPTIMIZERS: Dict[str, Callable[[List[Tensor]], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "adafactor": torch.optim.Adafactor,
    "sgd": partial(torch.optim.SGD, lr=1e-3),
    "sgd-momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adamw-8bit": partial(_bitsandbytes, "AdamW8bit"),
    "paged-adamw-8bit": partial(_bitsandbytes, "PagedAdamW8bit"),
}


def _maker(optimizer: Optimizer, device: torch.device) -> Callable[[List[Tensor]], torch.optim.Optimizer]:
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, or a class or function that makes one, "
                             f"got {optimizer!r}")
        make = OPTIMIZERS[optimizer]
        # on a GPU PyTorch takes all parameters of plain types at once, which fake ones aren't
        takes_all = device.type == "cuda" and "8bit" not in optimizer
        return partial(make, foreach=True) if takes_all else make
    if not callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError("optimizer must be a name, or a class or function that makes a torch.optim.Optimizer of a list "
                        f"of parameters, got {type(optimizer).__name__}")
    return optimizer
