# SPDX-License-Identifier: GPL-2.0-or-later
"""Headers to compile with, and stand-ins for KVM that are traced."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import HOSTS
from kvm_standin import (
    PASS,
    RECALC,
    STAND_IN,
    SVM_RECALC,
    TOGGLE,
    StandIn,
    StandInBtf,
    headers,  # noqa: F401 (a fixture)
    running,
)
from needs import tool

from tracer.model.options import Options


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "host" in metafunc.fixturenames:
        names = [name for name in str(metafunc.config.getoption("--hosts")).split(",") if name in HOSTS]
        metafunc.parametrize("host", names)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "kvm.c").write_text(STAND_IN)
    subprocess.run([tool("cc"), "-O1", "-shared", "-fPIC", "-o", "kvm.so", "kvm.c"], cwd=folder, check=True)
    return folder / "kvm.so"


@pytest.fixture(scope="module")
def toggle(headers: None, library: Path) -> Iterator[StandIn]:
    with running(library, TOGGLE, StandInBtf(), Options(backend="kprobe")) as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def recalc(headers: None, library: Path) -> Iterator[StandIn]:
    with running(library, RECALC, StandInBtf(), Options(by_vm=True, backend="kprobe")) as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def passing(headers: None, library: Path) -> Iterator[StandIn]:
    with running(library, PASS, StandInBtf(), Options(backend="kprobe")) as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def old_passing(headers: None, library: Path) -> Iterator[StandIn]:
    """As on 5.10: without BTF, and nothing compares and exchanges."""
    with running(
        library, PASS, None, Options(backend="kprobe"), wanted=lambda variant: "claims" in variant.values
    ) as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def svm_recalc(headers: None, library: Path) -> Iterator[StandIn]:
    with running(library, SVM_RECALC, StandInBtf(), Options(backend="kprobe")) as stand_in:
        yield stand_in


@pytest.fixture
def blind(headers: None, library: Path) -> Iterator[StandIn]:
    with running(library, RECALC, None, Options()) as stand_in:
        yield stand_in
