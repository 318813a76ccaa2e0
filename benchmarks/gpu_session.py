"""What the stages of gpu.py share: the device, the time that is left, the two ceilings, timing, and the rows."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import machine, row
from torch import Tensor

# Seconds of queued waiting a call, behind which the host runs ahead: launch gaps then stay out of a kernel's time.
_AHEAD = 100e-6
_CYCLES_PER_SECOND = 2e9
# What the stages' estimates of their own length assume: an H100's ceilings, and the share a whole model reaches.
ASSUMED_BYTES_PER_S, ASSUMED_FLOPS_PER_S, MODEL_SHARE = 3.0e12, 790e12, 0.4


@dataclass(frozen=True)
class Bar:
    """What a figure has to reach: ``value`` at most (or at least) ``limit``."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    def facts(self, judged: bool) -> dict[str, Any]:
        """The row's fields; ``met`` is None where sizes are too small for a verdict."""
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        sign = ">=" if self.at_least else "<="
        return {
            "bar": f"{self.name} {sign} {self.limit:.3g}",
            "bar_value": self.value,
            "met": bool(met) if judged else None,
        }


@dataclass(frozen=True)
class Work:
    """What a call has to do at least: bytes read and written once, and floating-point operations."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: copying (bytes read plus written) and multiplying bf16 matrices, per second."""

    bytes_per_s: float
    flops_per_s: float

    def floor(self, work: Work) -> float:
        """Seconds below which no implementation gets."""
        return max(work.bytes / self.bytes_per_s, work.flops / self.flops_per_s)


class DeviceLostError(Exception):
    """The device answers no more, as after an illegal access; only a new process gets it back."""


