"""Products of stored codes with queries against float64, interpreted (and on a GPU where one is); their tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.products import (
    DTYPES,
    assert_close,
    interpreted_host_products,
    numpy_codes,
    products_check,
    random_codes,
    reference,
)
from support.triton_run import Run, in_interpreter, kernels, runners
from torch import Tensor

from less_fast.errors import LessFastError, UnsupportedBackendError
from less_fast.ops.device_products import (
    TORCH_DTYPES,
    DeviceBits,
    DeviceQueries,
    HostProducts,
    device_inner_products,
    supports,
)

kernel = kernels("inner_products")
CPU = torch.device("cpu")
on_device = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=runners())
def run(request: pytest.FixtureRequest) -> Run:
    runner: Run = request.param
    return runner


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multiply(run: Run, codes: Tensor, dtype: str, queries: Tensor, factor: Tensor, out: Tensor, add: bool) -> Tensor:
    parts, query_factor, _ = DeviceQueries(queries.numpy(), CPU).operands(dtype)
    run("inner_products.inner_products", out, codes, parts, factor, query_factor, None, add)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, n_queries, dim", [(1, 1, 1), (5, 3, 137), (131, 17, 64), (257, 70, 300), (9, 16, 1100)])
def test_products_are_those_of_float32(run: Run, dtype: str, n: int, n_queries: int, dim: int) -> None:
    codes, queries, factor = random_codes(dtype, n, dim), draw(n_queries, dim), draw(n, seed=2)
    out = multiply(run, codes, dtype, queries, factor, torch.full((n, n_queries), torch.nan), False)
    assert_close(out, codes, queries, factor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_one_sign_and_queries_of_all_sizes(run: Run, dtype: str) -> None:
    codes = random_codes(dtype, 40, 2048) if dtype == "1bit" else random_codes(dtype, 40, 2048).abs()
    sizes = torch.logspace(-30, 30, 9)[:, None] * torch.logspace(0, -8, 2048)
    queries = draw(9, 2048).abs() * sizes
    factor = torch.ones(40)
    out = multiply(run, codes, dtype, queries, factor, torch.zeros(40, 9), False)
    for q in range(9):
        assert_close(out[:, q : q + 1], codes, queries[q : q + 1], factor)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_parts_of_a_query_add_up_to_all_of_its_bits(run: Run, dtype: str) -> None:
    queries = draw(3, 100)
    codes = torch.eye(100).to(TORCH_DTYPES[dtype])
    out = multiply(run, codes, dtype, queries, torch.ones(100), torch.zeros(100, 3), False)
    assert torch.equal(out, queries.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_in_place_and_touches_nothing_else(run: Run, dtype: str) -> None:
    n, n_queries, dim = 21, 5, 76
    codes, queries, factor = random_codes(dtype, n, dim), draw(n_queries, dim), draw(n, seed=2)
    width = codes.shape[1]
    wider = torch.full((n + 1, width + 7), 113).to(codes.dtype)  # of a float, NaN: what masks alone keep out
    if codes.is_floating_point():
        wider.fill_(torch.nan)
    wider[:n, :width] = codes
    before = torch.full((n + 1, n_queries + 3), 7.0)
    out = before.clone()
    multiply(run, wider[:n, :width], dtype, queries, factor, out[:n, :n_queries], True)
    fresh = multiply(run, codes, dtype, queries, factor, torch.zeros(n, n_queries), False)
    assert torch.equal(out[:n, :n_queries], fresh + 7.0)
    out[:n, :n_queries] = 7.0
    assert torch.equal(out, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_whatever_else_is_in_the_call(run: Run, dtype: str) -> None:
    codes, queries, factor = random_codes(dtype, 140, 150), draw(4, 150), draw(140, seed=2)
    whole = multiply(run, codes, dtype, queries, factor, torch.zeros(140, 4), False)
    again = multiply(run, codes, dtype, queries, factor, torch.zeros(140, 4), False)
    part = multiply(run, codes[130:].contiguous(), dtype, queries, factor[130:], torch.zeros(10, 4), False)
    assert torch.equal(whole, again) and torch.equal(whole[130:], part)


def signs(codes: Tensor, dim: int) -> np.ndarray:
    bits = np.unpackbits(codes.numpy(), axis=1, count=dim, bitorder="little")
    return np.int64(1) - 2 * bits.astype(np.int64)


@pytest.mark.parametrize("n, n_queries, dim", [(1, 1, 1), (5, 3, 137), (131, 17, 64), (140, 70, 600)])
def test_bits_meet_bits_exactly(run: Run, n: int, n_queries: int, dim: int) -> None:
    codes, query_codes = random_codes("1bit", n, dim), random_codes("1bit", n_queries, dim, seed=5)
    powers = 2.0 ** torch.arange(-3, n_queries - 3).clamp(max=20).float()
    parts, query_factor, total = DeviceBits(query_codes.numpy(), powers.numpy(), dim, CPU).operands("1bit")
    out = torch.full((n, n_queries), torch.nan)
    run("inner_products.inner_products", out, codes, parts, torch.full((n,), -0.5), query_factor, total, False)
    expected = signs(codes, dim) @ signs(query_codes, dim).T
    assert np.array_equal(out.double().numpy(), expected * powers.double().numpy() * -0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_in_host_memory_go_part_by_part(dtype: str) -> None:
    codes, queries = [random_codes(dtype, 40, 90, seed) for seed in (0, 7)], draw(6, 90)
    factors = [draw(40, seed=2), draw(40, seed=3)]
    blocks = [(numpy_codes(c), dtype, 90, factor.numpy()) for c, factor in zip(codes, factors)]
    row_bytes = blocks[0][0].itemsize * blocks[0][0].shape[1]
    out = in_interpreter(interpreted_host_products, blocks, (queries.numpy(),), 7 * row_bytes + 1)
    exact = sum(reference(c, queries, factor) for c, factor in zip(codes, factors))
    plain = sum(reference(c, queries, factor, torch.float32) for c, factor in zip(codes, factors))
    error, allowed = (torch.from_numpy(out).double() - exact).norm(), 2 * (plain.double() - exact).norm()
    assert error <= allowed + 1e-6 * exact.norm()


def test_a_part_holds_a_row_at_least_and_bits_go_the_same_way() -> None:
    codes, query_codes = random_codes("1bit", 9, 200), random_codes("1bit", 4, 200, seed=5)
    block = (codes.numpy(), "1bit", 200, np.ones(9, np.float32))
    out = in_interpreter(interpreted_host_products, [block], (query_codes.numpy(), np.ones(4, np.float32), 200), 1)
    assert np.array_equal(out, signs(codes, 200) @ signs(query_codes, 200).T)


def test_what_it_refuses() -> None:
    queries = DeviceQueries(np.ones((2, 8), np.float32), CPU)
    codes, factor, out = torch.ones(3, 8, dtype=torch.int8), torch.ones(3), torch.zeros(3, 2)
    assert "CUDA devices" in str(supports(CPU))
    with pytest.raises(UnsupportedBackendError, match="the device is cpu"):
        device_inner_products(codes, "int8", 8, queries, factor, out)
    with pytest.raises(LessFastError, match="count"):
        DeviceBits(np.zeros((1, 2**21 + 1), np.uint8), np.ones(1, np.float32), 2**24 + 1, CPU)
    with pytest.raises(LessFastError, match="expected 1bit codes"):
        DeviceBits(np.zeros((1, 1), np.uint8), np.ones(1, np.float32), 8, CPU).operands("int8")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codes": torch.ones(3, 9, dtype=torch.int8)}, r"expected \(3, 8\) torch.int8"),
        ({"codes": torch.ones(3, 8)}, r"torch.float32 .* expected \(3, 8\) torch.int8"),
        ({"out": torch.zeros(3, 4)}, "a column of out for each of 2 queries"),
        ({"dim": 7, "codes": torch.ones(3, 7, dtype=torch.int8)}, "queries have 8 features and rows 7"),
    ],
)
def test_shapes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str) -> None:
    monkeypatch.setattr("less_fast.ops.device_products.supports", lambda device: None)
    arguments = {"codes": torch.ones(3, 8, dtype=torch.int8), "dtype": "int8", "dim": 8, "factor": torch.ones(3)}
    queries = DeviceQueries(np.ones((2, 8), np.float32), CPU)
    with pytest.raises(LessFastError, match=message):
        device_inner_products(**{**arguments, "queries": queries, "out": torch.zeros(3, 2), **change})  # type: ignore


def test_the_order_of_additions_depends_on_the_dtypes_alone() -> None:
    for codes in TORCH_DTYPES.values():
        for parts in {kernel.part_dtype(codes), torch.int8 if codes == torch.uint8 else kernel.part_dtype(codes)}:
            tiles = [kernel.config(q, codes, parts, c) for q in (1, 16, 17, 285) for c in (80, 86, 90, 100, 120)]
            assert {(tile.step, tile.planes) for tile in tiles} == {kernel.steps_of(codes, parts)}
            assert {tile.queries for tile in tiles} == {16, 64} and {tile.rows for tile in tiles} <= {128, 256}


def test_the_doctor_checks_the_kernels() -> None:
    check = in_interpreter(products_check)
    assert check.passed and check.n_cases == len(DTYPES) + 1, check.reason


@pytest.mark.parametrize("n", [pytest.param(2**18 + 3, marks=on_device)])
def test_rows_beyond_two_gigabytes(n: int) -> None:
    device = torch.device("cuda")
    codes = torch.zeros(n, 8192, dtype=torch.int8, device=device)
    last = random_codes("int8", 5, 8192)
    codes[-5:] = last.to(device)
    queries, out = draw(3, 8192), torch.empty(n, 3, device=device)
    held = DeviceQueries(queries.numpy(), device)
    device_inner_products(codes, "int8", 8192, held, torch.ones(n, device=device), out)
    assert not out[:-5].any()
    assert_close(out[-5:].cpu(), last, queries, torch.ones(5))


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=on_device) for dtype in DTYPES])
def test_host_memory_overlaps_without_mixing_parts(dtype: str) -> None:
    n, dim = 5000, 512
    codes, queries, factor = random_codes(dtype, n, dim), draw(20, dim), draw(n, seed=2)
    host = HostProducts(DeviceQueries(queries.numpy(), torch.device("cuda")), part_bytes=64 << 10)
    out = np.zeros((n, 20), np.float32)
    for _ in range(3):
        host.add(numpy_codes(codes), dtype, dim, factor.numpy(), out, accumulate=False)
        assert_close(torch.from_numpy(out), codes, queries, factor)
