# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports of a fleet from a Prometheus: exact counts out of stored samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fleets import (
    CALLS,
    LOCAL,
    REDUNDANT,
    START,
    UPDATES,
    Answer,
    Stored,
    amd_host,
    counted,
    fleet_reports,
    labelled,
    merged,
    serving,
    storing,
)
from fleets import host as made_up
from made import svm_pass, svm_recalc

from tracer.model.errors import MsrtraceError
from tracer.model.snapshot import Snapshot
from tracer.report.compare import compare
from tracer.report.comparison_view import sentence
from tracer.report.computer import Difference
from tracer.report.fleet.fleet import Prometheus, compared, reports
from tracer.report.report import Report

NOW = 1_000_000.0
SCRAPES = [NOW - 60, NOW - 45, NOW - 30, NOW - 15, NOW]

Main = Callable[..., tuple[int, str, str]]


def host(
    instance: str, *, enables: int = 0, updates: int = 100, layout: str = "toggle", redundancy: str = "exact"
) -> Stored:
    target = {"job": "msrtrace", "instance": instance}
    info = {"layout": layout, "redundancy": redundancy}
    return made_up(target, SCRAPES, enables=enables, updates=updates, info=info)


def reported(stored: Stored) -> list[Report]:
    return fleet_reports(stored, NOW, window=60)


def test_many_hosts_are_compared_exactly() -> None:
    asked: list[str] = []
    missing = labelled(merged(host("a", enables=17, updates=100), host("b", enables=17, updates=40)), patch="missing")
    with serving(storing(missing, NOW, asked)) as url:
        unpatched = reports(Prometheus(url), ['{patch="missing"}'], 3600, NOW)
    patched = fleet_reports(host("c", enables=0, updates=60), NOW)
    assert [r.totals.filter_updates for r in unpatched] == [100, 40]
    assert [r.verdict.patched for r in (*unpatched, *patched)] == [False, False, True]
    assert asked[0] == 'msrtrace_build_info{patch="missing"}[3600s]'
    comparison = compare(unpatched, patched, titles=("old", "new"))
    assert sentence(comparison).startswith("old makes 30 calls a filter update, 30 of them redundant; new 13, 13 ")
    assert not [warning for warning in comparison.warnings if "differ between" in warning]


def test_hosts_without_filter_updates_are_left_out() -> None:
    busy, idle = host("a", enables=17, updates=100), host("b", enables=17, updates=0)
    found = reported(merged(busy, idle))
    assert [report.title for report in found] == ["a"]
    [alone] = reported(idle)
    assert alone.totals.filter_updates == 0


def test_with_by_vm_only_the_sums_over_vms_count() -> None:
    """Its series by VM end with the VMs."""
    apart = host("a", enables=17, updates=100)
    names = [name for name in apart if name.startswith(("msrtrace_intercept", "msrtrace_filter"))]
    sums = {name.replace("msrtrace_", "msrtrace_host_"): apart[name] for name in names}
    gone = {
        name: [(labels | {"vm": "x", "pid": "1"}, {SCRAPES[0]: 7.0})] for name in names for labels, _ in apart[name]
    }
    [found] = reported(apart | gone | sums)
    assert (found.totals.filter_updates, found.totals.calls) == (100, 3000)


def test_a_restart_with_by_vm_keeps_the_counts_before_it() -> None:
    target = {"job": "msrtrace", "instance": "a"}
    stored = host("a", enables=17, updates=100) | {
        "process_start_time_seconds": [(target, dict(zip(SCRAPES, [5.0, 5, 5, 9, 9], strict=True)))],
        "msrtrace_filter_updates_total": [
            (target, dict(zip(SCRAPES[:3], [10.0, 15, 30], strict=True))),
            (target | {"vm": "x", "pid": "1"}, {SCRAPES[4]: 7.0}),
        ],
        "msrtrace_host_filter_updates_total": [(target, dict(zip(SCRAPES[3:], [3.0, 7], strict=True)))],
    }
    [found] = reported(stored)
    assert found.totals.filter_updates == 20 + 7


