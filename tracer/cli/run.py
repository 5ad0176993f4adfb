# SPDX-License-Identifier: GPL-2.0-or-later
"""The command `msrtrace run`."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

import click

from tracer.cli.console import backend_option, check_pid, say, version, warn
from tracer.doctor.checks import Machine, obstacle
from tracer.model.errors import MsrtraceError

if TYPE_CHECKING:
    from tracer.trace.tracer import Tracer

DEFAULT_ADDRESS = "127.0.0.1:9753"
_FOLLOW_SECONDS = 0.2  # how often a reload of kvm_intel is looked for
_RETRY_SECONDS = 10.0  # how long one that cannot be traced is left alone


class Address(click.ParamType[tuple[str, int]]):
    """HOST:PORT or [IPv6]:PORT; an empty host is every address of the machine."""

    name = "address"

    def convert(
        self, value: str | tuple[str, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """The host and the port."""
        if isinstance(value, tuple):
            return value
        host, colon, port = value.rpartition(":")
        if not (colon and port.isascii() and port.isdigit() and int(port) < 1 << 16):
            self.fail(f"{value!r} is not HOST:PORT", param, ctx)
        return host.strip("[]") or "0.0.0.0", int(port)


@click.command()
@click.option(
    "--web.listen-address",
    "address",
    type=Address(),
    default=DEFAULT_ADDRESS,
    show_default=True,
    metavar="HOST:PORT",
)
@click.option("--web.tls-cert-file", "cert", type=click.Path(dir_okay=False), help="Serve HTTPS with this certificate.")
@click.option("--web.tls-key-file", "key", type=click.Path(dir_okay=False), help="The certificate's private key.")
@click.option(
    "--web.tls-client-ca-file",
    "ca",
    type=click.Path(dir_okay=False),
    help="Ask clients for a certificate by this CA.",
)
@click.option("--by-vm", is_flag=True, help="Label the metrics with each VM's name and the pid of its VMM.")
@click.option("--pid", type=click.IntRange(min=1), help="Trace the VMM with this process id alone.")
@backend_option
@click.option("--wait-module", is_flag=True, help="Wait until kvm_intel is loaded.")
def run(  # noqa: PLR0917 (click passes them by name)
    address: tuple[str, int],
    cert: str | None,
    key: str | None,
    ca: str | None,
    by_vm: bool,
    pid: int | None,
    backend: str,
    wait_module: bool,
) -> None:
    """Trace, and serve the counts to Prometheus until SIGINT or SIGTERM."""
    if (key or ca) and not cert:
        raise click.UsageError("--web.tls-key-file and --web.tls-client-ca-file need --web.tls-cert-file")
    if cert and not key:
        raise click.UsageError("--web.tls-cert-file needs --web.tls-key-file")
    machine = Machine.here()
    check_pid(pid)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    problem = obstacle(machine, ignore=("kvm-intel", "symbols") if wait_module else ())
    if problem:
        raise MsrtraceError(problem)

    from prometheus_client import CollectorRegistry, ProcessCollector

    from tracer.export.metrics import SnapshotCollector
    from tracer.export.server import Server
    from tracer.trace.engine import Engine
    from tracer.trace.plan import Options
    from tracer.trace.tracer import Tracer, loaded_module

    if wait_module and loaded_module() is None:
        say("waiting for kvm_intel to be loaded")
        while loaded_module() is None:
            if stop.wait(_FOLLOW_SECONDS):
                return
    # Before the work of attaching, so that an address that is taken is said at once.
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    server = Server(registry, address, cert=cert, key=key, ca=ca, complain=warn)
    options = Options(by_vm=by_vm, pid=pid, backend=backend)
    tracer = Tracer(lambda layout, symbols: Engine(layout, symbols, options, machine))
    tracer.attach(None if wait_module else machine.symbols)
    try:
        _give_up_rights(attaches_again=tracer.backend == "kprobe")  # fentry holds the module
        _show_probes(tracer)
        registry.register(SnapshotCollector(tracer.snapshot, version(), complain=warn))
        server.start()
        say(f"serving {server.url}")
        pause = _FOLLOW_SECONDS
        while not stop.wait(pause):
            pause = _follow(tracer)
    finally:
        tracer.close()


def _give_up_rights(attaches_again: bool) -> None:
    from tracer.trace.capabilities import keep_needed

    try:
        keep_needed(attaches_again)
    except OSError as error:
        warn(f"this process keeps all its capabilities: {error.strerror}")


def _show_probes(tracer: Tracer) -> None:
    for probe in tracer.probes:
        say(f"{'probing' if probe.attached else 'NOT probing'} {probe.function}: {probe.detail}")
    say(f"backend {tracer.backend}")
    for warning in tracer.warnings:
        warn(warning)


def _follow(tracer: Tracer) -> float:
    """Follow a reload of kvm_intel, and say so; how long to wait before looking again, in seconds."""
    try:
        if tracer.follow():
            if tracer.attached:
                say("kvm_intel was loaded again")
                _show_probes(tracer)
            else:
                say("kvm_intel was unloaded; its counts are kept, and it is traced again when it comes back")
    except MsrtraceError as error:
        warn(f"kvm_intel is not traced, trying again in {_RETRY_SECONDS:.0f} s: {error}")
        return _RETRY_SECONDS
    return _FOLLOW_SECONDS
