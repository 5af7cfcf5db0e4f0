"""Arithmetic word problems of two steps, with a worked answer. The demo reads some of them from a file of the package.

    python -m bench.experiments.problems      writes s2ft/train/problems.jsonl.gz, always the same rows

Training problems and held-out problems have no template in common and no combination of numbers. The templates are in
two lists, and each unordered triple of numbers belongs to one side only (`is_held_out`).
"""

# ruff: noqa: E501 - each template stays on one line

import gzip
import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

NAMES = (
    "Ava Ben Carla Daniel Elena Felix Grace Hassan Iris Jonas Kira Liam Maya Noah "
    "Olivia Pedro Quinn Rosa Samir Tara Umar Vera Walter Xenia Yusuf Zoe"
).split()
THINGS = (
    "apples marbles stickers pencils shells coins buttons cards stamps beads "
    "cookies books balloons crayons ribbons stones toys plums bottles badges"
).split()


@dataclass(frozen=True)
class Operation:
    """Two arithmetic steps over the numbers a, b and c.

    Attributes:
        first: Operator between a and b.
        second: Operator between the first result and c.
        a: Smallest and largest value of a.
        b: Smallest and largest value of b.
        c: Smallest and largest value of c.
    """

    first: str
    second: str
    a: tuple[int, int]
    b: tuple[int, int]
    c: tuple[int, int]

    def work(self, a: int, b: int, c: int) -> tuple[str, int] | None:
        """Return the worked steps and the result, or None if a step does not give a positive whole number."""
        steps, value = [], a
        for sign, number in ((self.first, b), (self.second, c)):
            result = _apply(value, sign, number)
            if result is None:
                return None
            steps.append(f"{value} {sign} {number} = {result}.")
            value = result
        return " ".join(steps), value


def _apply(left: int, sign: str, right: int) -> int | None:
    if sign == "/":
        return left // right if left % right == 0 else None
    result = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return result if result > 0 else None


OPERATIONS = {
    "add-add": Operation("+", "+", (2, 20), (2, 20), (2, 20)),
    "add-sub": Operation("+", "-", (2, 20), (2, 20), (2, 20)),
    "sub-add": Operation("-", "+", (8, 30), (2, 20), (2, 20)),
    "sub-sub": Operation("-", "-", (15, 40), (2, 15), (2, 15)),
    "mul-add": Operation("*", "+", (2, 9), (2, 9), (2, 20)),
    "mul-sub": Operation("*", "-", (2, 9), (2, 9), (2, 20)),
    "add-mul": Operation("+", "*", (2, 9), (2, 9), (2, 5)),
    "sub-div": Operation("-", "/", (8, 30), (2, 12), (2, 6)),
}

