"""JSON of files that nobody vouches for: what is refused, and how values are shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_fast.store.strict_json import parse_json, shown


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]', "NaN", "[-Infinity]", "[" * 65, "[" * 10**5, "]", ""]
)
def test_json_that_readers_differ_on_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text.encode() + b"]" * text.count("["))


def test_json_as_deep_as_64_is_read() -> None:
    assert parse_json("[" * 64 + "]" * 64) == json.loads("[" * 64 + "]" * 64)
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        parse_json("[" * 65 + "]" * 65)
    assert parse_json(b'{"a": [1.5, "\xc3\xa9", null]}') == {"a": [1.5, "é", None]}


@given(
    st.recursive(
        st.none() | st.text() | st.integers() | st.floats(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_errors_show_any_value_in_one_short_line(value: Any) -> None:
    assert "\n" not in shown(value) and len(shown(value)) < 30_000
    assert len(shown("x" * 10**6)) < 200 and len(shown([10**3000] * 10**5)) < 1000
