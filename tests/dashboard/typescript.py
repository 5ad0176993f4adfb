# SPDX-License-Identifier: GPL-2.0-or-later
"""The dashboard as a TypeScript program, which compiles if its types are those of @grafana/schema."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.dashboard.answers import opened

_HEAD = """\
import type { Dashboard } from '@grafana/schema';
// Enumerations are plain strings in JSON.
type Plain<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
"""
_CONFIG = {
    "compilerOptions": {
        "strict": True,
        "noEmit": True,
        "skipLibCheck": True,
        "target": "es2022",
        "lib": ["es2022", "dom"],
        "module": "esnext",
        "moduleResolution": "bundler",
        "types": [],
    },
    "files": ["dashboard.ts"],
}
#: The module in the schema of each kind of panel.
_KINDS = {"text": "Text", "stat": "Stat", "timeseries": "TimeSeries", "table": "Table"}


def program(dashboard: dict[str, Any]) -> str:
    """The dashboard with its type, and its panels' options with the types of their kinds."""
    lines = [_HEAD]
    for kind, name in _KINDS.items():
        path = f"@grafana/schema/dist/esm/raw/composable/{kind}/panelcfg/x/{name}PanelCfg_types.gen"
        lines.append(f"import type * as {kind} from '{path}';")
    lines.append(f"export const dashboard: Plain<Dashboard> = {json.dumps(dashboard, indent=2)};")
    for panel in opened(dashboard):
        kind, config = panel["type"], panel.get("fieldConfig", {})
        if kind in _KINDS:
            lines.append(f"export const options{panel['id']}: Plain<{kind}.Options> = {json.dumps(panel['options'])};")
        customs = [config["defaults"]["custom"]] if "custom" in config.get("defaults", {}) else []
        for override in config.get("overrides", []):
            properties = {
                p["id"].removeprefix("custom."): p["value"] for p in override["properties"] if "custom." in p["id"]
            }
            customs.append(properties)
        for number, custom in enumerate(customs):
            name = f"custom{panel['id']}_{number}"
            lines.append(f"export const {name}: Partial<Plain<{kind}.FieldConfig>> = {json.dumps(custom)};")
    return "\n".join(lines) + "\n"


def compile_(dashboard: dict[str, Any], built: Path) -> list[str]:
    """The errors of tsc, with the installed npm packages, on the dashboard."""
    (built / "dashboard.ts").write_text(program(dashboard))
    (built / "tsconfig.json").write_text(json.dumps(_CONFIG))
    done = subprocess.run(["node_modules/.bin/tsc"], cwd=built, capture_output=True, text=True, check=False)
    return re.findall(r"^dashboard.*", done.stdout, re.MULTILINE) or ([done.stdout] if done.returncode else [])
