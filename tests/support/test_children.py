# SPDX-License-Identifier: GPL-2.0-or-later
"""What outlives its test is killed and named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHANGE_WHAT_PYTEST_PRINTS = {"CI", "BUILD_NUMBER", "PYTEST_ADDOPTS", "PY_COLORS", "FORCE_COLOR", "NO_COLOR", "COLUMNS"}
PLAIN_ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in CHANGE_WHAT_PYTEST_PRINTS}


def suite(directory: Path, code: str, *options: str) -> str:
    """What pytest prints of a file of tests, whoever calls it: where CI is set, it prints what failed twice."""
    (directory / "conftest.py").write_text("import children\nchildren.PATIENCE_SECONDS = 0.2\n")
    (directory / "test_it.py").write_text(f"import subprocess, threading, pytest\n{code}\n")
    apart = ["-c", os.devnull, "--rootdir", str(directory), "--confcutdir", str(directory)]
    command = [sys.executable, "-m", "pytest", *apart, "-p", "children", *options]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "test_it.py"],
        cwd=directory,
        env={**PLAIN_ENVIRONMENT, "PYTHONPATH": str(ROOT / "tests/support")},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    return done.stdout + done.stderr


def lives(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "xdist"])
@pytest.mark.parametrize(
    "leave",
    [
        pytest.param("subprocess.Popen(['sleep', '4711'])", id="a child"),
        pytest.param("subprocess.run(['sh', '-c', 'sleep 4711 & exit'])", id="an orphan"),
    ],
)
def test_what_outlives_its_test_is_killed_and_named(tmp_path: Path, leave: str, workers: list[str]) -> None:
    said = suite(tmp_path, f"def test_one():\n    {leave}\ndef test_two():\n    pass", *workers)
    [pid] = map(int, re.findall(r"the test left it behind:\n.* (\d+): sleep 4711$", said, re.MULTILINE))
    assert "ERROR at teardown of test_one" in said
    assert "2 passed, 1 error" in said
    assert not lives(pid)


SHARED = """
@pytest.fixture(scope="module")
def shared():
    child = subprocess.Popen(["sleep", "4711"])
    yield
    END
def test_one(shared): pass
def test_two(shared): pass
"""


@pytest.mark.parametrize(("end", "result"), [("child.kill(); child.wait()", "2 passed in"), ("", "2 passed, 1 error")])
def test_what_tests_share_lives_as_long_as_they(tmp_path: Path, end: str, result: str) -> None:
    said = suite(tmp_path, SHARED.replace("END", end))
    assert result in said
    assert ("ERROR at teardown of test_two" in said) == (not end)


BOOTS = """
def test_one():
    thread = threading.Thread(target=lambda: (subprocess.Popen(["sleep", "4711"]), event.wait()), name="boots-1")
    thread.daemon = True
    thread.start()
    children = pytest.importorskip("children")
    while not any("sleep" in children.describe(pid) for pid in children.of_session()): pass  # until it is no fork
event = threading.Event()
"""


def test_boots_live_until_the_session_ends(tmp_path: Path) -> None:
    said = suite(tmp_path, BOOTS)
    [pid] = map(int, re.findall(r"the session left it behind =+\n+ +(\d+): sleep 4711$", said, re.MULTILINE))
    assert "1 passed" in said
    assert not lives(pid)
