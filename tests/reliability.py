# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the table of docs/reliability.md from what the tests of faults left: `python tests/reliability.py`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "support"))

from faults import GROUPS, RESULTS, Fault  # noqa: E402

PAGE = HERE.parent / "docs/reliability.md"
#: What is between these lines is made here.
BEGIN, END = "<!-- made by tests/reliability.py: begin -->", "<!-- end -->"


def table(faults: list[Fault]) -> str:
    """The faults by group, in Markdown. Raises SystemExit if one of them failed, or was left without a figure."""
    bad = [fault.test for fault in faults if not fault.passed or not fault.figures]
    if bad:
        raise SystemExit(f"no table: failed, or without figures: {', '.join(bad)}")
    parts = []
    for group, title in GROUPS.items():
        rows = [fault for fault in faults if fault.group == group]
        if rows:
            parts.append(f"### {title}\n\n| fault | what was done | figures | test |\n|---|---|---|---|\n")
            parts.append("".join(map(_row, rows)) + "\n")
    return "".join(parts)


def _row(fault: Fault) -> str:
    figures = "; ".join(f"{name}: {figure}" for name, figure in fault.figures.items())
    file, _, function = fault.test.partition("::")
    where = f" ({fault.host})" if fault.host else ""
    cells = (fault.fault, fault.done + where, figures, f"`{Path(file).name}` `{function}`")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def with_table(page: str, made: str) -> str:
    """The page with this table in place of the one that it has."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{made}{END}", page, flags=re.DOTALL)


def main() -> None:
    faults = [Fault(**fault) for fault in json.loads(RESULTS.read_text())]
    PAGE.write_text(with_table(PAGE.read_text(), table(faults)))


if __name__ == "__main__":
    main()
