# SPDX-License-Identifier: GPL-2.0-or-later
"""Splits the labels of a stored series into those that msrtrace gave it and those of the scrape target."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from tracer.model.errors import MsrtraceError
from tracer.report.fleet.prometheus_api import Samples, Series

CALLS = "msrtrace_intercept_calls_total"
REDUNDANT = "msrtrace_intercept_redundant_calls_total"
UPDATES = "msrtrace_filter_updates_total"
BUCKETS = "msrtrace_filter_update_duration_seconds_bucket"
SECONDS = "msrtrace_filter_update_duration_seconds_sum"
INFO = "msrtrace_build_info"
RECALCULATIONS = "msrtrace_recalculations_total"
VCPUS_CREATED = "msrtrace_vcpus_created_total"
START = "process_start_time_seconds"
ATTACHED = "msrtrace_probe_attached"

_CALL_LABELS = ("msr", "name", "access", "action", "cause")
#: With --by-vm these are by VM, and end with it; msrtrace_host_... are then the sums over all VMs.
PER_VM: Mapping[str, tuple[str, ...]] = {
    CALLS: _CALL_LABELS,
    REDUNDANT: _CALL_LABELS,
    UPDATES: (),
    BUCKETS: ("le",),
    SECONDS: (),
}
#: Sums over all VMs in any case; comparisons do without them.
OF_HOST: Mapping[str, tuple[str, ...]] = {RECALCULATIONS: ("cause",), VCPUS_CREATED: ()}
LOSSES: Mapping[str, tuple[str, ...]] = {
    "msrtrace_probe_missed_total": ("function",),
    "msrtrace_dropped_updates_total": ("map",),
    "msrtrace_unpaired_returns_total": (),
    "msrtrace_unpaired_refusals_total": (),
    "msrtrace_read_failures_total": (),
    "msrtrace_probes_off_seconds_total": (),
    "msrtrace_module_unloads_total": (),
}


def host_family(metric: str) -> str:
    """The metric with the sums over all VMs of a host."""
    return metric.replace("msrtrace_", "msrtrace_host_", 1)


#: The labels that msrtrace itself gives to each metric that is queried; all others are the target's.
OWN: Mapping[str, tuple[str, ...]] = {
    INFO: ("version", "kernel", "layout", "backend", "redundancy"),
    START: (),
    ATTACHED: ("function",),
    **PER_VM,
    **OF_HOST,
    **LOSSES,
    **{host_family(metric): labels for metric, labels in PER_VM.items()},
}
#: Labels that msrtrace may give as well: with --by-vm, or in another version.
MAYBE_OWN: Mapping[str, tuple[str, ...]] = {INFO: ("vendor",), **dict.fromkeys(PER_VM, ("vm", "pid"))}

#: Labels in which copies of one target differ: they name who scraped, received or evaluated, not what was scraped.
#: prometheus, prometheus_replica: prometheus-operator's defaults of prometheusExternalLabelName and
#: replicaExternalLabelName; replica: `--query.replica-label` in Thanos' docs/components/query.md; receive_replica,
#: rule_replica, ruler_replica, thanos_replica: kube-thanos; __replica__: the default of Mimir's and Cortex' HA tracker
#: (-distributor.ha-tracker.replica).
REPLICA_LABELS = frozenset(
    {
        "prometheus",
        "prometheus_replica",
        "replica",
        "receive_replica",
        "rule_replica",
        "ruler_replica",
        "thanos_replica",
        "__replica__",
    }
)
#: Labels that name a machine: Prometheus' own, and the common ones of service discovery and agents.
MACHINE_LABELS = frozenset(
    {"instance", "host", "hostname", "host_name", "node", "nodename", "node_name", "kubernetes_node", "fqdn"}
)

Target = tuple[tuple[str, str], ...]  # all labels of a target, sorted
Own = tuple[tuple[str, str], ...]
Key = tuple[str, Own]  # a metric and its own labels


@dataclass(frozen=True, eq=False)
class Stream:
    """The series stored under one set of target labels."""

    target: Target
    series: dict[Key, Samples] = field(default_factory=dict)

    def add(self, key: Key, samples: Samples) -> None:
        """Add samples to a series, which may exist already. Raises MsrtraceError if they contradict each other."""
        known = self.series.get(key)
        try:
            self.series[key] = known.merged(samples) if known else samples
        except ValueError:
            raise MsrtraceError(
                f"{key[0]}{selector((*self.target, *key[1]))} has two values at one time: Prometheus answers with a "
                "series twice"
            ) from None


def streams(found: Mapping[str, Iterable[Series]]) -> dict[Target, Stream]:
    """The streams in series, given by the names of their metrics. A series found twice counts once."""
    split = [(metric, series) for metric, group in found.items() for series in group]
    certain = {_target(metric, series.labels, ()) for metric, series in split if metric not in MAYBE_OWN}
    result: dict[Target, Stream] = {}
    for metric, series in split:
        also = _also_own(metric, series.labels, certain)
        target = _target(metric, series.labels, also)
        stream = result.setdefault(target, Stream(target))
        stream.add((metric, _own(metric, series.labels, also)), series.samples)
    return result


def _also_own(metric: str, labels: Mapping[str, str], certain: Collection[Target]) -> tuple[str, ...]:
    """Which of the labels in question are msrtrace's: without those, other metrics have the same target."""
    maybe = tuple(name for name in MAYBE_OWN.get(metric, ()) if name in labels)
    for number in range(len(maybe), -1, -1):
        for also in combinations(maybe, number):
            if _target(metric, labels, also) in certain:
                return also
    return maybe


