# SPDX-License-Identifier: GPL-2.0-or-later
"""What the dashboard must say of the fleet in hosts.py; above all, what it must not say."""

from __future__ import annotations

from typing import Any

from tests.dashboard.answers import Json, Range, ask, panels
from tests.dashboard.prometheus import Prometheus

Answers = dict[str, dict[str, list[Json]]]

MISSING, PRESENT, SUPERSEDED, CANNOT_TELL, NOT_APPLICABLE = 1, 2, 3, 4, 5
VERDICTS = {
    **{"kvm1": PRESENT, "kvm2": MISSING, "kvm3": SUPERSEDED, "kvm4": PRESENT},
    **{"kvm5": CANNOT_TELL, "kvm6": MISSING, "kvm8": CANNOT_TELL, "kvm9": PRESENT},
    **{"kvm10": NOT_APPLICABLE, "kvm11": NOT_APPLICABLE},
}
#: Numbers of the panels with one.
NUMBERS = {
    "Hosts traced": 10,
    "Hosts without the patch": 2,
    "Incomplete counts": 1,
    "Calls saved by the patch": 17,
    "Tracers down": 1,
    "Hosts with probes missing": 1,
    "Failed scrapes": 0,
    "Reloads of KVM's module": 0,
}
#: The last values of graphs, by the label in which their series differ.
GRAPHS = {
    "Calls per filter update, by host": {
        **{"kvm1": 13, "kvm2": 30, "kvm3": 8, "kvm4": 13, "kvm6": 30, "kvm9": 14},
        **{"kvm10": 47, "kvm11": 11},
    },
    "Redundant calls per filter update, by host": {
        **{"kvm1": 11, "kvm2": 28, "kvm3": 7, "kvm4": 11, "kvm9": 12},
        **{"kvm10": 46, "kvm11": 10},
    },
    "Calls per vCPU created, by host": {"kvm1": 7, "kvm2": 7, "kvm3": 8},
    "Recalculations per vCPU created, by host": {"kvm3": 1},
    "Hosts by vendor": {"Intel VMX": 8, "AMD SVM": 2},
    "Calls per filter update": {"patched": 13, "unpatched": 30},
    "Redundant calls per filter update": {"patched": 11, "unpatched": 28},
}
#: Panels that have something to say of a host whose calls cannot be seen; all others must be silent, not 0.
BLIND = "kvm5:9753"
OF_BLIND = {
    "Hosts traced",
    "Filter updates",
    "Incomplete counts",
    "Filter updates by host",
    "Hosts",
    "Filter update duration",
    "99 % of filter updates, by host",
    "Mean filter update, by host",
    "Hosts by vendor",
    "CPU time in filter updates, by host",
    "Filter updates and recalculations",
    "vCPUs created, by host",
}
#: Panels that must be silent on a host without redundancy.
VAGUE = "kvm6:9753"
NOT_OF_VAGUE = {
    "Redundant share",
    "Redundant share by host",
    "Redundant calls by MSR",
    "Redundant calls by cause",
    "Redundant share by cause",
    "Redundant calls per filter update, by host",
    "Redundant calls per filter update",
    "Redundant calls per filter update, by vendor",
}
#: The last values of graphs by vendor and layout, of those whose hosts all make equally many calls.
BY_VENDOR = {
    "Calls per filter update, by vendor": {"AMD SVM pass": 47, "AMD SVM recalc": 11, "Intel VMX recalc": 8},
    "Redundant calls per filter update, by vendor": {"AMD SVM pass": 46, "AMD SVM recalc": 10, "Intel VMX recalc": 7},
}


def wrong(prometheus: Prometheus, dashboard: Json, time: Range, answers: Answers) -> list[str]:
    """The differences from what the answers must be, for all hosts and for single ones."""
    found = _by_title(dashboard, answers)
    differences = [
        f"{title} is {_numbers(found[title]['A'])}, not {number}"
        for title, number in NUMBERS.items()
        if [round(value, 6) for value in _numbers(found[title]["A"])] != [number]
    ]
    verdicts = _by_label(found["Hosts"]["B"])
    if verdicts != VERDICTS:
        differences.append(f"the hosts' verdicts are {verdicts}")
    for title, expected in GRAPHS.items():
        last = _by_label([series for series in found[title]["A"] if series["values"][-1][0] == time.end])
        if last != expected:
            differences.append(f"{title} are {last}, not {expected}")
    for title, expected in BY_VENDOR.items():
        last = {f"{s['metric']['vendor']} {s['metric']['layout']}": round(_value(s), 6) for s in found[title]["A"]}
        if last.pop("Intel VMX toggle", None) is None or last != expected:
            differences.append(f"{title} are {last}, not {expected}")
    blind = _speaking(prometheus, dashboard, time, BLIND)
    differences += [f"{title!r} must say nothing of a host without calls" for title in sorted(blind - OF_BLIND)]
    vague = _speaking(prometheus, dashboard, time, VAGUE)
    differences += [f"{title!r} must say nothing without redundancy" for title in sorted(vague & NOT_OF_VAGUE)]
    silent = (OF_BLIND - blind) | ({"Hosts without the patch", "Calls by host"} - vague)
    return differences + [f"{title!r} says nothing of one host" for title in sorted(silent)]


def _speaking(prometheus: Prometheus, dashboard: Json, time: Range, instance: str) -> set[str]:
    """The panels with an answer if only this instance is selected, without those on msrtrace itself."""
    health = next(p["id"] for p in dashboard["panels"] if p["title"] == "Health of the tracers")
    about_kvm = {**dashboard, "panels": [p for p in dashboard["panels"] if p["id"] < health]}
    answers, _ = ask(prometheus, about_kvm, time, instance=instance)
    return {title for title, targets in _by_title(about_kvm, answers).items() if any(targets.values())}


def _by_title(dashboard: Json, answers: Answers) -> dict[str, dict[str, list[Json]]]:
    return {panel["title"]: answers[str(panel["id"])] for panel in panels(dashboard)}


def _value(series: dict[str, Any]) -> float:
    return float((series.get("value") or series["values"][-1])[1])


def _numbers(answer: list[Json]) -> list[float]:
    return [_value(series) for series in answer]


def _by_label(answer: list[Json]) -> dict[str, float]:
    metrics = [series["metric"] for series in answer]
    names = [m.get("patch") or (m["instance"].partition(":")[0] if "instance" in m else m["vendor"]) for m in metrics]
    return dict(zip(names, (round(value, 6) for value in _numbers(answer)), strict=True))
