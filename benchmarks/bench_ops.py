"""How fast is each sketch on gradients that exist, beside a copy of them? Run `pytest benchmarks/bench_ops.py`.

The sizes are those of one LoRA matrix of a 7B model at rank 16 (16 x 4096) and a batch of 16.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from less_fast.layout import ParameterLayout
from less_fast.ops.accumulate import BACKENDS, accumulate, accumulate_cost
from less_fast.ops.rule import NONE, Rule
from less_fast.projection import Projection

N, S, L = 16, 16, 4096
PARAMETER = ParameterLayout.build([("q_proj.lora_A.default.weight", S, L)]).parameters[0]
PROJECTIONS = [Projection("srht"), Projection("sjlt"), Projection("rademacher", 512), Projection("gaussian", 512)]


@pytest.fixture(scope="module")
def grads() -> torch.Tensor:
    return torch.randn(N, S, L, generator=torch.Generator().manual_seed(0)) * 1e-3


def test_copy(benchmark: Any, grads: torch.Tensor) -> None:
    """The baseline: one read and one write of the gradients."""
    out = torch.empty_like(grads)
    benchmark(out.copy_, grads)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rule", ["none", "adam"])
@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: f"{p.kind}-{p.dim}")
def test_accumulate(benchmark: Any, grads: torch.Tensor, projection: Projection, rule: str, backend: str) -> None:
    features = torch.zeros(N, projection.dim)
    tables = torch.randn(S, L) * 1e-3, torch.rand(S, L) * 1e-6 + 1e-8
    update = Rule("adam", *tables, 0.1, 0.001, 0.0) if rule == "adam" else NONE
    reason = BACKENDS[backend].supports(features, grads, projection, update)
    if reason is not None:
        pytest.skip(reason)
    flops, n_bytes = accumulate_cost(N, PARAMETER, projection, update)
    benchmark.extra_info.update(flops=flops, bytes=n_bytes)
    benchmark(accumulate, features, grads, PARAMETER, 0, projection, update, backend=backend)
    assert torch.isfinite(features).all() and features.any()
