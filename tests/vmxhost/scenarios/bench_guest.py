"""What each tracer adds to a filter update: `bench_guest.py --only=WORD BACKENDS VARIANT...`, judged by bench.py.

WORD: in the names of the tracers; BACKENDS of msrtrace, with commas between them; VARIANT: of kvm_intel.

Every tracer looks at the same three functions while the workload runs, alone, and says afterwards what it counted.
/out/bench.json has for each variant and tracer `ticks` and, if it counts, `calls`, `redundant` (null: it cannot know)
and `updates`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from bcc import BPF
from guest import (
    MEASURED_UPDATES,
    Msrtrace,
    filter_update_ticks,
    load,
    output_of,
    record,
    scrape,
    ticks_in,
    ticks_workload,
)
from kerneltracer import TRACING, define
from metrics_text import Metrics

from tracer.btf import Btf

ENABLE, DISABLE, UPDATE = FUNCTIONS = (
    "vmx_enable_intercept_for_msr",
    "vmx_disable_intercept_for_msr",
    "vmx_msr_filter_changed",
)
CALLS = (ENABLE, DISABLE)
#: bpftrace and perf, which the image has not (bench.py).
TOOLS = Path("/in/tools")
GROUP = "bench"

COUNT = f"kprobe:{ENABLE},kprobe:{DISABLE},kprobe:{UPDATE} {{ @[probe, arg1, arg2] = count(); }}"
COUNT_BY_FENTRY = f"""
kfunc:kvm_intel:{ENABLE},kfunc:kvm_intel:{DISABLE} {{ @[probe, args->msr, args->type] = count(); }}
kfunc:kvm_intel:{UPDATE} {{ @updates = count(); }}"""
# As bpf/msrtrace.c does it, with what bpftrace has. MSRs outside the bitmap are left out: the workload names none.
BITS = "((*(uint8*)$byte >> $bit) & 1) | (((*(uint8*)($byte + 0x800) >> $bit) & 1) << 1)"
CLASSIFY = f"""
kprobe:{ENABLE},kprobe:{DISABLE} {{
  $msr = arg1 & 0xffffffff;
  $bit = $msr & 7;
  $byte = *(uint64*)(arg0 + BITMAP_OFFSET) + ($msr >= 0xc0000000 ? 0x400 : 0) + (($msr & 0x1fff) >> 3);
  @call[tid] = ($byte, $msr, arg2 & 3, {BITS});
}}
kretprobe:{ENABLE},kretprobe:{DISABLE} {{
  $call = @call[tid];
  $byte = $call.0;
  $bit = $call.1 & 7;
  $after = {BITS};
  @[probe, $call.1, $call.2, reg("ip"), (($call.3 ^ $after) & $call.2) == 0] = count();
  delete(@call[tid]);
}}
kprobe:{UPDATE} {{ @updates = count(); }}"""

EMPTY = "int empty(void *ctx) { return 0; }\n"
EMPTY_FENTRY = "".join(
    f"MODULE_{kind}_PROBE(kvm_intel, {function}, u64 vcpu) {{ return 0; }}\n"
    for kind in ("KFUNC", "KRETFUNC")
    for function in FUNCTIONS
)


def untraced() -> Any:
    """No tracer at all."""
    return {"ticks": filter_update_ticks()}


def msrtrace(*options: str) -> Any:
    """`msrtrace run OPTIONS`, up to where it serves."""
    tracer = Msrtrace(*options)
    ticks = filter_update_ticks()
    metrics = Metrics.of(scrape())
    ended = tracer.end()
    if ended["status"] or metrics.lost():
        raise RuntimeError(f"{metrics.lost()} {ended}")
    [(info, _)] = metrics.named("msrtrace_build_info")
    return {
        "ticks": ticks,
        "backend": info["backend"],
        "calls": metrics.calls().total(),
        "redundant": metrics.redundant().total(),
        "updates": metrics.updates(),
    }


def tool(*command: str) -> str:
    """Run one of TOOLS, which runs the workload; what both printed. Raises with what it said instead."""
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{TOOLS}/lib"}
    done = output_of(f"{TOOLS}/bin/{command[0]}", *command[1:], env=environment)
    if done["status"]:
        raise RuntimeError(done)
    return str(done["stdout"])


def bpftrace(program: str) -> Any:
    """bpftrace with PROGRAM. It counts in `@`, keyed by the probe first and, with five keys, by redundancy last.

    Updates are in `@` too, or in `@updates`.
    """
    out = Path("/tmp/bpftrace.json")
    text = tool("bpftrace", "-f", "json", "-o", str(out), "-e", program, "-c", " ".join(ticks_workload()))
    rows = [json.loads(line) for line in out.read_text().splitlines() if line]
    maps = {name: counts for row in rows if row["type"] == "map" for name, counts in row["data"].items()}
    found = {"ticks": ticks_in(text), "calls": 0, "redundant": None, "updates": maps.get("@updates", 0)}
    for keys, count in maps["@"].items():
        probe, *others = keys.split(",")
        found["updates" if probe.endswith(UPDATE) else "calls"] += count
        if len(others) == 4:
            found["redundant"] = (found["redundant"] or 0) + int(others[3]) * count
    return found


def classify() -> Any:
    """What msrtrace knows of a call, by bpftrace."""
    return bpftrace(CLASSIFY.replace("BITMAP_OFFSET", str(Btf.of_module("kvm_intel").bitmap_offset())))


def kprobe_events() -> None:
    """Define a kprobe event of each function; none is enabled."""
    define([f"p:{GROUP}/{function} {function} msr=%si:u32 type=%dx:u32" for function in FUNCTIONS])


def counted(counts: dict[str, int]) -> dict[str, Any]:
    """Counts by function as `calls` and `updates`; what the calls changed is not known."""
    return {"calls": sum(counts[f] for f in CALLS), "redundant": None, "updates": counts[UPDATE]}


def perf() -> Any:
    """`perf stat` on the events: it counts how often each was hit, on all CPUs."""
    kprobe_events()
    try:
        out = Path("/tmp/perf.csv")
        events = [word for function in FUNCTIONS for word in ("-e", f"{GROUP}:{function}")]
        text = tool("perf", "stat", "-a", "-x", ",", "-o", str(out), *events, "--", *ticks_workload())
    finally:
        (TRACING / "kprobe_events").write_text("")
    found = re.findall(rf"^(\d+),,{GROUP}:(\w+),", out.read_text(), re.M)
    return {"ticks": ticks_in(text), **counted({function: int(count) for count, function in found})}


def histogram() -> Any:
    """A `hist` trigger on each event, keyed by MSR and type: the kernel's own table of counts."""
    kprobe_events()
    folders = {function: TRACING / "events" / GROUP / function for function in FUNCTIONS}
    trigger = "hist:keys=msr,type"
    try:
        for folder in folders.values():
            (folder / "trigger").write_text(trigger)
        ticks = filter_update_ticks()
        found = {f: re.search(r"Hits: (\d+)", (folder / "hist").read_text()) for f, folder in folders.items()}
        for folder in folders.values():
            (folder / "trigger").write_text(f"!{trigger}")
    finally:
        (TRACING / "kprobe_events").write_text("")
    return {"ticks": ticks, **counted({function: int(hits[1]) for function, hits in found.items() if hits})}


