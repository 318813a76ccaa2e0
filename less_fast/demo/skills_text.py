"""The demo's skills about words and rules: sorting, string editing, boolean logic, table lookup, code traces, walks.

A skill is a function from a random generator to (prompt, answer); the answer shows its working in one short line.
"""

from __future__ import annotations

from random import Random

from less_fast.demo.skills_numbers import NAMES, THINGS, counted

WORDS = (
    "lamp", "river", "stone", "cloud", "violin", "garden", "pepper", "window", "basket", "copper", "dragon", "island",
    "jungle", "kettle", "ladder", "mirror", "needle", "orchid", "pencil", "rabbit", "saddle", "timber", "velvet",
    "walnut", "yellow", "anchor", "bridge", "candle", "desert", "engine", "falcon", "goblet", "hammer", "insect",
    "jacket", "lantern", "meadow",
)  # fmt: skip
ROOMS = ("kitchen", "attic", "garage", "cellar", "library", "office", "shed", "studio")
MOVES = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


def sorting(rng: Random) -> tuple[str, str]:
    """A short list of numbers or words put in order."""
    numeric, reverse = rng.random() < 0.5, rng.random() < 0.4
    size = rng.randint(4, 6)
    items: list[int] | list[str] = rng.sample(range(1, 100), size) if numeric else rng.sample(WORDS, size)
    shown = ", ".join(str(item) for item in items)
    if numeric:
        order = "from largest to smallest" if reverse else "from smallest to largest"
    else:
        order = "in reverse alphabetical order" if reverse else "in alphabetical order"
    prompt = rng.choice(
        (
            f"Sort {order}: {shown}",
            f"Put these {order}: {shown}",
            f"Arrange the list {order}. List: {shown}",
            f"{rng.choice(NAMES)} wants the following {order}: {shown}",
        )
    )
    ordered = sorted(items, reverse=reverse)
    return prompt, "Sorted: " + ", ".join(str(item) for item in ordered)


def strings(rng: Random) -> tuple[str, str]:
    """One edit of a word or of a few words."""
    word = rng.choice(WORDS)
    phrase = rng.sample(WORDS, 3)
    letter = rng.choice(sorted(set(word)))
    count = rng.randint(2, 4)
    instruction, result = rng.choice(
        (
            (f'reverse the letters of "{word}"', word[::-1]),
            (f'write "{" ".join(phrase)}" in capital letters', " ".join(phrase).upper()),
            (f'remove every "{letter}" from "{word}"', word.replace(letter, "")),
            (f'replace each "{letter}" by "*" in "{word}"', word.replace(letter, "*")),
            (f'give the first {count} letters of "{word}"', word[:count]),
            (f'give the last {count} letters of "{word}"', word[-count:]),
            (f'join the words "{" ".join(phrase)}" with hyphens', "-".join(phrase)),
            (f'reverse the order of the words "{" ".join(phrase)}"', " ".join(phrase[::-1])),
        )
    )
    prompt = rng.choice(
        (
            f"Please {instruction}.",
            f"{instruction[0].upper()}{instruction[1:]}.",
            f"Text editing task: {instruction}.",
            f"Can you {instruction}?",
        )
    )
    return prompt, f'The edited text is "{result}".'


def _formula(rng: Random, depth: int, variables: dict[str, bool]) -> tuple[str, bool]:
    if depth == 0:
        name = rng.choice(sorted(variables))
        return (name, variables[name]) if rng.random() < 0.7 else (f"not {name}", not variables[name])
    left, left_value = _formula(rng, depth - 1, variables)
    right, right_value = _formula(rng, 0, variables)
    if depth > 1:
        left = f"({left})"
    if rng.random() < 0.5:
        return f"{left} and {right}", left_value and right_value
    return f"{left} or {right}", left_value or right_value


def logic(rng: Random) -> tuple[str, str]:
    """The truth value of a small formula."""
    names = rng.choice((("p", "q"), ("a", "b", "c"), ("x", "y", "z")))
    variables = {name: rng.random() < 0.5 for name in names}
    formula, value = _formula(rng, rng.randint(1, 2), variables)
    facts = ", ".join(f"{name} is {str(truth).lower()}" for name, truth in variables.items())
    prompt = rng.choice(
        (
            f"Suppose {facts}. Is this true or false: {formula}",
            f"Given that {facts}, evaluate: {formula}",
            f"Boolean logic. {facts}. What is the value of: {formula}",
            f"If {facts}, then what is the truth value of: {formula}",
        )
    )
    return prompt, f"With {facts}, the expression {formula} is {str(value).lower()}."


