"""Random sequences of all operations on an attached model, with a check after every operation.

    python -m tests.state.machine --sequences 2000
    python -m tests.state.machine --seed 17

A seed determines a sequence. A plain model gets the same casts and modes. After every operation, a detached copy of
the model must equal the plain model bit for bit. The output and the merged weights of the model must equal those that
plain torch formulas compute from the plain model and the active adapters. A failing sequence is shortened: operations
are left out as long as it fails in the same way.
"""

import argparse
import copy
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
from support.inside import S2Layer
from support.models import LAYOUTS
from support.states import saved_and_loaded
from support.tolerances import GEMM
from torch import nn
from transformers.utils import logging

import s2ft
from state.models import MODELS, make_adapter, ratios, tiny_model, tokens
from state.plain import describe, detach_if_attached, differences, effective_weights, same_bits, weights_of
from state.tracing import RaiseAt

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISION = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # a larger number is coarser
TOKENS = dict(batch=2, length=4)
SHOWN = 20  # largest number of printed failures
OTHER_BASE = "another base"  # part of the error of loading after a cast that lost digits


class Wrong(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Setting:
    """The model, dtype and layout that a sequence starts from."""

    case: str
    dtype: torch.dtype
    layout: str
    layers: int

    @classmethod
    def of(cls, seed: int) -> "Setting":
        rng = random.Random(seed)
        return cls(rng.choice(MODELS), rng.choice(DTYPES), rng.choice(LAYOUTS), rng.choice((1, 1, 2)))

    def __str__(self) -> str:
        return f"{self.case}, {str(self.dtype).removeprefix('torch.')}, {self.layout}"


class State:
    """The model under test, a plain model to compare with, and the adapters made so far."""

    def __init__(self, seed: int) -> None:
        setting = Setting.of(seed)
        self.case, self.dtype, self.layout = setting.case, setting.dtype, setting.layout
        self.rng = random.Random(seed)
        model = tiny_model(self.case, layers=setting.layers, dtype=self.dtype)
        self.pool = [make_adapter(model, self.config(), name, number) for number, name in enumerate(("p", "q"))]
        self.model, self.plain = model, copy.deepcopy(model)
        self.kept: dict[str, s2ft.Adapter] = {}  # copies of loaded adapters, made at loading
        self.names = 0
        self.coarsest = self.dtype  # the coarsest dtype of all casts
        self.lossy = False  # whether a cast lost digits of the base
        self.rounded = False  # whether written weights were cast, which adds a rounding error
        self.unfrozen = False  # whether a weight was unfrozen by hand
        self.detail = ""  # text after the name of the last operation in a failure

    # ---- properties that the operations use ------------------------------------------------------------------

    def config(self) -> s2ft.S2FTConfig:
        keys = list(ratios(self.case))
        chosen = self.rng.sample(keys, self.rng.randint(1, len(keys)))
        return s2ft.S2FTConfig(
            **{key: self.rng.choice((0.25, 0.5, 1.0)) for key in chosen},
            layout=self.layout,
            seed=self.rng.randrange(100),
            ffn_kernel=self.rng.random() < 0.7,
        )

    @property
    def status(self):
        return s2ft.status(self.model)

    @property
    def attached(self) -> bool:
        return bool(self.status.adapters)

    @property
    def slices(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if name.rpartition(".")[2] == "s2"}

    @property
    def layers(self) -> list[S2Layer]:
        return [module for module in self.model.modules() if isinstance(module, S2Layer)]

    @property
    def trainable(self) -> str | None:
        """The name of the trainable adapter."""
        return next((row.adapter for row in self.status.rows if row.trainable), None)

    @property
    def can_train(self) -> bool:
        return self.trainable is not None and self.status.active.get(self.trainable) == 1

    def new_name(self) -> str:
        self.names += 1
        return f"n{self.names}"

    def any_name(self) -> str:
        return self.rng.choice(self.status.adapters)

    def adapter(self, name: str) -> s2ft.Adapter:
        return self.kept[name] if name in self.kept else s2ft.get_adapter(self.model, name)

    def both(self, act: Callable[[nn.Module], object]) -> None:
        """Apply `act` to the model and to the plain model."""
        act(self.model)
        act(self.plain)

    def expected_weights(self, active: dict[str, float]) -> dict[str, torch.Tensor]:
        return effective_weights(self.plain, [(self.adapter(name), weight) for name, weight in active.items()])

    def tolerance(self) -> float:
        return GEMM[max(self.coarsest, next(self.plain.parameters()).dtype, key=PRECISION.get)][0]


# ---- operations, and the states in which they are possible ---------------------------------------------------


def attach(state: State) -> None:
    s2ft.attach(state.model, state.config(), name=state.new_name())
    fill(state)


def attach_on_top(state: State) -> None:
    try:
        s2ft.attach(state.model, state.config(), name=state.new_name(), on_top=True)
    except ValueError as error:
        if "exclude or protect_ratio leaves" not in str(error):
            raise
    else:
        fill(state)


def freeze(state: State) -> None:
    state.kept[state.trainable] = copy.deepcopy(s2ft.get_adapter(state.model, state.trainable))
    s2ft.freeze_adapter(state.model)


@torch.no_grad()
def fill(state: State) -> None:
    generator = torch.Generator().manual_seed(state.rng.randrange(1000))
    for s2 in state.slices.values():
        s2.copy_(torch.randn(s2.shape, generator=generator) * 0.1)


def detach(state: State) -> None:
    s2ft.detach(state.model)
    state.kept, state.unfrozen = {}, False


def load(state: State, trainable: bool = False, active: bool = True) -> None:
    name, adapter = state.new_name(), state.rng.choice(state.pool)
    if not trainable:
        state.kept[name] = copy.deepcopy(adapter)
    try:
        s2ft.load_adapter(state.model, adapter, name, trainable=trainable, active=active)
    except ValueError as error:
        state.kept.pop(name, None)
        if not (state.lossy and OTHER_BASE in str(error)):
            raise
    else:
        state.unfrozen = state.unfrozen or (trainable and bool(adapter.extra_weights))  # trains in full


def load_inactive(state: State) -> None:
    load(state, active=False)


def load_trainable(state: State) -> None:
    load(state, trainable=True)


def activate_one(state: State) -> None:
    s2ft.set_adapter(state.model, state.any_name())


def activate_nothing(state: State) -> None:
    s2ft.set_adapter(state.model, None)


@contextmanager
def ignore_extra_weights_error() -> Iterator[None]:
    """Ignore the refusal to sum adapters with extra weights; it must not change the model."""
    try:
        yield
    except ValueError as error:
        if "trained in full" not in str(error):
            raise


def activate_sum(state: State) -> None:
    names = state.rng.sample(state.status.adapters, min(len(state.status.adapters), state.rng.randint(1, 3)))
    with ignore_extra_weights_error():
        s2ft.set_adapter(state.model, {name: state.rng.choice((1.0, 0.5, -0.25)) for name in names})


def disable(state: State) -> None:
    before = state.status.active
    with ignore_extra_weights_error(), s2ft.disable_adapters(state.model):
        check_output(state, {})
    require(state.status.active == before, f"disable_adapters: {before} became {state.status.active}")


def fuse_layers(state: State) -> None:
    """Change the slices in a way that no forward notices, and write them."""
    for layer in state.layers:
        layer.s2.data.mul_(-0.5)
        try:
            layer.fuse()
        finally:
            layer.fuse()  # whoever was interrupted before it began must call it again


def unfuse_layers(state: State) -> None:
    for layer in state.layers:
        layer.unfuse()


def save_and_load(state: State) -> None:
    name = state.any_name()
    adapter, fresh = state.adapter(name), copy.deepcopy(state.plain)
    with tempfile.TemporaryDirectory() as folder:
        s2ft.save_adapter(state.model, folder, name)
        try:
            s2ft.load_adapter(fresh, folder, "x")
        except ValueError as error:
            require(state.lossy and OTHER_BASE in str(error), f"a saved adapter can't be loaded: {error}")
            return
    require_same_deltas(adapter, s2ft.get_adapter(fresh, "x"), "saved and loaded")
    expected = effective_weights(state.plain, [(adapter, 1.0)])
    require_nothing(differences(dict(expected), dict(weights_of(s2ft.merge(fresh)))), "saved, loaded and merged")


def delete(state: State) -> None:
    name = state.any_name()
    s2ft.delete_adapter(state.model, name)
    state.kept.pop(name, None)
    state.unfrozen = False if not state.attached else state.unfrozen


def rename(state: State) -> None:
    name, new = state.any_name(), state.new_name()
    if name in state.kept:
        state.kept[new] = state.kept[name]
    s2ft.rename_adapter(state.model, name, new)
    state.kept.pop(name, None)


def add_up(state: State) -> None:
    names = state.rng.sample(state.status.adapters, min(len(state.status.adapters), 2))
    new = state.new_name()
    with ignore_extra_weights_error():
        s2ft.combine_adapters(state.model, {name: 0.5 for name in names}, new)
    if new not in state.status.adapters:
        return
    sums = effective_weights(state.plain, [(s2ft.get_adapter(state.model, new), 1.0)])
    for key, tensor in effective_weights(state.plain, [(state.adapter(name), 0.5) for name in names]).items():
        require(torch.allclose(sums[key], tensor, rtol=state.tolerance(), atol=state.tolerance()), f"sum in {key}")
    state.kept[new] = copy.deepcopy(s2ft.get_adapter(state.model, new))


def keep(state: State) -> None:
    state.pool.append(copy.deepcopy(s2ft.get_adapter(state.model, state.any_name())))


def arithmetic(state: State) -> None:
    adapter = s2ft.get_adapter(state.model, state.any_name())
    with ignore_extra_weights_error():
        state.pool.append(-(0.5 * adapter))


def loss_of(state: State, seed: int = 0) -> torch.Tensor:
    ids = tokens(state.model, seed=seed, **TOKENS)
    return state.model(input_ids=ids, labels=ids).loss


def step(state: State) -> None:
    before = {name: s2.detach().clone() for name, s2 in state.slices.items()}
    optimizer, mode = torch.optim.AdamW(state.slices.values(), lr=1e-2, eps=1e-3), state.model.training
    state.model.train()
    loss_of(state, state.rng.randrange(100)).backward()
    frozen = [n for n, p in state.model.named_parameters() if p.grad is not None and n not in before]
    require(state.unfrozen or not frozen, f"frozen weights got gradients: {frozen[:2]}")
    missing = [name for name, s2 in state.slices.items() if s2.grad is None]
    require(not missing, f"slices got no gradient: {missing[:2]}")
    optimizer.step()
    state.model.zero_grad()
    state.model.train(mode)
    require(any(not same_bits(before[name], s2) for name, s2 in state.slices.items()), "the step changed nothing")


def backward(state: State) -> None:
    """Run a backward, and another one between whose forward and backward the model runs as the base and as itself."""
    found = []
    for runs_between in (False, True):
        torch.manual_seed(0)  # of dropout
        loss = loss_of(state)
        if runs_between:
            # A switch of loaded adapters, or of weights trained in full, changes weights that autograd has saved, and it
            # says so.
            is_alone = set(s2ft.status(state.model).active) == {state.trainable} and not state.unfrozen
            with s2ft.disable_adapters(state.model) if is_alone else nullcontext():
                logits_of(state.model)
            logits_of(state.model)
        loss.backward()
        found.append([s2.grad for s2 in state.slices.values()])
        state.model.zero_grad()
    require(all(map(same_bits, *found)), "what ran between forward and backward changed the gradients")


def load_own_state(state: State) -> None:
    state.model.load_state_dict({name: tensor.clone() for name, tensor in state.model.state_dict().items()})


def load_own_state_into_copy(state: State) -> None:
    other = copy.deepcopy(state.model)
    other.load_state_dict(copy.deepcopy(state.model.state_dict()))
    state.model = other


def load_base_state(state: State) -> None:
    """Either the numbers do not change, or ValueError is raised."""
    with suppress(ValueError):
        state.model.load_state_dict({k: v.clone() for k, v in state.plain.state_dict().items()}, strict=False)


def deep_copy(state: State) -> None:
    state.model = copy.deepcopy(state.model)


def save_whole(state: State) -> None:
    state.model = saved_and_loaded(state.model)


def train_mode(state: State) -> None:
    state.both(lambda model: model.train())


def evaluation_mode(state: State) -> None:
    state.both(lambda model: model.eval())


def cast(state: State) -> None:
    dtype, now = (
        state.rng.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
        next(state.plain.parameters()).dtype,
    )
    method = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float", torch.float64: "double"}[dtype]
    if state.rng.random() < 0.5:
        state.both(lambda model: getattr(model, method)())
    else:
        state.both(lambda model: model.to(dtype))
    state.coarsest = max(state.coarsest, dtype, key=PRECISION.get)
    state.lossy = state.lossy or PRECISION[dtype] > PRECISION[now] or {dtype, now} == {torch.float16, torch.bfloat16}
    state.rounded = state.rounded or bool(state.status.active)


def unfreeze(state: State) -> None:
    """Unfreeze a weight that belongs to no layer of s2ft."""
    norms = [name for name, _ in state.model.named_parameters() if "norm" in name or "ln_" in name]
    state.model.get_parameter(state.rng.choice(norms)).requires_grad_(True)
    state.unfrozen = True


@dataclass(frozen=True)
class Operation:
    run: Callable[[State], None]
    possible: Callable[[State], bool]
    same_output: bool = False  # the output of the model must not change

    @property
    def name(self) -> str:
        return self.run.__name__


def always(state: State) -> bool:
    return True


def attached(state: State) -> bool:
    return state.attached


OPERATIONS = (
    Operation(attach, lambda state: state.trainable is None),
    Operation(attach_on_top, lambda state: state.trainable is None),
    Operation(freeze, lambda state: state.trainable is not None, same_output=True),
    Operation(detach, attached),
    Operation(load, lambda state: len(state.status.adapters) < 4),
    Operation(load_inactive, lambda state: len(state.status.adapters) < 4, same_output=True),
    Operation(load_trainable, lambda state: state.trainable is None),
    Operation(activate_one, attached),
    Operation(activate_nothing, attached),
    Operation(activate_sum, attached),
    Operation(disable, attached, same_output=True),
    Operation(fuse_layers, lambda state: state.can_train),
    Operation(unfuse_layers, lambda state: state.can_train, same_output=True),
    Operation(save_and_load, attached, same_output=True),
    Operation(delete, attached),
    Operation(rename, attached, same_output=True),
    Operation(add_up, lambda state: 0 < len(state.status.adapters) < 4, same_output=True),
    Operation(keep, attached, same_output=True),
    Operation(arithmetic, attached, same_output=True),
    Operation(step, lambda state: state.can_train),
    Operation(backward, lambda state: state.can_train, same_output=True),
    Operation(load_own_state, attached, same_output=True),
    Operation(load_own_state_into_copy, attached, same_output=True),
    Operation(load_base_state, attached, same_output=True),
    Operation(deep_copy, always, same_output=True),
    Operation(save_whole, always, same_output=True),
    Operation(train_mode, always),
    Operation(evaluation_mode, always),
    Operation(cast, always),
    Operation(unfreeze, attached, same_output=True),
)


# ---- interrupts ----------------------------------------------------------------------------------------------


# The operations that may be interrupted. What they note about adapters, they note before they call s2ft.
CUT = (
    *(attach, attach_on_top, freeze, detach, load, load_inactive, load_trainable, activate_one, activate_nothing),
    *(activate_sum, disable, fuse_layers, unfuse_layers, delete, rename, backward),
)


def interrupted(state: State) -> None:
    """Raise at a random moment of an operation, in a fifth of the cases again in the clean-up; then continue."""
    run = state.rng.choice([one.run for one in OPERATIONS if one.run in CUT and one.possible(state)])
    twice = state.rng.random() < 0.2
    error, events = state.rng.choice((KeyboardInterrupt, MemoryError)), state.rng.choice(("opcode", "line"))
    moment = int(2 ** state.rng.uniform(0, 15 if events == "opcode" else 12))  # suits short and long operations
    try:
        with RaiseAt(moment, error, events=events, second=state.rng.randint(1, 40) if twice else None) as tracing:
            run(state)
    except (KeyboardInterrupt, MemoryError):
        pass
    finally:
        again = f" and again at call {tracing.second} after it" if tracing.raised_again else ""
        state.detail = f" ({run.__name__} at {tracing.raised or 'no moment'}{again})"
    state.model.zero_grad()
    if tracing.raised_again:  # then only detach must work
        detach_if_attached(state.model)
    left = state.status.adapters
    state.kept = {other: adapter for other, adapter in state.kept.items() if other in left and other != state.trainable}
    # an interrupted detach may have unfrozen weights that the next detach unfreezes
    state.unfrozen = state.attached and (
        state.unfrozen or run in (detach, delete) or any(adapter.extra_weights for adapter in state.pool)
    )


OPERATIONS += (Operation(interrupted, always), Operation(interrupted, always), Operation(interrupted, always))


# ---- invariants ----------------------------------------------------------------------------------------------


def require(holds: bool, sentence: str) -> None:
    if not holds:
        raise Wrong(sentence)


def require_nothing(found: list[str], where: str) -> None:
    require(not found, f"{where}: {len(found)} differences, the first: {found[0]}" if found else "")


def require_same_deltas(expected: s2ft.Adapter, found: s2ft.Adapter, what: str) -> None:
    require(expected.deltas.keys() == found.deltas.keys(), f"{what}: other projections")
    for name, delta in expected.deltas.items():
        other = found.deltas[name]
        require(
            delta.dim == other.dim and torch.equal(delta.index, other.index) and same_bits(delta.values, other.values),
            f"{what}: {name} has other numbers",
        )


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens(model, **TOKENS)).logits.float()


