"""The ``triton`` backend as the ops room calls it, interpreted, against the reference on the same layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.triton_run import interpreted_backend, require_triton
from torch import Tensor

from less_fast.layout import ParameterLayout
from less_fast.ops.accumulate import BACKENDS, Backend, accumulate
from less_fast.ops.project import project
from less_fast.ops.reference import accumulate_reference
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_project_leaves_dtypes_that_a_backend_takes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    calls: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def run(features: Tensor, grads: Tensor, *where: Any) -> None:
        calls.append((grads.dtype, tuple(grads.shape)))
        accumulate_reference(features, grads, *where)

    grads, projection = torch.randn(9, 2**20, dtype=dtype), Projection("srht", 128)
    expected = project(grads, projection, backend="reference")
    monkeypatch.setitem(BACKENDS, "triton", Backend(lambda features, grads, *where: None, run))
    torch.testing.assert_close(project(grads, projection, backend="triton"), expected)
    assert calls == [(dtype, (9, 1, 2**20))]
    calls.clear()
    strided = grads.T.contiguous().T
    torch.testing.assert_close(project(strided, projection, backend="triton"), expected)
    assert len(calls) > 1 and all(found == torch.float32 for found, _ in calls)


def test_it_says_why_it_cannot_run() -> None:
    reason = supports(torch.zeros(1, 8), torch.zeros(1, 1, 1), Projection("sjlt", 8))
    assert reason is not None and "CUDA" in reason
