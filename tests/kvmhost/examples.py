# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes docs/examples.md anew: types its commands on an emulated host, and puts what they print below them.

`examples.py` rewrites the page; `examples.py --check` only says which commands now print other words.

A command is a line that begins with `$ ` in an indented block; what it prints goes to the next command or the end of
the block. `[...]` stands for what is left out: as many lines are kept before and after it as there were. What ends with
`^C` is interrupted after a while.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cache import BUILD, HERE, REPO

PAGE = REPO / "docs/examples.md"
HOST = "trixie-amd"
TIMEOUT_SECONDS = 600
INDENT, PROMPT, LEFT_OUT, CTRL_C = "    ", "$ ", "[...]", "^C"
#: What tells one output from another of the same kind: not figures, nor their units, nor how exact they are.
_WORD = re.compile(r"[A-Za-z_][\w-]{2,}")
#: `top` says so of calls per filter update if it happened to read the counts during one.
_ROUGHLY = re.compile(r"\babout (?=\d)")


@dataclass
class Command:
    """A command of the page, and what it prints there."""

    typed: str
    printed: list[str]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ends it."""
        return self.printed[-1:] == [CTRL_C]

    def prints(self, output: str) -> None:
        """Take this output in place of what was there, with as much of it left out."""
        lines = [line.rstrip() for line in output.rstrip().splitlines()]
        if LEFT_OUT in self.printed:
            before = self.printed.index(LEFT_OUT)
            after = len([line for line in self.printed[before + 1 :] if line != CTRL_C])
            lines = [*lines[:before], LEFT_OUT, *lines[max(before, len(lines) - after) :]]
        self.printed = [*lines, CTRL_C] if self.interrupted else lines

    def words(self) -> set[str]:
        """The words that it prints."""
        return set(_WORD.findall(_ROUGHLY.sub("", "\n".join(self.printed))))


#: Lines of text, as they are, and commands.
Part = str | Command


def parsed(text: str) -> list[Part]:
    """The parts of a page."""
    parts: list[Part] = []
    command: Command | None = None
    for line in text.splitlines():
        code = line.removeprefix(INDENT) if line.startswith(INDENT) else None
        if code is not None and code.startswith(PROMPT):
            command = Command(code.removeprefix(PROMPT), [])
            parts.append(command)
        elif command and (code is not None or not line):
            command.printed.append(code or "")
        else:
            command = None
            parts.append(line)
    for part in parts:
        while isinstance(part, Command) and part.printed[-1:] == [""]:
            part.printed.pop()
    return parts


def written(parts: Sequence[Part]) -> str:
    """The page."""
    lines: list[str] = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            if number and isinstance(parts[number - 1], Command):
                lines.append("")
            lines.append(part)
        else:
            lines += [f"{INDENT}{line}".rstrip() for line in (f"{PROMPT}{part.typed}", *part.printed)]
    return "\n".join(lines) + "\n"


def commands(parts: Sequence[Part]) -> Iterator[Command]:
    """The commands of a page."""
    return (part for part in parts if isinstance(part, Command))


def boot(folder: Path) -> list[str]:
    """Type the commands of the page on a host, whose log goes to the folder; what each printed."""
    sent, out = folder / "in", folder / "out"
    shutil.copytree(HERE / "scenarios", sent)
    out.mkdir()
    typed = [(command.typed, command.interrupted) for command in commands(parsed(PAGE.read_text()))]
    (sent / "commands.json").write_text(json.dumps(typed))
    run = [sys.executable, str(HERE / "run"), "--host", HOST, "--cpus", "2", "--timeout", str(TIMEOUT_SECONDS)]
    what = ["--in", str(sent), "--out", str(out), "--", "python3", "/in/sessions.py"]
    done = subprocess.run([*run, *what], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    (folder / "output").write_text(done.stdout)
    assert done.returncode == 0, done.stdout
    found: list[str] = json.loads((out / "sessions.json").read_text())
    return found


def main() -> None:
    """See the module."""
    before, after = (parsed(PAGE.read_text()) for _ in range(2))
    with tempfile.TemporaryDirectory(prefix="examples-", dir=BUILD) as folder:
        for command, output in zip(commands(after), boot(Path(folder)), strict=True):
            command.prints(output)
    differ = [old for old, new in zip(commands(before), commands(after), strict=True) if old.words() != new.words()]
    for command in differ:
        print(f"other words: {command.typed}")
    if "--check" in sys.argv[1:]:
        sys.exit(bool(differ))
    PAGE.write_text(written(after))


if __name__ == "__main__":
    main()