TRAIN_TEMPLATES: dict[str, tuple[str, ...]] = {
    "add-add": (
        "{n} has {a} {t}. {m} gives {n} {b} more, and then {n} buys another {c}. How many {t} does {n} have now?",
        "There are {a} {t} in a red box, {b} {t} in a blue box and {c} {t} in a green box. How many {t} are there in all?",
        "{n} read {a} pages on Monday, {b} pages on Tuesday and {c} pages on Wednesday. How many pages did {n} read altogether?",
        "A bus starts with {a} passengers. At the first stop {b} people get on, and at the second stop {c} more get on. How many passengers are on the bus?",
        "{n} spends {a} dollars on a hat, {b} dollars on a scarf and {c} dollars on lunch. How many dollars does {n} spend in total?",
        "{n} collects {a} {t}, {m} collects {b} {t} and their friend collects {c} {t}. How many {t} do they collect together?",
        "A plane climbs {a} meters, then {b} meters and then {c} meters more. How many meters does it climb in total?",
        "{n} scores {a} points in the first game, {b} points in the second game and {c} points in the third game. What is {n}'s total score?",
    ),
    "add-sub": (
        "{n} has {a} {t} and finds {b} more. Then {n} gives {c} {t} to {m}. How many {t} does {n} have left?",
        "A shop has {a} {t} on the shelf. {b} more {t} are delivered, and then {c} {t} are sold. How many {t} are left in the shop?",
        "{n} saved {a} dollars in May and {b} dollars in June. In July {n} spent {c} dollars. How many dollars are left?",
        "There were {a} birds in a tree. {b} more birds came, and later {c} birds flew away. How many birds are in the tree now?",
        "{n} picked {a} {t} and {m} picked {b} {t}. Together they lost {c} of them. How many {t} do they still have?",
        "A ferry carries {a} trucks. At the next port {b} trucks roll on and {c} trucks roll off. How many trucks are on the ferry now?",
        "{n} cooks {a} pancakes and then {b} more. The family eats {c} pancakes. How many pancakes remain?",
        "A pond has {a} ducks. {b} ducks join them, and after a while {c} ducks leave. How many ducks are in the pond?",
    ),
    "sub-add": (
        "{n} had {a} {t}. {n} gave {b} of them to {m} and then bought {c} new ones. How many {t} does {n} have now?",
        "A jar holds {a} {t}. {n} takes out {b} {t}, and {m} puts {c} {t} in. How many {t} are in the jar?",
        "There are {a} children in a room. {b} children leave and {c} other children come in. How many children are in the room now?",
        "{n} has {a} dollars. {n} pays {b} dollars for a ticket and then earns {c} dollars. How many dollars does {n} have now?",
        "A baker had {a} loaves. He sold {b} loaves and baked {c} more. How many loaves does the baker have now?",
        "A museum has {a} paintings. It lends out {b} paintings and later gets {c} paintings back. How many paintings are in the museum now?",
        "{n} grew {a} {t}, sold {b} at school, and found {c} more in the evening. How many {t} does {n} have at the end?",
        "The temperature is {a} degrees. It falls by {b} degrees at night and rises by {c} degrees in the morning. What is the temperature then?",
    ),
    "sub-sub": (
        "{n} has {a} {t}. {n} gives {b} to {m} and loses {c}. How many {t} are left?",
        "A train carries {a} people. {b} people get off at the first stop and {c} get off at the second stop. How many people are still on the train?",
        "{n} has {a} dollars, spends {b} dollars on a book and {c} dollars on a pen. How many dollars does {n} have left?",
        "There were {a} {t} on a table. {n} took {b} of them and {m} took {c} of them. How many {t} are still on the table?",
        "A farmer had {a} eggs. She broke {b} eggs and sold {c} eggs. How many eggs does the farmer have left?",
        "A barrel contains {a} gallons of oil. {b} gallons are used on Friday and {c} gallons on Saturday. How many gallons remain?",
        "{n} begins a quiz with {a} points, misses a question and loses {b} points, then loses {c} points more. How many points does {n} have left?",
        "A rope is {a} feet long. {n} cuts off {b} feet and {m} cuts off {c} feet. How many feet of rope remain?",
    ),
    "mul-add": (
        "{n} has {a} boxes with {b} {t} in each box. {m} gives {n} {c} more {t}. How many {t} does {n} have in all?",
        "There are {a} tables with {b} chairs each, and {c} more chairs along the wall. How many chairs are there altogether?",
        "{n} buys {a} tickets for {b} dollars each and a drink for {c} dollars. How many dollars does {n} pay in total?",
        "A garden has {a} rows of {b} flowers. {n} plants {c} more flowers. How many flowers are in the garden now?",
        "{n} runs {b} miles a day for {a} days and then walks {c} miles. How many miles does {n} go altogether?",
        "A school has {a} halls with {b} classrooms in each hall and {c} extra classrooms outside. How many classrooms does the school have?",
        "{n} packs {a} suitcases with {b} shirts each and carries {c} shirts in a bag. How many shirts does {n} carry altogether?",
        "A zoo has {a} cages with {b} monkeys in each cage and {c} monkeys outdoors. How many monkeys does the zoo have?",
    ),
    "mul-sub": (
        "{n} has {a} bags with {b} {t} in each bag. {n} gives away {c} {t}. How many {t} are left?",
        "{n} works {a} hours and earns {b} dollars an hour. Then {n} spends {c} dollars. How many dollars does {n} have left?",
        "There are {a} shelves with {b} books on each shelf. {c} books are borrowed. How many books remain on the shelves?",
        "A cook buys {a} cartons of {b} eggs and uses {c} eggs. How many eggs does the cook have left?",
        "{n} makes {a} plates with {b} cookies on each plate. The guests eat {c} cookies. How many cookies remain?",
        "{n} opens {a} boxes of {b} crackers. The dog eats {c} crackers. How many crackers does {n} still have?",
        "A gardener plants {a} beds of {b} tulips. Rabbits destroy {c} tulips. How many tulips are still there?",
        "{m} brings {a} crates with {b} {t} in each crate, but {c} {t} are broken. How many {t} are not broken?",
    ),
    "add-mul": (
        "Each bag holds {a} red {t} and {b} blue {t}. {n} has {c} bags. How many {t} does {n} have in all?",
        "{n} reads {a} pages in the morning and {b} pages in the evening every day. How many pages does {n} read in {c} days?",
        "A meal costs {a} dollars and a drink costs {b} dollars. {n} buys a meal and a drink for each of {c} friends. How many dollars does {n} pay?",
        "Every team has {a} girls and {b} boys. How many children are there in {c} teams?",
        "{n} puts {a} {t} and {m} puts {b} {t} into every box. How many {t} are there in {c} boxes?",
        "Every morning {n} walks {a} blocks to work and {b} blocks to the gym. How many blocks does {n} walk in {c} mornings?",
        "A basket contains {a} lemons and {b} limes. How many fruits are there in {c} such baskets?",
        "Each week {n} writes {a} letters to friends and {b} letters to family. How many letters does {n} write in {c} weeks?",
    ),
    "sub-div": (
        "{n} has {a} {t}. {n} keeps {b} and shares the rest equally among {c} friends. How many {t} does each friend get?",
        "A baker makes {a} rolls and sells {b} of them. The remaining rolls go into {c} equal bags. How many rolls are in each bag?",
        "{n} had {a} dollars and spent {b} dollars. The rest is split equally over {c} days. How many dollars can {n} spend each day?",
        "There are {a} children in a class and {b} are ill. The others form {c} equal teams. How many children are in each team?",
        "{n} picked {a} {t} and threw away {b} bad ones. The good ones were put equally into {c} baskets. How many {t} are in each basket?",
        "A baker has {a} buns. {b} buns are burned. The good buns are put into {c} equal boxes. How many buns are in each box?",
        "{n} received {a} {t} and gave {b} to {m}. The {t} that remained were split evenly among {c} children. How many {t} did each child get?",
        "A farmer has {a} pumpkins and {b} of them are rotten. The other pumpkins are loaded equally onto {c} carts. How many pumpkins are on each cart?",
    ),
}

