"""From an example to token ids and labels: the format of LESS (`tulu`), the tokenizer's own chat format, raw text.

A template renders an example as one text with character spans that bear no loss. How many tokens lie before a span's
bound is found as LESS finds it, by tokenising the text up to the bound by itself: where a token crosses the bound this
differs from cutting the whole text's tokens, and parity with LESS needs the former.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from less_fast.data.rows import EXPECTED_FIELDS
from less_fast.errors import LessFastError

IGNORED = -100  # the label of a token without loss

_EXAMPLES_PER_CALL = 256  # fast tokenizers work on a list of texts in parallel
_TULU_HEADERS = {role: f"<|{role}|>\n" for role in ("system", "user", "assistant")}
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """One tokenised example; `labels` are the ids, or -100 without loss; `truncated` tells that tokens were cut off."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def n_labels(self) -> int:
        """The number of tokens with a loss: the first token has none, as nothing predicts it."""
        predicted = self.labels[1:]
        return len(predicted) - predicted.count(IGNORED)


class _Rendered(NamedTuple):
    text: str
    masked: list[tuple[int, int]]  # character spans without loss, ascending


_Renderer = Callable[[Mapping[str, Any], Any], _Rendered]
_Result = TypeVar("_Result")


def encode(example: Mapping[str, Any], tokenizer: Any, template: str = "tulu", max_length: int = 2048) -> Encoded:
    """Tokenise one example and mark the tokens that bear loss: the assistant's, or the completion's.

    `template`: "tulu" (to the letter of LESS), "chat" (the tokenizer's chat template; prompt and completion are
    a user's and an assistant's turn) or "raw" (contents joined by newlines, or prompt and completion as they stand,
    then the end-of-sequence token). The first `max_length` tokens are kept.
    Raises LessFastError for an unknown template, a role the template lacks and a tokenizer that can't serve it.
    """
    return encode_all([example], tokenizer, template, max_length)[0]


def encode_all(
    examples: Iterable[Mapping[str, Any]], tokenizer: Any, template: str = "tulu", max_length: int = 2048
) -> list[Encoded]:
    """`encode` for many examples, whose texts go to the tokenizer by the hundred."""
    if template not in _RENDERERS:
        raise LessFastError(f"unknown template {template!r}; expected one of {', '.join(_RENDERERS)}")
    added = 0 if template == "chat" else tokenizer.num_special_tokens_to_add()
    if max_length <= added:
        raise LessFastError(
            f"max_length must be more than the {added} tokens that the tokenizer adds, found {max_length}"
        )
    if template == "chat":
        chat_template = _chat_template(tokenizer)
        if tokenizer.is_fast and _GENERATION_BLOCK.search(chat_template):
            return [_named(_encode_generation, example, tokenizer, max_length) for example in examples]
    encoded: list[Encoded] = []
    pending = iter(examples)
    while chunk := list(islice(pending, _EXAMPLES_PER_CALL)):
        rendered = [_named(_RENDERERS[template], example, tokenizer) for example in chunk]
        encoded += _tokenise(rendered, tokenizer, template != "chat", max_length)
    return encoded


def _tokenise(rendered: list[_Rendered], tokenizer: Any, special: bool, max_length: int) -> list[Encoded]:
    """Tokenise texts and the prefixes that end at a span's bound; `special`: let the tokenizer add its own tokens."""
    texts: dict[str, int] = {}  # each distinct text once: few-shot examples share their prefixes
    for text, masked in rendered:
        for prefix in (text, *(text[:bound] for span in masked for bound in span)):
            texts.setdefault(prefix, len(texts))
    ids = _ids(list(texts), tokenizer, special)
    # A text of more than max_length tokens has exactly max_length when truncated, so only whole texts are done again.
    long = [text for text, _ in rendered if len(ids[texts[text]]) > max_length]
    cut = iter(_truncated_ids(long, tokenizer, special, max_length))

    def n_tokens(prefix: str) -> int:
        return min(len(ids[texts[prefix]]), max_length)

    encoded = []
    for text, masked in rendered:
        truncated = len(ids[texts[text]]) > max_length
        input_ids = next(cut) if truncated else ids[texts[text]]
        labels = list(input_ids)
        for start, end in masked:
            # LESS masks the first message from token 0, without asking the tokenizer.
            first, last = n_tokens(text[:start]) if start else 0, n_tokens(text[:end])
            labels[first:last] = [IGNORED] * (min(last, len(labels)) - first)
            if last >= max_length:
                break
        encoded.append(Encoded(input_ids, labels, truncated))
    return encoded


def _ids(texts: list[str], tokenizer: Any, special: bool, **truncation: Any) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **truncation,
    )["input_ids"]


def _truncated_ids(texts: list[str], tokenizer: Any, special: bool, max_length: int) -> list[list[int]]:
    if texts and tokenizer.truncation_side != "right":
        raise LessFastError("examples are cut on the right; set tokenizer.truncation_side = 'right'")
    return _ids(texts, tokenizer, special, truncation=True, max_length=max_length)


def _named(step: Callable[..., _Result], example: Mapping[str, Any], *arguments: Any) -> _Result:
    """`step(example, *arguments)`, with the example's name in an error."""
    try:
        return step(example, *arguments)
    except LessFastError as error:
        raise LessFastError(f"example {example.get('dataset', '?')}/{example.get('id', '?')}: {error}") from error


def _pair(example: Mapping[str, Any]) -> tuple[str, str] | None:
    """Prompt and completion; an example with both forms counts as this one, as in LESS."""
    prompt, completion = example.get("prompt"), example.get("completion")
    return None if prompt is None or completion is None else (prompt, completion)


