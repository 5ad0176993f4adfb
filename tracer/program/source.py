# SPDX-License-Identifier: GPL-2.0-or-later
"""The source of the BPF program."""

from __future__ import annotations

import re
from pathlib import Path


def whole_text(source: Path) -> str:
    """The text with the headers beside it put in: BCC makes functions of maps in one file alone. Raises OSError."""

    def header(found: re.Match[str]) -> str:
        return f'#line 1 "{found[1]}"\n{whole_text(source.parent / found[1])}'

    return re.sub(r'^#include "(\w+\.h)"\n', header, source.read_text(), flags=re.MULTILINE)
