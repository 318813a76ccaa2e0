"""How fast is extraction beside the libraries that users would pick instead, on the CPU and at the same K?

Every peer comes from PyPI into an environment of its own and does the same work there: the same model, LoRA weights,
Adam state, token ids and batches, in float32. Model and tokens are loaded before the clock starts. Features are
compared with exact gradients first; variants that differ, or that the peer cannot do, get a reason instead of a time.
One process per variant; all take turns, in an order that changes every round.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, machine, row
from peers_check import Comparison, chance, compare
from peers_environments import ENVIRONMENTS, python_of, surroundings
from peers_job import Prepared, job_file, prepare
from peers_process import FailedError, Worker

from less_fast.data import CPU_BATCH_COST

HERE = Path(__file__).parent
OURS = "less_fast"
# How many times chance a right variant may be off: one dense matrix, or one per layer; two-sided ones err far more.
DENSE, TWO_SIDED = 3.0, 12.0
# Padded tokens per batch, and what a batch costs beside them: of little padding; as less_fast itself cuts where the
# matrix is dense; few and large ones, which is best for the others that draw a dense matrix anew for every batch.
BATCH, DENSE_BATCH, LARGE_BATCH = 2048, 4096, 8192
BATCH_COSTS = {BATCH: CPU_BATCH_COST, DENSE_BATCH: 320, LARGE_BATCH: None}


@dataclass(frozen=True)
class Variant:
    """One way of one peer. ``rule``: what is done to the gradient, see peers_job.exact_vectors.

    ``allowed``: the greatest gram_error in units of chance. ``cannot``: a refusal, or a wrong result, is expected.
    """

    peer: str
    key: str
    what: str
    rule: str
    allowed: float = DENSE
    cannot: bool = False
    token_budget: int = BATCH

    @property
    def name(self) -> str:
        """Peer and variant."""
        return f"{self.peer} {self.key}"

    @property
    def script(self) -> Path:
        """The worker of the peer."""
        return HERE / f"peers_worker_{self.peer.removesuffix('-llm').replace('-', '_')}.py"


def _peer(name: str, *variants: tuple[Any, ...]) -> list[Variant]:
    return [Variant(name, *variant) for variant in variants]


_LARGE, _CANNOT = (DENSE, False, LARGE_BATCH), (DENSE, True)
VARIANTS = [
    *_peer(
        OURS,
        ("adam", "LESS's Adam, srht of the joined gradient", "less"),
        ("dense-adam", "LESS's Adam, dense ±1 of the joined gradient", "less", DENSE, False, DENSE_BATCH),
        ("torch-adam", "torch's Adam, srht of the joined gradient", "torch"),
        ("sgd", "plain gradient, srht of the joined gradient", "sgd"),
    ),
    *_peer(
        "less-loop",
        ("dense", "LESS's Adam, dense ±1 of the joined gradient, batches of 1", "less"),
        ("free", "LESS's Adam, no projection at all, batches of 1", "less"),
    ),
    *_peer(
        "traker",
        ("less-loop", "LESS's loop around BasicProjector, batches of 1", "less"),
        ("featurize", "TRAKer.featurize: plain gradient, dense ±1 of the joined gradient", "sgd", *_LARGE),
        ("fast_jl", "LESS's loop around CudaProjector", "less", *_CANNOT),
    ),
    *_peer(
        "bergson",
        ("global-sgd", "build: plain gradient, dense ±1 of the joined gradient", "sgd", *_LARGE),
        ("per_module-sgd", "build: plain gradient, two-sided ±1 per layer", "sgd", TWO_SIDED),
        ("global-second", "build: second moment only, dense ±1 of the joined gradient", "second", *_LARGE),
        ("per_module-second", "build: second moment only, two-sided ±1 per layer", "second", TWO_SIDED),
        ("trainer-state", "build --optimizer_state with the Trainer's own optimizer.pt", "second", *_CANNOT),
        ("less", "build: LESS's Adam", "less", *_CANNOT),
    ),
    *_peer(
        "dattri-llm",
        ("dense-adam", "hooks: torch's Adam, dense ±1 per layer; loss: sum of the examples' means", "torch"),
        ("mask-adam", "hooks: torch's Adam, random entries per layer; loss: sum of the examples' means", "torch"),
        (
            "logra-sgd",
            "hooks: plain gradient, two-sided per layer; loss: sum of the examples' means",
            "sgd",
            TWO_SIDED,
        ),
        ("attributor", "LESSAttributor's stream: torch's Adam, dense ±1 per layer, batches of 1", "torch"),
        ("dense-adam-documented", "hooks: torch's Adam, dense; loss: the model's own", "torch", *_CANNOT),
        ("logra-adam", "hooks: torch's Adam, two-sided ±1 per layer", "torch", *_CANNOT),
        ("global", "hooks: torch's Adam, one matrix over the joined gradient", "torch", *_CANNOT),
    ),
]
# What a rule's times are divided by; the second moment alone is part of what LESS's Adam costs.
BASELINES = {"less": f"{OURS} adam", "second": f"{OURS} adam", "torch": f"{OURS} torch-adam", "sgd": f"{OURS} sgd"}


@dataclass
class Run:
    """A variant on its way: the worker, or why there is none, what the check found, and the times so far."""

    variant: Variant
    worker: Worker | None = None
    reason: str | None = None
    k: int | None = None
    comparison: Comparison | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def fail(self, reason: str) -> None:
        """Give the variant up."""
        self.reason = reason
        if self.worker is not None:
            self.worker.stop()

    @property
    def timed(self) -> bool:
        """Whether it takes part in the rounds."""
        return self.worker is not None and self.reason is None


def begin(variant: Variant, job: Prepared, environments: Path, threads: int) -> Run:
    """Start the worker, and compare its features with the exact vectors."""
    run = Run(variant)
    environment = ENVIRONMENTS.get(variant.peer)
    python = Path(sys.executable) if environment is None else python_of(environment, environments)
    file = job.folder / f"{variant.name}.npy"
    env = surroundings(threads, isolated=variant.peer != OURS)
    try:
        work = job_file(job.folder, variant.token_budget)
        run.worker = Worker(python, variant.script, work, variant.key, file.with_suffix(".log"), env)
        run.worker.work(file)
    except FailedError as failure:
        run.fail(str(failure))
        return run
    features, exact = np.load(file), job.exact[variant.rule]
    run.k = features.shape[1]
    columns = run.worker.ready["columns"]
    run.comparison = compare(features, exact if columns is None else exact[:, columns])
    limit = variant.allowed * chance(len(features), run.k)
    if not run.comparison.gram_error <= limit:
        run.fail(
            f"not the exact features: inner products are off by {run.comparison.gram_error:.2f}, the random matrix "
            f"explains {limit:.2f}"
        )
    return run


def measure(runs: list[Run], repeats: int) -> None:
    """Rounds in which every variant has one turn; each round begins with another one."""
    for repeat in range(repeats):
        cut = repeat * len(runs) // repeats
        for run in runs[cut:] + runs[:cut]:
            if not run.timed:
                continue
            assert run.worker is not None
            try:
                answer = run.worker.work()
            except FailedError as failure:
                run.fail(str(failure))
            else:
                run.seconds.append(answer["seconds"])
                run.peak_bytes = answer["peak_bytes"]


def rows(runs: list[Run], job: Prepared, dim: int) -> list[dict[str, Any]]:
    """The JSON rows; a variant without a time has ms_50 None and a reason."""
    by_name = {run.variant.name: run for run in runs}
    out = []
    for run in runs:
        variant, ready = run.variant, run.worker.ready if run.worker else {}
        facts: dict[str, Any] = {
            "shape": f"{job.source}, {len(job.examples)} examples, P = {job.p:,}",
            "dtype": "float32",
            "peer": variant.peer,
            "peer_version": ready.get("version"),
            "peer_torch": ready.get("torch"),
            "what": variant.what,
            "rule": variant.rule,
            "k": run.k if run.k is not None else dim,
            "cosine_rms": run.comparison and run.comparison.cosine_rms,
            "gram_error": run.comparison and run.comparison.gram_error,
            "examples": len(job.examples),
            "tokens": job.tokens,
            "token_budget": variant.token_budget,
            "baseline": BASELINES[variant.rule],
            "reason": run.reason,
        }
        if run.reason is None:
            baseline = by_name.get(BASELINES[variant.rule])
            if baseline is not None and baseline.timed:
                ratios = [ours / theirs for ours, theirs in zip(run.seconds, baseline.seconds)]
                facts["ratio_to_baseline"] = statistics.median(ratios)
            median = statistics.median(run.seconds)
            facts.update(examples_per_s=len(job.examples) / median, tokens_per_s=job.tokens / median)
            entry = row("peers", variant.name, run.seconds, device=torch.device("cpu"), **facts)
        else:
            times = dict.fromkeys(("ms_50", "ms_20", "ms_80"))
            entry = {"op": "peers", "implementation": variant.name, **times, **facts, **machine(torch.device("cpu"))}
        out.append({**entry, "loaded_bytes": ready.get("loaded_bytes"), "peak_bytes": run.peak_bytes})
    return out


def show(entry: dict[str, Any]) -> None:
    """One line of the report."""
    if entry["reason"] is not None:
        print(f"{entry['implementation']:<32} -  {entry['reason']}")
        return
    ratio, mib = entry.get("ratio_to_baseline"), 2**20
    peak, work = entry["peak_bytes"] / mib, (entry["peak_bytes"] - entry["loaded_bytes"]) / mib
    beside = f"{ratio:6.2f} x the time of {entry['baseline']}" if ratio else ""
    print(
        f"{entry['implementation']:<32} {entry['examples_per_s']:8.2f} examples/s  {beside:<44}"
        f"  {peak:6.0f} MiB, {work:5.0f} of work  gram error {entry['gram_error']:.3f}  {entry['what']}"
    )


def main() -> None:
    """Install what is missing, check every variant, time what is right, and write the rows."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--examples", type=int, default=32, help="how many real examples every peer works on")
    parser.add_argument("--dim", type=int, default=8192, help="K, where the peer allows it")
    parser.add_argument("--environments", type=Path, default=HERE.parent / ".peers", help="folder of the environments")
    parser.add_argument("--only", default="", help="variants whose name contains this, beside those of less_fast")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    chosen = [v for v in VARIANTS if v.peer == OURS or options.only in v.name]
    with tempfile.TemporaryDirectory(prefix="less_fast-peers-") as folder:
        job = prepare(Path(folder), options.examples, BATCH_COSTS, options.dim, threads)
        print(f"{job.source}: {len(job.examples)} examples, {job.tokens:,} tokens")
        runs: list[Run] = []
        try:
            for variant in chosen:
                runs.append(begin(variant, job, options.environments, threads))
                print(f"{variant.name}: {runs[-1].reason or runs[-1].comparison}", file=sys.stderr)
            measure(runs, options.repeats)
        finally:
            for run in runs:
                if run.timed:
                    assert run.worker is not None
                    run.worker.stop()
        entries = rows(runs, job, options.dim)
    for entry in entries:
        show(entry)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
    surprises = [run.variant.name for run in runs if run.reason is not None and not run.variant.cannot]
    if surprises:
        raise SystemExit(f"not measured, though the table of variants expects it: {', '.join(surprises)}")


if __name__ == "__main__":
    main()
