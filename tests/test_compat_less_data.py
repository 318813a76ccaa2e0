"""LESS's data sets: tokens and label masks of training examples, texts and order of its three validation sets."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.data_less import less_encode
from support.data_tokenizers import small_tokenizer
from support.tiny import examples, write_jsonl
from transformers import AutoTokenizer

from less_fast import LessFastError
from less_fast.compat.less import get_dataloader, get_dataset
from less_fast.compat.less.get_training_dataset import get_training_dataset
from less_fast.compat.less.tasks import Question, Style, questions
from less_fast.compat.less.tokens import from_dataloader, from_examples
from less_fast.data import load_examples

DATA = Path(os.environ.get("LESS_FAST_DATA", "/nowhere"))
real = pytest.mark.skipif("LESS_FAST_DATA" not in os.environ, reason="LESS_FAST_DATA is not set")
LLAMA_2 = Style(chat_format="llama2")
PLAIN = Style(use_chat_format=False)


# Training examples


@real
@pytest.mark.parametrize("max_length", [2048, 200, 48])
def test_every_real_example_has_less_s_tokens_and_label_mask(max_length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "models" / "tiny-llama-2.4m")
    pool = load_examples(DATA / "pool_2k.jsonl.gz")
    source = from_examples(pool, tokenizer, max_length)
    assert len(source) == len(pool) == 2000
    cut = masked = 0
    for row, ours in zip(pool, source.encode(range(2000))):
        ids, labels = less_encode(row, tokenizer, max_length)
        assert (ours.input_ids, ours.labels) == (ids, labels), row["id"]
        cut += ours.truncated
        masked += ours.n_labels == 0
    least_cut, least_masked = {2048: (1, 0), 200: (600, 300), 48: (1800, 1500)}[max_length]
    assert cut >= least_cut and masked >= least_masked


def test_training_dataset_has_the_rows_of_less_in_torch_s_format(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("text")
    rows = [*examples("sums", 9), *examples("names", 8)]
    half = write_jsonl(tmp_path / "a.jsonl", rows[:9]), write_jsonl(tmp_path / "b.jsonl", rows[9:])
    with open(half[0], "a") as file:
        file.write("\n\n")  # blank lines are no rows
    dataset = get_training_dataset([str(path) for path in half], tokenizer, 40)
    assert dataset.column_names == ["dataset", "id", "messages", "input_ids", "labels", "attention_mask"]
    assert dataset["id"][:] == [row["id"] for row in rows]
    for row, ours in zip(rows, dataset):
        ids, labels = less_encode(row, tokenizer, 40)
        assert ours["input_ids"].dtype == ours["labels"].dtype == torch.int64
        assert (ours["input_ids"].tolist(), ours["labels"].tolist()) == (ids, labels)
        assert ours["attention_mask"].tolist() == [1] * len(ids)
    np.random.seed(6)
    drawn = np.random.permutation(17)[:8]  # as LESS draws
    some = get_training_dataset([str(path) for path in half], tokenizer, 40, sample_percentage=0.5, seed=6)
    assert some["id"][:] == [rows[i]["id"] for i in drawn]
    assert get_training_dataset(str(half[1]), tokenizer, 40)["id"][:] == [row["id"] for row in rows[9:]]


def test_a_dataloader_gives_the_tokens_and_names_of_its_dataset(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("words")
    rows = [{**row, "subtask": "ab"[i % 2]} for i, row in enumerate(examples("sums", 7))]
    dataset = get_training_dataset(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, 64)
    expected = [less_encode(row, tokenizer, 64) for row in rows]
    for batch_size in (1, 3):
        source = from_dataloader(get_dataloader(dataset, tokenizer, batch_size))
        assert [(e.input_ids, e.labels) for e in source.encode(range(7))] == expected
        assert source.rows.ids == [row["id"] for row in rows] and source.rows.subtasks == list("abababa")
    # Padding on the left, another order: the rows are then not the dataset's.
    left = [
        {
            "input_ids": torch.tensor([[0] * 3 + ids]),
            "labels": torch.tensor([[-100] * 3 + labels]),
            "attention_mask": torch.tensor([[0] * 3 + [1] * len(ids)]),
        }
        for ids, labels in expected
    ]
    source = from_dataloader(left, max_samples=4)
    assert [(e.input_ids, e.labels) for e in source.encode(range(4))] == expected[:4]
    assert source.rows.ids == ["0", "1", "2", "3"] and len(source) == 4
    shuffled = torch.utils.data.DataLoader(dataset.select_columns(["input_ids", "labels"]), shuffle=True)
    assert from_dataloader(shuffled).rows.ids == [str(i) for i in range(7)]
    with pytest.raises(LessFastError, match="no 'labels'; it has input_ids"):
        from_dataloader([{"input_ids": torch.ones(1, 3, dtype=torch.long)}])


# Validation sets


def bbh_of(text: str, k: int) -> tuple[str, str]:
    """Query and answer of example k, by the description of LESS's format."""
    blocks = text.split("\n\n")
    shots = blocks[len(blocks) - 3 :]
    others = [shots[i] for i in range(3) if i != k]
    question, answer = shots[k].split("\nA:")
    lines = ["<|user|>", "\n\n".join(blocks[:-3]).strip(), "", others[0], "", others[1], "", question, "<|assistant|>"]
    return "\n".join(lines) + "\nA:", answer


