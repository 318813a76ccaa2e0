"""Signs, buckets and normals of the Triton kernels against the definition in torch."""

from __future__ import annotations

import pytest
import torch
from support.triton_run import Run, require_triton, runners

from less_fast.ops import philox
from less_fast.projection import TAG_RADEMACHER, TAG_SRHT_IN, TAG_SRHT_OUT

require_triton()

SEEDS = [0, 2**31, 2**32 + 5, 0x123456789ABCDEF0, 2**64 - 1]
BASES = [0, 2**31 - 4, 2**32 - 3, 2**40 - 5]
CPU = torch.device("cpu")
N = 9


@pytest.fixture(params=runners())
def run(request: pytest.FixtureRequest) -> Run:
    runner: Run = request.param
    return runner


@pytest.mark.parametrize("seed", SEEDS)
def test_packed_signs_equal_bit_for_bit(run: Run, seed: int) -> None:
    shifts = torch.arange(32)
    for base in BASES:
        for tag, n_bits in [(TAG_SRHT_IN, 64), (TAG_SRHT_OUT, 1), (TAG_RADEMACHER, 200), (TAG_RADEMACHER, 1024)]:
            packed = run("philox.packed_signs", base, N, n_bits, tag, seed, CPU)
            assert packed.shape == (N, -(-n_bits // 32))
            bits = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :n_bits]
            expected = philox.sign_bits(torch.arange(base, base + N), n_bits, tag, seed)
            assert torch.equal(bits.to(torch.uint8), expected), (base, tag, n_bits)


@pytest.mark.parametrize("seed", SEEDS)
def test_buckets_and_signs_of_the_sjlt_equal_bit_for_bit(run: Run, seed: int) -> None:
    for base in BASES:
        for dim, nnz in [(1, 1), (1000, 1), (8192, 2), (2**31 - 1, 5)]:
            buckets, bits = run("philox.sjlt_table", base, N, dim, nnz, seed, CPU)
            expected_buckets, expected_bits = philox.sjlt_columns(torch.arange(base, base + N), dim, nnz, seed)
            assert torch.equal(buckets.long(), expected_buckets), (base, dim, nnz)
            assert torch.equal(bits, expected_bits), (base, dim, nnz)


@pytest.mark.parametrize("seed", SEEDS)
def test_dense_columns(run: Run, seed: int) -> None:
    for base in BASES:
        index = torch.arange(base, base + N)
        for dim in (1, 130, 384):
            signs = run("philox.dense_columns", "rademacher", base, N, dim, seed, CPU)
            assert torch.equal(signs, philox.rademacher_columns(index, dim, seed)), (base, dim)
            normals = run("philox.dense_columns", "gaussian", base, N, dim, seed, CPU)
            expected = philox.gaussian_columns(index, dim, seed, torch.float64)
            assert (normals - expected).abs().max() < 2e-6, (base, dim)


def test_normals_over_many_angles_and_radii(run: Run) -> None:
    normals = run("philox.dense_columns", "gaussian", 0, 60, 1024, 7, CPU)
    expected = philox.gaussian_columns(torch.arange(60), 1024, 7, torch.float64)
    assert expected.abs().max() > 4  # far into the tail, where the radius is largest
    assert (normals - expected).abs().max() < 2e-6


def test_more_rows_than_one_program(run: Run) -> None:
    index = torch.arange(600)
    packed = run("philox.packed_signs", 0, 600, 32, TAG_SRHT_IN, 3, CPU)
    bits = (packed >> torch.arange(32)) & 1
    assert torch.equal(bits.to(torch.uint8), philox.sign_bits(index, 32, TAG_SRHT_IN, 3))
    buckets, _ = run("philox.sjlt_table", 0, 600, 77, 1, 3, CPU)
    assert torch.equal(buckets.long(), philox.sjlt_columns(index, 77, 1, 3)[0])
