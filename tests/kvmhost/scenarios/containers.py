# SPDX-License-Identifier: GPL-2.0-or-later
"""msrtrace's image, run by Debian's Podman: what works in a container, and what does not.

In /in are the image (`store`), Podman with all that it needs (`runtime`), a kernel module and seccomp profiles. VMs run
outside of the containers, whose counts are taken inside.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from guest import ADDRESS, STOCK, accesses, kernel_state, load, output_of, record, scrape, until, vendor, workload

PARANOID_LEVEL = Path("/proc/sys/kernel/perf_event_paranoid")
#: What a filter update of the workload is counted as, and exits: EFER is always intercepted.
UPDATES, VCPUS, READS = 101, 2, 13
#: VMs outside of the containers: one that does nothing, and the workload.
IDLE, COUNTED = "idle-outside", "counted"

THREE = "BPF,PERFMON,SYSLOG"
#: Debian's kernels ask for the last one, too, where perf_event_paranoid is above 2, which is its default.
ALL_FOUR = f"{THREE},SYS_ADMIN"
PARANOID, NOT_PARANOID = 3, 2
BARE = ("--read-only", "--security-opt=no-new-privileges", "--cap-drop=ALL")
HOST_NETWORK, HOST_PIDS = "--network=host", "--pid=host"
#: The profiles of Docker, of this Podman (None: its default) and of Debian 12's Podman.
DOCKER, PODMAN, OLD_PODMAN = "/in/seccomp-docker.json", None, "/in/seccomp-bookworm.json"


@dataclass(frozen=True)
class Row:
    """A way to run a container.

    :param capabilities: all that it gets; None: those that Podman gives
    :param options: of `podman run`
    :param paranoid: the host's kernel.perf_event_paranoid
    :param exits: count exits, too
    """

    capabilities: str | None = ALL_FOUR
    options: tuple[str, ...] = (HOST_PIDS,)
    seccomp: str | None = DOCKER
    paranoid: int = PARANOID
    exits: bool = True

    def command(self) -> list[str]:
        """That and its options."""
        rights = [] if self.capabilities is None else [*BARE, f"--cap-add={self.capabilities}"]
        profile = [f"--security-opt=seccomp={self.seccomp}"] if self.seccomp else []
        return ["podman", "run", HOST_NETWORK, *rights, *profile, *self.options]


ROWS = {
    "documented": Row(),
    "three capabilities": Row(THREE, paranoid=NOT_PARANOID),
    "three capabilities, paranoid kernel": Row(THREE),
    "three capabilities, Podman": Row(THREE, seccomp=PODMAN, paranoid=NOT_PARANOID),
    "three capabilities, Podman of Debian 12": Row(THREE, seccomp=OLD_PODMAN, paranoid=NOT_PARANOID),
    "without SYSLOG": Row("BPF,PERFMON", paranoid=NOT_PARANOID),
    "default capabilities": Row(None),
    "another user": Row(THREE, (HOST_PIDS, "--user=1000:1000"), paranoid=NOT_PARANOID),
    "own pid namespace": Row(options=()),
    "user namespace": Row(options=(HOST_PIDS, "--uidmap=0:100000:65536", "--gidmap=0:100000:65536")),
    "hidden BTF": Row(options=(HOST_PIDS, "--security-opt=mask=/sys/kernel/btf"), exits=False),
    "hidden kallsyms": Row(options=(HOST_PIDS, "--security-opt=mask=/proc/kallsyms")),
    "hidden modules": Row(options=(HOST_PIDS, "--security-opt=mask=/sys/module")),
}

#: What a container does: doctor; a report on what happens until the file `end` is there; and `state`. What was left out
#: of the report is asked for on its own.
INSIDE = """
msrtrace doctor --json >/shared/doctor
[ -n "$BY_VM" ] || msrtrace report --by-vm -- true 2>/shared/by-vm
[ -n "$EXITS" ] || msrtrace report --exits -- true 2>/shared/exits
msrtrace report $EXITS $BY_VM -o /shared/report.json -- \
  sh -c 'touch /shared/begun; until [ -e /shared/end ]; do sleep 0.1; done' 2>/shared/errors || exit
msrtrace state --format json >/shared/state 2>/shared/state-errors
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
    PARANOID_LEVEL.write_text(f"{row.paranoid}\n")
    shared = Path("/tmp/shared")
    shutil.rmtree(shared, ignore_errors=True)
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "inside").write_text(INSIDE)
    given = {"BY_VM": "--by-vm" if HOST_PIDS in row.options else "", "EXITS": "--exits" if row.exits else ""}
    options = [f"--volume={shared}:/shared", *(f"--env={name}={value}" for name, value in given.items())]
    container = subprocess.Popen(
        [*row.command(), "--rm", "--entrypoint=sh", *options, "msrtrace", "/shared/inside"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until(lambda: (shared / "begun").exists() or container.poll() is not None)
    did = {}
    if (shared / "begun").exists():
        did = workload("--vcpus", VCPUS, "--updates", UPDATES, "--initial-run", "--name", COUNTED)
        accesses("--read", f"0xc0000080={READS}")
        (shared / "end").touch()
    output, _ = container.communicate(timeout=300)
    files = {file.name: file.read_text() for file in shared.iterdir() if file.name not in ("inside", "begun", "end")}
    return {"output": output, "workload": did, **files}


def answers() -> bool:
    """Whether msrtrace is ready."""
    with suppress(OSError):
        return bool(urlopen(f"http://{ADDRESS}/-/ready", timeout=60).status == 200)
    return False


def service() -> dict[str, Any]:
    """The image with its own command, but for where it listens: scraped from outside, across a reload, and ended."""
    PARANOID_LEVEL.write_text(f"{PARANOID}\n")
    idle = kernel_state()
    command = ["run", f"--web.listen-address={ADDRESS}", "--by-vm", "--backend=kprobe"]
    started = output_of(*Row(seccomp=PODMAN).command(), "--detach", "--name=msrtrace", "msrtrace", *command)

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
    found["process"] = Path(f"/proc/{pid}/status").read_text()
    [group] = re.findall(r"^0::(.+)", Path(f"/proc/{pid}/cgroup").read_text(), re.M)
    found["memory"] = int(Path(f"/sys/fs/cgroup{group}/memory.peak").read_text())
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
    set_up()
    load(STOCK[vendor().name])
    found: dict[str, Any] = {"service": service(), "own network": own_network()}
    with idle_vm():
        found["rows"] = {name: seen_in(row) for name, row in ROWS.items()}
    record("containers", found)


if __name__ == "__main__":
    main()