@real
def test_bbh_has_every_subtask_s_three_examples(tmp_path: Path) -> None:
    (tmp_path / "eval").symlink_to(DATA / "targets/less_eval")
    file = DATA / "targets/less_eval/bbh/bbh-three-shot.json"
    subtasks = json.loads(file.read_text())
    assert len(subtasks) == 27
    expected = [Question(name, *bbh_of(text, k)) for name, text in subtasks.items() for k in range(3)]
    assert questions("bbh", tmp_path) == expected


@real
def test_mmlu_has_five_questions_of_every_subject(tmp_path: Path) -> None:
    (tmp_path / "eval").symlink_to(DATA / "targets/less_eval")
    dev = DATA / "targets/less_eval/mmlu/dev"
    expected = []
    for file in sorted(dev.glob("*_dev.csv"), key=lambda path: path.name.removesuffix("_dev.csv")):
        subject = file.name.removesuffix("_dev.csv")
        rows = list(csv.reader(file.open(newline="", encoding="utf-8")))
        assert len(rows) == 5
        for question, a, b, c, d, answer in rows:
            expected.append(
                (
                    subject,
                    "<|user|>\nThe following are multiple choice questions (with answers) about  "
                    f"{' '.join(subject.split('_'))}.\n\n{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
                    "\n<|assistant|>\nThe answer is:",
                    f" {answer}",
                )
            )
    found = questions("mmlu", tmp_path)
    assert len(found) == len(expected) == 285
    assert len({question.subtask for question in found}) == 57
    unlike = [(ours, theirs) for ours, theirs in zip(found, expected) if ours != theirs]
    # Where all five cells of a column are numbers, LESS prints what pandas reads: 25.0 for 25 beside 0.5.
    for ours, theirs in unlike:
        pairs = zip(ours.query.split("\n"), theirs[1].split("\n"))
        for a, b in (pair for pair in pairs if pair[0] != pair[1]):
            assert a[:3] == b[:3] and float(a[3:].replace(",", "")) == float(b[3:].replace(",", "")), (a, b)
    assert len(unlike) < 40


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    shots = ["Q: 1+1?\nA: It is 2.", "Q: 2+2?\nOptions: 4\nA: Four.\nSo 4.", "Q: 3+3?\nA: 6"]
    write(
        tmp_path / "eval/bbh/bbh-three-shot.json",
        {"zeta": "Add.\n\n" + "\n\n".join(shots), "alpha": " Do this.\n\nThen that. \n\n" + "\n\n".join(shots)},
    )
    finnish = {"context": "Oslo on kaunis.", "question": "Mikä?", "answers": [{"text": "Oslo"}, {"text": "no"}]}
    english = {"context": "Oslo is fine.", "question": "What is?", "answers": [{"text": "Oslo"}]}
    for name in ("tydiqa-one-shot.json", "tydiqa-one-shot-zh.json"):
        write(tmp_path / "eval/tydiqa" / name, {"finnish": [finnish, english], "english": [english]})
    for subject in ("b_c", "a", "c"):
        write(tmp_path / f"eval/mmlu/test/{subject}_test.csv", "")
    words = "".join(f'"{subject}, {{}}?",None,"x, y",2,0.5,A\n' for subject in ("q",))
    write(tmp_path / "eval/mmlu/dev/a_dev.csv", "".join(words.replace("{}", str(i)) for i in range(6)))
    write(tmp_path / "eval/mmlu/dev/b_c_dev.csv", "".join(f"q{i},1,True,2,{i}.5,B\n" for i in range(5)))
    write(tmp_path / "eval/mmlu/dev/c_dev.csv", "".join(f"q{i},1,{'x' if i else 1},2,3,D\n" for i in range(5)))
    write(tmp_path / "eval/mmlu/dev/unused_dev.csv", "")
    return tmp_path


