# SPDX-License-Identifier: GPL-2.0-or-later
"""msrtrace's image, run by Debian's Podman: what works in a container, and what does not.

In /in are the image (`store`), Podman with all that it needs (`runtime`), a kernel module and seccomp profiles. VMs run
outside of the containers, whose counts are taken inside.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from guest import STOCK, accesses, kernel_state, load, output_of, record, scrape, until, vendor, workload

PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
#: What a filter update of the workload is counted as, and exits: EFER is always intercepted.
UPDATES, VCPUS, READS = 101, 2, 13
#: A VM outside of the containers that does nothing.
IDLE = "idle-outside"
ADDRESS = "127.0.0.1:9753"

#: As in docs/containers.md. Debian's kernels ask for CAP_SYS_ADMIN, too, where perf_event_paranoid is above 2.
THREE = "BPF,PERFMON,SYSLOG"
BARE = ("--read-only", "--security-opt=no-new-privileges", "--cap-drop=ALL")
HOST_NETWORK = "--network=host"
HOST_PIDS = "--pid=host"


def granted(capabilities: str, *options: str) -> tuple[str, ...]:
    """Options of a container with these capabilities alone."""
    return (*BARE, HOST_NETWORK, f"--cap-add={capabilities}", *options)


@dataclass(frozen=True)
class Row:
    """A way to run a container: options of `podman run`, and the host's kernel.perf_event_paranoid (Debian's is 3)."""

    options: tuple[str, ...]
    paranoid: int = 3

    @property
    def by_vm(self) -> str:
        """The option that breaks counts down by VM, where it can be used."""
        return "--by-vm" if HOST_PIDS in self.options else ""


ALL_FOUR = f"{THREE},SYS_ADMIN"
ROWS = {
    "documented": Row(granted(ALL_FOUR, HOST_PIDS)),
    "three capabilities, paranoid 2": Row(granted(THREE, HOST_PIDS), paranoid=2),
    "three capabilities, paranoid 3": Row(granted(THREE, HOST_PIDS)),
    "without SYSLOG": Row(granted("BPF,PERFMON", HOST_PIDS), paranoid=2),
    "default capabilities": Row((HOST_NETWORK, HOST_PIDS)),
    "privileged": Row((HOST_NETWORK, HOST_PIDS, "--privileged")),
    "own pid namespace": Row(granted(ALL_FOUR)),
    "user namespace": Row(granted(ALL_FOUR, "--uidmap=0:100000:65536", "--gidmap=0:100000:65536")),
    "another user": Row(granted(THREE, HOST_PIDS, "--user=1000:1000"), paranoid=2),
    "Docker's seccomp": Row(granted(THREE, HOST_PIDS, "--security-opt=seccomp=/in/seccomp-docker.json"), paranoid=2),
    "Debian 12's seccomp": Row(
        granted(THREE, HOST_PIDS, "--security-opt=seccomp=/in/seccomp-bookworm.json"), paranoid=2
    ),
    "Debian 12's seccomp, SYS_ADMIN": Row(
        granted(ALL_FOUR, HOST_PIDS, "--security-opt=seccomp=/in/seccomp-bookworm.json")
    ),
    "no BTF": Row(granted(ALL_FOUR, HOST_PIDS, "--security-opt=mask=/sys/kernel/btf")),
    "no kallsyms": Row(granted(ALL_FOUR, HOST_PIDS, "--security-opt=mask=/proc/kallsyms")),
    "no /sys/module": Row(granted(ALL_FOUR, HOST_PIDS, "--security-opt=mask=/sys/module")),
}

#: What a container does: doctor; a report on what happens until the file `end` is there; and `state`.
INSIDE = """
msrtrace doctor --json >/shared/doctor; echo $? >/shared/doctor.status
msrtrace report --by-vm -- true >/shared/by-vm 2>&1
msrtrace report --exits $BY_VM --format json -- \
  sh -c 'touch /shared/begun; until [ -e /shared/end ]; do sleep 0.1; done' >/shared/report 2>/shared/report.errors
