"""The command line: `msrtrace`."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from tracer.errors import MsrtraceError
from tracer.text import printable

#: Where each command is; its module is imported when the command is used or its help is asked for.
_MODULES = {
    "compare": "tracer.report_commands",
    "doctor": "tracer.doctor_command",
    "report": "tracer.report_commands",
    "run": "tracer.run_command",
    "top": "tracer.top_command",
}


class _Commands(click.Group):
    """The commands of _MODULES, none of which pays for the imports of another."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order in which they are shown."""
        return sorted(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, if there is one."""
        if cmd_name not in _MODULES:
            return None
        command: click.Command = getattr(import_module(_MODULES[cmd_name]), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="msrtrace")
def cli() -> None:
    """Trace what KVM does to the MSR bitmaps of its guests on an Intel (VMX) host."""


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))


def main() -> None:
    """Run the command line. Errors are one line on stderr; MSRTRACE_DEBUG=1 adds the traceback."""
    try:
        cli.main(prog_name="msrtrace", standalone_mode=True)
    except MsrtraceError as error:
        click.echo(f"msrtrace: error: {_one_line(error)}", err=True)
        sys.exit(error.status)
    except Exception as error:
        if os.environ.get("MSRTRACE_DEBUG"):
            raise
        what = f"{type(error).__name__}: {_one_line(error)}"
        click.echo(f"msrtrace: internal error: {what} (MSRTRACE_DEBUG=1 shows where)", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
