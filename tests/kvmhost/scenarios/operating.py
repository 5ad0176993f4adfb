# SPDX-License-Identifier: GPL-2.0-or-later
"""A new operator's hour on one host: `operating.py HOST COORDINATOR OTHER_PORT`, from a fresh system to a clean one.

Each step is a command as an operator types it, and what is true after it; the first that is not ends the run. The
steps of the hosts are kept together by tests/kvmhost/operators_hour.py, which also prints the log.

HOST is also what it does: debian12 is scraped over the network, with TLS and a password; debian13 has the Prometheus,
and scrapes itself, too.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOST, COORDINATOR, OTHER_PORT = sys.argv[1:]
MONITORING = HOST == "debian13"
OUT = Path("/out/operating.json")
OUTSIDE = "10.0.2.2"  # this machine, as guests see it
BEGAN = time.time()
RATE_SECONDS = 20  # of scrapes, so that rates are known
UPDATES, VCPUS = 47, 4
WORKLOAD = f"workload --vms 2 --vcpus 2 --updates {UPDATES} --interval 100 --initial-run"
PASSWORD = "correct horse"
METRICS = "https://localhost:9753/metrics" if not MONITORING else "http://127.0.0.1:9753/metrics"
UNIT = "msrtrace.service"
#: With --by-vm, what there is of VMs that are gone, too.
HOST_UPDATES = "msrtrace_host_filter_updates_total"
#: What a package may leave when it is purged: what the system writes about it.
LOGS = ("/var/log/", "/var/lib/systemd/", "/var/cache/apt/", "/var/lib/apt/", "/in/", "/out/", "/tmp/", "/root/")


#: What the operator made, and so removes.
OPERATORS = ("/etc/msrtrace/", "/etc/systemd/system/msrtrace.socket.d/")


class Failed(Exception):
    """A step did not do what it should."""


def tell(path: str, **content: Any) -> dict[str, Any]:
    """Tell the coordinator; its answer."""
    request = urllib.request.Request(
        f"http://{OUTSIDE}:{COORDINATOR}/{path}", json.dumps({"host": HOST, **content}).encode()
    )
    with urllib.request.urlopen(request, timeout=1200) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def log(line: str) -> None:
    """A line of the log."""
    tell("log", line=line)


def meet(step: str, content: str = "") -> dict[str, str]:
    """Wait until all have come to this step; what they brought, by host."""
    return tell(f"meet/{step}", content=content)


def sh(command: str, *, shown: bool = True, status: int = 0) -> str:
    """Run a command as an operator types it; its output. It must end with this status."""
    if shown:
        log(f"# {command}")
    done = subprocess.run(
        ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200, check=False
    )
    if done.returncode != status:
        raise Failed(f"{command}: status {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout.strip()


def check(true: object, line: str) -> None:
    """What must be true, and how it is logged."""
    if not true:
        raise Failed(
            f"not so: {line}\n{sh(f'systemctl status {UNIT}; journalctl -u {UNIT} | tail -30; true', shown=False)}"
        )
    log(f"    {line}")


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """What the condition returns once it is true; what it returned last after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = condition()
        except (OSError, ValueError):
            found = None
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def get(url: str) -> str:
    """The text at a URL, with the password."""
    request = urllib.request.Request(url)
    context = None
    if url.startswith("https"):
        request.add_header("Authorization", "Basic " + b64encode(f"prometheus:{PASSWORD}".encode()).decode())
        context = ssl.create_default_context(cafile="/etc/msrtrace/cert.pem")
    with urllib.request.urlopen(request, timeout=60, context=context) as answer:
        text: bytes = answer.read()
    return text.decode()


def value(name: str, text: str, *, among: str = "") -> float:
    """The sum of a metric's series, of VMs that are gone too; `among` restricts them by a label."""
    for prefix in ("msrtrace_host_", "msrtrace_"):
        pattern = rf"^{prefix}{name}(?:{{[^}}]*{among}[^}}]*}}){'' if among else '?'} (\S+)$"
        if found := re.findall(pattern, text, re.M):
            return sum(map(float, found))
    return 0


def query(expression: str) -> dict[str, float]:
    """The answer of Prometheus by instance."""
    parameters = urllib.parse.urlencode({"query": expression})
    found = json.loads(get(f"http://127.0.0.1:9090/api/v1/query?{parameters}"))["data"]["result"]
    return {one["metric"].get("instance", ""): float(one["value"][1]) for one in found}


def kernel_state() -> dict[str, Any]:
    """What tracers have in the kernel."""
    programs = json.loads(sh("bpftool --json prog list", shown=False) or "[]")
    return {
        "probes": len(sh("cat /sys/kernel/debug/kprobes/list", shown=False).splitlines()),
        # systemd has programs of its own, which are of types that msrtrace has none of.
        "programs": len([one for one in programs if one["type"] in ("kprobe", "tracing", "raw_tracepoint")]),
    }


def files() -> list[str]:
    """All files of the system but its logs."""
    listed = sh("find / -xdev -not -type d", shown=False).splitlines()
    return [file for file in listed if not file.startswith(LOGS)]