def test_losses_and_lost_probes_make_a_lower_bound() -> None:
    fine = host("a", enables=0, updates=8)
    assert not reported(fine)[0].lower_bound
    target = {"job": "msrtrace", "instance": "a"}
    lossy = fine | {"msrtrace_dropped_updates_total": [(target | {"map": "calls"}, {SCRAPES[0]: 1.0, SCRAPES[4]: 3.0})]}
    assert reported(lossy)[0].loss.dropped_updates == {"calls": 2}
    unpaired = fine | {"msrtrace_unpaired_refusals_total": [(target, {SCRAPES[0]: 1.0, SCRAPES[4]: 4.0})]}
    [report] = reported(unpaired)
    assert (report.loss.unpaired_refusals, report.lower_bound) == (3, True)
    function = {"function": "vmx_enable_intercept_for_msr"}
    blind = fine | {"msrtrace_probe_attached": [(target | function, {SCRAPES[0]: 1.0, SCRAPES[1]: 0.0})]}
    found = reported(blind)[0]
    assert found.loss.not_probed == ["vmx_enable_intercept_for_msr"]
    assert found.lower_bound
    # Not probed, but of no consequence for the counts.
    other = fine | {"msrtrace_probe_attached": [(target | {"function": "vmx_vcpu_create"}, {SCRAPES[0]: 0.0})]}
    assert not reported(other)[0].lower_bound


def test_what_a_host_cannot_observe_is_null_and_not_zero() -> None:
    unknown = host("a", enables=0, updates=8, redundancy="unknown") | {"msrtrace_intercept_redundant_calls_total": []}
    [found] = reported(unknown)
    assert (found.totals.calls, found.totals.redundant) == (8 * 13, None)
    degraded = host("a", enables=0, updates=8, layout="filter-only") | {"msrtrace_intercept_calls_total": []}
    [found] = reported(degraded)
    assert (found.totals.calls, found.totals.filter_updates) == (None, 8)


def test_kernels_of_different_layouts_need_outcomes_per_bit() -> None:
    """A call for both bits that changed something may have changed either or both: the metrics do not say which."""
    new = host("b", enables=0, updates=8, layout="recalc")
    labels = new["msrtrace_intercept_calls_total"][0][0] | {"access": "read_write", "msr": "0xc0000100"}
    new["msrtrace_intercept_calls_total"].append((labels, dict(zip(SCRAPES, [0.0, 8, 8, 8, 8], strict=True))))
    [old] = reported(host("a", enables=0, updates=8))
    with pytest.raises(MsrtraceError, match="outcomes per bit are needed"):
        compare([old], reported(new))


# --- AMD ---


def amd(instance: str, **more: Any) -> Stored:
    return amd_host({"job": "msrtrace", "instance": instance}, SCRAPES, **more)


@pytest.mark.parametrize("counted", [svm_pass, svm_recalc])
def test_an_amd_host_is_reported_as_one(counted: Callable[[int], Snapshot]) -> None:
    [found] = reported(amd("a", counted=counted))
    made = counted(100)
    each = sum(call.cause == "filter_change" for call in made.calls)
    assert (found.host.vendor, found.host.layout, found.host.module_parameters) == ("svm", made.layout, {})
    assert (found.totals.filter_updates, found.totals.calls, found.totals.redundant) == (
        100,
        each * 100,
        each * 100 - 100,
    )
    assert (found.verdict.patched, found.lower_bound) == (None, False)
    assert found.verdict.why.endswith(f"{each} each, of which {each - 1} changed nothing")


def test_amd_hosts_are_compared_exactly() -> None:
    found = [
        reported(amd("a")),
        reported(merged(amd("b", counted=svm_recalc), amd("c", counted=svm_recalc, updates=7))),
    ]
    with pytest.raises(MsrtraceError, match="outcomes per bit are needed"):
        compare(*found)
    comparison = compare(reported(amd("a")), reported(amd("b", updates=7)), titles=("old", "new"))
    assert sentence(comparison) == (
        "old makes 47 calls a filter update, 46 of them redundant; new 47, 46 redundant: as many calls"
    )


