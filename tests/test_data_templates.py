"""Templates: token-for-token parity with LESS, what each template labels, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data_less import less_encode
from support.data_tokenizers import chat_tokenizer, small_tokenizer

from less_fast.data import IGNORED, Encoded, encode, encode_all, load_examples
from less_fast.errors import LessFastError

KINDS = ("words", "text", "closing")
DATA = os.environ.get("LESS_FAST_DATA")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# An empty thought before the last answer only, and an opened one in the prompt for generation.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LONGEST_LAST = "{{ messages | length }}{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"

TURNS = [
    {"role": "user", "content": "How do you do?"},
    {"role": "assistant", "content": "Very well, 谢谢."},
    {"role": "user", "content": "Как дела?"},
    {"role": "assistant", "content": "Very well, 谢谢."},
]


def labelled(encoded: Encoded, tokenizer) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


def assert_as_less(example, tokenizer, max_length) -> None:
    encoded = encode(example, tokenizer, "tulu", max_length)
    ids, labels = less_encode(example, tokenizer, max_length)
    assert (encoded.input_ids, encoded.labels) == (ids, labels)
    assert encoded.truncated == (less_encode(example, tokenizer, 10**6)[0] != ids)


words = st.sampled_from(
    ["The capital", " is", "\n", " ", "谢谢", "Как", "é", "</s>", "<|assistant|>\n", "well", ".", "🙂"]
)
contents = st.lists(words, max_size=6).map("".join)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": contents}),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(messages=messages, kind=st.sampled_from(KINDS), max_length=st.integers(3, 80))
def test_tulu_messages_are_as_less_writes_them(messages, kind, max_length):
    assert_as_less({"messages": messages}, small_tokenizer(kind), max_length)


@settings(max_examples=100, deadline=None)
@given(prompt=contents, completion=contents, kind=st.sampled_from(KINDS), max_length=st.integers(3, 30))
def test_tulu_prompt_and_completion_are_as_less_writes_them(prompt, completion, kind, max_length):
    assert_as_less({"prompt": prompt, "completion": completion}, small_tokenizer(kind), max_length)


def test_a_token_across_the_header_moves_the_bound_as_in_less():
    """The case for which bounds come from prefixes: here they differ from the bounds in the whole text."""
    tokenizer = small_tokenizer("text")
    example = {"messages": TURNS}
    prefix = "<|user|>\nHow do you do?\n<|assistant|>\n"
    whole = encode(example, tokenizer).input_ids
    n_prefix = len(tokenizer(prefix)["input_ids"])
    assert tokenizer.decode(whole[1:n_prefix]) != prefix
    assert_as_less(example, tokenizer, 2048)


def test_tulu_labels_the_answers_and_what_closes_them():
    tokenizer = small_tokenizer("words")
    system = {"role": "system", "content": "  Be brief. "}
    encoded = encode({"messages": [system, *TURNS]}, tokenizer)
    assert tokenizer.decode(encoded.input_ids) == (
        "<s><|system|>\nBe brief.\n<|user|>\nHow do you do?\n<|assistant|>\nVery well, 谢谢.</s>\n"
        "<|user|>\nКак дела?\n<|assistant|>\nVery well, 谢谢.</s>\n"
    )
    assert labelled(encoded, tokenizer) == "Very well, 谢谢.</s>\n" * 2
    assert not encoded.truncated


def test_both_forms_at_once_count_as_prompt_and_completion():
    tokenizer = small_tokenizer("words")
    pair = {"prompt": "How do you do?", "completion": "Well."}
    assert encode({"messages": TURNS, **pair}, tokenizer) == encode(pair, tokenizer)
    assert labelled(encode(pair, tokenizer), tokenizer) == " Well.</s>"


def test_truncation_is_told_and_a_long_prompt_leaves_no_labels():
    tokenizer = small_tokenizer("words")
    whole = encode({"messages": TURNS}, tokenizer)
    exact = encode({"messages": TURNS}, tokenizer, max_length=len(whole.input_ids))
    assert exact == whole
    cut = encode({"messages": TURNS}, tokenizer, max_length=len(whole.input_ids) - 1)
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:-1]
    nothing = encode({"messages": TURNS}, tokenizer, max_length=8)
    assert (nothing.n_labels, len(nothing.input_ids)) == (0, 8)


def test_n_labels_counts_what_the_shifted_loss_sees():
    assert Encoded([5, 6, 7], [5, IGNORED, 7], False).n_labels == 1
    assert Encoded([5, 6, 7], [IGNORED, 6, 7], False).n_labels == 2
    assert Encoded([5], [5], False).n_labels == 0
    assert Encoded([], [], False).n_labels == 0


@pytest.mark.parametrize("template", ["tulu", "raw", "chat"])
def test_many_at_once_equal_one_by_one(template):
    tokenizer = chat_tokenizer(CHATML) if template == "chat" else small_tokenizer("text")
    examples = [{"messages": TURNS[: 2 + 2 * (n % 2)]} for n in range(300)]
    examples += [{"prompt": "Grüße " * n, "completion": "Oslo"} for n in range(1, 40)]
    many = encode_all(iter(examples), tokenizer, template, 64)
    assert many == [encode(example, tokenizer, template, 64) for example in examples]
    assert any(encoded.truncated for encoded in many)
    assert not all(encoded.truncated for encoded in many)


def test_raw_joins_contents_and_labels_the_answers():
    tokenizer = small_tokenizer("words")
    encoded = encode({"messages": TURNS}, tokenizer, "raw")
    text = "How do you do?\nVery well, 谢谢.\nКак дела?\nVery well, 谢谢.</s>"
    assert tokenizer.decode(encoded.input_ids) == "<s>" + text
    assert labelled(encoded, tokenizer) == "Very well, 谢谢.Very well, 谢谢.</s>"
    unanswered = encode({"messages": TURNS[:3]}, tokenizer, "raw")
    assert labelled(unanswered, tokenizer) == "Very well, 谢谢."
    assert tokenizer.decode(unanswered.input_ids).endswith("Как дела?</s>")
    pair = encode({"prompt": "The capital is", "completion": " Oslo."}, tokenizer, "raw")
    assert tokenizer.decode(pair.input_ids) == "<s>The capital is Oslo.</s>"
    assert labelled(pair, tokenizer) == " Oslo.</s>"


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
@pytest.mark.parametrize("max_length", [2048, 70, 30])
def test_chat_labels_answers_with_and_without_generation_marks(template, max_length):
    tokenizer = chat_tokenizer(template)
    encoded = encode({"messages": TURNS}, tokenizer, "chat", max_length)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == whole[:max_length]
    assert encoded.truncated == (len(whole) > max_length)
    assert ("Very well, 谢谢.<|im_end|>\n" * 2).startswith(labelled(encoded, tokenizer).rstrip("�"))
    if not encoded.truncated:
        assert labelled(encoded, tokenizer) == "Very well, 谢谢.<|im_end|>\n" * 2
    assert encoded == encode({"messages": TURNS}, chat_tokenizer(CHATML), "chat", max_length)


def test_chat_finds_answers_where_the_last_one_is_rendered_differently():
    tokenizer = chat_tokenizer(THINKING)
    encoded = encode({"messages": TURNS}, tokenizer, "chat")
    closed = "Very well, 谢谢.<|im_end|>\n"
    assert labelled(encoded, tokenizer) == closed + "\n</think>\n\n" + closed  # "<think>\n" is in the prompt


def test_chat_adds_no_special_tokens_of_its_own_and_takes_prompt_and_completion():
    tokenizer = chat_tokenizer(INSTRUCT)
    encoded = encode({"prompt": "How do you do?", "completion": "Well."}, tokenizer, "chat")
    assert tokenizer.decode(encoded.input_ids) == "<s>[INST] How do you do? [/INST] Well.</s>"
    assert labelled(encoded, tokenizer) == " Well.</s>"


def test_chat_masks_turns_after_the_last_answer():
    tokenizer = chat_tokenizer(CHATML)
    encoded = encode({"messages": TURNS[:3]}, tokenizer, "chat")
    assert labelled(encoded, tokenizer) == "Very well, 谢谢.<|im_end|>\n"
    assert encode({"messages": TURNS[:1]}, tokenizer, "chat").n_labels == 0


def refusal(*arguments) -> str:
    with pytest.raises(LessFastError) as error:
        encode(*arguments)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_templates_refuse_in_one_line():
    tokenizer = small_tokenizer("words")
    example = {"dataset": "d", "id": "7", "messages": TURNS}
    assert refusal(example, tokenizer, "alpaca") == "unknown template 'alpaca'; expected one of tulu, chat, raw"
    assert "no chat template" in refusal(example, chat_tokenizer(None), "chat")
    foreign = {**example, "messages": [{"role": "tool", "content": "3"}]}
    assert refusal(foreign, tokenizer) == "example d/7: unknown role 'tool'; expected one of system, user, assistant"
    assert "example d/8: expected 'messages'" in refusal({"dataset": "d", "id": "8"}, tokenizer)
    system = {**example, "messages": [{"role": "system", "content": "Be brief."}, *TURNS]}
    assert "d/7: the tokenizer's chat template refuses these messages (no system turns)" in refusal(
        system, chat_tokenizer(INSTRUCT), "chat"
    )
    assert "the turns before message 2 differently" in refusal(example, chat_tokenizer(LONGEST_LAST), "chat")
    assert "max_length must be more than the 1 tokens" in refusal(example, tokenizer, "tulu", 1)
    endless = chat_tokenizer(None)
    endless.eos_token = None
    assert "d/7: the tokenizer has no end-of-sequence token" in refusal(example, endless)
    left = chat_tokenizer(None)
    left.truncation_side = "left"
    assert "truncation_side = 'right'" in refusal(example, left, "tulu", 10)
    assert not encode(example, left).truncated


@pytest.mark.skipif(DATA is None, reason="LESS_FAST_DATA is not set")
@pytest.mark.parametrize(
    ("tokenizer_path", "every"),
    [("tokenizers/gpt2_hf", 1), ("models/tiny-llama-2.4m", 1), ("models/stories260K-hf", 8)],
)
def test_real_examples_are_as_less_writes_them(tokenizer_path, every):
    from transformers import AutoTokenizer

    folder = Path(str(DATA))
    tokenizer = AutoTokenizer.from_pretrained(folder / tokenizer_path)
    targets = sorted((folder / "targets").glob("*_val.jsonl"))
    assert len(targets) == 4
    examples = list(load_examples([folder / "pool_2k.jsonl.gz", *targets]))
    assert len(examples) == 2000 + 32 + 81 + 285 + 32
    for max_length in (2048, 128, 64):
        some = examples[::every] if max_length == 2048 else examples[:: 6 * every]
        encoded = encode_all(some, tokenizer, "tulu", max_length)
        for example, ours in zip(some, encoded):
            assert (ours.input_ids, ours.labels) == less_encode(example, tokenizer, max_length), example["id"]
        if max_length < 2048:
            assert any(ours.truncated and ours.n_labels == 0 for ours in encoded)
            assert any(ours.truncated and ours.n_labels > 0 for ours in encoded)
