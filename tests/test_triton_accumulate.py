"""The Triton accumulation of features against explicit matrices in float64, interpreted (and on a GPU where one is)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.triton_run import Run, kernels, require_triton, runners
from torch import Tensor

from less_fast.ops import philox
from less_fast.projection import TAG_SRHT_IN, TAG_SRHT_OUT

require_triton()

SEED = 2**40 + 3


@dataclass(frozen=True)
class Case:
    kind: str
    dim: int
    block: int = 1
    nnz: int = 1
    base: int = 2**33 + 7  # of runs or of entries; no multiple of the number of slots

    def __str__(self) -> str:
        return f"{self.kind}-{self.dim}-{self.block if self.kind == 'srht' else self.nnz}"


CASES = [
    Case("srht", 128, 64),
    Case("srht", 96, 16),
    Case("srht", 128, 128),
    Case("srht", 256, 256),
    Case("srht", 7, 1),
    Case("srht", 12, 2),
    Case("rademacher", 200),
    Case("gaussian", 130),
    Case("sjlt", 100),
    Case("sjlt", 64, nnz=3),
]
EACH_KIND = [CASES[0], CASES[6], CASES[7], CASES[9]]


@pytest.fixture(params=runners())
def run(request: pytest.FixtureRequest) -> Run:
    runner: Run = request.param
    return runner


def accumulate(run: Run, case: Case, features: Tensor, grads: Tensor, rule: tuple[Any, ...] = ()) -> Tensor:
    """``features`` after the launch has added to them; rows of ``grads`` run along the long side."""
    long = grads.shape[2]
    if case.kind == "srht":
        run("srht.accumulate_srht", features, grads, case.base, case.block, SEED, *rule)
    elif case.kind == "sjlt":
        run("sjlt.accumulate_sjlt", features, grads, case.base, long, 1, case.nnz, SEED, *rule)
    else:
        run("dense.accumulate_dense", features, grads, case.base, long, 1, SEED, case.kind, *rule)
    return features


def explicit(case: Case, short: int, long: int, index: Tensor | None = None) -> Tensor:
    """Pi, float64 (K, S·L), straight from the definitions; ``index`` (S, L) replaces rows along the long side."""
    dim, entries = case.dim, short * long
    j = (case.base + torch.arange(entries)) if index is None else index.flatten()
    if case.kind == "rademacher":
        return philox.rademacher_columns(j, dim, SEED, torch.float64).T / math.sqrt(dim)
    if case.kind == "gaussian":
        return philox.gaussian_columns(j, dim, SEED, torch.float64).T / math.sqrt(dim)
    pi = torch.zeros(dim, entries, dtype=torch.float64)
    if case.kind == "sjlt":
        buckets, bits = philox.sjlt_columns(j, dim, case.nnz, SEED)
        for entry in range(entries):
            for t in range(case.nnz):
                pi[buckets[entry, t], entry] += (1 - 2 * int(bits[entry, t])) / math.sqrt(case.nnz)
        return pi
    block = case.block
    hadamard = torch.tensor([[(-1.0) ** (i & k).bit_count() for k in range(block)] for i in range(block)]).double()
    for q in range(-(-long // block)):
        for s in range(short):
            rho = case.base + q * short + s
            row = torch.tensor([rho])
            before = philox.signs(row, block, TAG_SRHT_IN, SEED, torch.float64)
            after = philox.signs(row, block, TAG_SRHT_OUT, SEED, torch.float64)
            run_matrix = after.T * hadamard * before / math.sqrt(block)
            slot = rho % (dim // block)
            width = min(block, long - q * block)
            start = s * long + q * block
            pi[slot * block : (slot + 1) * block, start : start + width] += run_matrix[:, :width]
    return pi


def rule_of(name: str, short: int, long: int) -> tuple[tuple[Any, ...], Any]:
    """The launcher's arguments for a rule, and u(g) in float64 from the rule's own formula."""
    if name == "none":
        return (), lambda g: g
    if name == "sign":
        return (1,), torch.sign
    generator = torch.Generator().manual_seed(5)
    m = torch.randn(short, long, generator=generator)
    v = torch.rand(short, long, generator=generator)
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    if name == "less":
        launch = (2, beta1 * m, beta2 * v + eps, 1 - beta1, 1 - beta2, 0.0)
        return launch, lambda g: (beta1 * m + (1 - beta1) * g) / torch.sqrt(beta2 * v + (1 - beta2) * g**2 + eps)
    fix1, fix2 = 1 - beta1**3, 1 - beta2**3
    launch = (2, beta1 * m / fix1, beta2 * v / fix2, (1 - beta1) / fix1, (1 - beta2) / fix2, eps)
    return (
        launch,
        lambda g: (
            ((beta1 * m.double() + (1 - beta1) * g) / fix1)
            / (torch.sqrt((beta2 * v.double() + (1 - beta2) * g**2) / fix2) + eps)
        ),
    )


def check(
    run: Run,
    case: Case,
    n: int,
    short: int,
    long: int,
    rule: str = "less",
    repeat: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    generator = torch.Generator().manual_seed(n + long)
    grads = torch.randn(n, short, long, generator=generator).to(dtype)
    launch, u = rule_of(rule, short, long)
    sketch = u(grads.double()).flatten(1) @ explicit(case, short, long).T
    before = torch.randn(n, case.dim, generator=generator) * sketch.std()
    got = accumulate(run, case, before.clone(), grads, launch)
    error = float((got - before.double() - sketch).norm() / sketch.norm())
    assert error < 1e-6, f"relative error {error:.1e}"
    if repeat:
        assert torch.equal(got, accumulate(run, case, before.clone(), grads, launch)), "not the same bits twice"


@pytest.mark.parametrize("rule", ["none", "sign", "less", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rule(run: Run, case: Case, rule: str) -> None:
    check(run, case, 3, 3, 21, rule)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 65), (5, 3, 70), (4, 17, 8), (2, 1, 128)], ids=str)
@pytest.mark.parametrize("case", EACH_KIND, ids=str)
def test_shapes(run: Run, case: Case, shape: tuple[int, int, int]) -> None:
    check(run, case, *shape, repeat=True)


@pytest.mark.parametrize(
    "case, shape",
    [
        (Case("srht", 64, 64), (2, 3, 900)),
        (Case("srht", 96, 32), (1, 8, 130)),
        (Case("rademacher", 5), (1, 1, 1100)),
        (Case("gaussian", 5), (1, 2, 530)),
    ],
    ids=str,
)
def test_a_matrix_of_several_chunks(run: Run, case: Case, shape: tuple[int, int, int]) -> None:
    check(run, case, *shape, repeat=case.kind == "srht")


@pytest.mark.parametrize("rule", ["none", "sign", "less"])
@pytest.mark.parametrize("case", EACH_KIND, ids=str)
def test_float16_gradients_lose_nothing(run: Run, case: Case, rule: str) -> None:
    check(run, case, 2, 1, 137, rule, dtype=torch.float16)


def test_more_examples_than_a_dense_tile(run: Run) -> None:
    check(run, Case("rademacher", 20), 35, 1, 20)


@pytest.mark.parametrize("case", EACH_KIND[1:], ids=str)
def test_the_long_side_may_be_the_rows_of_the_matrix(run: Run, case: Case) -> None:
    short, long, n = 3, 37, 2
    grads = torch.randn(n, short, long, generator=torch.Generator().manual_seed(0))
    index = case.base + torch.arange(short)[:, None] + short * torch.arange(long)[None, :]
    expected = grads.double().flatten(1) @ explicit(case, short, long, index).T
    got = torch.zeros(n, case.dim)
    if case.kind == "sjlt":
        run("sjlt.accumulate_sjlt", got, grads, case.base, 1, short, case.nnz, SEED)
    else:
        run("dense.accumulate_dense", got, grads, case.base, 1, short, SEED, case.kind)
    assert (got - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("case", EACH_KIND, ids=str)
def test_an_example_does_not_feel_its_neighbours(run: Run, case: Case) -> None:
    grads = torch.randn(6, 3, 70, generator=torch.Generator().manual_seed(0))
    launch, _ = rule_of("less", 3, 70)
    batch = accumulate(run, case, torch.zeros(6, case.dim), grads, launch)
    alone = accumulate(run, case, torch.zeros(1, case.dim), grads[4:5].clone(), launch)
    if case.kind in ("srht", "sjlt"):
        assert torch.equal(batch[4:5], alone)
    else:  # the interpreter's product is the BLAS's, whose order of additions depends on the shape
        torch.testing.assert_close(batch[4:5], alone, rtol=1e-5, atol=1e-6)
    grads[2, 1, 69] = math.nan
    spoilt = accumulate(run, case, torch.zeros(6, case.dim), grads, launch)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(spoilt[others], batch[others])
    assert not spoilt[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [Case("srht", 512, 64), Case("srht", 96, 16), Case("sjlt", 100)], ids=str)
def test_batches_of_every_size_give_an_example_the_same_bits(run: Run, case: Case, dtype: torch.dtype) -> None:
    grads = torch.randn(33, 1, 137, generator=torch.Generator().manual_seed(0)).to(dtype)
    batch = accumulate(run, case, torch.zeros(33, case.dim), grads)
    for n in (1, 2, 7, 16, 17):  # every shape of a tile
        assert torch.equal(accumulate(run, case, torch.zeros(n, case.dim), grads[33 - n :].clone()), batch[33 - n :])


@pytest.mark.parametrize("case", [*EACH_KIND, Case("srht", 64, 64)], ids=str)
def test_rows_may_be_far_apart_and_nothing_else_is_written(run: Run, case: Case) -> None:
    grads = torch.randn(3, 2, 100, generator=torch.Generator().manual_seed(0))
    expected = accumulate(run, case, torch.zeros(3, case.dim), grads)
    rows = torch.full((3, 300), math.nan)
    rows[:, 20:220] = grads.flatten(1)
    apart = rows[:, 20:220].unflatten(1, (2, 100))
    buffer = torch.full((3, case.dim + 9), math.nan)
    buffer[:, : case.dim] = 0
    assert torch.equal(accumulate(run, case, buffer[:, : case.dim], apart), expected)
    assert torch.equal(buffer[:, : case.dim], expected)
    assert buffer[:, case.dim :].isnan().all()


def test_no_examples(run: Run) -> None:
    for case in EACH_KIND:
        assert accumulate(run, case, torch.zeros(0, case.dim), torch.zeros(0, 2, 9)).shape == (0, case.dim)


def test_fixed_point_of_the_sjlt_spans_the_range_of_float32(run: Run) -> None:
    case = Case("sjlt", 50)
    scales = torch.tensor([1e-30, 1e-20, 1.0, 1e20, 1e36, 0.0])
    grads = torch.randn(6, 2, 90, generator=torch.Generator().manual_seed(0)) * scales[:, None, None]
    grads[3, 0, 0] = 3e27  # dwarfs its row by seven orders of magnitude
    expected = grads.double().flatten(1) @ explicit(case, 2, 90).T
    got = accumulate(run, case, torch.zeros(6, 50), grads)
    for row in range(5):
        assert (got[row] - expected[row]).norm() / expected[row].norm() < 1e-6
    small = got[3][expected[3].abs() < 1e27] - expected[3][expected[3].abs() < 1e27]
    assert small.abs().max() < 1e-6 * 1e20
    assert torch.equal(got[5], torch.zeros(50))
    tiny = accumulate(run, case, torch.zeros(6, 50), grads * 1e-7)[0]  # near 1e-37, where the unit is 2^-126
    assert (tiny - expected[0] * 1e-7).abs().max() < 20 * 2.0**-126
    grads[1, 1, 3] = math.inf
    assert accumulate(run, case, torch.zeros(6, 50), grads)[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [Case("srht", 1024, 64), *EACH_KIND], ids=str)
def test_every_dtype_on_a_device(case: Case, dtype: torch.dtype) -> None:
    for n in (1, 16, 33, 100):
        grads = torch.randn(n, 1, 5000, generator=torch.Generator().manual_seed(n)).to(dtype)
        expected = grads.double().flatten(1) @ explicit(case, 1, 5000).T
        got = [torch.zeros(n, case.dim, device="cuda") for _ in range(2)]
        for features in got:
            add_sketch(case, features, grads.cuda())
        assert torch.equal(got[0], got[1]), "not the same bits twice"
        assert float((got[0].cpu() - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", [Case("srht", 4096, 64, base=0), Case("rademacher", 8), Case("sjlt", 4096)], ids=str)
def test_more_than_2_32_entries_on_a_device(case: Case) -> None:
    """Entries that are not 0 lie at the far end only, where the sketch of a slice has them near its start."""
    size, tail = 2**32 + 2**20, 2**16
    grads = torch.zeros(1, 1, size, dtype=torch.bfloat16, device="cuda")
    grads[..., -tail:] = torch.randn(tail, generator=torch.Generator().manual_seed(0)).cuda()
    whole, end = torch.zeros(1, case.dim, device="cuda"), torch.zeros(1, case.dim, device="cuda")
    add_sketch(case, whole, grads)
    skipped = size - tail
    base = case.base + (skipped // case.block if case.kind == "srht" else skipped)
    add_sketch(replace(case, base=base), end, grads[..., -tail:])
    torch.testing.assert_close(whole, end, rtol=1e-5, atol=1e-5)


def add_sketch(case: Case, features: Tensor, grads: Tensor) -> None:
    """Features += the sketch of flat gradients on their own device."""
    where = case.base, grads.shape[2], 1
    if case.kind == "srht":
        kernels("srht").accumulate_srht(features, grads, case.base, case.block, SEED)
    elif case.kind == "sjlt":
        kernels("sjlt").accumulate_sjlt(features, grads, *where, case.nnz, SEED)
    else:
        kernels("dense").accumulate_dense(features, grads, *where, SEED, case.kind)
