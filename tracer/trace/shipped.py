# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m tracer.trace.shipped SOURCES DIRECTORY`: compiles what a package ships; hosts then need no compiler."""

from __future__ import annotations

import sys
from pathlib import Path

from tracer.kernel.headers import header_settings
from tracer.model.errors import MsrtraceError
from tracer.program.compiler import PROGRAMS, compile_program, shipped_content, shipped_file
from tracer.program.program import NotPermitted, VariantRejected


def ship(sources: Path, directory: Path) -> None:
    """Compile every program, of SOURCES, into a DIRECTORY. Raises MsrtraceError, VariantRejected or NotPermitted."""
    for source, definitions in ((sources / name, definitions) for name, definitions in PROGRAMS):
        content = shipped_content(source, definitions, compile_program(source, definitions, header_settings))
        (directory / shipped_file(source, definitions).name).write_bytes(content)


def main() -> None:
    """See the module. A failure is one line on standard error."""
    try:
        ship(Path(sys.argv[1]), Path(sys.argv[2]))
    except (MsrtraceError, VariantRejected) as error:
        sys.exit(str(error))
    except NotPermitted:
        sys.exit("the kernel permits this user no BPF, so BCC cannot make maps: compile as root")


if __name__ == "__main__":
    main()
