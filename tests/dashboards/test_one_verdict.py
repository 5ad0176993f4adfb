# SPDX-License-Identifier: GPL-2.0-or-later
"""The report, the alert and the dashboard must give the same verdict: all three have the same counts.

The report's sentence is of tracer.verdict; the counts are exported as `msrtrace run` does and put into promtool, which
evaluates dashboards/rules.yml and the query of the dashboard's table of hosts as they are in the repository.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
from made import (
    ALWAYS,
    FS_BASE,
    HOOK,
    POSSIBLE,
    SPEC_CTRL,
    TSC,
    XFD_ERR,
    outcome,
    recalc,
    report,
    svm_pass,
    svm_recalc,
    times,
    toggle,
)
from needs import tool
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dashboards import make
from dashboards.queries import RECORDED
from dashboards.verdict import LABELS
from tests.dashboard.answers import at_first, panels, substituted
from tracer.export.metrics import SnapshotCollector
from tracer.model.snapshot import Call, Map, Outcome, Probe, Snapshot, VmInfo
from tracer.model.verdict import Verdict

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
#: For so long every host was scraped. promtool evaluates groups of rules in any order, so the alert, which waits for
#: five minutes, may see a record only at the evaluation after the next.
MINUTES = 13
#: As Grafana substitutes them with scrapes a minute apart.
VARIABLES = at_first(make.made()) | {"__rate_interval": "4m"}
SUPERSEDED, NEVER = "superseded", "never"
Said = bool | None | str


@dataclass(frozen=True)
class Host:
    """The counts of a host, and the expected verdict."""

    counted: Snapshot
    patched: Said
    growing: int = 0  # what each counter of calls gains in a minute before `counted`
    vendorless: bool = False  # whether msrtrace there is so old that it does not export the vendor


def also(counted: Snapshot, *calls: tuple[int, str, str], changed: int = 0) -> Snapshot:
    """The snapshot plus `calls` (MSR, access, action), each once per update; `changed` of each changed something."""
    updates = sum(durations.count for durations in counted.updates.values())
    more = {Call(*call, "filter_change", HOOK): outcome(updates, changed, call[1]) for call in calls}
    return replace(counted, calls={**counted.calls, **more})


def of_updates(counted: Snapshot, *indices: int, accesses: tuple[str, ...] = ("read", "write")) -> Snapshot:
    """The snapshot with only the calls in filter updates for these MSRs."""
    calls = {c: o for c, o in counted.calls.items() if c.cause == "filter_change" and c.access in accesses}
    return replace(counted, calls={c: o for c, o in calls.items() if c.msr in indices})


def pt(counted: Snapshot, ranges: int, action: str = "enable") -> Snapshot:
    """With Intel PT and so many address ranges: pt_update_intercept_for_msr(), arch/x86/kvm/vmx/vmx.c, 5.10 to 6.16."""
    status, base, mask, match, control, address = 0x571, 0x560, 0x561, 0x572, 0x570, 0x580
    indices = (status, base, mask, match, control, *range(address, address + 2 * ranges))
    return also(counted, *((index, "read_write", action) for index in indices))


def x2apic(counted: Snapshot, changed: int) -> Snapshot:
    """With vmx_update_msr_bitmap_x2apic(), arch/x86/kvm/vmx/vmx.c, which a filter update ran in 5.10 to 5.14."""
    calls = [(0x808, "read_write", "disable"), (0x839, "read_write", "enable"), (0x80B, "write", "disable")]
    return also(counted, *calls, changed=changed)


def probed(counted: Snapshot, lacking: str) -> Snapshot:
    """With all functions probed except one."""
    functions = (
        *("vmx_msr_filter_changed", "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr"),
        *("vmx_vcpu_create", "vmx_vcpu_free", "vmx_update_msr_bitmap_x2apic"),
    )
    assert lacking in (*functions, "")
    return replace(counted, probes=tuple(Probe(f, f, f != lacking, f) for f in functions))


LOSSES = {
    "unpaired": {"unpaired_returns": 1},
    "refused unpaired": {"exits": {}, "unpaired_refusals": 1},
    "unread": {"read_failures": 1},
    "dropped": {"maps": (Map("calls", 9, 9, 1),)},
    "missed": {"probes": (Probe(HOOK, HOOK, True, HOOK, 1),)},
}


def both(name: str, patched: Snapshot, unpatched: Snapshot, **more: bool) -> dict[str, Host]:
    return {f"{name}, patched": Host(patched, True, **more), f"{name}, unpatched": Host(unpatched, False, **more)}


def amd_hosts() -> dict[str, Snapshot]:
    """AMD hosts by a name for what is special: of none is the patch missing, present or undecided."""
    plain, newer = svm_pass(), svm_recalc()
    enabled = [(TSC, "read_write", "enable"), (0x560, "read_write", "enable"), (SPEC_CTRL, "read", "enable")]
    found = {
        "pass": plain,
        "set": replace(newer, layout="set"),
        "recalc": newer,
        "nothing seen": Snapshot("pass", vendor="svm"),
        "redundancy unknown": svm_pass(exact=False),
        "denied": svm_pass(denied=ALWAYS),
        "reads alone": also(plain, (SPEC_CTRL, "read_write", "disable_read"), changed=7),
        "writes alone": also(plain, (TSC, "read_write", "disable_write")),
        "enables of the loop": also(plain, *enabled),
        "enables that changed a bit": also(plain, *enabled, changed=7),
        "enables of another MSR": also(plain, (0x123, "read_write", "enable")),
        "one direction": also(plain, (TSC, "read", "disable")),
        "no updates": replace(plain, updates={}),
        "updates not observable": replace(plain, updates={}, updates_observable=False),
        "calls not observable": replace(plain, calls={}, calls_observable=False),
        "reloaded": replace(plain, module_unloads=1),
        "by VM": svm_pass(pid=100, vcpus=2).after(svm_pass(7, pid=200)),
        "as on VMX, unpatched": replace(toggle(patched=False), vendor="svm"),
    }
    return found | {what: replace(plain, **loss) for what, loss in LOSSES.items()}  # type: ignore[arg-type]


def hosts() -> dict[str, Host]:
    """The hosts by a name for what is special."""
    patched, unpatched = toggle(), toggle(patched=False)
    first = replace(unpatched, updates={})
    vms = [
        toggle(patched=kernel, pid=100, vcpus=2).after(toggle(7, patched=kernel, pid=200)) for kernel in (True, False)
    ]
    found = both("plain", patched, unpatched)
    found |= both("all probed", probed(patched, ""), probed(unpatched, ""))
    found |= both("redundancy unknown", toggle(exact=False), toggle(patched=False, exact=False))
    found |= both("denied", toggle(denied=POSSIBLE), toggle(patched=False, denied=POSSIBLE))
    for ranges, action in ((0, "enable"), (1, "enable"), (4, "enable"), (5, "enable"), (7, "enable"), (7, "disable")):
        found |= both(f"PT {ranges} {action}", pt(patched, ranges, action), pt(unpatched, ranges, action))
    for changed in (0, 101):
        found |= both(f"x2APIC {changed}", x2apic(patched, changed), x2apic(unpatched, changed))
    found |= both("by VM", *vms)
    found |= both("by VM, one ended", *(replace(counted, vms={200: VmInfo("b")}) for counted in vms))
    found |= both("by VM, all ended", *(replace(counted, vms={}) for counted in vms))
    found |= both("open calls", replace(patched, open_calls=1), replace(unpatched, open_calls=1))
    found |= both("birth not probed", probed(patched, "vmx_vcpu_create"), probed(unpatched, "vmx_vcpu_create"))
    found |= both("no TSC", of_updates(patched, FS_BASE), of_updates(unpatched, XFD_ERR))
    found["no TSC, patched"] = Host(of_updates(also(patched, (XFD_ERR, "read", "disable")), XFD_ERR), True)
    for what, loss in LOSSES.items():
        found[f"{what}, patched"] = Host(replace(patched, **loss), None)  # type: ignore[arg-type]
        found[f"{what}, unpatched"] = Host(replace(unpatched, **loss), False)  # type: ignore[arg-type]
    for function in ("vmx_msr_filter_changed", "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr"):
        found[f"{function} not probed, patched"] = Host(probed(patched, function), None)
    for name, counted in {
        "nothing seen": Snapshot("toggle"),
        "vCPUs were created": replace(patched, updates={}, calls=toggle(0).calls),
        "the first update is in progress": replace(of_updates(patched, TSC), updates={}),
        "both halves": of_updates(patched, FS_BASE),
        "updates not observable": replace(patched, updates={}, updates_observable=False),
        "an enable changed a bit": also(unpatched, (SPEC_CTRL, "read", "enable"), changed=2),
        "some known, one changed": replace(
            unpatched,
            calls={
                call: Outcome(9, 8, 1, 0, 0) if call.msr == SPEC_CTRL else Outcome(call_outcome.calls)
                for call, call_outcome in unpatched.calls.items()
            },
        ),
        "another MSR": also(patched, (0x123, "read", "enable")),
        "LBR": also(patched, (0x1C9, "read_write", "enable")),
        "PMU": also(patched, *((index, "read", "enable") for index in (0xC1, 0x309, 0x38E, 0x4C1))),
        "next to PT": also(patched, (0x58E, "read_write", "enable")),
        "next to x2APIC": also(patched, (0x900, "read_write", "enable")),
        "reloaded, patched": replace(patched, module_unloads=1),
        "reloaded, unpatched": replace(unpatched, module_unloads=1),
        "filter-only": Snapshot("filter-only", updates=patched.updates, calls_observable=False),
        "no calls probed": replace(patched, calls={}, calls_observable=False),
    }.items():
        found[name] = Host(counted, None)
    found["another MSR, unpatched"] = Host(also(unpatched, (0x123, "read", "enable")), False)
    found["enables, but no update is over"] = Host(first, False)
    found["enables, updates not observable"] = Host(replace(first, updates_observable=False), False)
    found |= both("an older msrtrace", patched, unpatched, vendorless=True)
    found["recalc, an older msrtrace"] = Host(recalc(), SUPERSEDED, vendorless=True)
    found |= {f"AMD: {name}": Host(counted, NEVER) for name, counted in amd_hosts().items()}
    found["recalc"] = Host(recalc(), SUPERSEDED)
    found["set"] = Host(replace(recalc(), layout="set"), SUPERSEDED)
    return found


#: Where the three differ by design: a report is of one trace, and says nothing if kvm_intel was reloaded within it. The
#: others watch for weeks; there, what was called within the last hour (alert) or minutes (dashboard) counts.
RELOADED = {
    "reloaded, and enabled since": Host(replace(toggle(patched=False), module_unloads=1), False, 1),
    "reloaded, and patched since": Host(replace(toggle(), module_unloads=1), True, 1),
}


def series(name: str, host: Host) -> Iterator[dict[str, str]]:
    """The series of a host, in promtool's notation."""
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(lambda: host.counted, "0.1.0", "6.1"))
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = {**sample.labels, "job": "msrtrace", "instance": name}
            if host.vendorless:
                labels.pop("vendor", None)
            pairs = ", ".join(f"{label}={json.dumps(value)}" for label, value in labels.items())
            step = host.growing if "intercept" in sample.name else 0
            first = sample.value - step * MINUTES
            yield {"series": f"{sample.name}{{{pairs}}}", "values": f"{first}+{step}x{MINUTES}"}