def main_pid() -> int:
    """The process of the service."""
    return int(sh(f"systemctl show --property MainPID --value {UNIT}", shown=False))


def counted(expected: int, label: str) -> None:
    """VMs get filter updates, and the service counts these, all of them and no others."""
    before = get(METRICS)
    sh(WORKLOAD)
    after = get(METRICS)
    updates = value("filter_updates_total", after) - value("filter_updates_total", before)
    changes = {"name": "intercept_calls_total", "among": 'cause="filter_change"'}
    calls = value(text=after, **changes) - value(text=before, **changes)
    per_update = calls / updates if updates else 0
    check(
        (updates, per_update) == (UPDATES * VCPUS, expected),
        f"{label}: {updates:.0f} filter updates of {UPDATES * VCPUS}, {per_update:g} calls each",
    )


def install(version: str) -> None:
    """The package, from a fresh system to a service that is ready."""
    sh("cp /in/repository/kvmhost.list /etc/apt/sources.list.d/ && apt-get -qq update", shown=False)
    begun = time.monotonic()
    sh(f"apt-get install -y msrtrace={version}")
    check(
        sh(f"systemctl is-active {UNIT}; systemctl is-enabled {UNIT}", shown=False) == "active\nenabled",
        f"{UNIT} is active and enabled {time.monotonic() - begun:.0f} s later",
    )
    check(
        until(lambda: "has counts" in get("http://127.0.0.1:9753/-/ready")),
        "http://127.0.0.1:9753/-/ready: it has counts",
    )
    sh("msrtrace doctor")
    check(True, "nothing is missing")


def serve_to_the_network() -> None:
    """TLS, a password, every address, and the counts of each VM."""
    sh("install -d -m 750 -g msrtrace /etc/msrtrace")
    sh(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj /CN=debian12 "
        "-addext subjectAltName=DNS:localhost,IP:10.0.2.2 -keyout /etc/msrtrace/key.pem -out /etc/msrtrace/cert.pem"
    )
    hashed = sh(
        f"python3 -c 'import bcrypt; print(bcrypt.hashpw(b\"{PASSWORD}\", bcrypt.gensalt(4)).decode())'", shown=False
    )
    Path("/etc/msrtrace/web.yml").write_text(
        f"tls_server_config:\n  cert_file: cert.pem\n  key_file: key.pem\nbasic_auth_users:\n  prometheus: {hashed}\n"
    )
    sh("chgrp msrtrace /etc/msrtrace/* && chmod 640 /etc/msrtrace/*", shown=False)
    options = "--web.config.file /etc/msrtrace/web.yml --by-vm"
    sh(f"sed -i 's|^MSRTRACE_OPTIONS=.*|MSRTRACE_OPTIONS=\"{options}\"|' /etc/default/msrtrace")
    addresses = "[Socket]\\nListenStream=\\nListenStream=9753\\n"
    sh(f"printf '{addresses}' | systemctl edit --stdin msrtrace.socket" if _edits() else _by_hand(addresses))
    sh(f"systemctl restart msrtrace.socket {UNIT}")
    check("msrtrace_build_info" in until(lambda: get(METRICS)), f"{METRICS} answers with the password")
    sh("curl --silent --fail --insecure https://localhost:9753/metrics", status=22)
    check(True, "and refuses who has none")


def _edits() -> bool:
    """Whether this systemd has `systemctl edit --stdin` (256 and newer)."""
    return int(sh("systemctl --version", shown=False).split()[1]) >= 256


def _by_hand(text: str) -> str:
    place = "/etc/systemd/system/msrtrace.socket.d"
    return f"mkdir -p {place} && printf '{text}' > {place}/override.conf && systemctl daemon-reload"


def monitor(before: str) -> None:
    """Beside that version, Prometheus with the rules and two targets."""
    # The version is named, or apt would upgrade all packages of one source together.
    sh(f"apt-get install -y --no-install-recommends prometheus msrtrace-monitoring msrtrace={before}")
    other = meet("certificate")["debian12"]
    Path("/etc/prometheus/debian12.pem").write_text(other)
    configuration = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "2s"},
        "rule_files": [rules()],
        "scrape_configs": [
            {
                "job_name": "msrtrace",
                "static_configs": [{"targets": ["127.0.0.1:9753"], "labels": {"host": "debian13"}}],
            },
            {
                "job_name": "msrtrace-tls",
                "scheme": "https",
                "tls_config": {"ca_file": "debian12.pem"},
                "basic_auth": {"username": "prometheus", "password": PASSWORD},
                "static_configs": [{"targets": [f"{OUTSIDE}:{OTHER_PORT}"], "labels": {"host": "debian12"}}],
            },
        ],
    }
    Path("/etc/prometheus/prometheus.yml").write_text(json.dumps(configuration))  # JSON is YAML
    sh("promtool check config /etc/prometheus/prometheus.yml")
    sh("systemctl reload-or-restart prometheus")


def rules() -> str:
    """Where the package has the rules."""
    return sh("dpkg -L msrtrace-monitoring | grep '/rules.yml$'", shown=False)


