# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the text of /metrics for the tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

#: msr, access, action, cause: as tests/kvmhost/witness.py has them
Key = tuple[int, str, str, str]


@dataclass
class Metrics:
    """The samples of one scrape."""

    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Metrics:
        """Parse TEXT."""
        found = cls()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        return found

    def of_host(self) -> Metrics:
        """The same with the counts of the host under the names that those of its VMs have with --by-vm.

        They include VMs that have ended, which have no series of their own any more.
        """
        host = {name: name.replace("_host_", "_", 1) for name, _ in self.samples if name.startswith("msrtrace_host_")}
        others = {key: value for key, value in self.samples.items() if key[0] not in host.values()}
        return Metrics({(host.get(name, name), labels): value for (name, labels), value in others.items()})

    def value(self, name: str, **labels: str) -> float | None:
        """The value of one series; None if there is none."""
        return self.samples.get((name, tuple(sorted(labels.items()))))

    def named(self, name: str) -> list[tuple[dict[str, str], float]]:
        """Every series of a name: labels and value."""
        return [(dict(labels), value) for (n, labels), value in self.samples.items() if n == name]

    def calls(self, kind: str = "calls") -> Counter[Key]:
        """The calls, or those of a kind."""
        result: Counter[Key] = Counter()
        for labels, value in self.named(f"msrtrace_intercept_{kind}_total"):
            result[int(labels["msr"], 16), labels["access"], labels["action"], labels["cause"]] += int(value)
        return result

    def redundant(self) -> Counter[Key]:
        """The redundant calls."""
        return self.calls("redundant_calls")

    def updates(self) -> int:
        """Filter updates."""
        return int(sum(value for _, value in self.named("msrtrace_filter_updates_total")))

    def recalculations(self) -> int | None:
        """Recalculations for another reason than a filter; None where neither they nor their times are shown."""
        found = [value for _, value in self.named("msrtrace_recalculations_total")]
        timed = self.value("msrtrace_recalculation_duration_seconds_count")
        assert timed == (sum(found) if found else None)
        return int(sum(found)) if found else None

    def creations(self) -> tuple[int | None, int | None]:
        """vCPUs created, and the recalculations that this asked for; None where they are not shown."""
        vcpus = self.value("msrtrace_vcpus_created_total")
        recalculations = self.value("msrtrace_recalculations_total", cause="vcpu_create")
        return None if vcpus is None else int(vcpus), None if recalculations is None else int(recalculations)

    def lost(self) -> list[tuple[str, dict[str, str], float]]:
        """Every sign of a loss."""
        names = (
            "msrtrace_probe_missed_total",
            "msrtrace_dropped_updates_total",
            "msrtrace_unpaired_returns_total",
            "msrtrace_read_failures_total",
            "msrtrace_scrape_failures_total",
        )
        return [(n, labels, value) for n in names for labels, value in self.named(n) if value]


def nonzero(counter: Counter[Key]) -> dict[Key, int]:
    """COUNTER without its zeros: a series exists from its first call on, and differences of two scrapes may be 0."""
    return {key: value for key, value in counter.items() if value}


def created(before: Metrics, after: Metrics) -> tuple[int | None, ...]:
    """vCPUs created between two scrapes, and the recalculations that this took; None where they are not shown."""
    pairs = zip(before.creations(), after.creations(), strict=True)
    return tuple(None if earlier is None or later is None else later - earlier for earlier, later in pairs)
