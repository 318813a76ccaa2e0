"""How fast is the fused gradient, Adam and sketch of one adapter matrix, beside the same with gradients written out?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_models import LLAMA_1B, LLAMA_7B, MEAN_TOKENS, TINY, Shape, base_lengths, real_batch
from gpu_session import Bar, Session, Work, median_ratio, must_agree
from torch import Tensor

from less_fast import Projection
from less_fast.layout import Parameter, ParameterLayout
from less_fast.ops.outer import Scratch
from less_fast.ops.outer_sketch import (
    Target,
    lanes_needed,
    outer_sketch_cost,
    outer_sketch_reference,
    outer_sketches,
    prepare,
    sum_lanes,
    why_not_fused,
)
from less_fast.ops.rule import Rule
from less_fast.segments import Segments

# Sets of buffers that calls go round: together several times an H100's 50 MB of L2, so that operands come from memory.
SETS = 8
TOKENS = 4096  # padded tokens of the batch, about 11 examples

# Of float64 products of the very operands. Updates cut to two bfloat16 parts are off by 2e-6, to one by 2e-3.
TOLERANCE = 5e-5


@dataclass(frozen=True)
class Case:
    """One adapter matrix of a model: ``side`` A has the rank as rows, B as columns."""

    shape: Shape
    rank: int
    side: str

    @property
    def parameter(self) -> Parameter:
        sizes = (self.rank, self.shape.hidden) if self.side == "A" else (self.shape.hidden, self.rank)
        return ParameterLayout.build([(f"q_proj.lora_{self.side}.default.weight", *sizes)]).parameters[0]

    def __str__(self) -> str:
        return f"{self.shape.name} r={self.rank} lora_{self.side}"


CASES = [Case(shape, rank, side) for shape, rank in ((LLAMA_7B, 128), (LLAMA_1B, 16), (LLAMA_1B, 64)) for side in "AB"]


@dataclass(frozen=True)
class Operands:
    """One set of buffers: flat (tokens, S) and (tokens, L), zero behind each row's tokens, and Adam's tables."""

    left: Tensor
    right: Tensor
    rule: Rule


def estimate(session: Session) -> float:
    """Kernels last micro- to milliseconds; compiling each of the six cases takes a few seconds."""
    return 0.0 if session.tiny else 6 * 5.0


def run(session: Session) -> None:
    """Every case, in the model's dtype."""
    mean, tokens, dim = (6, 24, 64) if session.tiny else (MEAN_TOKENS, TOKENS, 8192)
    lengths = real_batch(mean, tokens, base_lengths())
    for case in [Case(TINY, 4, side) for side in "AB"] if session.tiny else CASES:
        if session.fits(f"outer {case}", estimate(session) / len(CASES)):
            with session.attempt(f"outer {case}"):
                _measure(session, case, lengths.values, Projection("srht", dim))
        session.release()


def make_operands(session: Session, parameter: Parameter, segments: Segments, seed: int) -> Operands:
    """Random data of a model's magnitudes."""
    generator = torch.Generator(session.device).manual_seed(seed)
    dtype = torch.bfloat16 if session.cuda else torch.float32
    assert segments.row_length is not None
    shape = len(segments), segments.row_length
    lengths = torch.tensor(segments.lengths, device=session.device)
    live = torch.arange(shape[1], device=session.device) < lengths[:, None]

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=session.device)

    left = torch.where(live[..., None], draw(*shape, parameter.short) * 1e-3, 0.0).to(dtype).flatten(0, 1)
    right = draw(*shape, parameter.long).to(dtype).flatten(0, 1)
    sides = parameter.short, parameter.long
    rule = Rule("adam", 0.9e-4 * draw(*sides), 1e-8 * draw(*sides).square() + 1e-8, 0.1, 0.001, 0.0)
    return Operands(left, right, rule)


def _measure(session: Session, case: Case, lengths: Sequence[int], projection: Projection) -> None:
    parameter, device = case.parameter, session.device
    layout = ParameterLayout((parameter,))
    segments = Segments.padded(lengths, max(lengths), device)
    sets = [make_operands(session, parameter, segments, seed) for seed in range(2 if session.tiny else SETS)]
    scratch = Scratch(device)
    ours = "auto" if session.cuda else "cpu"
    width = lanes_needed(layout, projection, device, backend=ours)
    prepared = prepare(parameter, 0, projection, sets[0].rule, device, backend=ours)
    lanes = torch.zeros(width, len(segments), projection.dim, device=device)

    def target(data: Operands, lanes: Tensor) -> Target:
        return Target(lanes, 0, projection, data.rule, prepared)

    def fused(i: int, lanes: Tensor = lanes) -> None:
        data = sets[i % len(sets)]
        outer_sketches([target(data, lanes)], data.left, data.right, segments, parameter, backend=ours)

    def written(i: int, lanes: Tensor = lanes, backend: str = ours) -> None:
        data = sets[i % len(sets)]
        place = segments, parameter, backend, scratch
        outer_sketch_reference([target(data, lanes)], data.left, data.right, *place)

    reason = why_not_fused(target(sets[0], lanes), sets[0].left, sets[0].right, parameter)
    if reason is not None and session.cuda:
        raise AssertionError(f"{case} does not run fused: {reason}")
    exact = torch.zeros(1, *lanes.shape[1:], device=device, dtype=torch.float64)
    written(0, exact, "reference")
    errors = {}
    for name, call in (("less_fast", fused), ("gradients written out", written)):
        found = torch.zeros_like(lanes)
        call(0, found)
        errors[name] = must_agree(f"{case}, {name}", sum_lanes(found), exact[0], TOLERANCE)
    again = torch.zeros_like(lanes)
    fused(0, again)
    first = torch.zeros_like(lanes)
    fused(0, first)
    if not torch.equal(again, first):
        raise AssertionError(f"{case} gives other bits when called again")
    run_of: dict[str, Any] = {
        "less_fast": fused,
        "gradients written out": written,
        "torch": lambda i: written(i, backend="reference"),
    }
    seconds = session.interleaved(run_of)
    tokens = sum(lengths)
    item = sets[0].left.dtype.itemsize
    flops, n_bytes = outer_sketch_cost(tokens, len(segments), parameter, projection, sets[0].rule, item)
    rows = []
    for name, times in seconds.items():
        ratio = median_ratio(seconds, name, "gradients written out")
        rows.append(
            session.row(
                "outer",
                name,
                times,
                shape=f"{case}, {len(segments)} x {tokens / len(segments):.0f} tokens to {projection.dim}",
                dtype=str(sets[0].left.dtype).removeprefix("torch."),
                work=Work(n_bytes, flops),
                baseline="gradients written out",
                ratio_to_baseline=ratio,
                bar=Bar("of gradients written out", ratio, 1.0) if name == "less_fast" else None,
                examples=len(segments),
                tokens=tokens,
                check_error=errors.get(name),
            )
        )
    session.write("outer", rows)