def first_boot(version: str, before: str, expected: int) -> None:
    """Everything up to the reboot; BEFORE is the version that is installed first."""
    fresh, idle = files(), kernel_state()
    Path("/root/fresh").write_text(json.dumps([fresh, idle]))
    install(before)
    if MONITORING:
        monitor(before)
    else:
        serve_to_the_network()
        meet("certificate", Path("/etc/msrtrace/cert.pem").read_text())
    meet("installed")
    counted(expected, "workload")
    meet("counted")
    if MONITORING:
        up = until(lambda: (found := query("up")) and sum(found.values()) == 2 and found)
        check(up, f"Prometheus scrapes both: {sorted(up or {})}")
        time.sleep(6)  # some scrapes
        seen = query(f"sum by (instance) ({HOST_UPDATES}) or sum by (instance) (msrtrace_filter_updates_total)")
        check([*seen.values()] == [UPDATES * VCPUS] * 2, f"Prometheus has {UPDATES * VCPUS} filter updates of each")
    meet("checked")
    # VMs whose filters change all the time, until the dashboard has been asked.
    vms = subprocess.Popen(["workload", "--vms", "2", "--vcpus", "2", "--forever", "--interval", "200"])
    time.sleep(RATE_SECONDS)
    if MONITORING:
        dashboard = json.loads(Path("/usr/share/msrtrace-monitoring/grafana.json").read_text())
        meet("dashboard", json.dumps({"dashboard": dashboard, "began": BEGAN, "now": time.time()}))
    meet("asked")
    vms.terminate()
    vms.wait()
    upgrade(version, before, expected)
    meet("upgraded")
    reload_module(expected)
    meet("reloaded")
    sh("systemctl reboot")
    time.sleep(600)


def upgrade(version: str, before: str, expected: int) -> None:
    """The new version: another process, nothing stale, and counts that began anew and say so."""
    pid, state, text = main_pid(), kernel_state(), get(METRICS)
    check(f'version="{before.partition("-")[0]}"' in text, f"version {before} counts")
    sh(f"apt-get install -y msrtrace={version}")
    text = until(lambda: (found := get(METRICS)) and "msrtrace_build_info" in found and found)
    check(main_pid() not in (0, pid), "another process serves")
    check(f'version="{version.partition("-")[0]}"' in text, f"of version {version}")
    check(
        kernel_state() == state,
        f"with {state['programs']} programs and {state['probes']} kprobes in the kernel, as before",
    )
    check(value("filter_updates_total", text) == 0, "its counts begin at 0, and its start time says so")
    check(sh("dpkg -V msrtrace; true", shown=False).splitlines() in ([], [_CHANGED]), "dpkg -V msrtrace: as shipped")
    counted(expected, "workload")


_CHANGED = "??5?????? c /etc/default/msrtrace"


def reload_module(expected: int) -> None:
    """KVM's module is unloaded and loaded again, which the service follows."""

    def loads() -> int:
        return sh(f"journalctl --no-pager -u {UNIT}", shown=False).count("was loaded again")

    before = loads()
    sh("kvm-module unpatched")
    check(until(lambda: loads() > before), "the journal has: kvm_amd was loaded again")
    counted(expected, "workload")


def second_boot(expected: int) -> None:
    """What is there without anybody doing anything, and what is left when all is removed."""
    check(
        until(lambda: "msrtrace_build_info" in get(METRICS)),
        f"after the reboot {UNIT} serves, with nobody doing anything",
    )
    check(sh("systemctl --failed --no-legend --plain", shown=False) == "", "no unit has failed")
    counted(expected, "workload")
    meet("rebooted")
    if MONITORING:
        resets = until(
            lambda: (found := query("min by (instance) (changes(process_start_time_seconds[1h])) > 1")) and found
        )
        check(
            len(resets) == 2, f"Prometheus saw both start anew: {sorted(resets.values())} changes of their start times"
        )
    meet("seen")
    remove()


def remove() -> None:
    """Purge, and look for what is left."""
    fresh, idle = json.loads(Path("/root/fresh").read_text())
    packages = "msrtrace msrtrace-monitoring prometheus" if MONITORING else "msrtrace"
    sh(f"apt-get purge -y --autoremove {packages}")
    check(sh("pgrep -a msrtrace; true", shown=False) == "", "no process is left")
    check(kernel_state() == idle, "no probe and no BPF program is left")
    left = sorted(file for file in set(files()) - set(fresh) if "msrtrace" in file and not file.startswith(OPERATORS))
    check(left == [], f"no file is left but what the operator made {left or ''}")
    check("msrtrace" not in sh("systemctl list-unit-files --no-legend; true", shown=False), "no unit is left")


def main() -> None:
    """Do it, from where this boot begins."""
    settings = json.loads(Path("/in/operating.json").read_text())
    version, before, expected = settings["version"], settings["before"], settings["expected"]
    try:
        if os.environ["BOOT"] == "1":
            first_boot(version, before, expected)
        else:
            second_boot(expected)
    except BaseException as error:
        tell("failed", why=f"{type(error).__name__}: {error}")
        raise
    OUT.write_text(json.dumps({"done": True}))
    meet("end")


main()
