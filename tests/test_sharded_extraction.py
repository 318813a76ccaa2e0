"""``extract_many`` with a model sharded by FSDP2: its ranks make the stores of a process with the whole model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import sharded_extraction
from support.children import child_environment
from support.stores import folder_hashes

from less_fast.store import FeatureStore


def torchrun(folder: Path, *work: str, ranks: int = 2, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    command = [sys.executable, "-m", *launcher, "-m", "support.sharded_extraction", str(folder), *work]
    # Otherwise ranks that are started again are told the addresses of those before them.
    environment = child_environment(OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


@pytest.fixture(scope="module")
def folder(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a pool, and ``expected``, which a process with the whole model made of them."""
    folder = tmp_path_factory.mktemp("sharded")
    for name in ("model", "pool.jsonl"):
        (folder / name).symlink_to(inputs / name)
    sharded_extraction.make(folder, "expected", *sharded_extraction.whole(folder))
    return folder


@pytest.fixture(scope="module")
def done(folder: Path) -> subprocess.CompletedProcess[str]:
    """Two ranks that have done everything, of which one is killed in `killed` and one fails in `failing`."""
    done = torchrun(folder, "in_step", "replicas", "refused", "sizes", "memory", "killed", "failing", restarts=1)
    assert (folder / "resumed-1").exists(), done.stderr[-5000:]
    return done


@pytest.fixture(scope="module")
def made(folder: Path, done: subprocess.CompletedProcess[str]) -> Path:
    """The folder with what they made."""
    return folder


def same(folder: Path, name: str, expected: str = "expected") -> bool:
    """Whether two stores and those of the other kind of features beside them are equal in every byte."""
    return all(
        folder_hashes(folder / f"{name}{kind}") == folder_hashes(folder / f"{expected}{kind}") for kind in ("", "-sgd")
    )


def test_ranks_in_step_make_the_store_of_one_process(made: Path) -> None:
    assert FeatureStore(made / "expected", verify=True).verify().ok
    assert same(made, "in_step")
    passes = [json.loads((made / f"passes-{rank}").read_text()) for rank in (0, 1)]
    assert len(passes[0]) == len(passes[1])
    idle = [1, 2]
    assert idle in passes[1] and idle not in passes[0], "no shard has an odd number of batches"
    assert sum(n for n, length in [*passes[0], *passes[1]] if [n, length] != idle) == 40


def test_replicas_share_a_store(made: Path) -> None:
    assert same(made, "replicas")


@pytest.mark.heavy
def test_replicas_of_two_ranks_each_share_a_store(folder: Path) -> None:
    done = torchrun(folder, "replicas", ranks=4)
    assert done.returncode == 0, done.stderr[-5000:]
    assert same(folder, "replicas")


@pytest.mark.parametrize("backward", [False, True])
def test_a_batch_without_memory_halves_the_budget_on_all_ranks(made: Path, backward: bool) -> None:
    failures: list[bool] = []
    model, tokenizer = sharded_extraction.whole(made)
    sharded_extraction.limited(model, backward, failures)
    sharded_extraction.make(made, f"limited-{backward:d}", model, tokenizer)
    assert failures
    shards = FeatureStore(made / f"limited-{backward:d}").manifest["shards"]
    assert {shard["facts"]["token_budget"] for shard in shards} == {75}
    for checkpointed in (0, 1):
        name = f"memory-{backward:d}{checkpointed}"
        assert same(made, name, f"limited-{backward:d}")
        counts = [int((made / f"{name}-failures-{rank}").read_text()) for rank in (0, 1)]
        assert counts == [1, 1], "a rank has tried again what can't work"


def test_every_rank_says_why_a_store_is_not_made(made: Path) -> None:
    ours, theirs = ((made / f"refused-{rank}").read_text().splitlines() for rank in (0, 1))
    assert "(here -> rank 1): max_length: 64 -> 63; give all" in ours[0]
    assert "(here -> rank 0): max_length: 63 -> 64; give all" in theirs[0]
    assert "(here -> rank 1): checkpoint_activations: false -> true; give all" in ours[1]
    assert '(here -> rank 1): token_budget: "auto" -> 150; give all' in ours[2]
    assert re.search(r"outputs\[0\]\[0\]: .+ -> .+; outputs\[0\]\[1\]", ours[3])
    assert "rank-1.jsonl: no such file" in theirs[4]
    assert ours[4] == theirs[4] + " (on rank 1 of the model's 2)"
    assert "was begun with other settings (old -> new): max_length: 64 -> 32;" in ours[5]
    assert theirs[5] == ours[5] + " (on rank 0 of the model's 2)"
    assert ours[6:] == theirs[6:]
    assert "shard_range is 9:3" in ours[6]
    assert "(tensor parallelism, perhaps)" in ours[7]
    assert "a mixed-precision policy" in ours[8]


def test_what_a_rank_holds_of_the_weights(made: Path) -> None:
    model, _ = sharded_extraction.whole(made)
    of_modules = dict.fromkeys(["", *(f"{layer}.{part}" for layer in "01" for part in ("self_attn", "mlp"))], 0)
    halves = [0, 0]
    for name, parameter in model.named_parameters():
        layer = name.partition(".layers.")[2].split(".")
        of_modules[".".join(layer[:2]) if len(layer) > 1 and "layernorm" not in name else ""] += 4 * parameter.numel()
        row = 4 * parameter[0].numel()
        halves[0] += row * -(-len(parameter) // 2)
        halves[1] += row * (len(parameter) // 2)
    whole = of_modules.pop("")
    for rank in (0, 1):
        expected = halves[rank] + whole + sum(sorted(of_modules.values())[-2:])
        assert int((made / f"bytes-{rank}").read_text()) == expected


def test_ranks_that_are_started_again_make_what_is_missing(made: Path) -> None:
    assert same(made, "killed")
    of_all = len(json.loads((made / "passes-1").read_text()))
    assert int((made / "resumed-1").read_text()) < of_all, "finished shards were made again"


def test_a_rank_that_fails_ends_all(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1
    assert re.search(
        r"\[rank1\]: less_fast.errors.LessFastError: out of memory on cpu in a batch of 2 examples and 128 tokens, "
        r".*; begin again in another folder with token_budget=64",
        done.stderr,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_mesh_of_one_device_agrees_with_the_whole_model(folder: Path) -> None:
    done = torchrun(folder, "one_device", ranks=1)
    assert done.returncode == 0, done.stderr[-5000:]
    found, expected = (FeatureStore(folder / f"one_device{kind}") for kind in ("", "-whole"))
    assert found.facts == expected.facts and found.facts["numerics"]["device"].startswith("cuda")
    np.testing.assert_array_equal(found.status, expected.status)
    np.testing.assert_allclose(found[:], expected[:], rtol=1e-3, atol=1e-3 * float(np.abs(expected[:]).max()))
