"""Makes grafana.json: `python -m dashboards.make` in the root of the checkout.

queries.py has what Prometheus is asked, grafana.py what panels of one kind share; the other
files have the rows.
"""

from __future__ import annotations

import json
from pathlib import Path

from dashboards.activity import overview, per_cause, per_msr, per_vm
from dashboards.grafana import Json, dashboard, laid_out
from dashboards.health import health
from dashboards.updates import comparison, filter_updates

FILE = Path(__file__).with_name("grafana.json")


def made() -> Json:
    """The dashboard."""
    rows = {
        "Overview": overview(),
        "By MSR": per_msr(),
        "By cause": per_cause(),
        "Filter updates": filter_updates(),
        "Patched against unpatched": comparison(),
        "By VM": per_vm(),
        "Health of the tracers": health(),
    }
    description = "What KVM's MSR-intercept code does on VMX hosts, how much of it is useless, and what it costs."
    return dashboard("msrtrace", "msrtrace: MSR intercepts", description, laid_out(rows), metric="msrtrace_build_info")


def main() -> None:
    """Write grafana.json."""
    FILE.write_text(json.dumps(made(), indent=2) + "\n")


if __name__ == "__main__":
    main()
