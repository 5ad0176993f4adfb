# SPDX-License-Identifier: GPL-2.0-or-later
"""What each tracer adds to a filter update: `bench_guest.py --only=WORD VARIANT...`, judged by bench.py.

WORD: in the names of the tracers; VARIANT: of the KVM module. Names that begin with `part` are of PARTS.

Every tracer looks at the same functions while the workload runs, alone, and says afterwards what it counted.
/out/bench.json says how long a start and a scrape take (not with --only), and has for each variant and tracer `ticks`
and, if it counts, `calls`, `redundant` (null: it cannot know) and `updates`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from guest import (
    MEASURED_UPDATES,
    Msrtrace,
    bitmap_offset,
    filter_update_ticks,
    output_of,
    record,
    scrape,
    ticks_in,
    ticks_workload,
    until,
    vendor,
)
from guest import (
    load as load_module,
)
from kerneltracer import TRACING, define
from metrics_text import Metrics

from tracer.kernel.btf import Btf
from tracer.model.options import BACKENDS
from tracer.program.bcc_library import attach_kprobe, attach_tracing
from tracer.program.cache import cache_dir
from tracer.program.compiler import compiled
from tracer.program.loading import load
from tracer.program.program import Program, Target, Variant


@dataclass(frozen=True)
class Traced:
    """The functions that every tracer looks at, before 6.17, and where it has what it counts calls by.

    :param kprobe_key: in bpftrace's language; `fentry_key` at fentry; `fields` of a kprobe event
    :param msr: in bpftrace's language, at a kprobe; `named` are the directions that a call names
    :param byte: where in the kernel's memory a byte with bits of $msr is, and `bit` where in that they are
    :param bits: of $byte from $bit on: reads, writes
    """

    module: str
    calls: tuple[str, ...]
    update: str
    kprobe_key: str
    fentry_key: str
    fields: str
    msr: str
    named: str
    byte: str
    bit: str
    bits: str

    @property
    def functions(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.calls, self.update)

    def everywhere(self, probe: str) -> str:
        """The calls as bpftrace's list of probes of that kind."""
        return ",".join(f"{probe}:{function}" for function in self.calls)


TRACED = {
    "vmx": Traced(
        "kvm_intel",
        ("vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr"),
        "vmx_msr_filter_changed",
        kprobe_key="arg1, arg2",
        fentry_key="args->msr, args->type",
        fields="msr=%si:u32 type=%dx:u32",
        msr="arg1",
        named="arg2 & 3",
        byte="*(uint64*)(arg0 + BITMAP_OFFSET) + ($msr >= 0xc0000000 ? 0x400 : 0) + (($msr & 0x1fff) >> 3)",
        bit="$msr & 7",
        bits="((*(uint8*)$byte >> $bit) & 1) | (((*(uint8*)($byte + 0x800) >> $bit) & 1) << 1)",
    ),
    "svm": Traced(
        "kvm_amd",
        ("set_msr_interception_bitmap",),
        "svm_msr_filter_changed",
        kprobe_key="arg2, arg3, arg4",
        fentry_key="args->msr, args->read, args->write",
        fields="msr=%dx:u32 read=%cx:u32 write=%r8:u32",
        msr="arg2",
        named="3",
        byte="arg1 + ($msr >= 0xc0010000 ? 0x1000 : $msr >= 0xc0000000 ? 0x800 : 0) + (($msr & 0x1fff) >> 2)",
        bit="($msr & 3) << 1",
        bits="(*(uint8*)$byte >> $bit) & 3",
    ),
}
HERE = TRACED[vendor().name]
#: bpftrace and perf, which the image has not (bench.py).
TOOLS = Path("/in/tools")
GROUP = "bench"
VMS, SCRAPES = 5, 12

COUNT = f"{HERE.everywhere('kprobe')},kprobe:{HERE.update} {{ @[probe, {HERE.kprobe_key}] = count(); }}"
COUNT_BY_FENTRY = f"""
{HERE.everywhere(f"kfunc:{HERE.module}")} {{ @[probe, {HERE.fentry_key}] = count(); }}
kfunc:{HERE.module}:{HERE.update} {{ @updates = count(); }}"""
# As bpf/msrtrace.c does it, with what bpftrace has. MSRs outside the bitmap are left out: the workload names none.
CLASSIFY = f"""
{HERE.everywhere("kprobe")} {{
  $msr = {HERE.msr} & 0xffffffff;
  $bit = {HERE.bit};
  $byte = {HERE.byte};
  @call[tid] = ($byte, $msr, {HERE.named}, {HERE.bits});
}}
{HERE.everywhere("kretprobe")} {{
  $call = @call[tid];
  $byte = $call.0;
  $msr = $call.1;
  $bit = {HERE.bit};
  $after = {HERE.bits};
  @[probe, $msr, $call.2, reg("ip"), (($call.3 ^ $after) & $call.2) == 0] = count();
  delete(@call[tid]);
}}
kprobe:{HERE.update} {{ @updates = count(); }}"""

