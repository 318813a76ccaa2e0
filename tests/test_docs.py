"""The documentation holds: Python blocks run, links lead somewhere, settings and formats are those of the code."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stores import make_store

from less_fast.config import RunConfig
from less_fast.store import FeatureStore, Status
from less_fast.store.codec import CODECS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)[^)]*\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


Run = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="module")
def run_blocks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Executes a page's Python blocks in order, once, in an empty folder; returns their common namespace."""

    @cache
    def run(page: Path) -> dict[str, Any]:
        text = page.read_text(encoding="utf-8")
        namespace: dict[str, Any] = {"__name__": page.stem}
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fast_jl", "sjlt"):  # a page may put ours in their place
                patch.setitem(sys.modules, name, None)
                patch.delitem(sys.modules, name)
            patch.chdir(tmp_path_factory.mktemp(page.stem))
            for fence in _FENCE.finditer(text):
                if fence[1] == "python":
                    # Empty lines before it, so that a traceback shows the page's own line numbers.
                    before = "\n" * text.count("\n", 0, fence.start(2))
                    exec(compile(before + fence[2], str(page), "exec", dont_inherit=True), namespace)
        return namespace

    return run


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_blocks_run(page: Path, run_blocks: Run) -> None:
    run_blocks(page)


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(path, anchor) of the links that stay within the repository."""
    for link in _LINK.finditer(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", link[1]):
            path, _, anchor = link[1].partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the web views of repositories name them."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        found = (page.parent / path).resolve() if path else page
        assert found.exists() and found.is_relative_to(ROOT), f"{page_name(page)} links to {path}, which is not there"
        assert not anchor or anchor in anchors(found), f"{page_name(page)} links to {path}#{anchor}: no such heading"


def test_links_and_anchors_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    prose = "# A `b` c\n[x](other.md#a-b-c) and [y](https://a.b/c)\n"
    page.write_text(prose + "```python\n# no heading\nf[0](z)\n```\n[z](#q)\n")
    assert list(links(page)) == [("other.md", "a-b-c"), ("", "q")]
    assert anchors(page) == {"a-b-c"}


def test_every_setting_is_documented_with_its_default() -> None:
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", text, re.MULTILINE))
    words = {"None": "not set", "()": "—", "{}": "—", "": "—", "False": "false"}
    for setting in fields(RunConfig):
        default = str(getattr(RunConfig(), setting.name))
        assert rows.pop(setting.name, "no row") == words.get(default, f"`{default}`"), setting.name
    assert not rows


@pytest.mark.parametrize("dtype", [*CODECS])
def test_the_reader_on_the_page_of_the_format_reads_every_store(dtype: str, tmp_path: Path, run_blocks: Run) -> None:
    generator = np.random.default_rng(0)
    features = (generator.standard_normal((10, 24)) * 10.0 ** generator.integers(-9, 6, (10, 1))).astype(np.float32)
    status = np.array([0, 0, Status.NO_LABELS, 0, 0, 0, Status.NON_FINITE, 0, 0, 0], np.uint8)
    store = make_store(tmp_path / "store", features, status=status, subtasks=["a", None] * 5, dtype=dtype)
    found = run_blocks(ROOT / "docs/store.md")["read_store"](store.path)
    np.testing.assert_array_equal(found["features"], FeatureStore(store.path)[:])
    for name in ("status", "norms", "n_tokens", "n_labels"):
        np.testing.assert_array_equal(found[name], getattr(store, name))
    assert found["ids"] == store.rows.ids and found["subtasks"] == store.rows.subtasks


def test_every_key_of_a_manifest_is_documented(run_blocks: Run) -> None:
    manifest = run_blocks(ROOT / "docs/python.md")["store"].manifest
    text = (ROOT / "docs/store.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w.]+)`", text))
    shard = manifest["shards"][0]
    keys = {*manifest, *shard, *shard["facts"], *manifest["layout"][0]}
    for name in ("numerics", "precondition", "projection", "rows", "tokenizer", "versions"):
        keys |= set(manifest[name])
    assert not keys - named
