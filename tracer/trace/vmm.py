# SPDX-License-Identifier: GPL-2.0-or-later
"""What the command line of a VMM says: the VM's name, its UUID, and which VMM it is.

All functions take arguments as /proc/<pid>/cmdline has them, the program first. Their owner controls them: what is
returned may contain anything but NUL, unless a function says more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

#: VMMs by how their programs are called; the file name may go on with a version or a variant.
_VMMS = {
    "qemu": re.compile(r"qemu|(kvm|kvm-spice|emulator|emulator64-.*)$"),  # Android's emulator is one
    "cloud-hypervisor": re.compile(r"cloud-hyperviso"),  # a command has 15 characters
    "firecracker": re.compile(r"firecracker"),
    "crosvm": re.compile(r"crosvm"),
    "gvisor": re.compile(r"runsc"),
    "kata": re.compile(r"containerd-shim-kata"),  # Dragonball, inside Kata's shim
    "kvmtool": re.compile(r"lkvm|kvmtool"),
    "krunvm": re.compile(r"krunvm"),
    "stratovirt": re.compile(r"stratovirt"),
    "virtualbox": re.compile(r"VBoxHeadless|VirtualBoxVM"),
}

# Names of sockets and directories that are the same for every VM. Kata's socket is
# /run/vc/vm/<sandbox>/clh-api.sock, or /run/kata/<sandbox>/root/ch-api.sock.
_COMMON = {"", "api", "ch", "ch-api", "clh", "clh-api", "cloud-hypervisor", "firecracker"}
# crosvm's are /run/vm/<vm>/crosvm.sock (ChromeOS) and instances/<vm>/internal/crosvm_control.sock (Cuttlefish).
_COMMON |= {"crosvm", "crosvm_control", "control", "internal", "instances", "fc", "sock", "socket"}
_COMMON |= {"vm", "vms", "vmm", "root", "run", "tmp", "var", "dev", "shm", "lib", "opt", "srv", "mnt", "lock", "home"}
_COMMON |= {"config", "fc_config", "firecracker-config", "vm-config", "vm_config", "vmconfig"}
_COMMON |= {"usr", "etc", "local", "share", "state", "cache", "data", ".local", ".cache", ".config"}
#: A user's own directory, whose name says nothing about the VM.
_OF_USER = re.compile(r"(/var)?/run/user/[^/]*|/home/[^/]*")
#: Of a VM's disks and images, with Multipass; of its monitor's socket, with `podman machine`.
_IN_PATHS = re.compile(r"/vault/instances/([^/,]+)/|/podman/qmp_([^/,]+)\.sock")
_SUFFIX = re.compile(r"(\.sock(et)?|-socket|-event-monitor-fifo|\.json)$")

#: As QEMU takes it, and the other forms that Rust's Uuid::parse_str() does (Cloud Hypervisor, crosvm).
_UUID = re.compile(
    r"(?:urn:uuid:)?(\{)?([0-9a-f]{8})(-?)([0-9a-f]{4})\3([0-9a-f]{4})\3([0-9a-f]{4})\3([0-9a-f]{12})(?(1)\})", re.I
)


def vmm_called(program: str, *arguments: str) -> str | None:
    """The VMM that a program is, by its name or by arguments that only one VMM has; None if it is not a known one.

    :param program: its path, or its command name of up to 15 characters
    """
    called = program.rpartition("/")[2].lstrip(".")  # NixOS: .qemu-system-x86_64-wrapped
    found = (vmm for vmm, pattern in _VMMS.items() if pattern.match(called))
    return next(found, None) or ("gvisor" if _gvisor_sandbox(arguments) else None)


def given_name(command_line: Sequence[str]) -> Iterator[str]:
    """The names of the VM on a command line, the best one first; none if it says nothing.

    They are, whatever the program is called:

    - ``-name web`` or ``-name guest=web,...`` (QEMU, libvirt), ``--name web`` (QEMU, kvmtool);
    - ``--id web`` (Firecracker, and its jailer);
    - the file name of the API socket, ``--api-socket path=/run/ch/web.sock``, or of the event
      monitor's file (Cloud Hypervisor, whose command line has no name; libvirt gives it
      ``--api-socket fd=N --event-monitor path=.../web-event-monitor-fifo``), without its
      extension, or the directory's if the file has the same name for every VM;
    - what a program that is known by its name was given: ``-id web`` (Kata's containerd-shim, which is the VMM itself
      with Dragonball), ``-s .../web.sock`` or ``--socket`` (crosvm), ``-avd web`` or ``@web`` (Android's emulator),
      ``--comment web`` (VirtualBox), ``start web`` (krunvm), ``--config-file .../web.json`` (Firecracker);
    - the last argument of ``boot --bundle=... web`` (gVisor's sandbox);
    - the directory of its disks, ``.../vault/instances/web/`` (Multipass), or the file name of its monitor,
      ``.../podman/qmp_web.sock`` (podman machine).
    """
    program, *arguments = command_line
    found = [
        *(_qemu_guest(value) for value in _values(arguments, "-name", "--name")),
        *_values(arguments, "--id"),
        *(_file_name(value) for value in _values(arguments, "--api-socket", "--api-sock")),
        *(_file_name(value) for value in _values(arguments, "--event-monitor")),
        *_name_of_program(program, arguments),
        _gvisor_sandbox(arguments),
        *(match[1] or match[2] for match in map(_IN_PATHS.search, arguments) if match),
    ]
    return (name for name in found if name)


def given_uuid(command_line: Sequence[str]) -> str:
    """The UUID that the command line gives to the VM, in lower case with hyphens; "" if it gives none.

    It is that of ``-uuid`` (QEMU, and so libvirt; StratoVirt) or ``-smbios type=1,uuid=...`` (QEMU, and so Proxmox),
    of ``--platform uuid=...`` (Cloud Hypervisor), ``--smbios uuid=...`` (crosvm), ``--startvm`` (VirtualBox). Ids
    are not UUIDs: neither Firecracker's, nor those of Kata's and gVisor's sandboxes.
    """
    program, *arguments = command_line
    vmm = vmm_called(program)
    for option, value in _options(arguments):
        text: str | None = None
        if option in ("-uuid", "--uuid") or (vmm == "virtualbox" and option in ("--startvm", "-startvm")):
            text = value
        elif option in ("-smbios", "--smbios") and vmm != "crosvm":
            fields = dict(_qemu_fields(value))
            text = fields.get("uuid") if fields.get("type") == "1" else None
        elif option in ("--platform", "--smbios"):
            text = dict(_rust_fields(value)).get("uuid")
        match = _UUID.fullmatch(text or "")
        if match:
            uuid = "-".join((match[2], *match.groups()[3:])).lower()
            return uuid if uuid.strip("0-") else ""
    return ""


def _name_of_program(program: str, arguments: list[str]) -> Iterator[str | None]:
    """Names from options that mean something else to other programs: QEMU's ``-s`` is a debugger's port."""
    vmm = vmm_called(program)
    if program.rpartition("/")[2].startswith("containerd-shim"):
        yield from _values(arguments, "-id")
    elif vmm == "crosvm":
        yield from (_file_name(value) for value in _values(arguments, "-s", "--socket"))
    elif vmm == "qemu":
        yield from _values(arguments, "-avd")
        yield from (argument[1:] for argument in arguments if argument.startswith("@"))
    elif vmm == "virtualbox":
        yield from _values(arguments, "--comment", "-comment")
    elif vmm == "firecracker":
        yield from (_file_name(value) for value in _values(arguments, "--config-file"))
    elif vmm == "krunvm" and "start" in arguments:
        yield next((a for a in arguments[arguments.index("start") + 1 :] if not a.startswith("-")), None)


def _gvisor_sandbox(arguments: Sequence[str]) -> str | None:
    """The container's id: the last argument of ``runsc ... boot --bundle=... ID`` (runsc/sandbox/sandbox.go)."""
    if "boot" not in arguments:
        return None
    *options, last = arguments[arguments.index("boot") + 1 :] or [""]
    bundle = any(option.lstrip("-").partition("=")[0] == "bundle" for option in options if option.startswith("-"))
    if not bundle or last.startswith("-") or options[-1] in ("-bundle", "--bundle"):
        return None
    return last


def _options(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Options and their values, given as ``--id web`` or ``--id=web``, the last first."""
    following = ""
    for argument in reversed(arguments):
        option, equals, value = argument.partition("=")
        yield option, value if equals else following
        following = argument


def _values(arguments: list[str], *options: str) -> Iterator[str]:
    """The values of these options, the last first."""
    return (value for option, value in _options(arguments) if option in options)


def _qemu_fields(value: str, implied: str = "") -> Iterator[tuple[str, str]]:
    """The keys and texts of a value in QEMU's syntax (get_opt_name_value() in util/qemu-option.c).

    They are ``key=text``, separated by commas; a comma in a text is doubled, and the first may omit its key, which is
    then `implied`. The last of several wins.
    """
    # No argument contains a NUL, so it can stand for a doubled comma.
    for number, field in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, text = field.partition("=")
        if number == 0 and (not equals or "\0" in key):
            key, text = implied, field
        yield key, text.replace("\0", ",")


def _rust_fields(value: str) -> Iterator[tuple[str, str]]:
    """The keys and texts of a value of Cloud Hypervisor or crosvm, whose commas may be in brackets or in quotes."""
    field, depth, quoted = "", 0, False
    for letter in value + ",":
        if letter == '"':
            quoted = not quoted
        elif not quoted:
            depth += (letter == "[") - (letter == "]")
            if letter == "," and depth <= 0:
                key, _, text = field.partition("=")
                yield key, text
                field = ""
                continue
        if letter != '"':
            field += letter


def _qemu_guest(value: str) -> str | None:
    """The guest's name in the value of QEMU's -name."""
    return dict(_qemu_fields(value, implied="guest")).get("guest")


def _file_name(value: str) -> str | None:
    """The part of a socket's path, ``<path>`` or ``path=<path>``, that distinguishes the VM."""
    if value.startswith("fd="):
        return None
    path = _OF_USER.sub("", value.removeprefix("path=").partition(",")[0], count=1)
    for part in reversed(path.split("/")):
        name = _SUFFIX.sub("", part)
        if name not in _COMMON:
            return name
    return None
