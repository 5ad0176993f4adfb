# SPDX-License-Identifier: GPL-2.0-or-later
"""What the dashboard must say of the fleet in hosts.py; above all, what it must not say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.dashboard.answers import Answers, Asked, Json, Range, ask, panels
from tests.dashboard.hosts import DENIED
from tests.dashboard.prometheus import Prometheus

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
    "Exits": 1242.5,
    "Exits for a filter alone": 60,
    "Share for a filter alone": round(60 / 1242.5, 6),
    "Exits in progress": 4,
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
    "Exits by host": {"kvm1": 355, "kvm4": 887.5},
    "Share for a filter alone, by host": {"kvm1": round(40 / 355, 6), "kvm4": round(20 / 887.5, 6)},
    "Hosts by vendor": {"Intel VMX": 8, "AMD SVM": 2},
    "Calls per filter update": {"patched": 13, "unpatched": 30},
    "Redundant calls per filter update": {"patched": 11, "unpatched": 28},
}
#: Panels that have something to say of a host whose calls cannot be seen; all others must be silent, not 0.
BLIND = "kvm5:9753"
OF_BLIND = {
    "Hosts traced",
    "Hosts by kernel",
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
    "Intercepted accesses, by who wants that",
    "Denied by the filter alone",
    "Filters that are not applied yet, by host",
    "vCPUs, by host",
    "Intercepted now",
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
#: By kernel: the calls of a filter update that patching would save, and CPU seconds of a billion of them (least, most).
AVOIDABLE = {
    "5.15.0-25-generic": (17, 1872 / 19 / 3, 2391 / 17 / 3),
    "5.19.0-2-amd64": (17, 1872 / 19 / 3, 2391 / 17 / 3),
    "6.12.117+deb13-amd64": (37, 7467 / 33 / 3, 8421 / 36 / 3),
}
#: Exits a second for a filter alone. PRED_CMD and SPEC_CTRL are filtered as well, and web-2's state is not known.
ALONE = {"FS_BASE read": 12, "FS_BASE write": 48}
ALONE_BY_VM = {"web-1": 20}
REFUSED_BY_VM = {"web-1": 27.5, "web-2": 110}
#: The last values of graphs by vendor and layout, of those whose hosts all make equally many calls.
BY_VENDOR = {
    "Calls per filter update, by vendor": {"AMD SVM pass": 47, "AMD SVM recalc": 11, "Intel VMX recalc": 8},
    "Redundant calls per filter update, by vendor": {"AMD SVM pass": 46, "AMD SVM recalc": 10, "Intel VMX recalc": 7},
}


#: Fleets of which there is less to say, before a filter denies anything: as tests/kvmhost/chain_pictures.py has it, of
#: patched hosts, of kernels since 6.17, and of AMD's hosts.
CALM = ("kvm1|kvm2|kvm10", "kvm1", "kvm3", "kvm10|kvm11")
#: What shows a word then, and says when: it has a number unless all hosts are AMD's, or newer.
HAS_A_WORD = "Hosts without the patch"


def unexplained(prometheus: Prometheus, dashboard: Json, time: Range) -> list[str]:
    """What is without an answer for the fleets of CALM, and does not say why that may be."""
    calm = replace(time, end=time.start + DENIED - 100)
    return [
        f"of {fleet}: {complaint}"
        for fleet in CALM
        for complaint in ask(
            prometheus, dashboard, calm, {"instance": "|".join(f"{name}:9753" for name in fleet.split("|"))}
        ).complaints
        if f", {HAS_A_WORD!r}, query " not in complaint
    ]


def wrong(prometheus: Prometheus, dashboard: Json, time: Range, answers: Answers) -> list[str]:
    """The differences from what the answers must be, for all hosts and for single ones."""
    found = _by_title(dashboard, answers)
    differences = [
        f"{title} is {_numbers(found[title]['A'])}, not {number}"
        for title, number in NUMBERS.items()
        if [round(value, 6) for value in _numbers(found[title]["A"])] != [number]
    ]
    # Also of those that may be empty: of this fleet there is something to say.
    differences += [
        f"{title!r}, query {ref}, has no answer"
        for title, targets in found.items()
        for ref, answer in targets.items()
        if not answer
    ]
    denied = [_value(series) for series in found["Denied by the filter alone"]["A"]]
    if denied != [40, 40]:  # reads and writes of FS_BASE, of four vCPUs of each of ten hosts
        differences.append(f"vCPUs with an access that the filter alone denies are {denied}")
    for title, ref in (("Exits for a filter alone, by MSR", "A"), ("Exits by MSR and access", "B")):
        alone = _labelled(found[title][ref], "name", "access")
        if alone != ALONE:
            differences.append(f"{title}, {ref}: exits for a filter alone are {alone}")
    for ref, by_vm in {"B": ALONE_BY_VM, "C": REFUSED_BY_VM}.items():
        if (exits := _labelled(found["Exits by VM"][ref], "vm")) != by_vm:
            differences.append(f"Exits by VM, {ref}, are {exits}")
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
    updates, calls, *cpu = (_by_kernel(found["What patching would save, by kernel"][ref]) for ref in "BCDE")
    avoidable = {
        kernel: [calls[kernel] / updates[kernel], *(seconds[kernel] / calls[kernel] * 1e9 for seconds in cpu)]
        for kernel in calls
    }
    if {kernel: tuple(round(one, 2) for one in numbers) for kernel, numbers in avoidable.items()} != {
        kernel: tuple(round(one, 2) for one in numbers) for kernel, numbers in AVOIDABLE.items()
    }:
        differences.append(f"what patching would save is {avoidable}")
    blind = _speaking(prometheus, dashboard, time, BLIND)
    differences += [f"{title!r} must say nothing of a host without calls" for title in sorted(blind - OF_BLIND)]
    vague = _speaking(prometheus, dashboard, time, VAGUE)
    differences += [f"{title!r} must say nothing without redundancy" for title in sorted(vague & NOT_OF_VAGUE)]
    silent = (OF_BLIND - blind) | ({"Hosts without the patch", "Calls by host"} - vague)
    return differences + [f"{title!r} says nothing of one host" for title in sorted(silent)]


#: Values of the variables, and the hosts that they select.
SELECTED = {
    ("kernel", "6[.]1[.]0-53-amd64"): ("kvm1", "kvm7", "kvm8"),
    ("vendor", "svm"): ("kvm10", "kvm11"),
    ("vendor", "vmx|"): ("kvm1", "kvm2", "kvm3", "kvm4", "kvm5", "kvm6", "kvm7", "kvm8", "kvm9"),
    ("patch", "superseded|not_applicable"): ("kvm3", "kvm10", "kvm11"),
    ("patch", "missing"): ("kvm2", "kvm6", "kvm8"),  # kvm8: after a reload, the rules judge by an hour
}


def unselected(prometheus: Prometheus, dashboard: Json, time: Range) -> list[str]:
    """The queries that do not answer as if the hosts had been selected by name, for values of each variable."""
    time = replace(time, start=time.start + 300)  # the first verdicts are recorded within the first minutes
    differences = []
    for (variable, value), names in SELECTED.items():
        by_name = ask(prometheus, dashboard, time, {"instance": "|".join(f"{name}:9753" for name in names)}).answers
        found = ask(prometheus, dashboard, time, {variable: value}).answers
        for title, targets in _by_title(dashboard, found).items():
            expected = _by_title(dashboard, by_name)[title]
            differences += [
                f"{title!r}, query {ref}, is not of the hosts with {variable} {value}"
                for ref in targets
                if _rounded(targets[ref]) != _rounded(expected[ref])
            ]
    return differences


def _rounded(answer: list[Json]) -> dict[str, list[str]]:
    """Values by labels: sums differ in their last digits with the order of what is added."""
    return {
        str(sorted(series["metric"].items())): [
            f"{when} {float(value):.9g}" for when, value in series.get("values") or [series["value"]]
        ]
        for series in answer
    }


def too_much(dashboard: Json, asked: Asked, slow: float, lines: int) -> list[str]:
    """Queries that took more than `slow` seconds, and graphs with more lines; prints what queries took."""
    slowest = sorted(asked.seconds.items(), key=lambda one: -one[1])
    ids = {f"panel {panel['id']}" for panel in dashboard["panels"]}
    opened = [seconds for what, seconds in slowest if what.partition(",")[0] in ids]
    print(
        f"seconds of CPU time: all {len(slowest)} queries {sum(asked.seconds.values()):.1f}, the {len(opened)} of the"
    )
    print(f"first row {sum(opened):.1f}; the slowest:")
    for what, seconds in slowest[:5]:
        print(f"  {seconds:.2f} s {what}")
    graphs = {str(panel["id"]): panel["title"] for panel in panels(dashboard) if panel["type"] == "timeseries"}
    drawn = {title: sum(map(len, asked.answers[number].values())) for number, title in graphs.items()}
    return [f"{what} took {seconds:.1f} s" for what, seconds in slowest if seconds > slow] + [
        f"{title!r} has {number} lines" for title, number in drawn.items() if number > lines
    ]


def _speaking(prometheus: Prometheus, dashboard: Json, time: Range, instance: str) -> set[str]:
    """The panels with an answer if only this instance is selected, without those on msrtrace itself."""
    about_kvm = {**dashboard, "panels": [p for p in dashboard["panels"] if p["title"] != "Health of the tracers"]}
    answers = ask(prometheus, about_kvm, time, {"instance": instance}).answers
    return {title for title, targets in _by_title(about_kvm, answers).items() if any(targets.values())}


def _by_title(dashboard: Json, answers: Answers) -> dict[str, dict[str, list[Json]]]:
    return {panel["title"]: answers[str(panel["id"])] for panel in panels(dashboard)}


def _by_kernel(answer: list[Json]) -> dict[str, float]:
    return {series["metric"]["kernel"]: _value(series) for series in answer}


def _value(series: dict[str, Any]) -> float:
    return float((series.get("value") or series["values"][-1])[1])


def _numbers(answer: list[Json]) -> list[float]:
    return [_value(series) for series in answer]


def _labelled(answer: list[Json], *labels: str) -> dict[str, float]:
    """Values by these labels."""
    return {" ".join(s["metric"][label] for label in labels): round(_value(s), 6) for s in answer}


def _by_label(answer: list[Json]) -> dict[str, float]:
    metrics = [series["metric"] for series in answer]
    names = [m.get("patch") or (m["instance"].partition(":")[0] if "instance" in m else m["vendor"]) for m in metrics]
    return dict(zip(names, (round(value, 6) for value in _numbers(answer)), strict=True))
