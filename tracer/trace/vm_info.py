# SPDX-License-Identifier: GPL-2.0-or-later
"""What a virtual machine is called, and which VMM runs it, from the process of the VMM.

KVM itself has no names: it knows the VMM's process, and the VMM was given a name on its
command line, which is in /proc/<pid>/cmdline.
"""

from pathlib import Path

from tracer.model.snapshot import VmInfo
from tracer.model.vmm_id import pid_of, start_of
from tracer.trace.vmm import given_name, given_uuid, vmm_called

NAME_LIMIT = 128
"""The maximum length of a name; a longer one is cut and ends with an ellipsis."""

# A command line may have megabytes. libvirt's, with name and UUID at the front, has about 10 KB.
_READ_LIMIT = 32 * 1024

#: The kernel cuts commands to so many bytes (TASK_COMM_LEN - 1, include/linux/sched.h).
_COMMAND = 15

#: Of so many processes more than run what they are called is cached before those that ended are dropped.
_ROOM = 100


def vm_info(pid: int, proc: Path = Path("/proc")) -> VmInfo | None:
    """The VM that a process runs; None if there is no such process.

    The name is that on the command line, or else the command, /proc/<pid>/comm, in full if it is cut; so is the VMM.
    What there is on the command lines of which VMMs is in vmm.py.

    The owner of a process controls all of these. So characters that are not printable, such
    as line breaks and bidirectional marks, are replaced by U+FFFD, and name and VMM have 1 to
    NAME_LIMIT characters. A UUID has none but its own. None of them need be unique.

    :param pid: of the VMM (its thread group), in the pid namespace of `proc`
    """
    info, _ = _read_info(pid, proc)
    return info


def start_time(pid: int, proc: Path = Path("/proc")) -> int | None:
    """When a process started, in clock ticks after boot; None if it is gone or hidden.

    With the pid this identifies a process uniquely: a reused pid has another start time. A
    zombie counts as gone: so are its VMs, unless it is the first thread alone that has ended.
    Fields 20 and 22 of /proc/<pid>/stat, proc_pid_stat(5).
    """
    stat = _read(proc / str(pid) / "stat")
    # The command, field 2, is in parentheses and may contain any character, including these.
    fields = (stat or b"").rpartition(b")")[2].split()
    try:
        ended = fields[0] in (b"Z", b"X") and int(fields[17]) <= 1
        return None if ended else int(fields[19])
    except (IndexError, ValueError):
        return None


class VmInfos:
    """A cache of what VMs are called, by pid, each valid only during the life of its process.

    What a command line with a name says is cached while the process lives. Without a name it is read
    again each time, as a VMM may rename itself once it is set up.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        """Read from `proc`, the mount point of procfs."""
        self._proc = proc
        self._started: dict[int, int] = {}
        self._infos: dict[int, VmInfo] = {}
        self._room = _ROOM  # processes, until it is looked which of them have ended

    def info(self, vmm: int) -> VmInfo | None:
        """As `vm_info`, of a VMM as in tracer/model/vmm_id.py. After its pid is reused, it is of the new process.

        That is not the VMM if it is known when that began.
        """
        pid = pid_of(vmm)
        started = start_time(pid, self._proc)
        if started is None or started != self._started.get(pid):
            self._started.pop(pid, None)
            self._infos.pop(pid, None)
        if started is None or start_of(vmm) not in (0, started):
            return None
        if pid in self._infos:
            return self._infos[pid]
        info, named = _read_info(pid, self._proc)
        # The process may have ended, and the pid been reused, while its files were read.
        if info is None or start_time(pid, self._proc) != started:
            return None
        self._started[pid] = started
        if named:
            self._infos[pid] = info
        if len(self._started) > self._room:
            self._drop_ended()
        return info

    def _drop_ended(self) -> None:
        self._started = {pid: then for pid, then in self._started.items() if start_time(pid, self._proc) == then}
        self._infos = {pid: info for pid, info in self._infos.items() if pid in self._started}
        self._room = 2 * len(self._started) + _ROOM

    def alive(self, vmm: int) -> bool:
        """Whether a VMM, as in tracer/model/vmm_id.py, is still running.

        Of one of which only the pid is known: whether the process that `info` last described under this pid is; and if
        it has described none, whether any process has it.
        """
        pid = pid_of(vmm)
        started = start_time(pid, self._proc)
        known = start_of(vmm) or self._started.get(pid, started)
        return started is not None and started == known


def info_of_command(command: str) -> VmInfo:
    """What is known of a process that ended before it was looked at: its command, "" if not even that is known."""
    shown = safe_name(command)
    return VmInfo(shown, vmm=vmm_called(shown) or shown)


def _read_info(pid: int, proc: Path) -> tuple[VmInfo | None, bool]:
    """What a process says of its VM, safe to print, if there is such a process; and whether it gives it a name."""
    cmdline, comm = (_read(proc / str(pid) / file) for file in ("cmdline", "comm"))
    if comm is None:
        return None, False
    command = safe_name(comm.decode(errors="replace").removesuffix("\n")) or "?"
    if not cmdline:  # a zombie, or a kernel thread
        return info_of_command(command), False
    arguments = cmdline.decode(errors="replace").removesuffix("\0").split("\0")
    name = next((safe for given in given_name(arguments) if (safe := safe_name(given))), None)
    whole = _untruncated(command, arguments[0])
    vmm = vmm_called(*arguments) or vmm_called(command) or whole
    return VmInfo(name or (whole if len(comm) > _COMMAND else command), given_uuid(arguments), vmm), name is not None


def _untruncated(command: str, program: str) -> str:
    """The command as the program's path has it, if that begins so."""
    file = safe_name(program.rpartition("/")[2])
    return file if file.startswith(command) else command


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
