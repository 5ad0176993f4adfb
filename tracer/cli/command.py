# SPDX-License-Identifier: GPL-2.0-or-later
"""What a command says of itself: --help and its man page (`packaging/pages.py`) are made from it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import click

#: Exit statuses of every command.
STATUSES = {
    "0": "success",
    "1": "failure: one line on standard error says what, why and what to do",
    "2": "usage error",
}
#: The environment variables that msrtrace heeds.
ENVIRONMENT = {
    "MSRTRACE_DEBUG": "if set, adds the traceback of an internal error, and the whole verifier log of a BPF program "
    "that the kernel rejected",
    "NO_COLOR": "if set, no colors",
    "TERM": "if it is dumb, no colors, and nothing that moves the cursor",
    "COLUMNS": "the width of text where standard output is not a terminal",
    "CACHE_DIRECTORY": "where compiled BPF programs are cached, as systemd's CacheDirectory= sets it",
    "XDG_CACHE_HOME": "where that is for users other than root: in msrtrace/ below it; ~/.cache by default",
    "BCC_KERNEL_SOURCE": "the kernel headers to compile with, if they are not where a distribution puts them",
    "NOTIFY_SOCKET": "set by systemd: where to say that msrtrace is ready, and what it does",
    "WATCHDOG_USEC": "set by systemd: how often to say that it works",
    "LISTEN_FDS": "set by systemd: the number of sockets for --web.systemd-socket",
    "JOURNAL_STREAM": "set by systemd: messages that go to the journal have priorities",
}
_OF_ALL = ("MSRTRACE_DEBUG", "COLUMNS")


class Argument(click.Argument):
    """An argument with a help text, which click itself has since 8.5."""

    def __init__(self, declarations: Sequence[str], help: str, **attributes: Any) -> None:
        super().__init__(declarations, **attributes)
        self.help = help


class Documented(click.Command):
    """A command with what its man page has besides its parameters; --help shows the examples.

    :param examples: command lines as they are typed, and what each does
    :param statuses: exit statuses beside STATUSES, or in their place
    :param environment: names of ENVIRONMENT that it heeds beside those that all do
    :param files: paths that it uses, and what they are
    :param overhead: paragraphs on what it costs the host; none if it reads files alone
    """

    def __init__(
        self,
        *arguments: Any,
        examples: Mapping[str, str],
        statuses: Mapping[str, str] | None = None,
        environment: Sequence[str] = (),
        files: Mapping[str, str] | None = None,
        overhead: Sequence[str] = (),
        **attributes: Any,
    ) -> None:
        super().__init__(*arguments, **attributes)
        self.examples = examples
        self.statuses = {**STATUSES, **(statuses or {})}
        self.environment = {name: text for name, text in ENVIRONMENT.items() if name in (*_OF_ALL, *environment)}
        self.files = files or {}
        self.overhead = overhead

    def arguments(self) -> list[Argument]:
        """Its arguments; the other parameters are options."""
        return [parameter for parameter in self.params if isinstance(parameter, Argument)]

    def paragraphs(self) -> list[str]:
        """The help text."""
        return [" ".join(paragraph.split()) for paragraph in inspect.cleandoc(self.help or "").split("\n\n")]

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help: as click does, with the same headings in all of its versions, then the examples."""
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        if arguments := self.arguments():
            with formatter.section("Arguments"):
                formatter.write_dl([(argument.human_readable_name, argument.help or "") for argument in arguments])
        self.format_options(ctx, formatter)
        with formatter.section("Examples"):
            for number, (command, what) in enumerate(self.examples.items()):
                if number:
                    formatter.write_paragraph()
                formatter.write_text(f"# {what}")
                for line in command.splitlines():  # as it is typed, never wrapped
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")
        self.format_epilog(ctx, formatter)
