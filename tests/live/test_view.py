# SPDX-License-Identifier: GPL-2.0-or-later
"""How `top` looks, and what keys do."""

from __future__ import annotations

import os
import pty
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from dispositions import dispositions_restored
from made import svm_pass
from sampled import FS_READ, HOST, PROBE, TSC, UNKNOWN, Kernel, outcome, shown, snapshot, times

from tracer.cli.top import look
from tracer.live.table import Look, View
from tracer.live.terminal import Screen, Signals
from tracer.live.top import Sample, frame
from tracer.live.view import lines
from tracer.model.snapshot import Durations, Map, Probe, Snapshot, VmInfo

Dispositions = dict[signal.Signals, Any]


@pytest.fixture(autouse=True)
def dispositions() -> Iterator[Dispositions]:
    with dispositions_restored() as before:
        yield before


def test_a_frame_at_80_columns() -> None:
    assert shown(frame(snapshot(4).since(snapshot(1)), 2.0)) == [
        "15:04:05 kvm1 6.1.0-53-amd64 VMX layout toggle, redundancy exact, over 2.0 s",
        "filter updates 15.0/s, 100 µs each; calls 46.5/s, 48.4% redundant",
        "about 3.0 calls per filter update, 1.5 of them redundant",
        "",
        "MSR                        access  action   cause             calls/s  redundant",
        "IA32_TSC                   read    disable  filter_change        15.0     100.0%",
        "FS_BASE                    read    disable  filter_change        15.0      50.0%",
        "FS_BASE                    write   disable  filter_change        15.0       0.0%",
        "0xdeadbeef                 both    enable   vcpu_create           1.5       0.0%",
    ]


def test_a_frame_of_an_amd_host() -> None:
    """Calls name both bits of an MSR, and may pass one of them through."""
    wanted = {(0x49, "filter_change"), (0xC0000100, "filter_change"), (0x48, "filter_change")}
    counted = svm_pass(20)
    calls = {call: outcome for call, outcome in counted.calls.items() if (call.msr, call.cause) in wanted}
    found = shown(frame(replace(counted, calls=calls), 2.0))
    assert found[0] == "15:04:05 kvm1 6.1.0-53-amd64 SVM layout pass, redundancy exact, over 2.0 s"
    assert found[4:] == [
        "MSR                      access  action     cause             calls/s  redundant",
        "IA32_SPEC_CTRL           both    enable     filter_change        10.0     100.0%",
        "IA32_PRED_CMD            both    disable W  filter_change        10.0     100.0%",
        "FS_BASE                  both    disable    filter_change        10.0       0.0%",
    ]


def test_a_frame_at_40_columns() -> None:
    assert shown(frame(snapshot(4).since(snapshot(1)), 2.0), width=40) == [
        "15:04:05 kvm1 6.1.0-53-amd64 VMX layout",
        "toggle, redundancy exact, over 2.0 s",
        "filter updates 15.0/s, 100 µs each;",
        "calls 46.5/s, 48.4% redundant",
        "about 3.0 calls per filter update, 1.5",
        "of them redundant",
        "",
        "MSR                   calls/s  redundant",
        "FS_BASE                  30.0      25.0%",
        "IA32_TSC                 15.0     100.0%",
        "0xdeadbeef                1.5       0.0%",
    ]


def test_totals_are_since_the_start() -> None:
    found = shown(frame(snapshot(400), 4000.0, whole=True), View(whole=True))
    assert found[:2] == [
        "15:04:05 kvm1 6.1.0-53-amd64 VMX layout toggle, redundancy exact, all 1:06:40 h",
        "filter updates 4,000, 100 µs each; calls 12,400, 48.4% redundant",
    ]
    assert found[4].endswith("      calls  redundant")
    assert found[5].endswith("  filter_change       4,000     100.0%")


RECALC = replace(snapshot(), layout="recalc", recalcs={0: times(2, 2e-4), 7: times(1, 5e-4)})


@pytest.mark.parametrize("layout", ["recalc", "set"])
def test_recalculations_have_a_line(layout: str) -> None:
    made = frame(replace(RECALC, layout=layout), 2.0)
    assert made.all_recalcs == Durations(3, 9e-4, (3, *[0] * 24))
    found = shown(made)
    assert found[1:4] == [
        "filter updates 5.0/s, 100 µs each; calls 15.5/s, 48.4% redundant",
        "about 3.0 calls per filter update, 1.5 of them redundant",
        "recalculations for other reasons than a new filter 1.5/s, 300 µs each",
    ]
    assert shown(frame(RECALC, 4000.0, whole=True), View(whole=True))[3] == (
        "recalculations for other reasons than a new filter 3, 300 µs each"
    )
    calls_unseen = replace(RECALC, calls={}, calls_observable=False)
    assert shown(frame(calls_unseen, 2.0))[2] == found[3]
    quiet = replace(RECALC, layout=layout, recalcs={})
    assert shown(frame(quiet, 2.0))[3] == "recalculations for other reasons than a new filter 0.0/s"


