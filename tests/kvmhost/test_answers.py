# SPDX-License-Identifier: GPL-2.0-or-later
"""The pages that tell how many calls each kernel makes have the known answers, which the emulated hosts are held to."""

from __future__ import annotations

import re
from pathlib import Path

from answers import AMD, PER_UPDATE, PER_VCPU, RECALCULATIONS
from cache import REPO

#: By the series that docs/metrics.md names, the hosts that have it, without the vendor's suffix.
DISKS = {"5.10": "filter-only", "6.1": "bookworm", "6.12": "trixie", "6.17": "backports", "7.2": "sid"}


def rows(page: Path, first: str) -> list[list[str]]:
    """The cells of the table of PAGE whose header begins with the cell FIRST, without its header."""
    [table] = re.findall(rf"^\| {re.escape(first)}.*\n\|[-:|]+\|\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_calls_of_an_update_on_amd() -> None:
    told = {
        host: (int(calls), int(redundant))
        for _, host, calls, redundant, _ in rows(REPO / "docs/cost.md", "kernel | host | calls | of them redundant")
    }
    assert told == {host: PER_UPDATE[host]["unpatched"] for host in AMD}


def test_what_the_creation_of_a_vcpu_takes() -> None:
    told, expected = {}, {}
    for series, *cells in rows(REPO / "docs/metrics.md", "kernel | Intel: calls (of them redundant)"):
        for vendor, (calls, recalculations) in zip(("", "-amd"), (cells[:2], cells[2:]), strict=True):
            told[f"{DISKS[series]}{vendor}"] = (calls, recalculations.partition(",")[0])
    for disk in DISKS.values():
        for host in (disk, f"{disk}-amd"):
            each = PER_VCPU.get(host)
            calls = f"{each[0]} ({each[1]})" if each else "not observable"
            expected[host] = (calls, str(RECALCULATIONS.get(host, "")))
    assert told == expected


def test_the_readmes_figures_for_amd_are_those_that_its_commands_print() -> None:
    """docs/cost.md has what `make saving` prints, for vCPUs with a CPUID as `make compare-demo` has them."""
    printed = {row[0]: row for row in rows(REPO / "docs/cost.md", "host         | calls")}
    old, new = (printed[host] for host in ("bookworm-amd", "trixie-amd"))
    made, left = zip(*(row[1].split("; ") for row in (old, new)), strict=True)
    assert made == tuple(str(PER_UPDATE[host]["unpatched"][0]) for host in ("bookworm-amd", "trixie-amd"))
    assert len({*left}) == 1
    less = [row[5].replace("%", " %") for row in (old, new)]
    text = " ".join((REPO / "README.md").read_text().split())
    assert f"makes {made[0]} calls (Linux 6.1) or {made[1]} (6.12), of which all but one change nothing" in text
    assert f"{left[0]} calls are left, and the update takes {less[0]} (6.1) or {less[1]} (6.12) fewer" in text