@torch.no_grad()
def check_output(state: State, active: dict[str, float]) -> None:
    """Compare the output with that of the plain model with the effective weights."""
    wanted = torch.func.functional_call(
        state.plain, state.expected_weights(active), kwargs={"input_ids": tokens(state.plain, **TOKENS)}
    ).logits.float()
    require_close(state, wanted, logits_of(state.model), f"with {active} active")


def require_close(state: State, wanted: torch.Tensor, found: torch.Tensor, where: str) -> None:
    off, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    require(off <= 4 * state.tolerance() * max(size, 1.0), f"{where}, the logits are off by {off:.3g} of {size:.3g}")


def check_base(state: State) -> None:
    """Check that a detached copy equals the plain model."""
    plain = copy.deepcopy(state.model)
    detach_if_attached(plain)
    require_nothing(differences(describe(state.plain), describe(plain)), "a detached copy is not the base")


def check_merged(state: State, active: dict[str, float]) -> None:
    if not active:
        return
    found, expected = weights_of(s2ft.merge(copy.deepcopy(state.model))), state.expected_weights(active)
    if list(active.values()) == [1.0] and not state.rounded:
        require_nothing(differences(dict(expected), dict(found)), f"merged with {active}")
        return
    bound = 4 * state.tolerance()
    wrong = [
        name for name, tensor in expected.items() if not torch.allclose(tensor, found[name], rtol=bound, atol=bound)
    ]
    require(not wrong, f"merged with {active}: {wrong[:1]}")