def expect(name: str, expression: str, *values: int) -> dict[str, object]:
    """A promtool test: the expression has one series with this value at the end, or none."""
    instance = json.dumps(name)
    samples = [{"labels": f"{{instance={instance}}}", "value": value} for value in values]
    named = f'label_replace(sum({expression}), "instance", {instance}, "", "")'
    return {"expr": named, "eval_time": f"{MINUTES}m", "exp_samples": samples}


def dashboard(title: str, ref: str) -> str:
    """A query of a panel, by title and refId."""
    found = panels(json.loads((DASHBOARDS / "grafana.json").read_text()))
    targets = next(panel for panel in found if panel["title"] == title)["targets"]
    return substituted(next(target["expr"] for target in targets if target["refId"] == ref), VARIABLES)


@pytest.mark.parametrize(("name", "host"), hosts().items())
def test_the_report_has_the_expected_verdict(name: str, host: Host) -> None:
    verdict = report(host.counted).verdict
    assert said(verdict) == host.patched, verdict.why


def said(verdict: Verdict) -> Said:
    """The verdict as Host has it."""
    if verdict.why.startswith("superseded") or verdict.why.startswith("KVM never"):
        assert verdict.patched is None
        return SUPERSEDED if verdict.why.startswith("superseded") else NEVER
    return verdict.patched


