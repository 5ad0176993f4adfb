# SPDX-License-Identifier: GPL-2.0-or-later
"""What the dashboard asks Prometheus, in pieces with names."""

from __future__ import annotations

from collections.abc import Callable

#: The label that operators give to targets, as prometheus.yml shows: `patched` or `unpatched`, what they believe.
GROUP = "patch"
HOST = "job, instance"
CALLS, REDUNDANT = "intercept_calls_total", "intercept_redundant_calls_total"

_A_VM = 'vm!=""'
_IN_UPDATE = 'cause="filter_change"'


def metric(name: str, *matchers: str) -> str:
    """The series of `msrtrace_NAME`, or of NAME in another namespace, of the hosts that were chosen."""
    name = name if name.startswith(("process_", "up")) else f"msrtrace_{name}"
    chosen = ('job=~"$job"', 'instance=~"$instance"', *matchers)
    return f"{name}{{{', '.join(chosen)}}}"


def total(name: str, *matchers: str, over: str = "{}") -> str:
    """A counter of each host, OVER which a function may be laid.

    Where VMs are told apart (--by-vm) it is that of all of them, ended ones too, which has a name of its own. The two
    are joined by `or`: one selector of both names would fail wherever msrtrace was started anew the other way.
    """
    if not name.startswith(("intercept_", "filter_update")):
        return over.format(metric(name, *matchers))
    together, plain = metric(f"host_{name}", *matchers), metric(name, 'vm=""', *matchers)
    return f"({over.format(together)} or {over.format(plain)})"


def rate(name: str, *matchers: str) -> str:
    """A counter's growth in a second."""
    return total(name, *matchers, over="rate({}[$__rate_interval])")


def increase(name: str, *matchers: str) -> str:
    """A counter's growth within a point of the graph."""
    return total(name, *matchers, over="increase({}[$__rate_interval])")


def of_vms(name: str) -> str:
    """A counter's growth in a second, of each VM."""
    return f"rate({metric(name, _A_VM)}[$__rate_interval])"


def by(labels: str, what: str) -> str:
    """WHAT, summed by LABELS; over everything if there are none."""
    return f"sum by ({labels}) ({what})" if labels else f"sum({what})"


def ratio(part: str, whole: str) -> str:
    """PART of WHOLE where there is any WHOLE: 0 of 0 is not 0 %, it is nothing."""
    return f"{part} / ({whole} > 0)"


def share(labels: str, growth: Callable[[str], str] = rate) -> str:
    """The share of redundant calls among those calls whose outcome is known."""
    redundant = growth(REDUNDANT)
    known = f"{growth(CALLS)} and {redundant}"
    return ratio(by(labels, redundant), by(labels, known))


def host_count(found: str, among: str) -> str:
    """How many hosts were FOUND; 0 only where one is AMONG those that could have been."""
    return f"count(group by ({HOST}) ({found})) or 0 * count(group by ({HOST}) ({among}))"


def most(name: str, labels: str) -> str:
    """The rates of a counter by LABELS, of the ten that grew most in the time shown."""
    grown = total(name, over="increase({}[$__range] @ end())")
    return f"{by(labels, rate(name))} and topk(10, {by(labels, grown)})"


def most_vms(name: str, labels: str) -> str:
    """The same of VMs."""
    grown = f"increase({metric(name, _A_VM)}[$__range] @ end())"
    return f"{by(labels, of_vms(name))} and topk(10, {by(labels, grown)})"


def quantile(part: float, labels: str = "") -> str:
    """The time that this PART of the filter updates did not exceed; nothing where there were none."""
    buckets = by(f"{labels}, le" if labels else "le", rate("filter_update_duration_seconds_bucket"))
    return f"histogram_quantile({part}, {buckets}) > 0"


BUILD = metric("build_info")
UPDATES = rate("filter_updates_total")


def comparable(*groups: str) -> str:
    """Restricts what it follows to hosts whose calls mean the same, and to those labelled as one of GROUPS, if any."""
    labelled = [f'{GROUP}=~"' + "|".join(groups) + '"'] if groups else []
    hosts = metric("build_info", 'layout="toggle"', *labelled)
    return f" and on ({HOST}) {hosts}"


def per_update(name: str, labels: str, only: str = "") -> str:
    """Calls that one filter update makes, on those hosts that show such calls."""
    calls = rate(name, _IN_UPDATE) + only
    return ratio(by(labels, calls), by(labels, f"{UPDATES} and on ({HOST}) {calls}"))


def per_update_by_kernel() -> str:
    """The same by the kernel's release, on every host that shows calls."""
    calls = rate(CALLS, _IN_UPDATE)
    join = f"* on ({HOST}) group_left (kernel) {BUILD}"
    return ratio(by("kernel", f"{calls} {join}"), by("kernel", f"({UPDATES} and on ({HOST}) {calls}) {join}"))


def mean_update(labels: str, only: str = "") -> str:
    """Seconds that one filter update takes."""
    seconds = rate("filter_update_duration_seconds_sum") + only
    return ratio(by(labels, seconds), by(labels, rate("filter_update_duration_seconds_count") + only))


#: Counters of what was not counted, and what each is called.
LOSSES = {
    "probe_missed_total": "runs that probes missed",
    "dropped_updates_total": "full maps",
    "unpaired_returns_total": "returns without an entry",
    "read_failures_total": "bitmaps not read",
}
_COUNTERS = "|".join(LOSSES)
LOST = f'{{__name__=~"msrtrace_({_COUNTERS})", job=~"$job", instance=~"$instance"}}'
#: Hosts on which something was not counted since the tracer started.
LOSSY = f"max by ({HOST}) ({LOST} > 0)"
#: Functions that should be probed and are not.
UNPROBED = f"{metric('probe_attached')} == 0"