def check_requires_grad(state: State) -> None:
    if state.attached and not state.unfrozen:
        found = {name for name, p in state.model.named_parameters() if p.requires_grad}
        require(found == set(state.slices), f"these require gradients: {sorted(found ^ set(state.slices))[:3]}")


def check(state: State) -> None:
    active = dict(state.status.active)
    check_base(state)
    check_output(state, active)
    check_merged(state, active)
    for name, adapter in state.kept.items():
        require_same_deltas(adapter, s2ft.get_adapter(state.model, name), f"adapter {name}")
    check_requires_grad(state)


# ---- sequences -------------------------------------------------------------------------------------------------


@dataclass
class Failure:
    """A failed sequence: the numbers of its operations, their names, and the error."""

    seed: int
    operations: list[str]
    error: str

    def __str__(self) -> str:
        return (
            f"seed {self.seed} ({Setting.of(self.seed)}): {', '.join(self.operations)}: {self.error}\n"
            f"        python -m tests.state.machine --seed {self.seed}"
        )


def run_sequence(seed: int, left_out: frozenset[int] = frozenset(), verbose: bool = False) -> Failure | None:
    """Run the sequence of a seed.

    Args:
        seed: determines the whole sequence.
        left_out: numbers of operations that are skipped.
        verbose: print every operation before it runs.
    Returns:
        The failure, or None.
    """
    state = State(seed)
    rng = random.Random(seed)
    done: list[str] = []
    for number in range(rng.randint(4, 16)):
        pick, operation_seed = rng.random(), rng.random()
        if number in left_out:
            continue
        possible = [one for one in OPERATIONS if one.possible(state)]
        operation = possible[int(pick * len(possible))]
        state.rng.seed(operation_seed)
        state.detail = ""
        if verbose:
            print(f"    {number}: {operation.name}, on {state.status.adapters}, active {state.status.active}")
        try:
            run_operation(state, operation)
        except Exception as error:
            return Failure(seed, [*done, operation.name + state.detail], f"{type(error).__name__}: {error}")
        done.append(operation.name + state.detail)
    return None