echo $? >/shared/report.status
msrtrace state --format json >/shared/state 2>/shared/state.errors; echo $? >/shared/state.status
"""


def set_up() -> None:
    """Podman and what it needs: files, an overlay, control groups."""
    subprocess.run(["cp", "-a", "/in/runtime/.", "/"], check=True)
    subprocess.run(["insmod", "/in/overlay.ko"], check=True)
    Path("/sys/fs/cgroup").mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=True)
    etc = Path("/etc/containers")
    etc.mkdir(exist_ok=True)
    storage = '[storage]\ndriver = "overlay"\nrunroot = "/run/containers"\ngraphroot = "/var/lib/containers"\n'
    (etc / "storage.conf").write_text(f'{storage}[storage.options]\nadditionalimagestores = ["/in/store"]\n')
    (etc / "containers.conf").write_text('[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n')


@contextmanager
def idle_vm() -> Iterator[None]:
    """A VM of two vCPUs, whose name is on its command line."""
    ready = Path("/tmp/idle-vm")
    command = ["workload", "--vcpus", str(VCPUS), "--updates", "0", "--initial-run", "--hold", "100000"]
    held = subprocess.Popen([*command, "--ready", str(ready), "--go", "/", "--", "-name", f"guest={IDLE}"])
    try:
        until(ready.exists)
        yield
    finally:
        held.kill()
        held.wait()


def seen_in(row: Row) -> dict[str, Any]:
    """What was seen inside of a container that runs so."""
    PARANOID.write_text(f"{row.paranoid}\n")
    shared = Path("/tmp/shared")
    shutil.rmtree(shared, ignore_errors=True)
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "inside").write_text(INSIDE)
    options = [*row.options, f"--volume={shared}:/shared", f"--env=BY_VM={row.by_vm}", "--entrypoint=sh"]
    with Path("/tmp/container.log").open("w") as log:
        container = subprocess.Popen(
            ["podman", "run", "--rm", *options, "msrtrace", "/shared/inside"], stdout=log, stderr=subprocess.STDOUT
        )
    until(lambda: (shared / "begun").exists() or (shared / "report.status").exists() or container.poll() is not None)
    did = {}
    if (shared / "begun").exists():
        did = workload("--vcpus", VCPUS, "--updates", UPDATES, "--initial-run", "--", "-name", "counted")
        accesses("--read", f"0xc0000080={READS}")
        (shared / "end").touch()
    container.wait(300)
    files = {file.name: file.read_text() for file in shared.iterdir() if file.name not in ("inside", "begun", "end")}
    return {"status": container.returncode, "log": log_of(), "workload": did, **files}


def log_of() -> str:
    """What Podman said."""
    return Path("/tmp/container.log").read_text()


def answers() -> bool:
    """Whether msrtrace is ready."""
    with suppress(OSError):
        return bool(urlopen(f"http://{ADDRESS}/-/ready", timeout=60).status == 200)
    return False


def service() -> dict[str, Any]:
    """The image with its own command, but for where it listens: scraped from outside, across a reload, and ended."""
    PARANOID.write_text("3\n")
    idle = kernel_state()
    options = [*ROWS["documented"].options, "--detach", "--name=msrtrace"]
    command = ["run", f"--web.listen-address={ADDRESS}", "--by-vm", "--backend=kprobe"]
    started = output_of("podman", "run", *options, "msrtrace", *command)

    until(answers)
    found: dict[str, Any] = {"started": started, "scrapes": {}, "workload": {}}
    for moment in ("loaded", "reloaded"):
        if moment == "reloaded":
            load("none")
            until(lambda: "msrtrace_module_unloads_total 1" in scrape())
            load(STOCK[vendor().name])
            until(lambda: re.search(r'probe_attached\{function="\w+_msr_filter_changed"\} 1', scrape()))
        found["scrapes"][f"{moment} before"] = scrape()
        found["workload"][moment] = workload("--vcpus", VCPUS, "--updates", UPDATES, "--initial-run")
        found["scrapes"][f"{moment} after"] = scrape()
    found["health"] = output_of("podman", "healthcheck", "run", "msrtrace")
    pid = output_of("podman", "inspect", "--format", "{{.State.Pid}}", "msrtrace")["stdout"].strip()
    found["process"] = Path(f"/proc/{pid}/status").read_text() + Path(f"/proc/{pid}/smaps_rollup").read_text()
    found["at work"] = kernel_state()
    found["stopped"] = output_of("podman", "stop", "--time=60", "msrtrace")
    found["exit"] = output_of("podman", "inspect", "--format", "{{.State.ExitCode}}", "msrtrace")["stdout"].strip()
    logs = output_of("podman", "logs", "msrtrace")
    found["log"] = logs["stdout"] + logs["stderr"]
    found["states"] = [idle, kernel_state()]
    return found


def own_network() -> dict[str, Any]:
    """The image with exactly its own command, in a network namespace of its own."""
    options = [*BARE, f"--cap-add={ALL_FOUR}", "--network=none", "--detach", "--name=alone"]
    started = output_of("podman", "run", *options, "msrtrace")
    until(lambda: not output_of("podman", "healthcheck", "run", "alone")["status"])
    reached = output_of("python3", "-c", f"from urllib.request import urlopen; urlopen('http://{ADDRESS}/metrics')")
    logs = output_of("podman", "logs", "alone")
    output_of("podman", "rm", "--force", "--time=60", "alone")
    return {"started": started, "reached": reached, "logs": logs}


def main() -> None:
    """Leaves /out/containers.json."""
    print("start", time.monotonic(), flush=True)
    set_up()
    print("set up", time.monotonic(), flush=True)
    load(STOCK[vendor().name])
    found: dict[str, Any] = {"podman": output_of("podman", "--version")["stdout"]}
    found["image"] = json.loads(output_of("podman", "image", "inspect", "msrtrace")["stdout"])
    found["service"] = service()
    print("service", time.monotonic(), flush=True)
    record("containers", found)
    found["own network"] = own_network()
    print("network", time.monotonic(), flush=True)
    with idle_vm():
        found["rows"] = {}
        for name, row in ROWS.items():
            found["rows"][name] = seen_in(row)
            print(name, time.monotonic(), flush=True)
    record("containers", found)


if __name__ == "__main__":
    main()
