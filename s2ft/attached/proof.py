"""Proves on the model at hand that an attached model computes what merging would write, and that its slices train.

Couplings may be declared by a family, described by a user or found on a twin. Whichever it is, the model itself runs on
a tiny example, plain and attached, with the same random values added to the selected units: written into the weights of
the plain model, and in the slices of the attached one. Moved units, replaced forwards and weights that are read past
their layers all show in the outputs. Afterwards the weights are the base's and the slices are zeros.

The outputs in evaluation mode are compared without hooks of ours, because some models ask whether a module has hooks.
Elsewhere hooks compare what each consumer and each replaced forward returns, and pass on what the plain model returned.
So rounding errors of one block do not reach the next, and the first block that differs is known.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from itertools import count
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.overrides import TorchFunctionMode

from s2ft.attached.active import add_deltas, deactivate, set_mounted_deltas
from s2ft.attached.hooks import not_awaiting
from s2ft.attached.local_gradients import LocalGradients, first_difference
from s2ft.attached.mounting import mount, set_codecs, trained_couplings
from s2ft.attached.record import Record
from s2ft.config import S2FTConfig
from s2ft.distributed import Decision, decide, is_spread, reshard_after_run
from s2ft.model.coupling import Coupling, projections_of
from s2ft.model.discovery.examples import examples_of
from s2ft.model.parts import tower_of
from s2ft.model.running import (
    Snapshot,
    changes,
    check_example,
    example_of,
    gathered_forwards,
    largest_change,
    replaced,
    run_example,
    seeded,
    tensors_in,
)
from s2ft.model.weights import Delta, can_run, layers_that_repack, set_repacking, weight_at
from s2ft.selection import Selection

# By how much rounding may change an entry, see `changes`: behind one block, and behind the whole model. None stands for
# all dtypes of less precision.
OF_BLOCK = {torch.float64: 1e-9, torch.float32: 5e-4, None: 0.05}
OF_MODEL = {torch.float64: 1e-8, torch.float32: 2e-3, None: 0.3}
MEDIAN_IN_HALF = 0.1  # where rounding may send a token to other experts, half of the entries must agree
ROWS, LENGTH = 2, 4  # of tokens
NEED_EXAMPLE = (
    "verify runs the model and needs an input for it: pass example= (a tensor, a tuple of arguments or a dict of "
    "them), or verify=False"
)
TRY_INSTEAD = "layout='indexed' moves no unit, couplings= describes the model, and verify=False skips this proof"
Tolerance = dict[torch.dtype | None, float]
Outputs = dict[str, list[Tensor]]


def mount_proved(
    model: nn.Module,
    record: Record,
    config: S2FTConfig,
    selection: Selection,
    name: str,
    verify: bool | None,
    example: Any,
) -> None:
    """Run the plain model, mount trainable layers, and compare the model with the plain one.

    A rank whose model is on the meta device waits for those that can run it.

    Args:
        model: The model, with the base in its weights.
        record: Its record.
        config: The config of the new adapter.
        selection: Its units.
        name: Its name.
        verify: True if there must be a proof, None if it is made where an input can be made, False for none.
        example: Input of the model: tensor, tuple of arguments or dict of them; default: made from its config.

    Raises:
        TypeError: `example` is of another type.
        ValueError: Something can't be trained. Or the mounted model fails or computes something else. Or there must be
            a proof, and there can be none.
        RuntimeError: Another rank trains other units or has another base.
    """
    check_example(example)
    couplings, decision = trained_couplings(record.couplings, selection), Decision(None, "")
    moving = [one for one in couplings if one.movable and config.layout == "permuted"]
    proof, able = Proof(model, record, couplings, moving, verify or example is not None), can_run(model)
    # The value of the decision is None if no rank has the weights, False if the model runs on no input.
    if verify is None or verify:
        decision = decide(
            "what the base computes",
            able,
            lambda: proof.run_plain(
                example, {} if proof.is_spread else _random_deltas(model, couplings, config, selection)
            ),
        )
        if decision.value is None:
            proof.notes.append("nothing was proved, because the weights are not here yet")
            if verify:
                raise ValueError("verify=True runs the model, and its weights are on the meta device: load them first")
    mount(model, record, config, selection, name)
    if decision.value:
        # The nth call of one name is paired on all ranks. A rank that could not mount skips this call, so its name has
        # the number of the first call.
        decide(
            f"the proof of attach {decision.key.rpartition('/')[2]}".rstrip(), able, proof.check
        )  # ranks without weights wait
    record.unproved = "; ".join(proof.notes)
    set_codecs(model, record, config)


class Proof:
    """What a plain model computes on a tiny example, to compare it with the attached model."""

    def __init__(
        self, model: nn.Module, record: Record, couplings: list[Coupling], moving: list[Coupling], demanded: bool
    ) -> None:
        self.model, self.record, self.couplings, self.demanded = model, record, couplings, demanded
        self.moving = moving  # the couplings whose units move
        self.is_spread = any(map(is_spread, model.parameters()))
        blocks = {one.block: one for one in couplings if one.activation and one.block}
        self.places = {} if self.is_spread else {**blocks, **{one.place: one for one in reversed(couplings)}}
        self.notes: list[str] = []  # what was not proved
        self.deltas: dict[str, Delta] = {}
        self.evaluated: list[Tensor] = []  # outputs in evaluation mode
        self.trained: list[Tensor] | None = None  # outputs in training mode; None if they are random
        self.plain_outputs: dict[bool, Outputs] = {}  # what each place returns in training and in evaluation, if proved
        self.statistics: dict[str, Tensor] = {}  # the buffers that the run in training mode has changed
        self.gradients = LocalGradients([], True)  # what couplings pass back in training mode
        self.has_backward = not self.is_spread
        self.without_dropout: Callable[[], AbstractContextManager] = nullcontext

    # ---- the plain model -----------------------------------------------------------------------------

    def run_plain(self, given: Any, deltas: dict[str, Delta]) -> bool:
        """Run the plain model, with random values in its units, on the example given or on one that is made.

        Returns:
            Whether it runs on an example.

        Raises:
            ValueError: It does not, and there must be a proof.
        """
        failure = ""
        repacking = layers_that_repack(self.model)
        set_repacking(repacking, False)
        try:
            self.deltas = deltas
            for name, delta in deltas.items():
                add_deltas(self.model, self.record, self.record.projections[name], [(delta, 1.0)])
            for example in _examples(self.model, self.couplings) if given is None else [given]:
                try:
                    self._run_plain_on(example)
                    return True
                except Exception as error:  # models refuse inputs in many ways
                    if given is not None:
                        raise
                    failure = failure or f" ({type(error).__name__}: {str(error)[:200]})"
        finally:
            deactivate(self.model, self.record)
            set_repacking(repacking, True)
        if self.demanded:
            raise ValueError(f"{NEED_EXAMPLE}{failure}")
        why = f"runs on no input that s2ft makes{failure}" if failure else "has no config to make an input from"
        self.notes.append(f"nothing was proved: {type(self.model).__name__} {why}. Pass example=")
        return False

    def _run_plain_on(self, example: Any) -> None:
        """Run the model on an example."""
        self.example = example
        self.evaluated = self._run(False)
        if not any(bool(tensor.isfinite().any()) for tensor in self.evaluated):
            raise ValueError("example must give finite numbers, got NaN or infinity at the output")
        if self.is_spread:
            self.notes.append("proved without values in the slices, and in evaluation mode only: the model is sharded")
            return
        try:
            self._run_plain_in_training()
        except Exception as error:  # a model may ask for labels, or have other reasons
            self.notes.append(f"training mode was not proved: {type(error).__name__}: {str(error)[:200]}")
        if self.trained is None:
            self.plain_outputs, self.statistics, self.gradients = {}, {}, LocalGradients([], True)
        if self.trained is None or largest_change(self.trained, self.evaluated) != 0:
            self._run_recorded(False)

    def _run_plain_in_training(self) -> None:
        """Run in training mode. If the outputs differ from evaluation, run without dropout, which would drop others."""
        for self.without_dropout in (nullcontext, _WithoutDropout):
            found = self._run_recorded(True)
            if largest_change(found, self.evaluated) == 0:
                self.trained = found
                return
        if largest_change(found, self._run(True)) == 0:
            self.trained = found
        else:
            self._note_randomness()

    def _note_randomness(self) -> None:
        self.notes.append("training mode was not proved, because the model's outputs are random there")

    def _run_recorded(self, training: bool) -> list[Tensor]:
        passed = self.plain_outputs[training] = {path: [] for path in self.places}
        if training:
            self.statistics, self.gradients = {}, LocalGradients(self.moving, True)
        return self._run(
            training,
            hook=lambda path, number, output: passed[path].append(output.detach().clone()),
            gradients=self.gradients if training else None,
            statistics=self.statistics if training else None,
        )

    # ---- the attached model --------------------------------------------------------------------------

    def check(self) -> None:
        """Compare the attached model with the plain one, with the same values in its slices, and run the backward.

        Raises:
            ValueError: They differ, a slice gets no gradient, or the attached model fails. The message names the first
                block and weight.
        """
        try:
            with not_awaiting(self.model, self.record):
                self._check()
        except (AttributeError, TypeError) as error:  # replaced layers have no weight
            raise ValueError(
                f"attach would break the model, whose forward would fail: {error}. Does it keep a layer in a list or a "
                "function, besides the module that has it? Train other layers, or let it use the module's"
            ) from error

    def _check(self) -> None:
        slices = {path: mount.layer.s2 for path, mount in self.record.mounts.items()}
        training = self.trained is not None
        try:
            set_mounted_deltas(self.record, self.deltas)
            if not self.is_spread:
                with self._weights_with_gradients() as weights:
                    self._check_blocks(training, backward=True)
                    read = [path for path, weight in weights.items() if weight.grad is not None]
                if read:  # some code reads it without running its layer
                    raise ValueError(
                        f"the model computes with the weight of {read[0]} without running that layer, so that its "
                        "slice would get a part of its gradient only. Some code reads the weight itself, such as a "
                        "helper or a penalty: train other layers"
                    )
            missed = [path for path, s2 in slices.items() if s2.grad is None and self.has_backward]
            outputs = self._run(False)
            if self._differs(outputs, self.evaluated, OF_MODEL):
                if False in self.plain_outputs:  # which names the block, if it can
                    self._check_blocks(False)
                change = f"an output changes by {largest_change(outputs, self.evaluated):.2g} of its size"
                self._raise(False, f"{change}. Does the model use the number of a unit elsewhere")
        finally:
            for mount in self.record.mounts.values():
                mount.layer.unfuse()
            for s2 in () if self.is_spread else slices.values():
                s2.detach().zero_()
                s2.grad = None
        self._check_reached(missed)

    @contextmanager
    def _weights_with_gradients(self) -> Iterator[dict[str, Tensor]]:
        """Inside, the weights of the trainable layers require gradients, which none of these layers gives them."""
        layers = {p: mount.layer for p, mount in self.record.mounts.items() if mount.layer.kind.read_only is None}
        weights = {path: layer.weight for path, layer in layers.items()}
        try:
            for path, layer in layers.items():
                layer.is_on_trial = True
                weights[path].requires_grad_(True).grad = None
            yield weights
        finally:
            for path, layer in layers.items():
                layer.is_on_trial = False
                weights[path].requires_grad_(False).grad = None

    def _check_blocks(self, training: bool, backward: bool = False) -> None:
        """Compare what each block returns for the same inputs, and the outputs of the model."""
        found: list[str] = []
        counts: dict[str, int] = {}
        passed, expected = (
            self.plain_outputs[training],
            cast("list[Tensor]", self.trained) if training else self.evaluated,
        )
        statistics: dict[str, Tensor] = {}
        gradients = LocalGradients(self.gradients.couplings if training else [], False)
        outputs = self._run(
            training,
            partial(self._compare, found, counts, passed),
            backward,
            gradients=gradients,
            statistics=statistics,
        )
        short = [path for path, tensors in passed.items() if counts.get(path, 0) < len(tensors)]
        if not found and short:
            found = [f"{short[0]} does not run as often as before. Does its block compute more than s2ft knows"]
        elif not found and self._differs(outputs, expected, OF_MODEL):
            found = ["an output changes. Does the model use the number of a unit elsewhere"]
        elif not found and training:
            found = self._changed_statistics(statistics)
            if not found and (where := first_difference(self.model, self.record, self.gradients, gradients)):
                found = [
                    f"a unit gets another gradient at the output of {where}. Does a backward hook number the units"
                ]
        if found and training and largest_change(self._run(True), self._run(True, seed=1)) != 0:
            self._note_randomness()
        elif found:
            self._raise(training, found[0])

    def _changed_statistics(self, now: dict[str, Tensor]) -> list[str]:
        """Say which buffer the attached model has changed in another way than the plain one, in training mode.

        The buffers that move with units, as those of a norm, may differ in their order.
        """
        moved = {vector.path for coupling in self.couplings for vector in coupling.vectors}
        for name in dict.fromkeys((*self.statistics, *now)):
            pair = [one[name] for one in (now, self.statistics) if name in one]
            if name in moved:
                pair = [one.sort(0).values for one in pair]
            if self._differs(pair[:1], pair[1:], OF_MODEL):
                return [f"the buffer {name} gets other values. Does it keep one for each unit (vectors)"]
        return []

    def _compare(
        self, found: list[str], counts: dict[str, int], passed: Outputs, path: str, number: int, output: Tensor
    ) -> Tensor | None:
        """Compare the output of a place with that of the plain model, which is passed on, with a gradient."""
        counts[path] = number + 1
        if not passed[path]:
            return None
        then = passed[path][number % len(passed[path])]  # a checkpoint runs its block again, in the backward
        change = float(changes(output, then).max())
        if number < len(passed[path]) and not found and not change <= self._allowed(then, OF_BLOCK):
            coupling = self.places[path]
            found.append(
                f"the output of {path} changes by {change:.2g} of its size, in {coupling}, of {coupling.count} units. "
                "Is a module, a norm or bias (vectors), or the unit wrong, or does the block compute more than s2ft "
                "knows"
            )
        if output.shape != then.shape:
            return None
        copied = output.clone()
        copied.data.copy_(then)  # the gradient stays the output's
        return copied

    def _raise(self, training: bool, what: str) -> None:
        mode = "training" if training else "evaluation"
        raise ValueError(f"attach would change what the model computes: in {mode} mode {what}? {TRY_INSTEAD}")

    def _check_reached(self, missed: list[str]) -> None:
        """Name the layers that get no gradient. Experts may get no token, so they are no error."""
        experts = [path for path in missed if "expert" in path]
        others = [path for path in missed if "expert" not in path]
        if others and self.demanded:
            raise ValueError(
                f"example must reach every coupling, and this one does not reach {_first_of(others)}: no gradient "
                "arrives there. Pass another as example=, or verify=False"
            )
        if others:
            self.notes.append(
                f"not proved, because the example does not reach it: {_first_of(others)}. Pass another as example="
            )
        if experts:
            self.notes.append(
                f"not proved, because the example gives them no token: {_first_of(experts)}. Pass a longer example="
            )

    # ---- runs ----------------------------------------------------------------------------------------

    def _run(
        self,
        training: bool,
        hook: Callable[[str, int, Tensor], Tensor | None] | None = None,
        backward: bool = False,
        seed: int = 0,
        gradients: LocalGradients | None = None,
        statistics: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """Run the model and return its outputs. Afterwards it is as before, but for gradients of slices.

        Args:
            training: Whether it runs in training mode.
            hook: Called with the path of a place, the number of the call and the output; may return another output.
            backward: Whether to run the backward of a random loss.
            seed: Seed of all random numbers.
            gradients: Gets the gradients that couplings pass back.
            statistics: Gets the values of the buffers that the forward has changed.
        """
        model, record = self.model, self.record
        own = {id(one) for mount in record.mounts.values() for one in (mount.layer.s2, mount.layer.weight)}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        parts = (one for module in model.modules() for one in (module, getattr(module, "config", None)))
        dropping = {id(one): one for one in parts if "layerdrop" in getattr(one, "__dict__", ())}
        record.snapshot = Snapshot(model, {mount.layer for mount in record.mounts.values()}, others)
        stance = eval_frame._stance
        try:
            with ExitStack() as stack:
                for path in self.places if hook else ():
                    at_place = partial(_call_with_output, partial(cast(Callable, hook), path), count())
                    stack.callback(model.get_submodule(path).register_forward_hook(at_place).remove)
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                for context in (seeded(model, seed), torch.inference_mode(False), gathered_forwards(model)):
                    stack.enter_context(context)
                differentiates = backward or gradients is not None
                stack.enter_context(torch.set_grad_enabled(differentiates))
                stack.enter_context(self.without_dropout() if training else nullcontext())
                model.train(training)
                for part in dropping.values():  # else chance would leave blocks out of the proof
                    stack.enter_context(replaced(part, layerdrop=0.0))
                for parameter in others if differentiates else ():
                    parameter.requires_grad_(False)
                if gradients is not None:
                    stack.enter_context(gradients.recorded(model))
                output = list(tensors_in(run_example(model, self.example)))
                if statistics is not None:
                    statistics |= record.snapshot.changed_buffers(model)
                if backward:
                    self._run_backward(output)
        finally:
            eval_frame._set_stance(stance)  # else an interrupt at the context's begin would turn torch.compile off
            record.snapshot.restore()
            record.snapshot = None
            reshard_after_run(model)  # so that units move on the shards, not on gathered weights
        return [tensor.detach() for tensor in output]

    def _run_backward(self, output: list[Tensor]) -> None:
        """Run the backward of a random weighted sum of all outputs."""
        parts = [torch.view_as_real(one) if one.is_complex() else one for one in output if one.requires_grad]
        sums = [(one.masked_fill(~one.isfinite(), 0) * torch.randn_like(one)).sum().float().cpu() for one in parts]
        try:
            if sums:
                torch.stack(sums).sum().backward()
        except Exception as error:  # the model's own backward may refuse
            if self.demanded:
                raise
            self.notes.append(f"no gradient was proved: {type(error).__name__}: {str(error)[:200]}")
            self.has_backward = False

    # ---- tolerance -----------------------------------------------------------------------------------

    @cached_property
    def _in_half(self) -> bool:
        """Whether something is computed in half precision. Layers with quantized weights may do so."""
        passed = (one for places in self.plain_outputs.values() for tensors in places.values() for one in tensors)
        dtypes = {tensor.dtype for tensor in (*self.model.parameters(), *self.evaluated, *passed)}
        return not all(dtype.is_complex or dtype in OF_BLOCK for dtype in dtypes)

    def _allowed(self, tensor: Tensor, tolerance: Tolerance) -> float:
        exact = all(one.dtype in (torch.float64, torch.complex128) for one in (tensor, *self.model.parameters()))
        return tolerance[None if self._in_half else torch.float64 if exact else torch.float32]

    def _differs(self, now: list[Tensor], then: list[Tensor], tolerance: Tolerance) -> bool:
        """Whether outputs of the model differ by more than rounding."""
        routes = self._in_half and any("expert" in path for path, _ in self.model.named_modules())
        for pair in zip(now, then):
            found, allowed = changes(*pair), self._allowed(pair[1], tolerance)
            if not (found.median() <= MEDIAN_IN_HALF if routes and found.numel() > 1 else found.max() <= allowed):
                return True
        return len(now) != len(then)


# ---- what the runs need ------------------------------------------------------------------------------------------


def _first_of(paths: list[str]) -> str:
    return f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0]


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


def _call_with_output(
    hook: Callable[[int, Tensor], Tensor | None], calls: Iterator[int], module: nn.Module, inputs: Any, output: Any
) -> Tensor | None:
    """Forward hook: call a function with the number of the call and the output, if it is a tensor."""
    return hook(next(calls), output) if isinstance(output, Tensor) else None


def _examples(model: nn.Module, couplings: list[Coupling]) -> Iterator[Any]:
    """Inputs for the proof, the smallest that may reach the couplings first."""
    plain = example_of(model, ROWS, LENGTH)
    if plain is not None:
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            # A large vocabulary would take as long as several blocks. An index makes a copy: for a view with gaps, as a
            # number makes, PyTorch copies the frozen head once for every row, which takes 4 s for Llama-3.2-1B.
            plain["logits_to_keep"] = torch.tensor([LENGTH - 1])
        if {tower_of(model, coupling.main.path) for coupling in couplings} == {"language"}:
            yield {name: value for name, value in plain.items() if name != "pixel_values"} or plain
        yield plain
    yield from examples_of(model)


def _random_deltas(
    model: nn.Module, couplings: list[Coupling], config: S2FTConfig, selection: Selection
) -> dict[str, Delta]:
    """Random values, about as large as usual weights, for all selected units that can be written into the weights."""
    deltas: dict[str, Delta] = {}
    for number, projection in enumerate([one for one in projections_of(couplings) if one.name in selection]):
        weight, elements = weight_at(model, projection), projection.elements(selection[projection.name])
        if weight.read_only is None:
            shape = list(weight.shape)
            shape[projection.dim] = elements.numel()
            most = torch.Size(weight.shape[1:]).numel() ** -0.5
            generator = torch.Generator(weight.tensor.device).manual_seed(number)
            values = torch.empty(shape, dtype=config.delta_dtype_for(weight.tensor.dtype), device=weight.tensor.device)
            deltas[projection.name] = Delta(projection.dim, elements, values.uniform_(-most, most, generator=generator))
    return deltas
