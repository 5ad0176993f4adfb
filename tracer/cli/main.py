# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: `msrtrace`."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from tracer.cli.command import Documented
from tracer.cli.streams import OutputError, guarded_streams
from tracer.model.errors import MsrtraceError
from tracer.model.text import printable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: The variable that makes msrtrace complete a command line instead of running, as click names it.
COMPLETION = "_MSRTRACE_COMPLETE"
_COMMAND = re.compile(r'"""`msrtrace (\w+)`: (.+?)(?:\n\n|""")', re.DOTALL)


@cache
def commands() -> dict[str, str]:
    """The commands by name, with the first line of their help: every module here whose docstring declares one."""
    heads = (path.read_text()[:1000] for path in sorted(Path(__file__).parent.glob("*.py")))
    found = (_COMMAND.search(head) for head in heads)
    return {match[1]: " ".join(match[2].split()) for match in found if match}


class _Commands(Documented, click.Group):
    """The commands. Each is imported only when it is used, and none for the list of commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which they are shown."""
        return list(commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        if cmd_name not in commands():
            return None
        command: click.Command = getattr(import_module(f"tracer.cli.{cmd_name}"), cmd_name)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Its options, and the commands, of which none is imported."""
        from click.shell_completion import CompletionItem

        found = {name: text for name, text in commands().items() if name.startswith(incomplete)}
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name, help=text) for name, text in found.items()), *options]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(commands().items()))


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    subcommand_metavar="[COMMAND] [ARGS]...",
    examples={
        "msrtrace": "What is this host, and what can be traced on it?",
        "sudo msrtrace top": "Which MSR intercepts KVM changes, live",
        "sudo msrtrace state": "What each vCPU intercepts now, and who wants that",
        "sudo msrtrace report -d 10 -o report.html": "Trace for 10 seconds, and view the report in a browser",
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="msrtrace")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Trace what KVM does to the MSR bitmaps of its guests on an Intel (VMX) or AMD (SVM) host."""
    if ctx.invoked_subcommand is None:
        from tracer.cli.console import columns
        from tracer.cli.session import this_machine
        from tracer.doctor.overview import overview

        summary, found = " ".join((cli.help or "").split()), overview(this_machine())
        for line in (f"msrtrace: {summary}", "", *found, "", "msrtrace --help lists all commands."):
            click.echo(click.wrap_text(line, columns(), subsequent_indent=" " * (len(line) - len(line.lstrip()))))


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))


def main() -> None:
    """Run the command line. Errors are one line on stderr; MSRTRACE_DEBUG=1 adds the traceback."""
    with guarded_streams():
        if COMPLETION in os.environ:
            from tracer.cli.completion import register

            register()
        try:
            cli.main(prog_name="msrtrace", standalone_mode=True, complete_var=COMPLETION)
        except MsrtraceError as error:
            _fail(f"msrtrace: error: {_one_line(error)}", error.status)
        except Exception as error:
            if os.environ.get("MSRTRACE_DEBUG"):
                raise
            what = f"{type(error).__name__}: {_one_line(error)}"
            status = getattr(error, "status", MsrtraceError.status)
            _fail(f"msrtrace: internal error: {what} (MSRTRACE_DEBUG=1 shows where)", status)


def _fail(line: str, status: int) -> NoReturn:
    from tracer.cli import systemd

    with suppress(OutputError, OSError):  # the status remains
        click.echo(f"{systemd.prefix(systemd.ERROR, sys.stderr)}{line}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
