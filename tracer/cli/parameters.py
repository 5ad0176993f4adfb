# SPDX-License-Identifier: GPL-2.0-or-later
"""Types of options."""

from __future__ import annotations

import difflib
from typing import Any

import click

from tracer.model import msr


class _Msr(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic since click 8.4 alone
    name = "MSR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The index."""
        if isinstance(value, int):
            return value
        found = msr.number(value)
        if found is None:
            like = difflib.get_close_matches(str(value).upper(), msr.NAMES.values(), 1)
            hint = f"; did you mean {like[0]}?" if like else ", such as 0x48 or IA32_SPEC_CTRL"
            self.fail(f"{value} is neither the number nor the name of an MSR{hint}", param, ctx)
        return found


#: An MSR, by its number or its name.
MSR = _Msr()
