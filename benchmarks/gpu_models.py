"""The models and batches of the GPU benchmarks: published shapes with random weights, and real examples' lengths."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import data_folder, llama, with_adapter
from gpu_session import ASSUMED_FLOPS_PER_S, MODEL_SHARE, Session, Work
from torch import Tensor, nn

from less_fast.data import collate, plan_batches
from less_fast.data.templates import Encoded, encode_all
from less_fast.model.budget import auto_token_budget
from less_fast.model.packed import Layout
from less_fast.model.sites import find_sites

# Lengths of 20,000 public instruction examples (33 sets: GSM8K, FLAN CoT, P3, XQuAD, GPTeacher, MBPP and others) in
# LESS's chat format and GPT-2's tokens, sorted: the values at 1/64, 3/64, … 63/64. Their mean is 183.
QUANTILES: tuple[int, ...] = (29, 31, 37, 45, 54, 60, 65, 69, 74, 78, 82, 86, 90, 95, 100, 106)
QUANTILES += (112, 118, 124, 130, 138, 147, 156, 169, 184, 203, 231, 274, 344, 465, 669, 1152)
# What LESS reports of its own corpus: 371 tokens an example, 105 of them the answer.
MEAN_TOKENS, LABEL_SHARE = 371, 105 / 371
SHORT_TOKENS = 43
LONGEST = 2048


@dataclass(frozen=True)
class Shape:
    """A causal LM of Llama's kind; sizes as in its configuration."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = True

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' linear modules."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.layers * self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate)

    @property
    def weights(self) -> int:
        """Weights of the model, without its norms."""
        return self.layer_weights + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def work(self, tokens: int, labels: int, batches: int) -> Work:
        """Forward and backward of the frozen model, logits at labels only: weights are read twice a batch."""
        flops = 4.0 * (self.layer_weights * tokens + self.vocabulary * self.hidden * labels)
        return Work(2.0 * batches * 2 * self.weights, flops)

    def seconds(self, tokens: int) -> float:
        """Estimate of one forward and backward pass, launches included."""
        labels = int(LABEL_SHARE * tokens)
        return 0.05 + self.work(tokens, labels, 1).flops / (MODEL_SHARE * ASSUMED_FLOPS_PER_S)


LLAMA_7B = Shape("Llama-2-7B", 4096, 32, 32, 32, 11008, 32000, tied=False)
LLAMA_1B = Shape("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256)
QWEN_HALF_B = Shape("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936)
TINY = Shape("tiny", 32, 2, 4, 2, 48, 64)


@dataclass(frozen=True)
class Lengths:
    """A named set of example lengths, in tokens."""

    name: str
    values: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.values)


def base_lengths() -> Sequence[int]:
    """Lengths of real examples: of LESS_FAST_DATA's pool where it is set, else the quantiles above."""
    folder = data_folder()
    if folder is None or not (folder / "pool_2k.jsonl.gz").exists():
        return QUANTILES
    return sorted(len(encoded.input_ids) for encoded in _encode(folder))


def _encode(folder: Path) -> list[Encoded]:
    from transformers import AutoTokenizer

    with gzip.open(folder / "pool_2k.jsonl.gz", "rt", encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizers/gpt2_hf")
    return encode_all(examples, tokenizer, "tulu", 8 * LONGEST)


def real_lengths(n: int, mean: int, base: Sequence[int]) -> Lengths:
    """N lengths spread as those of ``base``, scaled so that their mean is ``mean`` with none above 2,048."""
    picked = [base[int((i + 0.5) * len(base) / n)] for i in range(n)]
    factor = 1.0
    for _ in range(50):  # the cap takes from the longest, so the rest has to grow a little more
        values = [min(LONGEST, max(4, round(factor * value))) for value in picked]
        factor *= mean * n / sum(values)
    return Lengths(f"mean {round(sum(values) / n)} tokens", tuple(values))


def real_batch(mean: int, tokens: int, base: Sequence[int]) -> Lengths:
    """The length-sorted batch of at most ``tokens`` padded tokens whose examples are nearest to ``mean`` in length."""
    values = real_lengths(256, mean, base).values
    batches = [[values[i] for i in batch] for batch in plan_batches(values, tokens)]
    nearest = min(batches, key=lambda batch: abs(sum(batch) / len(batch) - mean))
    return Lengths(f"mean {round(sum(nearest) / len(nearest))} tokens", tuple(nearest))


def long_lengths(n: int, tokens: int = LONGEST) -> Lengths:
    """N examples of the longest length."""
    return Lengths(f"{tokens} tokens each", (tokens,) * n)


def make_model(session: Session, shape: Shape, rank: int) -> nn.Module:
    """The shape with random weights in bf16 (float32 on a CPU) and a random adapter on q, k, v and o."""
    dtype = torch.bfloat16 if session.cuda else torch.float32
    sizes = shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.intermediate, shape.vocabulary
    with torch.device(session.device):
        model = llama(*sizes, tied=shape.tied, device=session.device, dtype=dtype)
        return with_adapter(model, rank)


def make_batches(
    session: Session, shape: Shape, model: nn.Module, lengths: Lengths, layout: Layout
) -> list[dict[str, Tensor]]:
    """Length-sorted batches of random tokens on the host, under the budget that extraction chooses itself."""
    generator = torch.Generator().manual_seed(3)
    budget = 64 if session.tiny else auto_token_budget(model, find_sites(model)[0], session.device, LONGEST)
    encoded = []
    for length in lengths.values:
        ids = torch.randint(shape.vocabulary, (length,), generator=generator).tolist()
        prompt = length - max(1, round(LABEL_SHARE * length))
        encoded.append(Encoded(ids, [-100] * prompt + ids[prompt:], False))
    plan = plan_batches(lengths.values, budget, packed=layout.packed)
    return [collate([encoded[i] for i in batch], 0) for batch in plan]


def label_count(batches: Sequence[dict[str, Tensor]]) -> int:
    """Labels of all batches."""
    return sum(int((batch["labels"] >= 0).sum()) for batch in batches)
