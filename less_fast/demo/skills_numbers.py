"""The demo's skills about quantities: arithmetic stories, unit conversion, number sequences, date reckoning.

A skill is a function from a random generator to (prompt, answer); the answer shows its working in one short line.
"""

from __future__ import annotations

from datetime import date, timedelta
from random import Random

NAMES = (
    "Ada", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mira",
    "Noah", "Olga", "Pablo", "Quinn", "Rosa", "Samir", "Tara", "Uma", "Viktor", "Wanda", "Yusuf", "Zoe",
)  # fmt: skip
THINGS = (
    "apples", "marbles", "stamps", "pencils", "cookies", "shells", "stickers", "oranges", "buttons", "coins", "cards",
    "eggs", "books", "candles", "beads", "tickets",
)  # fmt: skip

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

# Size of each unit in the smallest one of its kind.
UNITS: dict[str, dict[str, int]] = {
    "length": {"mm": 1, "cm": 10, "m": 1000, "km": 1_000_000},
    "mass": {"g": 1, "kg": 1000, "tonnes": 1_000_000},
    "time": {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400},
    "volume": {"ml": 1, "cl": 10, "litres": 1000},
    "imperial": {"inches": 1, "feet": 12, "yards": 36},
    "data": {"bytes": 1, "kB": 1000, "MB": 1_000_000},
}
SINGULAR = {"feet": "foot", "inches": "inch"}


def counted(count: int, plural: str) -> str:
    """A number with its noun, singular for one: ``1 step``, ``2 steps``."""
    return f"{count} {SINGULAR.get(plural, plural.removesuffix('s')) if count == 1 else plural}"


def arithmetic(rng: Random) -> tuple[str, str]:
    """A story of one or two steps in whole numbers."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    a, b, c = rng.randint(12, 90), rng.randint(2, 12), rng.randint(2, 9)
    total = a + b + c
    prompt, working, result = rng.choice(
        (
            (
                f"{name} has {a} {thing}. {other} gives {name} {b} more, and then {name} finds another {c}. "
                f"How many {thing} does {name} have now?",
                f"{a} + {b} = {a + b}, {a + b} + {c} = {total}",
                f"{name} has {total} {thing}",
            ),
            (
                f"A box holds {b} {thing}. {name} buys {c} boxes and already had {a} {thing}. How many is that in all?",
                f"{b} * {c} = {b * c}, {b * c} + {a} = {b * c + a}",
                f"{name} has {b * c + a} {thing}",
            ),
            (
                f"{name} starts the day with {a + b * c} {thing} and sells {b} of them to each of {c} customers. "
                f"How many {thing} are left?",
                f"{b} * {c} = {b * c}, {a + b * c} - {b * c} = {a}",
                f"{a} {thing} are left",
            ),
            (
                f"{name} shares {b * c} {thing} equally among {c} friends. How many {thing} does each friend get?",
                f"{b * c} / {c} = {b}",
                f"each friend gets {b} {thing}",
            ),
            (
                f"Each ticket costs {b} dollars. {name} pays for {c} tickets with a {a + b * c} dollar voucher. "
                "What is left on the voucher?",
                f"{b} * {c} = {b * c}, {a + b * c} - {b * c} = {a}",
                f"{a} dollars are left",
            ),
            (
                f"{name} collected {a} {thing} and {other} collected {b} fewer. How many do they have together?",
                f"{a} - {b} = {a - b}, {a} + {a - b} = {2 * a - b}",
                f"they have {2 * a - b} {thing}",
            ),
        )
    )
    return prompt, f"{working}. So {result}."


def units(rng: Random) -> tuple[str, str]:
    """A whole number of one unit in another unit of the same kind."""
    table = UNITS[rng.choice(sorted(UNITS))]
    small, large = sorted(rng.sample(sorted(table), 2), key=table.__getitem__)
    factor = table[large] // table[small]
    count = rng.randint(2, 60)
    source, target = f"{count} {large}", f"{count * factor} {small}"
    rule = f"{counted(1, large)} is {factor} {small}"
    working = f"{rule}, and {count} * {factor} = {count * factor}"
    if rng.random() < 0.4:
        source, target = target, source
        working = f"{rule}, and {count * factor} / {factor} = {count}"
    unit = target.split()[1]
    prompt = rng.choice(
        (
            f"Convert {source} to {unit}.",
            f"How many {unit} are there in {source}?",
            f"Express {source} in {unit}.",
            f"A label says {source}. What would it say in {unit}?",
            f"{rng.choice(NAMES)} measured {source}. Give the same amount in {unit}.",
        )
    )
    return prompt, f"{working}. That makes {target}."


def sequences(rng: Random) -> tuple[str, str]:
    """The next term of an arithmetic, geometric, square or alternating sequence."""
    start, step, length = rng.randint(1, 40), rng.randint(2, 15), rng.randint(4, 6)
    family = rng.choice(("add", "subtract", "double", "squares", "alternate"))
    if family == "add":
        terms, rule = [start + step * i for i in range(length + 1)], f"each term adds {step}"
    elif family == "subtract":
        first = start + step * length
        terms, rule = [first - step * i for i in range(length + 1)], f"each term subtracts {step}"
    elif family == "double":
        terms, rule = [(start % 9 + 1) * 2**i for i in range(length + 1)], "each term is twice the one before"
    elif family == "squares":
        terms, rule = [(start + i) ** 2 for i in range(length + 1)], f"these are the squares from {start}"
    else:
        terms = [start + (i % 2) * step for i in range(length + 1)]
        rule = f"the terms alternate between {start} and {start + step}"
    shown = ", ".join(str(term) for term in terms[:-1])
    prompt = rng.choice(
        (
            f"What comes next: {shown}, ...?",
            f"Continue the sequence {shown}.",
            f"Find the next number after {shown}.",
            f"{rng.choice(NAMES)} wrote down {shown}. Which number follows?",
            f"Here is a pattern: {shown}. Give its next term.",
        )
    )
    return prompt, f"The rule: {rule}. Next is {terms[-1]}."


def _spoken(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def dates(rng: Random) -> tuple[str, str]:
    """Weekdays and dates some days away, and the days between two dates."""
    day = date(2001, 1, 1) + timedelta(days=rng.randrange(12000))
    shift = rng.randint(2, 45)
    later = day + timedelta(days=shift)
    weekday, later_weekday = WEEKDAYS[day.weekday()], WEEKDAYS[later.weekday()]
    name = rng.choice(NAMES)
    return rng.choice(
        (
            (
                f"Today is {weekday}. Which day of the week is it in {shift} days?",
                f"{shift} days leave {shift % 7} after whole weeks. It is {later_weekday}.",
            ),
            (
                f"{name} books a trip on {_spoken(day)}. It starts {shift} days later. On which date?",
                f"{shift} days after {_spoken(day)} is {_spoken(later)}.",
            ),
            (
                f"What date was it {shift} days before {_spoken(later)}?",
                f"{shift} days before {_spoken(later)} is {_spoken(day)}.",
            ),
            (
                f"How many days are there from {_spoken(day)} to {_spoken(later)}?",
                f"From {_spoken(day)} to {_spoken(later)} there are {shift} days.",
            ),
            (
                f"{_spoken(day)} was a {weekday}. What weekday was {_spoken(later)}?",
                f"That is {shift} days later, {shift % 7} after whole weeks. It was a {later_weekday}.",
            ),
        )
    )


NUMBER_SKILLS = {"arithmetic": arithmetic, "units": units, "sequences": sequences, "dates": dates}
