# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own tracer as a witness: kprobe events in tracefs that record every call and the bitmap around it.

Runs in the guest. What it records is read by tests/kvmhost/ringbuffer.py on the machine that runs the tests, and
judged by witness.py. It
shares nothing with msrtrace but the offset of the bitmap, which is checked against pahole elsewhere.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

TRACING = Path("/sys/kernel/tracing")
GROUP = "witness"
PAGE = 4096
#: Of each CPU; the stress run fills 14 MB of one. What does not fit is counted, and then the test fails.
BUFFER_KB = "49152"
#: At a return the argument registers are gone. Kernels from 6.9 on keep the arguments for return events ($arg1).
#: On older ones the caller holds the vCPU, or the bitmap that it names, in a register that it may rely on; the entry
#: event says in which, and at the return all of them are looked through, either way.
KEPT = "args"
SAVED = ("bx", "bp", "r12", "r13", "r14", "r15")
NAMED = "map"  # follows the register
FILTER_SET = "kvm_vm_ioctl_set_msr_filter"
#: Ends every ioctl on a vCPU's descriptor, and its creation (vcpu_put(), virt/kvm/kvm_main.c).
PUT = "kvm_arch_vcpu_put"
#: Bytes of a bitmap in an event, and in an array of it, of which 64 elements are the most (MAX_ARRAY_LEN).
PART, ARRAY = 2048, 512
CREATE = "kvm_arch_vcpu_create"  # a vCPU: all that a vendor does for that is inside
#: How far a structure that is not described is searched for a bitmap, and how many words an event has room for.
SEARCHED_BYTES, WORDS_A_SEARCH = 0x3000, 96


