# SPDX-License-Identifier: GPL-2.0-or-later
"""The PromQL of the dashboard, built from named parts."""

from __future__ import annotations

from collections.abc import Callable

from dashboards.patterns import label
from tracer.model.vendors import FIRST, VENDORS
from tracer.model.verdict import JUDGED

#: The label that operators give to targets, as in prometheus.yml: `patched` or `unpatched`, as they believe.
GROUP = "patch"
HOST = "job, instance"
CALLS, REDUNDANT = "intercept_calls_total", "intercept_redundant_calls_total"

_A_VM = 'vm!=""'
_IN_UPDATE = 'cause="filter_change"'


def metric(name: str, *matchers: str) -> str:
    """The series of `msrtrace_<name>`, or of a metric in another namespace, of the selected hosts."""
    name = name if name.startswith(("process_", "up")) else f"msrtrace_{name}"
    chosen = ('job=~"$job"', 'instance=~"$instance"', *matchers)
    return f"{name}{{{', '.join(chosen)}}}"


def total(name: str, *matchers: str, over: str = "{}") -> str:
    """A counter of each host, inside the format string `over`, such as a function.

    With --by-vm it is the sum over all VMs, including ended ones, which has its own name. The two are joined by `or`:
    one selector for both names would fail where msrtrace was restarted with or without --by-vm.
    """
    if not name.startswith(("intercept_", "filter_update")):
        return over.format(metric(name, *matchers))
    all_vms, plain = metric(f"host_{name}", *matchers), metric(name, 'vm=""', *matchers)
    return f"({over.format(all_vms)} or {over.format(plain)})"


def rate(name: str, *matchers: str) -> str:
    """The rate of a counter, per second."""
    return total(name, *matchers, over="rate({}[$__rate_interval])")


def increase(name: str, *matchers: str) -> str:
    """The increase of a counter, per step of the graph."""
    return total(name, *matchers, over="increase({}[$__rate_interval])")


def of_vms(name: str) -> str:
    """The rate of a counter by VM, per second."""
    return f"rate({metric(name, _A_VM)}[$__rate_interval])"


def by(labels: str, what: str) -> str:
    """A sum by labels; over everything if there are none."""
    return f"sum by ({labels}) ({what})" if labels else f"sum({what})"


def ratio(part: str, whole: str) -> str:
    """A part divided by the whole where that is not 0: 0 of 0 has no value."""
    return f"{part} / ({whole} > 0)"


def share(labels: str, growth: Callable[[str], str] = rate) -> str:
    """The share of redundant calls among those calls whose outcome is known."""
    redundant = growth(REDUNDANT)
    known = f"{growth(CALLS)} and {redundant}"
    return ratio(by(labels, redundant), by(labels, known))


def host_count(found: str, among: str) -> str:
    """The number of hosts in `found`; 0 only if any host is in `among`, else nothing."""
    return f"count(group by ({HOST}) ({found})) or 0 * count(group by ({HOST}) ({among}))"


def most(name: str, labels: str) -> str:
    """The rates of a counter by labels, of the ten with the largest increase in the time shown."""
    grown = total(name, over="increase({}[$__range] @ end())")
    return f"{by(labels, rate(name))} and topk(10, {by(labels, grown)})"


def most_vms(name: str, labels: str) -> str:
    """The same by VM."""
    grown = f"increase({metric(name, _A_VM)}[$__range] @ end())"
    return f"{by(labels, of_vms(name))} and topk(10, {by(labels, grown)})"


def quantile(part: float, labels: str = "", of: str = "filter_update") -> str:
    """A quantile of the duration of filter updates, or of recalculations; nothing if there were none."""
    buckets = by(f"{labels}, le" if labels else "le", rate(f"{of}_duration_seconds_bucket"))
    return f"histogram_quantile({part}, {buckets}) > 0"


def _titled(info: str) -> str:
    """The info with the vendor's title as its label `vendor`, which versions of msrtrace that knew only one lack."""
    for vendor in VENDORS:
        known = f"{vendor.name}|" if vendor is FIRST else vendor.name
        info = f'label_replace({info}, "vendor", "{vendor.title}", "vendor", "{known}")'
    return info


BUILD = metric("build_info")
VMS = metric("vm_info")
TITLED = _titled(BUILD)
UPDATES = rate("filter_updates_total")


def comparable(*groups: str) -> str:
    """Restricts an expression to hosts with comparable calls and, if given, one of these labels."""
    labelled = [f'{GROUP}=~"' + "|".join(groups) + '"'] if groups else []
    hosts = metric("build_info", label("layout", JUDGED), *labelled)
    return f" and on ({HOST}) {hosts}"


def per_update(name: str, labels: str, only: str = "") -> str:
    """Calls per filter update, of hosts with such calls."""
    calls = rate(name, _IN_UPDATE) + only
    return ratio(by(labels, calls), by(labels, f"{UPDATES} and on ({HOST}) {calls}"))


def per_update_by(labels: str, name: str = CALLS) -> str:
    """The same by labels of msrtrace_build_info, of all hosts with such calls."""
    calls = rate(name, _IN_UPDATE)
    join = f"* on ({HOST}) group_left ({labels}) {TITLED}"
    return ratio(by(labels, f"{calls} {join}"), by(labels, f"({UPDATES} and on ({HOST}) {calls}) {join}"))


def mean_update(labels: str, only: str = "", of: str = "filter_update") -> str:
    """The mean duration of a filter update, or of a recalculation, in seconds."""
    seconds = rate(f"{of}_duration_seconds_sum") + only
    return ratio(by(labels, seconds), by(labels, rate(f"{of}_duration_seconds_count") + only))


#: The counters of losses, and their names in the legend.
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