def tables(rng: Random) -> tuple[str, str]:
    """A cell, a total or an extreme read from a small table."""
    people, things = rng.sample(NAMES, 3), rng.sample(THINGS, 2)
    values = rng.sample(range(1, 60), 6)
    rows = {person: values[2 * i : 2 * i + 2] for i, person in enumerate(people)}
    table = "\n".join([" | ".join(["name", *things]), *(f"{p} | {r[0]} | {r[1]}" for p, r in rows.items())])
    person, column = rng.choice(people), rng.randrange(2)
    thing = things[column]
    best = max(people, key=lambda p: rows[p][column])
    cells = [rows[p][column] for p in people]
    question, answer = rng.choice(
        (
            (f"How many {thing} does {person} have?", f"The row of {person} says {rows[person][column]} {thing}."),
            (f"Who has the most {thing}?", f"The largest number of {thing} is {max(cells)}, in the row of {best}."),
            (
                f"What is the total of the column {thing}?",
                f"{' + '.join(str(cell) for cell in cells)} = {sum(cells)} {thing}.",
            ),
        )
    )
    intro = rng.choice(("Look at the table.", "Use this table:", "Read the data below.", "Here is a small table."))
    prompt = f"{intro}\n{table}\n{question}" if rng.random() < 0.6 else f"{question} {intro}\n{table}"
    return prompt, answer


def code(rng: Random) -> tuple[str, str]:
    """What a few lines of Python print."""
    a, b, n = rng.randint(1, 20), rng.randint(2, 9), rng.randint(2, 5)
    name, other = rng.sample(("x", "total", "n", "count", "value", "k"), 2)
    numbers = rng.sample(range(1, 30), n)
    word = rng.choice(WORDS)
    program, working, printed = rng.choice(
        (
            (f"{name} = {a}\nfor i in range({n}):\n    {name} += {b}\nprint({name})", f"{a} + {n} * {b}", a + n * b),
            (f"{name} = {a}\n{other} = {name} * {b}\nprint({other} - {n})", f"{a} * {b} - {n}", a * b - n),
            (
                f"{name} = 0\nfor v in {numbers}:\n    {name} += v\nprint({name})",
                " + ".join(str(number) for number in numbers),
                sum(numbers),
            ),
            (
                f"{name} = {a}\nif {name} > {n * b}:\n    {name} -= {b}\nelse:\n    {name} += {b}\nprint({name})",
                f"{a} {'-' if a > n * b else '+'} {b}",
                a - b if a > n * b else a + b,
            ),
            (f'{name} = "{word}"\nprint(len({name}) + {b})', f"{len(word)} + {b}", len(word) + b),
        )
    )
    question = rng.choice(
        (
            "What does this code print?",
            "Trace this program. What is its output?",
            "What is printed?",
            "Run by hand:",
        )
    )
    return f"{question}\n{program}", f"It computes {working} and prints {printed}."


def walks(rng: Random) -> tuple[str, str]:
    """Where a walk along the compass ends, as steps from the start."""
    legs = [(rng.choice(sorted(MOVES)), rng.randint(1, 12)) for _ in range(rng.randint(2, 4))]
    x = sum(MOVES[direction][0] * steps for direction, steps in legs)
    y = sum(MOVES[direction][1] * steps for direction, steps in legs)
    path = ", then ".join(f"{counted(steps, 'steps')} {direction}" for direction, steps in legs)
    parts = [
        f"{counted(abs(offset), 'steps')} {positive if offset > 0 else negative}"
        for offset, positive, negative in ((y, "north", "south"), (x, "east", "west"))
        if offset
    ]
    name, room = rng.choice(NAMES), rng.choice(ROOMS)
    prompt = rng.choice(
        (
            f"{name} leaves the {room} and walks {path}. Where is {name} now, seen from the {room}?",
            f"Starting at the {room}, a robot goes {path}. Give its final position.",
            f"A dog runs {path} from the {room}. How far from the {room} does it end up, and in which directions?",
        )
    )
    if not parts:
        return prompt, f"The walk ends exactly at the {room}."
    return prompt, f"The end of the walk is {' and '.join(parts)} from the {room}."


TEXT_SKILLS = {
    "sorting": sorting,
    "strings": strings,
    "logic": logic,
    "tables": tables,
    "code": code,
    "walks": walks,
}
