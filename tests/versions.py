# SPDX-License-Identifier: GPL-2.0-or-later
"""`make check-versions`: the unit tests with the lowest versions that pyproject.toml permits, and with the newest.

Lowest: its oldest Python (the classifiers name them), and each library that it names at its lowest version, also to
build msrtrace. Newest: its newest Python, and of every library what PyPI has today. Where that Python is not on this
machine, the nearest is taken, and that is said.
"""

from __future__ import annotations

import datetime
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
sys.path.insert(0, str(HERE / "support"))

Version = tuple[int, int]

#: Where tools that install Pythons put them, which need not be in PATH: a variable, what it is by default, a pattern.
_PYTHONS = (
    ("PYENV_ROOT", "~/.pyenv", "versions/*/bin"),
    ("UV_PYTHON_INSTALL_DIR", "~/.local/share/uv/python", "*/bin"),
)
_ASK_LIBRARIES = """
import platform, sys
from importlib.metadata import version
print(platform.python_version(), *map(version, sys.argv[1:]))
"""
#: BCC's Python module, which no registry has, works in any Python 3.
_BCC = Path("/usr/lib/python3/dist-packages/bcc")
#: What no version changes: how tests are run, a browser's view. And limits of time, which are those of one version.
_LEFT_OUT = (
    *("tests/kvmhost", "tests/support", "tests/report/test_html_browser.py"),
    "tests/report/fleet/test_scraped.py",  # it waits for servers, half a minute
)
_SELECTED = "not takes_little_time"


def supported() -> list[Version]:
    """The Pythons that pyproject.toml names, the oldest first."""
    from project import PROJECT

    named = re.findall(r"^Programming Language :: Python :: (\d+)\.(\d+)$", "\n".join(PROJECT["classifiers"]), re.M)
    return sorted((int(major), int(minor)) for major, minor in named)


def lowest() -> dict[str, str]:
    """The lowest version of each library to which pyproject.toml gives one: to run, to test, to build msrtrace."""
    from project import PROJECT, PYPROJECT

    of_extras = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    requirements = [*PROJECT["dependencies"], *of_extras, *PYPROJECT["build-system"]["requires"]]
    found = (re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match}


def pythons() -> dict[Version, Path]:
    """Those of the supported Pythons that this machine has and that can make a venv."""
    directories = [Path(entry) for entry in os.get_exec_path()]
    for variable, default, pattern in _PYTHONS:
        root = Path(os.environ.get(variable, default)).expanduser()
        directories += sorted(root.glob(pattern), reverse=True)
    found: dict[Version, Path] = {}
    for version in supported():
        for program in (directory / f"python{version[0]}.{version[1]}" for directory in directories):
            if program.exists() and _works(program):
                found[version] = program
                break
    return found


def _works(python: Path) -> bool:
    """Whether it runs, which a shim of pyenv for a version that is not selected does not, and can make a venv."""
    command = [str(python), "-c", "import ensurepip, venv"]
    return not subprocess.run(command, capture_output=True, check=False).returncode


def install(directory: Path, python: Path, constraints: Mapping[str, str]) -> None:
    """Make a venv with msrtrace and its tests; without constraints, with the newest libraries. One that fits is kept.

    Whether there is anything newer is asked once a day; without an answer the venv is as good as it was.
    """
    pins = "".join(f"{name}=={version}\n" for name, version in constraints.items())
    made_from = "\n".join([str(REPO), str(python.resolve()), pins, (REPO / "pyproject.toml").read_text()])
    marker, today = directory / "made-from", datetime.date.today().isoformat()
    before, _, day = marker.read_text().rpartition("\n") if marker.exists() else ("", "", "")
    fits = before == made_from
    if fits and (constraints or day == today):
        return
    if not fits:
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run([python, "-m", "venv", directory], check=True)
        [site] = directory.glob("lib/python3*/site-packages")
        if _BCC.exists():
            (site / "bcc").symlink_to(_BCC)
    file = directory / "constraints.txt"
    file.write_text(pins)
    options = ["--disable-pip-version-check", "--quiet", "--upgrade", "--upgrade-strategy", "eager"]
    command = [str(directory / "bin/pip"), "install", *options, "--editable", f"{REPO}[test]"]
    settings = {**os.environ, "PIP_CONSTRAINT": str(file), "PIP_BUILD_CONSTRAINT": str(file)}
    for pause in (0,) if fits else (0, 10, 20, 30):
        time.sleep(pause)
        errors = subprocess.DEVNULL if fits else None
        if not subprocess.run(command, env=settings, stderr=errors, check=False).returncode:
            marker.write_text(f"{made_from}\n{today}")
            return
    if not fits:
        raise SystemExit("check-versions: the libraries cannot be installed")
    print(f"check-versions: PyPI cannot be asked what is newer than on {day}")


def libraries(python: Path | str) -> str:
    """The version of a Python, and those of the libraries that msrtrace uses there."""
    names = sorted(lowest().keys() - {"hatchling"})
    command = [str(python), "-c", _ASK_LIBRARIES, *names]
    versions = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return ", ".join(f"{name} {version}" for name, version in zip(("Python", *names), versions, strict=True))


def run(name: str, wanted: Version, available: Mapping[Version, Path], constraints: Mapping[str, str]) -> bool:
    """Run the tests in the venv of that name; whether they passed."""
    nearest = min(available, key=lambda version: abs(version[1] - wanted[1]))
    if nearest != wanted:
        missing, instead = (".".join(map(str, version)) for version in (wanted, nearest))
        print(f"check-versions: LEFT OUT: Python {missing}, which is not here; {instead} is taken")
    directory = REPO / "build/versions" / name
    install(directory, available[nearest], constraints)
    python = directory / "bin/python"
    found = libraries(python)
    print(f"check-versions: {name}: {found}", flush=True)
    if found == libraries(sys.executable):
        print("check-versions: these are what the other tests are run with")
        return True
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    options = ["--check", "-n", "2", "--dist", "loadfile", "-q", "-rfE", "-k", _SELECTED]
    options += ["--hypothesis-profile", "few examples"]
    command = [str(python), "-m", "pytest", *options, *(f"--ignore={path}" for path in _LEFT_OUT)]
    done = subprocess.run(command, cwd=REPO, env={**os.environ, "MSRTRACE_EXAMPLES": "10"}, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"check-versions: {name}: {time.monotonic() - began:.0f} s, {spent:.0f} s of CPU", flush=True)
    return not done.returncode


def main() -> None:
    """See the module. Exits with 1 if a test failed."""
    available = pythons()
    oldest, *_, newest = supported()
    passed = [run("lowest", oldest, available, lowest()), run("newest", newest, available, {})]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
