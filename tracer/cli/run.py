# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace run`: Trace, and serve the counts to Prometheus until SIGINT or SIGTERM."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from tracer.cli.command import Documented
from tracer.cli.console import say, version, warn
from tracer.cli.options import TRACING, tracing_options
from tracer.cli.session import module_is_loaded, ready_machine, tracing
from tracer.cli.systemd import Service, listening_sockets
from tracer.model.module_change import FOLLOW_SECONDS
from tracer.model.options import Options

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from tracer.export.security import Security
    from tracer.export.server import Server
    from tracer.trace.tracer import Tracer

DEFAULT_ADDRESS = "127.0.0.1:9753"
#: How long scrapes that are under way may take at the end.
FINISH_SECONDS = 2.0


def host_and_port(text: str) -> tuple[str, int]:
    """HOST:PORT or [IPv6]:PORT; an empty host means every address of the machine, IPv6 and IPv4."""
    host, colon, port = text.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise click.BadParameter(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


@click.command(
    cls=Documented,
    examples={
        "sudo msrtrace run": "Serve the counts to this machine alone, at http://127.0.0.1:9753/metrics",
        "sudo msrtrace run --web.listen-address :9753 --web.config.file web.yml": "To others, with TLS and passwords",
        "sudo msrtrace run --by-vm --exits": "Break down by VM, and count exits, too",
        "sudo msrtrace run --wait-module": "As a service that may start before KVM's module is loaded",
    },
    **{
        **TRACING,
        "environment": (
            *TRACING["environment"],
            *("NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS", "JOURNAL_STREAM"),
        ),
        "files": {
            **TRACING["files"],
            "/etc/default/msrtrace": "the options of msrtrace.service, where a package has installed it",
        },
    },
)
@click.option(
    "--web.listen-address",
    "address",
    type=host_and_port,
    default=DEFAULT_ADDRESS,
    show_default=True,
    metavar="HOST:PORT",
    help="Where to serve; :PORT is every address of the machine.",
)
@click.option(
    "--web.systemd-socket", "activated", is_flag=True, help="Serve on the sockets of systemd's socket unit instead."
)
@click.option(
    "--web.tls-cert-file",
    "cert",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Serve HTTPS with this certificate.",
)
@click.option(
    "--web.tls-key-file", "key", type=click.Path(dir_okay=False), metavar="FILE", help="The certificate's private key."
)
@click.option(
    "--web.tls-client-ca-file",
    "ca",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Require client certificates by this CA.",
)
@click.option(
    "--web.config.file",
    "web_config",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="TLS, passwords and headers, in the format of Prometheus' exporters. Read again when it changes.",
)
@tracing_options
@click.option(
    "--wait-module", is_flag=True, help="Wait until KVM's module for this CPU is loaded; /-/ready is 503 meanwhile."
)
def run(  # noqa: PLR0917 (click passes them by name)
    address: tuple[str, int],
    activated: bool,
    cert: str | None,
    key: str | None,
    ca: str | None,
    web_config: str | None,
    options: Options,
    wait_module: bool,
) -> None:
    """Trace, and serve the counts to Prometheus until SIGINT or SIGTERM.

    As a service of systemd (Type=notify), SIGHUP reads the files of TLS and of --web.config.file again; else it ends.
    """
    from tracer.trace.signals import EndSignals

    _check_usage(activated, cert, key, ca, web_config)
    service, security = Service(), _security(cert, key, ca, web_config)
    with EndSignals(partial(_reload, service, security) if service.managed else None) as signals:
        machine = ready_machine(options, module_may_be_missing=wait_module)

        from prometheus_client import CollectorRegistry, ProcessCollector

        from tracer.export.metrics import SnapshotCollector, UnattachedCollector
        from tracer.export.server import Server

        def registry(collector: Collector) -> CollectorRegistry:
            made = CollectorRegistry()
            ProcessCollector(registry=made)
            made.register(collector)
            return made

        # Bind before attaching, so that an address in use is reported at once.
        where = listening_sockets() if activated else address
        unattached = registry(UnattachedCollector(vendor.vcpu_create[0] for vendor in machine.vendors))
        server = Server(unattached, where, version=version(), security=security, on_error=warn)
        for place in [] if server.tls else server.exposed:
            warn(f"{place} is served as plain HTTP, which other machines can reach and read")

        if wait_module and not module_is_loaded():
            awaited = f"waiting for {' or '.join(vendor.module for vendor in machine.vendors)} to be loaded"
            server.waiting = f"msrtrace is {awaited}."
            server.start(_keep_only_what_reading_takes)
            say(awaited)
            service.ready(awaited)
            while not module_is_loaded():
                service.alive(server.works)
                if signals.wait(FOLLOW_SECONDS):
                    return service.stopping()
            server.waiting = "msrtrace is attaching its probes."
            machine = replace(machine)  # a copy has none of what was read before the module was there
        with tracing(machine, options, states=True) as tracer:
            _drop_capabilities(attaches_again=tracer.backend == "kprobe")  # fentry holds the module
            _show_probes(tracer)
            # From here on, so that threads that read counts have the capabilities that are left, and no others
            server.ready(registry(SnapshotCollector(tracer.snapshot, version(), on_error=warn, state=tracer.state)))
            say(f"serving {' '.join(server.urls)}")
            service.ready(_status(tracer, server))
            while not signals.wait(FOLLOW_SECONDS):
                service.alive(server.works)
                if _follow(tracer):
                    service.status(_status(tracer, server))
            service.stopping()
            server.finish(FINISH_SECONDS)


def _check_usage(activated: bool, cert: str | None, key: str | None, ca: str | None, web_config: str | None) -> None:
    """Raise UsageError if options exclude each other, or need others."""
    addressed = click.get_current_context().get_parameter_source("address") is not ParameterSource.DEFAULT
    if activated and addressed:
        raise click.UsageError("--web.systemd-socket excludes --web.listen-address: the socket unit has the address")
    if (key or ca) and not cert:
        raise click.UsageError("--web.tls-key-file and --web.tls-client-ca-file need --web.tls-cert-file")
    if cert and not key:
        raise click.UsageError("--web.tls-cert-file needs --web.tls-key-file")
    if web_config is not None and cert:
        raise click.UsageError("--web.config.file has its own TLS files: it excludes --web.tls-cert-file and the like")


def _security(cert: str | None, key: str | None, ca: str | None, web_config: str | None) -> Security:
    if web_config is None:
        from tracer.export.security import TlsFiles

        return TlsFiles(cert, key, ca, on_error=warn)
    from tracer.export.web_config import WebConfig

    return WebConfig(web_config, on_error=warn)


def _reload(service: Service, security: Security) -> None:
    say("reading the files of TLS and of --web.config.file again")
    service.reload(security.reload)


def _status(tracer: Tracer, server: Server) -> str:
    """What is traced, and where that is served, for systemd."""
    from tracer.model.vendors import vendor_named

    snapshot = tracer.snapshot()
    module, where = vendor_named(snapshot.vendor).module, f"serving {' '.join(server.urls)}"
    if not tracer.attached:
        return f"waiting for {module} to be loaded again, {where}"
    return f"tracing {module} (layout {snapshot.layout}, backend {tracer.backend}), {where}"


def _keep_only_what_reading_takes() -> None:
    """Drop the other capabilities of this thread. What is wrong with that is said of the main thread's."""
    from tracer.trace.capabilities import drop_capabilities

    with suppress(OSError):
        drop_capabilities(attaches_again=False)


def _drop_capabilities(attaches_again: bool) -> None:
    from tracer.trace.capabilities import drop_capabilities

    try:
        left = drop_capabilities(attaches_again)
    except OSError as error:
        warn(f"this process keeps all its capabilities: {error.strerror}")
        return
    if left and not os.geteuid():  # an ordinary user gains none of them anyhow
        warn(f"without CAP_SETPCAP, the bounding set keeps what no program can gain: {', '.join(left)}")


def _show_probes(tracer: Tracer) -> None:
    for probe in tracer.probes:
        say(f"{'probing' if probe.attached else 'NOT probing'} {probe.function}: {probe.detail}")
    say(f"backend {tracer.backend}")
    for warning in tracer.warnings:
        warn(warning)
    if tracer.state_problem:
        warn(tracer.state_problem)


def _follow(tracer: Tracer) -> bool:
    """Follow a reload of the module, and report it; whether there was one."""
    change = tracer.follow()
    if change is None:
        return False
    if change.problem:
        warn(str(change))
        return True
    say(str(change))
    if change.traced:
        _show_probes(tracer)
    return True
