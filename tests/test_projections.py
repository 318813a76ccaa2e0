"""Every kind of projection, on every backend, against the explicit matrix in float64."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support import oracle

from less_fast.errors import LessFastError, UnsupportedBackendError
from less_fast.layout import ParameterLayout
from less_fast.ops import cpu, philox
from less_fast.ops.accumulate import accumulate
from less_fast.ops.philox import philox4x32, sign_bits, sjlt_columns
from less_fast.ops.project import project
from less_fast.ops.reference import hadamard
from less_fast.ops.rule import Rule
from less_fast.projection import Projection

KINDS = [
    Projection("identity", 0 + 1),  # dim is set to P by `fitted`
    Projection("rademacher", 96, seed=3),
    Projection("rademacher", 300, seed=2**40 + 1),
    Projection("gaussian", 130, seed=3),
    Projection("sjlt", 100, seed=5),
    Projection("sjlt", 64, seed=5, nnz=3),
    Projection("srht", 128, seed=7, block=64),
    Projection("srht", 96, seed=2**63 + 9, block=16),
    Projection("srht", 256, seed=1, block=256),
    Projection("srht", 8, seed=1, block=1),
]
LAYOUT = ParameterLayout.build(
    [
        ("m.q_proj.lora_A.default.weight", 3, 137),
        ("m.q_proj.lora_B.default.weight", 70, 3),
        ("m.fc.weight", 1, 1),
        ("m.k_proj.lora_A.default.weight", 17, 64),
        ("m.k_proj.lora_B.default.weight", 5, 17),
    ]
)
ids = [f"{p.kind}-{p.dim}-{p.block if p.kind == 'srht' else p.nnz}" for p in KINDS]


def fitted(projection: Projection, size: int) -> Projection:
    return Projection("identity", size) if projection.kind == "identity" else projection


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cpu":
        reason = cpu.supports(torch.zeros(1), torch.zeros(1), Projection())
        if reason:
            pytest.skip(reason)
    return name


def rules(short: int, long: int, rule: str, generator: torch.Generator) -> Rule:
    if rule in ("none", "sign"):
        return Rule(rule)
    m = torch.randn(short, long, generator=generator) * 1e-3
    v = torch.rand(short, long, generator=generator) * 1e-6
    if rule == "less":
        return Rule("adam", 0.9 * m, 0.999 * v + 1e-8, 0.1, 0.001, 0.0)
    return Rule("adam", 0.9 * m / 0.4, 0.999 * v / 0.02, 0.1 / 0.4, 0.001 / 0.02, 1e-8)


def sketch(
    grads: dict[str, torch.Tensor], projection: Projection, which: dict[str, Rule], backend: str
) -> torch.Tensor:
    first = next(iter(grads.values()))
    features = torch.zeros(first.shape[0], projection.dim, dtype=first.dtype)
    for parameter, base in zip(LAYOUT.parameters, LAYOUT.run_bases(projection.block)):
        accumulate(features, grads[parameter.name], parameter, base, projection, which[parameter.name], backend=backend)
    return features


def flat(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """(N, S, L) gradients back to the row-major flat vector of the model."""
    columns = []
    for p in LAYOUT.parameters:
        g = parts[p.name] if p.short_is_rows else parts[p.name].transpose(1, 2)
        columns.append(g.reshape(g.shape[0], -1))
    return torch.cat(columns, dim=1)


def test_philox_known_answers() -> None:
    # The known-answer vectors published with the generator.
    cases = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, seed, expected in cases:
        c = [torch.tensor(word) for word in counter]
        assert tuple(int(w) for w in philox4x32(c[0], c[1], c[2], c[3], seed)) == expected
        index = counter[0] | counter[1] << 32
        assert tuple(cpu._module().philox(seed, index, counter[2], counter[3])) == expected
        assert tuple(oracle.draw(index, counter[2], counter[3], seed)) == expected


@pytest.fixture(params=[True, False], ids=["avx2", "portable"])
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    """The C++ path with and without AVX2."""
    cpu._module().use_avx2(request.param)
    yield
    cpu._module().use_avx2(True)


def cpu_columns(base: int, n: int, projection: Projection) -> torch.Tensor:
    """Columns [base, base + n) of sqrt(K)·Pi by the C++ backend: sketches of unit vectors, (n, K)."""
    parameter = ParameterLayout.flat(base + n).parameters[0].slice(base, base + n)
    rows = torch.zeros(n, projection.dim)
    accumulate(rows, torch.eye(n).unsqueeze(1), parameter, 0, projection, backend="cpu")
    return rows * math.sqrt(projection.dim)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dim", [3, 131, 1348])
def test_normals_are_within_a_few_roundings(dim: int) -> None:
    seed, base, n = 2**50 + 77, 2**32 - 150, 301
    exact = philox.gaussian_columns(torch.arange(base, base + n), dim, seed, torch.float64)
    rounding = (exact.float() - exact).square().mean().sqrt()
    error = cpu_columns(base, n, Projection("gaussian", dim, seed)) - exact
    assert error.square().mean().sqrt() <= 4 * rounding
    assert error.abs().max() <= 2e-6  # a normal is below 6


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_dense_features_do_not_depend_on_instructions_threads_or_batch(kind: str) -> None:
    projection = Projection(kind, 1300, seed=5)
    generator = torch.Generator().manual_seed(0)
    parameter = ParameterLayout.build([("a.lora_B.weight", 700, 3)]).parameters[0]
    grads = torch.randn(13, 3, 700, generator=generator)
    tables = torch.rand(2, 3, 700, generator=generator) + 0.5
    rule = Rule("adam", tables[0], tables[1], 0.1, 0.001, 1e-8)

    def features(batch: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(len(batch), 1300)
        accumulate(rows, batch, parameter, 0, projection, rule, backend="cpu")
        return rows

    expected = features(grads)
    threads = torch.get_num_threads()
    try:
        for wanted, n_threads in ((True, 1), (True, 3), (False, 2)):
            cpu._module().use_avx2(wanted)
            torch.set_num_threads(n_threads)
            assert torch.equal(features(grads), expected), (wanted, n_threads)
            assert torch.equal(torch.cat([features(grads[i : i + 1]) for i in range(13)]), expected)
            assert torch.equal(torch.cat([features(grads[:5]), features(grads[5:])]), expected)
    finally:
        torch.set_num_threads(threads)
        cpu._module().use_avx2(True)


@pytest.mark.usefixtures("instructions")
def test_random_bits_equal_bit_for_bit() -> None:
    seed = 2**50 + 77
    for base in (0, 2**32 - 2, 2**36 + 5):
        index = torch.arange(base, base + 5)
        for tag in (1, 4, 5):
            expected = np.stack([oracle.sign_row(int(j), 300, tag, seed) for j in index])
            assert np.array_equal(1 - 2 * sign_bits(index, 300, tag, seed).numpy().astype(float), expected)
        # Eight blocks of 128 are drawn at a time where there are so many.
        for dim in (300, 2500):
            signs = np.stack([oracle.sign_row(int(j), dim, 1, seed) for j in index])
            assert np.array_equal(cpu_columns(base, 5, Projection("rademacher", dim, seed)).round().numpy(), signs)
        # The SJLT's buckets and signs through C++: sketch unit vectors.
        projection = Projection("sjlt", 1000, seed=seed, nnz=3)
        buckets, bits = sjlt_columns(index, 1000, 3, seed)
        parameter = ParameterLayout.flat(base + 5).parameters[0].slice(base, base + 5)
        for backend in ("cpu", "reference"):
            rows = torch.zeros(5, 1000)
            accumulate(rows, torch.eye(5).unsqueeze(1), parameter, 0, projection, backend=backend)
            expected_rows = torch.zeros(5, 1000)
            for t in range(3):
                w = [oracle.draw(int(j), t // 2, 3, seed)[2 * (t % 2) :] for j in index]
                assert buckets[:, t].tolist() == [x[0] * 1000 >> 32 for x in w]
                assert bits[:, t].tolist() == [x[1] & 1 for x in w]
                expected_rows[torch.arange(5), buckets[:, t]] += (1 - 2 * bits[:, t].float()) / math.sqrt(3)
            torch.testing.assert_close(rows, expected_rows, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", ["none", "sign", "less", "torch"])
@pytest.mark.parametrize("projection", KINDS, ids=ids)
def test_accumulate_equals_the_explicit_matrix(projection: Projection, rule: str, backend: str) -> None:
    projection = fitted(projection, LAYOUT.size)
    generator = torch.Generator().manual_seed(1)
    grads = {p.name: torch.randn(5, p.short, p.long, generator=generator) * 1e-3 for p in LAYOUT.parameters}
    which = {p.name: rules(p.short, p.long, rule, generator) for p in LAYOUT.parameters}
    u = flat({name: which[name].reference(g.double()) for name, g in grads.items()})
    expected = u @ torch.from_numpy(oracle.matrix(projection, LAYOUT)).T
    if backend == "reference":
        exact = sketch({name: g.double() for name, g in grads.items()}, projection, which, backend)
        torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    got = sketch(grads, projection, which, backend)
    error = (got - expected).norm() / expected.norm()
    assert error < 2e-6, f"relative error {error:.1e}"
    assert torch.equal(got, sketch(grads, projection, which, backend))


@pytest.mark.parametrize("projection", KINDS, ids=ids)
def test_threads_and_instruction_sets_give_the_same_bits(
    projection: Projection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_ENTRIES_PER_THREAD", 1)
    projection = fitted(projection, LAYOUT.size)
    generator = torch.Generator().manual_seed(1)
    threads = torch.get_num_threads()
    for n in (1, 5):
        grads = {p.name: torch.randn(n, p.short, p.long, generator=generator) * 1e-3 for p in LAYOUT.parameters}
        which = {p.name: rules(p.short, p.long, "less", generator) for p in LAYOUT.parameters}
        first = sketch(grads, projection, which, "cpu")
        try:
            cpu._module().use_avx2(False)
            assert torch.equal(first, sketch(grads, projection, which, "cpu"))
            cpu._module().use_avx2(True)
            if projection.kind in ("srht", "sjlt", "identity"):  # the dense kinds end in the BLAS of torch
                for count in (1, 3, 8):
                    torch.set_num_threads(count)
                    assert torch.equal(first, sketch(grads, projection, which, "cpu"))
        finally:
            cpu._module().use_avx2(True)
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("projection", KINDS, ids=ids)
def test_flat_project(projection: Projection, dtype: torch.dtype) -> None:
    size = 333
    projection = fitted(projection, size)
    grads = torch.randn(4, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = grads.double() @ torch.from_numpy(oracle.matrix(projection, ParameterLayout.flat(size))).T
    got = project(grads, projection)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (got - expected).norm() / expected.norm() < 2e-6
    strided = torch.stack([grads, grads], dim=-1).flatten(1)[:, ::2]  # equal values, not contiguous
    assert torch.equal(project(strided, projection), got)
    wide = torch.cat([grads, grads], dim=1)[:, :size]  # rows contiguous, but further apart
    assert torch.equal(project(wide, projection), got)
    assert project(grads[:0], projection).shape == (0, projection.dim)


def test_flat_project_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    whole = {p: project(grads, p) for p in KINDS[1:]}
    monkeypatch.setattr(importlib.import_module("less_fast.ops.project"), "_CHUNK", 3 * 512)
    for projection, expected in whole.items():
        torch.testing.assert_close(project(grads, projection), expected, rtol=1e-5, atol=1e-4)


def test_linear_and_seeds_independent(backend: str) -> None:
    a, b = torch.randn(2, 1, 700, generator=torch.Generator().manual_seed(0))
    for projection in KINDS[1:]:
        both = project(2 * a - 3 * b, projection, backend=backend)
        parts = 2 * project(a, projection, backend=backend) - 3 * project(b, projection, backend=backend)
        torch.testing.assert_close(both, parts, rtol=1e-4, atol=1e-4)
        other = Projection(projection.kind, projection.dim, projection.seed + 1, projection.block, projection.nnz)
        assert not torch.equal(project(a, projection, backend=backend), project(a, other, backend=backend))


def test_inner_products_are_unbiased_with_the_stated_variance(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, generator=generator, dtype=torch.float64)
    b = 0.5 * a + torch.randn(300, generator=generator, dtype=torch.float64)
    pair = torch.stack([a, b]).float()
    dot, dim, trials = float(a @ b), 64, 300
    squares = float((a**2 * b**2).sum())
    energy = float((a @ a) * (b @ b)) + dot**2
    for kind, variance in [
        ("rademacher", (energy - 2 * squares) / dim),
        ("gaussian", energy / dim),
        ("sjlt", energy / dim),
        ("srht", energy / dim),
    ]:
        found = []
        for seed in range(trials):
            x, y = project(pair, Projection(kind, dim, seed=seed, block=16), backend=backend).double()
            found.append(float(x @ y))
        sample = np.asarray(found)
        standard_error = sample.std() / math.sqrt(trials)
        assert abs(sample.mean() - dot) < 4 * standard_error, kind
        assert 0.6 < sample.var() / variance < 1.5, (kind, sample.var() / variance)


def test_dense_kinds_are_prefix_stable(backend: str) -> None:
    grads = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    for kind in ("rademacher", "gaussian"):
        large = project(grads, Projection(kind, 300), backend=backend) * math.sqrt(300)
        small = project(grads, Projection(kind, 77), backend=backend) * math.sqrt(77)
        torch.testing.assert_close(large[:, :77], small, rtol=1e-5, atol=1e-5)


def test_a_non_finite_gradient_is_never_hidden(backend: str) -> None:
    parameter = ParameterLayout.flat(8).parameters[0]
    for value in (torch.nan, torch.inf):
        grads = torch.ones(2, 1, 8)
        grads[1, 0, 3] = value
        for rule in (Rule("none"), Rule("sign")):
            features = torch.zeros(2, 64)
            accumulate(features, grads, parameter, 0, Projection("srht", 64), rule, backend=backend)
            assert torch.isfinite(features[0]).all() and not torch.isfinite(features[1]).all()


def test_tables_that_do_not_fit_are_refused() -> None:
    parameter = ParameterLayout.flat(8).parameters[0]
    good = torch.ones(1, 8)
    for a, word in [(good.double(), "float64"), (good[:, :4], r"\(1, 4\)"), (None, "missing")]:
        with pytest.raises(LessFastError, match=word):
            rule = Rule("adam", a, good)
            accumulate(torch.zeros(2, 64), torch.ones(2, 1, 8), parameter, 0, Projection("srht", 64), rule)


def test_hadamard_is_its_own_inverse_and_runs_keep_their_energy() -> None:
    x = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x)), 64 * x)
    single = torch.zeros(1, 640)
    single[0, 64:128] = torch.randn(64)
    out = project(single, Projection("srht", 256))
    torch.testing.assert_close(out.norm(), single.norm())


def test_bad_values_are_named() -> None:
    for arguments, word in [
        (("fourier", 8), "kind"),
        (("srht", 100), "block"),
        (("srht", 128, -1), "seed"),
        (("srht", 128, 0, 48), "power of two"),
        (("sjlt", 0), "dim"),
        (("sjlt", 8, 0, 64, 0), "nnz"),
        (("sjlt", 8, 0, 64, 10**11), "nnz"),
        (("srht", 2**20, 0, 2**20), "power of two up to"),
        (("sjlt", 8.0), "integer"),
    ]:
        with pytest.raises(LessFastError, match=word):
            Projection(*arguments)  # type: ignore[arg-type]
    with pytest.raises(LessFastError, match="P = 5"):
        project(torch.zeros(2, 5), Projection("identity", 4))
    with pytest.raises(LessFastError, match=r"\(N, P\)"):
        project(torch.zeros(2, 5, dtype=torch.int64), Projection("sjlt", 4))
    with pytest.raises(UnsupportedBackendError, match="CUDA"):
        project(torch.zeros(2, 5), Projection("sjlt", 4), backend="triton")
    with pytest.raises(LessFastError, match="expected auto"):
        project(torch.zeros(2, 5), Projection("sjlt", 4), backend="tpu")
    projection = Projection("sjlt", 10, 3, nnz=2)
    assert Projection.from_dict(projection.to_dict()) == projection
    assert projection.same_matrix(Projection("sjlt", 10, 3, block=8, nnz=2))
    assert not projection.same_matrix(Projection("sjlt", 10, 4, nnz=2))


_MEMORY = """
import resource, torch
from less_fast import Projection, project
grads = torch.randn(2, 300_000)
project(grads[:, :1000], Projection({kind!r}, 4096))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
project(grads, Projection({kind!r}, 4096))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "srht"])
def test_no_matrix_is_held(kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", _MEMORY.format(kind=kind)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64  # MiB; the matrix would take 4,688, a copy of the gradients 2
