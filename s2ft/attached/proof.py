"""Proves on the model at hand that an attached model computes what its base does, and what merging would write.

Couplings may be declared by a family, described by a user or found on a twin. Whichever it is, the model itself runs on
a tiny example before and after the trainable layers are mounted. The outputs must be the same. Then the slices get
random values: the outputs must be those of the model with base + slice in its weights, and each slice gets a gradient.
In evaluation mode the model runs without a hook of ours on its modules, because some code asks for hooks.

In training mode hooks compare what each consumer and each replaced forward returns, and pass on what the base returned
there. So rounding errors of one block do not reach the next, and the first block that differs is known.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from s2ft.attached.record import Attachment, Mount
from s2ft.distributed import decide, is_sharded, reshard_all
from s2ft.model.coupling import Coupling
from s2ft.model.discovery.examples import example_of, examples_of, run_example
from s2ft.model.gathering import gathered_forwards
from s2ft.model.modes import Rest, seeded
from s2ft.model.outputs import changes, largest_change, tensors_in
from s2ft.model.towers import tower_of
from s2ft.model.weights import allow_packing, can_run, layers_that_pack, stop_packing

# By how much rounding may change an entry, see `changes`: behind one block, and behind the whole model. None stands for
# all dtypes of less precision.
OF_BLOCK = {torch.float64: 1e-9, torch.float32: 5e-4, None: 0.05}
OF_MODEL = {torch.float64: 1e-8, torch.float32: 2e-3, None: 0.3}
MEDIAN_IN_HALF = 0.1  # where rounding may send a token to other experts, half of the entries must agree
NEED_EXAMPLE = (
    "verify runs the model and needs an input for it: pass example= (a tensor, a tuple of arguments or a dict of "
    "them), or verify=False"
)
TRY_INSTEAD = "layout='indexed' moves no unit, couplings= describes the model, and verify=False skips this proof"
Outputs = dict[str, list[Tensor]]


class Proof:
    """What the base computes on a tiny example, to compare it with the attached model."""

    def __init__(
        self, model: nn.Module, record: Attachment, couplings: list[Coupling], verify: bool | None, example: Any
    ) -> None:
        """Prepare the proof; nothing runs yet.

        Args:
            model: The model.
            record: Its record. It keeps what a run changes in the model until that is restored.
            couplings: The couplings that will be trained.
            verify: True if there must be a proof, None if it is made where it can be.
            example: Tensor, tuple of arguments or dict of them; default: made from the model's config.
        """
        if not (example is None or isinstance(example, (Tensor, tuple, list, dict))):
            raise TypeError(f"example must be a tensor, a tuple or a dict, got {type(example).__name__}")
        self.model, self.record, self.couplings, self.given = model, record, couplings, example
        self.demanded = verify is True or example is not None
        self.places = {_consumer_of(coupling): coupling for coupling in reversed(couplings)}
        self.blocks = {c.block: c for c in couplings if c.activation is not None and c.block is not None}
        self.notes: list[str] = []
        self.without_dropout: Callable[[], AbstractContextManager] = nullcontext
        self.evaluated: list[Tensor] = []
        self.forced: dict[bool, Outputs] = {}  # by training mode: what the base returns at each place
        self.trained: list[Tensor] | None = None  # outputs in training mode; None if they are random

    # ---- the base ------------------------------------------------------------------------------------

    def run_base(self) -> bool:
        """Run the model before it changes.

        Returns:
            Whether it runs on an example.
        """
        failed = []
        packing = layers_that_pack(self.model)
        stop_packing(self.model, packing)
        try:
            for example in _examples(self.model, self.couplings) if self.given is None else [self.given]:
                failure = self._run_base_on(example)
                if not failure:
                    return True
                failed.append(failure)
        finally:
            allow_packing(self.model, packing)
        if self.demanded:
            tried = f" ({failed[0]})" if failed else ""
            raise ValueError(f"{NEED_EXAMPLE}{tried}" if self.given is None else failed[0])
        why = f"runs on no input that s2ft makes ({failed[0]})" if failed else "has no config to make an input from"
        self.notes.append(f"nothing was proved: {type(self.model).__name__} {why}. Pass example=")
        return False

    def _run_base_on(self, example: Any) -> str:
        """Run the model on an example. Returns why the example is no good if it is not."""
        self.example = example
        try:
            self.evaluated = self._run(False)
        except Exception as error:  # models refuse inputs in many ways
            if self.given is not None:
                raise
            return f"{type(error).__name__}: {str(error)[:200]}"
        if not any(bool(tensor.isfinite().any()) for tensor in self.evaluated):
            return "example must give finite numbers, got NaN or infinity at the output"
        self._run_base_in_training()
        return ""

    def _run_base_in_training(self) -> None:
        """Run the base in training mode, without dropout if there is any, because it drops other units afterwards."""
        try:
            for self.without_dropout in (nullcontext, _WithoutDropout):
                self.forced = {True: {}}
                found = self._run(True, self.forced[True])
                if _equal(found, self.evaluated):
                    self.trained = found
                    return
            if _equal(found, self._run(True)):
                self.trained = found
            else:
                self.notes.append("training mode was not proved, because the model's outputs are random there")
        except Exception as error:
            self.notes.append(f"training mode was not proved: {type(error).__name__}: {str(error)[:200]}")
        if self.trained is None:
            self.forced = {}
        self.forced[False] = {}
        self._run(False, self.forced[False])

    # ---- the attached model --------------------------------------------------------------------------

    def check(self) -> None:
        """Compare the attached model with its base, and with what merging would write.

        Raises:
            ValueError: They differ. The message names the first block and weight.
        """
        if self.record.awaits_weights:
            self.notes = ["nothing was proved, because the weights have yet to be loaded"]
            return
        whole = not any(map(is_sharded, self.model.parameters()))
        if whole:
            for training, base in self.forced.items():
                self._check_blocks(training, base)
        self._check_model("evaluation mode", self._run(False), self.evaluated)
        if whole:
            self._check_merged()

    def _check_blocks(self, training: bool, base: Outputs) -> None:
        first: list[str] = []
        seen: Outputs = {}
        found = self._run(training, seen, base, first)
        missing = [path for path, tensors in base.items() if len(tensors) != len(seen[path])]
        what = first[0] if first else f"{missing[0]} runs another number of times" if missing else ""
        if not what and training and self.trained is not None and self._differs(found, self.trained, OF_MODEL):
            what = "an output of the model changes in training mode"
        if not what:
            return
        if training and not _equal(self._run(True), self._run(True, seed=1)):
            self.notes.append("training mode was not proved, because the model's outputs are random there")
            return
        raise ValueError(f"attach would change what the model computes: {what}. {TRY_INSTEAD}")

    def _check_model(self, mode: str, now: list[Tensor], then: list[Tensor]) -> None:
        if self._differs(now, then, OF_MODEL):
            change = largest_change(now, then)
            raise ValueError(
                f"attach would change what the model computes: in {mode} an output changes by {change:.2g} of its "
                f"size. {TRY_INSTEAD}"
            )

    # ---- random slices -------------------------------------------------------------------------------

    def _check_merged(self) -> None:
        mounts = self.record.mounts
        mergeable = {path: mount for path, mount in mounts.items() if not mount.layer.kind.read_only}
        try:
            for number, mount in enumerate(mounts.values()):
                _fill(mount, number)
            evaluated, (trained, reached) = self._run(False), self._run_backward()
            for mount in mergeable.values():
                mount.layer.fuse()
            merged = self._run(False)
            pairs = [(False, evaluated, merged)]
            if self.trained is not None:
                same = _equal(self.trained, self.evaluated)
                pairs.append((True, trained, merged if same else self._run(True)))
            wrong = [pair for pair in pairs if self._differs(*pair[1:], OF_BLOCK)]
            if wrong:
                self._raise_not_merged(mergeable, *wrong[-1])
        finally:
            for mount in mounts.values():
                mount.layer.unfuse()
                mount.layer.s2.detach().zero_()
        self._check_reached(reached)

    def _raise_not_merged(
        self, mounts: dict[str, Mount], training: bool, attached: list[Tensor], merged: list[Tensor]
    ) -> None:
        """Find the first layer whose merging alone changes the outputs, and name it."""
        paths = list(mounts)
        low, high = 0, len(paths)  # with the first `low` layers merged nothing changes, with the first `high` it does
        while high - low > 1:
            middle = (low + high) // 2
            for number, path in enumerate(paths):
                layer = mounts[path].layer
                layer.fuse() if number < middle else layer.unfuse()
            changed = self._differs(self._run(training), attached, OF_BLOCK)
            low, high = (low, middle) if changed else (middle, high)
        mode = "training" if training else "evaluation"
        way_out = "Train other layers" + (
            "" if training else ", or use effective='step', which writes into the weights"
        )
        raise ValueError(
            f"the model would be trained as one function and merged as another: in {mode} mode it computes with the "
            f"weight of {paths[high - 1]} without running that layer, so that a slice has no effect there (merged, an "
            f"output changes by {largest_change(merged, attached):.2g} of its size). Some code reads the weight "
            f"itself, such as a fast path of torch.nn, a helper or a penalty. {way_out}"
        )

    def _run_backward(self) -> tuple[list[Tensor], set[str]]:
        """Run in training mode, if it can be, with gradients: the outputs, and the paths of the slices that get one."""
        slices = {path: mount.layer.s2 for path, mount in self.record.mounts.items()}
        own = {id(s2) for s2 in slices.values()}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        for parameter in others:
            parameter.requires_grad_(False)
        training = self.trained is not None
        try:
            found = self._run(training, backward=True)
            return found, {path for path, s2 in slices.items() if s2.grad is not None}
        except Exception as error:
            if self.demanded:
                raise
            self.notes.append(f"no gradient was proved: {type(error).__name__}: {str(error)[:200]}")
            return self._run(training), set(slices)
        finally:
            for parameter in others:
                parameter.requires_grad_(True)
            for s2 in slices.values():
                s2.grad = None

    def _check_reached(self, reached: set[str]) -> None:
        """Name the layers that get no gradient, apart from experts, which may get no token."""
        missed = [p for p, m in self.record.mounts.items() if p not in reached and not _is_expert(p, m)]
        if not missed:
            return
        which = f"{missed[0]}{f' and {len(missed) - 1} more' if len(missed) > 1 else ''}"
        if self.demanded:
            raise ValueError(
                f"example must reach every coupling, and this one does not reach {which}: no gradient arrives there. "
                "Pass another as example=, or verify=False"
            )
        self.notes.append(f"not proved, because the example does not reach it: {which}. Pass another as example=")

    # ---- runs ----------------------------------------------------------------------------------------

    def _run(
        self,
        training: bool,
        record: Outputs | None = None,
        base: Outputs | None = None,
        first: list[str] | None = None,
        backward: bool = False,
        seed: int = 0,
    ) -> list[Tensor]:
        """Run the model and return its outputs. Afterwards it is as before.

        Args:
            training: Whether it runs in training mode.
            record: Dict that gets the outputs at each place. Without it no module has a hook.
            base: What the base returned there. It is compared and passed on.
            first: List that gets a sentence on the first place that differs.
            backward: Whether to run the backward of a random loss.
            seed: Seed of all random numbers.
        """
        model, mounts = self.model, self.record.mounts.values()
        compiler = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        self.record.rest = Rest(model, {mount.layer for mount in mounts})
        try:
            with ExitStack() as stack:
                for path in () if record is None else (*self.places, *self.blocks):
                    record[path] = []
                    hook = partial(self._at_place, path, record[path], None if base is None else base[path], first)
                    stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
                for context in (compiler, seeded(model, seed), torch.inference_mode(False), gathered_forwards(model)):
                    stack.enter_context(context)
                stack.enter_context(torch.set_grad_enabled(backward))
                if training:
                    stack.enter_context(self.without_dropout())
                model.train(training)
                output = list(tensors_in(run_example(model, self.example)))
                if backward:
                    _run_backward_of(output)
        finally:
            self.record.rest.restore()
            self.record.rest = None
            reshard_all(model)  # so that units move on the shards, not on gathered weights
        return [tensor.detach() for tensor in output]

    def _at_place(
        self, path: str, record: list[Tensor], base: list[Tensor] | None, first: list[str] | None, *call: Any
    ) -> Tensor | None:
        """Forward hook: record the output, or compare it with the base's and pass that on."""
        output = call[-1]
        mine = next(tensors_in(output), None)
        if mine is None:
            return None
        record.append(mine.detach())
        if base is None or len(record) > len(base):
            return None
        then = base[len(record) - 1]
        change = float(changes(mine, then).max())
        if first is not None and not first and not change <= self._allowed(then, OF_BLOCK):
            coupling = self.places.get(path) or self.blocks[path]
            first.append(
                f"the output of {path} changes by {change:.2g} of its size, in {coupling}. Is a module, a norm or bias "
                "(vectors), or the unit wrong, or does the block compute more than s2ft knows?"
            )
        return then if isinstance(output, Tensor) else None

    # ---- tolerance -----------------------------------------------------------------------------------

    @cached_property
    def _halves(self) -> bool:
        """Whether something is computed in half precision. Layers with quantized weights may do so."""
        recorded = (tensor for places in self.forced.values() for found in places.values() for tensor in found)
        dtypes = {tensor.dtype for tensor in (*self.model.parameters(), *self.evaluated, *recorded)}
        return not all(dtype.is_complex or dtype in OF_BLOCK for dtype in dtypes)

    def _allowed(self, tensor: Tensor, table: dict[torch.dtype | None, float]) -> float:
        least = torch.float32 if any(p.dtype == torch.float32 for p in self.model.parameters()) else tensor.dtype
        return table[None] if self._halves else table.get(least, table[torch.float32])

    def _differs(self, now: list[Tensor], then: list[Tensor], table: dict[torch.dtype | None, float]) -> bool:
        """Whether outputs of the model differ by more than rounding."""
        routes = self._halves and any("expert" in path for path, _ in self.model.named_modules())
        if len(now) != len(then):
            return True
        for pair in zip(now, then):
            found, allowed = changes(*pair), self._allowed(pair[1], table)
            off = found.median() > MEDIAN_IN_HALF if routes and found.numel() > 1 else not found.max() <= allowed
            if off:
                return True
        return False


