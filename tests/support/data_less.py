"""What LESS does to an example, written plainly from its description: every step its own call of the tokenizer."""

from __future__ import annotations

from typing import Any

IGNORED = -100


def less_encode(example: dict[str, Any], tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of one example, dispatched as LESS does by the fields that are there."""
    if "prompt" in example and "completion" in example:
        return _less_prompt_completion(example["prompt"], example["completion"], tokenizer, max_length)
    return _less_messages(example["messages"], tokenizer, max_length)


def _tokens(tokenizer: Any, text: str, max_length: int) -> list[int]:
    return tokenizer(text, max_length=max_length, truncation=True)["input_ids"]


def _conversation(messages: list[dict[str, str]], tokenizer: Any) -> str:
    pieces = []
    for message in messages:
        body = message["content"].strip()
        if message["role"] == "system":
            pieces.append("<|system|>\n" + body + "\n")
        elif message["role"] == "user":
            pieces.append("<|user|>\n" + body + "\n")
        elif message["role"] == "assistant":
            pieces.append("<|assistant|>\n" + body + tokenizer.eos_token + "\n")
        else:
            raise ValueError(message["role"])
    return "".join(pieces)


def _less_messages(messages: list[dict[str, str]], tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    ids = _tokens(tokenizer, _conversation(messages, tokenizer), max_length)
    labels = ids.copy()
    for k in range(len(messages)):
        if messages[k]["role"] == "assistant":
            continue
        begin = 0 if k == 0 else len(_tokens(tokenizer, _conversation(messages[:k], tokenizer), max_length))
        through = _conversation(messages[: k + 1], tokenizer)
        if k + 1 < len(messages) and messages[k + 1]["role"] == "assistant":
            through += "<|assistant|>\n"
        end = len(_tokens(tokenizer, through, max_length))
        for position in range(begin, min(end, len(labels))):
            labels[position] = IGNORED
        if end >= max_length:
            break
    return ids, labels


def _less_prompt_completion(
    prompt: str, completion: str, tokenizer: Any, max_length: int
) -> tuple[list[int], list[int]]:
    blank = {" ", "\n", "\t"}
    joined = prompt[-1:] in blank or completion[:1] in blank
    ids = _tokens(tokenizer, prompt + ("" if joined else " ") + completion + tokenizer.eos_token, max_length)
    n_prompt = len(_tokens(tokenizer, prompt, max_length))
    return ids, [IGNORED if position < n_prompt else token for position, token in enumerate(ids)]
