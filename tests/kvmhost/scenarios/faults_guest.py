# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults that a fleet brings within a year: `faults_guest.py NAME...`, each of which is a function here.

They only collect; tests/kvmhost/test_faults.py judges. Wherever something is counted meanwhile, the kernel's own tracer
counts beside msrtrace (kerneltracer.py).
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from guest import OUT, STOCK, Msrtrace, bitmap_offset, kernel_state, load, output_of, record, scrape, until, vendor
from guest import workload as run_workload
from kerneltracer import KernelTracer

#: Two VMs of two vCPUs each, in threads that update at once.
UPDATES = 61
WORKLOAD = ["--threads", "--vms", "2", "--vcpus", "2", "--updates", str(UPDATES), "--initial-run"]
STOPPED_SECONDS = 60
CGROUP = Path("/sys/fs/cgroup")
CHANCE = random.Random(1)


@contextmanager
def counted(name: str, found: dict[str, Any]) -> Iterator[None]:
    """What happens in the context is counted by the kernel's own tracer, too; the scrapes around it."""
    offset = bitmap_offset()
    found["before"] = scrape()
    with KernelTracer(offset, OUT / f"witness-{name}"):
        yield
    found["after"] = scrape()


def start_workload(*options: str) -> subprocess.Popen[str]:
    """The workload, in the background."""
    return subprocess.Popen(["workload", *(options or WORKLOAD)], stdout=subprocess.PIPE, text=True)


