# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of tracer/model/verdict.py in PromQL, for the dashboard and the alert in rules.yml."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from textwrap import indent

from dashboards.patterns import label, msr_pattern
from dashboards.queries import HOST, LOST, metric
from tracer.model.cause import FILTER_CHANGE
from tracer.model.vendors import VENDORS
from tracer.model.verdict import (
    ANY_ENABLES,
    DISABLES,
    ENABLES,
    JUDGED,
    NEVER_PATCHED,
    RULES,
    SUPERSEDED,
    UNKNOWN_ENABLES,
    Calls,
    Fact,
    Rule,
)

MISSING_CODE, PRESENT_CODE, SUPERSEDED_CODE, UNDECIDED_CODE, NEVER_PATCHED_CODE = 1, 2, 3, 4, 5


def matchers(calls: Calls) -> tuple[str, ...]:
    """The matchers for the series of these calls."""
    pattern = f'msr{"!~" if calls.outside else "=~"}"{msr_pattern(calls.msrs)}"'
    return f'action="{calls.action}"', f'cause="{FILTER_CHANGE}"', pattern


@dataclass(frozen=True)
class Dialect:
    """How a query distinguishes hosts and selects series."""

    #: aggregations to one series for each host: of counters summed over VMs, and of counters by VM
    sums: tuple[str, str]
    #: the vector matching by host, after `unless` and `and`
    on: str
    #: for how long after a reload of KVM's module the calls may be those of the previous module
    window: str
    #: the selector of a metric of msrtrace's, by its name and matchers
    select: Callable[..., str]

    def per_host(self, counter: Callable[[str], str]) -> str:
        """A counter summed by host; `counter` gets the prefix `host_`, which alone includes ended VMs, or ""."""
        sums = (f"{clause} {_block(counter(of))}" for clause, of in zip(self.sums, ("host_", ""), strict=True))
        return _block("\nor\n".join(sums))

    def calls(self, calls: Calls, *more: str, over: str = "{}") -> Callable[[str], str]:
        """The counter of these calls, inside the format string `over`, such as a function."""
        return lambda of: over.format(self.select(f"{of}intercept_calls_total", *matchers(calls), *more))

    def unless(self, *parts: str) -> str:
        """The first part, on hosts for which no other part has series."""
        return f"\nunless{self.on}\n".join(parts)

    def since_reload(self, found: str, calls: Calls) -> str:
        """`found` since the tracer started; after a reload only if there were such calls in the window."""
        grown = self.per_host(self.calls(calls, over=f"increase({{}}[{self.window}])"))
        reloaded = self.unless(f"{self.select('module_unloads_total')} > 0", f"{grown} > 0")
        return _block(self.unless(found, _block(reloaded)))

    def enabled(self) -> str:
        """Fact.ENABLED; the value is the number of calls."""
        return self.since_reload(f"{self.per_host(self.calls(ENABLES))} > 0", ENABLES)

    def changed(self) -> str:
        """Fact.CHANGED. Enables whose outcome is unknown are left out."""

        def useful(of: str) -> str:
            return f"{self.calls(ANY_ENABLES)(of)}\n- {self.select(f'{of}intercept_redundant_calls_total')}"

        return f"{self.per_host(useful)} > 0"


def _block(text: str) -> str:
    """The text in parentheses, indented on its own lines."""
    return "(\n" + indent(text, "  ") + "\n)"


# --- the dashboard ---

_PANELS = Dialect(
    sums=(f"sum by ({HOST})", f"sum by ({HOST})"),
    on=f" on ({HOST})",
    window="$__rate_interval",
    select=metric,
)
_BUILD = metric("build_info")
#: Functions without whose probes a call may be missed.
_COUNTED = [f for vendor in VENDORS for layout in JUDGED for f in sorted(vendor.counted_functions(layout))]


def _one_direction() -> str:
    """MSRs of which filter updates passed only one direction through."""
    clause = f"sum by ({HOST}, msr, access)"
    by_direction = replace(_PANELS, sums=(clause, clause))
    passed = by_direction.per_host(_PANELS.calls(DISABLES, label("access", ("read", "write"))))
    return _PANELS.since_reload(f"count by ({HOST}, msr) {_block(f'{passed} > 0')} == 1", DISABLES)


