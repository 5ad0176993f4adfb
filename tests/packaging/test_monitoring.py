# SPDX-License-Identifier: GPL-2.0-or-later
"""What msrtrace-monitoring installs, read by the servers that it is for; by us for those that Debian lacks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from needs import tool
from project import REPO

from tracer.cli.run import DEFAULT_ADDRESS

MONITORING, RULES = REPO / "packaging/monitoring", REPO / "dashboards/rules.yml"
JOB: dict[str, Any] = yaml.safe_load((MONITORING / "msrtrace-scrape.yml").read_text())["scrape_configs"][0]
LONGEST_INTERVAL = 60  # seconds, by dashboards/prometheus.yml: the rules use windows of five minutes


def check(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """What the package puts into /etc/prometheus."""
    for name in ("msrtrace-scrape.yml", "msrtrace-targets.yml"):
        shutil.copy(MONITORING / name, tmp_path)
    return tmp_path


def test_prometheus_takes_the_job(etc: Path) -> None:
    """By a copy of it, as Debian 12's must: scrape_config_files is of 2.43."""
    rules = f"rule_files: [{RULES}]\n"
    (etc / "prometheus.yml").write_text((etc / "msrtrace-scrape.yml").read_text() + rules)
    check([tool("promtool"), "check", "config", str(etc / "prometheus.yml")])


@pytest.mark.parametrize("server", ["vmagent", "victoria-metrics"])
def test_victoria_metrics_takes_the_job(etc: Path, server: str) -> None:
    check([tool(server), f"-promscrape.config={etc}/msrtrace-scrape.yml", "-dryRun", "-loggerLevel=ERROR"])


def test_a_job_with_an_unknown_setting_is_noticed(etc: Path) -> None:
    job = etc / "msrtrace-scrape.yml"
    job.write_text(job.read_text().replace("scrape_interval", "scrape_intervall"))
    with pytest.raises(AssertionError, match="scrape_intervall"):
        test_victoria_metrics_takes_the_job(etc, "vmagent")


def test_vmalert_takes_the_rules() -> None:
    check([tool("vmalert"), f"-rule={RULES}", "-dryRun", "-loggerLevel=ERROR"])


def test_targets_as_the_example_has_them(etc: Path) -> None:
    file = etc / "msrtrace-targets.yml"
    lines = [line for line in file.read_text().splitlines() if re.match(r"#  ?[- ]", line)]
    example = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines))
    assert [sorted(group) for group in example] == [["labels", "targets"]]
    file.write_text(yaml.safe_dump(example))
    test_prometheus_takes_the_job(etc)


def test_the_alerts_find_the_job() -> None:
    assert "msrtrace" in JOB["job_name"]
    assert int(JOB["scrape_interval"].removesuffix("s")) <= LONGEST_INTERVAL


def test_alloy_scrapes_what_msrtrace_serves() -> None:
    """No Alloy reads it here: it is in none of Debian's, PyPI's and npm's packages."""
    text = re.sub(r"^//.*", "", (MONITORING / "msrtrace.alloy").read_text(), flags=re.MULTILINE)
    values = dict(re.findall(r'^\s*"?(\w+)"?\s*= "(.*)"$', text, re.MULTILINE))
    assert f'"__address__" = "{DEFAULT_ADDRESS}"' in text
    assert (values["job_name"], values["scrape_interval"]) == (JOB["job_name"], JOB["scrape_interval"])
    assert values["metrics_path"] == "/metrics"
    blocks = re.findall(r'^([a-z_.]+) "(\w+)" {', text, re.MULTILINE)
    [receiver] = re.findall(r"forward_to\s*= \[(.*)\.receiver\]", text)
    assert receiver in {f"{kind}.{label}" for kind, label in blocks}
    assert text.count("{") == text.count("}")


def test_grafana_finds_the_dashboard_and_no_other_file() -> None:
    [provider] = yaml.safe_load((MONITORING / "grafana/msrtrace.yaml").read_text())["providers"]
    assert provider["type"] == "file"
    installed = [line.split() for line in _installed()]
    there = [Path(file) for file, where in installed if f"/{where}" == provider["options"]["path"]]
    [dashboard] = [file for file in there if file.suffix == ".json"]
    assert json.loads((REPO / dashboard).read_text())["uid"] == "msrtrace"


def test_what_is_installed_exists() -> None:
    for line in _installed():
        assert (REPO / line.split()[0]).is_file()


def _installed() -> list[str]:
    """The lines of debian/msrtrace-monitoring.install: a file, and where it goes."""
    lines = (REPO / "packaging/debian/msrtrace-monitoring.install").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]
