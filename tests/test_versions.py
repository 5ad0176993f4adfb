# SPDX-License-Identifier: GPL-2.0-or-later
"""What `make check-versions` takes from pyproject.toml is all that there is."""

from __future__ import annotations

import re

from project import PROJECT, PYPROJECT

from tests.versions import lowest, supported
from tracer.doctor.tools import OLDEST_PYTHON


def test_everything_that_is_needed_has_a_lowest_version_to_test() -> None:
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *extras["web"], *PYPROJECT["build-system"]["requires"]]
    assert {re.split(r"[<>=~!;\[ ]", requirement)[0] for requirement in needed} == lowest().keys()


def test_every_requirement_on_a_library_says_the_same() -> None:
    requirements = [*PROJECT["dependencies"], *PYPROJECT["build-system"]["requires"]]
    requirements += [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    bounded = {requirement for requirement in requirements if not re.fullmatch(r"[\w-]+", requirement)}
    assert bounded == {f"{name}>={version}" for name, version in lowest().items()}


def test_the_oldest_python_is_the_same_everywhere() -> None:
    major, minor = supported()[0]
    assert (major, minor) == OLDEST_PYTHON
    assert PROJECT["requires-python"] == f">={major}.{minor}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{major}{minor}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == f"{major}.{minor}"