class Empty(BPF):  # type: ignore[misc]
    """Programs that do nothing: compiled at once, attached when told. They count nothing either."""

    def _trace_autoload(self) -> None:
        """Attach nothing yet."""

    def kprobe(self) -> Any:
        """At the entry of every function."""
        for function in FUNCTIONS:
            self.attach_kprobe(event=function.encode(), fn_name=b"empty")
        return self._measured()

    def kprobe_pair(self) -> Any:
        """At the entry and at the return."""
        for function in FUNCTIONS:
            self.attach_kretprobe(event=function.encode(), fn_name=b"empty")
        return self.kprobe()

    def fentry(self) -> Any:
        """At the entry, without a breakpoint."""
        for function in FUNCTIONS:
            self.attach_kfunc(fn_name=f"kfunc__kvm_intel__{function}".encode())
        return self._measured()

    def fentry_pair(self) -> Any:
        """At the entry and at the return, without breakpoints."""
        for function in FUNCTIONS:
            self.attach_kretfunc(fn_name=f"kretfunc__kvm_intel__{function}".encode())
        return self.fentry()

    def _measured(self) -> Any:
        ticks = filter_update_ticks()
        for detach, attached in (
            (self.detach_kprobe_event, self.kprobe_fds),
            (self.detach_kfunc, self.kfunc_entry_fds),
            (self.detach_kretfunc, self.kfunc_exit_fds),
        ):
            for name in list(attached):
                detach(name)
        for program in self.funcs.values():  # a loaded fentry program holds kvm_intel
            os.close(program.fd)
        self.funcs.clear()
        return {"ticks": ticks}


@cache
def empty(fentry: bool) -> Empty:
    """The programs that do nothing, those for FENTRY among them or not."""
    return Empty(text=EMPTY + (EMPTY_FENTRY if fentry else ""))


def tracers(backends: list[str]) -> dict[str, Callable[[], Any]]:
    """All there is on this host, in the order of the table."""
    fentry = "fentry" in backends
    found: dict[str, Callable[[], Any]] = {"none": untraced}
    if "--backend" in output_of("msrtrace", "run", "--help")["stdout"]:
        for backend in backends:
            found[f"msrtrace, {backend}"] = partial(msrtrace, "--backend", backend)
    else:
        found["msrtrace"] = msrtrace
    found["bpftrace, the same by kprobe and kretprobe"] = classify
    found["bpftrace, counts by kprobe"] = partial(bpftrace, COUNT)
    found["bpftrace, counts by fentry"] = partial(bpftrace, COUNT_BY_FENTRY)
    found["perf stat on kprobe events"] = perf
    found["ftrace hist on kprobe events"] = histogram
    found["empty kprobe"] = lambda: empty(fentry).kprobe()
    found["empty kprobe and kretprobe"] = lambda: empty(fentry).kprobe_pair()
    if fentry:
        found["empty fentry"] = lambda: empty(fentry).fentry()
        found["empty fentry and fexit"] = lambda: empty(fentry).fentry_pair()
    return found


def main() -> None:
    """Measure, saying on standard output how far it is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("backends")
    parser.add_argument("variants", nargs="+")
    args = parser.parse_args()
    every = tracers(args.backends.split(","))
    measures = {name: measure for name, measure in every.items() if args.only in name or name == "none"}
    results: dict[str, dict[str, Any]] = {}
    for variant in args.variants:
        load(variant)
        results[variant] = {}
        for name, measure in measures.items():
            found = results[variant][name] = measure()
            print(f"{variant}: {name}: {found}", flush=True)
    record("bench", {"release": os.uname().release, "updates": MEASURED_UPDATES, "results": results})


main()
