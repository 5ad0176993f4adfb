# SPDX-License-Identifier: GPL-2.0-or-later
"""msrtrace as a service on a host with systemd, from before KVM's module is loaded until it is stopped.

The units are those of packaging/systemd, in /in/systemd. No package is installed: a drop-in has the path of msrtrace.
Each part leaves /out/service-NAME.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from exits import CASES
from guest import OUT, STOCK, accesses, kernel_state, load, output_of, until, vendor, workload

UNITS = Path("/etc/systemd/system")
UNIT, SOCKET = "msrtrace.service", "msrtrace.socket"
UPDATES = 10
#: Of the watchdog where it is tried; elsewhere it is the unit's.
WATCHDOG_SECONDS = 20
CERTIFICATE, KEY = Path("/etc/msrtrace/cert.pem"), Path("/etc/msrtrace/key.pem")
#: The clients here trust any certificate: which one it is is looked at.
TRUSTING = ssl._create_unverified_context()


def systemctl(*words: str) -> dict[str, Any]:
    """Run systemctl; its status and output."""
    return output_of("systemctl", *words, timeout=600)


def unit(*properties: str, name: str = UNIT) -> dict[str, str]:
    """Properties of a unit."""
    text = systemctl("show", name, *(f"--property={one}" for one in properties))["stdout"]
    return dict(line.split("=", 1) for line in text.splitlines())


def fetch(path: str = "/metrics", scheme: str = "http") -> tuple[int, str]:
    """The status and the text of an answer."""
    try:
        with urlopen(f"{scheme}://127.0.0.1:9753{path}", timeout=300, context=TRUSTING) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def install() -> dict[str, Any]:
    """What a package does."""
    for name in (UNIT, SOCKET):
        shutil.copy(f"/in/systemd/{name}", UNITS)
    shutil.copy("/in/systemd/msrtrace.default", "/etc/default/msrtrace")
    Path("/etc/sysusers.d").mkdir(exist_ok=True)
    shutil.copy("/in/systemd/msrtrace.sysusers", "/etc/sysusers.d/msrtrace.conf")
    command = re.findall(r"^ExecStart=(.*)", (UNITS / UNIT).read_text(), re.M)[0]
    assert command.startswith("/usr/bin/msrtrace "), command
    local = command.replace("/usr/bin/", "/usr/local/bin/", 1)
    dropin("local", f"ExecStart=\nExecStart={local}")
    made = output_of("systemd-sysusers")
    verified = output_of("systemd-analyze", "verify", "--man=no", f"{UNITS}/{UNIT}", f"{UNITS}/{SOCKET}")
    return {"sysusers": made, "verify": verified, "reload": systemctl("daemon-reload"), "kernel": kernel_state()}


def dropin(name: str, text: str) -> None:
    """Change the service."""
    file = UNITS / f"{UNIT}.d/{name}.conf"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"[Service]\n{text}\n")


def options(text: str) -> None:
    """Set MSRTRACE_OPTIONS."""
    Path("/etc/default/msrtrace").write_text(f'MSRTRACE_OPTIONS="{text}"\n')


def process() -> dict[str, Any]:
    """The service's process: its user, what it may do, and what it is called."""
    pid = unit("MainPID")["MainPID"]
    text = Path(f"/proc/{pid}/status").read_text()
    found: dict[str, Any] = dict(re.findall(r"^(Cap\w+|NoNewPrivs|Seccomp|Uid|Gid|Name):\s+(\S+)", text, re.M))
    limits = Path(f"/proc/{pid}/limits").read_text()
    return found | {"user": output_of("id", "-u", "msrtrace")["stdout"].strip(), "limits": limits}


def waiting() -> dict[str, Any]:
    """Started before KVM's module is loaded; then it is."""
    found: dict[str, Any] = {"start": systemctl("start", UNIT)}
    found["unit"] = unit("ActiveState", "SubState", "StatusText", "Type")
    found["ready"], found["healthy"] = fetch("/-/ready"), fetch("/-/healthy")
    found["metrics"] = fetch()[1]
    load(STOCK[vendor().name])
    until(lambda: fetch("/-/ready")[0] == 200)
    until(lambda: "tracing" in unit("StatusText")["StatusText"])
    found["status"] = unit("StatusText")["StatusText"]
    found["done"] = workload("--updates", UPDATES, "--initial-run")
    found["counted"] = fetch()[1]
    found["process"] = process()
    return found


def security() -> dict[str, Any]:
    """What systemd-analyze thinks of the unit."""
    done = output_of("systemd-analyze", "security", "--no-pager", UNIT)
    return {"text": done["stdout"], "score": float(re.findall(r"exposure level for \S+ ([\d.]+)", done["stdout"])[0])}


def certificate(name: str) -> str:
    """Put a new certificate for NAME in place; its text."""
    words = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        f"/CN={name}",
    ]
    made = output_of("openssl", "req", "-x509", *words, "-keyout", str(KEY), "-out", str(CERTIFICATE))
    assert made["status"] == 0, made
    for file in (CERTIFICATE, KEY):
        shutil.chown(file, "root", "msrtrace")
        file.chmod(0o640)
    return CERTIFICATE.read_text()


def served_certificate() -> str:
    """The one that clients see."""
    return ssl.get_server_certificate(("127.0.0.1", 9753), timeout=120)


