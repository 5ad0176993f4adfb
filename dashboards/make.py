# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes grafana.json and rules.yml: `python -m dashboards.make` in the root of the checkout.

queries.py has the queries, verdict.py those for the patch, grafana.py what panels of one kind share; the other files
have the rows. rules.template.yml is rules.yml with placeholders for what is generated.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import indent

from dashboards.activity import overview, per_cause, per_msr, per_vm
from dashboards.grafana import Json, dashboard, laid_out
from dashboards.health import health
from dashboards.patterns import label
from dashboards.updates import by_vendor, comparison, filter_updates, recalculations
from dashboards.verdict import JUDGED_HOSTS, missing_by_kernel
from tracer.model.vendors import VENDORS, layouts

FILE = Path(__file__).with_name("grafana.json")
RULES = Path(__file__).with_name("rules.yml")
_TEMPLATE = Path(__file__).with_name("rules.template.yml")


def made() -> Json:
    """The dashboard."""
    rows = {
        "Overview": overview(),
        "By MSR": per_msr(),
        "By cause": per_cause(),
        "Filter updates": filter_updates(),
        "Recalculations, and vCPUs created": recalculations(),
        "By vendor": by_vendor(),
        "Patched against unpatched": comparison(),
        "By VM": per_vm(),
        "Health of the tracers": health(),
    }
    description = "What KVM's MSR-intercept code does, how much of it is redundant, and what it costs."
    return dashboard("msrtrace", "msrtrace: MSR intercepts", description, laid_out(rows), metric="msrtrace_build_info")


def rules(template: Path = _TEMPLATE) -> str:
    """The rules: the template with each @name@ replaced; indented as it is if it is alone on its line."""
    parts = {
        "missing_by_kernel": missing_by_kernel(),
        "judged": ", ".join(JUDGED_HOSTS),
        # each function once, whatever layouts share it
        "call_functions": label("function", list(dict.fromkeys(f for layout in layouts() for f in layout.calls))),
        "not_vcpu_create": label("function", [name for vendor in VENDORS for name in vendor.vcpu_create], other=True),
    }
    text = template.read_text()
    text = re.sub(r"^( *)@(\w+)@$", lambda found: indent(parts[found[2]], found[1]), text, flags=re.MULTILINE)
    return re.sub(r"@(\w+)@", lambda found: parts[found[1]], text)


def main() -> None:
    """Write both files."""
    FILE.write_text(json.dumps(made(), indent=2) + "\n")
    RULES.write_text(rules())


if __name__ == "__main__":
    main()