def _messages(example: Mapping[str, Any]) -> list[Mapping[str, str]]:
    messages = example.get("messages")
    if not messages:
        raise LessFastError(f"expected {EXPECTED_FIELDS}, found {', '.join(example) or 'no field at all'}")
    return messages


def _end_of_sequence(tokenizer: Any) -> str:
    if tokenizer.eos_token is None:
        raise LessFastError("the tokenizer has no end-of-sequence token, which ends an answer; set tokenizer.eos_token")
    return tokenizer.eos_token


def _render_tulu(example: Mapping[str, Any], tokenizer: Any) -> _Rendered:
    eos = _end_of_sequence(tokenizer)
    if pair := _pair(example):
        prompt, completion = pair
        space = (" ", "\n", "\t")
        gap = "" if prompt.endswith(space) or completion.startswith(space) else " "
        return _Rendered(prompt + gap + completion + eos, [(0, len(prompt))])
    messages = _messages(example)
    text = ""
    masked = []
    for number, message in enumerate(messages):
        role, start = message["role"], len(text)
        if role not in _TULU_HEADERS:
            raise LessFastError(f"unknown role {role!r}; expected one of {', '.join(_TULU_HEADERS)}")
        text += _TULU_HEADERS[role] + message["content"].strip() + (eos if role == "assistant" else "") + "\n"
        if role != "assistant":
            answered = number + 1 < len(messages) and messages[number + 1]["role"] == "assistant"
            masked.append((start, len(text) + (len(_TULU_HEADERS["assistant"]) if answered else 0)))
    return _Rendered(text, masked)


def _render_raw(example: Mapping[str, Any], tokenizer: Any) -> _Rendered:
    eos = _end_of_sequence(tokenizer)
    if pair := _pair(example):
        return _Rendered("".join(pair) + eos, [(0, len(pair[0]))])
    messages = _messages(example)
    text = "\n".join(message["content"] for message in messages) + eos
    answers = []
    start = 0
    for number, message in enumerate(messages):
        end = start + len(message["content"])
        if message["role"] == "assistant":
            answers.append((start, len(text) if number == len(messages) - 1 else end))
        start = end + len("\n")
    return _Rendered(text, _all_but(answers, len(text)))


def _render_chat(example: Mapping[str, Any], tokenizer: Any) -> _Rendered:
    turns = _turns(example)
    text = _apply_chat_template(turns, tokenizer)
    answers = []
    for number, message in enumerate(turns):
        if message["role"] == "assistant":
            start = _answer_start(text, turns, number, tokenizer)
            answers.append((start, _answer_end(text, start, turns, number, tokenizer)))
    return _Rendered(text, _all_but(answers, len(text)))


def _answer_start(text: str, turns: list[Mapping[str, str]], number: int, tokenizer: Any) -> int:
    """Where the answer of turn `number` begins in the rendered text, behind its header."""
    if number == 0:
        return 0
    if not text.startswith(_apply_chat_template(turns[:number], tokenizer)):
        raise _not_located(f"the turns before message {number + 1}")
    # A prompt for generation may hold more than the header (an opened <think> tag), so what is shared counts.
    prompted = _apply_chat_template(turns[:number], tokenizer, add_generation_prompt=True)
    return len(os.path.commonprefix([text, prompted]))  # noqa: RUF071 - characters are what is meant


def _answer_end(text: str, start: int, turns: list[Mapping[str, str]], number: int, tokenizer: Any) -> int:
    """Where the turn that holds the answer ends."""
    if number == len(turns) - 1:
        return len(text)
    until = _apply_chat_template(turns[: number + 1], tokenizer)
    if text.startswith(until):
        return len(until)
    # Some templates (Qwen3) add an empty thought to the last answer only: look for the answer and what closes it.
    content = turns[number]["content"].strip()
    closed = until[until.rfind(content) :] if content in until else ""
    found = text.find(closed, start)
    if not closed or found < 0:
        raise _not_located(f"message {number + 1}")
    return found + len(closed)


def _not_located(what: str) -> LessFastError:
    return LessFastError(
        f"the tokenizer's chat template renders {what} differently when more follows, so the answer can't be located; "
        "mark answers in it with {% generation %}, or use the template 'tulu' or 'raw'"
    )


def _all_but(answers: list[tuple[int, int]], n_characters: int) -> list[tuple[int, int]]:
    """The spans between the answers."""
    starts = [0, *(end for _, end in answers)]
    ends = [*(start for start, _ in answers), n_characters]
    return [(start, end) for start, end in zip(starts, ends) if start < end]


def _encode_generation(example: Mapping[str, Any], tokenizer: Any, max_length: int) -> Encoded:
    """The chat format where the chat template itself marks what the assistant generates."""
    output = _apply_chat_template(
        _turns(example), tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = output["input_ids"], output["assistant_masks"]
    labels = [token if answered else IGNORED for token, answered in zip(ids, mask)]
    return Encoded(ids[:max_length], labels[:max_length], len(ids) > max_length)


def _turns(example: Mapping[str, Any]) -> list[Mapping[str, str]]:
    pair = _pair(example)
    if pair is None:
        return _messages(example)
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant"), pair)]


def _apply_chat_template(turns: list[Mapping[str, str]], tokenizer: Any, **options: Any) -> Any:
    import jinja2

    try:
        return tokenizer.apply_chat_template(turns, **{"tokenize": False, **options})
    except jinja2.TemplateError as error:
        raise LessFastError(f"the tokenizer's chat template refuses these messages ({error})") from error


def _chat_template(tokenizer: Any) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise LessFastError(
            "the tokenizer has no chat template; use the template 'tulu' or 'raw', or set tokenizer.chat_template"
        ) from error


_RENDERERS: dict[str, _Renderer] = {"tulu": _render_tulu, "chat": _render_chat, "raw": _render_raw}
TEMPLATES = tuple(_RENDERERS)
