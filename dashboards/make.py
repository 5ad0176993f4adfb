# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes grafana.json and rules.yml: `python -m dashboards.make [--docs URL]` in the root of the checkout.

queries.py has the queries, verdict.py those for the patch, grafana.py what panels of one kind share; the other files
have the rows. rules.template.yml is rules.yml with placeholders for what is generated.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from textwrap import indent

from dashboards.activity import overview, per_cause, per_msr, per_vm
from dashboards.exits import exits
from dashboards.grafana import Json, choice, dashboard, laid_out, link, variable
from dashboards.health import health
from dashboards.patterns import label
from dashboards.queries import HOSTS, RECORDED, vendor_pattern
from dashboards.savings import SPEED, savings
from dashboards.state import intercepted_now
from dashboards.updates import by_vendor, comparison, filter_updates, recalculations
from dashboards.verdict import LABELS, MISSING_CODE, VERDICTS, recorded
from tracer.model.vendors import VENDORS, layouts
from tracer.report.fleet.targets import MACHINE_LABELS

FILE = Path(__file__).with_name("grafana.json")
RULES = Path(__file__).with_name("rules.yml")
_TEMPLATE = Path(__file__).with_name("rules.template.yml")
#: Where docs/ is published, for links: a placeholder, as msrtrace has no site of its own.
DOCS = "https://msrtrace.example.com/docs"


def _variables() -> list[Json]:
    """By which hosts are selected, and what estimates assume."""
    info = 'msrtrace_build_info{job=~"$job"}'
    known = HOSTS.replace("|up", "", 1)  # which all other targets have, too
    return [
        variable("job", "msrtrace_build_info"),
        variable("kernel", info, all_value=".*"),
        choice("vendor", {vendor.title: vendor_pattern(vendor.name) for vendor in VENDORS}),
        choice("patch", {VERDICTS[code][0]: text for code, text in LABELS.items()}),
        variable("instance", known.replace(', instance=~"$instance"', "")),
        SPEED,
    ]


def made(docs: str = DOCS) -> Json:
    """The dashboard, with links to what is below the URL `docs`."""
    rows = {
        "Overview": overview(),
        "By MSR": per_msr(),
        "By cause": per_cause(),
        "Intercepted now": intercepted_now(),
        "Exits": exits(),
        "Filter updates": filter_updates(),
        "Recalculations, and vCPUs created": recalculations(),
        "What patching would save": savings(),
        "By vendor": by_vendor(),
        "Patched against unpatched": comparison(),
        "By VM": per_vm(),
        "Health of the tracers": health(),
    }
    return dashboard(
        "msrtrace: MSR intercepts",
        "What KVM's MSR-intercept code does, how much of it is redundant, and what it costs.",
        laid_out(rows),
        variables=_variables(),
        links=[
            link(title, f"{docs}/{file}")
            for title, file in {
                "Runbook": "runbook.md",
                "This dashboard": "fleets.md#the-dashboard",
                "What is counted": "metrics.md#what-is-counted",
                "What the patch saves": "cost.md#what-the-patch-saves",
            }.items()
        ],
    )


def rules(docs: str = DOCS, template: Path = _TEMPLATE) -> str:
    """The rules: the template with each @name@ replaced; indented as it is if it is alone on its line.

    Each alert has a link to its heading in the runbook, below the URL `docs`.
    """
    machine = sorted(MACHINE_LABELS - {"instance"})
    parts = {
        "docs": docs,
        "machine": ", ".join(machine),
        "unnamed": ", ".join(f'{name}=""' for name in machine),
        "recorded": RECORDED,
        "verdict": recorded(),
        "missing": LABELS[MISSING_CODE],
        # each function once, whatever layouts share it
        "call_functions": label("function", list(dict.fromkeys(f for layout in layouts() for f in layout.calls))),
        "not_vcpu_create": label("function", [name for vendor in VENDORS for name in vendor.vcpu_create], other=True),
    }
    text = template.read_text()
    text = re.sub(r"^( *)@(\w+)@$", lambda found: indent(parts[found[2]], found[1]), text, flags=re.MULTILINE)
    return re.sub(r"@(\w+)@", lambda found: parts[found[1]], text)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(prog="python -m dashboards.make", description=__doc__)
    parser.add_argument("--docs", metavar="URL", default=DOCS, help="where you publish docs/, for links")
    docs: str = parser.parse_args().docs.rstrip("/")
    FILE.write_text(json.dumps(made(docs), indent=2) + "\n")
    RULES.write_text(rules(docs))


if __name__ == "__main__":
    main()
