# SPDX-License-Identifier: GPL-2.0-or-later
"""`msrtrace run`: Trace, and serve the counts to Prometheus until SIGINT or SIGTERM."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from tracer.cli.console import say, version, warn
from tracer.cli.options import tracing_options
from tracer.cli.session import EndSignals, module_is_loaded, ready_machine, tracing, wait_for_module
from tracer.model.module_change import FOLLOW_SECONDS
from tracer.model.options import Options

if TYPE_CHECKING:
    from tracer.trace.tracer import Tracer

DEFAULT_ADDRESS = "127.0.0.1:9753"


class Address(click.ParamType[tuple[str, int]]):
    """HOST:PORT or [IPv6]:PORT; an empty host means every address of the machine."""

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
    help="Require client certificates by this CA.",
)
@tracing_options
@click.option("--wait-module", is_flag=True, help="Wait until KVM's module for this CPU is loaded.")
def run(  # noqa: PLR0917 (click passes them by name)
    address: tuple[str, int],
    cert: str | None,
    key: str | None,
    ca: str | None,
    options: Options,
    wait_module: bool,
) -> None:
    """Trace, and serve the counts to Prometheus until SIGINT or SIGTERM."""
    if (key or ca) and not cert:
        raise click.UsageError("--web.tls-key-file and --web.tls-client-ca-file need --web.tls-cert-file")
    if cert and not key:
        raise click.UsageError("--web.tls-cert-file needs --web.tls-key-file")
    with EndSignals() as signals:
        machine = ready_machine(options, module_may_be_missing=wait_module)

        from prometheus_client import CollectorRegistry, ProcessCollector

        from tracer.export.metrics import SnapshotCollector
        from tracer.export.server import Server

        if wait_module and not module_is_loaded():
            say(f"waiting for {' or '.join(vendor.module for vendor in machine.vendors)} to be loaded")
            if not wait_for_module(signals):
                return
            machine = replace(machine)  # a copy has none of what was read before the module was there
        # Bind before attaching, so that an address in use is reported at once.
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        server = Server(registry, address, cert=cert, key=key, ca=ca, on_error=warn)
        with tracing(machine, options) as tracer:
            _drop_capabilities(attaches_again=tracer.backend == "kprobe")  # fentry holds the module
            _show_probes(tracer)
            registry.register(SnapshotCollector(tracer.snapshot, version(), on_error=warn))
            server.start()
            say(f"serving {server.url}")
            while not signals.wait(FOLLOW_SECONDS):
                _follow(tracer)


def _drop_capabilities(attaches_again: bool) -> None:
    from tracer.trace.capabilities import drop_capabilities

    try:
        left = drop_capabilities(attaches_again)
    except OSError as error:
        warn(f"this process keeps all its capabilities: {error.strerror}")
        return
    if left:
        warn(f"without CAP_SETPCAP, the bounding set keeps what no program can gain: {', '.join(left)}")


def _show_probes(tracer: Tracer) -> None:
    for probe in tracer.probes:
        say(f"{'probing' if probe.attached else 'NOT probing'} {probe.function}: {probe.detail}")
    say(f"backend {tracer.backend}")
    for warning in tracer.warnings:
        warn(warning)


def _follow(tracer: Tracer) -> None:
    """Follow a reload of the module, and report it."""
    change = tracer.follow()
    if change is None:
        return
    if change.problem:
        warn(str(change))
        return
    say(str(change))
    if change.traced:
        _show_probes(tracer)
