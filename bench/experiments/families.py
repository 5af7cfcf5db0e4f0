"""Held-out families of arithmetic word problems: situations and wordings that no training template has.

They were written after the training templates of problems.py were frozen, and committed with their hash
(families.sha256) before the first run that was tuned on anything. `check_frozen` compares both with the hash, so that
neither the training side nor the test side can be changed after results are known.

A family is an operation and a situation. The numbers of a problem are a combination that no training problem has.
"""

# ruff: noqa: E501 - each template stays on one line

import hashlib
import json
import random
from pathlib import Path

from bench.experiments.problems import NAMES, OPERATIONS, THINGS, TRAIN_TEMPLATES, is_held_out

FAMILIES: dict[str, tuple[str, ...]] = {
    "add-add": (
        "Snow fell on three nights: {a} inches on the first, {b} inches on the second and {c} inches on the third. How deep is the snow if none of it melts?",
        "{n}'s phone shows {a} unread messages. During lunch {b} messages arrive, and during a meeting {c} messages arrive. {n} opens none of them. How many unread messages does the phone show?",
        "The choir has {a} sopranos, {b} altos and {c} tenors. How many singers does it have?",
        "A recipe asks for {a} grams of butter, {b} grams of sugar and {c} grams of flour. How many grams do these ingredients weigh together?",
    ),
    "add-sub": (
        "A freight elevator takes in {a} crates on the ground floor and {b} crates on the second floor, then leaves {c} crates on the fifth floor. How many crates are inside?",
        "{n}'s aquarium had {a} fish. The fish had {b} babies, and {n} took {c} fish to the pet shop. How many fish swim in the aquarium?",
        "A volunteer group signs up {a} people on Saturday and {b} people on Sunday, but {c} people cancel. How many volunteers come?",
        "The printer holds {a} sheets. {n} adds {b} sheets and prints a report of {c} sheets. How many sheets does the printer hold after that?",
    ),
    "sub-add": (
        "A herd counts {a} sheep. Wolves scare away {b} sheep, and {c} lambs are born in spring. What is the size of the herd in spring?",
        "{n} types an essay of {a} lines, deletes {b} lines and writes {c} lines at the end. How long is the essay in lines?",
        "A harbor shelters {a} boats. At dawn {b} boats sail away, and at dusk {c} boats arrive. What is the number of boats in the harbor at dusk?",
        "{n}'s playlist had {a} songs. {n} removed {b} songs and {m} recommended {c} songs, which {n} added. How many songs does the playlist have?",
    ),
    "sub-sub": (
        "A candle is {a} centimeters tall. It burns down by {b} centimeters on Monday and by {c} centimeters on Tuesday. How tall is it on Wednesday?",
        "The theater has {a} seats. {b} seats are reserved for the press and {c} seats are broken. How many seats can be sold?",
        "{n} is on stair {a} of a tower, goes down {b} stairs to take a picture and {c} stairs to meet {m}. On which stair does {n} meet {m}?",
        "A battery has {a} percent of its charge. A call takes {b} percent and a game takes {c} percent. What percentage is in the battery after both?",
    ),
    "mul-add": (
        "A mosaic has {a} stripes of {b} tiles, and its border has {c} tiles. How many tiles does the mosaic need?",
        "{n} does {b} push-ups in each of {a} breaks and {c} push-ups before bed. How many push-ups is that in one day?",
        "The parade has {a} wagons drawn by {b} horses each, and {c} horses walk behind. How many horses take part?",
        "A quiz gives {b} points for a right answer. {n} has {a} right answers and receives {c} bonus points. What is the result of {n}?",
    ),
    "mul-sub": (
        "A printer's tray fits {a} stacks of {b} envelopes, but {c} envelopes are torn. How many envelopes can be used?",
        "{n} downloads {a} seasons of a show with {b} episodes each and watches {c} episodes on the plane. How many episodes has {n} not seen?",
        "The orchard keeps {a} hives of {b} frames. {c} frames are empty. How many frames hold honey?",
        "At the fair {n} buys {a} strips of {b} ride coupons and uses {c} coupons. How many coupons can {n} still use?",
    ),
    "add-mul": (
        "A robot lifts {a} bricks with its left arm and {b} bricks with its right arm at a time. How many bricks does it lift in {c} turns?",
        "One kit consists of {a} screws and {b} nuts. {n} orders {c} kits. How many parts are delivered?",
        "A lamp has {a} white bulbs and {b} yellow bulbs. The hall has {c} such lamps. How many bulbs light the hall?",
        "On a round trip a truck drives {a} kilometers to the mine and {b} kilometers back by another road. How many kilometers does it drive on {c} round trips?",
    ),
    "sub-div": (
        "A tailor has {a} meters of cloth. {b} meters are stained, and the clean cloth is enough for exactly {c} curtains of the same length. How many meters long is each curtain?",
        "Of {a} guests {b} sit outside. Those inside sit at {c} tables, the same number at each. How many guests sit at a table inside?",
        "{n}'s video lasts {a} minutes. {n} cuts {b} minutes and divides what is kept into {c} parts of equal length. How many minutes does a part last?",
        "A ship loads {a} containers and {b} of them stand on deck. The others stand in {c} holds with equally many in each. How many containers are in one hold?",
    ),
}
HASH_FILE = Path(__file__).with_name("families.sha256")


def families_hash() -> str:
    """Return the sha256 of the test families and the training templates, with the ranges of their numbers."""
    ranges = {name: (one.first, one.second, one.a, one.b, one.c) for name, one in OPERATIONS.items()}
    return hashlib.sha256(json.dumps([FAMILIES, TRAIN_TEMPLATES, ranges], sort_keys=True).encode()).hexdigest()


def check_frozen() -> None:
    """Raise ValueError if a template is not what it was when the hash was committed."""
    frozen = HASH_FILE.read_text().split()[0]
    if families_hash() != frozen:
        raise ValueError(f"templates have changed since they were frozen: {families_hash()} is not {frozen}")


def held_out_problems(count: int, seed: int = 0) -> list[dict]:
    """Make problems of the held-out families, with the same number of each operation, in random order.

    Args:
        count: Number of problems.
        seed: Seed of the problems.

    Returns:
        Problems as :func:`bench.experiments.problems.make_problems` returns them.
    """
    rng, kinds = random.Random(f"{seed} families"), list(OPERATIONS)
    problems: dict[str, dict] = {}
    while len(problems) < count:
        problem = _draw(rng, kinds[len(problems) % len(kinds)])
        problems.setdefault(problem["instruction"], problem)
    shuffled = list(problems.values())
    rng.shuffle(shuffled)
    return shuffled


def _draw(rng: random.Random, kind: str) -> dict:
    operation = OPERATIONS[kind]
    while True:
        a, b, c = (rng.randint(*span) for span in (operation.a, operation.b, operation.c))
        worked = operation.work(a, b, c)
        if worked is not None and is_held_out(a, b, c):
            break
    steps, result = worked
    template = rng.choice(FAMILIES[kind])
    n, m = rng.sample(NAMES, 2)
    return {
        "instruction": template.format(n=n, m=m, t=rng.choice(THINGS), a=a, b=b, c=c),
        "output": f"{steps} The answer is {result}.",
        "answer": str(result),
        "template": template,
        "numbers": (a, b, c),
    }
