# SPDX-License-Identifier: GPL-2.0-or-later
"""VMMs that do as they are told, one ioctl at a time, while `msrtrace state --watch` runs; `state --diff` of them.

`changing.py VCPUS -name NAME -uuid UUID` is such a VMM: each line of its standard input is an order.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guest import OUT, STOCK, load, output_of, until, vendor
from vmm import READ, WRITE, Filter, Range, Vm

NAME = "web"
UUIDS = [f"6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f000{number}" for number in range(3)]
INTERVAL = "0.2"
FS_BASE, GS_BASE, SYSENTER_CS, UNKNOWN = 0xC0000100, 0xC0000101, 0x174, 0x2FF
#: An MSR that is passed through, one of which a direction is denied, and one that KVM intercepts anyway.
DIFFERING = ((SYSENTER_CS, WRITE), (UNKNOWN, READ | WRITE), (FS_BASE, READ | WRITE))


class Vmm:
    """A VMM in a process of its own, which is called NAME and does what it is told."""

    def __init__(self, vcpus: int, uuid: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(vcpus), "-name", f"guest={NAME}", "-uuid", uuid],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout
        if self._process.stdout.readline() != "done\n":
            raise RuntimeError("a VMM ended early")

    def run(self, vcpu: int) -> None:
        """Let a vCPU enter the guest once."""
        self._tell("run", vcpu)

    def filter(self, *denied: tuple[int, int]) -> None:
        """Set a filter that denies these accesses, each an MSR and directions; none: allow everything."""
        self._tell("filter", *(f"{msr}:{flags}" for msr, flags in denied))

    def _tell(self, *words: object) -> None:
        assert self._process.stdin
        print(*words, file=self._process.stdin, flush=True)
        self._answer()

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()


def serve(vcpus: int) -> None:
    """Be such a VMM."""
    vm = Vm(vcpus)
    print("done", flush=True)
    for line in sys.stdin:
        order, *words = line.split()
        if order == "run":
            vm.vcpus[int(words[0])].run()
        else:
            pairs = (map(int, word.split(":")) for word in words)
            vm.set_filter(Filter([Range.of(msr, [False], flags) for msr, flags in pairs]))
        print("done", flush=True)


class Watch:
    """`msrtrace state --watch` in the background."""

    def __init__(self) -> None:
        self._out, self._err = Path("/tmp/watch.out"), Path("/tmp/watch.err")
        with self._out.open("w") as out, self._err.open("w") as err:
            command = ["msrtrace", "state", "--watch", "--interval", INTERVAL]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        self.wait_for("watching for changes")

    def wait_for(self, line: str, times: int = 1) -> None:
        """Wait until it has printed lines with this text. Raises with what it printed instead."""
        try:
            until(lambda: self._out.read_text().count(line) >= times)
        except RuntimeError:
            printed = self._out.read_text() + self._err.read_text()
            raise RuntimeError(f"no {times} lines with {line!r}, but:\n{printed}") from None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It reads nothing meanwhile: what happens is one change."""
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def end(self) -> dict[str, Any]:
        """Send it SIGINT; its status and what it printed."""
        os.kill(self._process.pid, signal.SIGINT)
        status = self._process.wait(60)
        return {"status": status, "stdout": self._out.read_text(), "stderr": self._err.read_text()}


def watched(*, readable: bool) -> dict[str, Any]:
    """What --watch prints of filters that change, VMs that come and go, and a reload of the module.

    :param readable: whether bitmaps are, and their changes are waited for
    """
    first = Vmm(2, UUIDS[0])
    for vcpu in range(2):
        first.run(vcpu)
    watch = Watch()

    def apply(line: str) -> None:
        """Let each vCPU apply the filter, once the other's change was seen."""
        for vcpu in range(2):
            first.run(vcpu)
            if readable:
                watch.wait_for(f": vCPU {vcpu}: {line}")

    first.filter((FS_BASE, READ | WRITE))
    watch.wait_for("passed -> pending deny" if readable else "new filter")
    apply("read and write of 0xc0000100 FS_BASE: pending deny -> filter")
    first.filter((GS_BASE, WRITE))
    watch.wait_for("passed -> pending deny" if readable else "filter replaced", 2 if readable else 1)
    apply("write of 0xc0000101 GS_BASE: pending deny -> filter")
    first.filter()
    watch.wait_for("write of 0xc0000101 GS_BASE: filter -> pending allow" if readable else "filter removed")
    apply("write of 0xc0000101 GS_BASE: pending allow -> passed")
    second = Vmm(1, UUIDS[1])
    watch.wait_for("new VM")
    second.end()
    watch.wait_for("VM gone")
    with watch.paused():  # or one of its vCPUs may be found alone
        first.end()
    watch.wait_for("VM gone", 2)
    load("none")
    watch.wait_for("was unloaded")
    load(STOCK[vendor().name])
    watch.wait_for("was loaded again")
    third = Vmm(1, UUIDS[2])
    watch.wait_for("new VM", 2)
    found = watch.end() | {"pids": [vmm.pid for vmm in (first, second, third)]}
    third.end()
    return found


def state_command(*arguments: str) -> dict[str, Any]:
    """What `msrtrace state` says."""
    return output_of("msrtrace", "state", *arguments, timeout=600)


def compared() -> dict[str, Any]:
    """What --diff says of two VMs of one name, one of which got a filter, and of files from before and after."""
    vmms = [Vmm(2, uuid) for uuid in UUIDS[:2]]
    for vmm in vmms:
        for vcpu in range(2):
            vmm.run(vcpu)
    files = [str(OUT / f"{name}.json") for name in ("before", "after")]
    found: dict[str, Any] = {"before": state_command("-o", files[0])}
    vmms[0].filter(*DIFFERING)
    for vcpu in range(2):
        vmms[0].run(vcpu)
    found["after"] = state_command("-o", files[1])
    found["files"] = state_command("--diff", *files, "--format", "json")
    found["UUIDs"] = state_command("--diff", *UUIDS[:2], "--format", "json")
    found["names"] = state_command("--diff", NAME, NAME)
    for vmm in vmms:
        vmm.end()
    return found | {"vmms": [vmm.pid for vmm in vmms]}


if __name__ == "__main__":
    serve(int(sys.argv[1]))
