"""The benchmark against other libraries, as far as it goes without them: the job, the check, LESS's loop, the pipes."""

from __future__ import annotations

import ast
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
FAKE = """
import time
from peers_serve import Job, RefusedError, Runner, serve
import torch

def start(job, variant):
    print("noise on standard output")
    if variant == "refuses":
        raise RefusedError("it cannot")
    if variant == "ends":
        raise SystemExit("it had enough")
    rows = [torch.full((len(batch), 2), float(i)) for i, batch in enumerate(job.batches)]
    def work():
        if variant == "fails":
            raise ValueError("not\\nthis time")
        time.sleep(0.02)
        return rows
    from peers_serve import in_example_order
    return Runner(work, lambda rows: in_example_order(job, rows), torch.tensor([3, 1]))

if __name__ == "__main__":
    serve(None, start)
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """Three examples in two batches, the first batch holding the last examples."""
    facts = {"model": "m", "checkpoint": "c", "dim": 2, "threads": 1, "batches": [[2, 1], [0]]}
    (tmp_path / "job-8.json").write_text(json.dumps(facts))
    np.savez(
        tmp_path / "examples.npz", ids=[1, 2, 3, 4, 5, 6], labels=[-100, 2, 3, -100, -100, 6], offsets=[0, 3, 4, 6]
    )
    return tmp_path / "job-8.json"


def test_a_job_gives_back_its_examples_and_pads_on_the_right(module: Any, job_file: Path) -> None:
    job = module("peers_serve").Job.read(job_file)
    assert job.examples == [([1, 2, 3], [-100, 2, 3]), ([4], [-100]), ([5, 6], [-100, 6])]
    batch = job.batch([2, 0])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [-100, 2, 3]]
    rows = module("peers_serve").in_example_order(job, [torch.tensor([[2.0], [1.0]]), torch.tensor([[0.0]])])
    assert rows.flatten().tolist() == [0, 1, 2]


def test_the_summed_loss_has_every_example_s_own_gradient(module: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, requires_grad=True)
    labels = torch.tensor([[-100, 3, 4, 1, 6], [-100, -100, 2, -100, -100]])
    (together,) = torch.autograd.grad(module("peers_serve").sum_of_means(logits, labels), logits)
    for n in range(2):
        shifted, targets = logits[n, :-1], labels[n, 1:]
        (alone,) = torch.autograd.grad(torch.nn.functional.cross_entropy(shifted, targets), logits)
        torch.testing.assert_close(together[n], alone[n])


def test_the_check_passes_random_matrices_and_sees_wrong_losses_and_missing_momentum(module: Any) -> None:
    check = module("peers_check")
    random = np.random.default_rng(0)
    n, p, k = 24, 3000, 2048
    gradients, momentum = random.standard_normal((n, p)), 5 * random.standard_normal(p)
    exact = gradients + momentum
    signs = random.choice([-1.0, 1.0], (p, k))
    right = check.compare(exact @ signs, exact)
    allowed = module("peers").DENSE * check.chance(n, k)
    assert 0 < right.gram_error < allowed
    assert 0 < right.cosine_rms < 4 / math.sqrt(k)
    same = check.compare(7 * exact, exact)
    assert same.gram_error < 1e-9
    assert same.cosine_rms < 1e-9
    scales = random.uniform(0.3, 3, (n, 1))  # a mean over the batch's tokens, not over the example's
    assert check.compare((scales * gradients + momentum) @ signs, exact).gram_error > allowed
    assert check.compare(gradients @ signs, exact).cosine_rms > 0.5


def test_less_s_loop_projects_with_fair_independent_signs(module: Any) -> None:
    dense = module("peers_worker_less_loop").dense
    matrix = dense(torch.eye(512), 300)
    assert matrix.shape == (512, 300)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix, dense(torch.eye(512), 300))
    # 153,600 fair signs have a mean of 0 +- 0.0026, and two columns a product of 0 +- sqrt(512).
    assert abs(float(matrix.mean())) < 0.011
    products = (matrix.T @ matrix).fill_diagonal_(0)
    assert float(products.square().mean().sqrt()) == pytest.approx(math.sqrt(512), rel=0.05)
    assert float(products.abs().max()) < 6.5 * math.sqrt(512)


def test_a_worker_answers_whatever_its_peer_prints(module: Any, job_file: Path, tmp_path: Path) -> None:
    process, environment = module("peers_process"), module("peers_environments").surroundings(1, isolated=False)
    script = tmp_path / "worker.py"
    script.write_text(FAKE)
    environment["PYTHONPATH"] = str(ROOT / "benchmarks")

    def worker(variant: str) -> Any:
        return process.Worker(Path(sys.executable), script, job_file, variant, tmp_path / "log", environment)

    works = worker("works")
    assert works.ready["columns"] == [3, 1]
    assert works.ready["torch"] == torch.__version__
    answer = works.work(tmp_path / "features.npy")
    assert np.load(tmp_path / "features.npy")[:, 0].tolist() == [1, 0, 0]
    assert 0.02 <= answer["seconds"] < 10
    assert answer["peak_bytes"] > works.ready["loaded_bytes"] / 2
    assert works.work()["seconds"] >= 0.02
    works.stop()
    assert "noise" in (tmp_path / "log").read_text()

    with pytest.raises(process.FailedError, match=r"^it cannot$"):
        worker("refuses")
    with pytest.raises(process.FailedError, match=r"ended with status 1: it had enough"):
        worker("ends")
    fails = worker("fails")
    with pytest.raises(process.FailedError, match=r"^ValueError: not this time$"):
        fails.work()
    fails.stop()


def test_rows_have_a_time_or_a_reason(module: Any, tmp_path: Path) -> None:
    peers = module("peers")
    ours, theirs, refused = (
        next(v for v in peers.VARIANTS if v.name == name)
        for name in ("less_fast adam", "bergson global-second", "bergson less")
    )
    comparison = module("peers_check").Comparison(0.01, 0.02)
    worker = type("Ready", (), {"ready": {"version": "1", "torch": "2", "loaded_bytes": 5}})()
    runs = [
        peers.Run(ours, worker, None, 8, comparison, [1.0, 2.0, 3.0], 7),
        peers.Run(theirs, worker, None, 8, comparison, [3.0, 8.0, 6.0], 7),
        peers.Run(refused, None, "no first moment"),
    ]
    job = module("peers_job").Prepared(tmp_path, "made", [([1, 2], [1, 2])] * 4, {"sgd": np.zeros((4, 10))})
    first, second, third = peers.rows(runs, job, 8)
    assert (first["ms_50"], first["ratio_to_baseline"], first["examples_per_s"]) == (2000, 1.0, 2.0)
    assert (second["ratio_to_baseline"], second["peak_bytes"], second["peer_version"]) == (3.0, 7, "1")
    assert third["ms_50"] is None
    assert (third["reason"], third["implementation"], third["k"]) == ("no first moment", "bergson less", 8)
    assert (
        len({frozenset(row) - {"ratio_to_baseline", "examples_per_s", "tokens_per_s"} for row in (first, third)}) == 1
    )
    json.dumps([first, second, third])


def test_every_variant_has_a_worker_and_a_baseline(module: Any) -> None:
    peers = module("peers")
    names = [variant.name for variant in peers.VARIANTS]
    assert len(set(names)) == len(names)
    for variant in peers.VARIANTS:
        assert variant.script.exists()
        assert peers.BASELINES[variant.rule] in names


def test_workers_of_peers_do_not_import_less_fast() -> None:
    scripts = [*(ROOT / "benchmarks").glob("peers_worker_*.py"), ROOT / "benchmarks/peers_serve.py"]
    importing = []
    for script in scripts:
        nodes = list(ast.walk(ast.parse(script.read_text())))
        modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        importing += [script.name for name in modules if name.partition(".")[0] in ("less_fast", "common")]
    assert importing == ["peers_worker_less_fast.py"]
