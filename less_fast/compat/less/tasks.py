"""The texts of LESS's three validation sets, read from its data folder: a query, which has no loss, and its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from less_fast.errors import LessFastError

TASKS = ("bbh", "tydiqa", "mmlu")

_MMLU_SHOTS = 5
_MMLU_CHOICES = "ABCD"
_CHINESE = ("根据所给文章中的信息回答以下问题。", "文章:", "问题:", "答案:")
# Instruction, and what announces the passage, the question and the answer: TyDiQA's prompts in open-instruct.
_LANGUAGES = {
    "english": (
        "Answer the following question based on the information in the given passage.",
        "Passage:",
        "Question:",
        "Answer:",
    ),
    "arabic": ("أجب على السؤال التالي بناءً على المعلومات في المقطع المعطى.", "المقطع:", "السؤال:", "الإجابة:"),
    "bengali": (
        "প্রদত্ত অধ্যায়ের তথ্যের উপর ভিত্তি করে নিম্নলিখিত প্রশ্নের উত্তর দিন।",
        "অধ্যায়:",
        "প্রশ্ন:",
        "উত্তর:",
    ),
    "finnish": (
        "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.",
        "Kappale:",
        "Kysymys:",
        "Vastaus:",
    ),
    "indonesian": (
        "Jawab pertanyaan berikut berdasarkan informasi di bagian yang diberikan.",
        "Bagian:",
        "Pertanyaan:",
        "Jawaban:",
    ),
    "korean": ("주어진 문단의 정보에 기반하여 다음 질문에 답하십시오.", "문단:", "질문:", "답변:"),
    "russian": (
        "Ответьте на следующий вопрос на основе информации в данном отрывке.",
        "Отрывок:",
        "Вопрос:",
        "Ответ:",
    ),
    "swahili": (
        "Jibu swali lifuatalo kulingana na habari kwenye kifungu kilichotolewa.",
        "Kifungu:",
        "Swali:",
        "Jibu:",
    ),
    "telugu": (
        "ఇచ్చిన పేరాలోని సమాచారం ఆధారంగా కింది ప్రశ్నకు సమాధానం ఇవ్వండి.",
        "పేరా:",
        "ప్రశ్న:",
        "సమాధానం:",
    ),
}


class Question(NamedTuple):
    """One validation example: ``query`` is masked, ``answer`` follows it at once and bears the loss."""

    subtask: str
    query: str
    answer: str


class Style(NamedTuple):
    """``use_chat_format`` and ``chat_format`` of LESS: "tulu", anything else for Llama 2's brackets."""

    use_chat_format: bool = True
    chat_format: str = "tulu"

    def wrap(self, prompt: str, opening: str, *, gap: str = "", plain_gap: str = "") -> str:
        """The query: ``prompt``, and then the ``opening`` of the answer.

        ``gap`` stands before the assistant's header, ``plain_gap`` before the opening where there is no header.
        """
        if not self.use_chat_format:
            return prompt + plain_gap + opening
        if self.chat_format == "tulu":
            return f"<|user|>\n{prompt}{gap}<|assistant|>\n{opening}"
        return f"<s> [INST] {prompt} [/INST] {opening}"


def questions(task: str, data_dir: str | Path, style: Style | None = None, *, zh: bool = False) -> list[Question]:
    """All examples of ``bbh``, ``tydiqa`` or ``mmlu``, in LESS's order: subtask after subtask.

    Parameters
    ----------
    data_dir : LESS's data folder, with ``eval/bbh``, ``eval/tydiqa`` and ``eval/mmlu``.
    zh : of ``tydiqa``, the examples translated to Chinese.

    Raises LessFastError for a file that is missing or not what LESS reads.
    """
    folder, style = Path(data_dir) / "eval" / task, style or Style()
    if task == "bbh":
        return list(_bbh(folder / "bbh-three-shot.json", style))
    if task == "tydiqa":
        return list(_tydiqa(folder / ("tydiqa-one-shot-zh.json" if zh else "tydiqa-one-shot.json"), style, zh))
    if task == "mmlu":
        return list(_mmlu(folder, style))
    raise LessFastError(f"task is {task!r}; expected one of {', '.join(TASKS)}")