@pytest.mark.parametrize("name", RELOADED)
def test_a_report_is_undecided_after_a_reload(name: str) -> None:
    assert report(RELOADED[name].counted).verdict.patched is None


def complaints(fleet: dict[str, Host], directory: Path) -> str:
    """The output of promtool where the alert or the dashboard differs from the expected verdicts, in one run."""
    promtool = tool("promtool")
    table, tile = dashboard("Hosts", "B"), dashboard("Hosts without the patch", "A")
    codes: dict[Said, int] = {False: 1, True: 2, SUPERSEDED: 3, None: 4, NEVER: 5}
    tests = []
    for name, host in fleet.items():
        missing = [1] if host.patched is False else []
        expected = [
            expect(name, f'{RECORDED}{{verdict="{LABELS[codes[host.patched]]}"}}', 1),
            expect(name, f"count({RECORDED})", 1),
            expect(name, 'ALERTS{alertname="MsrtracePatchMissing", alertstate="firing"}', *missing),
            expect(name, table, codes[host.patched]),
            expect(name, tile, *(missing or ([0] if host.patched is True else []))),
        ]
        given = list(series(name, host))
        tests.append({"interval": "1m", "input_series": given, "promql_expr_test": expected})
    shutil.copy(DASHBOARDS / "rules.yml", directory)
    file = directory / "test.yml"
    file.write_text(json.dumps({"rule_files": ["rules.yml"], "evaluation_interval": "3m", "tests": tests}))
    done = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr) if done.returncode else ""