def test_an_intel_host_can_be_compared_with_an_amd_host() -> None:
    """Where a call for both bits changed something, which bits is not in the metrics."""
    intel, stored = reported(host("a")), amd("b")
    with pytest.raises(
        MsrtraceError, match=r"\(layouts toggle of Intel VMX and pass of AMD SVM\), so outcomes per bit"
    ):
        compare(intel, reported(stored))
    forced = compare(intel, reported(stored), force=True)
    assert sentence(forced) == (
        "a names 13 bits a filter update, 13 of them redundant; b 94, ? redundant: 81 more bits, +623.1%"
    )
    idle = compare(intel, reported(amd("b", changing=False)))
    assert sentence(idle).startswith("a names 13 bits a filter update, 13 of them redundant; b 94, 94 redundant")
    assert idle.differences[0] == Difference("hardware", "Intel VMX", "AMD SVM")


def test_a_fleet_of_both_vendors_has_a_report_for_each_host() -> None:
    found = reported(merged(host("intel", layout="recalc"), amd("amd", counted=svm_recalc)))
    assert [(report.title, report.host.vendor) for report in found] == [("amd", "svm"), ("intel", "vmx")]
    with pytest.raises(MsrtraceError, match="has reports of hosts that are not the same kind of hardware"):
        compare(found, reported(host("b")), titles=("all", "b"))


def test_a_host_without_the_label_of_the_vendor_is_intels() -> None:
    """msrtrace gave it none when it knew only that one; its upgrade is not another host."""
    target = {"job": "msrtrace", "instance": "a"}
    old = made_up(target, SCRAPES[:3], updates=20)
    new = made_up(target, SCRAPES[3:], updates=8, before=0, start=SCRAPES[2] + 5, info={"vendor": "vmx"})
    [found] = reported(merged(old, new))
    assert (found.host.vendor, found.totals.filter_updates) == ("vmx", 28)
    assert found.verdict.patched is True


def test_a_label_of_the_target_named_vendor_is_not_msrtraces() -> None:
    """`honor_labels: false` renames msrtrace's; versions of msrtrace without one leave the target's."""
    for given, expected in ((host("a"), "vmx"), (amd("a"), "svm")):
        [(info, samples)] = given["msrtrace_build_info"]
        renamed = {**info, **({"exported_vendor": info["vendor"]} if "vendor" in info else {}), "vendor": "Dell"}
        stored = labelled(given, vendor="Dell") | {"msrtrace_build_info": [(renamed, samples)]}
        assert [report.host.vendor for report in reported(stored)] == [expected]


def test_recalculations_are_not_queried_and_so_unknown() -> None:
    [found] = reported(host("a", enables=0, updates=8, layout="recalc"))
    assert (found.totals.filter_updates, found.totals.recalculations, found.recalculation_seconds) == (8, None, None)


BIG = 1_700_000_000.0
TIMES = [BIG - 60, BIG - 45, BIG - 30, BIG - 15, BIG]
OLD = BIG - 90_000.0


def agent(name: str, *, updates: int = 100, enables: int = 0, start: float | None = OLD, **more: str) -> Stored:
    """A host that a local agent scrapes: only the label `host` distinguishes it from others."""
    return made_up({**LOCAL, "host": name, **more}, TIMES, updates=updates, enables=enables, start=start)


@pytest.mark.parametrize("start", [OLD, None])
@pytest.mark.parametrize("label", ["host", "cluster", "pod", "exported_instance"])
def test_another_label_distinguishes_hosts_with_the_same_instance(label: str, start: float | None) -> None:
    """They were once taken for one host of 1,140 updates: each agent scrapes at its own times."""
    first = made_up({**LOCAL, label: "kvm1"}, TIMES, start=start)
    later = [time + 3 for time in TIMES]
    second = made_up({**LOCAL, label: "kvm2"}, later, updates=40, enables=17, start=start)
    found = counted(merged(first, second), BIG + 3)
    assert list(found.values()) == [(100, 1300), (40, 1200)]
    titled = [f'{LOCAL["instance"]} ({label}="{name}")' for name in ("kvm1", "kvm2")]
    assert list(found) == (["kvm1", "kvm2"] if label == "exported_instance" else titled)


def test_titles_have_the_labels_that_differ_and_no_others() -> None:
    one = agent("kvm1", env="prod", dc="eu")
    other = agent("kvm2", env="prod", updates=40, dc="us")
    alone = made_up({"job": "msrtrace", "instance": "kvm3:9753", "env": "prod"}, TIMES, updates=50, start=OLD)
    assert list(counted(merged(one, other, alone), BIG)) == [
        '127.0.0.1:9753 (dc="eu", host="kvm1")',
        '127.0.0.1:9753 (dc="us", host="kvm2")',
        "kvm3:9753",
    ]


