"""Wrong couplings of many model types, tried as discovery tries proposals. None may be accepted.

Each type's true couplings are found by discovery on its twin. From every kind of them, wrong ones are made: heads of
half the width, an output or value projection of another layer or expert, a producer left out, a vector left out, a
packed weight read in another order, heads that something numbers.

    python bench/wrong_couplings.py                      # all types of TYPES, into bench/results/wrong_couplings.json
    python bench/wrong_couplings.py --types llama t5     # some types, printed only
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from harness import save

from s2ft.model.coupling import Coupling, Projection
from s2ft.model.discovery.proposals import LayerMap
from s2ft.model.discovery.search import Trial, judge, place_of, search, trial_of
from s2ft.text.models import AUTO

RESULTS = Path(__file__).parent / "results" / "wrong_couplings.json"
TYPES = (
    "llama qwen3 gemma2 gemma3_text t5 bart bert clip codegen cohere deberta-v2 deepseek_v3 deit distilbert exaone4 "
    "flaubert glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite hubert m2m_100 minimax_m2 mixtral "
    "modernbert mpt nemotron olmo2 olmoe opt persimmon phi phi3 qwen2_moe qwen3_moe qwen3_next siglip starcoder2 "
    "vit wav2vec2 whisper xlm"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for model_type in options.types or TYPES:
        try:
            found = list(_row(model_type))
        except (ValueError, TypeError) as error:  # the default config is invalid in some versions of transformers
            print(f"{model_type}: not tried, {error}", flush=True)
            continue
        rows += found
        counts = Counter(row["accepted"] for row in found)
        print(f"{model_type}: {counts[False]} refused, {counts[True]} accepted", flush=True)
    accepted = [row for row in rows if row["accepted"]]
    kinds = Counter(row["wrong"] for row in rows)
    print(f"{len(rows)} wrong couplings, {len(accepted)} accepted", *accepted, sep="\n")
    if options.types is None:
        save(RESULTS, {"tried": len(rows), "accepted": accepted, "kinds": dict(kinds), "rows": rows})


def _row(model_type: str) -> Iterator[dict]:
    """Try the wrong couplings of a type's twin."""
    config = transformers.CONFIG_MAPPING[model_type]()
    autos = (getattr(transformers, auto) for auto in AUTO)
    model_class = next(auto._model_mapping[type(config)] for auto in autos if type(config) in auto._model_mapping)
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    with torch.device("meta"):
        model = model_class._from_config(config)
    trial = trial_of(model)
    for wrong, couplings in wrong_couplings(trial):
        verdict = judge(trial, couplings)
        name = str(couplings[0])
        yield {"type": model_type, "wrong": wrong, "coupling": name, "accepted": verdict.confirmed}


def wrong_couplings(trial: Trial) -> Iterator[tuple[str, list[Coupling]]]:
    """Make wrong couplings from the true ones of a twin, with words for what is wrong."""
    groups: dict[str, list[Coupling]] = {}
    structure = LayerMap(trial.twin)
    for coupling in search(trial.twin, trial).couplings:
        if not coupling.is_one_sided:
            pattern = " ".join(structure.pattern(projection.path) for projection in coupling.projections)
            groups.setdefault(pattern, []).append(coupling)
    for couplings in groups.values():
        if trial.structure.is_called(place_of(couplings[0])):
            yield from ((words, wrong) for words, wrong in _variants(couplings) if all(map(_fits, wrong)))


def _fits(coupling: Coupling) -> bool:
    """Whether the units are within their weights. attach refuses others without a trial."""
    return all(int(one.elements(torch.tensor([one.count - 1])).max()) < one.extent for one in coupling.projections)


def _variants(couplings: list[Coupling]) -> Iterator[tuple[str, list[Coupling]]]:
    first = couplings[0]
    if first.fixed:
        yield "heads that something numbers", [replace(one, fixed=False) for one in couplings]
        return
    movable = min(projection.count for projection in first.projections) > 1
    if len(couplings) > 1 and movable:
        yield f"{first.consumer.key} of another layer", [replace(first, consumer=couplings[1].consumer)]
        moved = (
            (couplings[1].producers[-1], *first.producers[1:]) if len(first.producers) > 1 else couplings[1].producers
        )
        yield f"{moved[0].key} of another layer", [replace(first, producers=moved)]
    if movable:
        for left_out in first.producers if len(first.producers) > 1 else ():
            rest = tuple(one for one in first.producers if one is not left_out)
            yield f"without {left_out.key}", [replace(first, producers=rest)]
    if first.vectors:
        yield "without vectors", [replace(one, vectors=()) for one in couplings]
    if first.consumer.key == "o" and all(one.unit % 2 == 0 for one in first.projections):
        yield "heads of half the width", [_halved(one) for one in couplings]
    if first.producers[0].size is not None and len({one.path for one in first.producers}) == 1 and movable:
        yield "another order in a packed weight", [_in_another_order(one) for one in couplings]


def _halved(coupling: Coupling) -> Coupling:
    def half(one: Projection) -> Projection:
        stride = None if one.stride is None else one.stride // 2
        return replace(one, count=2 * one.count, unit=one.unit // 2, stride=stride)

    vectors = tuple(replace(one, unit=one.unit // 2) for one in coupling.vectors if one.unit % 2 == 0)
    producers = tuple(map(half, coupling.producers))
    return replace(coupling, producers=producers, consumer=half(coupling.consumer), vectors=vectors)


def _in_another_order(coupling: Coupling) -> Coupling:
    """The parts of a packed weight one after the other, if its units have them in turn; else in turn."""
    producers, start = [], 0
    for one in coupling.producers:
        if one.stride is None:
            producers.append(replace(one, start=start, stride=sum(p.unit for p in coupling.producers)))
            start += one.unit
        else:
            producers.append(replace(one, start=start, stride=None))
            start += one.unit * one.count
    return replace(coupling, producers=tuple(producers))


if __name__ == "__main__":
    main()
