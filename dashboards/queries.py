# SPDX-License-Identifier: GPL-2.0-or-later
"""The PromQL of the dashboard, built from named parts.

Each query is of the hosts that the dashboard's variables select. Most metrics have only the labels of the target, so
that a selector can ask for `job` and `instance`, while kernel, vendor and patch need a join with HOSTS. by() and
selected() make it, and nothing else does. With many hosts it costs more than the rest of a query if it is made series
by series, as does `or`: so they come after the sum by host wherever that leaves fewer series.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dashboards.patterns import label
from tracer.model.vendors import FIRST, VENDORS
from tracer.model.verdict import JUDGED

#: The label that operators give to targets, as in prometheus.yml: `patched` or `unpatched`, as they believe.
GROUP = "patch"
HOST = "job, instance"
CALLS, REDUNDANT, UPDATES = "intercept_calls_total", "intercept_redundant_calls_total", "filter_updates_total"
EXITS = "msr_exits_total"
#: The series of rules.yml that has the verdict on the patch as its label `verdict`, for each host.
RECORDED = "instance:msrtrace_patch_verdict:info"
#: The most lines in a graph with one for each host, and what its description then says.
TOP, TEN_HIGHEST = 10, " Of the ten hosts with the highest in the time shown."

IN_UPDATE = 'cause="filter_change"'
_A_VM = 'vm!=""'
_TARGET = 'job=~"$job", instance=~"$instance"'
#: What the variables ask for; each is `.*` for all. A label that a series does not have is "", also that of the vendor.
_ABOUT = 'kernel=~"$kernel", vendor=~"${vendor:pipe}", verdict=~"${patch:pipe}"'
_INFO = f"msrtrace_build_info|{RECORDED}"
#: The series with the labels by which a host is selected. `up` has none of them: targets that are down, or wait for
#: KVM's module, are there as long as all kernels, vendors and verdicts are. (`u.*` matches it, `uvmx` and `u` do not.)
HOSTS = f'{{__name__=~"{_INFO}|up", __name__=~"{_INFO}|u(${{vendor:pipe}})", {_TARGET}, {_ABOUT}}}'


@dataclass(frozen=True)
class Over:
    """A time, as format strings: for a counter, a gauge, the hosts that are selected, and series that exist."""

    counter: str
    gauge: str
    hosts: str
    series: str = "{}"


#: At each moment of a graph, or at the end of the time shown.
NOW = Over("rate({}[$__rate_interval])", "{}", "{}")
#: The same in each step of a graph, as a number of events.
STEP = Over("increase({}[$__rate_interval])", "{}", "{}")
#: All the time shown: growth, largest value, and hosts that were seen in it. It is one value for the whole graph.
RANGE = Over(
    "increase({}[$__range] @ end())",
    "max_over_time({}[$__range] @ end())",
    "last_over_time({}[$__range] @ end())",
    "{} @ end()",
)


def metric(name: str, *matchers: str) -> str:
    """The series of `msrtrace_<name>`, or of a metric in another namespace, by the target's labels."""
    name = name if name.startswith(("process_", "up")) else f"msrtrace_{name}"
    return f"{name}{{{', '.join((_TARGET, *matchers))}}}"


def selected(what: str, over: Over = NOW) -> str:
    """`what`, which has the labels of HOST, of the selected hosts."""
    return f"({what} and on ({HOST}) {over.hosts.format(HOSTS)})"


def by(labels: str, what: str, over: Over = NOW) -> str:
    """A sum by labels over the selected hosts of `what`, which has those labels and HOST; the sum if there are none."""
    if labels.startswith(HOST):
        return selected(what, over)
    return f"sum by ({labels}) {selected(what, over)}" if labels else f"sum{selected(what, over)}"


def _and(*labels: str) -> str:
    return ", ".join(filter(None, labels))


def count(name: str, *matchers: str, over: Over = NOW) -> str:
    """A counter over a time, as series of each host.

    With --by-vm it is the sum over all VMs, including ended ones, which has its own name. The two are joined by `or`:
    one selector for both names would fail where msrtrace was restarted with or without --by-vm.
    """
    return " or ".join(over.counter.format(series) for series in _all_vms(name, *matchers))


def _all_vms(name: str, *matchers: str) -> list[str]:
    if not name.startswith(("intercept_", "filter_update", EXITS)):
        return [metric(name, *matchers)]
    return [metric(f"host_{name}", *matchers), metric(name, 'vm=""', *matchers)]


def per_host(
    labels: str, name: str, *matchers: str, over: Over = NOW, by_vm: bool = False, operator: str = "sum"
) -> str:
    """A counter over a time, aggregated by host and labels. Far cheaper than of count(): `or` has fewer series."""
    kept = labels if labels.startswith(HOST) else _and(HOST, labels)
    series = [metric(name, _A_VM, *matchers)] if by_vm else _all_vms(name, *matchers)
    parts = [f"{operator} by ({kept}) ({over.counter.format(one)})" for one in series]
    return parts[0] if len(parts) == 1 else f"({' or '.join(parts)})"


def total(labels: str, name: str, over: Over = NOW, *, by_vm: bool = False) -> str:
    """A counter over a time, summed by labels."""
    if labels.startswith(("msr", "le")):  # by host there would be about as many series as before
        return by(labels, f"({count(name, over=over)})", over)
    return by(labels, per_host(labels, name, over=over, by_vm=by_vm), over)


