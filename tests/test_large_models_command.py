"""The options for large models, from the command line to the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.cli import less_fast
from support.large_models import save_adapted

from less_fast import FeatureStore
from less_fast.config import RunConfig
from less_fast.pipeline import run


def test_extract_takes_the_options(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base, adapter = save_adapted(tmp_path)
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.examples("sums", 6))
    options: dict[str, list[str]] = {
        "plain": ["--device", "cpu"],
        "checkpointed": ["--device", "cpu", "--checkpoint-activations"],
        "spread": ["--device-map", "auto"],
        "4bit": ["--device", "cpu", "--quantization", "4bit"],
    }
    found: dict[str, Any] = {}
    for name, flags in options.items():
        out = tmp_path / name
        where = ["--adapter", str(adapter), "--dim", "128", "--no-progress"]
        result = less_fast("extract", base, data, out, *where, *flags)
        assert result.exit_code == 0, result.output
        found[name] = FeatureStore(out)[:]
    assert np.array_equal(found["plain"], found["checkpointed"])
    assert np.array_equal(found["plain"], found["spread"])
    cosines = (found["plain"] * found["4bit"]).sum(1)
    cosines /= np.linalg.norm(found["plain"], axis=1) * np.linalg.norm(found["4bit"], axis=1)
    assert (cosines > 0.7).all() and (cosines < 0.9999).all()


def test_a_run_takes_the_settings(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = tiny.config(tiny.make_inputs(tmp_path), quantization="4bit", checkpoint_activations=True)
    result = run(RunConfig.from_dict(settings), progress=False, say=lambda line: None)
    plain = run(RunConfig.from_dict({**tiny.config(tmp_path), "out": str(tmp_path / "plain")}), progress=False)
    stores = [FeatureStore(next((r.out / "features").rglob("manifest.json")).parent) for r in (result, plain)]
    assert stores[0].facts["model"] != stores[1].facts["model"]
    assert stores[0].facts["adapter"] == stores[1].facts["adapter"]  # the warm-up was the same
