"""The worker of LESS's loop: one example a batch, one flat vector, Adam, a dense ±1 projection of 16 at a time.

Written from the description of what LESS does; float32 throughout, as its rounding to float16 is of no use on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peers_serve import Job, Runner, serve, trainable_model
from torch import Tensor

AT_ONCE = 16
BLOCK = 128


def loop(job: Job, project: Callable[[Tensor], Tensor]) -> Runner:
    """LESS's loop around a projection of (16, P) to (16, K)."""
    model, adapter = trainable_model(job)
    state = torch.load(job.optimizer_file, weights_only=True)["state"]
    m, v = (torch.cat([state[i][key].flatten() for i in range(len(adapter))]) for key in ("exp_avg", "exp_avg_sq"))
    examples = [job.batch([n]) for n in range(len(job.examples))]

    def update(example: dict[str, Tensor]) -> Tensor:
        model.zero_grad()
        model(**example).loss.backward()
        g = torch.cat([p.grad.view(-1) for p in adapter.values() if p.grad is not None])
        return (0.9 * m + 0.1 * g) / torch.sqrt(0.999 * v + 0.001 * g.square() + 1e-8)

    def work() -> list[Tensor]:
        return [
            project(torch.stack([update(example) for example in examples[i : i + AT_ONCE]]))
            for i in range(0, len(examples), AT_ONCE)
        ]

    return Runner(work, torch.cat)


def dense(vectors: Tensor, dim: int) -> Tensor:
    """Blocks of 128 columns of signs, drawn afresh from the seed as no machine holds P x K at LESS's size.

    A byte of random bits is turned into eight signs by a table, which is quicker than torch's own coin flips.
    """
    table = (torch.arange(256)[:, None] >> torch.arange(8) & 1).mul(2).sub(1).float()
    p, random = vectors.shape[1], torch.Generator().manual_seed(0)
    out = vectors.new_empty(len(vectors), dim)
    for column in range(0, dim, BLOCK):
        words = torch.randint(-(2**63), 2**63 - 1, (p * BLOCK // 64,), generator=random)
        signs = torch.nn.functional.embedding(words.view(torch.uint8).int(), table).view(p, BLOCK)
        block = vectors @ signs
        out[:, column : column + BLOCK] = block[:, : dim - column]
    return out


def start(job: Job, variant: str) -> Runner:
    """``dense``, or ``free`` without any projection."""
    project: dict[str, Any] = {"dense": lambda vectors: dense(vectors, job.dim), "free": lambda vectors: vectors}
    return loop(job, project[variant])


if __name__ == "__main__":
    serve(None, start)
