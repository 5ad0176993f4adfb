# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks dashboards/grafana.json with what Grafana itself uses, and draws it.

Types by tsc against @grafana/schema; units, field options and transformations by @grafana/data; every query against a
real Prometheus; every panel drawn by @grafana/ui in headless Chromium from the answers. Without --prometheus it is one
with the hour of hosts.py in it, and the answers must be those that this fleet gives. With --hosts N it has that hour of
so many made-up hosts, scraped once a minute; then no query may take long, and no graph have too many lines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.dashboard import expected, hosts, pictures, typescript
from tests.dashboard.answers import Json, Range, ask, opened
from tests.dashboard.prometheus import Prometheus, backfilled

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
NPM_TRIES = 4
#: With many hosts: how often they are scraped; the most CPU time that a query may take, in seconds; the most lines.
MINUTE, SLOW, LINES = 60, 6.0, 20


def install(built: Path) -> None:
    """Install the npm packages of the lock file, unless they are installed."""
    wanted = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()
    stamp = built / "node_modules" / ".installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, built)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    for try_ in range(1, NPM_TRIES + 1):
        if subprocess.run(command, cwd=built, check=False).returncode == 0:
            stamp.write_text(wanted)
            return
        time.sleep(10 * try_)
    raise SystemExit(f"npm ci failed {NPM_TRIES} times")


def bundle(built: Path) -> None:
    """Bundle draw.tsx and its imports into one script."""
    shutil.copy(HERE / "draw.tsx", built)
    loaders = [f"--loader:.{kind}=dataurl" for kind in ("svg", "png", "ttf", "woff2")]
    options = ["--bundle", "--format=iife", "--jsx=automatic", "--outfile=draw.js", "--log-level=error", *loaders]
    production = "--define:process.env.NODE_ENV='production'"
    subprocess.run(["node_modules/.bin/esbuild", "draw.tsx", *options, production], cwd=built, check=True)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; times are seconds since the epoch."""
    parser = argparse.ArgumentParser(prog="check", description=__doc__)
    parser.add_argument("--prometheus", metavar="URL", help="a Prometheus that scrapes hosts, in place of made-up ones")
    parser.add_argument("--hosts", type=int, metavar="N", help="so many made-up hosts")
    parser.add_argument("--from", dest="start", type=float, metavar="SECONDS", help="an hour before --to")
    parser.add_argument("--to", dest="end", type=float, metavar="SECONDS", help="now")
    parser.add_argument(
        "--scrape-interval", type=float, default=hosts.STEP, metavar="SECONDS", help="of that Prometheus"
    )
    parser.add_argument("--out", type=Path, default=REPO / "build/dashboard", metavar="DIR", help="build/dashboard")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """0 if nothing is wrong; errors go to standard error."""
    options = parsed(arguments)
    dashboard = json.loads((REPO / "dashboards/grafana.json").read_text())
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    built = REPO / "build/npm-dashboard"
    built.mkdir(parents=True, exist_ok=True)
    end = options.end or (time.time() if options.prometheus else hosts.END)
    scrape = MINUTE if options.hosts else options.scrape_interval
    shown = Range(options.start or end - hosts.SECONDS, end, scrape)

    complaints: list[str] = []

    def step(what: str, do: Callable[[], list[str] | None]) -> None:
        began, found = time.monotonic(), do() or []
        complaints.extend(f"{what}: {text}" for text in found)
        print(f"{what}: {len(found) or 'nothing'} wrong, {time.monotonic() - began:.1f} s", flush=True)

    answers: dict[str, dict[str, list[Json]]] = {}

    def queries() -> list[str]:
        if options.prometheus:
            return run(Prometheus(options.prometheus.rstrip("/")), expect=False)
        many = hosts.many(options.hosts) if options.hosts else None
        with (
            tempfile.TemporaryDirectory() as directory,
            backfilled(Path(directory) / "prometheus", many, int(scrape)) as prometheus,
        ):
            return run(prometheus, expect=not many)

    def run(prometheus: Prometheus, *, expect: bool) -> list[str]:
        asked = ask(prometheus, dashboard, shown, at_once=1 if options.hosts else 4)
        answers.update(asked.answers)
        if expect:
            checks = (expected.unselected, expected.unexplained)
            more = [complaint for check in checks for complaint in check(prometheus, dashboard, shown)]
            return asked.complaints + expected.wrong(prometheus, dashboard, shown, asked.answers) + more
        return asked.complaints + (expected.too_much(dashboard, asked, SLOW, LINES) if options.hosts else [])

    step("npm packages", lambda: install(built))
    step("types", lambda: typescript.compile_(dashboard, built))
    step("queries", queries)
    step("bundle", lambda: bundle(built))
    data = {"panels": opened(dashboard), "answers": answers, "start": shown.start, "end": shown.end, "step": shown.step}
    step("pictures", lambda: pictures.draw(data, built, out))
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    print(f"pictures are in {out}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