@dataclass(frozen=True)
class Vendor:
    """What there is to watch in a vendor's KVM module, and where its bitmap has the bits of an MSR.

    :param module: as /proc/kallsyms spells it
    :param calls: the functions whose every call is recorded
    :param updates: those that recompute a vCPU's bitmap; of each also the part that a compiler has split off
    :param ranges: of MSRs, 0x2000 each: the first, and the bit of the bitmap with which its own begin
    :param stride: from the bit of an MSR to that of the next
    :param write: from the bit for reads to that for writes
    :param msrs: those that KVM's callers name
    """

    module: str
    calls: tuple[str, ...]
    updates: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    stride: int
    write: int
    msrs: tuple[int, ...]

    def bits(self, msr: int) -> tuple[int, int] | None:
        """Which bits of the bitmap are for reads and for writes of MSR; None for an MSR without bits."""
        for first, bit in self.ranges:
            if first <= msr < first + 0x2000:
                read = bit + self.stride * (msr - first)
                return read, read + self.write
        return None

    @property
    def bitmap_bytes(self) -> int:
        """How long the bitmap is: the last range's read bits, or write bits."""
        _, last = self.ranges[-1]
        return (last + self.stride * 0x2000 + (self.write if self.stride == 1 else 0)) // 8

    @property
    def words(self) -> list[int]:
        """The 64-bit words of the bitmap that have bits of `msrs`, by their numbers."""
        return sorted({bit // 64 for msr in self.msrs for bit in self.bits(msr) or ()})


#: Intel SDM vol. 3, 25.6.9: read bits of low and of high MSRs, then their write bits.
INTEL = Vendor(
    "kvm_intel",
    calls=("vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr", "vmx_set_intercept_for_msr"),
    updates=("vmx_msr_filter_changed", "vmx_recalc_msr_intercepts", "vmx_recalc_intercepts"),
    ranges=((0, 0), (0xC0000000, 8 * 0x400)),
    stride=1,
    write=8 * 0x800,
    # TSC, SPEC_CTRL, PRED_CMD; APERF, MPERF; FLUSH_CMD; SYSENTER; XFD; residencies; PT; C1_RES; LBRs; CET; x2APIC;
    # EFER, FS_BASE to TSC_AUX.
    msrs=(
        *(0x10, 0x48, 0x49, 0xE7, 0xE8, 0x10B, 0x174, 0x175, 0x176, 0x1C4, 0x1C5, 0x3FC, 0x3FD, 0x3FE),
        *(0x560, 0x561, 0x570, 0x571, 0x572, 0x580, 0x660, 0x680, 0x6A0, 0x6A2, 0x6A4, 0x6A5, 0x6A6, 0x6A7, 0x6C0),
        *range(0x800, 0x840),
        *(0xC0000080, 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103),
    ),
)
#: AMD APM vol. 2, 15.11: the two bits of an MSR side by side.
AMD = Vendor(
    "kvm_amd",
    calls=("set_msr_interception_bitmap", "svm_set_intercept_for_msr"),
    updates=("svm_msr_filter_changed", "svm_recalc_msr_intercepts", "svm_recalc_intercepts"),
    ranges=((0, 0), (0xC0000000, 8 * 0x800), (0xC0010000, 8 * 0x1000)),
    stride=2,
    write=1,
    # SPEC_CTRL, PRED_CMD; APERF, MPERF; FLUSH_CMD; SYSENTER; DEBUGCTL, LBRs; PAT; CET; XSS; x2APIC; EFER, STAR to
    # SYSCALL_MASK; FS_BASE to TSC_AUX; PMU; SEV_ES_GHCB.
    msrs=(
        *(0x48, 0x49, 0xE7, 0xE8, 0x10B, 0x174, 0x175, 0x176, 0x1D9, 0x1DB, 0x1DC, 0x1DD, 0x1DE, 0x277),
        *(0x6A0, 0x6A2, 0x6A4, 0x6A5, 0x6A6, 0x6A7, 0xDA0),
        *range(0x800, 0x840),
        *(0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084),
        *(0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103),
        *(0xC0000300, 0xC0000301, 0xC0000302, 0xC0010130, 0xC0010200, 0xC0010201),
    ),
)
VENDORS = (INTEL, AMD)
#: By their arguments. `pass` names both directions, and passes those through that are not 0.
TOGGLE, PASS = "vcpu=%di:x64 msr=%si:u32 type=%dx:u32 set=%cx:u8", "vcpu=%di:x64 msr=%dx:u32 read=%cx:u32 write=%r8:u32"
PASSES = "set_msr_interception_bitmap"


def words_at(vendor: Vendor, bitmap: str) -> str:
    """Fetch arguments for every word of the bitmap at BITMAP, an address as a fetch argument."""
    return " ".join(f"w{word:x}=+{8 * word}({bitmap}):x64" for word in vendor.words)


def call_events(vendor: Vendor, function: str, offset: int, nested: bool) -> tuple[list[str], list[str]]:
    """The kprobe events of a call: as new kernels can do it, and as old ones can.

    OFFSET is where a vCPU has the address of its bitmap, which is `own` at the entry. A call may name another, that for
    NESTED guests: then it is looked at.
    """
    own, saved = f"+{offset}(%di)", " ".join(f"{r}=%{r}:x64" for r in SAVED)
    passes = function == PASSES
    arguments, bitmap, kept = (PASS, "%si", "$arg2") if passes else (TOGGLE, own, f"+{offset}($arg1)")
    arguments += f" bitmap={bitmap}:x64 own={own}:x64 {saved}"
    entry = f"p:{GROUP}/in_{function} {function} {arguments} {words_at(vendor, bitmap)}"
    returned = f"r64:{GROUP}/out_{KEPT}_{function} {function} {words_at(vendor, kept)}"
    ways = {r: f"+{offset}(%{r})" for r in SAVED}
    if passes and nested:
        ways |= {f"{r}{NAMED}": f"%{r}" for r in SAVED}
    each = [f"r64:{GROUP}/out_{way}_{function} {function} {words_at(vendor, at)}" for way, at in ways.items()]
    return [entry, returned], [entry, *each]


def other_events(vendor: Vendor, functions: set[str]) -> list[str]:
    """The kprobe events beside the calls."""
    events = []
    for update in vendor.updates:
        # All ways into a function lead through the part that was split off, and some lead into that alone.
        for function in (f"{update}.part.0", update):
            if function in functions:
                events.append(f"p:{GROUP}/update_in {function} vcpu=%di:x64 kvm=+0(%di):x64")
                events.append(f"r64:{GROUP}/update_out {function}")
                break
    for name, function in (("create_in", CREATE), ("filter_set", FILTER_SET)):
        if function in functions:
            events.append(f"p:{GROUP}/{name} {function} first=%di:x64 kvm=+0(%di):x64")
    # A creation sleeps: as many may be under way as there are VMMs (MAXACTIVE of Documentation/trace/kprobetrace.rst).
    return [*events, f"r512:{GROUP}/create_out {CREATE} error=$retval:u32"]


def append(path: Path, lines: list[str]) -> None:
    """Write LINES to a file of tracefs, which loses what it has where it is opened to be truncated."""
    # Python's own mode "a" seeks, which these files refuse.
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        for line in lines:
            os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def define(events: list[str]) -> None:
    """Make EVENTS, or, with an OSError, none of them."""
    made: list[str] = []
    try:
        for event in events:
            append(TRACING / "kprobe_events", [event])
            made.append(event.split()[0].partition(":")[2])
    except OSError:
        append(TRACING / "kprobe_events", [f"-:{name}" for name in made])
        raise


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


def symbols_of_kvm() -> list[str]:
    """What /proc/kallsyms says of kvm and of a vendor's module."""
    marks = tuple(f"\t[{module}]" for module in ("kvm", *(vendor.module for vendor in VENDORS)))
    return [line for line in Path("/proc/kallsyms").read_text().splitlines() if line.endswith(marks)]


def search_offset() -> int | None:
    """Where a vCPU has the address of its bitmap, by a call that names it; None where none does.

    For kernels that do not describe their modules' structures (5.10). Makes a vCPU, and so calls.
    """
    if not any(line.split()[2] == PASSES for line in symbols_of_kvm()):
        return None
    starts = range(0, SEARCHED_BYTES, 8 * WORDS_A_SEARCH)
    fetch = {
        start: " ".join(f"at{o}=+{o}(%di):x64" for o in range(start, start + 8 * WORDS_A_SEARCH, 8)) for start in starts
    }
    define([f"p:{GROUP}/search_{start} {PASSES} bitmap=%si:x64 {words}" for start, words in fetch.items()])
    (TRACING / f"events/{GROUP}/enable").write_text("1")
    subprocess.run(["workload", "--updates", "0"], stdout=subprocess.DEVNULL, check=True)
    (TRACING / f"events/{GROUP}/enable").write_text("0")
    found = None
    for line in (TRACING / "trace").read_text().splitlines():
        values = dict(re.findall(r" (\w+)=(0x\w+)", line))
        named = [name for name, value in values.items() if name != "bitmap" and value == values["bitmap"]]
        found = int(named[0].removeprefix("at")) if named else found
    (TRACING / "trace").write_text("")
    (TRACING / "kprobe_events").write_text("")
    return found


class KernelTracer:
    """Records from `with` to its end; what was recorded and how much was lost goes to OUT.

    OFFSET: where a vCPU has the address of its bitmap; None: only updates are recorded. NESTED: bitmaps for nested
    guests are written, too.
    """

    def __init__(self, offset: int | None, out: Path, *, nested: bool = False) -> None:
        self.offset, self.out, self.nested = offset, out, nested
        self.symbols: list[str] = []  # of the modules, as /proc/kallsyms has them

    def __enter__(self) -> KernelTracer:
        self.symbols = symbols_of_kvm()
        functions = {line.split()[2] for line in self.symbols}
        [vendor] = [one for one in VENDORS if any(line.endswith(f"[{one.module}]") for line in self.symbols)]
        self._start(vendor, functions)
        return self

    def _start(self, vendor: Vendor, functions: set[str]) -> None:
        (TRACING / "buffer_size_kb").write_text(BUFFER_KB)
        self._define(vendor, functions)
        (TRACING / "trace").write_text("")
        (TRACING / f"events/{GROUP}/enable").write_text("1")

    def _define(self, vendor: Vendor, functions: set[str]) -> None:
        define(other_events(vendor, functions))
        for function in vendor.calls:
            if function in functions and self.offset is not None:
                new, old = call_events(vendor, function, self.offset, self.nested)
                try:
                    define(new)
                except OSError:
                    define(old)

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


#: Of a call: in how many places there may be counts, by process, MSR and caller; the most that a histogram has.
COUNTS_SIZE = 1 << 17


class KernelCounter(KernelTracer):
    """Counts in the kernel, by its tracer's histograms, where a record of every call would not fit into any buffer.

    Of each call its thread, MSR and caller, and, apart from these, its MSR and what it asks for; of each update its
    thread; of each creation of a vCPU its thread and whether it failed. The histograms go to OUT, one file each.
    """

    def __init__(self, out: Path) -> None:
        super().__init__(None, out)
        self._keys: dict[str, list[str]] = {}

    def _start(self, vendor: Vendor, functions: set[str]) -> None:
        """A histogram needs no event to be recorded (Documentation/trace/events.rst, 6.2: soft mode)."""
        for function in vendor.calls:
            if function in functions:
                passes = function == PASSES
                define([f"p:{GROUP}/in_{function} {function} {PASS if passes else TOGGLE} caller=+0(%sp):x64"])
                asked = "msr,read,write" if passes else "msr,type,set"
                self._keys[f"in_{function}"] = ["common_pid,msr,caller", asked]
        define(other_events(vendor, functions))
        self._keys |= {"update_in": ["common_pid"], "create_out": ["common_pid,error"]}
        for event, keys in self._keys.items():
            lines = [f"hist:keys={key}:size={COUNTS_SIZE}" for key in keys]
            append(TRACING / f"events/{GROUP}/{event}/trigger", lines)

    def __exit__(self, *_: object) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "symbols").write_text("\n".join(self.symbols))
        for event, keys in self._keys.items():
            (self.out / f"{event}.hist").write_text((TRACING / f"events/{GROUP}/{event}/hist").read_text())
            append(TRACING / f"events/{GROUP}/{event}/trigger", [f"!hist:keys={key}" for key in keys])
        (self.out / "profile").write_text((TRACING / "kprobe_profile").read_text())
        (TRACING / "kprobe_events").write_text("")


def part_events(vendor: Vendor, name: str, start: str, offset: int) -> list[str]:
    """Events of PUT called NAME_PART, with START and the whole bitmap whose address a vCPU has at OFFSET."""
    found = []
    for part in range(0, vendor.bitmap_bytes, PART):
        arrays = range(part, part + PART, ARRAY)
        words = [f"at{at}=+{at}(+{offset}(%di)):x64[{ARRAY // 8}]" for at in arrays]
        found.append(f"p:{GROUP}/{name}_{part} {PUT} {start} {' '.join(words)}")
    return found


class BitmapTracer(KernelTracer):
    """Records, whenever KVM has done what it was asked to with a vCPU, the vCPU's whole bitmap.

    An event has less room than a page: there is one for each part of PART bytes.

    :param id_offset: where a vCPU has its id
    """

    def __init__(self, offset: int | None, id_offset: int, out: Path) -> None:
        super().__init__(offset, out)
        self._id_offset = id_offset

    def _define(self, vendor: Vendor, functions: set[str]) -> None:
        assert PUT in functions
        start = f"vcpu=%di:x64 id=+{self._id_offset}(%di):s32"
        if self.offset is None:
            define([f"p:{GROUP}/part_0 {PUT} {start}"])
            return
        define(part_events(vendor, "part", start, self.offset))
