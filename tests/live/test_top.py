# SPDX-License-Identifier: GPL-2.0-or-later
"""What `top` samples: figures, readings that fail, reloads."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from sampled import PROBE, TSC, Kernel, outcome, shown, snapshot, times

from tracer.live.top import SORTS, Sampler, between, frame
from tracer.model.module_change import ModuleChange
from tracer.model.snapshot import Outcome, Probe, Snapshot, VmInfo


def notes(sampler: Sampler) -> tuple[str, ...]:
    return sampler.sample.notes


def test_rates_are_per_measured_second() -> None:
    kernel = Kernel(snapshot(1), snapshot(5))
    sampler = kernel.sampler()
    assert sampler.sample.interval is None
    kernel.now += 1.75  # and 0.25 of reading: two seconds from one reading's begin to the next one's
    sampler.take()
    made = sampler.sample.interval
    assert made
    assert made.seconds == 2.0
    assert made.calls == Outcome(124, 60, 64, 0, 0)
    assert made.rate(124) == 62.0
    assert made.all_updates == times(40)
    assert made.per_update == (Fraction(3), Fraction(3, 2))
    whole = sampler.sample.whole
    assert whole
    assert (whole.seconds, whole.whole, whole.calls) == (2.0, True, Outcome(155, 75, 80, 0, 0))


def test_no_time_has_no_rate() -> None:
    assert frame(snapshot(), 0.0).rate(5) is None


def test_rows_are_summed_over_the_other_parts() -> None:
    made = frame(snapshot(), 1.0)
    assert made.rows
    assert len(made.rows) == 4
    merged = made.grouped({"msr"}, "msr")
    assert [(row.msr, row.access, row.outcome.calls) for row in merged] == [
        (0x10, None, 10),
        (0xC0000100, None, 20),
        (0xDEADBEEF, None, 1),
    ]
    assert merged[1].share == Fraction(1, 4)


def test_rows_are_sorted_with_unknown_last() -> None:
    calls = {
        replace(TSC, msr=1, cause="x2apic"): outcome(100, 1),
        replace(TSC, msr=2, cause="lbr"): outcome(10, 5),
        replace(TSC, msr=3, cause="pt"): outcome(2, 2),
        replace(TSC, msr=4, cause="cpuid_update"): outcome(50, None),
    }
    made = frame(Snapshot("toggle", calls=calls), 1.0)
    orders = {sort: [row.msr for row in made.grouped({"msr", "cause"}, sort)] for sort in SORTS}
    assert orders == {
        "calls": [1, 4, 2, 3],
        "redundant": [2, 3, 1, 4],
        "share": [3, 2, 1, 4],
        "msr": [1, 2, 3, 4],
        "cause": [4, 2, 3, 1],
    }


def test_a_vm_that_ends_does_not_look_like_a_burst_of_calls() -> None:
    """The tracer moves the counts of an ended VM to pid 0."""
    a, b = replace(TSC, pid=7), replace(TSC, pid=8)
    before = Snapshot("toggle", calls={a: outcome(1000, 0), b: outcome(5, 0)}, updates={7: times(9)}, by_vm=True)
    before = replace(before, vms={7: VmInfo("a"), 8: VmInfo("b")}, recalcs={7: times(3)})
    later = Snapshot("toggle", calls={TSC: outcome(1010, 0), b: outcome(6, 0)}, updates={0: times(10)}, by_vm=True)
    later = replace(later, vms={8: VmInfo("b")}, recalcs={0: times(3)})
    apart = between(later, before)
    assert apart.calls == {TSC: outcome(10, 0), b: outcome(1, 0)}
    assert {pid: d.count for pid, d in apart.updates.items()} == {0: 1}
    assert apart.recalcs == {}


def test_calls_per_update_are_shown_only_if_nothing_was_missed() -> None:
    whole = snapshot()
    assert frame(whole, 1.0).per_update == (Fraction(3), Fraction(3, 2))
    for less in (
        replace(whole, calls_observable=False),
        replace(whole, updates_observable=False),
        replace(whole, updates={}),
        replace(whole, unpaired_returns=1),
        replace(whole, probes=(PROBE, Probe("vmx_vcpu_create", None, False, ""))),
    ):
        assert frame(less, 1.0).per_update is None
    unknown = replace(whole, redundancy="unknown", calls={TSC: Outcome(10)})
    assert frame(unknown, 1.0).per_update == (Fraction(1), None)
    assert frame(replace(unknown, calls={}), 1.0).per_update == (Fraction(0), None)


def test_a_failed_reading_leaves_the_older_numbers_and_a_note() -> None:
    kernel = Kernel(snapshot(1), snapshot(2), OSError("no\x1b[31m\nway"), snapshot(6))
    sampler = kernel.sampler()
    sampler.take()
    old = sampler.sample
    sampler.take()
    assert (sampler.sample.interval, sampler.sample.whole) == (old.interval, old.whole)
    [note] = notes(sampler)
    assert note == "reading failed at 15:04:05, the numbers are older: OSError: no\x1b[31m\nway"
    text = "\n".join(shown(sampler.sample))
    assert r"OSError: no\x1b[31m\nway" in text
    sampler.take()
    assert notes(sampler) == ()
    made = sampler.sample.interval
    assert made  # from the last reading that was good
    assert made.seconds == 0.5
    assert made.calls == Outcome(124, 60, 64, 0, 0)


def test_a_failed_first_reading_shows_no_numbers() -> None:
    kernel = Kernel(OSError("x"), snapshot(1), snapshot(2))
    sampler = kernel.sampler()
    text = "\n".join(shown(sampler.sample))
    assert "the first numbers come after one interval" in text
    assert "OSError: x" in text
    sampler.take()
    assert sampler.sample.interval is None
    sampler.take()
    assert sampler.sample.interval


def test_a_reload_has_a_note() -> None:
    kernel = Kernel(snapshot())
    sampler = kernel.sampler()
    sampler.follow()
    assert notes(sampler) == ()
    kernel.events = [ModuleChange("kvm_intel", traced=False)]
    sampler.follow()
    assert notes(sampler) == (
        "kvm_intel was unloaded; its counts are kept, and it is traced again when it comes back (15:04:05)",
    )
    sampler.follow()
    assert len(notes(sampler)) == 1
    kernel.events = [ModuleChange("kvm_intel", traced=False, problem="why")]
    sampler.follow()
    assert notes(sampler) == ("kvm_intel is not traced, trying again in 10 s: why (15:04:05)",)
    kernel.events = [ModuleChange("kvm_intel", traced=True)]
    sampler.follow()
    assert notes(sampler) == ("kvm_intel was loaded again (15:04:05)",)