def test_bbh_in_every_format(data: Path) -> None:
    found = questions("bbh", data)
    assert [question.subtask for question in found] == ["zeta"] * 3 + ["alpha"] * 3  # the file's order
    shots = "Q: 1+1?\nA: It is 2.\n\nQ: 3+3?\nA: 6\n\n"
    asked = "Q: 2+2?\nOptions: 4"
    assert found[1].query == f"<|user|>\nAdd.\n\n{shots}{asked}\n<|assistant|>\nA:"
    assert found[1].answer == " Four.\nSo 4."
    assert found[4].query == f"<|user|>\nDo this.\n\nThen that.\n\n{shots}{asked}\n<|assistant|>\nA:"
    assert questions("bbh", data, LLAMA_2)[1].query == f"<s> [INST] Add. {asked} [/INST] A:"
    assert questions("bbh", data, PLAIN)[1].query == f"Add.\n\n{asked}\nA:"


def test_tydiqa_in_every_format(data: Path) -> None:
    prompt = (
        "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.Kappale: Oslo on kaunis.\nKysymys: Mikä?\n"
    )
    found = questions("tydiqa", data)
    assert found[0] == ("finnish", f"<|user|>\n{prompt}<|assistant|>\nVastaus:", " Oslo")
    english = "Answer the following question based on the information in the given passage.Passage: Oslo is fine."
    assert found[1] == ("english", f"<|user|>\n{english}\nQuestion: What is?\n<|assistant|>\nAnswer:", " Oslo")
    assert len(found) == 2  # the first example of a language alone
    assert questions("tydiqa", data, LLAMA_2)[0].query == f"<s> [INST] {prompt} [/INST] Vastaus:"
    assert questions("tydiqa", data, PLAIN)[0].query == f"{prompt}Vastaus:"
    chinese = "根据所给文章中的信息回答以下问题。文章: Oslo on kaunis.\n问题: Mikä?\n"
    assert questions("tydiqa", data, zh=True)[0].query == f"<|user|>\n{chinese}<|assistant|>\n答案:"


def test_all_nine_languages_have_their_prompt(data: Path) -> None:
    one = [{"context": "C", "question": "Q", "answers": [{"text": "A"}]}]
    languages = ["english", "arabic", "bengali", "finnish", "indonesian", "korean", "russian", "swahili", "telugu"]
    write(data / "eval/tydiqa/tydiqa-one-shot.json", dict.fromkeys(languages, one))
    found = questions("tydiqa", data)
    assert [question.subtask for question in found] == languages
    labels = ["Answer:", "الإجابة:", "উত্তর:", "Vastaus:", "Jawaban:", "답변:", "Ответ:", "Jibu:", "సమాధానం:"]
    assert [question.query.rpartition("\n")[2] for question in found] == labels
    assert len({question.query.partition(": C\n")[0] for question in found}) == 9


def test_mmlu_in_every_format(data: Path) -> None:
    found = questions("mmlu", data)
    assert [question.subtask for question in found] == ["a"] * 5 + ["b_c"] * 5 + ["c"] * 5
    header = "The following are multiple choice questions (with answers) about "
    first = f"{header} a.\n\nq, 0?\nA. nan\nB. x, y\nC. 2\nD. 0.5\nAnswer:"  # pandas reads None as nan
    assert found[0] == ("a", f"<|user|>\n{first}\n<|assistant|>\nThe answer is:", " A")
    assert f"{header} b c.\n\nq0\nA. 1\nB. True\nC. 2\nD. 0.5\nAnswer:" in found[5].query
    assert "B. x\n" in found[11].query and "B. 1\n" in found[10].query
    assert questions("mmlu", data, LLAMA_2)[0].query == f"<s> [INST] {first} [/INST] The answer is:"
    assert questions("mmlu", data, PLAIN)[0].query == first
    for file in (data / "eval/mmlu/test").iterdir():
        file.unlink()
    (data / "eval/mmlu/dev/unused_dev.csv").unlink()
    assert questions("mmlu", data) == found  # without test files the subjects are those of the dev files


