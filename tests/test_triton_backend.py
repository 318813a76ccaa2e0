"""The ``triton`` backend as the ops room calls it, interpreted, against the reference on the same layout."""

from __future__ import annotations

import pytest
import torch
from support.triton_run import interpreted_backend, require_triton

from less_fast.layout import ParameterLayout
from less_fast.ops.accumulate import accumulate
from less_fast.ops.rule import NONE, Rule
from less_fast.ops.triton import supports
from less_fast.projection import Projection

LAYOUT = ParameterLayout.build([("q.lora_A.default.weight", 3, 70), ("q.lora_B.default.weight", 33, 3)])
KINDS = [
    Projection("identity", LAYOUT.size),
    Projection("rademacher", 96, seed=3),
    Projection("gaussian", 96, seed=2**40 + 3),
    Projection("sjlt", 50, seed=4, nnz=2),
    Projection("srht", 64, seed=5, block=16),
]


@pytest.mark.parametrize("projection", KINDS, ids=lambda p: p.kind)
@pytest.mark.parametrize("kind", ["none", "sign", "adam"])
def test_the_backend_equals_the_reference(projection: Projection, kind: str) -> None:
    require_triton()
    generator = torch.Generator().manual_seed(0)
    got, expected = torch.zeros(2, projection.dim), torch.zeros(2, projection.dim, dtype=torch.float64)
    for parameter, base in zip(LAYOUT.parameters, LAYOUT.run_bases(projection.block)):
        shape = parameter.short, parameter.long
        grads = torch.randn(2, *shape, generator=generator) * 1e-3
        rule = NONE if kind == "none" else Rule(kind)
        if kind == "adam":
            moments = torch.randn(shape, generator=generator) * 1e-3, torch.rand(shape, generator=generator) * 1e-6
            rule = Rule("adam", moments[0], moments[1] + 1e-8, 0.1, 0.001, 1e-8)
        got = interpreted_backend(got, grads, parameter, base, projection, rule)
        accumulate(expected, grads.double(), parameter, base, projection, rule, backend="reference")
    assert (got - expected).norm() < 2e-6 * expected.norm()


def test_it_says_why_it_cannot_run() -> None:
    reason = supports(torch.zeros(1, 8), torch.zeros(1, 1, 1), Projection("sjlt", 8))
    assert reason is not None and "CUDA" in reason
