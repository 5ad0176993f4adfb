# SPDX-License-Identifier: GPL-2.0-or-later
"""A comparison as JSON."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction

import msgspec

from tracer.model import msr
from tracer.report.compare import SCHEMA, Comparison, PerUpdate, Side
from tracer.report.comparison_view import lost_by, sentence
from tracer.report.creation import PerCreation, vcpus_created
from tracer.report.exit_comparison_view import exits_json
from tracer.report.report import whole
from tracer.report.state_file import range_text


def comparison_json(comparison: Comparison) -> bytes:
    """The comparison as JSON: `schema` is "msrtrace-comparison/1"; unknown figures are null."""

    def plain(value: Fraction | None) -> float | None:
        return None if value is None else whole(float(value))

    def per_update(figures: PerUpdate) -> dict[str, float | None]:
        return {"calls": plain(figures.calls), "redundant": plain(figures.redundant)}

    def per_creation(figures: PerCreation) -> dict[str, float | None]:
        return {what: plain(figure) for what, figure in vars(figures).items()}

    def side(which: Side) -> dict[str, object]:
        time = which.time()
        return {
            "title": which.title,
            "window": which.window,
            "reports": len(which.reports),
            "host": which.report.host,
            "hosts": which.hosts,
            "started": which.report.started,
            "origin": which.origin,
            "command": which.report.command,
            "filter_updates": which.updates,
            "vcpus_created": vcpus_created(which.reports),
            "verdict": which.verdict,
            "per_filter_update": per_update(comparison.per_update(which)),
            "per_vcpu_creation": per_creation(comparison.per_creation(which)),
            "exits": which.exits.total if which.exits else None,
            "filter_update_seconds": asdict(time) if time else None,
            "lost": lost_by(which),
        }

    made = {
        "schema": SCHEMA,
        "sentence": sentence(comparison),
        "unit": comparison.unit,
        "base": side(comparison.base),
        "new": side(comparison.new),
        "bits": [
            {
                "msr": msr.hexadecimal(row.bit.msr),
                "name": msr.name(row.bit.msr),
                "direction": row.bit.direction,
                "base": per_update(row.base),
                "new": per_update(row.new),
            }
            for row in comparison.rows
        ],
        "intercepted": [
            {
                "msrs": range_text(row.msrs),
                "name": msr.name(row.msrs.start),
                "access": row.access,
                "base": [*row.base],
                "new": [*row.new],
            }
            for row in comparison.intercepted
        ],
        "exits": exits_json(comparison.base, comparison.new),
        "differences": [asdict(difference) for difference in comparison.differences],
        "warnings": list(comparison.warnings),
        "forced": list(comparison.forced),
    }
    return msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n"