def reloading() -> dict[str, Any]:
    """With all options and TLS; counted right after the start; files that change; KVM's module that is reloaded."""
    CERTIFICATE.parent.mkdir(mode=0o750)
    shutil.chown(CERTIFICATE.parent, "root", "msrtrace")
    found: dict[str, Any] = {"certificates": [certificate("one")], "served": []}
    options(f"--by-vm --exits --web.tls-cert-file {CERTIFICATE} --web.tls-key-file {KEY}")
    found["restart"] = systemctl("restart", UNIT)
    found["done"] = workload("--updates", UPDATES, "--initial-run")
    found["counted"] = fetch(scheme="https")[1]
    accesses(*(word for op in CASES["intercepted"].ops for word in op.arguments()))
    found["exits"] = fetch(scheme="https")[1]
    held = subprocess.Popen(
        ["workload", "--updates", "1", "--hold", "600", "--ready", "/tmp/held", "--", "-name", "web"]
    )
    try:
        until(lambda: Path("/tmp/held").exists())
        until(lambda: 'vm="web"' in fetch(scheme="https")[1])
        found["held"], found["pid"] = fetch(scheme="https")[1], held.pid
    finally:
        held.terminate()
        held.wait()
    found["served"].append(served_certificate())
    found["certificates"].append(certificate("two"))
    found["reload"] = systemctl("reload", UNIT)
    until(lambda: served_certificate() == found["certificates"][1], 60)
    found["served"].append(served_certificate())
    CERTIFICATE.write_text("nothing")
    found["invalid"] = systemctl("reload", UNIT)
    until(lambda: "stays in force" in journal())
    found["served"].append(served_certificate())
    found["unit"] = unit("ActiveState", "SubState", "NRestarts")
    certificate("three")
    before = fetch(scheme="https")[1]
    load("none")
    until(lambda: "waiting" in unit("StatusText")["StatusText"])
    found["unloaded"] = unit("StatusText")["StatusText"]
    load("nobtf")
    until(lambda: "tracing" in unit("StatusText")["StatusText"])
    load("none")
    until(lambda: "waiting" in unit("StatusText")["StatusText"])
    load(STOCK[vendor().name])
    until(lambda: "tracing" in unit("StatusText")["StatusText"])
    found["again"] = workload("--updates", UPDATES, "--initial-run")
    return found | {"before": before, "after": fetch(scheme="https")[1], "process": process()}


def journal(*words: str) -> str:
    """What the service said."""
    text: str = output_of("journalctl", "--unit", UNIT, "--no-pager", "--output=cat", *words)["stdout"]
    return text


def watchdog() -> dict[str, Any]:
    """A process that stands still is replaced."""
    options("")
    dropin("watchdog", f"WatchdogSec={WATCHDOG_SECONDS}")
    found: dict[str, Any] = {"reload": systemctl("daemon-reload"), "restart": systemctl("restart", UNIT)}
    workload("--updates", 3)
    found["before"] = fetch()[1]
    pid = int(unit("MainPID")["MainPID"])
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    until(lambda: unit("NRestarts")["NRestarts"] == "1")
    found["seconds"] = time.monotonic() - stopped
    until(lambda: unit("SubState")["SubState"] == "running")
    found["after"] = fetch()[1]
    log = output_of("journalctl", "--unit", UNIT, "--no-pager", "--output=cat")["stdout"]
    (UNITS / f"{UNIT}.d/watchdog.conf").unlink()
    systemctl("daemon-reload")
    return found | {"log": [line for line in log.splitlines() if "atchdog" in line]}


def activation() -> dict[str, Any]:
    """Stopped, it leaves nothing; a scrape starts it; and no scrape is lost over a restart."""
    found: dict[str, Any] = {"stop": systemctl("stop", UNIT), "stopped": unit("ActiveState", "Result")}
    found["kernel"] = kernel_state()
    found["scraped"] = fetch()
    found["started"] = unit("ActiveState")
    answers, errors, enough = list[int](), list[str](), threading.Event()

    def client() -> None:
        while not enough.is_set():
            try:
                answers.append(fetch()[0])
            except OSError as error:
                errors.append(repr(error))

    clients = [threading.Thread(target=client) for _ in range(2)]
    for one in clients:
        one.start()
    until(lambda: len(answers) >= 2 or errors)
    found["restart"] = systemctl("restart", UNIT)
    before = len(answers)
    until(lambda: len(answers) >= before + 4 or errors)
    enough.set()
    for one in clients:
        one.join()
    return found | {"answers": answers, "errors": errors}


def ending() -> dict[str, Any]:
    """Stopped with its socket; what is left, and what the journal has."""
    found: dict[str, Any] = {"stop": systemctl("stop", SOCKET, UNIT), "kernel": kernel_state()}
    found["failed"] = systemctl("--failed", "--no-legend", "--plain")["stdout"]
    lines = output_of("journalctl", "--unit", UNIT, "--no-pager", "--output=json", "_COMM=msrtrace")["stdout"]
    told = [json.loads(line) for line in lines.splitlines()]
    found["journal"] = [(line["PRIORITY"], line["MESSAGE"]) for line in told]
    warnings = output_of("journalctl", "--unit", UNIT, "--no-pager", "-p", "warning", "-o", "json", "_COMM=msrtrace")
    return found | {"warnings": [json.loads(line)["MESSAGE"] for line in warnings["stdout"].splitlines()]}


def main() -> None:
    """Every part in turn."""
    parts: list[Callable[[], dict[str, Any]]] = [install, waiting, security, reloading, watchdog, activation, ending]
    for part in parts:
        begun = time.monotonic()
        try:
            found = part()
        except Exception as error:
            log = output_of("journalctl", "-n", "60", "--no-pager")["stdout"]
            found = {"broken": f"{type(error).__name__}: {error}\n{log}"}
        (OUT / f"service-{part.__name__}.json").write_text(json.dumps(found, indent=1))
        print(f"{part.__name__}: {time.monotonic() - begun:.0f} s{' BROKEN' if 'broken' in found else ''}", flush=True)
        if "broken" in found:
            print(found["broken"], flush=True)


if __name__ == "__main__":
    main()
