"""A small model, a checkpoint such as LESS leaves, a pool, and ``get_info`` called on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from less_fast.compat.less import get_info
from support.data_less import less_encode
from support.data_tokenizers import small_tokenizer
from support.less_loop import save_checkpoint
from support.tiny import examples, save_tiny_llama, write_jsonl

# Two batches and more; a long question leaves fewer labels, and its end is cut off.
ROWS = [*examples("sums", 12), *examples("names", 12)]
ROWS[5] = {"prompt": "Say it again: " + "well, " * 12, "completion": "well. " * 4, "dataset": "pairs", "id": "pair"}
LENGTH = 64


def make_inputs(root: Path) -> Path:
    """``model``, a ``checkpoint`` of an adapter on it, and ``pool.jsonl`` with ROWS."""
    save_tiny_llama(root / "model")
    save_checkpoint(root / "checkpoint", root / "model", small_tokenizer("words"))
    write_jsonl(root / "pool.jsonl", ROWS)
    return root


def info(folder: Path, out: Path, *flags: Any, kind: str = "grads", model: str = "checkpoint") -> Path:
    """Run the command in this process."""
    what = [] if "--task" in flags else ["--train_file", folder / "pool.jsonl"]
    common = ["--info_type", kind, "--model_path", folder / model, "--output_path", out, "--device", "cpu"]
    get_info.main([str(x) for x in [*common, *what, "--max_length", LENGTH, *flags]])
    return out


def load(path: Path) -> torch.Tensor:
    return torch.load(path, weights_only=True)


def encoded(
    rows: list[dict[str, Any]], max_length: int = LENGTH, tokenizer: Any = None
) -> list[tuple[list[int], list[int]]]:
    return [less_encode(row, tokenizer or small_tokenizer("words"), max_length) for row in rows]