def test_recalculations_of_an_interval() -> None:
    """Those of a VM that ended since are under pid 0."""
    later = replace(RECALC, by_vm=True, recalcs={0: times(5, 3e-4), 8: times(4, 3e-4)}, vms={8: VmInfo("b")})
    kernel = Kernel(replace(RECALC, by_vm=True, vms={7: VmInfo("a")}), later)
    sampler = kernel.sampler()
    sampler.take()
    interval, whole = sampler.sample.interval, sampler.sample.whole
    assert interval
    assert whole
    assert interval.all_recalcs == Durations(6, 0.0018, (6, *[0] * 24))
    assert whole.all_recalcs == Durations(9, 0.0027, (9, *[0] * 24))


def test_recalculations_that_cannot_be_observed_are_not_shown() -> None:
    for counted in (replace(RECALC, layout="toggle"), replace(RECALC, updates={}, updates_observable=False)):
        assert frame(counted, 2.0).all_recalcs is None
        assert "ecalculation" not in "".join(shown(frame(counted, 2.0)))


def test_many_recalculations_fit_80_columns() -> None:
    many = replace(RECALC, recalcs={0: times(999_999_999, 0.0999)})
    for whole in (True, False):
        [line] = [line for line in shown(frame(many, 1.0, whole=whole)) if line.startswith("recalculations ")]
        assert line.endswith(" 99.9 ms each")
        assert len(line) <= 80


@pytest.mark.parametrize("width", [1, 5, 20, 40, 60, 79, 80, 81, 100, 132, 250])
@pytest.mark.parametrize("height", [None, 1, 2, 5, 24])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_frame_fits_the_terminal(width: int, height: int | None, level: int) -> None:
    calls = {replace(call, pid=pid): o for call, o in snapshot().calls.items() for pid in (0, 7, 4194304)}
    many = replace(
        snapshot(), calls=calls, by_vm=True, vms={7: VmInfo("web" * 40), 4194304: VmInfo("x")}, read_failures=3
    )
    for look_ in (Look(width, height), Look(width, height, ascii=True, styles=True, colors=True)):
        found = lines(Sample("15:04:05", frame(many, 1.0), None, ("note",)), View(level=level), look_, HOST)
        plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in found]
        assert max(map(len, plain)) <= width
        assert height is None or len(found) == height


def test_rows_beyond_the_screen_are_scrolled() -> None:
    calls = {replace(TSC, msr=0x10000 + index): outcome(200 - index, 0) for index in range(100)}
    made, view = frame(Snapshot("toggle", calls=calls), 1.0), View()
    found = shown(made, view, height=24)
    assert (len(found), found[-2]) == (24, "rows 1 to 18 of 100")
    assert found[4].startswith("0x10000 ")
    view.offset = 1
    assert shown(made, view, height=24)[-2] == "rows 2 to 19 of 100"
    view.offset = 1000
    assert shown(made, view, height=24)[-2] == "rows 83 to 100 of 100"
    assert view.offset == 82
    assert len(shown(made, view)) == 100 + 5  # in a pipe all are shown


def test_what_cannot_be_observed_is_never_0() -> None:
    degraded = replace(snapshot(), layout="filter-only", calls={}, calls_observable=False)
    found = shown(frame(degraded, 1.0))
    assert found == [
        "15:04:05 kvm1 6.1.0-53-amd64 VMX layout filter-only, over 1.0 s",
        "filter updates 10.0/s, 100 µs each; calls not observable on this kernel",
        "",
        "calls not observable on this kernel",
    ]
    unseen = shown(frame(replace(snapshot(), updates={}, updates_observable=False), 1.0))
    assert unseen[1] == "filter updates not observable on this kernel; calls 31.0/s, 48.4% redundant"
    assert "per filter update" not in "".join(unseen)
    by_vm = replace(degraded, updates={7: times(10)}, by_vm=True, vms={7: VmInfo("web")})
    assert shown(frame(by_vm, 1.0), View(level=1))[-1] == (
        "7 web                                      10.0    100 µs           ?"
    )


def test_unknown_redundancy_is_a_question_mark() -> None:
    calls = {TSC: outcome(10, None)}
    found = shown(frame(replace(snapshot(), calls=calls, redundancy="unknown"), 1.0))
    assert "redundancy unknown" in found[0]
    assert found[1].endswith("calls 10.0/s, ? redundant")
    assert found[2] == "1 calls per filter update, ? of them redundant"
    assert found[-1].split() == ["IA32_TSC", "read", "disable", "filter_change", "10.0", "?"]


