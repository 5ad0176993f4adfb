# SPDX-License-Identifier: GPL-2.0-or-later
"""What attaching leaves in the kernel: where it is refused, where it fails half way, and where the process is killed.

By msrtrace's modules, since starting all of it takes long here. What attaches is a process of its own, which ends.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kerneltracer import TRACING

from tracer.kernel.layout import choose
from tracer.kernel.symbols import Symbol, Symbols
from tracer.program import bcc_library
from tracer.program.syscalls import load_program
from tracer.trace.capabilities import drop_capabilities
from tracer.trace.kprobe import attach_kprobe

KPROBES = Path("/sys/kernel/debug/kprobes")
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
BPF_PROG_TYPE_KPROBE = 2
RETURN_0 = bytes.fromhex("b700000000000000 9500000000000000")
#: What processes do over and over until they are killed.
AT_WORK = (("entry", "return", "closing"), ("refused",))
#: How often each of it is the time to be killed, but no more after so many seconds.
ROUNDS, ENOUGH_SECONDS = 10, 5


def attach_and_be_killed() -> dict[str, Any]:
    """Every way to attach a kprobe, every way to be refused, and SIGKILL amid both; the stock module is loaded."""
    symbols, level = Symbols.read(), PARANOID.read_text()
    layout = choose(symbols)
    assert layout
    function = symbols.find(layout.update)[0]
    blacklisted = (KPROBES / "blacklist").read_text().split(maxsplit=2)[1]
    options: Any = {"attach_type": 0, "function": 0, "btf": 0, "log": None}
    program = load_program("nothing", BPF_PROG_TYPE_KPROBE, RETURN_0, **options)

    def attached(name: str, address: int = 0, program: int = program) -> list[str]:
        """Which probes are there that were not."""
        for at_return in (False, True):
            bcc_library.attach_kprobe(program, name, address, at_return=at_return)  # it ends with the process
        return sorted(set(state()["probes"]) - set(before["probes"]))

    def refused(name: str) -> None:
        with suppress(bcc_library.FunctionRefused):
            bcc_library.attach_kprobe(program, name, at_return=False)

    def plainly() -> int:
        """As BCC's own tools do, with the name of an event that can be."""
        library = bcc_library.library()
        return int(library.bpf_attach_kprobe(program, 0, b"plain", function.name.encode(), 0, 0))

    bcc_library.library()  # once for all children
    before = state()
    found: dict[str, Any] = {"function": function.name, "before": before}
    PARANOID.write_text("2")  # what msrtrace keeps is enough there
    named = f"{symbols.module}:{function.name}"
    found["attached"] = {
        "MODULE:NAME": in_child(lambda: attached(named)),
        "address": in_child(lambda: attached("", function.address)),
        "NAME": in_child(lambda: attached(function.name)),
        "few rights": in_child(lambda: with_few_rights(lambda: attached(named))),
    }
    found["refused"] = {
        "blacklisted": in_child(lambda: attached(blacklisted)),
        "missing": in_child(lambda: attached(f"{symbols.module}:msrtrace_has_none")),
        "nowhere": in_child(lambda: attached("", 0x1000)),
        "not a program": in_child(lambda: attached(named, 0, os.open("/dev/null", os.O_RDONLY))),
        "no right": in_child(lambda: with_few_rights(lambda: attached(named), paranoid=True)),
    }
    found["after refusals"] = state()
    found["between"] = killed_between(symbols, function, program)
    links: list[int] = []
    found["amid"] = killed_amid(
        {
            "entry": lambda: links.append(bcc_library.attach_kprobe(program, named, at_return=False)),
            "return": lambda: links.append(bcc_library.attach_kprobe(program, named, at_return=True)),
            "closing": lambda: list(map(os.close, (links.pop(), links.pop()))),
            "refused": lambda: refused(blacklisted),
        }
    )
    found["after kills"] = state()
    PARANOID.write_text("2")
    found["plainly"] = in_child(lambda: with_few_rights(plainly, paranoid=True)) | {"left": state()}
    clean_up()
    PARANOID.write_text(level)
    os.close(program)
    return found | {"cleaned": state()}


