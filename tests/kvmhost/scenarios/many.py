# SPDX-License-Identifier: GPL-2.0-or-later
"""Many of everything: VMs, vCPUs, threads that update at once, VMMs for one place in a map, VMMs of one pid.

`many.py NAME...`, each of which is a function here, or all. They only collect; tests/kvmhost/test_many.py judges. The
kernel's own tracer counts beside msrtrace (kerneltracer.py).
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from faulty import run
from guest import OUT, Msrtrace, bitmap_offset, kernel_state, output_of, scrape, until
from guest import workload as run_workload
from kerneltracer import KernelCounter, KernelTracer
from stress import preemptible
from vmm import Filter, Range, Vm

from tracer.trace.vm_info import start_time

#: VMs one after another; and VMMs, so many at a time.
VMS, AT_A_TIME = 1000, 100
UPDATES = 3
#: VMMs and vCPUs of each, alive at once.
VMMS, VCPUS_EACH = 100, 40
THREADS, THREADED_UPDATES = 64, 11
#: VMs and vCPUs of each, with which no slot is left for some (VCPUS_CAPACITY in bpf/maps.h).
FULL_VMS, FULL_VCPUS = 17, 1000
#: VMMs for the same places of maps: there are 2,048 for their 58 counters each, and 16 for their updates.
CROWD = 40
CROWD_UPDATES = 5
#: Numbers of workloads whose VMs live on.
HOLDERS = count()
#: The longest that anything here may take on an emulated host.
WAIT_SECONDS = 300
#: As in bpf/places.h.
PID_FACTOR = 0x9E3779B1
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
#: How VMMs of one pid are called, and how many updates each makes.
SAME_PID = {"first": 3, "second": 5, "third": 7}


@contextmanager
def counted(name: str, found: dict[str, Any]) -> Iterator[None]:
    """What happens meanwhile is counted by the kernel's own tracer, too; the scrapes around it."""
    found["before"] = scrape()
    with KernelCounter(OUT / f"witness-{name}"):
        yield
    found["after"] = scrape()


def timed_scrape(found: dict[str, Any]) -> str:
    """A scrape; how long it took, and how long it is, goes to FOUND."""
    begun = time.monotonic()
    text = scrape()
    found.setdefault("scrapes", []).append(time.monotonic() - begun)
    found["bytes"] = max(found.get("bytes", 0), len(text))
    return text


def start_workload(*options: str | int | Path) -> subprocess.Popen[str]:
    """The workload, in the background."""
    return subprocess.Popen(["workload", *map(str, options)], stdout=subprocess.DEVNULL, text=True)


def end(process: subprocess.Popen[Any]) -> int:
    """SIGTERM; the status."""
    process.send_signal(signal.SIGTERM)
    return process.wait()


def children_of(process: subprocess.Popen[Any]) -> list[int]:
    """The pids of the VMMs of a workload with a process for each VM."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def holding() -> tuple[list[str | int | Path], Path]:
    """Options with which a workload's VMs live on, and the file that is there when they have done all else."""
    held = Path(f"/tmp/held-{next(HOLDERS)}")
    return ["--hold", 600, "--held", held], held