@contextmanager
def updating() -> Iterator[None]:
    """A VM with a filter update every 5 ms."""
    vm = subprocess.Popen(["workload", "--forever", "--interval", "5"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        vm.terminate()
        vm.wait()


def start_of_run(*words: str, **options: Any) -> subprocess.Popen[bytes]:
    """`msrtrace run`, not waited for."""
    return subprocess.Popen(
        [*words, "msrtrace", "run"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **options,
    )


def kill(process: subprocess.Popen[Any]) -> None:
    """SIGKILL, and wait until the kernel has what the process held."""
    process.kill()
    process.wait()


def left_after(before: dict[str, Any]) -> dict[str, Any]:
    """What is in the kernel beside what was before. Descriptors of a killed process are closed a moment later."""
    with suppress(RuntimeError):
        until(lambda: kernel_state() == before, 5)
    now = kernel_state()
    return {} if now == before else now


def counts_again() -> dict[str, Any]:
    """A start after the fault, and what it counts of a known number of updates."""
    msrtrace = Msrtrace()
    run_workload("--updates", 7, "--initial-run", "--vcpus", 3)
    text = scrape()
    return {"again": text} | msrtrace.end()


def killed_at_each_step_of_a_start() -> Any:
    """SIGKILL at 20 moments spread evenly over a start, with VMs under updates; then one that is left alone."""
    before = kernel_state()
    begun = Msrtrace()
    begun.end()
    kills, left = 20, []
    with updating():
        for number in range(kills):
            process = start_of_run()
            time.sleep(begun.started_in * 1.1 * number / kills)
            kill(process)
            if after := left_after(before):
                left.append(after)
    return {"kills": kills, "seconds": begun.started_in, "left": left} | counts_again()


def killed_in_a_scrape() -> Any:
    """SIGKILL while two clients scrape without a pause and VMs get updates."""
    before, kills, left, scrapes = kernel_state(), 6, [], [0]
    with updating():
        for _ in range(kills):
            msrtrace = Msrtrace()
            over = threading.Event()

            def client(over: threading.Event = over) -> None:
                while not over.is_set():
                    with suppress(OSError, RuntimeError):
                        scrape()
                        scrapes[0] += 1

            clients = [threading.Thread(target=client) for _ in range(2)]
            for thread in clients:
                thread.start()
            time.sleep(CHANCE.uniform(0.05, 0.4))
            kill(msrtrace.process)
            over.set()
            for thread in clients:
                thread.join()
            if after := left_after(before):
                left.append(after)
    return {"kills": kills, "scrapes": scrapes[0], "left": left} | counts_again()


def killed_in_a_reload() -> Any:
    """SIGKILL at random moments while it follows a reload of the module."""
    before, kills, left = kernel_state(), 6, []
    for _ in range(kills):
        msrtrace = Msrtrace("--backend", "kprobe")
        load(STOCK[vendor().name])
        time.sleep(CHANCE.uniform(0, 1.5))
        kill(msrtrace.process)
        if after := left_after(before):
            left.append(after)
    return {"kills": kills, "left": left} | counts_again()


def killed_at_a_reports_last_write() -> Any:
    """SIGKILL around the end of a report that replaces another; and what is in its place then."""
    directory = Path("/tmp/reports")
    directory.mkdir(exist_ok=True)
    file = directory / "report.json"
    command = ["msrtrace", "report", "--label", "new", "-o", str(file), "--", "true"]
    begun = time.monotonic()
    done = output_of(*command)
    takes = time.monotonic() - begun
    whole, kills, states = file.read_bytes(), 12, []
    for number in range(kills):
        file.write_bytes(whole.replace(b'"new"', b'"old"'))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Most in the last fifth, where the file is written.
        time.sleep(takes * (0.8 + 0.3 * number / kills))
        process.kill()
        process.wait()
        with suppress(ValueError):
            states.append(json.loads(file.read_text())["label"])
    return {"first": done, "kills": kills, "states": states, "beside": sorted(os.listdir(directory))}


def stopped_for_a_minute() -> Any:
    """SIGSTOP, everything that the workload does, and SIGCONT."""
    found: dict[str, Any] = {}
    msrtrace = Msrtrace()
    with counted("stopped", found):
        os.kill(msrtrace.process.pid, signal.SIGSTOP)
        running = start_workload()
        time.sleep(STOPPED_SECONDS)
        found["workload"] = running.wait()
        os.kill(msrtrace.process.pid, signal.SIGCONT)
    return found | {"seconds": STOPPED_SECONDS} | msrtrace.end()


def few_descriptors() -> Any:
    """RLIMIT_NOFILE at several values: which of them suffice, and what is said of the others."""
    found: dict[str, Any] = {}
    before = kernel_state()
    for limit in (8, 12, 16, 20, 24, 32, 64):
        done = output_of("prlimit", f"--nofile={limit}", "timeout", "-s", "INT", "15", "msrtrace", "run")
        found[str(limit)] = done
    return {"limits": found, "left": left_after(before)}


def descriptors_run_out() -> Any:
    """A limit of 40, and 60 clients that keep their connections; then they leave."""
    import socket

    found: dict[str, Any] = {}
    msrtrace = Msrtrace()
    with counted("descriptors", found):
        subprocess.run(["prlimit", "--nofile=40", "--pid", str(msrtrace.process.pid)], check=True)
        clients = [socket.create_connection(("127.0.0.1", 9753), timeout=5) for _ in range(60)]
        running = start_workload()
        found["workload"] = running.wait()
        found["alive"] = msrtrace.process.poll() is None
        for client in clients:
            client.close()
        until(_answers, 60)
    return found | msrtrace.end()


def _answers() -> bool:
    with suppress(OSError, RuntimeError):
        return bool(scrape())
    return False


def little_memory() -> Any:
    """A memory cgroup: what `run` takes in 40 MB, and what is left when it is killed for memory."""
    if not (CGROUP / "cgroup.controllers").exists():
        subprocess.run(["mount", "-t", "cgroup2", "none", CGROUP], check=True)
    with suppress(OSError):
        (CGROUP / "cgroup.subtree_control").write_text("+memory")
    group = CGROUP / "little"
    group.mkdir(exist_ok=True)
    (group / "memory.swap.max").write_text("0")
    before = kernel_state()
    # The kernel tells of a process that it kills with a trace of its stack, which is no trouble here.
    subprocess.run(["dmesg", "--console-level", "emerg"], check=True)
    found: dict[str, Any] = {"log before": output_of("dmesg")["stdout"]}
    for megabytes in (40, 16):
        (group / "memory.max").write_text(str(megabytes << 20))
        enter = ["sh", "-c", f"echo $$ > {group}/cgroup.procs; exec msrtrace run"]
        log = Path(f"/tmp/little-{megabytes}.log")
        with log.open("w") as out:
            process = subprocess.Popen(enter, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        with suppress(RuntimeError):
            until(lambda log=log, process=process: "serving" in log.read_text() or process.poll() is not None, 60)
        one: dict[str, Any] = {"alive": process.poll() is None}
        if one["alive"]:
            run_workload("--updates", 7, "--initial-run", "--vcpus", 3)
            one["scrape"] = scrape()
            one["peak"] = int((group / "memory.peak").read_text()) if (group / "memory.peak").exists() else None
            process.send_signal(signal.SIGINT)
        one["status"] = process.wait(60)
        one["log"] = log.read_text()
        one["events"] = (group / "memory.events").read_text()
        one["left"] = left_after(before)
        found[str(megabytes)] = one
    found["log"] = output_of("dmesg")["stdout"].removeprefix(found["log before"])
    subprocess.run(["dmesg", "--clear", "--console-level", "warn"], check=True)
    return found


def full_and_read_only() -> Any:
    """A cache and a place for reports that are full, or read-only."""
    found: dict[str, Any] = {}
    for name, options in (("full", "size=16k"), ("read-only", "size=1m")):
        place = Path(f"/tmp/{name}")
        place.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], check=True)
        (place / "old.json").write_text("{}")
        if name == "full":
            with suppress(OSError):
                (place / "fill").write_bytes(b"x" * (1 << 20))
        else:
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        environment = {**os.environ, "CACHE_DIRECTORY": str(place)}
        report = output_of("msrtrace", "report", "-o", str(place / "old.json"), "--", "true", env=environment)
        found[name] = {"report": report, "old": (place / "old.json").read_text(), "there": sorted(os.listdir(place))}
        subprocess.run(["umount", place], check=True)
    return found


def reloads(times: int = 30) -> Any:
    """The module is unloaded and loaded, both variants in turn, with VMs in between and clients all the time."""
    msrtrace = Msrtrace("--backend", "kprobe")
    over, scrapes = threading.Event(), [0]

    def client() -> None:
        while not over.is_set():
            scrape()
            scrapes[0] += 1
            time.sleep(0.2)

    thread = threading.Thread(target=client)
    thread.start()
    variants = os.environ.get("VARIANTS", STOCK[vendor().name]).split(",")
    expected: list[dict[str, Any]] = []
    try:
        for number in range(times):
            variant = variants[number % len(variants)]
            load(variant)
            msrtrace.wait_for(f"{vendor().module} was loaded again", number + 1)
            did = run_workload("--updates", 3, "--initial-run", "--vcpus", 2)
            expected.append({"variant": variant, **did})
    finally:
        over.set()
        thread.join()
    descriptors = len(os.listdir(f"/proc/{msrtrace.process.pid}/fd"))
    found = {"times": times, "did": expected, "scrapes": scrapes[0], "after": scrape(), "descriptors": descriptors}
    load(STOCK[vendor().name])
    msrtrace.wait_for(f"{vendor().module} was loaded again", times + 1)
    memory = msrtrace.process_state()
    ended = msrtrace.end()
    return found | {"status": ended["status"], "log": ended["log"][-3000:], "memory": memory, "left": kernel_state()}


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
        found["workloads"] = [start_workload().wait() for _ in range(4)]
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
    """The wall clock jumps by a day and back, many times, and all processes are frozen for a while, as by a suspend."""
    found: dict[str, Any] = {"jumps": 0}
    msrtrace = Msrtrace()
    found["start"] = re.findall(r"^process_start_time_seconds (\S+)", scrape(), re.M)
    with counted("clocks", found):
        running = start_workload()
        while running.poll() is None:
            for day in (86400, -86400):
                time.clock_settime(time.CLOCK_REALTIME, time.time() + day)
                found["jumps"] += 1
                time.sleep(0.005)
        found["workload"] = running.wait()
        again = start_workload()
        frozen = time.clock_gettime(time.CLOCK_BOOTTIME)
        try:
            Path("/sys/power/pm_test").write_text("freezer")
            Path("/sys/power/state").write_text("mem")
            found["frozen"] = time.clock_gettime(time.CLOCK_BOOTTIME) - frozen
        except OSError as error:
            found["not frozen"] = str(error)
        found["workload again"] = again.wait()
    return found | msrtrace.end()


def probes_switched_off() -> Any:
    """kprobes and ftrace are switched off and on, under each backend, and VMs get updates all the time."""
    switches = {
        "kprobes": Path("/sys/kernel/debug/kprobes/enabled"),
        "ftrace": Path("/proc/sys/kernel/ftrace_enabled"),
    }
    found: dict[str, Any] = {}
    for backend in ("kprobe", "fentry"):
        for name, switch in switches.items():
            msrtrace = Msrtrace("--backend", backend)
            one: dict[str, Any] = {}
            run_workload("--updates", 5, "--initial-run")
            one["on"] = scrape()
            try:
                switch.write_text("0")
            except OSError as error:
                one["refused"] = str(error)
            time.sleep(2.5)
            run_workload("--updates", 5, "--initial-run")
            time.sleep(2.5)
            one["off"] = scrape()
            with suppress(OSError):
                switch.write_text("1")
            time.sleep(2.5)
            run_workload("--updates", 5, "--initial-run")
            one["on again"] = scrape()
            found[f"{backend} {name}"] = one | msrtrace.end()
    return found


def other_tracers() -> Any:
    """The kernel's function graph tracer and another BPF tracer on the same functions, beside the witness's kprobes."""
    tracing = Path("/sys/kernel/tracing")
    found: dict[str, Any] = {}
    functions = (tracing / "available_filter_functions").read_text().splitlines()
    ours = [line.split()[0] for line in functions if line.endswith(f"[{vendor().module}]") and "msr" in line]
    found["traced"] = ours
    for backend in ("kprobe", "fentry"):
        one: dict[str, Any] = {}
        msrtrace = Msrtrace("--backend", backend)
        with counted(f"others-{backend}", one):
            (tracing / "set_ftrace_filter").write_text("\n".join(ours))
            (tracing / "instances/graph").mkdir(exist_ok=True)
            (tracing / "current_tracer").write_text("function_graph")
            second = subprocess.Popen(
                ["msrtrace", "report", "-o", f"/out/second-{backend}.json", "-d", "600"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(3)
            one["workload"] = start_workload().wait()
            (tracing / "current_tracer").write_text("nop")
            one["workload again"] = start_workload().wait()
            second.send_signal(signal.SIGINT)
            one["second"] = second.wait(60)
            (tracing / "set_ftrace_filter").write_text("")
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
        run_workload("--updates", 5, "--initial-run")
        one["after"] = scrape()
        found[level] = one
    found["ended"] = msrtrace.end()
    found["start"] = output_of("timeout", "-s", "INT", "20", "msrtrace", "run")
    return found


SCENARIOS: list[Callable[[], Any]] = [
    killed_at_each_step_of_a_start,
    killed_in_a_scrape,
    killed_in_a_reload,
    killed_at_a_reports_last_write,
    few_descriptors,
    descriptors_run_out,
    little_memory,
    full_and_read_only,
    reloads,
    cpus_come_and_go,
    vcpus_migrate,
    clocks_jump,
    probes_switched_off,
    other_tracers,
    stopped_for_a_minute,
    lockdown,
]


def main() -> None:
    """Run those that were named, or all."""
    load(STOCK[vendor().name])
    bitmap_offset()
    wanted = sys.argv[1:]
    for scenario in SCENARIOS:
        name = scenario.__name__
        if wanted and name not in wanted:
            continue
        begun = time.monotonic()
        try:
            found = scenario()
        except Exception:
            found = {"broken": traceback.format_exc()}
            print(found["broken"], flush=True)
            subprocess.run(["pkill", "-9", "-f", "^(/usr/bin/python3 /usr/local/bin/msrtrace|workload)"], check=False)
            load(STOCK[vendor().name])
        record(name, found)
        print(
            f"{name}: {'BROKEN' if 'broken' in found else 'collected'} in {time.monotonic() - begun:.1f} s", flush=True
        )
    sys.exit(37)


if __name__ == "__main__":
    main()
