# SPDX-License-Identifier: GPL-2.0-or-later
"""msrtrace killed and starved: `killed.py [NAME...]`, each a function here. tests/kvmhost/test_killed.py judges."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from faulty import counted, counts_again, kill, known_workload, left_after, run, start_workload, updating
from guest import STOCK, Msrtrace, kernel_state, load, output_of, scrape, until, vendor

STOPPED_SECONDS = 60
#: Of run, in a cgroup: with the least it works, with the other the kernel kills it.
ENOUGH_MB, LITTLE_MB = 40, 16
#: Of a start: by which backend, and when it has so many descriptors of a kind; or after that part of its time.
_LOADING = [("bpf-map", 1), ("bpf-map", 6), ("bpf-prog", 1), ("bpf-prog", 4), ("bpf-prog", 8)]
_ATTACHING = [("perf_event", 1), ("perf_event", 4), ("perf_event", 8)]
MOMENTS = [
    *(("kprobe", "", 0.2 * number) for number in range(7)),
    *(("fentry", *when) for when in _LOADING),
    *(("kprobe", *when) for when in (*_LOADING, *_ATTACHING)),
]
FREE = 8  #: descriptors that are left to it
LIMITS = (8, 12, 16, 20, 24, 32, 64)  #: of descriptors
CGROUP = Path("/sys/fs/cgroup")
CHANCE = random.Random(1)


def start_of_run(log: Path, *options: str) -> subprocess.Popen[bytes]:
    """`msrtrace run`, not waited for; what it prints goes to the log."""
    with log.open("w") as out:
        return subprocess.Popen(["msrtrace", "run", *options], stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def killed_at_each_step_of_a_start() -> Any:
    """SIGKILL at each of MOMENTS of a start, with VMs under updates; then one that is left alone.

    It is stopped first, so that what it has in the kernel at that moment can be looked at.
    """
    before = kernel_state()
    steps, left, log = [], [], Path("/tmp/killed.log")
    with updating():
        begun = Msrtrace()
        begun.end()
        for backend, kind, amount in MOMENTS:
            process = start_of_run(log, "--backend", backend)
            if kind:
                until(lambda kind=kind, amount=amount, pid=process.pid: _held(pid, kind) >= amount)
            else:
                time.sleep(begun.started_in * amount)
            process.send_signal(signal.SIGSTOP)
            then = {name: len(there) - len(before[name]) for name, there in kernel_state().items()}
            steps.append(then | {"serving": "serving" in log.read_text()})
            kill(process)
            if after := left_after(before):
                left.append(after)
    return {"steps": steps, "seconds": begun.started_in, "left": left} | counts_again()


def _held(pid: int, kind: str) -> int:
    """How many descriptors of a kind a process has."""
    found = 0
    with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with suppress(OSError):
                found += kind in os.readlink(entry.path)
    return found


def killed_in_a_scrape() -> Any:
    """SIGKILL while two clients scrape without a pause and VMs get updates."""
    before, kills, left, scrapes = kernel_state(), 6, [], [0]
    with updating():
        for _ in range(kills):
            msrtrace = Msrtrace()
            over = threading.Event()

            def client(over: threading.Event = over) -> None:
                while not over.is_set():
                    with suppress(OSError, RuntimeError, HTTPException):
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
    """SIGKILL around the end of a report that replaces another, most as soon as anything changes in its directory."""
    directory = Path("/tmp/reports")
    directory.mkdir(exist_ok=True)
    file = directory / "report.json"
    command = ["msrtrace", "report", "--label", "new", "-o", str(file), "--", "true"]
    done = output_of(*command)
    whole, kills, states, beside = file.read_bytes(), 12, [], []
    for number in range(kills):
        file.write_bytes(whole.replace(b'"new"', b'"old"'))
        before = _seen(directory)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while _seen(directory) == before and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(0.001 * (number % 4))
        finished = process.poll() is not None
        kill(process)
        found = sorted(os.listdir(directory))
        states.append({"label": _label(file), "finished": finished})
        for other in (directory / name for name in found if name != file.name):
            beside.append({"name": other.name, "whole": _label(other) == "new"})
            other.unlink()
    return {"first": done, "kills": kills, "states": states, "beside": beside}


def _label(report: Path) -> str:
    """Of a report that is whole."""
    with suppress(ValueError):
        return str(json.loads(report.read_text())["label"])
    return "torn"


def _seen(directory: Path) -> list[tuple[str, int]]:
    """What is in a directory, and which file has each name."""
    with os.scandir(directory) as entries:
        return sorted((entry.name, entry.inode()) for entry in entries)


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
    for limit in LIMITS:
        done = output_of(
            "prlimit", f"--nofile={limit}", "timeout", "--preserve-status", "-s", "INT", "15", "msrtrace", "run"
        )
        found[str(limit)] = done
    return {"limits": found, "left": left_after(before)}


def descriptors_run_out() -> Any:
    """Few are left to it, and 60 clients come that keep their connections; then they leave."""
    found: dict[str, Any] = {}
    msrtrace = Msrtrace()
    with counted("descriptors", found):
        pid = msrtrace.process.pid
        most = len(os.listdir(f"/proc/{pid}/fd")) + FREE
        subprocess.run(["prlimit", f"--nofile={most}", "--pid", str(pid)], check=True)
        clients = [socket.create_connection(("127.0.0.1", 9753), timeout=5) for _ in range(60)]
        running = start_workload()
        found["workload"] = running.wait()
        found["alive"] = msrtrace.process.poll() is None
        for client in clients:
            client.close()
        until(_answers, 60)
    return found | msrtrace.end()


def _answers() -> bool:
    with suppress(OSError, RuntimeError, HTTPException):
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
    for megabytes in (ENOUGH_MB, LITTLE_MB):
        (group / "memory.max").write_text(str(megabytes << 20))
        enter = ["sh", "-c", f"echo $$ > {group}/cgroup.procs; exec msrtrace run"]
        log = Path(f"/tmp/little-{megabytes}.log")
        with log.open("w") as out:
            process = subprocess.Popen(enter, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        with suppress(RuntimeError):
            until(lambda log=log, process=process: "serving" in log.read_text() or process.poll() is not None, 60)
        one: dict[str, Any] = {"alive": process.poll() is None}
        if one["alive"]:
            known_workload()
            one["scrape"] = scrape()
            one["peak"] = int((group / "memory.peak").read_text()) if (group / "memory.peak").exists() else None
            process.send_signal(signal.SIGINT)
        one["status"] = process.wait(60)
        one["log"] = log.read_text()
        one["events"] = (group / "memory.events").read_text()
        one["left"] = left_after(before)
        found[str(megabytes)] = one
    found["log"] = output_of("dmesg")["stdout"].removeprefix(found["log before"])
    for option in ("--clear", "--console-level=warn"):
        subprocess.run(["dmesg", option], check=True)
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


SCENARIOS: list[Callable[[], Any]] = [
    killed_at_each_step_of_a_start,
    killed_in_a_scrape,
    killed_in_a_reload,
    killed_at_a_reports_last_write,
    few_descriptors,
    descriptors_run_out,
    little_memory,
    full_and_read_only,
    stopped_for_a_minute,
]

if __name__ == "__main__":
    run(SCENARIOS, sys.argv[1:])
