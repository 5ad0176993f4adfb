# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of `make bench`, and that there is none for a tracer that did not count."""

from __future__ import annotations

from typing import Any

from bench import miscounted, parts_table, table


def measured(**changed: int | None) -> dict[str, Any]:
    """What a host of 10 updates left: one tracer that counts, and an empty probe."""
    counts = {
        "patched": {"calls": 137, "redundant": 110, "updates": 10},
        "unpatched": {"calls": 307, "redundant": 280, "updates": 10},
    }
    results = {
        variant: {
            "none": {"ticks": 5000},
            "counter": {"ticks": 18000, **counted, **changed},
            "empty probe": {"ticks": 6300},
        }
        for variant, counted in counts.items()
    }
    timed = {"starts": {"first": 12.0, "later": 1.5}, "scrapes": {"plain": 0.02, "--by-vm": 0.0602}}
    return {"release": "6.1.0", "updates": 10, "results": results} | timed


def test_the_table_has_what_is_added_to_an_update_and_to_each_of_its_calls() -> None:
    lines = table("bookworm", measured()).splitlines()
    cells = {
        row[0]: row[1:] for row in ([c.strip() for c in line.strip("|").split("|")] for line in lines if "|" in line)
    }
    assert cells["counter"] == ["yes", "18,000", "13,000", "1,000", "18,000", "13,000", "433"]
    assert cells["empty probe"] == ["", "6,300", "1,300", "100", "6,300", "1,300", "43"]
    assert cells["none"] == ["", "5,000", "", "", "5,000", "", ""]
    assert lines[-3].endswith(": first: 3,000; later: 375")
    assert lines[-1].endswith(": plain: 5.0; --by-vm: 15.1")


def test_a_tracer_must_have_counted_what_the_workload_did() -> None:
    assert not miscounted("bookworm", measured())
    assert not miscounted("bookworm", measured(redundant=None))  # it does not claim to know
    for wrong in ({"updates": 9}, {"calls": 136}, {"redundant": 0}):
        assert len(miscounted("bookworm", measured(**wrong))) == 2


def test_the_table_of_parts_has_what_each_adds_to_a_program_that_does_nothing() -> None:
    results = {"none": {"ticks": 5000}, "part: nothing": {"ticks": 5130}, "part: read a byte": {"ticks": 6430}}
    text = parts_table("bookworm", {"release": "6.1.0", "updates": 10, "results": {"patched": results}})
    assert "which takes 10\n" in text
    assert [c.strip() for c in text.splitlines()[-1].strip("|").split("|")] == ["read a byte", "100"]