def _facts() -> dict[Fact, str]:
    """The facts that can be queried: each has series for the hosts where it holds.

    Fact.RELOADED is a part of two of them. Fact.UPDATES_UNSEEN is Fact.NO_UPDATES here: the counter is absent.
    """
    unprobed = metric("probe_attached", label("function", _COUNTED))
    return {
        Fact.NEVER_PATCHED: metric("build_info", label("vendor", NEVER_PATCHED)),
        Fact.SUPERSEDED: metric("build_info", label("layout", SUPERSEDED)),
        Fact.CALLS_UNSEEN: metric("build_info", label("layout", (*JUDGED, *SUPERSEDED), other=True)),
        Fact.CHANGED: _PANELS.changed(),
        Fact.ENABLED: _PANELS.enabled(),
        Fact.NO_UPDATES: _PANELS.unless(
            _BUILD, _PANELS.per_host(lambda of: metric(f"{of}filter_updates_total")) + " > 0"
        ),
        Fact.UNKNOWN: f"{_PANELS.per_host(_PANELS.calls(UNKNOWN_ENABLES))} > 0",
        Fact.LOST: f"({LOST} > 0 or {unprobed} == 0)",
        Fact.ONE_DIRECTION: _one_direction(),
        Fact.ANYTHING: _BUILD,
    }


def _code(rule: Rule) -> int:
    codes = {Fact.NEVER_PATCHED: NEVER_PATCHED_CODE, Fact.SUPERSEDED: SUPERSEDED_CODE}
    if rule.fact in codes:
        return codes[rule.fact]
    return {False: MISSING_CODE, True: PRESENT_CODE, None: UNDECIDED_CODE}[rule.patched]


def _verdict() -> str:
    """The rules joined by `or`, which keeps the first series of a host: that of the first rule that applies."""
    facts = _facts()
    found = " or ".join(
        f"{_code(rule)} * group by ({HOST}) ({facts[rule.fact]})" for rule in RULES if rule.fact in facts
    )
    return re.sub(r"\( | (?=\))", lambda part: part[0].strip(), " ".join(found.split()))


#: One of the codes above for each host.
VERDICT = _verdict()
MISSING, PRESENT = (f"({VERDICT}) == {code}" for code in (MISSING_CODE, PRESENT_CODE))


# --- rules.yml ---

_KIND = ("msr", "name", "access", "action", "cause")
_INFO = ("version", "vendor", "layout", "backend", "redundancy")
#: The hosts of which it can be judged. Versions of msrtrace that knew only one vendor have no label for it.
JUDGED_HOSTS = (label("layout", JUDGED), label("vendor", NEVER_PATCHED, other=True))


def _select(name: str, *chosen: str) -> str:
    return f"msrtrace_{name}{{{', '.join(chosen)}}}" if chosen else f"msrtrace_{name}"


#: All labels of targets are kept.
_ALERT = Dialect(
    sums=(f"sum without ({', '.join(_KIND)})", f"sum without ({', '.join(_KIND)}, vm, pid)"),
    on="",
    window="1h",
    select=_select,
)


def missing_by_kernel() -> str:
    """Enables of hosts that lack the patch, with the kernel's release: Fact.ENABLED where no earlier rule applies."""
    facts = {
        Fact.CHANGED: _ALERT.changed(),
        # These three are of other vendors and layouts.
        Fact.NEVER_PATCHED: None,
        Fact.SUPERSEDED: None,
        Fact.CALLS_UNSEEN: None,
        # It is a part of `enabled`.
        Fact.RELOADED: None,
    }
    earlier = [facts[rule.fact] for rule in takewhile(lambda rule: rule.fact is not Fact.ENABLED, RULES)]
    found = _ALERT.unless(_ALERT.enabled(), *(fact for fact in earlier if fact))
    info = _select("build_info", *JUDGED_HOSTS)
    joined = f"* ignoring (kernel, {', '.join(_INFO)}) group_left ()"
    return f"max without ({', '.join(_INFO)}) " + _block(f"{info}\n{joined}\n{_block(found)}")