def _stored_names(metric: str, labels: Mapping[str, str], also: tuple[str, ...]) -> dict[str, str]:
    """The metric's own labels, and the names under which they are stored.

    Where a target has a label of the same name, Prometheus stores the metric's as exported_... (`honor_labels: false`,
    https://prometheus.io/docs/prometheus/latest/configuration/configuration/#scrape_config).
    """
    names = (*OWN[metric], *also)
    return {name: f"exported_{name}" if f"exported_{name}" in labels else name for name in names}


def _own(metric: str, labels: Mapping[str, str], also: tuple[str, ...]) -> Own:
    stored = _stored_names(metric, labels, also)
    return tuple((name, labels[of]) for name, of in stored.items() if of in labels)


def _target(metric: str, labels: Mapping[str, str], also: tuple[str, ...]) -> Target:
    own = set(_stored_names(metric, labels, also).values())
    return tuple(sorted((name, value) for name, value in labels.items() if name not in own and value))


def innermost(target: Target) -> dict[str, str]:
    """The labels as the server that scraped the target gave them: exported_job is job where another renamed it."""
    labels, depth = dict(target), 0
    found: dict[str, tuple[int, str]] = {}
    for name, value in labels.items():
        depth = 0
        while name.startswith("exported_"):
            name, depth = name.removeprefix("exported_"), depth + 1
        if name not in found or depth > found[name][0]:
            found[name] = (depth, value)
    return {name: value for name, (_, value) in found.items()}


def machine(target: Target) -> str:
    """The instance, as the server that scraped the target called it."""
    return innermost(target).get("instance", "")


def differing(one: Target, other: Target) -> list[str]:
    """The labels in which two targets differ, sorted."""
    return sorted({name for name, _ in set(one) ^ set(other)})


def replicas(one: Target, other: Target) -> bool:
    """Whether the labels say that replicas scraped one target."""
    return set(differing(one, other)) <= REPLICA_LABELS


def federated(one: Target, other: Target) -> bool:
    """Whether the labels say that one is a federated copy, with the target's labels renamed."""
    inner, outer = innermost(one), innermost(other)
    apart = {name for name in inner.keys() | outer.keys() if inner.get(name) != outer.get(name)}
    for renamed, labels, plain in ((one, inner, outer), (other, outer, inner)):
        if any(name.startswith("exported_") for name, _ in renamed) and "instance" in plain:
            more = labels.keys() - plain.keys()  # given by the federating server
            if apart <= REPLICA_LABELS | more:
                return True
    return False


def extends(one: Target, other: Target) -> bool:
    """Whether labels were only added or removed, or replica labels changed, from one target to the other."""
    inner, outer = innermost(one), innermost(other)
    shared = inner.keys() & outer.keys()
    changed = {name for name in shared if inner[name] != outer[name]}
    return bool(shared) and changed <= REPLICA_LABELS


def distance(one: Target, other: Target) -> tuple[int, int]:
    """How many labels changed their value, and how many were added or removed; replica labels do not count."""
    names = set(differing(one, other)) - REPLICA_LABELS
    changed = sum(name in dict(one) and name in dict(other) for name in names)
    return changed, len(names) - changed


def selector(target: Target, names: Iterable[str] | None = None) -> str:
    """The target as a PromQL selector, or only the named labels; one that it lacks is empty."""
    labels: dict[str, str] = defaultdict(str, target)
    pairs = [(name, labels[name]) for name in (names if names is not None else sorted(labels))]
    return "{" + ", ".join(f'{name}="{_escaped(value)}"' for name, value in pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
