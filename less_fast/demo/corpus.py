"""The demo's corpus: a pool of mixed skills, held-out examples of the target skills, and text to pre-train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from less_fast.demo.skills_numbers import NUMBER_SKILLS
from less_fast.demo.skills_text import TEXT_SKILLS
from less_fast.errors import LessFastError

SKILLS: dict[str, Callable[[Random], tuple[str, str]]] = {**NUMBER_SKILLS, **TEXT_SKILLS}

POOL_SIZES: Mapping[str, int] = {
    "arithmetic": 320,
    "units": 240,
    "sequences": 240,
    "dates": 160,
    "sorting": 280,
    "strings": 280,
    "logic": 200,
    "tables": 240,
    "code": 160,
    "walks": 280,
}

TARGET_SKILLS = ("dates", "logic", "code")

_MAX_REPEATS = 10_000  # draws in a row without a new prompt after which a skill counts as exhausted


@dataclass(frozen=True)
class Corpus:
    """Three disjoint sets of examples; no prompt occurs twice, neither within a set nor across them.

    ``pool``: what is selected from, in random order. ``targets``: per target skill, the examples that say what to
    select for. ``pretraining``: what the demo's model reads before; other examples of all skills, in random order.
    """

    pool: list[dict[str, Any]]
    targets: dict[str, list[dict[str, Any]]]
    pretraining: list[dict[str, Any]]


def generate(n_per_skill: int | Mapping[str, int], seed: int) -> list[dict[str, Any]]:
    """Distinct examples of the skills, in random order: ``dataset`` (the skill), ``id`` and ``messages``.

    ``n_per_skill``: one number for every skill, or skill -> number. A pure function of its arguments.
    Raises LessFastError for an unknown skill, or where a skill has fewer distinct prompts than were asked for.
    """
    sizes = dict.fromkeys(SKILLS, n_per_skill) if isinstance(n_per_skill, int) else n_per_skill
    examples = [example for skill, n in sizes.items() for example in _generate_skill(skill, n, seed)]
    Random(f"{seed} order").shuffle(examples)
    return examples


def make_corpus(
    seed: int = 0,
    *,
    pool_sizes: Mapping[str, int] = POOL_SIZES,
    target_skills: tuple[str, ...] = TARGET_SKILLS,
    n_target: int = 16,
    n_pretraining: int = 600,
) -> Corpus:
    """The demo's corpus: ``pool_sizes`` examples, ``n_target`` per target skill, ``n_pretraining`` per skill."""
    pool, targets, pretraining = [], {}, []
    for skill, n_pool in pool_sizes.items():
        n_held_out = n_target if skill in target_skills else 0
        examples = _generate_skill(skill, n_pool + n_held_out + n_pretraining, seed)
        pool += examples[:n_pool]
        if n_held_out:
            targets[skill] = examples[n_pool : n_pool + n_held_out]
        pretraining += examples[n_pool + n_held_out :]
    rng = Random(f"{seed} order")
    rng.shuffle(pool)
    rng.shuffle(pretraining)
    return Corpus(pool, {skill: targets[skill] for skill in target_skills}, pretraining)


def _generate_skill(skill: str, n: int, seed: int) -> list[dict[str, Any]]:
    if skill not in SKILLS:
        raise LessFastError(f"unknown demo skill {skill!r}; expected one of {', '.join(SKILLS)}")
    rng = Random(f"{seed} {skill}")
    answers: dict[str, str] = {}
    repeats = 0
    while len(answers) < n:
        prompt, answer = SKILLS[skill](rng)
        repeats = repeats + 1 if prompt in answers else 0
        if repeats > _MAX_REPEATS:
            raise LessFastError(
                f"demo skill {skill!r} has only {len(answers)} distinct examples, not {n}; ask for fewer"
            )
        answers.setdefault(prompt, answer)
    return [
        {
            "dataset": skill,
            "id": f"{skill}_{index}",
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        }
        for index, (prompt, answer) in enumerate(answers.items())
    ]
