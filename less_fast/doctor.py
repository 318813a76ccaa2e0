"""``examine``: what this machine has, and whether every backend that works here agrees with the reference."""

from __future__ import annotations

import importlib
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from less_fast.layout import ParameterLayout
from less_fast.ops import cpu, cuda, device_products
from less_fast.ops.accumulate import BACKENDS
from less_fast.ops.outer import Scratch
from less_fast.ops.outer_sketch import (
    Target,
    lanes_needed,
    outer_sketch_reference,
    outer_sketches,
    sum_lanes,
    why_not_fused,
)
from less_fast.ops.reference import accumulate_reference
from less_fast.ops.rule import NONE, Rule
from less_fast.projection import KINDS, Projection
from less_fast.segments import Segments

PACKAGES = ("less_fast", "torch", "triton", "transformers", "peft", "accelerate", "datasets", "ray", "numpy")
TOLERANCE = 1e-5  # relative, of float32 sums against float64

# Two LoRA matrices whose long sides are no multiple of a block, and N examples.
_N, _RANK, _WIDTHS = 5, 8, (200, 328)
_DIM, _BLOCK, _NNZ = 256, 64, 2


@dataclass(frozen=True)
class Check:
    """One backend on one device: the worst relative error over all kinds of projection and rules.

    ``reason``: why the backend cannot run here, or how it failed; None where it ran and agreed.
    """

    backend: str
    device: str
    available: bool
    passed: bool
    n_cases: int
    worst_error: float | None
    reason: str | None
    seconds: float

    def __str__(self) -> str:
        name = f"{self.backend} on {self.device}"
        if not self.available:
            return f"  {name}: not available ({self.reason})"
        verdict = "ok" if self.passed else f"FAILED ({self.reason})"
        error = "" if self.worst_error is None else f", worst relative error {self.worst_error:.1e}"
        return f"  {name}: {verdict}, {self.n_cases} cases{error}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`examine` found."""

    versions: dict[str, str | None]
    platform: str
    processor: dict[str, Any]
    devices: list[dict[str, Any]]
    disk_free_gb: float
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every backend that can run here agrees with the reference."""
        return all(check.passed for check in self.checks if check.available)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        cpu_text = ", ".join(f"{name} {value}" for name, value in self.processor.items())
        lines = [
            "versions: " + ", ".join(f"{name} {found or 'not installed'}" for name, found in self.versions.items()),
            f"platform: {self.platform}",
            f"processor: {cpu_text}",
            *(f"device: {_words(device)}" for device in self.devices),
            f"disk: {self.disk_free_gb:.1f} GB free here",
            "backends:",
            *map(str, self.checks),
            "everything that can run here agrees with the reference"
            if self.ok
            else "a backend FAILED; please report this",
        ]
        return "\n".join(lines)


def examine() -> Diagnosis:
    """Look at the machine and check each backend, on each kind of device, in seconds."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return Diagnosis(
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        platform=platform.platform(),
        processor=_processor(),
        devices=_devices(),
        disk_free_gb=shutil.disk_usage(os.getcwd()).free / 1e9,
        checks=[check_backend(name, device) for device in devices for name in BACKENDS]
        + [check_fused(kind, "cuda") for kind in ("srht", "sjlt") if "cuda" in devices]
        + [check_inner_products(device) for device in devices if device == "cuda"],
    )


