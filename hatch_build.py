# SPDX-License-Identifier: GPL-2.0-or-later
"""Puts the compiled BPF programs into the wheel, where BCC and some kernel's headers are there to make them.

Where they are not, the wheel is built without, and the host compiles. MSRTRACE_COMPILED=required makes that an error,
MSRTRACE_COMPILED=no does not try.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FIND_BCC = "import os, bcc; bcc.BPF; print(os.path.dirname(os.path.dirname(bcc.__file__)))"


class CompiledPrograms(BuildHookInterface):  # type: ignore[misc]
    """See the module."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name what came of it as files of the package."""
        if version == "editable" or os.environ.get("MSRTRACE_COMPILED") == "no":
            return
        directory = Path(tempfile.mkdtemp(prefix="msrtrace-"))
        problem = self._compile(directory)
        if not problem:
            for file in directory.glob("*.bin"):
                build_data["force_include"][str(file)] = f"tracer/bpf/{file.name}"
            return
        shutil.rmtree(directory)
        if os.environ.get("MSRTRACE_COMPILED") == "required":
            raise RuntimeError(f"the BPF programs cannot be compiled: {problem}")
        self.app.display_warning(
            f"msrtrace: the wheel has no compiled BPF programs, so the host will compile them ({problem}); it needs "
            "python3-bpfcc and the headers of a kernel (Debian, Ubuntu; elsewhere see `msrtrace doctor`)"
        )

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what is in the wheel now."""
        for file in build_data["force_include"]:
            if file.endswith(".bin"):
                shutil.rmtree(Path(file).parent, ignore_errors=True)

    def _compile(self, directory: Path) -> str:
        """Why nothing could be compiled, or "". BCC may be the system's alone: it works in any Python 3."""
        outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        find = ["/usr/bin/python3", "-c", _FIND_BCC]
        try:
            found = subprocess.run(find, env=outside, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"/usr/bin/python3: {error.strerror}"
        if found.returncode:
            return "BCC is not installed"
        # What isolates pip's builds would take our own modules from the path, if they are installed as well.
        isolated = [entry for entry in sys.path if entry and not Path(entry, "sitecustomize.py").exists()]
        path = [self.root, *isolated, found.stdout.strip()]
        done = subprocess.run(
            [sys.executable, "-m", "tracer.trace.shipped", "bpf", str(directory)],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            check=False,
        )
        return (done.stderr.strip().splitlines() or ["for no reason given"])[-1] if done.returncode else ""