def state() -> dict[str, Any]:
    """All that a kprobe can leave; `errors` are what tracefs did not take."""
    return {
        "probes": sorted(line.split(maxsplit=1)[1] for line in (KPROBES / "list").read_text().splitlines()),
        "events": (TRACING / "kprobe_events").read_text(),
        "group": (TRACING / "events/kprobes").exists(),
        "errors": (TRACING / "error_log").read_text(),
    }


def clean_up() -> None:
    """Remove the events that are in the group of BCC's, if any."""
    for line in (TRACING / "kprobe_events").read_text().splitlines():
        file = os.open(TRACING / "kprobe_events", os.O_WRONLY | os.O_APPEND)
        os.write(file, f"-:{line.split()[0].partition(':')[2]}\n".encode())
        os.close(file)


def with_few_rights(act: Callable[[], Any], paranoid: bool = False) -> Any:
    """ACT with what `msrtrace run` keeps, PARANOID: under a setting that asks for more. For good."""
    drop_capabilities(attaches_again=True)
    if paranoid:
        PARANOID.write_text("3")
    return act()


def forked(act: Callable[[], Any]) -> int:
    """The pid of a process that does ACT, and no more."""
    child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(1)
    return child


def in_child(act: Callable[[], Any]) -> dict[str, Any]:
    """What ACT returned or raised in a process of its own, and what came to its stderr."""
    read, write = os.pipe()

    def say() -> None:
        os.dup2(printed := os.memfd_create("stderr"), 2)
        try:
            said: dict[str, Any] = {"returned": act()}
        except Exception as error:
            said = {"raised": type(error).__name__, "errno": getattr(error, "errno", None), "text": str(error)}
        os.write(write, json.dumps(said | {"stderr": os.pread(printed, 1 << 16, 0).decode()}).encode())

    child = forked(say)
    os.close(write)
    with open(read, "rb") as file:
        found: dict[str, Any] = json.loads(file.read())
    os.waitpid(child, 0)
    return found


def killed_between(symbols: Symbols, function: Symbol, program: int) -> dict[str, Any]:
    """SIGKILL when the return is probed and the entry is not."""
    read, write = os.pipe()

    def half() -> None:
        attach_kprobe(function, symbols, program, at_return=True)
        os.write(write, b"1")
        time.sleep(600)

    child = forked(half)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.close(read)
    during = state()
    kill(child)
    return {"during": during, "after": state()}


def killed_amid(acts: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """SIGKILL to processes that do some of ACTS over and over, at random times after each begins: up to twice its own.

    How many were killed amid which, and the states that are not as before.
    """
    chance, killed, left = random.Random(1), Counter[str](), []
    before = state()
    takes = {name: seconds_of(acts[name]) for names in AT_WORK for name in names}
    with mmap.mmap(-1, 1) as step:

        def one(names: tuple[str, ...], target: int) -> None:
            read, write = os.pipe()

            def work() -> None:
                while True:
                    for step[0], name in enumerate(names):
                        if step[0] == target:
                            os.write(write, b"1")
                        acts[name]()

            child = forked(work)
            os.close(write)
            assert os.read(read, 1) == b"1"
            time.sleep(chance.uniform(0, 2 * takes[names[target]]))
            kill(child)
            os.close(read)
            killed[names[step[0]]] += 1

        for names in AT_WORK:
            enough = time.monotonic() + ENOUGH_SECONDS
            for number in range(ROUNDS * len(names)):
                if number < len(names) or time.monotonic() < enough:
                    one(names, number % len(names))
                    if (after := state()) != before:
                        left.append(after)
    return {"killed": killed, "left": left}


def seconds_of(act: Callable[[], Any]) -> float:
    """How long ACT takes."""
    begun = time.monotonic()
    act()
    return time.monotonic() - begun


def kill(child: int) -> None:
    """SIGKILL, and wait until it has given back what it had."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


if __name__ == "__main__":
    begun = time.monotonic()
    result = attach_and_be_killed()
    Path("/out/attaching.json").write_text(json.dumps(result, indent=1))
    print(f"{time.monotonic() - begun:.1f} s")
