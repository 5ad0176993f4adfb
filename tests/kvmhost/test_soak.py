# SPDX-License-Identifier: GPL-2.0-or-later
"""Hours of a host's life in minutes: scenarios/soak.py. SOAK_HOURS says how many (`make soak`)."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
from conftest import TIMEOUT_SECONDS, Collected
from faulted import faulted, flat, in_mb
from faults import Figures
from metrics_text import Metrics, nonzero
from soak import COME, COME_MINUTES, COME_UPDATES, HOUR_SECONDS, SCRAPE_SECONDS, STAYS
from test_many import of_calls
from witness import tallied

HOURS = int(os.environ.get("SOAK_HOURS", "3"))
#: vCPUs, and updates of them, in an hour.
COMING = HOUR_SECONDS // SCRAPE_SECONDS // COME_MINUTES * COME
VCPUS, UPDATES = 2 + COMING, 2 * STAYS + COMING * COME_UPDATES


on_each_host = faulted(
    *("python3", "/in/soak.py", str(HOURS)),
    timeout=max(TIMEOUT_SECONDS, HOURS * 600),
    options=("--count-instructions",),  # idle time is free
)


@on_each_host
@pytest.mark.fault(
    "weeks",
    f"{HOURS} hours of guest time",
    f"--by-vm; each hour {1 + COMING} VMs, {UPDATES} updates, a scrape a minute, a reload of the module",
    dear=True,
)
def test_from_hour_to_hour_all_is_flat_and_counted(beside: Collected, host: str, figures: Figures) -> None:
    found = beside.scenario("soak")
    hours: list[dict[str, Any]] = found["hours"]
    assert len(hours) == HOURS > 2, "what an hour leaves is seen from the second on"
    assert all(hour["status"] == 0 for hour in hours)
    assert (found["status"], found["left"]) == (0, found["idle"])
    # What there is after an hour is there after each.
    assert all(hour["kernel"] == hours[0]["kernel"] for hour in hours)
    assert all(hour["threads"] == hours[0]["threads"] for hour in hours)
    texts = [Metrics.of(hour["text"]).of_host() for hour in hours]
    assert all(text.samples.keys() == texts[0].samples.keys() for text in texts)
    memory = flat(hours)
    for number, text in enumerate(texts):
        tallies = tallied(beside.folder / f"witness-hour-{number}")
        assert (tallies.vcpus.total(), tallies.updates.total()) == (VCPUS, UPDATES)
        calls, redundant = of_calls(host, VCPUS, UPDATES)
        assert tallies.calls.total() == calls.total()
        times = number + 1
        assert text.calls() == Counter({key: times * count for key, count in calls.items()})
        assert nonzero(text.redundant()) == {key: times * count for key, count in redundant.items()}
        assert text.updates() == times * UPDATES
        assert text.creations()[0] == times * VCPUS
        assert text.lost() == []
    end = Metrics.of(found["text"]).of_host()
    assert end.value("msrtrace_module_unloads_total") == HOURS
    assert end.updates() == HOURS * UPDATES
    figures["guest time"] = f"{sum(hour['seconds'] for hour in hours) / 3600:.1f} h"
    figures["here"] = f"{(beside.folder / 'minutes').read_text()} min"
    figures["memory by the hour"] = in_mb(memory)
    figures["descriptors by the hour"] = ", ".join(str(hour["descriptors"]) for hour in hours)
    figures["calls"] = f"{end.calls().total():,}, equal"


LOOKS = [{"memory": 44_000 + (8_000 if n == 20 else 0), "descriptors": 45 + (n == 30)} for n in range(50)]


def test_what_is_high_once_is_flat() -> None:
    assert flat(LOOKS)[20] == 52


@pytest.mark.parametrize("left", [{"memory": 6000}, {"descriptors": 3}])
@pytest.mark.parametrize("number", [3, 8, 50])
def test_what_adds_up_is_not_flat(left: dict[str, int], number: int) -> None:
    """kB, and descriptors, from the first look to the last."""
    looks = [{name: value + left.get(name, 0) * n // number for name, value in LOOKS[0].items()} for n in range(number)]
    with pytest.raises(AssertionError):
        flat(looks)
