# SPDX-License-Identifier: GPL-2.0-or-later
"""Made-up kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvm_standin import headers  # noqa: F401 (a fixture)
from made_kernel import Kernel


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


@pytest.fixture
def by_vm(tmp_path: Path) -> Kernel:
    kernel = Kernel(tmp_path, by_vm=True)
    kernel.start(100, "web")
    kernel.start(200, "db")
    kernel.tracer.attach()
    return kernel
