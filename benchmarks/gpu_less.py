"""How fast is extraction beside LESS's own loop: one example at a time, flat vectors, a dense ±1 projection?

The loop is written from the description of what LESS does (Xia et al. 2024 and its published code): batch 1, the mean
loss over all logits, the gradients joined to one vector of P, Adam on it with eps inside the root, 16 vectors stacked
in fp16, one dense Rademacher product to K. LESS's own projector is a CUDA extension; the product here is torch's, with
signs drawn as cheaply as torch can. A second row leaves the projection out: any projector's time can be added to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from gpu_dense import dense_projection
from gpu_models import LLAMA_7B, MEAN_TOKENS, TINY, base_lengths, label_count, make_batches, real_lengths
from gpu_overhead import Setup, build_seconds, make_setup
from gpu_session import ASSUMED_BYTES_PER_S, Bar, Session, median_ratio
from torch import Tensor, nn

from less_fast.optim import AdamState

N = 16  # what LESS projects at a time
LEAST_FACTOR = 8.0


def estimate(session: Session) -> float:
    """Each example alone takes about 0.15 s, and 16 of them move P·K signs five times."""
    if session.tiny:
        return 0.0
    projection = 10.0 * 2**27 * 8192 / ASSUMED_BYTES_PER_S
    return build_seconds(LLAMA_7B) + (session.repeats + 2) * (2 * N * 0.15 + projection + 1.0)


@contextmanager
def trainable_adapter(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Within the context autograd computes the gradients of the LoRA weights, as LESS lets it."""
    adapter = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in adapter:
        parameter.requires_grad_(True)
    try:
        yield adapter
    finally:
        for parameter in adapter:
            parameter.requires_grad_(False)
            parameter.grad = None


def flat_moments(setup: Setup, session: Session) -> tuple[Tensor, Tensor]:
    """Adam's m and v as flat vectors of P on the device, in the model's order."""
    state = setup.outputs[0].precondition
    assert isinstance(state, AdamState)
    moments = [state.moments[parameter.name] for parameter in setup.extractor.layout.parameters]
    m, v = (torch.cat([getattr(moment, which).reshape(-1) for moment in moments]) for which in ("m", "v"))
    return m.to(session.device), v.to(session.device)


def adam_vector(
    model: Any, example: dict[str, Tensor], adapter: Sequence[nn.Parameter], m: Tensor, v: Tensor
) -> Tensor:
    """Adam's update for one example's gradient, a float32 vector of P."""
    model.zero_grad()
    model(**example).loss.backward()
    g = torch.cat([p.grad.view(-1) for p in adapter if p.grad is not None])
    return (0.9 * m + 0.1 * g) / torch.sqrt(0.999 * v + 0.001 * g.square() + 1e-8)


def less_loop(
    setup: Setup, examples: Sequence[dict[str, Tensor]], m: Tensor, v: Tensor, dim: int, half: torch.dtype
) -> Tensor:
    """Features (N, dim) of at most 16 examples; dim 0 leaves the projection out and returns the stacked vectors."""
    with trainable_adapter(setup.model) as adapter:
        vectors = [adam_vector(setup.model, example, adapter, m, v) for example in examples]
        stacked = torch.stack(vectors).to(half)
    return dense_projection(stacked, dim) if dim else stacked


def run(session: Session) -> None:
    """Llama-2-7B's shape at rank 128, 16 examples."""
    shape, rank, n, mean = (TINY, 4, 4, 12) if session.tiny else (LLAMA_7B, 128, N, MEAN_TOKENS)
    lengths = real_lengths(n, mean, base_lengths())
    setup = make_setup(session, shape, rank)
    batches = make_batches(session, shape, setup.model, lengths, setup.extractor.batches)
    examples = [example for batch in batches for example in alone(batch, session.device)]
    m, v = flat_moments(setup, session)
    dim, half = setup.outputs[0].projection.dim, torch.float16 if session.cuda else torch.float32

    def ours(i: int) -> Tensor:
        return torch.cat([setup.extractor(batch).features[0] for batch in batches])

    difference = compare(less_loop(setup, examples, m, v, dim, half), ours(0), dim)
    seconds = session.interleaved(
        {
            "LESS's loop": lambda i: less_loop(setup, examples, m, v, dim, half),
            "LESS's loop, projection free": lambda i: less_loop(setup, examples, m, v, 0, half),
            "less_fast": ours,
        },
        calls=1,
    )
    work = shape.work(lengths.tokens, label_count(batches), len(batches))
    rows = []
    for name, times in seconds.items():
        ratio = median_ratio(seconds, name, "LESS's loop")
        rows.append(
            session.row(
                "less",
                name,
                times,
                shape=f"{setup.name}, {n} x {lengths.name} to {dim}, {setup.extractor.batches.name}",
                dtype=str(next(setup.model.parameters()).dtype).removeprefix("torch."),
                work=work,
                baseline="LESS's loop",
                ratio_to_baseline=ratio,
                bar=Bar("x faster than LESS's loop", 1 / ratio, LEAST_FACTOR, True) if name == "less_fast" else None,
                examples=n,
                tokens=lengths.tokens,
                cosine_difference=difference,
            )
        )
    session.write("less", rows)


def alone(batch: dict[str, Tensor], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The examples of a padded batch as batches of one on the device, without padding."""
    for row, mask in enumerate(batch["attention_mask"]):
        length = int(mask.sum())
        yield {name: tensor[row : row + 1, :length].to(device) for name, tensor in batch.items()}


def compare(theirs: Tensor, ours: Tensor, dim: int) -> float:
    """RMS difference of the two features' cosines, which two independent random matrices leave at about 1/sqrt(dim).

    Raises AssertionError where it, or the ratio of any norm, is out of what chance explains.
    """
    norms = theirs.norm(dim=1) / ours.norm(dim=1)
    cosines = [torch.nn.functional.normalize(x.double(), dim=1) for x in (theirs, ours)]
    difference = float((cosines[0] @ cosines[0].T - cosines[1] @ cosines[1].T).square().mean().sqrt())
    if not (difference <= 4 * dim**-0.5 and bool(((norms - 1).abs() <= 8 * dim**-0.5).all())):
        raise AssertionError(
            f"LESS's loop and extraction differ: cosines by {difference:.3f}, norms by up to "
            f"{float((norms - 1).abs().max()):.3f}; not timing different work"
        )
    return difference
