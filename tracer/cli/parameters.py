# SPDX-License-Identifier: GPL-2.0-or-later
"""Types of options and arguments: what they accept, and how a shell completes them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from tracer.model.snapshot import VmInfo


def _items(values: dict[str, str], incomplete: str) -> list[CompletionItem]:
    """The values that begin so, in either case, with what a shell says of them."""
    from click.shell_completion import CompletionItem

    wanted = incomplete.casefold()
    return [CompletionItem(v, help=text or None) for v, text in values.items() if v.casefold().startswith(wanted)]


def _special(kind: str, incomplete: str) -> list[CompletionItem]:
    """What the shell itself completes; see completion.py."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type=kind)]


def _running_vms() -> dict[int, VmInfo]:
    from tracer.trace.running_vms import running_vms

    return running_vms()


def _vm_names() -> dict[str, str]:
    """The names of running VMs, with their processes; UUIDs complete as well, but are not offered."""
    return {vm.name: f"pid {pid}, {vm.vmm}" for pid, vm in _running_vms().items()}


class _Msr(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since click 8.4 alone
    name = "MSR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The index."""
        from tracer.model import msr

        if isinstance(value, int):
            return value
        found = msr.number(value)
        if found is None:
            import difflib

            like = difflib.get_close_matches(str(value).upper(), msr.NAMES.values(), 1)
            hint = f"; did you mean {like[0]}?" if like else ", such as 0x48 or IA32_SPEC_CTRL"
            self.fail(f"{value} is neither the number nor the name of an MSR{hint}", param, ctx)
        return found

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names, also where their beginning IA32_ is left out."""
        from tracer.model import msr

        names = {name: msr.hexadecimal(index) for index, name in msr.NAMES.items()}
        return _items(names, incomplete) or _items(names, f"IA32_{incomplete}")


class _Pid(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "PID"
    _range = click.IntRange(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; --help does not say that it is at least 1, as IntRange would."""
        return int(self._range.convert(value, param, ctx))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The processes of running VMs."""
        return _items({str(pid): vm.name for pid, vm in _running_vms().items()}, incomplete)


class Seconds(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of seconds, from `least` (by default: above 0) to `most`; --help does not show these limits."""

    name = "SECONDS"

    def __init__(self, most: float, least: float | None = None) -> None:
        self._range = click.FloatRange(least or 0, most, min_open=least is None)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        seconds = float(self._range.convert(value, param, ctx))
        if math.isnan(seconds):  # which is in every range
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


class _Text(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Any text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it is."""
        return str(value)


class _Vm(_Text):
    name = "NAME"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names of running VMs."""
        return _items(_vm_names(), incomplete)


class _Json(_Text):
    name = "FILE"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """JSON files, and directories that may have some."""
        return _special("json", incomplete)


class _VmOrJson(_Text):
    name = "VM"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names of running VMs, and JSON files."""
        return [*_items(_vm_names(), incomplete), *_special("json", incomplete)]


class _Command(_Text):
    name = "COMMAND"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Commands, then their arguments: files, for want of knowing better."""
        return _special("file" if ctx.params.get(param.name or "") else "command", incomplete)


#: An MSR, by its number or its name.
MSR = _Msr()
#: A process.
PID = _Pid()
#: A VM, by its name or UUID.
VM = _Vm()
#: A file of a report or of a state.
REPORT = _Json()
#: Either of these.
VM_OR_FILE = _VmOrJson()
#: A word of a command line that is to be run.
COMMAND = _Command()