def test_a_small_rate_is_not_shown_as_0() -> None:
    calls = {TSC: outcome(1, 0)}
    found = shown(frame(Snapshot("toggle", calls=calls), 300.0))
    assert "calls 0.003/s" in found[1]


def test_an_idle_interval_says_so() -> None:
    found = shown(frame(replace(snapshot(), calls={}, updates={}), 1.0))
    assert found[1:] == ["filter updates 0.0/s; calls 0.0/s", "no filter update", "", "no calls"]


def test_losses_are_shown() -> None:
    lossy = replace(
        snapshot(),
        maps=(Map("calls", 10, 10, 1234), Map("threads", 0, 10)),
        probes=(replace(PROBE, missed=2), Probe("vmx_vcpu_create", None, False, "none")),
        unpaired_returns=3,
        read_failures=4,
        module_unloads=1,
    )
    text = " ".join(shown(frame(lossy, 1.0), width=300))
    assert (
        "LOWER BOUND, the true counts may be higher: 1,234 updates of map calls dropped, "
        "2 runs of vmx_msr_filter_changed missed, 3 unpaired returns, 4 bitmaps not read, kvm_intel unloaded: 1"
    ) in text
    assert "NOT PROBED: vmx_vcpu_create" in text
    later = Sample("15:04:05", frame(lossy.since(lossy), 1.0), frame(lossy, 2.0, whole=True))
    assert "LOWER BOUND since the start, though not in this interval: 1,234 updates" in " ".join(
        shown(later, width=300)
    )
    assert "LOWER BOUND" not in " ".join(shown(frame(snapshot(), 1.0)))


def test_an_unloaded_module_counts_nothing_rather_than_0() -> None:
    gone = replace(snapshot(), calls={}, updates={}, probes=(replace(PROBE, attached=False),))
    found = shown(frame(gone, 1.0))
    assert found[1] == "nothing is traced now"
    assert "0.0" not in "".join(found[1:])
    assert "calls 31" in " ".join(shown(frame(replace(gone, calls=snapshot().calls), 1.0, whole=True), View()))


HOSTILE = "[red]x[/] \x1b[31m\x9b2J\r\n\u202eevil é中\U0001f600"


@pytest.mark.parametrize("styles", [True, False])
def test_hostile_names_cannot_control_the_terminal(styles: bool) -> None:
    calls = {replace(TSC, pid=7): outcome(1, 1)}
    made = Snapshot("toggle", calls=calls, updates={7: times(1)}, by_vm=True, vms={7: VmInfo(HOSTILE)}, probes=(PROBE,))
    for level in (0, 1):
        found = lines(
            Sample("15:04:05", frame(made, 1.0)), View(level=level), Look(132, ascii=True, styles=styles), HOSTILE
        )
        text = "\n".join(found)
        plain = re.sub(r"\x1b\[[\d;]*m", "", text)
        assert r"7 [red]x[/] \x1b[31m\x9b2J\r\n\u202eev" in plain
        assert plain.replace("\n", "").isprintable()
        assert plain.isascii()
        assert styles or plain == text
    assert "é中" in "\n".join(lines(Sample("15:04:05", frame(made, 1.0)), View(), Look(200), HOSTILE))


def test_vms_have_rows() -> None:
    calls = {TSC: outcome(5, 5), replace(TSC, pid=7): outcome(30, 15), replace(FS_READ, pid=8): outcome(10, 0)}
    made = Snapshot("toggle", calls=calls, updates={7: times(4), 0: times(1)}, by_vm=True)
    made = replace(made, vms={7: VmInfo("web"), 8: VmInfo("db"), 9: VmInfo("idle")}, probes=(PROBE,))
    assert [line.split() for line in shown(frame(made, 2.0), View(level=1))[-5:]] == [
        ["pid", "VM", "updates/s", "each", "calls/s", "redundant"],
        ["7", "web", "2.0", "100", "µs", "15.0", "50.0%"],
        ["8", "db", "0.0", "5.0", "0.0%"],
        ["(ended)", "0.5", "100", "µs", "2.5", "100.0%"],
        ["9", "idle", "0.0", "0.0"],
    ]
    assert shown(frame(made, 2.0), View(level=0))[-3].startswith("7 web                 IA32_TSC  ")
    assert shown(frame(made, 2.0), View(level=2))[-2].startswith("IA32_TSC  ")


UTF8 = {"LANG": "C.UTF-8", "TERM": "xterm"}


