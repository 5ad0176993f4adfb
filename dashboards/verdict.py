# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of tracer/model/verdict.py in PromQL, for the dashboard and the alert in rules.yml."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import indent

from dashboards.grafana import BLUE, GREEN, GREY, PLAIN, RED
from dashboards.patterns import label, msr_pattern
from dashboards.queries import HOST, LOSSES, metric, selected
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

#: The two that say which of both kernels it is are the lowest.
MISSING_CODE, PRESENT_CODE, SUPERSEDED_CODE, UNDECIDED_CODE, NEVER_PATCHED_CODE = 1, 2, 3, 4, 5
#: Their texts and colours in the dashboard.
VERDICTS = {
    MISSING_CODE: ("missing", RED),
    PRESENT_CODE: ("present", GREEN),
    SUPERSEDED_CODE: ("superseded (6.17+)", BLUE),
    UNDECIDED_CODE: ("undecided", GREY),
    NEVER_PATCHED_CODE: ("not applicable", PLAIN),
}
#: The values of the label `verdict` in rules.yml, by the code in a query.
LABELS = {
    MISSING_CODE: "missing",
    PRESENT_CODE: "present",
    SUPERSEDED_CODE: "superseded",
    UNDECIDED_CODE: "undecided",
    NEVER_PATCHED_CODE: "not_applicable",
}


def matchers(calls: Calls) -> tuple[str, ...]:
    """The matchers for the series of these calls."""
    pattern = f'msr{"!~" if calls.outside else "=~"}"{msr_pattern(calls.msrs)}"'
    return f'action="{calls.action}"', f'cause="{FILTER_CHANGE}"', pattern


@dataclass(frozen=True)
class Dialect:
    """How a query distinguishes hosts and selects series."""

    #: the clause of an aggregation to one series for each host, or for each of its values of the given labels
    clause: Callable[..., str]
    #: the vector matching by host, after `unless` and `and`
    on: str
    #: for how long after a reload of KVM's module the calls may be those of the previous module
    window: str
    #: the selector of a metric of msrtrace's, by its name and matchers; the name may be a regular expression
    select: Callable[..., str]

    def per_host(self, counter: Callable[[str], str], *labels: str) -> str:
        """A counter summed by host; `counter` gets the prefix `host_`, which alone includes ended VMs, or ""."""
        sums = (f"sum {self.clause(*labels)} {_block(counter(of))}" for of in ("host_", ""))
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

    def no_updates(self) -> str:
        """Fact.NO_UPDATES."""
        info = f"group {self.clause()} ({self.select('build_info')})"
        return self.unless(info, self.per_host(lambda of: self.select(f"{of}filter_updates_total")) + " > 0")

    def one_direction(self) -> str:
        """Fact.ONE_DIRECTION."""
        passed = self.per_host(self.calls(DISABLES, label("access", ("read", "write"))), "msr", "access")
        in_one = f"count {self.clause('msr')} {_block(f'{passed} > 0')} == 1"
        return self.since_reload(f"group {self.clause()} {_block(in_one)}", DISABLES)

    def facts(self) -> dict[Fact, str]:
        """The facts that can be queried: each has series for the hosts where it holds.

        Fact.RELOADED is a part of two of them. Fact.UPDATES_UNSEEN is Fact.NO_UPDATES here: the counter is absent.
        """
        select = self.select
        unprobed = select("probe_attached", label("function", _COUNTED))
        return {
            Fact.NEVER_PATCHED: select("build_info", label("vendor", NEVER_PATCHED)),
            Fact.SUPERSEDED: select("build_info", label("layout", SUPERSEDED)),
            Fact.CALLS_UNSEEN: select("build_info", label("layout", (*JUDGED, *SUPERSEDED), other=True)),
            Fact.CHANGED: self.changed(),
            Fact.ENABLED: self.enabled(),
            Fact.NO_UPDATES: self.no_updates(),
            Fact.UNKNOWN: f"{self.per_host(self.calls(UNKNOWN_ENABLES))} > 0",
            Fact.LOST: "\nor\n".join([*(f"{select(name)} > 0" for name in LOSSES), f"{unprobed} == 0"]),
            Fact.ONE_DIRECTION: self.one_direction(),
            Fact.ANYTHING: select("build_info"),
        }

    def verdict(self) -> str:
        """A code for each host: the rules joined by `or`, which keeps the first series of a host."""
        facts = self.facts()
        return "\nor\n".join(
            f"{_code(rule)} * group {self.clause()} {_block(facts[rule.fact])}" for rule in RULES if rule.fact in facts
        )


def _block(text: str) -> str:
    """The text in parentheses, indented on its own lines."""
    return "(\n" + indent(text, "  ") + "\n)"


def _code(rule: Rule) -> int:
    codes = {Fact.NEVER_PATCHED: NEVER_PATCHED_CODE, Fact.SUPERSEDED: SUPERSEDED_CODE}
    if rule.fact in codes:
        return codes[rule.fact]
    return {False: MISSING_CODE, True: PRESENT_CODE, None: UNDECIDED_CODE}[rule.patched]


#: Functions without whose probes a call may be missed.
_COUNTED = [f for vendor in VENDORS for layout in JUDGED for f in sorted(vendor.counted_functions(layout))]


# --- the dashboard ---

_PANELS = Dialect(
    clause=lambda *labels: f"by ({', '.join((HOST, *labels))})",
    on=f" on ({HOST})",
    window="$__rate_interval",
    select=metric,
)


def _one_line(query: str) -> str:
    return re.sub(r"\( | (?=\))", lambda part: part[0].strip(), " ".join(query.split()))


#: One of the codes above for each selected host.
VERDICT = selected(f"({_one_line(_PANELS.verdict())})")
MISSING = f"{VERDICT} == {MISSING_CODE}"


# --- rules.yml ---

_INFO = ("kernel", "version", "vendor", "layout", "backend", "redundancy")
#: All labels that msrtrace gives its series: any other is the target's, and is kept.
_OWN = ("msr", "name", "access", "action", "cause", "vm", "pid", "function", "map", *_INFO)


def _select(name: str, *chosen: str) -> str:
    return f"msrtrace_{name}{{{', '.join(chosen)}}}" if chosen else f"msrtrace_{name}"


_RULES = Dialect(
    clause=lambda *labels: f"without ({', '.join(one for one in _OWN if one not in labels)})",
    on="",
    window="1h",
    select=_select,
)


def recorded() -> str:
    """The verdict as the label `verdict` of each host, with those of its kernel by which it is selected."""
    named = f'count_values without () ("verdict", {_block(_RULES.verdict())})'
    for code, text in LABELS.items():
        named = f'label_replace({named}, "verdict", "{text}", "verdict", "{code}")'
    joined = f"* ignoring (verdict, {', '.join(_INFO)}) group_left (verdict)"
    return "max without (version, backend, redundancy) " + _block(f"msrtrace_build_info\n{joined}\n{named}")
