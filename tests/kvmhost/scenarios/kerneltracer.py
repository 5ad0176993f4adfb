# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own tracer as a witness: kprobe events in tracefs that record every call and the bitmap around it.

Runs in the guest. What it records is read by tests/kvmhost/ringbuffer.py on the machine that runs the tests, and
judged by witness.py. It
shares nothing with msrtrace but the offset of the bitmap, which is checked against pahole elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
GROUP = "witness"
PAGE = 4096
#: Of each CPU; the stress run fills 14 MB of one. What does not fit is counted, and then the test fails.
BUFFER_KB = "49152"
# The 64-bit words of a quarter of the bitmap that hold bits KVM's callers name, as MSR // 64 from the
# quarter's base: TSC, SPEC_CTRL and PRED_CMD; FLUSH_CMD; SYSENTER; XFD; residencies; PT; C1_RES; LBRs; x2APIC.
LOW_WORDS: tuple[int, ...] = (0x0, 0x1, 0x4, 0x5, 0x7, 0xF, 0x15, 0x16, 0x19, 0x1A, 0x1B, 0x20)
HIGH_WORDS: tuple[int, ...] = (0x2, 0x4)
WORDS = [
    (name, base + 8 * w)
    for name, base, words in (
        ("low_r", 0x000, LOW_WORDS),
        ("high_r", 0x400, HIGH_WORDS),
        ("low_w", 0x800, LOW_WORDS),
        ("high_w", 0xC00, HIGH_WORDS),
    )
    for w in words
]
# At a return the argument registers are gone. Kernels from 6.9 on keep the arguments for return events ($arg1).
# On older ones the caller holds the vCPU in a register that it may rely on; the entry event says in which, and all
# of them are recorded at the return.
ARGUMENT = "arg1"
SAVED = ("bx", "bp", "r12", "r13", "r14", "r15")
CALLS = ("vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr", "vmx_set_intercept_for_msr")
UPDATES = ("vmx_msr_filter_changed", "vmx_recalc_intercepts")
OTHERS = ("vmx_vcpu_create", "kvm_vm_ioctl_set_msr_filter")


def words_at(offset: int, place: str) -> str:
    """Fetch arguments for every word of the bitmap of the vCPU in PLACE, a register or an argument."""
    return " ".join(f"{name}_{at:x}=+{at}(+{offset}({place})):x64" for name, at in WORDS)


def call_events(function: str, offset: int) -> tuple[list[str], list[str]]:
    """The kprobe events of a call: as new kernels can do it, and as old ones can."""
    saved = " ".join(f"{r}=%{r}:x64" for r in SAVED)
    args = f"vcpu=%di:x64 msr=%si:u32 type=%dx:u32 set=%cx:u8 {saved} {words_at(offset, '%di')}"
    entry = f"p:{GROUP}/in_{function} {function} {args}"
    returned = f"r64:{GROUP}/out_{ARGUMENT}_{function} {function} {words_at(offset, f'${ARGUMENT}')}"
    each = [f"r64:{GROUP}/out_{r}_{function} {function} {words_at(offset, f'%{r}')}" for r in SAVED]
    return [entry, returned], [entry, *each]


def other_events(functions: set[str]) -> list[str]:
    """The kprobe events beside the calls."""
    events = []
    for function in UPDATES:
        if function in functions:
            events.append(f"p:{GROUP}/update_in {function} vcpu=%di:x64 kvm=+0(%di):x64")
            events.append(f"r64:{GROUP}/update_out {function}")
    for function in OTHERS:
        if function in functions:
            events.append(f"p:{GROUP}/{function} {function} first=%di:x64 kvm=+0(%di):x64")
    return events


def define(events: list[str]) -> None:
    """Make EVENTS, or, with an OSError, none of them."""
    made = []
    # Python's own mode "a" seeks, which this file refuses.
    file = os.open(TRACING / "kprobe_events", os.O_WRONLY | os.O_APPEND)
    try:
        for event in events:
            os.write(file, f"{event}\n".encode())
            made.append(event.split()[0].partition(":")[2])
    except OSError:
        for name in made:
            os.write(file, f"-:{name}\n".encode())
        raise
    finally:
        os.close(file)


def pages(pipe: Path) -> bytes:
    """All that a CPU's trace_pipe_raw has, in whole pages."""
    found = []
    file = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        while page := os.read(file, PAGE):
            found.append(page)
    except BlockingIOError:
        pass  # nothing is left
    finally:
        os.close(file)
    return b"".join(found)


class KernelTracer:
    """Records from `with` to its end; what was recorded and how much was lost goes to OUT."""

    def __init__(self, offset: int | None, out: Path) -> None:
        self.offset, self.out = offset, out
        self.symbols: list[str] = []  # of the modules, as /proc/kallsyms has them

    def __enter__(self) -> KernelTracer:
        symbols = Path("/proc/kallsyms").read_text().splitlines()
        self.symbols = [line for line in symbols if line.endswith(("\t[kvm_intel]", "\t[kvm]"))]
        functions = {line.split()[2] for line in self.symbols}
        (TRACING / "buffer_size_kb").write_text(BUFFER_KB)
        define(other_events(functions))
        for function in CALLS:
            if function in functions and self.offset is not None:
                new, old = call_events(function, self.offset)
                try:
                    define(new)
                except OSError:
                    define(old)
        (TRACING / "trace").write_text("")
        (TRACING / f"events/{GROUP}/enable").write_text("1")
        return self

    def __exit__(self, *_: object) -> None:
        (TRACING / f"events/{GROUP}/enable").write_text("0")
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "profile").write_text((TRACING / "kprobe_profile").read_text())
        stats = [path.read_text() for path in sorted(TRACING.glob("per_cpu/cpu*/stats"))]
        (self.out / "stats").write_text("".join(stats))
        formats = [path.read_text() for path in sorted(TRACING.glob(f"events/{GROUP}/*/format"))]
        (self.out / "formats").write_text("".join(formats))
        (self.out / "symbols").write_text("\n".join(self.symbols))
        for cpu in TRACING.glob("per_cpu/cpu*"):
            (self.out / f"{cpu.name}.raw").write_bytes(pages(cpu / "trace_pipe_raw"))
        (TRACING / "trace").write_text("")
        (TRACING / "kprobe_events").write_text("")
        (TRACING / "buffer_size_kb").write_text("1024")