@pytest.mark.parametrize("kind", ["words", "text", "closing"])
@pytest.mark.parametrize("max_length", [512, 60, 20])
def test_tasks_are_tokenised_as_less_does(data: Path, kind: str, max_length: int) -> None:
    tokenizer = small_tokenizer(kind)
    for task, n in (("bbh", 6), ("tydiqa", 2), ("mmlu", 15)):
        dataset = get_dataset(task, data_dir=str(data), tokenizer=tokenizer, max_length=max_length, zh=False)
        assert len(dataset) == n
        for question, row in zip(questions(task, data), dataset):
            query = tokenizer.encode(question.query, max_length=max_length, truncation=True)
            whole = tokenizer.encode(question.query + question.answer, max_length=max_length, truncation=True)
            labels = [-100 if i < len(query) else token for i, token in enumerate(whole)]
            assert row == {"input_ids": whole, "labels": labels, "attention_mask": [1] * len(whole)}
        assert max_length > 20 or all(set(row["labels"]) == {-100} for row in dataset)
    loader = get_dataloader(dataset, tokenizer, batch_size=4)
    assert [len(batch["input_ids"]) for batch in loader] == [4, 4, 4, 3]
    source = from_dataloader(loader)
    assert source.rows.subtasks == ["a"] * 5 + ["b_c"] * 5 + ["c"] * 5
    assert source.rows.ids[:2] == ["a_0", "a_1"] and set(source.rows.datasets) == {"mmlu"}


def test_a_task_of_one_s_own_is_encoded_as_training_examples(tmp_path: Path) -> None:
    tokenizer = small_tokenizer("words")
    rows = [{**row, "subtask": name} for row, name in zip(examples("names", 5), "xyzzy")]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    for options in ({"task": str(path)}, {"task": "anything", "task_file": path}):
        dataset = get_dataset(**options, tokenizer=tokenizer, max_length=30)
        for row, ours in zip(rows, dataset):
            assert (ours["input_ids"], ours["labels"]) == less_encode(row, tokenizer, 30)
        assert from_dataloader(get_dataloader(dataset, tokenizer)).rows.subtasks == list("xyzzy")


def test_broken_tasks_are_refused_by_name(data: Path, tmp_path: Path) -> None:
    def refusal(task: str, **options: Any) -> str:
        with pytest.raises(LessFastError) as caught:
            get_dataset(task, data_dir=data, tokenizer=small_tokenizer("words"), max_length=64, **options)
        return str(caught.value)

    assert refusal("gsm8k").startswith("task gsm8k: no such file, and none of the tasks bbh, tydiqa, mmlu")
    assert "nowhere.jsonl: no such file" in refusal("x", task_file=tmp_path / "nowhere.jsonl")
    write(
        data / "eval/bbh/bbh-three-shot.json",
        {"good": "I\n\nQ: a\nA: b\n\nQ: c\nA: d\n\nQ: e\nA: f", "bad": "I\n\nQ: a"},
    )
    assert "bbh-three-shot.json: subtask bad does not end with three examples" in refusal("bbh")
    write(data / "eval/bbh/bbh-three-shot.json", "[1]")
    assert "expected an object with one entry a subtask, found a list" in refusal("bbh")
    write(data / "eval/bbh/bbh-three-shot.json", "{")
    assert "bbh-three-shot.json: not valid JSON" in refusal("bbh")
    write(data / "eval/tydiqa/tydiqa-one-shot.json", {"klingon": []})
    assert "no prompt for 'klingon'; expected one of english, arabic" in refusal("tydiqa")
    write(data / "eval/tydiqa/tydiqa-one-shot.json", {"korean": [{"context": "x"}]})
    assert "korean does not begin with an example of 'context'" in refusal("tydiqa")
    (data / "eval/tydiqa/tydiqa-one-shot-zh.json").unlink()
    assert "tydiqa-one-shot-zh.json: No such file" in refusal("tydiqa", zh=True)
    write(data / "eval/mmlu/dev/a_dev.csv", "q,1,2,3,4,A\n")
    assert "a_dev.csv: has 1 rows of 6 cells; expected at least 5" in refusal("mmlu")
    write(data / "eval/mmlu/dev/a_dev.csv", "")
    assert "a_dev.csv: not a readable CSV file" in refusal("mmlu")
