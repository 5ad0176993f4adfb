# SPDX-License-Identifier: GPL-2.0-or-later
"""The name of a virtual machine, from the process of its VMM.

KVM itself has no names: it knows the VMM's process, and the VMM was given a name on its
command line, which is in /proc/<pid>/cmdline.
"""

import re
from collections.abc import Iterator
from pathlib import Path

NAME_LIMIT = 128
"""The maximum length of a name; a longer one is cut and ends with an ellipsis."""

# A command line may have megabytes. libvirt's, with the name at the front, has about 10 KB.
_READ_LIMIT = 32 * 1024

# Names of sockets and directories that are the same for every VM. Kata's socket is
# /run/vc/vm/<sandbox>/clh-api.sock, or /run/kata/<sandbox>/root/ch-api.sock.
_COMMON = {"", "api", "ch", "ch-api", "clh", "clh-api", "cloud-hypervisor", "firecracker"}
# crosvm's are /run/vm/<vm>/crosvm.sock (ChromeOS) and instances/<vm>/internal/crosvm_control.sock (Cuttlefish).
_COMMON |= {"crosvm", "crosvm_control", "control", "internal", "instances", "fc", "sock", "socket"}
_COMMON |= {"vm", "vms", "vmm", "root", "run", "tmp", "var", "dev", "shm", "lib", "opt", "srv", "mnt", "lock", "home"}
_COMMON |= {"usr", "etc", "local", "share", "state", "cache", "data", ".local", ".cache", ".config"}
#: A user's own directory, whose name says nothing about the VM.
_OF_USER = re.compile(r"(/var)?/run/user/[^/]*|/home/[^/]*")
#: Of a VM's disks and images, with Multipass.
_MULTIPASS = re.compile(r"/vault/instances/([^/,]+)/")
_SOCKET_SUFFIX = re.compile(r"(\.sock(et)?|-socket|-event-monitor-fifo)$")


def vm_name(pid: int, proc: Path = Path("/proc")) -> str | None:
    """The name of the VM that a process runs, safe to print; None if there is no such process.

    The first of these, whatever the program is called:

    - ``-name web`` or ``-name guest=web,...`` (QEMU, libvirt), ``--name web`` (QEMU, kvmtool);
    - ``--id web`` (Firecracker, and its jailer);
    - the file name of the API socket, ``--api-socket path=/run/ch/web.sock``, or of the event
      monitor's file (Cloud Hypervisor, whose command line has no name; libvirt gives it
      ``--api-socket fd=N --event-monitor path=.../web-event-monitor-fifo``), without its
      extension, or the directory's if the file has the same name for every VM;
    - what a program that is known by its name was given: ``-id web`` (Kata's containerd-shim, which is the VMM itself
      with Dragonball), ``-s .../web.sock`` or ``--socket`` (crosvm), ``-avd web`` or ``@web`` (Android's emulator);
    - the last argument of ``boot --bundle=... web`` (gVisor's sandbox);
    - the directory of its disks, ``.../vault/instances/web/`` (Multipass);
    - the command, /proc/<pid>/comm.

    The owner of a process controls all of these. So characters that are not printable, such
    as line breaks and bidirectional marks, are replaced by U+FFFD, and the name has 1 to
    NAME_LIMIT characters. It need not be unique.

    :param pid: of the VMM (its thread group), in the pid namespace of `proc`
    """
    return _given_name(pid, proc) or _command(pid, proc)


def start_time(pid: int, proc: Path = Path("/proc")) -> int | None:
    """When a process started, in clock ticks after boot; None if it is gone or hidden.

    With the pid this identifies a process uniquely: a reused pid has another start time. A
    zombie counts as gone: so are its VMs. Field 22 of /proc/<pid>/stat, proc_pid_stat(5).
    """
    stat = _read(proc / str(pid) / "stat")
    # The command, field 2, is in parentheses and may contain any character, including these.
    fields = (stat or b"").rpartition(b")")[2].split()
    try:
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (IndexError, ValueError):
        return None


class VmNames:
    """A cache of VM names by pid, each valid only during the life of its process.

    A name from the command line is cached while the process lives. A command name is read
    again each time, as a VMM may rename itself once it is set up.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        """Read from `proc`, the mount point of procfs."""
        self._proc = proc
        self._started: dict[int, int] = {}
        self._names: dict[int, str] = {}

    def name(self, pid: int) -> str | None:
        """As `vm_name`. After the pid is reused, it is the new process's name."""
        started = start_time(pid, self._proc)
        if started is None or started != self._started.get(pid):
            self._started.pop(pid, None)
            self._names.pop(pid, None)
        if started is None:
            return None
        if pid in self._names:
            return self._names[pid]
        given = _given_name(pid, self._proc)
        name = given or _command(pid, self._proc)
        # The process may have ended, and the pid been reused, while its files were read.
        if name is None or start_time(pid, self._proc) != started:
            return None
        self._started[pid] = started
        if given is not None:
            self._names[pid] = given
        return name

    def alive(self, pid: int) -> bool:
        """Whether the process that `name` last named under this pid is still running.

        For a pid without a name: whether any process has it.
        """
        started = start_time(pid, self._proc)
        return started is not None and started == self._started.get(pid, started)