def until_held(held: Path, found: dict[str, Any]) -> None:
    """Wait for this file, with scrapes. Between them VMs have the CPUs for themselves."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not held.exists():
        if time.monotonic() > deadline:
            raise RuntimeError("a workload has not done its updates")
        timed_scrape(found)
        time.sleep(1)


def end_all(running: subprocess.Popen[Any]) -> None:
    """End a workload with a process for each VM, which end with it, but a moment later."""
    vmms = children_of(running)
    end(running)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in vmms), 60)


def settled_scrape(found: dict[str, Any]) -> str:
    """A scrape when nothing is in progress; or, a minute later, one that says what still is."""
    deadline = time.monotonic() + 60
    while "msrtrace_open_calls 0.0\n" not in (text := timed_scrape(found)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return text


def a_thousand_vms() -> Any:
    """A VMM makes a hundred, one after another; then the next does."""
    found: dict[str, Any] = {"statuses": [], "footprints": []}
    idle = kernel_state()
    msrtrace = Msrtrace()
    run_workload("--updates", 2, "--initial-run")
    with counted("thousand", found):
        for _ in range(VMS // AT_A_TIME):
            running = start_workload("--updates", UPDATES, "--initial-run", "--create-vms", AT_A_TIME - 1)
            while running.poll() is None:
                timed_scrape(found)
                time.sleep(0.5)
            found["statuses"].append(running.wait())
            found["footprints"].append(msrtrace.footprint())
    found |= msrtrace.end()
    return found | {"idle": idle, "left": kernel_state()}


def a_thousand_vmms() -> Any:
    """Each VM has a VMM of its own, and they are told apart; a hundred of them are there at a time."""
    found: dict[str, Any] = {"footprints": []}
    idle = kernel_state()
    msrtrace = Msrtrace("--by-vm")
    run_workload("--updates", 2, "--initial-run")
    with counted("thousand-vmms", found):
        for _ in range(VMS // AT_A_TIME):
            hold, held = holding()
            running = start_workload("--processes", "--vms", AT_A_TIME, "--updates", UPDATES, "--initial-run", *hold)
            until_held(held, found)
            settled_scrape(found)
            end_all(running)
            settled_scrape(found)
            found["footprints"].append(msrtrace.footprint())
    found |= msrtrace.end()
    return found | {"idle": idle, "left": kernel_state()}


def four_thousand_vcpus() -> Any:
    """They are all there at once, and have updates; scrapes and states meanwhile."""
    found: dict[str, Any] = {}
    msrtrace = Msrtrace("--by-vm")
    found["footprints"] = [msrtrace.footprint()]
    ready, go = Path("/tmp/vcpus-ready"), Path("/tmp/vcpus-go")
    with counted("vcpus", found):
        options = ("--processes", "--vms", VMMS, "--vcpus", VCPUS_EACH, "--updates", UPDATES, "--initial-run")
        hold, held = holding()
        running = start_workload(*options, *hold, "--ready", ready, "--go", go)
        until(ready.exists)
        timed_scrape(found)
        go.touch()
        until_held(held, found)
        found["alive"] = settled_scrape(found)
        found["footprints"].append(msrtrace.footprint())
        begun = time.monotonic()
        found["state"] = output_of("msrtrace", "state", timeout=300)
        found["state seconds"] = time.monotonic() - begun
        end_all(running)
    found["footprints"].append(msrtrace.footprint())
    return found | msrtrace.end()


def updating_at_once() -> Any:
    """The vCPUs of one VM, each in a thread, on the CPUs there are, in a kernel that may preempt them."""
    found: dict[str, Any] = {"cpus": os.cpu_count()}
    offset = bitmap_offset()
    for backend in ("kprobe", "fentry"):
        one: dict[str, Any] = {}
        msrtrace = Msrtrace("--backend", backend)
        one["before"] = scrape()
        with preemptible() as model, KernelTracer(offset, OUT / f"witness-at-once-{backend}"):
            options = ("--threads", "--vcpus", THREADS, "--updates", THREADED_UPDATES, "--initial-run")
            one["did"] = run_workload(*options)
            one["after"] = scrape()
        found[backend] = one | {"model": model} | msrtrace.end()
    return found


def places_are_taken() -> Any:
    """VMMs whose pids want the same places in the arrays of calls, of updates and of names; then others, for places."""
    found: dict[str, Any] = {"crowd": []}
    msrtrace = Msrtrace("--by-vm")
    wanted = crowded_pids()
    with counted("crowd", found):
        crowd: list[subprocess.Popen[str]] = []
        files = []
        while len(crowd) < CROWD:
            hold, held = holding()
            options = ("--updates", CROWD_UPDATES, "--initial-run", *hold)
            command = ("workload", *map(str, options), "--", "-name", f"guest=vm{len(crowd)}")
            with suppress(PidTaken):
                crowd.append(with_pid(next(wanted), *command))
                files.append(held)
        found["crowd"] = [one.pid for one in crowd]
        for held in files:
            until_held(held, found)
        found["crowded"] = settled_scrape(found)
        for one in crowd:
            end(one)
    again: dict[str, Any] = {}
    with counted("after-crowd", again):
        others = [start_workload("--updates", CROWD_UPDATES, "--initial-run") for _ in range(CROWD)]
        again["statuses"] = [one.wait() for one in others]
    return found | {"again": again} | msrtrace.end()


def crowded_pids() -> Iterator[int]:
    """Pids of which the same bits decide where they are looked for, in all arrays (order_of() and its like)."""
    first = None
    for pid in range(5000, 30000):
        bits = (pid * PID_FACTOR & 0xFFFFFFFF) >> 24
        first = bits if first is None else first
        if bits == first:
            yield pid


class PidTaken(Exception):
    """Another has the pid: as a thread that KVM makes for a VM, if one was being made just then."""


def with_pid(pid: int, *command: str) -> subprocess.Popen[str]:
    """COMMAND, which gets this PID. Raises PidTaken."""
    for _ in range(5):
        LAST_PID.write_text(str(pid - 1))
        shell = ["sh", "-c", 'read go; exec "$@"', "sh", *command]
        process = subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert process.stdin
        if process.pid == pid:
            process.stdin.write("go\n")
            process.stdin.close()
            return process
        process.stdin.close()
        process.kill()
        process.wait()
    raise PidTaken(f"no process got the pid {pid}")


def all_slots_are_taken() -> Any:
    """More vCPUs alive than there are slots; then few, for which there are."""
    found: dict[str, Any] = {}
    resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 17, 1 << 17))
    msrtrace = Msrtrace()
    ready, go = Path("/tmp/full-ready"), Path("/tmp/full-go")
    with counted("slots", found):
        options = ("--vms", FULL_VMS, "--vcpus", FULL_VCPUS, "--updates", 2, "--initial-run")
        begun = time.monotonic()
        running = start_workload(*options, "--ready", ready, "--go", go)
        until(lambda: ready.exists() or running.poll() is not None, 600)
        found["created in"] = time.monotonic() - begun
        found["memory"] = Path("/proc/meminfo").read_text()
        go.touch()
        found["ended with"] = running.wait()
    again: dict[str, Any] = {}
    with counted("slots-again", again):
        again["did"] = run_workload("--vms", 10, "--vcpus", 10, "--updates", 2, "--initial-run")
    return found | {"again": again} | msrtrace.end()


def one_pid_after_another() -> Any:
    """VMMs that get the pid of one that ended, between two scrapes: the first seen by a scrape, and not seen."""
    found: dict[str, Any] = {}
    pid = int(Path("/proc/sys/kernel/pid_max").read_text()) - 700
    for seen in (False, True):
        one: dict[str, Any] = {"pid": pid}
        msrtrace = Msrtrace("--by-vm")
        for number, (name, updates) in enumerate(SAME_PID.items()):
            lives_on = (seen and number == 0) or number == len(SAME_PID) - 1
            hold, held = holding()
            options = ["--updates", updates, "--initial-run", *(hold if lives_on else [])]
            vmm = with_pid(pid, "workload", *map(str, options), "--", "-name", f"guest={name}")
            if lives_on:
                until_held(held, one)
                one[f"{name} runs"] = settled_scrape(one)
                end(vmm)
            else:
                vmm.wait()
        one["none runs"] = scrape()
        found["seen" if seen else "unseen"] = one | msrtrace.end()
    return found | {"report": same_pid_in_a_report(pid)}


def same_pid_in_a_report(pid: int) -> Any:
    """The same, in a report: its VMs that ended keep their counts."""
    command = ["python3", __file__, "--of-pid", str(pid)]
    return output_of("msrtrace", "report", "--by-vm", "-o", str(OUT / "same-pid.json"), "--", *command)


def of_pid(pid: int) -> None:
    """The command of that report."""
    for name, updates in SAME_PID.items():
        with_pid(pid, "workload", "--updates", str(updates), "--initial-run", "--", "-name", f"guest={name}").wait()


DENIES = Filter([Range.of(0xC0000100, [False])])
ALLOWS = Filter()


def runs(vm: Vm, updates: int, after: int = 0) -> str:
    """That many updates of VM, each another than the one before; what keeps it from more, if anything does."""
    try:
        for number in range(after, after + updates):
            vm.apply(ALLOWS if number % 2 else DENIES)
    except OSError as error:
        return f"{error.strerror}"
    return ""


def forks_and_passes() -> Any:
    """A VMM that forks, one whose descriptors another process has and uses, and one in a pid namespace of its own."""
    found: dict[str, Any] = {}
    msrtrace = Msrtrace("--by-vm")
    with counted("passing", found):
        found |= {"forks": forks(), "passes": passes(), "namespace": in_a_namespace()}
    ended = msrtrace.end()
    inside = ["unshare", "--pid", "--fork", "--mount-proc", "timeout", "-s", "INT", "20"]
    found["doctor inside"] = output_of(*inside, "msrtrace", "doctor", "--json")
    found["run inside"] = output_of(*inside, "msrtrace", "run", "--by-vm")
    return found | ended


def forks() -> Any:
    """A VM is updated, its VMM forks, and the child tries the same; then it makes a VM of its own, and both go on."""
    tell, told = socket.socketpair()
    pid = os.fork()
    if not pid:
        os.setsid()
        vm = Vm(1)
        runs(vm, 3)
        child = os.fork()
        if not child:
            said = runs(vm, 2)
            own = Vm(2)
            said += "|" + runs(own, 5)
            told.sendall(f"{os.getpid()}|{said}\n".encode())
            time.sleep(600)
        runs(vm, 4, after=3)
        told.sendall(f"{os.getpid()}\n".encode())
        time.sleep(600)
    told.close()
    lines: list[str] = []
    text = ""
    while len(lines) < 2:
        text += tell.recv(1000).decode()
        lines = text.splitlines() if text.endswith("\n") else lines
    both = scrape()
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    [child] = {int(line.partition("|")[0]) for line in lines} - {pid}
    until(lambda: start_time(child) is None, 60)
    return {"lines": lines, "both": both, "parent": pid, "gone": scrape()}


def passes() -> Any:
    """Another process gets the descriptors of a VM and its vCPU, tries to use them, and outlives the VMM."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    begin, begun = os.pipe()
    vmm = os.fork()
    if not vmm:
        ours.close()
        vm = Vm(1)
        runs(vm, 3)
        socket.send_fds(theirs, [b"x"], [vm.fd, vm.vcpus[0].fd])
        os.read(begin, 1)
        os._exit(0)
    theirs.close()
    holder = os.fork()
    if not holder:
        _, fds, _, _ = socket.recv_fds(ours, 1, 2)
        import fcntl

        said = []
        for fd, request, argument in ((fds[1], 0xAE80, 0), (fds[0], 0xAE41, 1)):
            try:
                fcntl.ioctl(fd, request, argument)
                said.append("done")
            except OSError as error:
                said.append(str(error.strerror))
        Path("/tmp/holder").write_text("|".join(said))
        time.sleep(600)
    until(lambda: Path("/tmp/holder").exists() and Path("/tmp/holder").read_text(), 60)
    found: dict[str, Any] = {"vmm": vmm, "holder": holder, "said": Path("/tmp/holder").read_text(), "both": scrape()}
    os.write(begun, b"x")
    os.waitpid(vmm, 0)
    found["vmm gone"] = scrape()
    found["state"] = output_of("msrtrace", "state", "--format", "json")
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    ours.close()
    return found | {"both gone": scrape()}


def in_a_namespace() -> Any:
    """A VMM in a pid namespace of its own, where it has the pid 1."""
    hold, held = holding()
    command = ["unshare", "--pid", "--fork", "workload", "--updates", 3, "--initial-run", *hold]
    outer = subprocess.Popen([*map(str, command), "--", "-name", "guest=inside"], stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    until(children.read_text, 60)
    pid = int(children.read_text())
    until(lambda: f'pid="{pid}"' in scrape(), 60)
    until_held(held, {})
    text = settled_scrape({})
    os.kill(pid, signal.SIGKILL)
    outer.wait()
    return {"pid": pid, "text": text}


SCENARIOS: list[Callable[[], Any]] = [
    a_thousand_vms,
    a_thousand_vmms,
    four_thousand_vcpus,
    updating_at_once,
    places_are_taken,
    all_slots_are_taken,
    one_pid_after_another,
    forks_and_passes,
]


def main() -> None:
    """Run those that were named, or all."""
    if sys.argv[1:2] == ["--of-pid"]:
        of_pid(int(sys.argv[2]))
        return
    run(SCENARIOS, sys.argv[1:])


if __name__ == "__main__":
    main()