def test_a_title_is_the_instance_below_a_federating_server() -> None:
    """With `honor_labels: false` there, job and instance are those of the federating server."""
    above = {"job": "federate", "instance": "prometheus:9090", "exported_job": "msrtrace"}
    stored = merged(
        *(
            made_up({**above, "exported_instance": name}, TIMES, updates=updates, start=OLD)
            for name, updates in (("kvm1:9753", 100), ("kvm2:9753", 40))
        )
    )
    assert counted(stored, BIG) == {"kvm1:9753": (100, 1300), "kvm2:9753": (40, 520)}


def test_a_host_that_several_selectors_match_counts_once() -> None:
    stored = merged(agent("kvm1", patch="x"), agent("kvm2", updates=40))
    assert sorted(counted(stored, BIG, "", 'patch="x"', '{host="kvm1"}').values()) == [(40, 520), (100, 1300)]


@pytest.mark.parametrize("base", ['host="kvm1"', ""])
def test_a_host_on_both_sides_is_refused(base: str) -> None:
    stored = merged(agent("kvm1"), agent("kvm2", updates=40))
    with (
        serving(storing(stored, BIG)) as url,
        pytest.raises(MsrtraceError, match=r'host="kvm1".*: one msrtrace is on both sides'),
    ):
        compared(Prometheus(url), [[base], ['host="kvm1"']], 3600, BIG)


def test_an_idle_host_may_be_on_both_sides() -> None:
    stored = merged(agent("kvm1", patch="a"), agent("kvm2", patch="b", updates=40), agent("kvm3", updates=0))
    with serving(storing(stored, BIG)) as url:
        sides = compared(Prometheus(url), [['patch="a"', 'host="kvm3"'], ['patch="b"', 'host="kvm3"']], 3600, BIG).sides
    assert [[report.totals.filter_updates for report in side] for side in sides] == [[100], [40]]


def test_kernels_of_a_host_that_was_rebooted_are_not_mixed() -> None:
    target = {"job": "msrtrace", "instance": "kvm1:9753"}
    old = made_up(target, TIMES[:3], updates=20, enables=17, start=OLD, info={"kernel": "5.19"})
    new = made_up(target, TIMES[3:], updates=8, before=0, start=TIMES[2] + 5, info={"kernel": "6.1"})
    assert counted(merged(old, new), BIG) == {
        'kvm1:9753 (kernel="5.19")': (20, 600),
        'kvm1:9753 (kernel="6.1")': (8, 104),
    }


@pytest.mark.parametrize("metric", ["msrtrace_build_info", CALLS, REDUNDANT])
def test_a_metric_that_is_not_stored_is_named(metric: str) -> None:
    """Without redundant calls a kernel would look patched."""
    stored = {name: series for name, series in agent("kvm1").items() if name != metric}
    with pytest.raises(MsrtraceError, match=rf"{metric}{{.*host=\"kvm1\".*}} is not stored: "):
        counted(stored, BIG)


def test_sums_over_vms_that_are_not_stored_are_named() -> None:
    stored = agent("kvm1")
    stored |= {name: labelled({name: stored[name]}, vm="x", pid="1")[name] for name in (CALLS, REDUNDANT, UPDATES)}
    with pytest.raises(MsrtraceError, match=r"msrtrace_host_[a-z_]+{.* is not stored: the series by VM"):
        counted(stored, BIG)


def test_a_selector_by_a_label_of_build_info_is_refused() -> None:
    with pytest.raises(MsrtraceError, match=r"matches msrtrace_build_info and no series with counts: select hosts by"):
        counted(agent("kvm1"), BIG, 'kernel="6.1"')


@pytest.mark.parametrize("label", ["vendor", "kernel"])
def test_the_refusal_names_the_labels_of_build_info(label: str) -> None:
    with pytest.raises(MsrtraceError, match=rf"not by labels of that metric \(.*\b{label}\b.*\)"):
        counted(amd("kvm1"), NOW, 'vendor="svm"')


