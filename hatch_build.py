# SPDX-License-Identifier: GPL-2.0-or-later
"""Puts what is made into the wheel: man pages, shell completions, and the compiled BPF programs.

These need BCC and some kernel's headers; where they are not, the wheel is built without, and the host compiles.
MSRTRACE_COMPILED=required makes that an error, MSRTRACE_COMPILED=no makes nothing.
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

#: Where pip and pipx put what packaging/pages.py writes, below the prefix.
_SHARE = {
    "man": "share/man/man1",
    "completions/msrtrace": "share/bash-completion/completions/msrtrace",
    "completions/_msrtrace": "share/zsh/site-functions/_msrtrace",
    "completions/msrtrace.fish": "share/fish/vendor_completions.d/msrtrace.fish",
}
_FIND_BCC = "import os, bcc; bcc.BPF; print(os.path.dirname(os.path.dirname(bcc.__file__)))"


class CompiledPrograms(BuildHookInterface):  # type: ignore[misc]
    """See the module."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make all of it, and name what came of it as files of the package."""
        self._made: list[Path] = []
        if version == "editable" or os.environ.get("MSRTRACE_COMPILED") == "no":
            return
        pages = self._directory()
        subprocess.run([sys.executable, str(Path(self.root, "packaging/pages.py")), str(pages)], check=True)
        build_data["shared_data"] = {str(pages / made): where for made, where in _SHARE.items()}
        directory = self._directory()
        problem = self._compile(directory)
        if not problem:
            for file in directory.glob("*.bin"):
                build_data["force_include"][str(file)] = f"tracer/bpf/{file.name}"
            return
        if os.environ.get("MSRTRACE_COMPILED") == "required":
            raise RuntimeError(f"the BPF programs cannot be compiled: {problem}")
        self.app.display_warning(
            f"msrtrace: the wheel has no compiled BPF programs, so the host will compile them ({problem}); it needs "
            "python3-bpfcc and the headers of a kernel (Debian, Ubuntu; elsewhere see `msrtrace doctor`)"
        )

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what is in the wheel now."""
        for directory in self._made:
            shutil.rmtree(directory, ignore_errors=True)

    def _directory(self) -> Path:
        """A directory for what is made."""
        self._made.append(Path(tempfile.mkdtemp(prefix="msrtrace-")))
        return self._made[-1]

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