class Session:
    """One run of the command.

    ``folder``: where rows go, ``tiny``: shapes for trying the command out, whose figures mean nothing. ``one_file``:
    every row goes to results.json instead of one file a benchmark. A benchmark's file is begun anew by its first row.
    """

    def __init__(
        self,
        device: torch.device,
        folder: Path,
        *,
        tiny: bool = False,
        repeats: int = 5,
        seconds: float = 540.0,
        commit: str | None = None,
        one_file: bool = False,
    ) -> None:
        self.device, self.folder, self.tiny, self.repeats = device, folder, tiny, max(5, repeats)
        self.deadline = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self._commit, self._one_file, self._begun = commit, one_file, set[Path]()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def fits(self, what: str, estimate: float) -> bool:
        """Whether there is time for ``estimate`` seconds; where not, says so and records it."""
        left = self.seconds_left()
        if estimate <= left:
            return True
        self.skip(what, f"takes about {estimate:.0f} s, and {max(left, 0):.0f} s are left")
        return False

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What is raised within is recorded and ends nothing else, unless the device is lost to this process."""
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
            self.note("failed", what, error=text, traceback=traceback.format_exc())
            traceback.print_exc()
            if self.lost():
                raise DeviceLostError(what) from error

    def skip(self, what: str, reason: str) -> None:
        """Record that something was not measured, and why."""
        self.note("skipped", what, reason=reason)

    def note(self, status: str, what: str, **facts: Any) -> None:
        """A row about the run itself; the others are about what it measured."""
        print(f"{status}: {what} {facts.get('reason', '')}".rstrip(), flush=True)
        self.write("run", [{"op": "run", "implementation": what, "status": status, **facts, **self.machine()}])

    def machine(self) -> dict[str, Any]:
        """Device, versions, commit and date; a tiny run's device is named so that no one takes it for a measurement."""
        facts = machine(self.device)
        if self.tiny:
            facts["device"] += ", tiny shapes: no measurement"
        return {**facts, "commit": self._commit or facts["commit"]}

    def write(self, benchmark: str, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows to the benchmark's file at once, so that a run cut short keeps them."""
        path = self.folder / ("results.json" if self._one_file else f"{benchmark}.json")
        with path.open("a" if path in self._begun else "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in rows)
        self._begun.add(path)
        self.rows += rows

    def begun(self) -> list[str]:
        """Names of the files that this run has written to."""
        return sorted(path.name for path in self._begun)

    def resume(self, files: Sequence[str]) -> None:
        """Take up the files that an earlier process of the same run has begun."""
        for name in files:
            path = self.folder / name
            self._begun.add(path)
            self.rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def row(
        self,
        op: str,
        implementation: str,
        seconds: Sequence[float],
        *,
        shape: str,
        dtype: str,
        work: Work | None = None,
        baseline: str | None = None,
        ratio_to_baseline: float | None = None,
        examples: int | None = None,
        tokens: int | None = None,
        bar: Bar | None = None,
        **facts: Any,
    ) -> dict[str, Any]:
        """One row with every field of the format; None where a field means nothing for the benchmark."""
        made = row(op, implementation, seconds, device=self.device, shape=shape, dtype=dtype)
        median = made["ms_50"] / 1e3
        floor = self.ceilings.floor(work) if work is not None else None
        return {
            **made,
            "bytes": work.bytes if work else None,
            "flops": work.flops if work else None,
            "floor_ms": floor and 1e3 * floor,
            "ratio_to_floor": median / floor if floor else None,
            "baseline": baseline,
            "ratio_to_baseline": ratio_to_baseline,
            "examples_per_s": examples / median if examples else None,
            "tokens_per_s": tokens / median if tokens else None,
            "examples": examples,
            "tokens": tokens,
            **(bar.facts(not self.tiny) if bar else {"bar": None, "bar_value": None, "met": None}),
            **facts,
            **self.machine(),
        }

    @cached_property
    def ceilings(self) -> Ceilings:
        """Measured once in a run, by whichever stage needs them first; written to ceilings.json."""
        found = {row["implementation"]: row for row in self.rows if row["op"] == "ceilings"}
        if not found:
            found = {row["implementation"]: row for row in self._measure_ceilings()}
        return Ceilings(found["copy"]["bytes_per_s"], found["matmul"]["flops_per_s"])

    def _measure_ceilings(self) -> list[dict[str, Any]]:
        n_bytes, side = (1 << 20, 128) if self.tiny else (1 << 32, 8192)
        source = torch.randint(-(2**62), 2**62, (n_bytes // 8,), device=self.device)
        target = torch.empty_like(source)
        left, right = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        seconds = self.interleaved(
            {"copy": lambda i: target.copy_(source), "matmul": lambda i: torch.matmul(left, right)}
        )
        rows = []
        for name, amount, unit in (("copy", 2 * n_bytes, "bytes_per_s"), ("matmul", 2 * side**3, "flops_per_s")):
            made = row("ceilings", name, seconds[name], device=self.device, shape=f"{amount:.3g}", dtype="bfloat16")
            rows.append({**made, unit: 1e3 * amount / made["ms_50"], **self.machine()})
        self.write("ceilings", rows)
        return rows

    def interleaved(self, variants: Mapping[str, Callable[[int], Any]], *, calls: int = 0) -> dict[str, list[float]]:
        """Seconds a call of each variant, ``repeats`` samples each; variants take turns, in alternating order.

        A variant gets a running number to pick its buffers by. ``calls`` of one sample: 0 chooses as many as last a few
        milliseconds, behind a wait that hides the host's launches; give 1 for whole passes, hosts' gaps included.
        """
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        each = {name: calls or self._calls(call) for name, call in variants.items()}
        number = 0
        for repeat in range(-1 if calls else 0, self.repeats):  # a round to warm up, where choosing has not done it
            for name in sorted(variants, reverse=repeat % 2 == 1):
                taken = self._time(variants[name], number, each[name], hidden=calls == 0)
                number += each[name]
                if repeat >= 0:
                    seconds[name].append(taken)
        return seconds

    def _calls(self, call: Callable[[int], Any]) -> int:
        call(0)  # compiles and warms up
        taken = max(self._time(call, 1, 1, hidden=False), 1e-7)
        return 1 if self.tiny else int(min(100, max(1, 4e-3 / taken)))

    def _time(self, call: Callable[[int], Any], first: int, calls: int, hidden: bool) -> float:
        if not self.cuda:
            started = time.perf_counter()
            for number in range(first, first + calls):
                call(number)
            return (time.perf_counter() - started) / calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if hidden:
            torch.cuda._sleep(int(calls * _AHEAD * _CYCLES_PER_SECOND))
        start.record()
        for number in range(first, first + calls):
            call(number)
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3 / calls

    def release(self) -> None:
        """Give back what a stage or case held, and let the next one's peak start from what is left."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def lost(self) -> bool:
        """Whether the device answers this process no more."""
        try:
            torch.ones(8, device=self.device).sum().item()
        except torch.OutOfMemoryError:
            return False  # what was raised still holds the memory
        except RuntimeError:
            return True
        return False


def median_ratio(seconds: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """Median of the ratios of samples taken in the same round."""
    ratios = sorted(a / b for a, b in zip(seconds[ours], seconds[theirs]))
    middle = len(ratios) // 2
    return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; infinite where it is no number."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")


def must_agree(what: str, found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> float:
    """Raise AssertionError where two implementations compute different things: nothing is timed then."""
    error = relative_error(found, expected)
    if not error <= tolerance:
        raise AssertionError(f"{what} is off by {error:.1e} relative; not timing a wrong result")
    return error