def gauge(name: str, over: Over = NOW) -> str:
    """A gauge of each host."""
    return over.gauge.format(metric(name))


def highest(build: Callable[[Over], str], shown: Over = NOW) -> str:
    """The graph of a query, of the ten series for which the same query over all the time shown is highest.

    topk() alone would choose anew at each moment, and draw more than ten.
    """
    return f"{build(shown)} and topk({TOP}, {build(RANGE)})"


def ratio(part: str, whole: str) -> str:
    """A part divided by the whole where that is not 0: 0 of 0 has no value."""
    return f"{part} / ({whole} > 0)"


def share(labels: str, over: Over = NOW, *, by_vm: bool = False) -> str:
    """The share of redundant calls among all calls; without hosts where it is not known of each call."""
    redundant, calls = (per_host(labels, name, over=over, by_vm=by_vm) for name in (REDUNDANT, CALLS))
    there = replace(over, counter=over.series)
    series = [per_host("", name, over=there, by_vm=by_vm, operator="count") for name in (CALLS, REDUNDANT)]
    known = f"and on ({HOST}) ({' == '.join(series)})"
    if labels.startswith(HOST):  # to divide leaves out what is not known
        return ratio(selected(redundant, over), selected(f"{calls} {known}", over))
    return ratio(*(by(labels, f"{part} {known}", over) for part in (redundant, calls)))


def host_count(found: str, among: str, over: Over = NOW) -> str:
    """The number of selected hosts in `found`; 0 only if any is in `among`, else nothing."""
    of_found, of_all = (selected(f"group by ({HOST}) ({hosts})", over) for hosts in (found, among))
    return f"count{of_found} or 0 * count{of_all}"


def quantile(part: float, labels: str = "", over: Over = NOW, *, of: str = "filter_update") -> str:
    """A quantile of the duration of updates of each host, or of all; nothing if there were none."""
    buckets = count(f"{of}_duration_seconds_bucket", over=over)
    if labels == HOST:  # it needs no sum
        return f"{selected(f'histogram_quantile({part}, {buckets})', over)} > 0"
    return f"histogram_quantile({part}, {by('le', f'({buckets})', over)}) > 0"


def _titled(info: str) -> str:
    """The info with the vendor's title as its label `vendor`, which versions of msrtrace that knew only one lack."""
    for vendor in VENDORS:
        info = f'label_replace({info}, "vendor", "{vendor.title}", "vendor", "{vendor_pattern(vendor.name)}")'
    return info


def vendor_pattern(name: str) -> str:
    """A regular expression for the label `vendor` of a vendor's hosts."""
    return f"{name}|" if name == FIRST.name else name


BUILD = metric("build_info")
VMS = metric("vm_info")
TITLED = _titled(BUILD)


def comparable(*groups: str) -> str:
    """Restricts an expression to hosts with comparable calls and, if given, one of these labels."""
    labelled = [f'{GROUP}=~"' + "|".join(groups) + '"'] if groups else []
    hosts = metric("build_info", label("layout", JUDGED), *labelled)
    return f" and on ({HOST}) {hosts}"


def per_update(name: str, labels: str, over: Over = NOW, *, only: str = "") -> str:
    """Calls per filter update by labels of the target, of hosts with such calls."""
    calls = per_host(labels, name, IN_UPDATE, over=over) + only
    updates = f"{per_host(labels, UPDATES, over=over)} and on ({HOST}) {calls}"
    return ratio(by(labels, calls, over), by(labels, updates, over))


def per_update_by(labels: str, name: str = CALLS, over: Over = NOW) -> str:
    """The same by labels of msrtrace_build_info, of all hosts with such calls."""
    calls = per_host("", name, IN_UPDATE, over=over)
    updates = f"({per_host('', UPDATES, over=over)} and on ({HOST}) {calls})"
    return ratio(by(labels, joined(calls, labels), over), by(labels, joined(updates, labels), over))


def joined(what: str, labels: str) -> str:
    """Values by host, with labels that msrtrace_build_info has now."""
    return f"{what} * on ({HOST}) group_left ({labels}) {TITLED}"


def mean_update(labels: str, over: Over = NOW, *, only: str = "", of: str = "filter_update") -> str:
    """The mean duration of an update, in seconds."""
    parts = (per_host(labels, f"{of}_duration_seconds_{what}", over=over) for what in ("sum", "count"))
    return ratio(*(by(labels, part + only, over) for part in parts))


#: A counter of losses that is there only with --exits.
LOSS_OF_EXITS = "unpaired_refusals_total"
#: The counters of losses, and their names in the legend.
LOSSES = {
    "probe_missed_total": "runs that probes missed",
    "dropped_updates_total": "full maps",
    "unpaired_returns_total": "returns without an entry",
    "read_failures_total": "bitmaps not read",
    "probes_off_seconds_total": "seconds with probes switched off",
    LOSS_OF_EXITS: "refused accesses without an exit",
}
_COUNTERS = "|".join(LOSSES)
LOST = f'{{__name__=~"msrtrace_({_COUNTERS})", {_TARGET}}}'
#: Hosts on which something was not counted since the tracer started.
LOSSY = f"{LOST} > 0"
#: Functions that should be probed and are not.
UNPROBED = f"{metric('probe_attached')} == 0"