def run_operation(state: State, operation: Operation) -> None:
    """Run one operation and check everything after it."""
    active = dict(state.status.active)
    output = logits_of(state.model) if operation.same_output else None
    operation.run(state)
    if state.status.active != active and not (operation.run is rename or "(rename at" in state.detail):
        state.rounded = False
    check(state)
    if output is not None:
        require_close(state, output, logits_of(state.model), "before and after")


def shorten(failure: Failure) -> Failure:
    """Leave out operations one by one, as long as the sequence fails with the same kind of error."""
    left_out: frozenset[int] = frozenset()
    kind = failure.error.partition(":")[0]
    for number in range(16):
        shorter = run_sequence(failure.seed, left_out | {number})
        if (
            shorter is not None
            and shorter.error.partition(":")[0] == kind
            and len(shorter.operations) < len(failure.operations)
        ):
            left_out, failure = left_out | {number}, shorter
    return failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=60)
    parser.add_argument("--seed", type=int, help="run this one sequence only, and print every operation before it runs")
    options = parser.parse_args()
    prepare()
    failures = run_all(options.sequences) if options.seed is None else [run_sequence(options.seed, verbose=True)]
    failures = [shorten(failure) for failure in failures[:SHOWN] if failure is not None]
    print(*failures or ["nothing is wrong"], sep="\n")
    return int(bool(failures))


def prepare() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="s2 was made as")  # casts cause it on purpose here
    logging.set_verbosity_error()


def run_all(count: int) -> list[Failure]:
    return [failure for seed in range(count) if (failure := run_sequence(seed)) is not None]


if __name__ == "__main__":
    raise SystemExit(main())
