# SPDX-License-Identifier: GPL-2.0-or-later
"""Starting and ending a trace, for all commands that trace: run, report and top."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tracer.model.errors import MsrtraceError
from tracer.model.options import BACKENDS, Options

if TYPE_CHECKING:
    from tracer.kernel.machine import Machine
    from tracer.kernel.symbols import Symbols
    from tracer.trace.state_follower import StateFollower
    from tracer.trace.state_reader import StateReader
    from tracer.trace.tracer import Tracer

#: Those of a trace for which none are given.
OPTIONS = Options()
#: Open files: some 60 for a trace, the others for clients.
_DESCRIPTORS = 1024


def this_machine(options: Options = OPTIONS) -> Machine:
    """This machine, what is already compiled, and how a trace with these options would go about it."""
    from tracer.kernel.machine import Machine
    from tracer.trace.capabilities import refused_calls
    from tracer.trace.engine import compiled_backends, expected_backends

    return Machine.here(compiled_backends(), lambda machine: expected_backends(machine.symbols, options), refused_calls)


def _allow_descriptors() -> None:
    """Raise this process's limit on open files to what is usual, where it is lower and may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def ready_machine(options: Options, *, module_may_be_missing: bool = False) -> Machine:
    """This machine. Raises MsrtraceError, which says what to do, if it cannot be traced with these options."""
    from tracer.doctor.containers import explain_hidden_processes
    from tracer.doctor.examination import MODULE, SYMBOLS, obstacle

    _allow_descriptors()
    machine = this_machine(options)
    check_pid(options.pid)
    problem = obstacle(machine, ignore=(MODULE, SYMBOLS) if module_may_be_missing else ())
    if problem:
        raise MsrtraceError(problem)
    needing = [name for name, given in (("--by-vm", options.by_vm), ("--pid", options.pid is not None)) if given]
    if needing and (why := explain_hidden_processes(machine)):
        raise MsrtraceError(f"{' and '.join(needing)} cannot be used: {why}")
    return machine


def _machine_with_states() -> Machine:
    """This machine. Raises MsrtraceError, which says what to do, if the states of vCPUs cannot be read."""
    from tracer.doctor.examination import NEEDED_BY_PROBES_ALONE, obstacle
    from tracer.kernel.machine import Machine
    from tracer.trace.state_reader import state_program_is_compiled

    _allow_descriptors()
    machine = Machine.here(frozenset(BACKENDS) if state_program_is_compiled() else frozenset())
    if problem := obstacle(machine, ignore=NEEDED_BY_PROBES_ALONE):
        raise MsrtraceError(problem)
    return machine


@contextmanager
def state_reader() -> Iterator[StateReader]:
    """A context with what reads the states of vCPUs. Raises MsrtraceError, which says what to do, if that cannot be."""
    from tracer.doctor.examination import explain_eperm
    from tracer.trace.state_reader import StateReader

    machine = _machine_with_states()
    reader = StateReader(machine.symbols, lambda: explain_eperm(machine))
    try:
        yield reader
    finally:
        reader.close()


@contextmanager
def following_states(pid: int | None = None) -> Iterator[StateFollower]:
    """As `state_reader`, of vCPUs with the names of their VMs, across reloads; with `pid` of those of a process."""
    from tracer.doctor.examination import explain_eperm
    from tracer.trace import state_reader
    from tracer.trace.state_follower import StateFollower

    machine = _machine_with_states()
    follower = StateFollower(lambda symbols: state_reader.StateReader(symbols, lambda: explain_eperm(machine), pid))
    follower.start(machine.symbols)
    try:
        yield follower
    finally:
        follower.close()


def check_pid(pid: int | None) -> None:
    """Raise MsrtraceError unless the pid is that of a process: BPF programs do not compare ids of threads."""
    if pid is None:
        return
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        raise MsrtraceError(f"there is no process {pid}") from None
    found = re.search(r"^Tgid:\s*(\d+)", status, re.MULTILINE)
    if found and int(found[1]) != pid:
        raise MsrtraceError(f"{pid} is a thread of process {found[1]}; give --pid {found[1]}")


def module_is_loaded() -> bool:
    """Whether a module that can be traced is loaded."""
    from tracer.trace.tracer import loaded_module

    return loaded_module() is not None


@contextmanager
def tracing(
    machine: Machine, options: Options, *, keep_gone: bool = False, states: bool = False, nested: bool = False
) -> Iterator[Tracer]:
    """A context with a tracer that is attached, and detached at the end.

    :param states: whether it also reads the states of vCPUs; `nested`: with those of nested guests
    :param keep_gone: see Tracer
    :raises MsrtraceError: if it cannot be attached
    """
    from tracer.doctor.examination import explain_eperm
    from tracer.trace.blindness import sight_of
    from tracer.trace.engine import Engine
    from tracer.trace.tracer import Tracer

    def explain() -> str:
        return explain_eperm(machine)

    def reader(symbols: Symbols) -> StateReader:
        from tracer.doctor.containers import explain_hidden_processes
        from tracer.trace.state_reader import StateReader

        if why := explain_hidden_processes(machine):
            raise MsrtraceError(f"what vCPUs intercept is not shown: {why}")
        return StateReader(symbols, explain, options.pid, nested=nested)

    tracer = Tracer(
        lambda layout, symbols: Engine(layout, symbols, options, explain),
        keep_gone=keep_gone,
        states=reader if states else None,
        sight=sight_of,
    )
    tracer.attach(machine.symbols)
    try:
        yield tracer
    finally:
        tracer.close()
