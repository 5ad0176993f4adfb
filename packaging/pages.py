# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes the man pages and the shell completions: `python packaging/pages.py DIR`, from any directory.

Made from what --help is made from, with the click that is installed. (It is not `python -m`: a library that is called
packaging is nearly everywhere, and would be taken for this directory.) click-man, Debian's too, is not used: it reads
a command's docstring and options alone, and knows neither examples nor exit statuses.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tracer.cli.command import Documented  # noqa: E402
from tracer.cli.completion import SHELLS  # noqa: E402
from tracer.cli.main import COMPLETION, cli, commands  # noqa: E402

_COMPLETIONS = {"bash": "msrtrace", "zsh": "_msrtrace", "fish": "msrtrace.fish"}
#: Characters that groff would typeset as others, or take for a command of its own.
_ESCAPES = {"\\": r"\e", "-": r"\-", "^": r"\(ha", "~": r"\(ti", "`": r"\(ga"}
_CODE = re.compile(r"`([^`]+)`|(?<!\S)(--?[a-z][\w.-]*\w|-[a-z])\b")


def main(directory: Path) -> None:
    """Write DIR/man/*.1 and DIR/completions/*."""
    pages, completions = directory / "man", directory / "completions"
    for path in (pages, completions):
        path.mkdir(parents=True, exist_ok=True)
    for name, page in man_pages().items():
        (pages / name).write_text(page)
    for shell in SHELLS:
        script = shell(cli, {}, "msrtrace", COMPLETION).source()
        (completions / _COMPLETIONS[shell.name]).write_text(script)


def man_pages() -> dict[str, str]:
    """The man pages by their file names."""
    assert isinstance(cli, Documented)
    root = click.Context(cli, info_name="msrtrace", **cli.context_settings)
    pages = {"msrtrace.1": _page(cli, root, cli.help or "")}
    for name, summary in commands().items():
        command = cli.get_command(root, name)
        assert isinstance(command, Documented)
        pages[f"msrtrace-{name}.1"] = _page(command, click.Context(command, info_name=name, parent=root), summary)
    return pages


def _page(command: Documented, ctx: click.Context, summary: str) -> str:
    title = ctx.command_path.replace(" ", "-")
    lines = [
        '.\\" SPDX-License-Identifier: GPL-2.0-or-later',
        f'.\\" Made by packaging/pages.py from the help of {ctx.command_path}.',
        f'.TH {_text(title.upper())} 1 "{_date()}" "msrtrace {_version()}" "User Commands"',
        ".nr HY 0\n.nh\n.ad l",  # no hyphens in what may be copied, and no gaps for an even margin
        *_section("NAME", [f"{_text(title)} \\- {_text(_as_name(summary))}"]),
        *_section("SYNOPSIS", [f"{_bold(ctx.command_path)} {_usage(command, ctx)}"]),
        *_section("DESCRIPTION", _paragraphs(command.paragraphs())),
        *_section("ARGUMENTS", _items((_metavar(a.human_readable_name), a.help or "") for a in command.arguments())),
        *_section("OPTIONS", _items(_options(command, ctx))),
    ]
    if ctx.parent is None:
        listed = ((f"{_bold(f'msrtrace-{name}')}(1)", text) for name, text in commands().items())
        lines += _section("COMMANDS", _items(listed))
    lines += [
        *_section("EXAMPLES", _examples(command.examples)),
        *_section("EXIT STATUS", _items((_bold(status), f"{text}.") for status, text in command.statuses.items())),
        *_section("ENVIRONMENT", _items((_bold(name), f"{text}.") for name, text in command.environment.items())),
        *_section("FILES", _items((_metavar(name), f"{text}.") for name, text in command.files.items())),
        *_section("OVERHEAD", _paragraphs(command.overhead)),
        *_section("SEE ALSO", [_see_also(title)]),
    ]
    return "\n".join(lines) + "\n"


def _date() -> str:
    """The date of this version, not of the build: by SOURCE_DATE_EPOCH, or the Debian package's changelog."""
    changelog = ROOT / "packaging/debian/changelog"
    if seconds := os.environ.get("SOURCE_DATE_EPOCH"):
        date = datetime.fromtimestamp(int(seconds), timezone.utc)
    elif changelog.exists():
        found = re.search(r"^ -- .+>  (.+)$", changelog.read_text(), re.MULTILINE)
        assert found
        date = parsedate_to_datetime(found[1])
    else:
        return ""
    return f"{date.astimezone(timezone.utc):%Y-%m-%d}"


def _version() -> str:
    found = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


def _as_name(summary: str) -> str:
    """A summary as apropos(1) has it."""
    first = " ".join(summary.split()).rstrip(".")
    return first[0].lower() + first[1:]


def _section(title: str, body: Iterable[str]) -> list[str]:
    lines = list(body)
    if lines[:1] == [".PP"]:  # a heading begins a paragraph
        del lines[0]
    return [f".SH {title}", *lines] if lines else []


def _paragraphs(paragraphs: Iterable[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        yield from (".PP", _text(paragraph))


def _items(items: Iterable[tuple[str, str]]) -> Iterator[str]:
    for term, text in items:
        yield from (".TP", term, _text(text))


def _options(command: click.Command, ctx: click.Context) -> Iterator[tuple[str, str]]:
    for option in command.get_params(ctx):
        record = option.get_help_record(ctx)
        if isinstance(option, click.Option) and record:
            value = f" {_metavar(option.metavar)}" if option.metavar else ""
            names = sorted(option.opts, key=len)  # before click 8.5, those of --help come in any order
            yield ", ".join(map(_bold, names)) + value, record[1]


def _usage(command: click.Command, ctx: click.Context) -> str:
    return " ".join(re.sub(r"[A-Za-z]+", r"\\fI\g<0>\\fR", _text(piece)) for piece in command.collect_usage_pieces(ctx))


def _examples(examples: Mapping[str, str]) -> Iterator[str]:
    for command, what in examples.items():
        yield from (".PP", _text(what if what.endswith("?") else f"{what}:"))
        yield from (".PP", ".RS 4", ".EX", *(_escaped(line) for line in command.split("\n")), ".EE", ".RE")


def _see_also(title: str) -> str:
    others = ["msrtrace", *(f"msrtrace-{name}" for name in commands())]
    return ",\n".join(f"{_bold(name)}(1)" for name in others if name != title)


def _text(text: str) -> str:
    """A line of prose, with options and `what is typed` in bold."""
    pieces, end = [], 0
    for match in _CODE.finditer(text):
        pieces += [_escaped(text[end : match.start()]), _bold(match[1] or match[2])]
        end = match.end()
    return "".join([*pieces, _escaped(text[end:])])


def _bold(text: str) -> str:
    return f"\\fB{_escaped(text, code=True)}\\fR"


def _metavar(text: str) -> str:
    return f"\\fI{_escaped(text)}\\fR"


def _escaped(text: str, code: bool = False) -> str:
    escapes = {**_ESCAPES, "'": r"\(aq"} if code else _ESCAPES
    escaped = "".join(escapes.get(character, character) for character in text)
    return rf"\&{escaped}" if escaped[:1] in (".", "'") else escaped


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: pages.py DIR")
    main(Path(sys.argv[1]))