@pytest.mark.parametrize(
    ("changes", "encoding", "expected"),
    [
        ({}, "utf-8", Look(80, 24, ascii=False, styles=True, colors=True)),
        ({"NO_COLOR": "1"}, "utf-8", Look(80, 24, ascii=False, styles=True, colors=False)),
        ({"NO_COLOR": ""}, "utf-8", Look(80, 24, ascii=False, styles=True, colors=True)),
        ({"TERM": "linux"}, "utf-8", Look(80, 24, ascii=True, styles=True, colors=True)),
        ({"TERM": "vt220"}, "utf-8", Look(80, 24, ascii=True, styles=True, colors=False)),
        ({"LANG": "C"}, "utf-8", Look(80, 24, ascii=True, styles=True, colors=True)),
        ({"LC_ALL": "C"}, "utf-8", Look(80, 24, ascii=True, styles=True, colors=True)),
        ({"LC_ALL": "", "LANG": "en_US.utf8"}, "UTF-8", Look(80, 24, ascii=False, styles=True, colors=True)),
        ({}, "ascii", Look(80, 24, ascii=True, styles=True, colors=True)),
    ],
)
def test_what_a_terminal_can_show(changes: dict[str, str], encoding: str, expected: Look) -> None:
    assert look(80, 24, {**UTF8, **changes}, encoding) == expected
    assert look(80, None, {**UTF8, **changes}, encoding) == Look(
        80, None, ascii=expected.ascii and changes.get("TERM") is None
    )


def test_without_colour_there_is_still_bold() -> None:
    sample = Sample("15:04:05", frame(snapshot(), 1.0))
    text = "\n".join(lines(sample, View(), Look(80, 24, styles=True), HOST))
    assert set(re.findall(r"\x1b\[([\d;]*)m", text)) == {"0", "1", "2", "7"}
    colored = "\n".join(lines(sample, View(), Look(80, 24, styles=True, colors=True), HOST))
    assert {"31", "33"} <= set(re.findall(r"\x1b\[([\d;]*)m", colored))


def test_an_idle_frame_costs_a_serial_console_little() -> None:
    """Only changed lines are sent: here the one with the time, and the rates of one MSR."""
    master, slave = pty.openpty()
    view, how = View(sort="msr"), Look(80, 24, styles=True, colors=True)
    with Signals() as signals:
        screen = Screen(signals, slave, slave, alternate=False)
        screen.draw(lines(Sample("15:04:05", frame(snapshot(), 1.0)), view, how, HOST))
        first = os.read(master, 65536)
        changed = replace(snapshot(), calls={**snapshot().calls, UNKNOWN: outcome(1, 1)})
        screen.draw(lines(Sample("15:04:06", frame(changed, 1.0)), view, how, HOST))
        second = os.read(master, 65536)
    os.close(master)
    os.close(slave)
    assert len(first) < 1500
    assert second.count(b"H\x1b[K") == 3
    assert len(second) < 400


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        ([b"q"], ["q"]),
        ([b"c r"], ["c", " ", "r"]),
        ([b"\x1b[A\x1b[B\x1bOA\x1b[5~\x1b[6~"], ["up", "down", "up", "page up", "page down"]),
        ([b"\x1b", b"[", b"B"], ["down"]),
        ([b"\x1b[6", b"~c"], ["page down", "c"]),
        ([b"\x1b", b"q"], ["q"]),
        ([b"\x1bq"], ["q"]),
        ([b"\x1b[15~\x1b[1;5Cq"], ["q"]),
        ([b"\x1b[200~q"], ["q"]),
        ([b"\x1b[" + b"1" * 40, b"q"], ["q"]),
        ([b"\xff"], ["\N{REPLACEMENT CHARACTER}"]),
        ([b"\x0c"], ["redraw"]),
    ],
)
def test_keys_are_decoded(typed: list[bytes], keys: list[str]) -> None:
    out, in_ = os.pipe()
    with Signals() as signals:
        screen, found = Screen(signals, out, in_, alternate=False), []
        for part in typed:
            os.write(in_, part)
            found += list(screen.wait(5.0))
        assert found == keys
        os.close(in_)
        assert list(screen.wait(5.0)) == []
        assert signals.ended  # there is nobody any more
    os.close(out)


def test_ignored_signals_stay_ignored(dispositions: Dispositions) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.wait(0.05) == (set(), False)
        assert not signals.ended
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == dispositions[signal.SIGTERM]


def test_signals_that_end_it_are_ignored_after_that() -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.wait(5.0) == ({signal.SIGTERM}, False)
        assert signals.ended
    os.kill(os.getpid(), signal.SIGTERM)