HELD_OUT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "add-add": (
        "A fisherman catches {a} fish in the morning, {b} fish at noon and {c} fish at night. What is the total number of fish he catches?",
        "{n} owns {a} {t}. On a birthday {n} receives {b} {t} from an aunt and {c} {t} from an uncle. How many {t} does {n} own after the birthday?",
    ),
    "add-sub": (
        "A parking lot has {a} cars. {b} cars drive in and after an hour {c} cars drive out. How many cars are in the parking lot?",
        "{n} bakes {a} muffins and {m} bakes {b} muffins. The neighbors eat {c} muffins. How many muffins remain?",
    ),
    "sub-add": (
        "A library has {a} comics. Visitors borrow {b} comics and later return {c} comics. How many comics are in the library now?",
        "{n} collected {a} {t}, sold {b} at the market, and collected {c} more on the way home. How many {t} does {n} have at the end?",
    ),
    "sub-sub": (
        "A water tank holds {a} liters. {b} liters are used for cooking and {c} liters for washing. How many liters remain in the tank?",
        "{n} starts a game with {a} points. {n} drops {b} points in the first round and {c} points in the second round. How many points are left?",
    ),
    "mul-add": (
        "A hotel has {a} floors with {b} rooms on each floor and {c} extra rooms in the garden. How many rooms does the hotel have?",
        "{n} fills {a} albums with {b} photos each and hangs {c} photos on the wall. How many photos does {n} use altogether?",
    ),
    "mul-sub": (
        "{n} buys {a} packs of {b} candles. {c} candles are burned at a party. How many candles does {n} still have?",
        "A farmer plants {a} rows of {b} trees. A storm destroys {c} trees. How many trees are still standing?",
    ),
    "add-mul": (
        "A gift contains {a} chocolates and {b} caramels. How many sweets are there in {c} such gifts?",
        "Each day {n} swims {a} laps before school and {b} laps after school. How many laps does {n} swim in {c} days?",
    ),
    "sub-div": (
        "A florist has {a} roses. {b} roses are wilted. The fresh roses are tied into {c} equal bunches. How many roses are in each bunch?",
        "{n} bought {a} {t} and lost {b} on the way. The {t} that were left were divided equally between {c} cousins. How many {t} did each cousin receive?",
    ),
}