#: What a program may do, each in a program of its own that does nothing else. A key of 0 is in every map.
PARTS = {
    "nothing": "",
    "read a byte": "bpf_probe_read_kernel(&value, 1, (void *)PT_REGS_SP(ctx));",
    "read 8 bytes": "bpf_probe_read_kernel(&value, 8, (void *)PT_REGS_SP(ctx));",
    "read 8 bytes twice": "bpf_probe_read_kernel(&value, 8, (void *)PT_REGS_SP(ctx));" * 2,
    "read 64 bytes": "bpf_probe_read_kernel(wide, 64, (void *)PT_REGS_SP(ctx));",
    "find in an array": "array.lookup(&zero);",
    "find in a per-CPU array": "per_cpu_array.lookup(&zero);",
    "find in a hash, key of 8 bytes": "hash.lookup(&key);",
    "find in a hash, key of 24 bytes": "wide_hash.lookup((struct wide *)wide);",
    "find in a per-CPU hash": "per_cpu_hash.lookup(&key);",
    "find in an LRU hash": "lru_hash.lookup(&key);",
    "add to a hash, and delete": "key = 1; hash.update(&key, &value); hash.delete(&key);",
    "pid and tid": "bpf_get_current_pid_tgid();",
    "time": "bpf_ktime_get_ns();",
    "stack of 3 frames": "bpf_get_stack(ctx, wide, 24, 0);",
    "add 1 atomically": "__sync_fetch_and_add(&value, 1);",
}
EMPTY = """#include <uapi/linux/ptrace.h>
struct wide { u64 words[3]; };
BPF_ARRAY(array, u64, 1);
BPF_PERCPU_ARRAY(per_cpu_array, u64, 1);
BPF_HASH(hash, u64, u64, 1024);
BPF_HASH(wide_hash, struct wide, u64, 1024);
BPF_TABLE("percpu_hash", u64, u64, per_cpu_hash, 1024);
BPF_TABLE("lru_hash", u64, u64, lru_hash, 1024);
int empty(void *ctx) { return 0; }
"""
PART = """int part_{number}(struct pt_regs *ctx)
{{
	u64 key = 0, value = 0, wide[8] = {{}};
	int zero = 0;
	{what}
	return 0;
}}
"""


def untraced() -> Any:
    """No tracer at all."""
    return {"ticks": filter_update_ticks()}


def msrtrace(*options: str) -> Any:
    """`msrtrace run OPTIONS`, up to where it serves."""
    tracer = Msrtrace(*options)
    ticks = filter_update_ticks()
    metrics = Metrics.of(scrape()).of_host()  # with --by-vm the VM's own series went with it
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


def starts() -> dict[str, float]:
    """How many seconds of the guest's it takes msrtrace to serve: the first time, and when its program is kept."""
    shutil.rmtree(cache_dir(), ignore_errors=True)
    found = {}
    for which in ("first", "later"):
        tracer = Msrtrace()
        scrape()
        found[which] = tracer.started_in
        tracer.end()
    return found


def scrapes() -> dict[str, float]:
    """How many seconds of the guest's a scrape takes, with VMS of two vCPUs each that have been updated: the least."""
    found = {}
    for options in ((), ("--by-vm",)):
        tracer = Msrtrace("--backend", "kprobe", *options)
        command = f"workload --processes --vms {VMS} --vcpus 2 --updates 3 --initial-run --hold 600"
        vms = subprocess.Popen(command.split(), stdout=subprocess.DEVNULL)
        prefix = "msrtrace_host_" if options else "msrtrace_"
        until(lambda: f"{prefix}filter_updates_total {VMS * 2 * 3}.0" in scrape())  # noqa: B023 (called in this round)
        seconds = []
        for _ in range(SCRAPES):
            began = time.monotonic()
            scrape()
            seconds.append(time.monotonic() - began)
        found[" ".join(options) or "plain"] = min(seconds)
        vms.terminate()
        vms.wait()
        tracer.end()
    return found


def tool(*command: str) -> str:
    """Run one of TOOLS, which runs a program; what both printed. Raises with what it said instead."""
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
        found["updates" if probe.endswith(HERE.update) else "calls"] += count
        if len(others) == 4:
            found["redundant"] = (found["redundant"] or 0) + int(others[3]) * count
    return found


def classify() -> Any:
    """What msrtrace knows of a call, by bpftrace."""
    return bpftrace(CLASSIFY.replace("BITMAP_OFFSET", str(bitmap_offset())))


@contextmanager
def kprobe_events() -> Iterator[None]:
    """A kprobe event of each function is defined; none is enabled."""
    define([f"p:{GROUP}/{function} {function} {HERE.fields}" for function in HERE.functions])
    try:
        yield
    finally:
        (TRACING / "kprobe_events").write_text("")


def counted(counts: dict[str, int]) -> dict[str, Any]:
    """Counts by function as `calls` and `updates`; what the calls changed is not known."""
    return {"calls": sum(counts[f] for f in HERE.calls), "redundant": None, "updates": counts[HERE.update]}