def _bbh(file: Path, style: Style) -> Iterator[Question]:
    """Each of a subtask's three worked examples, asked with the other two before it."""
    for subtask, text in _json(file).items():
        parts = text.split("\n\n")
        instruction, shots = "\n\n".join(parts[:-3]).strip(), parts[-3:]
        pairs = [shot.split("\nA:") for shot in shots]
        if len(shots) < 3 or any(len(pair) != 2 for pair in pairs):
            raise LessFastError(
                f"{file}: subtask {subtask} does not end with three examples, each a question, a line end, 'A:' and an "
                "answer; use the file of LESS's data"
            )
        for number, (question, answer) in enumerate(pairs):
            others = "".join(shot + "\n\n" for i, shot in enumerate(shots) if i != number)
            if not style.use_chat_format:
                query = style.wrap(f"{instruction}\n\n{question}", "A:", plain_gap="\n")
            elif style.chat_format == "tulu":
                query = style.wrap(f"{instruction}\n\n{others}{question}", "A:", gap="\n")
            else:
                query = style.wrap(f"{instruction} {question}", "A:")
            yield Question(subtask, query, answer)


def _tydiqa(file: Path, style: Style, zh: bool) -> Iterator[Question]:
    """The first example of each language."""
    for language, examples in _json(file).items():
        if language not in _LANGUAGES:
            raise LessFastError(f"{file}: no prompt for {language!r}; expected one of {', '.join(_LANGUAGES)}")
        instruction, passage, question, answer = _CHINESE if zh else _LANGUAGES[language]
        try:
            example = examples[0]
            context, asked, text = example["context"], example["question"], example["answers"][0]["text"]
        except (KeyError, IndexError, TypeError):
            raise LessFastError(
                f"{file}: {language} does not begin with an example of 'context', 'question' and 'answers'; "
                "use the file of LESS's data"
            ) from None
        prompt = f"{instruction}{passage} {context}\n{question} {asked}\n"
        yield Question(language, style.wrap(prompt, answer), f" {text}")


def _mmlu(folder: Path, style: Style) -> Iterator[Question]:
    """The five development questions of each subject; subjects are the test files, or without any the dev files."""
    for kind in ("test", "dev"):
        subjects = sorted(file.name.split(f"_{kind}.csv")[0] for file in (folder / kind).glob(f"*_{kind}.csv*"))
        if subjects:
            break
    else:
        raise LessFastError(f"{folder}: no test/*_test.csv and no dev/*_dev.csv there; give LESS's data folder")
    for subject in subjects:
        # Two blanks before the subject, as in the published prompts.
        header = "The following are multiple choice questions (with answers) about  " + subject.replace("_", " ")
        for cells in _mmlu_rows(folder / "dev" / f"{subject}_dev.csv"):
            text, *choices, answer = cells
            listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(_MMLU_CHOICES, choices))
            prompt = f"{header}.\n\n{text}{listed}\nAnswer:"
            # Without a chat format the prompt ends with its own "Answer:".
            query = style.wrap(prompt, "The answer is:", gap="\n") if style.use_chat_format else prompt
            yield Question(subject, query, f" {answer}")


def _mmlu_rows(file: Path) -> list[list[str]]:
    """The first five rows as text. pandas reads the cells, because LESS prints what pandas makes of them: 4.0 for 4
    beside 0.5, nan for None.
    """
    import pandas  # type: ignore[import-untyped]

    try:
        table = pandas.read_csv(file, header=None)
    except (OSError, ValueError) as error:
        raise LessFastError(f"{file}: not a readable CSV file ({str(error).splitlines()[0]})") from error
    if table.shape[0] < _MMLU_SHOTS or not 3 <= table.shape[1] <= 2 + len(_MMLU_CHOICES):
        raise LessFastError(
            f"{file}: has {table.shape[0]} rows of {table.shape[1]} cells; expected at least {_MMLU_SHOTS} rows of a "
            "question, its choices (four at most) and the answer's letter"
        )
    return [[f"{table.iloc[row, column]}" for column in range(table.shape[1])] for row in range(_MMLU_SHOTS)]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LessFastError(f"{file}: {error.strerror}; --data_dir is LESS's data folder") from error
    except ValueError as error:
        raise LessFastError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise LessFastError(f"{file}: expected an object with one entry a subtask, found a {type(content).__name__}")
    return content