def test_without_start_times_a_warning_says_what_is_missed() -> None:
    stored = merged(agent("kvm1", start=None), agent("kvm2", updates=40))
    with serving(storing(stored, BIG)) as url:
        [warning] = compared(Prometheus(url), [['host="kvm1"'], ['host="kvm2"']], 3600, BIG).warnings
    assert warning.startswith(f"{START} is not stored of 127.0.0.1:9753: ")


def test_the_command_compares_fleets(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stored = merged(agent("kvm1", patch="new", start=None), agent("kvm2", patch="old", updates=40, enables=17))
    with serving(storing(stored, BIG)) as url:
        status, out, err = main("compare", "--prometheus", url, "--base", 'patch="old"', "--new", 'patch="new"')
        assert (status, err) == (0, "")
        assert out.startswith('patch="old" makes 30 calls a filter update, 30 of them redundant; patch="new" 13, 13 ')
        assert f"\nwarning: {START} is not stored of " in out
        status, out, err = main("compare", "--prometheus", url, "--base", 'patch="old"', "--new", "")
        assert (status, out) == (1, "")
        assert err.startswith("msrtrace: error: {")
        assert err.endswith(": one msrtrace is on both sides of the comparison; select it by a label for one of them\n")


def test_the_command_compares_intel_with_amd(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    amds = amd_host({**LOCAL, "host": "kvm2", "maker": "amd"}, TIMES)
    stored = merged(agent("kvm1", maker="intel"), {**amds, START: [(amds[START][0][0], dict.fromkeys(TIMES, OLD))]})
    with serving(storing(stored, BIG)) as url:
        sides = ("--prometheus", url, "--base", 'maker="intel"', "--new", 'maker="amd"')
        status, out, err = main("compare", *sides)
        assert (status, out) == (3, "")
        assert "(layouts toggle of Intel VMX and pass of AMD SVM), so outcomes per bit are needed" in err
        status, out, err = main("compare", "--force", *sides)
        assert (status, err) == (0, "")
        assert out.startswith('maker="intel" names 13 bits a filter update, 13 of them redundant; maker="amd" 94, ? ')
        assert '\n  maker="amd": patch not applicable: KVM never had this patch for AMD SVM; 100 filter updates' in out
        assert "warning: not the same kind of hardware (Intel VMX and AMD SVM), so the times cannot be compared" in out


def warned(stored: Stored, **more: object) -> Answer:
    """As `storing`, with `warnings`, `infos` or the like in each answer."""

    def answer(form: dict[str, str], headers: dict[str, str]) -> tuple[int, bytes]:
        status, body = storing(stored, NOW)(form, headers)
        return status, json.dumps(json.loads(body) | more).encode()

    return answer


SIDES = ("--base", 'group="base"', "--new", 'group="new"')


def two_groups() -> Stored:
    base = labelled(merged(host("a", enables=17), host("b", enables=17)), group="base")
    return merged(base, labelled(merged(host("c"), host("d")), group="new"))


def test_a_partial_answer_makes_a_lower_bound(main: Main) -> None:
    with serving(warned(two_groups(), warnings=["store x is down"])) as url:
        status, out, err = main("compare", "--prometheus", url, *SIDES)
        forced = main("compare", "--prometheus", url, *SIDES, "--force")
        [one, *_] = reports(Prometheus(url), ["{}"], 3600, NOW)
    phrase = "Prometheus warned that series may be missing: store x is down"
    assert (status, out) == (3, "")
    assert err == (
        f'msrtrace: error: group="base" (a, b) is a lower bound: {phrase}; group="new" (c, d) is a lower bound: '
        f"{phrase} (--force compares them anyway)\n"
    )
    assert forced[0] == 0
    assert f'FORCED despite: group="base" (a, b) is a lower bound: {phrase}' in " ".join(forced[1].split())
    assert (one.lower_bound, one.loss.uncounted) == (True, [phrase])


def test_remarks_that_mean_no_missing_series_are_warnings(main: Main) -> None:
    with serving(warned(two_groups(), infos=["PromQL info: x"])) as url:
        status, out, err = main("compare", "--prometheus", url, *SIDES)
    assert (status, err) == (0, "")
    assert "warning: Prometheus remarked: PromQL info: x" in out
