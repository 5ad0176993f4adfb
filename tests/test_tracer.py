"""Tracing through reloads of kvm_intel and the lives of VMs, with a made-up kernel in place of the engine's."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tracer.errors import MsrtraceError
from tracer.layout import Layout, Symbol, Symbols
from tracer.snapshot import Call, Durations, Map, Outcome, Probe, Snapshot
from tracer.tracer import Tracer, layout_of, loaded_module
from tracer.vms import VmNames

TOGGLE = ("vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr", "vmx_msr_filter_changed")
HOOK = TOGGLE[2]
TSC = Call(0x10, "read", "disable", "vcpu_create", "vmx_vcpu_create")


class Kernel:
    """kvm_intel that is loaded and unloaded, and VMs whose calls each count once in the engine that is attached."""

    def __init__(self, proc: Path | None = None, *, by_vm: bool = False) -> None:
        self.proc, self.by_vm = proc, by_vm
        self.loads, self.module = 1, 1 if True else None
        self.functions: tuple[str, ...] = TOGGLE
        self.refuses = ""
        self.engines: list[Engine] = []

    def load(self) -> None:
        self.loads += 1
        self.loaded: int | None = self.loads
