# SPDX-License-Identifier: GPL-2.0-or-later
"""Snapshots for `top`, and what it shows of them."""

from __future__ import annotations

from dataclasses import replace

from tracer.live.table import Look, View
from tracer.live.top import Frame, Sample, Sampler
from tracer.live.view import lines
from tracer.model.module_change import ModuleChange
from tracer.model.snapshot import Call, Durations, Outcome, Probe, Snapshot
from tracer.model.state import State

TSC = Call(0x10, "read", "disable", "filter_change", "vmx_msr_filter_changed")


FS_READ = Call(0xC0000100, "read", "disable", "filter_change", "vmx_msr_filter_changed")


FS_WRITE = replace(FS_READ, access="write")


UNKNOWN = Call(0xDEADBEEF, "read_write", "enable", "vcpu_create", "vmx_vcpu_create")


PROBE = Probe("vmx_msr_filter_changed", "vmx_msr_filter_changed", True, "")


HOST = "kvm1 6.1.0-53-amd64"


def times(count: int, each: float = 1e-4) -> Durations:
    return Durations(count, count * each, (count, *[0] * 24))


def outcome(calls: int, redundant: int | None) -> Outcome:
    return Outcome(calls, redundant, *((None,) * 3 if redundant is None else (calls - redundant, 0, 0)))


def snapshot(times_over: int = 1) -> Snapshot:
    """Ten times `times_over` filter updates of three calls each, and other calls."""
    n = 10 * times_over
    return Snapshot(
        "toggle",
        calls={
            TSC: outcome(n, n),
            FS_READ: outcome(n, n // 2),
            FS_WRITE: outcome(n, 0),
            replace(FS_READ, caller="vmx_msr_filter_changed.isra.0"): outcome(0, 0),
            UNKNOWN: outcome(times_over, 0),
        },
        updates={0: times(n)},
        probes=(PROBE,),
    )


class Kernel:
    """A source of snapshots with a clock of its own."""

    def __init__(self, *readings: Snapshot | Exception) -> None:
        self.readings = list(readings)
        self.now = 1000.0
        self.events: list[ModuleChange] = []
        self.states: list[State | Exception | None] = []

    def snapshot(self, patience: float = 0) -> Snapshot:
        reading = self.readings.pop(0)
        self.now += 0.25  # reading takes time, each time the same
        if isinstance(reading, Exception):
            raise reading
        return reading

    def follow(self) -> ModuleChange | None:
        return self.events.pop(0) if self.events else None

    state_problem = ""

    def state(self) -> State | None:
        """The next state."""
        reading = self.states.pop(0)
        if isinstance(reading, Exception):
            raise reading
        return reading

    def sampler(self) -> Sampler:
        return Sampler(self, lambda: self.now, lambda: "15:04:05")


def shown(sample: Sample | Frame, view: View | None = None, width: int = 80, height: int | None = None) -> list[str]:
    if isinstance(sample, Frame):
        sample = Sample("15:04:05", sample, sample)
    return lines(sample, view or View(), Look(width, height), HOST)
