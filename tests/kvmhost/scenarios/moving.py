# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel moves under msrtrace: `moving.py [NAME...]`, each a function here. tests/kvmhost/test_moving.py judges."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from faulty import counted, known_workload, run, start_workload
from guest import STOCK, Msrtrace, kernel_state, load, output_of, scrape, until, vendor
from kerneltracer import VENDORS

#: bpftrace and perf, which the image has not (bench.py).
TOOLS = Path("/in/tools")
IN_A_ROW = 20  #: reloads
SETTLED_SECONDS = 5
SWITCHES = 20  #: of a CPU, at least
#: So that what one CPU does, while the other is offline, fits into the kernel tracer's buffer of one.
PACED = ["--threads", "--vcpus", "2", "--updates", "61", "--initial-run", "--interval", "50"]
#: What both msrtrace and the witness probe.
PROBED = {function for vendor in VENDORS for function in (*vendor.calls, *vendor.updates)}
SECOND = "127.0.0.1:9754"  #: where another msrtrace listens


def reloads() -> Any:
    """The module is unloaded and loaded, both variants in turn, with clients all the time.

    IN_A_ROW loads come as fast as they can, while msrtrace is at whatever it is at; then it is waited for, and VMs get
    updates.
    """
    before = kernel_state()
    msrtrace = Msrtrace("--backend", "kprobe")
    footprints = [msrtrace.footprint()]
    over, scrapes = threading.Event(), [0]

    def client() -> None:
        while not over.is_set():
            scrape()
            scrapes[0] += 1
            time.sleep(1)

    thread = threading.Thread(target=client)
    thread.start()
    times, variants = int(os.environ["RELOADS"]), ("unpatched", "patched")
    counted_on, probes = dict.fromkeys(variants, 0), _probes()
    refused: list[int] = []  # how often, of each time that rmmod was
    assert probes
    try:
        for number in range(times):
            variant = variants[number // IN_A_ROW % 2 ^ number % 2]
            refused += filter(None, [load(variant)])
            if (number + 1) % IN_A_ROW == 0:
                _until_attached(len(probes))
                known_workload()
                counted_on[variant] += 1
                footprints.append(msrtrace.footprint())
    finally:
        over.set()
        thread.join()
    found = {"times": times, "refused": refused, "counted": counted_on, "scrapes": scrapes[0], "after": scrape()}
    ended = msrtrace.end()
    load(STOCK[vendor().name])
    found |= {"status": ended["status"], "log": ended["log"][-3000:]}
    return found | {"footprints": footprints, "kernel": [before, kernel_state()]}


def _until_attached(number: int) -> None:
    """Until so many probes have been there for a while: it may still take what it attached for an older module's."""
    since = time.monotonic()

    def settled() -> bool:
        nonlocal since
        if len(_probes()) != number:
            since = time.monotonic()
        return time.monotonic() - since > SETTLED_SECONDS

    until(settled)


def _probes() -> list[str]:
    """The kprobes on the module that is loaded; those on one that was unloaded are gone."""
    lines = Path("/sys/kernel/debug/kprobes/list").read_text().splitlines()
    return [line for line in lines if vendor().module in line.split() and "[GONE]" not in line]


def cpus_come_and_go() -> Any:
    """A CPU that goes offline and comes online without a pause."""
    online = Path("/sys/devices/system/cpu/cpu1/online")
    found: dict[str, Any] = {"switches": 0}
    over = threading.Event()

    def switch() -> None:
        while not over.is_set():
            for value in "01":
                online.write_text(value)
                found["switches"] += 1
                scrape()

    msrtrace = Msrtrace()
    with counted("hotplug", found):
        thread = threading.Thread(target=switch)
        thread.start()
        found["workloads"] = []
        while len(found["workloads"]) < 4 or found["switches"] < SWITCHES:
            found["workloads"].append(start_workload(*PACED).wait())
        over.set()
        thread.join()
    return found | msrtrace.end()


def vcpus_migrate() -> Any:
    """Threads of vCPUs that are moved to the other CPU without a pause: between entry and return of what is probed."""
    found: dict[str, Any] = {"moves": 0}
    msrtrace = Msrtrace()
    with counted("migrating", found):
        statuses = []
        for _ in range(4):
            running = start_workload()
            side = 0
            while running.poll() is None:
                with suppress(OSError):
                    for task in os.listdir(f"/proc/{running.pid}/task"):
                        side ^= 1
                        with suppress(OSError):
                            os.sched_setaffinity(int(task), {side})
                            found["moves"] += 1
            statuses.append(running.wait())
        found["workloads"] = statuses
    return found | msrtrace.end()


def clocks_jump() -> Any:
    """The wall clock jumps by a day and back, many times; then a suspend, through which VMs live.

    All of a suspend is done but the sleep itself (Documentation/power/basic-pm-debugging.rst, "core"): processes are
    frozen, the other CPU goes offline, and clocks stop, of which the time since boot makes up for what has passed.
    """
    found: dict[str, Any] = {"jumps": 0}
    msrtrace = Msrtrace("--by-vm")
    with counted("clocks", found):
        running = start_workload()
        while running.poll() is None:
            for day in (86400, -86400):
                time.clock_settime(time.CLOCK_REALTIME, time.time() + day)
                found["jumps"] += 1
                time.sleep(0.005)
        found["workload"] = running.wait()
        again = start_workload("--threads", "--vms", "2", "--vcpus", "2", "--forever", "--interval", "5")
        until(lambda: f'pid="{again.pid}"' in scrape())
        asleep = _asleep()
        found["awake"] = scrape()
        Path("/sys/power/pm_test").write_text("core")
        Path("/sys/power/state").write_text("mem")
        found["asleep"] = _asleep() - asleep
        found["awake again"] = scrape()
        time.sleep(2)
        again.terminate()
        found["workload again"] = again.wait()
    return found | msrtrace.end()


def _asleep() -> float:
    """How long this machine has been suspended since its boot, in seconds."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


def probes_switched_off() -> Any:
    """kprobes and ftrace are switched off and on, under each backend; each time VMs get updates."""
    switches = {
        "kprobes": Path("/sys/kernel/debug/kprobes/enabled"),
        "ftrace": Path("/proc/sys/kernel/ftrace_enabled"),
    }
    found: dict[str, Any] = {}
    begun = Path("/tmp/recording")
    recording = ["sh", "-c", f"touch {begun}; exec sleep 600"]
    for backend in ("kprobe", "fentry"):
        for name, switch in switches.items():
            msrtrace = Msrtrace("--backend", backend)
            one: dict[str, Any] = {}
            for moment, value in (("on", "1"), ("off", "0"), ("on again", "1")):
                if moment == "off":
                    report = subprocess.Popen(
                        ["msrtrace", "report", "--backend", backend, "-o", "/tmp/switched.json", "--", *recording],
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                    until(begun.exists)
                    begun.unlink()
                switch.write_text(value)
                time.sleep(1)
                known_workload()
                one[moment] = scrape()
            report.send_signal(signal.SIGINT)
            _, errors = report.communicate(timeout=60)
            one["report"] = {"status": report.returncode, "errors": errors}
            one["report"] |= {"json": Path("/tmp/switched.json").read_text()}
            found[f"{backend}, {name}"] = one | msrtrace.end()
    return found


def other_tracers() -> Any:
    """Others on the same functions, beside the witness's kprobes: ftrace's function graph, perf, bpftrace, msrtrace."""
    tracing = Path("/sys/kernel/tracing")
    functions = (tracing / "available_filter_functions").read_text().splitlines()
    ours = [line.split()[0] for line in functions if line.endswith(f"[{vendor().module}]") and "msr" in line]
    others = {
        "perf": [f"{TOOLS}/bin/perf", "stat", "-a", "-e", "kvm:*"],
        # Each probe that bpftrace removes takes it a second.
        "bpftrace": [f"{TOOLS}/bin/bpftrace", "-e", _bpftrace([name for name in ours if name in PROBED])],
    }
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{TOOLS}/lib"}
    found: dict[str, Any] = {"traced": ours}
    for backend in ("kprobe", "fentry"):
        one: dict[str, Any] = {}
        msrtrace = Msrtrace("--backend", backend)
        (tracing / "set_ftrace_filter").write_text("\n".join(ours))
        (tracing / "current_tracer").write_text("function_graph")
        with counted(f"others-{backend}", one):
            started = {}
            for name, command in others.items():
                with Path(f"/tmp/{name}.log").open("w") as log:
                    started[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            second = Msrtrace("--web.listen-address", SECOND)
            until(lambda: "Attach" in Path("/tmp/bpftrace.log").read_text(), 60)
            time.sleep(5)
            one["workload"] = start_workload().wait()
            for name, process in started.items():
                one[name] = {"alive": process.poll() is None}
                one[name]["status"] = _interrupted(process)
                one[name]["log"] = Path(f"/tmp/{name}.log").read_text()[-2000:]
            one["second"] = scrape(SECOND)
            one["second ended"] = second.end()
            one["workload again"] = start_workload().wait()
        (tracing / "current_tracer").write_text("nop")
        (tracing / "set_ftrace_filter").write_text("")
        found[backend] = one | msrtrace.end()
    return found


def _interrupted(process: subprocess.Popen[bytes]) -> int:
    """The status after SIGINT, which is sent again after a minute.

    bpftrace (0.17) loses one that does not come while it is in epoll_wait() (poll_perf_events() of src/bpftrace.cpp).
    """
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        return process.wait(60)
    process.send_signal(signal.SIGINT)
    return process.wait(240)


def _bpftrace(functions: list[str]) -> str:
    probed = ", ".join(f"kprobe:{function}" for function in functions)
    returns = ", ".join(f"kretprobe:{function}" for function in functions)
    return f"{probed} {{ @calls[func] = count(); }} {returns} {{ @returns[func] = count(); }}"


def livepatched() -> Any:
    """A livepatch replaces the function that is probed most, and is taken back; under each backend."""
    patch = Path("/sys/kernel/livepatch/livepatch")
    found: dict[str, Any] = {}
    for backend in ("kprobe", "fentry"):
        one: dict[str, Any] = {}
        msrtrace = Msrtrace("--backend", backend)
        with counted(f"livepatched-{backend}", one):
            one["insmod"] = output_of("insmod", "/in/livepatch.ko")
            until(lambda: (patch / "transition").read_text() == "0\n", 60)
            one["enabled"] = (patch / "enabled").read_text()
            one["workload"] = start_workload().wait()
            (patch / "enabled").write_text("0")
            until(lambda: not patch.exists(), 60)
            one["workload again"] = start_workload().wait()
        until(lambda: Path("/sys/module/livepatch/refcnt").read_text() == "0\n", 60)  # later than its directory
        one["rmmod"] = output_of("rmmod", "livepatch")
        found[backend] = one | msrtrace.end()
    return found


def lockdown() -> Any:
    """Lockdown switched on while it runs: integrity, then confidentiality, which is for good. The last of all."""
    switch = Path("/sys/kernel/security/lockdown")
    if not switch.exists():
        subprocess.run(["mount", "-t", "securityfs", "none", "/sys/kernel/security"], check=True)
    found: dict[str, Any] = {}
    msrtrace = Msrtrace()
    for level in ("integrity", "confidentiality"):
        switch.write_text(level)
        one: dict[str, Any] = {"level": switch.read_text().strip(), "before": scrape()}
        known_workload()
        one["after"] = scrape()
        found[level] = one
    found["ended"] = msrtrace.end()
    found["start"] = output_of("timeout", "-s", "INT", "20", "msrtrace", "run")
    return found


SCENARIOS: list[Callable[[], Any]] = [
    cpus_come_and_go,
    vcpus_migrate,
    clocks_jump,
    probes_switched_off,
    other_tracers,
    livepatched,
    reloads,
    lockdown,
]

if __name__ == "__main__":
    run(SCENARIOS, sys.argv[1:])