def is_held_out(a: int, b: int, c: int) -> bool:
    """Whether a combination of numbers, in any order, belongs to the held-out side. One in four does."""
    return zlib.crc32(repr(sorted((a, b, c))).encode()) % 4 == 0


def _draw(rng: random.Random, templates: dict[str, tuple[str, ...]], held_out: bool, kind: str) -> dict:
    operation = OPERATIONS[kind]
    while True:
        a, b, c = (rng.randint(*span) for span in (operation.a, operation.b, operation.c))
        worked = operation.work(a, b, c)
        if worked is not None and is_held_out(a, b, c) == held_out:
            break
    template = rng.choice(templates[kind])
    n, m = rng.sample(NAMES, 2)
    steps, result = worked
    return {
        "instruction": template.format(n=n, m=m, t=rng.choice(THINGS), a=a, b=b, c=c),
        "output": f"{steps} The answer is {result}.",
        "answer": str(result),
        "template": template,
        "numbers": (a, b, c),
    }


def make_problems(count: int, held_out: bool, seed: int = 0) -> list[dict]:
    """Make different problems in random order, with the same number of each operation.

    Args:
        count: Number of problems.
        held_out: Whether to make held-out problems.
        seed: Seed of the problems and of their order.

    Returns:
        Problems with the keys `instruction`, `output` (the worked answer), `answer`, `template` and `numbers`.

    Example:
        >>> from bench.experiments.problems import make_problems
        >>> problem = make_problems(1, held_out=False)[0]
        >>> problem["output"].endswith(f"The answer is {problem['answer']}.")
        True
    """
    rng = random.Random(f"{seed} {'held-out' if held_out else 'train'}")
    templates = HELD_OUT_TEMPLATES if held_out else TRAIN_TEMPLATES
    kinds = list(OPERATIONS)
    problems: dict[str, dict] = {}
    while len(problems) < count:
        problem = _draw(rng, templates, held_out, kinds[len(problems) % len(kinds)])
        problems.setdefault(problem["instruction"], problem)
    shuffled = list(problems.values())
    rng.shuffle(shuffled)
    return shuffled


def demo_file() -> bytes:
    """Return the content of the demo's file: 1,024 problems to train on, then 96 held-out ones."""
    rows = [
        {**{key: one[key] for key in ("instruction", "output", "answer")}, "held_out": held_out}
        for count, held_out in ((1024, False), (96, True))
        for one in make_problems(count, held_out)
    ]
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)


if __name__ == "__main__":
    (Path(__file__).parents[2] / "s2ft" / "train" / "problems.jsonl.gz").write_bytes(demo_file())
