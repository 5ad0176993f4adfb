# SPDX-License-Identifier: GPL-2.0-or-later
"""All that the tests look at, collected in one boot: `everything.py [--vendor|--kernel] [--stress RUN,...] VARIANT...`.

VARIANT: of the KVM module, the stock one first. --kernel leaves out what is the same on every kernel, and --vendor also
what is the same for both vendors. RUN: of stress.py.

A scenario that breaks is recorded as broken and the others go on; the test that reads it then fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from attaching import attach_and_be_killed
from changing import compared, watched
from exits import exits
from guest import (
    OUT,
    Msrtrace,
    bitmap_offset,
    filter_update_ticks,
    kernel_state,
    load,
    output_of,
    record,
    scrape,
    until,
    vendor,
    workload,
)
from kerneltracer import KernelTracer
from nesting import nesting
from reporting import make_reports, report_command
from states import closing, own_bitmap_offset, states
from stress import stressed

import tracer

ARGUMENTS = argparse.ArgumentParser()
ARGUMENTS.add_argument("--vendor", action="store_true")
ARGUMENTS.add_argument("--kernel", action="store_true")
ARGUMENTS.add_argument("--stress", default="")
ARGUMENTS.add_argument("variants", nargs="+")
ARGS = ARGUMENTS.parse_args()
VARIANTS: list[str] = ARGS.variants
STOCK = VARIANTS[0]
HUNDRED, FEW = 100, 3
#: Command lines of what a scenario that breaks may leave running.
LEFT_BEHIND = "^(/usr/bin/python3 /usr/local/bin/msrtrace|workload|accesses)"


@contextmanager
def library_alone() -> Iterator[None]:
    """Of BCC the host has the library alone, and it has no kernel's headers: nothing can be compiled."""
    hidden = ("/usr/lib/python3/dist-packages/bcc", "/usr/src")
    for path in hidden:
        subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    try:
        yield
    finally:
        for path in hidden:
            subprocess.run(["umount", path], check=True)


def host() -> Any:
    """What this host is."""
    return {
        "headers": os.listdir("/usr/src"),
        "import bcc": output_of("python3", "-c", "from bcc import BPF"),
        "release": os.uname().release,
        "doctor": output_of("msrtrace", "doctor", "--json"),
        "kernel": where_the_kernel_is(),
    }


def where_the_kernel_is() -> Any:
    """Its virtual and its physical address, and whether its decompressor says that it chose them at random."""
    symbols = re.search(r"^(\w+) . _text$", Path("/proc/kallsyms").read_text(), re.M)
    code = re.search(r"^ *(\w+)-\w+ : Kernel code$", Path("/proc/iomem").read_text(), re.M)
    assert symbols
    assert code
    # boot_params.hdr.loadflags, bit 1, KASLR_FLAG: Documentation/arch/x86/boot.rst
    loadflags = Path("/sys/kernel/boot_params/data").read_bytes()[0x211]
    return {"virtual": int(symbols[1], 16), "physical": int(code[1], 16), "kaslr": bool(loadflags & 2)}


def counts() -> Any:
    """Prime numbers of everything, then all that the workload can do, on each variant in turn; one msrtrace sees it.

    Measured is what a filter update takes, before it starts and under it.
    """
    found: dict[str, Any] = {"scrapes": {}, "workload": {}, "witnessed": {}, "ticks": {"untraced": {}, "traced": {}}}
    for variant in reversed(VARIANTS):  # the stock one stays
        load(variant)
        found["ticks"]["untraced"][variant] = filter_update_ticks()
    offset = bitmap_offset()  # before anybody counts
    idle = kernel_state()
    msrtrace = Msrtrace("--backend", "kprobe")  # under which the module can be reloaded
    found["process"] = msrtrace.process_state()
    for number, variant in enumerate(VARIANTS):
        if number:
            load(variant)
            msrtrace.wait_for(f"{vendor().module} was loaded again", number)
        found["scrapes"][f"{variant} before"] = scrape()
        found["workload"][variant] = workload("--vms", 2, "--vcpus", 3, "--updates", 101, "--initial-run")
        found["scrapes"][f"{variant} after"] = scrape()
        # Before the witness: where it had a kprobe too, ours stays dearer (aggr_pre_handler(), kernel/kprobes.c).
        found["ticks"]["traced"][variant] = filter_update_ticks()
        found["scrapes"][f"{variant} measured"] = scrape()
        found["witnessed"][variant] = witnessed(variant, offset)
        found["scrapes"][f"{variant} witnessed"] = scrape()
    # Unloaded: nothing is attached and nothing is forgotten.
    unloaded = f"{vendor().module} was unloaded"
    already = msrtrace.said(unloaded)  # it may have looked while another variant was being loaded
    load("none")
    msrtrace.wait_for(unloaded, already + 1)
    found["scrapes"]["unloaded"] = scrape()
    load(STOCK)
    msrtrace.wait_for(f"{vendor().module} was loaded again", len(VARIANTS))
    found["scrapes"]["back"] = scrape()
    found["running"] = kernel_state()
    return found | msrtrace.end() | {"idle": idle, "left": kernel_state()}


