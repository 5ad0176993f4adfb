# SPDX-License-Identifier: GPL-2.0-or-later
"""The exits in `top`: what is sampled, and how it looks."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from made_exits import EXITS, FILTER, GUARDED, PLAIN, STATE, exiting
from made_vms import state, vcpu, vm
from sampled import HOST, PROBE, Kernel, shown, snapshot

from tracer.live.exits_view import SORTS
from tracer.live.table import Look, View
from tracer.live.top import Frame, Sample, Sampler, frame
from tracer.live.view import lines
from tracer.model.exit_table import Blame, ExitTable
from tracer.model.snapshot import VmInfo
from tracer.model.state import State

TITLES = "MSR                        access  result        exits/s   share  intercepted by"
LINE = "exits 36,635/s, 33.8% of them since a filter alone denies the access"


def traced(*, by_vm: bool = False, at_end: State | None = STATE, whole: bool = False) -> Frame:
    return frame(exiting(by_vm=by_vm), 2.5, whole=whole, state=at_end)


def rows(found: list[str]) -> list[str]:
    """The lines of the table, without its titles."""
    start = next(place for place, line in enumerate(found) if line.endswith(("intercepted by", "perhaps", "interce")))
    return found[start + 1 :]


# --- the table ---


def test_exits_at_80_columns() -> None:
    assert shown(traced(), View(exits=True)) == [
        "15:04:05 kvm1 6.1.0-53-amd64 VMX layout toggle, redundancy exact, over 2.5 s",
        "filter updates 40.4/s, 6 µs each; calls 528.0/s, 84.2% redundant",
        "13 calls per filter update, 11 of them redundant",
        LINE,
        "",
        TITLES,
        "FS_BASE                    write   filtered       12,400   33.8%  filter",
        "IA32_TSC_DEADLINE          write   ok, fast       24,000   65.5%  kvm",
        "IA32_XFD                   write   filtered        200.0    0.5%  both",
        "IA32_TSC_DEADLINE          write   ok               28.0    0.1%  nested",
        "PLATFORM_INFO              read    ok                2.8    0.0%  kvm",
        "0xdeadbeef                 read    invalid           2.0    0.0%  kvm",
        "KERNEL_GS_BASE             read    ok                1.2    0.0%  passed",
        "FS_BASE                    write   reflected         0.8    0.0%  nested",
    ]


def test_exits_at_40_columns() -> None:
    assert shown(traced(), View(exits=True), width=40)[-9:-6] == [
        "MSR          access     exits/s  interce",
        "FS_BASE      write       12,400  filter",
        "IA32_TSC_DE  write       24,000  kvm",
    ]


def test_calls_have_the_line_of_exits_too() -> None:
    found = shown(traced())
    assert found[3] == LINE
    assert "calls/s" in found[5]


def test_totals_are_counts() -> None:
    found = shown(traced(whole=True), View(exits=True, whole=True))
    assert found[3] == "exits 91,587, 33.8% of them since a filter alone denies the access"
    assert rows(found)[0] == "FS_BASE                    write   filtered       31,000   33.8%  filter"


def test_vcpus_that_differ_are_counted() -> None:
    other = vm("other", 5, vcpu(0, FILTER, wanted=frozenset()))
    found = shown(traced(at_end=replace(STATE, vms=(*STATE.vms, other))), View(exits=True), width=100)
    assert rows(found)[1].endswith("  filter 2, both 1")
    assert found[3] == "exits 36,635/s, 0.0% to 33.8% of them since a filter alone denies the access"


def test_without_a_state_it_is_unknown() -> None:
    found = shown(traced(at_end=None), View(exits=True))
    assert found[3] == "exits 36,635/s, 0.0% to 34.4% of them since a filter alone denies the access"
    assert {line.rpartition("  ")[2] for line in rows(found)} == {"unknown", "nested"}


def test_by_vm_goes_through_the_levels() -> None:
    made = traced(by_vm=True)
    both = rows(shown(made, View(exits=True), width=110))
    assert both[:3] == [
        "901 guarded                        FS_BASE               write   filtered       12,400   33.8%  filter",
        "901 guarded                        IA32_TSC_DEADLINE     write   ok, fast       16,000   43.7%  kvm",
        "812 plain                          IA32_TSC_DEADLINE     write   ok, fast        8,000   21.8%  kvm",
    ]
    narrow = shown(made, View(exits=True))
    assert rows(narrow)[0] == "901 guarded             FS_BASE               write       12,400  filter"
    vms = [line.split() for line in rows(shown(made, View(exits=True, level=1), width=100))]
    assert vms == [
        ["901", "guarded", "28,600", "78.1%", "12,400", "0.0"],
        ["812", "plain", "8,035", "21.9%", "0.0", "0.0"],
    ]
    assert shown(made, View(exits=True, level=2)) == shown(traced(), View(exits=True))


def test_vms_without_exits_have_rows() -> None:
    counted = replace(exiting(by_vm=True), vms={GUARDED: VmInfo("guarded"), 7: VmInfo("idle")})
    found = rows(shown(frame(counted, 2.5, state=STATE), View(exits=True, level=1)))
    assert [line.split()[:3] for line in found] == [
        ["901", "guarded", "28,600"],
        ["812", "8,035", "21.9%"],
        ["7", "idle", "0.0"],
    ]


def test_the_vm_whose_filter_causes_most_is_first() -> None:
    counts = {replace(kind, pid=PLAIN if kind.pid == GUARDED else GUARDED): 9 * n for kind, n in EXITS.items()}
    swapped = state(vm("a", PLAIN, vcpu(0, FILTER)), vm("b", GUARDED))
    counts |= {kind: 10**6 for kind in counts if kind.pid == GUARDED}
    made = frame(exiting(by_vm=True, counts=counts), 1.0, state=swapped)
    for sort, first in (("filter", "812"), ("exits", "901")):
        assert rows(shown(made, View(exits=True, level=1, exits_sort=sort)))[0].startswith(first)


def test_rows_are_sorted() -> None:
    def order(sort: str) -> list[str]:
        return [line.split()[0] for line in rows(shown(traced(), View(exits=True, exits_sort=sort)))][:4]

    assert {sort: order(sort) for sort in SORTS} == {
        "filter": ["FS_BASE", "IA32_TSC_DEADLINE", "IA32_XFD", "IA32_TSC_DEADLINE"],
        "exits": ["IA32_TSC_DEADLINE", "FS_BASE", "IA32_XFD", "IA32_TSC_DEADLINE"],
        "msr": ["PLATFORM_INFO", "IA32_XFD", "IA32_TSC_DEADLINE", "IA32_TSC_DEADLINE"],
    }


def test_help_and_footer() -> None:
    def footer(view: View, made: Frame | None = None) -> str:
        return " ".join(" ".join(shown(made or traced(), view, height=24)).split())

    assert footer(View(exits=True)).endswith("sorted by what a filter alone causes, then exits; ? for help, q to quit")
    assert footer(View(exits=True, exits_sort="msr")).endswith("sorted by msr; ? for help, q to quit")
    assert "e calls; sort by f what a filter alone causes, c exits, m MSR;" in footer(View(exits=True, help=True))
    assert "e exits; sort by c calls, r redundant" in footer(View(help=True))
    assert " e exits" not in footer(View(help=True), frame(snapshot(), 1.0))
    assert "b MSRs by VM" in footer(View(exits=True, help=True), traced(by_vm=True))


def test_no_exit_is_said() -> None:
    none = frame(exiting(counts={}), 1.0, state=STATE)
    for level in (0, 1):
        assert shown(none, View(exits=True, level=level))[3:] == ["exits 0.0/s", "", "no exits"]
    gone = frame(replace(exiting(counts={}), calls={}, probes=(replace(PROBE, attached=False),)), 1.0)
    assert shown(gone, View(exits=True))[1:] == ["nothing is traced now", "", ""]


def test_an_exit_in_progress_is_not_lost() -> None:
    """It is in the next interval; one of each vCPU that runs is in progress at any time."""
    found = shown(frame(replace(exiting(), open_exits=4), 1.0, state=STATE), View(exits=True))
    assert "LOWER BOUND" not in " ".join(found)


def test_exits_that_are_not_counted_are_not_0() -> None:
    found = shown(frame(snapshot(), 1.0), View(exits=True))
    assert found[-1] == "exits are not counted"
    assert "exits 0" not in " ".join(found)


@pytest.mark.parametrize("width", [1, 5, 20, 40, 60, 79, 80, 81, 100, 250])
@pytest.mark.parametrize("height", [None, 1, 5, 24])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_frame_fits_the_terminal(width: int, height: int | None, level: int) -> None:
    many = exiting(by_vm=True, counts={kind: 10**15 * count for kind, count in EXITS.items()})
    many = replace(many, vms={GUARDED: VmInfo("web" * 40), PLAIN: VmInfo("x")})
    for view in (View(exits=True, level=level), View(exits=True, level=level, help=True)):
        for look in (Look(width, height), Look(width, height, ascii=True, styles=True, colors=True)):
            found = lines(Sample("15:04:05", frame(many, 1.0, state=STATE), None, ("note",)), view, look, HOST)
            plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in found]
            assert max(map(len, plain)) <= width
            assert height is None or len(found) == height


def test_what_a_filter_alone_causes_is_red() -> None:
    text = lines(Sample("15:04:05", traced()), View(exits=True), Look(80, 24, styles=True, colors=True), HOST)
    assert [line.split()[0] for line in text if "\x1b[31m" in line] == ["FS_BASE"]


# --- sampling ---


def notes(sampler: Sampler) -> tuple[str, ...]:
    return sampler.sample.notes


def test_the_state_is_read_with_the_counts() -> None:
    later = replace(exiting(), exits={kind: 3 * count for kind, count in exiting().exits.items()})  # type: ignore[union-attr]
    kernel = Kernel(exiting(), later)
    other = replace(STATE, vms=())
    kernel.states = [STATE, other]
    sampler = kernel.sampler()
    assert sampler.sample.whole
    assert sampler.sample.whole.exits == ExitTable(exiting().exits or {}, STATE)
    sampler.take()
    interval, whole = sampler.sample.interval, sampler.sample.whole
    assert interval
    assert whole
    assert interval.exits == ExitTable({kind: 2 * count for kind, count in (exiting().exits or {}).items()}, other)
    assert whole.exits == ExitTable(later.exits or {}, other)
    assert whole.exits.blame == Blame(0, 3 * 31_500)
    assert sampler.sample.notes == ()


def test_without_exits_no_state_is_read() -> None:
    kernel = Kernel(snapshot(), snapshot(2))
    kernel.states = [RuntimeError("asked")]
    sampler = kernel.sampler()
    sampler.take()
    assert (sampler.sample.notes, len(kernel.states)) == ((), 1)


@pytest.mark.parametrize(
    ("reading", "problem", "why"),
    [
        (OSError("no\x1bway"), "", "no\x1bway"),
        (KeyError(), "", "KeyError"),
        (None, "there is no BTF", "there is no BTF"),
    ],
)
def test_a_state_that_cannot_be_read_is_a_note(reading: Exception | None, problem: str, why: str) -> None:
    kernel = Kernel(exiting(), exiting(), exiting())
    kernel.states, kernel.state_problem = [STATE, reading, STATE], problem
    sampler = kernel.sampler()
    sampler.take()
    assert notes(sampler) == (f"who intercepts an access is unknown: {why}",)
    assert sampler.sample.whole
    assert sampler.sample.whole.exits == ExitTable(exiting().exits or {}, None)
    assert "who intercepts an access is unknown" in " ".join(shown(sampler.sample))
    sampler.take()
    assert notes(sampler) == ()


def test_exits_of_a_vm_that_ended_are_no_burst() -> None:
    before = exiting(by_vm=True)
    after = replace(before.without_vms({GUARDED}), vms={PLAIN: VmInfo("plain")})
    kernel = Kernel(before, after)
    kernel.states = [STATE, STATE]
    sampler = kernel.sampler()
    sampler.take()
    assert sampler.sample.interval
    assert sampler.sample.interval.exits == ExitTable({}, STATE, by_vm=True)
    whole = sampler.sample.whole
    assert whole
    ended = [line for line in shown(whole, View(exits=True), width=110) if line.startswith("(ended) ")]
    assert [line.split()[1:3] + line.split()[-1:] for line in ended] == [
        ["IA32_TSC_DEADLINE", "write", "gone"],
        ["FS_BASE", "write", "gone"],
        ["IA32_XFD", "write", "gone"],
    ]
