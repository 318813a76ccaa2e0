"""The demo's corpus, tokenizer and model; every answer is worked out again from the text of its prompt."""

from __future__ import annotations

import contextlib
import datetime
import io
import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from less_fast.data import load_examples
from less_fast.demo.corpus import POOL_SIZES, SKILLS, TARGET_SKILLS, generate, make_corpus
from less_fast.demo.model import plain_text, train_model, train_tokenizer
from less_fast.errors import LessFastError

N_CHECKED = 400  # examples per skill whose answers are worked out again


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(0)


def _turns(example: dict[str, Any]) -> tuple[str, str]:
    user, assistant = example["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _check_arithmetic(prompt: str, answer: str) -> None:
    working, conclusion = answer.split(". So ")
    given = Counter(_numbers(prompt))
    known = set(given)
    for equation in working.split(", "):
        left, right = equation.split(" = ")
        operands = set(_numbers(left))
        assert operands <= known and eval(left) == int(right)
        known |= {int(right)}
    assert _numbers(conclusion) == [int(right)]
    # Every number of the story is used.
    assert set(given) <= set(_numbers(working))
    verbs = {"fewer": "-", "more": "+", "sells": "*", "shares": "/", "boxes": "*", "costs": "*"}
    for word, sign in verbs.items():
        if re.search(rf"\b{word}\b", prompt):
            assert f" {sign} " in working


_IN_SMALLEST = {
    "mm": 0.001, "cm": 0.01, "m": 1, "km": 1000,
    "g": 1, "kg": 1e3, "tonne": 1e6,
    "second": 1, "minute": 60, "hour": 3600, "day": 24 * 3600,
    "ml": 0.001, "cl": 0.01, "litre": 1,
    "inch": 2.54, "inche": 2.54, "foot": 30.48, "feet": 30.48, "yard": 91.44,
    "byte": 1, "kB": 1e3, "MB": 1e6,
}  # fmt: skip


def _size(quantity: str) -> float:
    number, unit = quantity.split()
    return int(number) * _IN_SMALLEST[unit.removesuffix("s")]


def _check_units(prompt: str, answer: str) -> None:
    (given,) = re.findall(r"\d+ [A-Za-z]+", prompt)
    rule, working, result = re.fullmatch(r"(.+), and (.+)\. That makes (.+)\.", answer).groups()
    assert _size(result) == pytest.approx(_size(given))
    left, right = rule.split(" is ")
    assert _size(left) == pytest.approx(_size(right))
    product, value = working.split(" = ")
    assert eval(product) == int(value) == int(result.split()[0])
    unit = result.split()[1]
    assert re.search(rf"\b{unit}\b", prompt.replace(given, ""))


def _check_sequences(prompt: str, answer: str) -> None:
    terms = _numbers(prompt)
    n = int(re.search(r"Next is (\d+)\.", answer)[1])
    steps = {b - a for a, b in pairwise(terms)}
    ratios = {b / a for a, b in pairwise(terms)}
    roots = [math.isqrt(term) for term in terms]
    candidates = []
    if len(steps) == 1:
        candidates.append(terms[-1] + steps.pop())
    if ratios == {2.0}:
        candidates.append(2 * terms[-1])
    if terms[0] == terms[2] and terms[1] == terms[3]:
        candidates.append(terms[-2])
    if [root * root for root in roots] == terms and {b - a for a, b in pairwise(roots)} == {1}:
        candidates.append((roots[-1] + 1) ** 2)
    assert candidates == [n]


def _dates(text: str) -> list[datetime.date]:
    found = re.findall(r"\d{1,2} [A-Z][a-z]+ \d{4}", text)
    return [datetime.datetime.strptime(spoken, "%d %B %Y").date() for spoken in found]


def _check_dates(prompt: str, answer: str) -> None:
    days, answered = _dates(prompt), _dates(answer)
    shift = re.search(r"(\d+) days", prompt)
    weekdays = re.findall(r"[A-Z][a-z]+day", prompt.replace("Today", ""))
    if len(days) == 2 and not weekdays:
        assert int(re.search(r"(\d+) days", answer)[1]) == (days[1] - days[0]).days
    elif len(days) == 2:
        assert days[0].strftime("%A") == weekdays[0]
        assert answer.endswith(f" {days[1].strftime('%A')}.")
    elif len(days) == 1:
        sign = -1 if "before" in prompt else 1
        assert answered[-1] == days[0] + sign * datetime.timedelta(days=int(shift[1]))
    else:
        monday = datetime.date(2024, 1, 1)
        start = next(day for k in range(7) if (day := monday + datetime.timedelta(k)).strftime("%A") == weekdays[0])
        assert answer.endswith(f" {(start + datetime.timedelta(days=int(shift[1]))).strftime('%A')}.")


def _check_sorting(prompt: str, answer: str) -> None:
    items = prompt.rpartition(": ")[2].split(", ")
    if items[0].isdigit():
        ordered = sorted(items, key=int, reverse="largest to smallest" in prompt)
    else:
        ordered = sorted(items, reverse="reverse" in prompt)
    assert answer == "Sorted: " + ", ".join(ordered)


def _check_strings(prompt: str, answer: str) -> None:
    quoted = re.findall(r'"([^"]+)"', prompt)
    text, count = quoted[-1], int(found[0]) if (found := re.findall(r"\d", prompt)) else 0
    lower = prompt.lower()
    if "reverse the order" in lower:
        expected = " ".join(reversed(text.split()))
    elif "reverse the letters" in lower:
        expected = "".join(reversed(text))
    elif "capital" in lower:
        (text,) = quoted
        expected = text.upper()
    elif "remove every" in lower:
        expected = "".join(letter for letter in text if letter != quoted[0])
    elif "replace each" in lower:
        letter, by, text = quoted
        expected = "".join(by if character == letter else character for character in text)
    elif "first" in lower:
        expected = "".join(text[k] for k in range(count))
    elif "last" in lower:
        expected = "".join(text[k] for k in range(len(text) - count, len(text)))
    else:
        assert "hyphens" in lower
        expected = re.sub(" ", "-", text)
    assert answer == f'The edited text is "{expected}".'


def _check_logic(prompt: str, answer: str) -> None:
    facts = {name: value == "true" for name, value in re.findall(r"\b([a-z]) is (true|false)", prompt)}
    value = eval(prompt.rpartition(": ")[2], {}, facts)
    assert answer.endswith(f" is {'true' if value else 'false'}.")


def _check_tables(prompt: str, answer: str) -> None:
    header, *rows = [line.split(" | ") for line in prompt.splitlines() if " | " in line]
    column = next(k for k, name in enumerate(header) if k and re.search(rf"\b{name}\b", re.sub(r".*\|.*", "", prompt)))
    cells = {row[0]: int(row[column]) for row in rows}
    if "Who has the most" in prompt:
        assert re.search(r"row of (\w+)", answer)[1] == max(cells, key=cells.__getitem__)
        assert _numbers(answer) == [max(cells.values())]
    elif "total" in prompt:
        assert _numbers(answer) == [*cells.values(), sum(cells.values())]
    else:
        person = re.search(r"does (\w+) have", prompt)[1]
        assert person in answer and _numbers(answer) == [cells[person]]


def _check_code(prompt: str, answer: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(prompt.partition("\n")[2], {})
    working, result = re.fullmatch(r"It computes (.+) and prints (-?\d+)\.", answer).groups()
    assert int(result) == int(printed.getvalue()) == eval(working)


def _check_walks(prompt: str, answer: str) -> None:
    def position(text: str) -> complex:
        unit = {"north": 1j, "south": -1j, "east": 1, "west": -1}
        return sum(int(n) * unit[way] for n, way in re.findall(r"(\d+) steps? (north|south|east|west)", text))

    assert position(answer) == position(prompt)


CHECKS: dict[str, Callable[[str, str], None]] = {
    "arithmetic": _check_arithmetic,
    "units": _check_units,
    "sequences": _check_sequences,
    "dates": _check_dates,
    "sorting": _check_sorting,
    "strings": _check_strings,
    "logic": _check_logic,
    "tables": _check_tables,
    "code": _check_code,
    "walks": _check_walks,
}


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_right(skill):
    for example in generate({skill: N_CHECKED}, seed=7):
        assert example["dataset"] == skill
        CHECKS[skill](*_turns(example))


def test_pool_has_the_promised_size_and_skills(corpus):
    assert len(POOL_SIZES) >= 8 and len(corpus.pool) >= 2000
    assert Counter(example["dataset"] for example in corpus.pool) == POOL_SIZES


def test_no_prompt_and_no_id_occurs_twice(corpus):
    everything = [*corpus.pool, *corpus.pretraining, *(e for held_out in corpus.targets.values() for e in held_out)]
    assert len({_turns(example)[0] for example in everything}) == len(everything)
    assert len({example["id"] for example in everything}) == len(everything)


def test_targets_are_held_out_examples_of_their_skill(corpus):
    assert tuple(corpus.targets) == TARGET_SKILLS and len(TARGET_SKILLS) == 3
    for skill, held_out in corpus.targets.items():
        assert len(held_out) == 16 and {example["dataset"] for example in held_out} == {skill}


def test_pool_is_mixed_and_wording_varies(corpus):
    first = corpus.pool[:200]
    assert set(POOL_SIZES) == {example["dataset"] for example in first}
    for skill in POOL_SIZES:
        prompts = [_turns(example)[0] for example in corpus.pool if example["dataset"] == skill]
        openings = Counter(tuple(prompt.split()[:2]) for prompt in prompts)
        assert len(openings) >= 4, skill
        assert max(openings.values()) < 0.6 * len(prompts), skill


def test_corpus_depends_on_the_seed_and_on_nothing_else(corpus):
    assert make_corpus(0) == corpus
    other = make_corpus(1)
    shared = {_turns(e)[0] for e in other.pool} & {_turns(e)[0] for e in corpus.pool}
    assert len(shared) < 0.25 * len(corpus.pool)


def test_generate_counts_every_skill_and_names_what_is_impossible(monkeypatch):
    assert Counter(example["dataset"] for example in generate(3, seed=1)) == dict.fromkeys(SKILLS, 3)
    with pytest.raises(LessFastError, match="unknown demo skill 'juggling'"):
        generate({"juggling": 1}, seed=0)
    monkeypatch.setitem(SKILLS, "dice", lambda rng: (f"Say {rng.randint(1, 6)}.", "Done."))
    assert len(generate({"dice": 6}, seed=0)) == 6
    with pytest.raises(LessFastError, match="'dice' has only 6 distinct examples, not 7"):
        generate({"dice": 7}, seed=0)


def test_examples_load_as_a_table(corpus):
    table = load_examples(corpus.pool)
    assert len(table) == len(corpus.pool)
    assert table[5]["messages"] == corpus.pool[5]["messages"]
    assert table.datasets[5] == corpus.pool[5]["dataset"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("demo_model")
    texts = [plain_text(example) for example in corpus.pretraining[:1500]]
    tokenizer = train_tokenizer(texts, folder, vocab_size=600)
    return folder, _train(texts, tokenizer, folder)


def _train(texts: list[str], tokenizer: Any, out: Path, seed: int = 0) -> dict[str, float]:
    return train_model(texts, tokenizer, out, seed=seed, steps=60, hidden_size=32, layers=2, rows=8, row_length=64)


def test_tokenizer_loads_offline_and_loses_nothing(trained, corpus):
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    assert len(tokenizer) == 600
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    for text in (plain_text(corpus.pool[0]), "naïve – 你好\n\t<|user|>"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer("end</s>").input_ids[-1] == tokenizer.eos_token_id
    assert len(tokenizer("<|user|>\n", add_special_tokens=False).input_ids) <= 5
    assert len(tokenizer("12345", add_special_tokens=False).input_ids) == 5


def test_model_loads_learns_and_fits_its_tokenizer(trained):
    folder, metrics = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["first_loss"] == pytest.approx(math.log(600), rel=0.1)
    assert metrics["last_loss"] < 0.85 * metrics["first_loss"]
    assert metrics["tokens"] == 60 * 8 * 64


def test_training_again_gives_the_same_weights(trained, corpus, tmp_path):
    texts = [plain_text(example) for example in corpus.pretraining[:1500]]
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    before = torch.random.get_rng_state()
    _train(texts, tokenizer, tmp_path / "same")
    assert torch.equal(torch.random.get_rng_state(), before)
    _train(texts, tokenizer, tmp_path / "other", seed=1)
    files = [
        (folder / "model.safetensors").read_bytes() for folder in (trained[0], tmp_path / "same", tmp_path / "other")
    ]
    assert files[0] == files[1] != files[2]