def _given_name(pid: int, proc: Path) -> str | None:
    """The name on a process's command line, safe to print, or None."""
    content = _read(proc / str(pid) / "cmdline")
    if not content:  # gone, a zombie, or a kernel thread
        return None
    program, *arguments = content.decode(errors="replace").removesuffix("\0").split("\0")
    found = [
        *(_qemu_guest(value) for value in _values(arguments, "-name", "--name")),
        *_values(arguments, "--id"),
        *(_file_name(value) for value in _values(arguments, "--api-socket", "--api-sock")),
        *(_file_name(value) for value in _values(arguments, "--event-monitor")),
        *_of_program(program.rpartition("/")[2], arguments),
        _gvisor_sandbox(arguments),
        *(match[1] for match in map(_MULTIPASS.search, arguments) if match),
    ]
    return next((safe for name in found if name and (safe := safe_name(name))), None)


def _of_program(program: str, arguments: list[str]) -> Iterator[str | None]:
    """Names from options that mean something else to other programs: QEMU's ``-s`` is a debugger's port."""
    if program.startswith("containerd-shim"):
        yield from _values(arguments, "-id")
    elif program.startswith("crosvm"):
        yield from (_file_name(value) for value in _values(arguments, "-s", "--socket"))
    elif program.startswith(("qemu-system", "emulator")):
        yield from _values(arguments, "-avd")
        yield from (argument[1:] for argument in arguments if argument.startswith("@"))


def _gvisor_sandbox(arguments: list[str]) -> str | None:
    """The container's id: the last argument of ``runsc ... boot --bundle=... ID`` (runsc/sandbox/sandbox.go)."""
    if "boot" not in arguments:
        return None
    *options, last = arguments[arguments.index("boot") + 1 :] or [""]
    bundle = any(option.lstrip("-").partition("=")[0] == "bundle" for option in options if option.startswith("-"))
    if not bundle or last.startswith("-") or options[-1] in ("-bundle", "--bundle"):
        return None
    return last


def _command(pid: int, proc: Path) -> str | None:
    """The command name of a process, safe to print."""
    content = _read(proc / str(pid) / "comm")
    if content is None:
        return None
    return safe_name(content.decode(errors="replace").removesuffix("\n")) or "?"


def _values(arguments: list[str], *options: str) -> Iterator[str]:
    """The values of an option, given as ``--id web`` or ``--id=web``, the last first."""
    following = ""
    for argument in reversed(arguments):
        option, equals, value = argument.partition("=")
        if option in options:
            yield value if equals else following
        following = argument


def _qemu_guest(value: str) -> str | None:
    """The guest's name in the value of QEMU's -name.

    QEMU's syntax (get_opt_name_value in util/qemu-option.c): ``key=value`` separated by commas; a
    comma in a value is doubled, the first may omit ``guest=``, the last of several wins.
    """
    guest = None
    # No argument contains a NUL, so it can stand for a doubled comma.
    for number, option in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, text = option.partition("=")
        if number == 0 and (not equals or "\0" in key):
            guest = option
        elif key == "guest":
            guest = text
    return guest and guest.replace("\0", ",")


def _file_name(value: str) -> str | None:
    """The part of a socket's path, ``<path>`` or ``path=<path>``, that distinguishes the VM."""
    if value.startswith("fd="):
        return None
    path = _OF_USER.sub("", value.removeprefix("path=").partition(",")[0], count=1)
    for part in reversed(path.split("/")):
        name = _SOCKET_SUFFIX.sub("", part)
        if name not in _COMMON:
            return name
    return None


def safe_name(name: str) -> str:
    """The name, safe for a terminal or a label; empty if nothing in it is visible."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name).strip()
    if len(shown) > NAME_LIMIT:
        return shown[: NAME_LIMIT - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return shown


def _read(path: Path) -> bytes | None:
    """The start of a file of a process; None if the process is gone or reading is not permitted."""
    try:
        with path.open("rb") as file:
            return file.read(_READ_LIMIT)
    except OSError:
        return None