def fentry() -> Any:
    """The same under the other backend, where there is one; else what msrtrace says when it is asked for."""
    load(STOCK)
    offset, asked_for = bitmap_offset(), ("--backend", "fentry")
    try:
        msrtrace = Msrtrace(*asked_for)
    except RuntimeError as error:
        return {"refused": str(error)}
    found: dict[str, Any] = {"scrapes": {}, "witnessed": {}, "traced": {}, "ended": {}}
    for number, variant in enumerate(VARIANTS):
        if number:
            load(variant)
            msrtrace = Msrtrace(*asked_for)
        found["scrapes"][f"{variant} after"] = scrape()
        found["traced"][variant] = filter_update_ticks()
        found["scrapes"][f"{variant} measured"] = scrape()
        found["witnessed"][variant] = witnessed(f"fentry-{variant}", offset)
        found["scrapes"][f"{variant} witnessed"] = scrape()
        found["process"] = msrtrace.process_state()
        found["unloading"] = output_of("rmmod", vendor().module)
        found["ended"][variant] = msrtrace.end()
    load(STOCK)
    return found | {"left": kernel_state()}


def witnessed(name: str, offset: int | None) -> Any:
    """Everything that the workload can do, under the eyes of the kernel's own tracer (see there): what it did."""
    with KernelTracer(offset, OUT / f"witness-{name}", nested=True):
        return [
            workload(*options.split())
            for options in (
                *(["--svme 2 --updates 2"] if vendor().name == "svm" else []),
                "--vcpus 2 --updates 7 --initial-run",
                "--updates 5 --deny-all",
                "--updates 3 --msr 0x10 --msr 0x48 --msr 0xc0000102 --msr 0x174 --spec-ctrl 5",
                "--updates 0 --spec-ctrl 3",
                "--cpuid 3 --updates 2",
                "--x2apic 2 --updates 2",
                "--threads --vms 2 --vcpus 2 --updates 5",
                "--create-vms 3 --vcpus 2 --updates 0",
            )
        ]


def stress() -> Any:
    """Each of the runs that were asked for."""
    load(STOCK)
    return {name: stressed(name) for name in ARGS.stress.split(",") if name}


def reports() -> Any:
    """A report of everything that the workload can do, on each variant."""
    return make_reports(VARIANTS)


def state() -> Any:
    """What `msrtrace state` says of VMs under all kinds of filters (see there)."""
    load(STOCK)
    return states(FEW if ARGS.vendor else HUNDRED)


def nested() -> Any:
    """What `msrtrace state` says of guests of guests (see there), where bitmaps can be read."""
    load(STOCK)
    return nesting() if own_bitmap_offset() is not None else {}


def changing() -> Any:
    """What `msrtrace state --watch` and `--diff` say of VMs that change one thing at a time."""
    load(STOCK)
    return {"watched": watched(readable=own_bitmap_offset() is not None), "compared": compared()}


def unknown_redundancy() -> Any:
    """A module without BTF: calls are counted; what they changed is known only where they name the bitmap."""
    load("nobtf")
    msrtrace = Msrtrace()
    did = workload("--vcpus", 2, "--updates", 7, "--initial-run")
    text = scrape()
    ended = msrtrace.end()
    load(STOCK)
    return {"scrape": text, "workload": did} | ended


def by_vm() -> Any:
    """Three VMs, two of them with names; one ends while the others go on."""
    load(STOCK)
    msrtrace = Msrtrace("--by-vm")
    uuid = "6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001"
    names = [("--", "-name", "guest=web,debug-threads=on", "-uuid", uuid), ("--", "--id", "function-7"), ()]
    vms = []
    for number, name in enumerate(names):
        options = ["--vcpus", "2", "--updates", str(3 + 2 * number), "--hold", "600", "--ready", f"/tmp/ready-{number}"]
        vms.append(subprocess.Popen(["workload", *options, *name]))
    until(lambda: re.findall(r"^msrtrace_filter_updates_total\{.*\} (\S+)$", scrape(), re.M).__len__() == 3)
    wanted = sum(2 * (3 + 2 * n) for n in range(3))
    until(lambda: sum(map(float, re.findall(r"^msrtrace_filter_updates_total\{.*\} (\S+)$", scrape(), re.M))) == wanted)
    all_there = scrape()
    vms[0].kill()
    vms[0].wait()
    one_gone = scrape()
    for vm in vms[1:]:
        vm.kill()
        vm.wait()
    none_left = scrape()
    found = {
        "pids": [vm.pid for vm in vms],
        "uuid": uuid,
        "all": all_there,
        "one gone": one_gone,
        "none left": none_left,
    }
    return found | a_hundred_vms(wanted) | msrtrace.end()


def by_vm_costs() -> Any:
    """What a filter update takes under --by-vm, and what was counted."""
    load(STOCK)
    found: dict[str, Any] = {}
    for backend in ("kprobe", "fentry"):
        try:
            msrtrace = Msrtrace("--by-vm", "--backend", backend)
        except RuntimeError as error:
            found[backend] = {"refused": str(error)}
            continue
        found[backend] = {"before": scrape(), "ticks": filter_update_ticks(), "after": scrape()} | msrtrace.end()
    return found


