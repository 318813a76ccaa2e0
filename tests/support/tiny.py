"""A tiny random Llama with its tokenizer, and small JSON Lines files of two kinds of example, all made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from support.data_tokenizers import small_tokenizer

# A warm-up and a projection in proportion to the model.
SETTINGS: dict[str, Any] = {
    "warmup_fraction": 0.25,
    "warmup_epochs": 2,
    "warmup_learning_rate": 1e-2,
    "warmup_batch_size": 4,
    "lora_rank": 4,
    "lora_alpha": 8,
    "dim": 128,
    "block": 32,
    "max_length": 128,
    "shard_size": 8,
    "fraction": 0.2,
    "device": "cpu",
}


def save_tiny_llama(folder: Path, *, vocab_size: int | None = None, seed: int = 0) -> Path:
    """A Llama of 2 layers and width 16 with a byte-level tokenizer; ``vocab_size`` rows in its embedding."""
    tokenizer = small_tokenizer("words")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def examples(kind: str, n: int, start: int = 0) -> list[dict[str, Any]]:
    """``sums`` or ``names``; numbers keep them apart."""
    rows = []
    for i in range(start, start + n):
        question = f"What is {i} + {i + 3}?" if kind == "sums" else f"Greet guest number {i}, please."
        answer = str(2 * i + 3) if kind == "sums" else f"Good evening, dear guest of room {i}."
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"dataset": kind, "id": f"{kind}_{i}", "messages": messages})
    return rows


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """One object per line, with the blanks of another program than ours, so that copies are told from originals."""
    path.write_text("".join(json.dumps(row, separators=(" ,", " : ")) + "\n" for row in rows))
    return path


def write_pool(folder: Path, n: int = 20) -> Path:
    """``n`` examples of each kind, alternating."""
    pairs = zip(examples("sums", n), examples("names", n))
    return write_jsonl(folder / "pool.jsonl", [row for pair in pairs for row in pair])


def write_target(folder: Path, kind: str, n: int = 5) -> Path:
    """``n`` examples of a kind that are not in the pool; two subtasks."""
    rows = [{**row, "subtask": "even" if i % 2 else "odd"} for i, row in enumerate(examples(kind, n, start=1000))]
    return write_jsonl(folder / f"{kind}.jsonl", rows)


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a run on ``model``, ``pool.jsonl`` and the two targets in ``folder``, to ``run``."""
    return {
        **SETTINGS,
        "model": str(folder / "model"),
        "train": [str(folder / "pool.jsonl")],
        "targets": {kind: str(folder / f"{kind}.jsonl") for kind in ("sums", "names")},
        "out": str(folder / "run"),
        **changes,
    }


def make_inputs(folder: Path) -> Path:
    """All that :func:`config` names."""
    save_tiny_llama(folder / "model")
    write_pool(folder)
    for kind in ("sums", "names"):
        write_target(folder, kind)
    return folder
