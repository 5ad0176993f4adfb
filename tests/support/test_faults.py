# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of faults is made of tests that exist, and of all of them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from faults import Fault

REPO = Path(__file__).parents[2]
MADE = runpy.run_path(str(REPO / "tests/reliability.py"))
_MARKED = re.compile(r"^@(?:pytest\.mark\.)?fault\(.*?^def (test_\w+)\(", re.MULTILINE | re.DOTALL)


def _fault(**changes: object) -> Fault:
    values = {"passed": True, "figures": {"longest scrape": "12 ms", "lost": "0"}, **changes}
    return Fault("clients", "slow | silent", "100 of them", "tests/export/test_a.py::test_b", **values)  # type: ignore[arg-type]


def test_a_row_has_what_was_done_and_measured() -> None:
    assert MADE["table"]([_fault(host="trixie-amd")]) == (
        "### Clients\n\n"
        "| fault | what was done | figures | test |\n|---|---|---|---|\n"
        "| slow \\| silent | 100 of them (trixie-amd) | longest scrape: 12 ms; lost: 0 | `test_a.py` `test_b` |\n\n"
    )


@pytest.mark.parametrize("bad", [{"passed": False}, {"passed": None}, {"figures": {}}])
def test_there_is_no_table_with_a_fault_that_was_not_survived(bad: dict[str, object]) -> None:
    with pytest.raises(SystemExit, match="test_b"):
        MADE["table"]([_fault(), _fault(**bad)])


def test_only_what_is_between_the_marks_is_replaced() -> None:
    page = f"head\n{MADE['BEGIN']}\nold\n{MADE['END']}\ntail\n"
    assert MADE["with_table"](page, "new\n") == f"head\n{MADE['BEGIN']}\n\nnew\n{MADE['END']}\ntail\n"


def test_the_page_has_a_row_for_each_test_of_a_fault_and_no_other() -> None:
    files = sorted((REPO / "tests").rglob("test_*.py"))
    marked = {(file.name, name) for file in files for name in _MARKED.findall(file.read_text())}
    rows = re.findall(r"\| `(test_\w+\.py)` `(test_\w+)` \|$", MADE["PAGE"].read_text(), re.MULTILINE)
    assert set(rows) == marked, "make test-faults makes the page anew"
