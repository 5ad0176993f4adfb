# SPDX-License-Identifier: GPL-2.0-or-later
"""A new operator's hour (operators_hour.py): it passes, its log is short, and the dashboard has answers."""

from __future__ import annotations

import pytest
from operators_hour import NODES, Hour, hour

pytestmark = pytest.mark.beside(boot=hour, host="operators-hour")

#: What the log has of each host, in this order; operating.py ends where one of them is not so.
OF_EACH = [
    "apt-get install -y msrtrace=",
    "msrtrace.service is active and enabled",
    "nothing is missing",
    "188 filter updates of 188",
    "another process serves",
    "as before",
    "kvm-module unpatched",
    "188 filter updates of 188",
    "systemctl reboot",
    "with nobody doing anything",
    "188 filter updates of 188",
    "apt-get purge",
    "no probe and no BPF program is left",
    "no file is left",
]


def test_nothing_failed(beside: Hour) -> None:
    assert beside.failures == [], "\n".join(beside.lines)
    assert beside.statuses == dict.fromkeys(NODES, 0)


@pytest.mark.parametrize("name", NODES)
def test_all_steps_were_taken_on_each_host(beside: Hour, name: str) -> None:
    lines = iter([line for line in beside.lines if line.startswith(name)])
    for wanted in OF_EACH:
        assert any(wanted in line for line in lines), f"{wanted!r} is not there, or not in its place"


def test_the_dashboard_of_the_package_has_answers(beside: Hour) -> None:
    assert beside.queries > 50
    assert beside.complaints == []


def test_the_log_is_short_enough_to_read(beside: Hour) -> None:
    assert len(beside.lines) < 100
    assert max(map(len, beside.lines)) <= 240  # commands are shown as they were typed