def test_the_alert_and_the_dashboard_agree_with_the_report(tmp_path: Path) -> None:
    assert complaints(hosts() | RELOADED, tmp_path) == ""


def any_host(random: Random) -> Host:
    """Counts that no kernel need have, and the verdict of a report on them."""
    exact, by_vm = random.random() < 0.8, random.random() < 0.3
    pids = [100, 200] if by_vm else [0]
    enables = random.random() < 0.5
    amd = random.random() < 0.2
    calls = {}
    for _ in range(random.randrange(8)):
        index = random.choice([TSC, TSC, TSC, SPEC_CTRL, XFD_ERR, FS_BASE, 0x10B, 0x560, 0x58D, 0x58E, 0x80B])
        access, action = random.choice(["read", "write", "read_write"]), "enable" if enables else "disable"
        cause = random.choice(["filter_change"] * 4 + ["msr_write"])
        made, changed = random.randrange(4), random.choice([0] * 12 + [1])
        others = ["disable_read", "disable_write"] if amd else []
        call = Call(index, access, random.choice([action, "disable", *others]), cause, HOOK, random.choice(pids))
        calls[call] = outcome(made, min(made, changed), access, exact)
    lost = replace(Snapshot("toggle"), **random.choice([{}] * 16 + [*LOSSES.values()]))  # type: ignore[arg-type]
    counted = replace(
        lost,
        vendor="svm" if amd else "vmx",
        layout=random.choice(["pass", "set", "recalc"] if amd else ["toggle"] * 18 + ["set", "recalc"]),
        redundancy="exact" if exact else "unknown",
        calls=calls,
        updates={pid: times(random.randrange(4)) for pid in pids},
        updates_observable=random.random() < 0.9,
        open_calls=random.randrange(2),
        module_unloads=int(random.random() < 0.1),
        by_vm=by_vm,
        vms={pid: VmInfo("") for pid in pids if random.random() < 0.5} if by_vm else {},
    )
    return Host(counted, said(report(counted).verdict), vendorless=not amd and random.random() < 0.3)


def test_all_three_agree_on_any_counts(tmp_path: Path) -> None:
    fleet = {f"{seed}": any_host(Random(seed)) for seed in range(60)}
    assert Counter(host.patched for host in fleet.values()).keys() == {True, False, None, SUPERSEDED, NEVER}
    assert complaints(fleet, tmp_path) == ""