def check_backend(name: str, device: str) -> Check:
    """Compare one backend on one device with the float64 reference, for every kind of projection and every rule."""
    started = time.monotonic()
    worst, count = 0.0, 0
    refused: str | None = None
    for layout, projection, rule_name, grads, rules in _cases(device):
        features = torch.zeros(_N, projection.dim, device=device)
        unavailable = BACKENDS[name].supports(features, grads[0], projection, rules[0])
        if unavailable is not None:
            refused = refused or unavailable
            continue
        case = f"{projection.kind} with {rule_name}"
        try:
            _accumulate(BACKENDS[name].run, layout, features, grads, rules, projection)
        except Exception as error:  # a broken build or driver may raise anything, and is what this looks for
            reason = f"{case}: {type(error).__name__} {error}".strip().splitlines()[0]
            return Check(name, device, True, False, count, worst, reason, time.monotonic() - started)
        wide = [grad.double() for grad in grads]
        exact = torch.zeros(_N, projection.dim, dtype=torch.float64, device=device)
        _accumulate(accumulate_reference, layout, exact, wide, rules, projection)
        distance = float((features - exact).norm() / exact.norm())
        count += 1
        worst = max(worst, distance if math.isfinite(distance) else math.inf)
        if not distance <= TOLERANCE:
            reason = f"{case}: relative error {distance:.1e}, expected at most {TOLERANCE:.0e}"
            return Check(name, device, True, False, count, worst, reason, time.monotonic() - started)
    if not count:
        return Check(name, device, False, False, 0, None, refused, 0.0)
    return Check(name, device, True, True, count, worst, None, time.monotonic() - started)


def check_fused(kind: str, device: str) -> Check:
    """Compare the kernel from activations to features with float64 gradients and their sketch, for every rule."""
    started = time.monotonic()
    name = f"fused {kind}"
    lengths = (30, 1, 0, 77)
    worst, count = 0.0, 0
    for layout, projection, rule_name, _, rules in _cases_of(_layouts()[0], device):
        if projection.kind != kind:
            continue
        parameter, generator = layout.parameters[0], torch.Generator().manual_seed(1)
        segments = Segments.packed(lengths, torch.device(device))
        left, right = (
            torch.randn(sum(lengths), width, generator=generator).to(device)
            for width in (parameter.short, parameter.long)
        )
        lanes = torch.zeros(
            lanes_needed(layout, projection, torch.device(device)), len(lengths), projection.dim, device=device
        )
        target = Target(lanes, 0, projection, rules[0])
        unavailable = why_not_fused(target, left, right, parameter)
        if unavailable is not None:
            return Check(name, device, False, False, 0, None, unavailable, 0.0)
        exact = torch.zeros(1, len(lengths), projection.dim, dtype=torch.float64, device=device)
        wide = [Target(exact, 0, projection, rules[0])]
        try:
            outer_sketches([target], left, right, segments, parameter)
        except Exception as error:
            reason = f"{rule_name}: {type(error).__name__} {error}".strip().splitlines()[0]
            return Check(name, device, True, False, count, worst, reason, time.monotonic() - started)
        outer_sketch_reference(wide, left, right, segments, parameter, "reference", Scratch(left.device))
        distance = float((sum_lanes(lanes) - exact[0]).norm() / exact.norm())
        count += 1
        worst = max(worst, distance if math.isfinite(distance) else math.inf)
    passed = worst <= TOLERANCE
    verdict = None if passed else f"relative error {worst:.1e}, expected at most {TOLERANCE:.0e}"
    return Check(name, device, True, passed, count, worst, verdict, time.monotonic() - started)