def a_hundred_vms(before: int) -> dict[str, Any]:
    """A hundred VMs more, alive at once and then gone; BEFORE updates were counted already."""
    workload = ["workload", "--processes", "--vms", str(HUNDRED), "--updates", "2", "--initial-run", "--hold", "600"]
    vms = subprocess.Popen(workload, stdout=subprocess.DEVNULL)
    total = f"msrtrace_host_filter_updates_total {before + 2 * HUNDRED}.0\n"
    until(lambda: total in scrape(), 300)
    found = {"hundred": scrape()}
    vms.send_signal(signal.SIGTERM)
    vms.wait()
    return found | {"hundred gone": scrape()}


def one_pid() -> Any:
    """Two VMs, of which one is traced."""
    load(STOCK)
    command = ["workload", "--updates", "5", "--hold", "600", "--go", "/tmp/go-pid"]
    vms = [subprocess.Popen([*command, "--ready", f"/tmp/pid-{n}"]) for n in range(2)]
    until(lambda: Path("/tmp/pid-0").exists() and Path("/tmp/pid-1").exists())
    msrtrace = Msrtrace("--pid", str(vms[0].pid))
    Path("/tmp/go-pid").touch()
    until(lambda: "msrtrace_filter_updates_total 5.0" in scrape())
    text = scrape()
    for vm in vms:
        vm.kill()
        vm.wait()
    return {"scrape": text} | msrtrace.end(signal.SIGTERM)


def killed() -> Any:
    """SIGKILL while VMs get filter updates; and which backend it has chosen itself."""
    load(STOCK)
    idle = kernel_state()
    msrtrace = Msrtrace()
    vm = subprocess.Popen(["workload", "--forever", "--interval", "20"])
    until(lambda: not re.search(r"^msrtrace_filter_updates_total 0", scrape(), re.M))
    running, text = kernel_state(), scrape()
    ended = msrtrace.end(signal.SIGKILL)
    time.sleep(0.5)
    left = kernel_state()
    vm.terminate()
    found = {"idle": idle, "running": running, "left": left, "workload": vm.wait()}
    return found | {"started_in": msrtrace.started_in, "scrape": text} | ended


def attaching() -> Any:
    """Kprobes as BCC's library attaches them, and processes that are killed meanwhile."""
    load(STOCK)
    return attach_and_be_killed()


def waits() -> Any:
    """--wait-module: started before the module is there."""
    load("none")
    msrtrace = Msrtrace("--wait-module", ready=f"waiting for {vendor().module}")
    load(STOCK)
    msrtrace.wait_for("serving")
    workload("--updates", 3)
    return {"scrape": scrape()} | msrtrace.end()


def compiles() -> Any:
    """An msrtrace that came without the compiled programs, and a host that has all that compiling takes."""
    load(STOCK)
    shutil.rmtree("/var/cache/msrtrace", ignore_errors=True)
    shipped = [*Path(tracer.__file__).parent.glob("bpf/*.bin")]
    for file in shipped:
        file.rename(file.with_suffix(".away"))
    try:
        doctor = output_of("msrtrace", "doctor", "--json")
        msrtrace = Msrtrace()
        workload("--updates", 3)
        found = {"scrape": scrape(), "cached": len(os.listdir("/var/cache/msrtrace"))} | msrtrace.end()
        return found | {"shipped": len(shipped), "doctor": doctor}
    finally:
        for file in shipped:
            file.with_suffix(".away").rename(file)


def not_root() -> Any:
    """Somebody who is not root, under the kernel's own rights. All else that a user can get wrong needs no kernel."""
    nobody = ("setpriv", "--reuid=65534", "--clear-groups", "msrtrace")
    return {command: output_of(*nobody, command) for command in ("run", "doctor")}


def main() -> None:
    """Run every scenario; what they return goes to /out/NAME.json. Ends with a status that pytest looks for."""
    scenarios: list[Callable[[], Any]] = [host, counts, fentry, stress, reports, state, nested, exits]
    scenarios += [unknown_redundancy, killed]
    if not ARGS.vendor:
        scenarios += [attaching, closing, changing, by_vm_costs]
    if not (ARGS.vendor or ARGS.kernel):
        scenarios += [by_vm, one_pid, waits, not_root, report_command, compiles]
    only = os.environ.get("ONLY", "").split()
    for scenario in scenarios:
        name = scenario.__name__
        if only and name not in only:
            continue
        started = time.monotonic()
        try:
            with nullcontext() if scenario is compiles else library_alone():
                found = scenario()
        except Exception:
            found = {"broken": traceback.format_exc()}
            print(found["broken"], flush=True)
            subprocess.run(["pkill", "-9", "-f", LEFT_BEHIND], check=False)
        record(name, found)
        print(
            f"{name}: {'BROKEN' if 'broken' in found else 'collected'} in {time.monotonic() - started:.1f} s",
            flush=True,
        )
    sys.exit(37)


main()
