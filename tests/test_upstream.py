"""How other libraries' tests are run here: no outcome hides another's, and no package is that of another Python."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import upstream

FIRST = """
class TestOne:
    def test_same(self): pass
    def test_own(self): pass
class TestTwo:
    def test_same(self): assert 0, "two"
"""
SECOND = "import pytest\ndef test_same(): pytest.skip('why')\n"


def test_names_that_meet_are_told_apart(tmp_path: Path) -> None:
    for name, text in (("test_first", FIRST), ("test_second", SECOND)):
        (tmp_path / f"{name}.py").write_text(text)
    outcomes = upstream.run_tests([tmp_path / "test_first.py", tmp_path / "test_second.py"], [])
    assert outcomes == {
        "test_first::TestOne::test_same": "passed",
        "test_own": "passed",
        "test_first::TestTwo::test_same": "failed: AssertionError: two",
        "test_second::test_same": "skipped: why",
    }


def test_packages_are_kept_per_version_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(upstream, "CACHE", tmp_path)
    monkeypatch.setattr(upstream, "_pip", lambda *arguments: calls.append(arguments))
    here = upstream.packages("one==1", "two")
    assert here == upstream.packages("one==1", "two") and len(calls) == 1
    assert here.is_dir() and here.name == f"one==1+two+{sys.implementation.cache_tag}"
    monkeypatch.setattr(sys.implementation, "cache_tag", "cpython-399")
    assert upstream.packages("one==1", "two") != here and len(calls) == 2