class _WithoutDropout(TorchFunctionMode):
    """Inside, dropout drops nothing. Other randomness stays."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if "dropout" in name and "native" not in name:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs |= {"dropout_p": 0.0} if len(args) < 5 else {}
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        if func is F.multi_head_attention_forward:
            kwargs["training"] = False  # nothing but its dropout asks for it
        return func(*args, **kwargs)


def _consumer_of(coupling: Coupling) -> str:
    """The module that runs a coupling's consumer: for experts that with their parameters."""
    path = coupling.main.path
    return path if coupling.expert is None else path.rpartition(".")[0]


def _examples(model: nn.Module, couplings: list[Coupling]) -> Iterator[Any]:
    """Inputs for the proof, the smallest that may reach the couplings first."""
    plain = example_of(model)
    if plain is not None:
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            plain["logits_to_keep"] = 1  # a large vocabulary would take as long as several blocks
        if {tower_of(model, coupling.main.path) for coupling in couplings} == {"language"}:
            yield {name: value for name, value in plain.items() if name != "pixel_values"} or plain
        yield plain
    yield from examples_of(model)


def _fill(mount: Mount, number: int) -> None:
    """Give a slice random values of about the size of usual weights."""
    s2, projection = mount.layer.s2.detach(), mount.parts[0].projection
    most = (projection.extent if projection.dim else s2[0].numel()) ** -0.5
    s2.uniform_(-most, most, generator=torch.Generator(s2.device).manual_seed(number))


