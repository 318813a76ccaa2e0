"""The doctor: it finds what is there, passes what agrees with the reference and fails what does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.fused import fused_check
from support.triton_run import in_interpreter, require_triton
from typer.testing import CliRunner

from less_fast.cli import app
from less_fast.doctor import TOLERANCE, check_backend, check_fused, examine
from less_fast.ops import cpu
from less_fast.ops.accumulate import BACKENDS, Backend
from less_fast.ops.reference import accumulate_reference
from less_fast.projection import KINDS

N_CASES = len(KINDS) * 4 * 2  # rules; adapter matrices and a flat vector


@pytest.fixture(scope="module")
def diagnosis() -> Any:
    return examine()


def test_the_machine_is_described(diagnosis: Any) -> None:
    assert diagnosis.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]  # PyPI's has no "+cu130"
    assert diagnosis.versions["python"].startswith("3.")
    assert diagnosis.devices[0]["name"] == "cpu"
    assert len(diagnosis.devices) == 1 + torch.cuda.device_count()
    assert diagnosis.disk_free_gb > 0
    json.dumps(diagnosis.to_dict(), allow_nan=False)


def test_every_backend_is_checked_or_says_why_not(diagnosis: Any) -> None:
    assert diagnosis.ok
    on_cpu = {check.backend: check for check in diagnosis.checks if check.device == "cpu"}
    assert set(on_cpu) == set(BACKENDS)
    assert "CUDA" in on_cpu["triton"].reason and not on_cpu["triton"].available
    assert on_cpu["reference"].n_cases == N_CASES and on_cpu["reference"].worst_error < TOLERANCE
    if cpu._reason is None:
        assert on_cpu["cpu"].passed and on_cpu["cpu"].n_cases == N_CASES
        assert "built" in diagnosis.processor["less_fast._cpu"]
    for check in diagnosis.checks:
        assert str(check) in str(diagnosis)


def wrong(features: Any, grads: Any, parameter: Any, base: int, projection: Any, rule: Any) -> None:
    """The reference with a run of another number: the wrong signs, and nothing else that one could see."""
    accumulate_reference(features, grads, parameter, base + (projection.kind == "srht"), projection, rule)


def raising(*_: Any) -> None:
    raise RuntimeError("no kernel image is available\nmore lines")


@pytest.mark.parametrize(("broken", "reason"), [(wrong, "srht with sgd: relative error"), (raising, "no kernel image")])
def test_a_broken_backend_fails(monkeypatch: pytest.MonkeyPatch, broken: Any, reason: str) -> None:
    monkeypatch.setitem(BACKENDS, "reference", Backend(lambda *_: None, broken))
    check = check_backend("reference", "cpu")
    assert check.available and not check.passed
    assert reason in str(check.reason) and "\n" not in str(check.reason)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert [entry["backend"] for entry in found["checks"] if entry["available"] and not entry["passed"]] == [
        "reference"
    ]


def test_the_command_passes() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "everything that can run here agrees with the reference" in result.stdout


@pytest.mark.parametrize("kind", ["srht", "sjlt"])
def test_the_fused_kernels_are_checked_where_they_can_run(kind: str) -> None:
    require_triton()
    assert "CUDA devices" in str(check_fused(kind, "cpu").reason)
    check = in_interpreter(fused_check, kind)
    assert check.passed and check.n_cases == 4 and check.worst_error < TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["srht", "sjlt"])
def test_the_fused_kernels_are_right_on_a_device(kind: str) -> None:
    check = check_fused(kind, "cuda")
    assert check.available and check.passed, check.reason
