"""A base model sharded by FSDP2 over two processes on the CPU: each computes its own batches."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from support.children import child_environment
from support.large_models import adam_state
from support.shard_features import PROJECTION, batches, make_model

from less_fast import FeatureExtractor


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saved."""
    out = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "support.shard_features", str(out)]
    with (out / "log").open("w") as log:
        processes = [
            subprocess.Popen(
                [*command, str(rank)], cwd=out, env=child_environment(OMP_NUM_THREADS="1"), stderr=log, stdout=log
            )
            for rank in (0, 1)
        ]
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], (out / "log").read_text()[-3000:]
    return [torch.load(out / f"rank{rank}.pt") for rank in (0, 1)]


def test_features_of_a_sharded_model_are_those_of_the_whole_one(found: list[dict[str, Any]]) -> None:
    model = make_model()
    extractor = FeatureExtractor(model, PROJECTION, adam_state(model))
    for rank in (0, 1):
        assert found[rank]["layout"] == extractor.layout.to_list()
        for data, kept, checkpointed in zip(batches(rank), *found[rank]["features"].values()):
            expected = extractor(data)
            assert kept.shape == (len(data["input_ids"]), PROJECTION.dim)
            torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(kept, checkpointed)
    assert found[0]["features"][False][0].any() and found[1]["features"][False][0].any()
    assert not found[0]["features"][False][1].any()  # the batch without labels
