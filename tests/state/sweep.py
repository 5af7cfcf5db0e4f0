"""Raise at every moment of every operation, one after the other; after each, detach must restore the base.

    python -m tests.state.sweep --occurrences all

prints one line per operation and exits with 1 if one failed. Unlike random signals, it covers every moment. After an
exception, the model must also agree with s2ft.status.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.models import LAYOUTS
from support.states import randomize, with_adapter, with_loaded
from torch import nn

import s2ft
from state import REFERENCE
from state.models import make_adapter, ratios, tiny_model, tokens
from state.plain import describe, detach_if_attached, differences, effective_weights, weights_of
from state.tracing import EVENTS, RaiseAt, moments

SMALL = dict(
    hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=2, head_dim=4, vocab_size=11
)
FEWEST = 2  # smallest number of moments of each operation, for any stride


@dataclass
class Case:
    """An operation and the model it starts from."""

    name: str
    start: nn.Module
    operation: Callable[[nn.Module], object]


class Sweep:
    """The models that operations start from, in one layout, and their expected weights."""

    def __init__(self, layout: str, **sizes: int) -> None:
        def config(seed: int) -> s2ft.S2FTConfig:
            return s2ft.S2FTConfig(**ratios("llama"), layout=layout, seed=seed)

        self.layout, self.config = layout, config(3)
        self.plain = tiny_model("llama", **(sizes or SMALL))
        self.a, self.b = (make_adapter(self.plain, config(seed), name, seed) for seed, name in ((1, "a"), (2, "b")))
        self.base, self.tokens = describe(self.plain), tokens(self.plain)
        # a is active, b is loaded; t is trainable; a is loaded and active, t is trainable and inactive
        self.loaded = with_loaded(with_loaded(copy.deepcopy(self.plain), self.b), self.a)
        self.trainable = randomize(with_adapter(copy.deepcopy(self.plain), self.config, "t"), 3, 0.1)
        self.trainable(input_ids=self.tokens)  # writes them into the weights
        self.both = with_loaded(copy.deepcopy(self.trainable), self.a)
        self.both_active = copy.deepcopy(self.both)
        s2ft.set_adapter(self.both_active, {"a": 1.0, "t": 1.0})
        self.adapters = {"a": self.a, "b": self.b, "t": s2ft.get_adapter(self.trainable, "t")}

    def cases(self) -> list[Case]:
        weighted = {"a": 0.5, "b": 0.25}
        return [
            Case("attach", self.plain, lambda m: s2ft.attach(m, self.config, name="t")),
            Case("attach beside a loaded one", self.loaded, lambda m: s2ft.attach(m, self.config, name="t")),
            Case("attach on top", self.loaded, lambda m: s2ft.attach(m, self.config, name="t", on_top=True)),
            Case("freeze_adapter", self.both_active, s2ft.freeze_adapter),
            Case("load_adapter", self.plain, lambda m: s2ft.load_adapter(m, self.a)),
            Case("load_adapter, trainable", self.plain, lambda m: s2ft.load_adapter(m, self.a, trainable=True)),
            Case("load_adapter beside a trainable one", self.trainable, lambda m: s2ft.load_adapter(m, self.a)),
            Case("load_adapter beside an active one", self.loaded, lambda m: s2ft.load_adapter(m, self.adapters["t"])),
            Case("set_adapter, another", self.loaded, lambda m: s2ft.set_adapter(m, "b")),
            Case("set_adapter, weighted", self.loaded, lambda m: s2ft.set_adapter(m, weighted)),
            Case("set_adapter, None", self.loaded, lambda m: s2ft.set_adapter(m, None)),
            Case("set_adapter, None, trainable", self.trainable, lambda m: s2ft.set_adapter(m, None)),
            Case("set_adapter, trainable", self.both, lambda m: s2ft.set_adapter(m, "t")),
            Case("set_adapter, trainable written", self.both, lambda m: s2ft.set_adapter(m, {"t": 0.5, "a": 1.0})),
            Case("disable_adapters", self.loaded, self.disable),
            Case("merge, trainable", self.trainable, s2ft.merge),
            Case("merge, loaded", self.loaded, s2ft.merge),
            Case("detach, trainable", self.trainable, s2ft.detach),
            Case("detach, loaded", self.loaded, s2ft.detach),
            Case("detach, both", self.both, s2ft.detach),
            Case("delete_adapter, active", self.loaded, lambda m: s2ft.delete_adapter(m, "a")),
            Case("delete_adapter, trainable", self.both, lambda m: s2ft.delete_adapter(m, "t")),
            Case("delete_adapter, last", self.trainable, lambda m: s2ft.delete_adapter(m, "t")),
            Case("rename_adapter", self.loaded, lambda m: s2ft.rename_adapter(m, "b", "c")),
            Case("forward and backward", self.trainable, self.train),
            Case("forward after a step", self.trainable, self.evaluate),
            Case("move", self.trainable, lambda m: m.to(torch.float32)),
        ]

    def train(self, model: nn.Module) -> None:
        model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        model.zero_grad()

    def evaluate(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith(".s2"):
                parameter.detach().mul_(2)  # as an optimizer does; no step runs under torch.no_grad
        model(input_ids=self.tokens)

    @staticmethod
    def disable(model: nn.Module) -> None:
        with s2ft.disable_adapters(model):
            pass

    # ---- one moment ------------------------------------------------------------------------------------

    def problem(self, case: Case, moment: int, events: str, second: int | None) -> tuple[str | None, str | None]:
        """Raise at one moment of a case. Returns where it was raised, or None, and the problem."""
        model = copy.deepcopy(case.start)
        tracing = RaiseAt(moment, events=events, second=second)
        try:
            with tracing:
                case.operation(model)
        except KeyboardInterrupt:
            pass
        except Exception as error:
            return tracing.raised, f"{type(error).__name__} hides the interrupt: {error}"
        else:
            if tracing.raised is not None and not tracing.ignored:
                return tracing.raised, "the interrupt was swallowed"
        try:
            if second is not None and not s2ft.status(model).adapters:
                detach_if_attached(model)  # a record without adapters may remain
            wrong = self._wrong_plain(model, case)
            if wrong is None and second is None:  # after two exceptions, only detach must work
                wrong = self._wrong_state(model)
            wrong = wrong or self._wrong_base(model)
        except Exception as error:
            wrong = f"the next use raised {type(error).__name__}: {error}"
        return tracing.raised, wrong

    def _wrong_state(self, model: nn.Module) -> str | None:
        """The output must agree with s2ft.status, and the merged weights too, bit for bit."""
        status = s2ft.status(model)
        if not status.adapters:
            return None
        adapters = {**self.adapters, "c": self.b}  # b, renamed
        if "t" in status.adapters:
            adapters["t"] = s2ft.get_adapter(model, "t")
        expected = effective_weights(self.plain, [(adapters[name], weight) for name, weight in status.active.items()])
        with torch.no_grad():
            wanted = torch.func.functional_call(self.plain, expected, kwargs={"input_ids": self.tokens}).logits
            logits = model(input_ids=self.tokens).logits
        if not torch.allclose(logits, wanted, rtol=1e-4, atol=1e-4):
            return f"status says {status.active}, but the logits are off by {float((logits - wanted).abs().max()):.3g}"
        if not status.active:
            return None
        found = weights_of(s2ft.merge(copy.deepcopy(model)))
        if list(status.active.values()) == [1.0]:
            wrong = differences(dict(expected), dict(found))
        else:  # sums are computed in another order
            wrong = [name for name in expected if not torch.allclose(expected[name], found[name], rtol=1e-5, atol=1e-6)]
        return f"status says {status.active}, but merging gives something else: {wrong[0]}" if wrong else None

    def _wrong_plain(self, model: nn.Module, case: Case) -> str | None:
        """A plain model must equal the base or, after merge, the base plus the active adapter."""
        if s2ft.status(model).adapters:
            return None
        wrong = differences(self.base, describe(model))
        if wrong and case.operation is s2ft.merge:
            (name,) = s2ft.status(case.start).active
            merged = effective_weights(self.plain, [(self.adapters[name], 1.0)])
            expected = {**self.base, **{f"tensor {key}": tensor for key, tensor in merged.items()}}
            return None if not differences(expected, describe(model)) else f"neither base nor merged: {wrong[0]}"
        return f"the model is plain, but {wrong[0]}" if wrong else None

    def _wrong_base(self, model: nn.Module) -> str | None:
        if not s2ft.status(model).adapters:
            return None  # _wrong_plain checks it; a merged model is not the base
        detach_if_attached(model)
        wrong = differences(self.base, describe(model))
        return f"after detach, {len(wrong)} differences from the base, the first: {wrong[0]}" if wrong else None

    # ---- all moments -----------------------------------------------------------------------------------

    def choose(self, case: Case, events: str, occurrences: int | None, stride: int, twice: bool) -> list[int]:
        """Moments of a case to raise at; they are different ones with two exceptions than with one."""
        with RaiseAt(events=events) as counter:
            case.operation(copy.deepcopy(case.start))
        found = moments(counter.places, occurrences)
        stride = max(1, min(stride, len(found) // FEWEST))
        return found[stride // 2 if twice else 0 :: stride]

    def problems(self, case: Case, chosen: list[int], events: str, twice: bool) -> list[str]:
        """Raise at these moments of a case, one after the other. Returns the problems."""
        problems = []
        for moment in chosen:
            where, wrong = self.problem(case, moment, events, 1 + moment % 23 if twice else None)
            if wrong is not None:
                problems.append(f"{case.name}, {self.layout}, {events} {moment} at {where}: {wrong}")
        return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="default: both")
    parser.add_argument("--events", choices=EVENTS, default="opcode")
    parser.add_argument(
        "--occurrences",
        default="1",
        metavar="N|all",
        help="raise at the first N events and the last event of each place in the code; all: at every event",
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=1,
        metavar="N",
        help=f"use every N-th of these moments, but at least {FEWEST} per operation",
    )
    parser.add_argument("--case", help="only operations whose name begins with this")
    parser.add_argument("--moment", type=int, help="only this moment, as in the message of a failure")
    parser.add_argument("--twice", action="store_true", help="raise again, in the clean-up after the first exception")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    occurrences = None if options.occurrences == "all" else int(options.occurrences)
    kernels, failed = "reference" if REFERENCE else "compiled", False
    for layout in options.layout or LAYOUTS:
        sweep = Sweep(layout)
        for case in sweep.cases():
            if case.name.startswith(options.case or ""):
                chosen = (
                    [options.moment]
                    if options.moment
                    else sweep.choose(case, options.events, occurrences, options.stride, options.twice)
                )
                problems = sweep.problems(case, chosen, options.events, options.twice)
                failed = failed or bool(problems)
                print(
                    f"{case.name:<36} {layout}, {kernels}: {len(chosen)} moments, {len(problems)} failures",
                    *problems[:3],
                    sep="\n    ",
                    flush=True,
                )
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
