# SPDX-License-Identifier: GPL-2.0-or-later
"""Behind each sentence of the threat model is a test that exists."""

from __future__ import annotations

import re

from project import REPO

PAGE = REPO / "docs/threat-model.md"
_TEST = re.compile(r"`(test_\w+)`")
_BEHIND = re.compile(r"\((?:`test_\w+`(?:, )?)+\)")


def test_each_sentence_names_a_test_that_exists() -> None:
    defined = {
        name
        for file in (REPO / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.M)
    }
    points = [line for line in PAGE.read_text().splitlines() if line.startswith("- ")]
    assert len(points) > 20
    assert [point for point in points if not _BEHIND.search(point)] == []
    assert set(_TEST.findall(PAGE.read_text())) - defined == set()