def perf() -> Any:
    """`perf stat` on the events: it counts how often each was hit, on all CPUs."""
    out = Path("/tmp/perf.csv")
    events = [word for function in HERE.functions for word in ("-e", f"{GROUP}:{function}")]
    with kprobe_events():
        text = tool("perf", "stat", "-a", "-x", ",", "-o", str(out), *events, "--", *ticks_workload())
    found = re.findall(rf"^(\d+),,{GROUP}:(\w+),", out.read_text(), re.M)
    return {"ticks": ticks_in(text), **counted({function: int(count) for count, function in found})}


def histogram() -> Any:
    """A `hist` trigger on each event, keyed by what a call is counted by: the kernel's own table of counts."""
    events = {function: TRACING / "events" / GROUP / function for function in HERE.functions}
    keys = re.findall(r"(\w+)=", HERE.fields)
    trigger = f"hist:keys={','.join(keys)}"
    with kprobe_events():
        for event in events.values():
            (event / "trigger").write_text(trigger)
        ticks = filter_update_ticks()
        found = {f: re.search(r"Hits: (\d+)", (event / "hist").read_text()) for f, event in events.items()}
        for event in events.values():
            (event / "trigger").write_text(f"!{trigger}")
    return {"ticks": ticks, **counted({function: int(hits[1]) for function, hits in found.items() if hits})}


@cache
def programs() -> Program:
    """Those of EMPTY and of PARTS, compiled at once."""
    source = Path("/tmp/programs.c")
    source.write_text(EMPTY + "".join(PART.format(number=n, what=what) for n, what in enumerate(PARTS.values())))
    return compiled(source, {})


def attached(*kinds: str, function: str = "empty") -> Any:
    """A program at every function, by KINDS: `kprobe`, `kretprobe`, `fentry`, `fexit`. It counts nothing."""
    with programs_at(HERE.module, HERE.functions, *kinds, function=function):
        return {"ticks": filter_update_ticks()}


@contextmanager
def programs_at(module: str, functions: Sequence[str], *kinds: str, function: str = "empty") -> Iterator[None]:
    """A program at each of a module's functions, by KINDS."""
    btf = Btf.of_module(module)
    links, everything = [], []
    for kind in kinds:
        for traced in functions:
            tracing = kind.startswith("f")
            target = Target(kind, btf.function_id(traced), module) if tracing else Target("kprobe")
            loaded = load(programs(), Variant(kind, {}, {function: target}))
            everything.append(loaded)
            for one in loaded.maps.values():
                one.update(bytes(one.key_size), bytes(one.value_size * (os.cpu_count() or 1)))
            fd = loaded.functions[function]
            returns = kind == "kretprobe"
            links.append(attach_tracing(fd) if tracing else attach_kprobe(fd, traced, at_return=returns))
    yield
    for link in links:
        os.close(link)
    for loaded in everything:  # a loaded fentry program holds the module
        loaded.close()


def tracers() -> dict[str, Callable[[], Any]]:
    """All there is on this host, in the order of the table."""
    found: dict[str, Callable[[], Any]] = {"none": untraced}
    for backend in BACKENDS:
        found[f"msrtrace, {backend}"] = partial(msrtrace, "--backend", backend)
        found[f"msrtrace --by-vm, {backend}"] = partial(msrtrace, "--by-vm", "--backend", backend)
    found["bpftrace, the same by kprobe and kretprobe"] = classify
    found["bpftrace, counts by kprobe"] = partial(bpftrace, COUNT)
    found["bpftrace, counts by fentry"] = partial(bpftrace, COUNT_BY_FENTRY)
    found["perf stat on kprobe events"] = perf
    found["ftrace hist on kprobe events"] = histogram
    found["empty kprobe"] = partial(attached, "kprobe")
    found["empty kprobe and kretprobe"] = partial(attached, "kretprobe", "kprobe")
    found["empty fentry"] = partial(attached, "fentry")
    found["empty fentry and fexit"] = partial(attached, "fexit", "fentry")
    for number, part in enumerate(PARTS):
        found[f"part: {part}"] = partial(attached, "kprobe", function=f"part_{number}")
    return found


def main() -> None:
    """Measure, saying on standard output how far it is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("variants", nargs="+")
    args = parser.parse_args()
    every = tracers()
    measures = {
        name: measure
        for name, measure in every.items()
        if name == "none" or (args.only in name and name.startswith("part") == args.only.startswith("part"))
    }
    results: dict[str, dict[str, Any]] = {}
    for variant in args.variants:
        load_module(variant)
        results[variant] = {}
        for name, measure in measures.items():
            found = results[variant][name] = measure()
            print(f"{variant}: {name}: {found}", flush=True)
    found = {"release": os.uname().release, "updates": MEASURED_UPDATES, "results": results}
    record(
        "bench", found | ({"starts": {}, "scrapes": {}} if args.only else {"starts": starts(), "scrapes": scrapes()})
    )


if __name__ == "__main__":
    main()