def _is_expert(path: str, mount: Mount) -> bool:
    return "expert" in path or mount.parts[0].projection.expert is not None


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return largest_change(one, other) == 0


def _run_backward_of(output: list[Tensor]) -> None:
    """Run the backward of a random weighted sum of all outputs."""
    parts = [torch.view_as_real(one) if one.is_complex() else one for one in output if one.requires_grad]
    if parts:
        sum((one.masked_fill(~one.isfinite(), 0) * torch.randn_like(one)).sum().float() for one in parts).backward()


# ---- around a mount ----------------------------------------------------------------------------------------------


@contextmanager
def proved(
    model: nn.Module, record: Attachment, couplings: list[Coupling], verify: bool | None, example: Any
) -> Iterator[None]:
    """Prove what the body mounts. A rank whose model is on the meta device waits for those that can run it.

    Args:
        model: The model, with its base in the weights before and trainable layers of zeros after the body.
        record: Its record.
        couplings: The couplings that the body trains.
        verify: Whether there is a proof: True, False, or None for where an input can be made.
        example: Input of the model; default: made from its config.

    Raises:
        ValueError: The mounted model computes something else. Or there must be a proof, and there can be none.
    """
    if verify is False:
        yield
        return
    proof, able = Proof(model, record, couplings, verify, example), can_run(model)
    found = decide("what the base computes", able, proof.run_base).value
    if found is None:
        proof.notes.append("nothing was proved, because the weights are not here yet")
        if verify:
            raise ValueError("verify=True runs the model, and its weights are on the meta device: load them first")
    yield
    if found:
        decide("the proof of attach", able, proof.check)
    record.unproved = "; ".join(proof.notes)