def check_inner_products(device: str) -> Check:
    """Compare products of stored codes with queries with float64, for every store dtype, and bits with bits."""
    started = time.monotonic()
    name, place = "products of stored codes", torch.device(device)
    if (unavailable := device_products.supports(place)) is not None:
        return Check(name, device, False, False, 0, None, unavailable, 0.0)
    generator = torch.Generator().manual_seed(2)
    rows, wide, factor = (torch.randn(*shape, generator=generator) for shape in ((_N, _DIM), (_N, _DIM), (_N,)))
    bits = torch.randint(0, 256, (_N, _DIM // 8), generator=generator, dtype=torch.uint8)
    floats = device_products.DeviceQueries(wide.numpy(), place)
    signs = device_products.DeviceBits(bits.numpy(), np.ones(_N, np.float32), _DIM, place)
    worst, count = 0.0, 0
    cases: list[tuple[str, device_products.Queries]] = [(dtype, floats) for dtype in device_products.TORCH_DTYPES]
    for dtype, queries in [*cases, ("1bit", signs)]:
        codes = bits.flip(1) if dtype == "1bit" else (16 * rows).to(device_products.TORCH_DTYPES[dtype])
        found = torch.zeros(_N, _N, device=device)
        try:
            device_products.device_inner_products(
                codes.to(device), dtype, _DIM, queries, factor.to(device), found, accumulate=True
            )
        except Exception as error:
            reason = f"{dtype}: {type(error).__name__} {error}".strip().splitlines()[0]
            return Check(name, device, True, False, count, worst, reason, time.monotonic() - started)
        values = device_products.code_values(codes, _DIM, torch.float64)
        against = wide.double() if queries is floats else device_products.code_values(bits, _DIM, torch.float64)
        exact = values @ against.T * factor.double()[:, None]
        distance = float((found.cpu() - exact).norm() / exact.norm())
        count += 1
        worst = max(worst, distance if math.isfinite(distance) else math.inf)
    passed = worst <= TOLERANCE
    verdict = None if passed else f"relative error {worst:.1e}, expected at most {TOLERANCE:.0e}"
    return Check(name, device, True, passed, count, worst, verdict, time.monotonic() - started)


def _layouts() -> list[ParameterLayout]:
    a, b = _WIDTHS
    lora = ParameterLayout.build([("q.lora_A.weight", _RANK, a), ("q.lora_B.weight", b, _RANK)])
    return [lora, ParameterLayout.flat(_RANK * a)]


def _cases(device: str) -> Iterator[tuple[ParameterLayout, Projection, str, list[Tensor], list[Rule]]]:
    for layout in _layouts():
        yield from _cases_of(layout, device)


def _cases_of(
    layout: ParameterLayout, device: str
) -> Iterator[tuple[ParameterLayout, Projection, str, list[Tensor], list[Rule]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = [(p.short, p.long) for p in layout.parameters]
    grads = [draw(_N, *shape).to(device) for shape in shapes]
    tables = [(draw(*shape).to(device), draw(*shape).square().to(device)) for shape in shapes]
    rules = {
        "sgd": [NONE for _ in shapes],
        "sign": [Rule("sign") for _ in shapes],
        "adam (less)": [Rule("adam", 0.9 * m, 0.999 * v + 1e-8, 0.1, 0.001, 0.0) for m, v in tables],
        "adam (torch)": [Rule("adam", 1.5 * m, 2.0 * v, 0.2, 0.002, 1e-8) for m, v in tables],
    }
    for kind in KINDS:
        projection = Projection(kind, layout.size if kind == "identity" else _DIM, 7, _BLOCK, _NNZ)
        for name, chosen in rules.items():
            yield layout, projection, name, grads, chosen


def _accumulate(
    run: Any,
    layout: ParameterLayout,
    features: Tensor,
    grads: list[Tensor],
    rules: list[Rule],
    projection: Projection,
) -> None:
    with torch.no_grad():
        for parameter, base, grad, rule in zip(layout.parameters, layout.run_bases(projection.block), grads, rules):
            run(features, grad, parameter, base, projection, rule)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    missing = cpu.supports(torch.zeros(1, 1), torch.zeros(1, 1, 1), Projection("sjlt", 1))
    avx2 = missing is None and importlib.import_module("less_fast._cpu").use_avx2(True)
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "less_fast._cuda": cuda.MISSING or "built",
        "less_fast._cpu": missing or ("built, uses AVX2" if avx2 else "built, without AVX2"),
        "byte order": sys.byteorder,
    }


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": "cpu", "memory_gb": _memory_gb()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": f"cuda:{index}",
                "model": properties.name,
                "memory_gb": round(properties.total_memory / 1e9, 1),
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _words(device: dict[str, Any]) -> str:
    name, *rest = device.items()
    return ", ".join([str(name[1]), *(f"{key} {value}" for key, value in rest)])
