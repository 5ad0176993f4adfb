# SPDX-License-Identifier: GPL-2.0-or-later
"""What is around msrtrace when root starts it: the working directory, and which files it opens and writes."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import ON_STANDIN, ROOT
from faults import Figures
from made import patched

from tracer.report.file import encode

#: What some command of msrtrace imports, now or later, and what Python itself does.
MODULES = (
    *("bcc", "bcrypt", "click", "dashboards", "jinja2", "msgspec", "prometheus_client", "rich", "tracer", "yaml"),
    *("ctypes", "encodings", "json", "operator", "os", "random", "sitecustomize", "ssl", "subprocess", "usercustomize"),
)
#: As pip and Debian make it.
SCRIPT = "import sys\nfrom tracer.cli.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A directory with a module of each of these names, which leaves a mark if it is imported."""
    directory = tmp_path / "planted"
    directory.mkdir()
    for name in MODULES:
        (directory / name).mkdir()
        (directory / name / "__init__.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'a').write({name!r})\n")
    for name in ("libbcc_bpf.so.0", "libbcc.so.0", "libc.so.6"):
        (directory / name).write_text("no library")
    return directory


@pytest.mark.fault(
    "access", "a working directory with modules and libraries", f"{len(MODULES)} names, under each command", dear=True
)
def test_nothing_of_the_working_directory_is_run(planted: Path, tmp_path: Path, figures: Figures) -> None:
    script = tmp_path / "bin/msrtrace"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    (planted / "r.json").write_bytes(encode(patched()))
    (planted / "http.yml").write_text("basic_auth: {username: a, password: b}\n")
    (planted / "web.yml").write_text("basic_auth_users: {a: x}\n")
    compare = ("compare", "--prometheus", "127.0.0.1:1", "--base", "a", "--new", "b", "--http.config.file", "http.yml")
    commands = (
        *(("--version",), ("doctor",), ("show", "r.json", "--format", "html"), ("state",), ("top", "-d", "1"), compare),
        *(
            ("report", "-d", "1"),
            ("run", "--web.config.file", "web.yml"),
            ("run", "--web.listen-address", "127.0.0.1:0"),
        ),
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in commands:
        done = subprocess.run(
            ["timeout", "20", sys.executable, str(script), *command],
            cwd=planted,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, command
        assert not (tmp_path / "mark").exists(), (command, (tmp_path / "mark").read_text())
    figures["imported from there"] = f"0 modules, by {len(commands)} commands"


AUDIT = """
import os, sys
log = open(os.environ["AUDIT"], "a", buffering=1)
def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and isinstance(path, (str, bytes)):
            log.write(f"{os.fsdecode(path)}\\n")
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.rmdir"):
        log.write(f"{event} {arguments[0]}\\n")
    elif event in ("subprocess.Popen", "os.exec", "os.system", "exec.shell", "pickle.find_class"):
        log.write(f"{event} {arguments[0]}\\n")
sys.addaudithook(hook)
import standin
standin.main()
"""


@contextmanager
def audited(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """msrtrace on a made-up kernel, which notes what it writes and starts in the file `audit`."""
    with subprocess.Popen(
        [sys.executable, "-c", AUDIT, str(directory), *arguments],
        env={**ON_STANDIN, "AUDIT": str(directory / "audit"), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield process


def written(directory: Path) -> set[str]:
    """What was written, but for what the made-up kernel itself notes in that directory."""
    lines = (directory / "audit").read_text().splitlines()
    own = {str(directory / name) for name in ("attached", "closed", "counted", "read", "nested", "read.closed")}
    return {line for line in lines if line not in own}


@pytest.mark.fault(
    "access", "what is written and started", "run with 20 scrapes, report -o, by Python's audit events", dear=True
)
def test_nothing_is_written_but_what_is_asked_for(directory: Path, figures: Figures) -> None:
    from urllib.request import urlopen

    (directory / "audit").touch()
    with audited(directory, "run", "--by-vm", "--web.listen-address", "127.0.0.1:0") as process:
        assert process.stdout
        url = next(line.split()[-1] for line in process.stdout if "serving" in line)
        for _ in range(20):
            urlopen(url, timeout=20).close()
        process.terminate()
        assert process.wait(30) == 0
    of_run = written(directory)
    assert of_run == set()
    out = directory / "out"
    out.mkdir()
    (directory / "audit").write_text("")
    with audited(directory, "report", "-d", "0.1", "-o", str(out / "r.json")) as process:
        assert process.wait(30) == 0
    of_report = written(directory)
    assert {path.name for path in out.iterdir()} == {"r.json"}
    assert all(str(out) in line or re.fullmatch(r"os.(chmod|chown|link) \d+", line) for line in of_report), of_report
    figures["by run"] = f"{len(of_run)} files written, 0 programs started"
    figures["by report"] = "its -o, and a temporary file beside it"


FORBIDDEN = {"eval", "exec", "compile", "__import__", "input"}
MODULES_OF_CODE = {"pickle", "marshal", "shelve", "dill", "code", "imp", "runpy", "xmlrpc", "telnetlib", "cgi"}


@pytest.mark.fault("access", "data that is run", "every call and import in tracer/ and dashboards/ is looked at")
def test_no_data_is_run_as_code(figures: Figures) -> None:
    """Nothing evaluates a text, unpickles, or hands a line to a shell; YAML is composed, without tags of Python."""
    files = [*(ROOT / "tracer").rglob("*.py"), *(ROOT / "dashboards").rglob("*.py")]
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                found += [f"{file}: {name}" for name in names if name.partition(".")[0] in MODULES_OF_CODE]
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if isinstance(called, ast.Name) and called.id in FORBIDDEN:
                found.append(f"{file}:{node.lineno} {called.id}")
            if isinstance(called, ast.Attribute) and ast.unparse(called) in ("os.system", "os.popen", "yaml.load"):
                found.append(f"{file}:{node.lineno} {ast.unparse(called)}")
            found += [f"{file}:{node.lineno} shell" for keyword in node.keywords if keyword.arg == "shell"]
    assert found == []
    assert len(files) > 100
    figures["found"] = f"0 in {len(files)} files"


@pytest.mark.fault(
    "access", "lines that would look like another's in the journal", "a VM's name and an error, with line breaks"
)
def test_a_message_is_one_line(directory: Path, figures: Figures) -> None:
    """Whatever an error says that a scrape or a reload has met."""
    (directory / "refusal").write_text("why\nOct 1 00:00:00 host sshd: Accepted\x1b[2J")
    err = directory / "err"
    with (
        err.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "standin", directory, "run", "--web.listen-address", "127.0.0.1:0"],
            env=ON_STANDIN,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout
        next(line for line in process.stdout if "serving" in line)
        (directory / "module").write_text("2")
        end = time.monotonic() + 30
        while "trying again" not in err.read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
        process.terminate()
        process.wait(30)
    lines = err.read_text().splitlines()
    assert all(line.startswith("msrtrace: ") and line.isprintable() for line in lines), lines
    assert json.dumps("\n")[1:-1] in lines[-1]
    figures["lines of others"] = f"0 of {len(lines)}"
