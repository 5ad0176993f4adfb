# SPDX-License-Identifier: GPL-2.0-or-later
"""Labels of msrtrace's own and of its targets."""

from __future__ import annotations

import pytest
from fleets import CALLS, LOCAL, Stored, counted, host, labelled, merged

from tracer.report.fleet.targets import differing, innermost, selector

NOW = 1_700_000_000.0
SCRAPES = [NOW - 60, NOW - 45, NOW - 30, NOW - 15, NOW]


def beside(stored: Stored, **labels: str) -> Stored:
    """The series as stored if the target has these labels: the metric's own of that name become exported_..."""
    return {
        name: [
            ({**{f"exported_{label}" if label in labels else label: v for label, v in old.items()}, **labels}, samples)
            for old, samples in series
        ]
        for name, series in stored.items()
    }


@pytest.mark.parametrize(
    "label",
    ["name", "msr", "access", "action", "cause", "version", "kernel", "layout", "function", "vendor", "vm", "pid"],
)
def test_a_target_label_may_have_the_name_of_one_of_ours(label: str) -> None:
    one, other = host(LOCAL, SCRAPES, start=NOW - 9e4), host(LOCAL, SCRAPES, updates=40, enables=17, start=NOW - 8e4)
    stored = merged(beside(one, **{label: "a"}), beside(other, **{label: "b"}))
    assert counted(stored, NOW) == {
        f'127.0.0.1:9753 ({label}="a")': (100, 1300),
        f'127.0.0.1:9753 ({label}="b")': (40, 1200),
    }


def test_a_target_inside_a_vm_may_run_by_vm() -> None:
    plain = host({**LOCAL, "vm": "outer"}, SCRAPES, start=NOW - 9e4)
    names = [name for name in plain if name.startswith(("msrtrace_intercept", "msrtrace_filter"))]
    sums = {name.replace("msrtrace_", "msrtrace_host_"): plain[name] for name in names}
    by_vm = {name: labelled({name: plain[name]}, exported_vm="inner", pid="1")[name] for name in names}
    assert counted({**plain, **sums, **by_vm}, NOW) == {"127.0.0.1:9753": (100, 1300)}


def test_series_of_other_exporters_do_not_matter() -> None:
    stored = host(LOCAL, SCRAPES, start=NOW - 9e4)
    stored["process_start_time_seconds"].append(({"job": "node", "instance": "a:9100"}, {NOW: 5.0}))
    assert counted(stored, NOW) == {"127.0.0.1:9753": (100, 1300)}


def test_a_series_that_is_not_msrtraces_is_named() -> None:
    stored = host(LOCAL, SCRAPES, start=NOW - 9e4)
    stored[CALLS] = [({**labels, "msr": "TSC"}, samples) for labels, samples in stored[CALLS]]
    with pytest.raises(Exception, match="a series that is not msrtrace's: msr='TSC'"):
        counted(stored, NOW)


def test_labels_renamed_by_other_servers_are_recognised() -> None:
    target = (("exported_exported_job", "c"), ("exported_instance", "x"), ("exported_job", "b"), ("instance", "y"))
    assert innermost(target) == {"job": "c", "instance": "x"}


def test_a_selector_is_valid_promql() -> None:
    assert selector((("a", 'x"\\\n'), ("b", "1"))) == r'{a="x\"\\\n", b="1"}'
    assert selector((("a", "1"),), ["b", "a"]) == '{b="", a="1"}'
    assert differing((("a", "1"), ("b", "2")), (("a", "2"), ("c", "3"))) == ["a", "b", "c"]
