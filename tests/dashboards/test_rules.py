# SPDX-License-Identifier: GPL-2.0-or-later
"""dashboards/rules.yml and prometheus.yml, with promtool, and a Prometheus that scrapes msrtrace over TLS."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from needs import tool
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dashboards import make
from tracer.export.metrics import SnapshotCollector
from tracer.export.security import TlsFiles
from tracer.export.server import Server
from tracer.model.snapshot import Call, Durations, Map, Outcome, Probe, Snapshot, VmInfo

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
RULES, EXAMPLE = DASHBOARDS / "rules.yml", DASHBOARDS / "prometheus.yml"
TLS = "msrtrace-tls"  # the directory of the certificates in the example
#: The alerts of which one is for all hosts with the same kernel or job.
GROUPED = {"MsrtracePatchMissing", "MsrtraceProbeMissing", "MsrtraceTracesNothing"}
RUNBOOK = DASHBOARDS.parent / "docs/runbook.md"
Labels = frozenset[tuple[str, str]]


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([tool("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout + done.stderr


def make_certificates(directory: Path, host: str) -> None:
    """The files in the example, made by its own commands."""
    commands = re.findall(r"^ *# +(openssl .*)$", EXAMPLE.read_text(), re.MULTILINE)
    assert len(commands) == 3
    directory.mkdir()
    tool("openssl")
    for command in commands:
        subprocess.run(["sh", "-ec", f"host={host}\n{command}"], cwd=directory, check=True, capture_output=True)


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", RULES)


def test_rules_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", DASHBOARDS / "rules.test.yml")


def test_every_rule_is_tested() -> None:
    rules, tests = RULES.read_text(), (DASHBOARDS / "rules.test.yml").read_text()
    records = re.findall(r"- record: (\S+)", rules)
    alerts = re.findall(r"- alert: (\S+)", rules)
    assert (len(records), len(alerts)) == (len(set(records)), len(set(alerts))) == (7, 15)
    assert [record for record in records if f"{record}{{" not in tests and f"expr: {record}\n" not in tests] == []
    assert [alert for alert in alerts if f'alertname="{alert}", alertstate="firing"' not in tests] == []


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def test_each_alert_has_its_heading_in_the_runbook() -> None:
    """And the reverse; the link ends with the anchor that GitHub, GitLab and others make of the heading."""
    alerts = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"] if "alert" in rule
    ]
    links = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in alerts}
    headings = re.findall(r"^## (Msrtrace\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert [*links] == headings
    assert links == {alert: f"{make.DOCS}/runbook.md#{alert.lower()}" for alert in links}
    listed = re.findall(r"^- \[(Msrtrace\w+)\]\(#(\w+)\)", RUNBOOK.read_text(), re.MULTILINE)
    assert listed == [(alert, alert.lower()) for alert in headings]


def test_links_lead_to_where_docs_are_published() -> None:
    """All with `--docs URL`; the command in the rules sets those of a file that is installed already."""
    url = "https://git.example.org/msrtrace/docs"
    assert make.DOCS not in make.rules(url) + json.dumps(make.made(url))
    assert make.rules().replace(make.DOCS, url) == make.rules(url)
    for link in make.made(url)["links"]:
        file, _, anchor = link["url"].removeprefix(f"{url}/").partition("#")
        headings = re.findall(r"^#+ (.+)$", (RUNBOOK.parent / file).read_text(), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}


def series(name: str, labels: dict[str, object], value: int, minutes: int) -> dict[str, str]:
    """A series that does not change, in promtool's notation."""
    pairs = ", ".join(f"{label}={json.dumps(str(text))}" for label, text in labels.items())
    return {"series": f"{name}{{{pairs}}}", "values": f"{value}x{minutes}"}


def test_five_hundred_hosts_are_one_alert_for_each_kernel(tmp_path: Path) -> None:
    """In each of two jobs, and one more for a host with a wrong label; what one host does is an alert on that host."""
    given = []
    for number in range(500):
        job, kernel = "ab"[number % 2], f"6.{number % 4}"
        target: dict[str, object] = {"instance": f"kvm{number}", "job": f"msrtrace-{job}", "rack": number // 10}
        target |= {"patch": "patched"} if number == 44 else {}
        info = {"kernel": kernel, "version": number % 3, "vendor": "vmx", "layout": "toggle", "redundancy": "exact"}
        enable = {"msr": "0x48", "access": "read", "action": "enable", "cause": "filter_change"}
        hook, inlined = ({"function": name} for name in ("vmx_msr_filter_changed", "vmx_enable_intercept_for_msr"))
        given += [
            series("up", target, int(number != 7), 60),
            series("msrtrace_build_info", target | info, 1, 60),
            series("msrtrace_intercept_calls_total", target | enable, 17, 60),
            series("msrtrace_probe_attached", target | hook, int(number >= 20), 60),
            series("msrtrace_probe_attached", target | inlined, int(number >= 20 and kernel != "6.3"), 60),
        ]
    names = ("alertname", "job", "kernel", "patch", "function", "instance")
    firing = {  # and the number of hosts
        ("MsrtracePatchMissing", "msrtrace-a", "6.0", "", "", ""): 124,
        ("MsrtracePatchMissing", "msrtrace-a", "6.0", "patched", "", ""): 1,
        ("MsrtracePatchMissing", "msrtrace-b", "6.1", "", "", ""): 125,
        ("MsrtracePatchMissing", "msrtrace-a", "6.2", "", "", ""): 125,
        ("MsrtracePatchMissing", "msrtrace-b", "6.3", "", "", ""): 125,
        ("MsrtraceProbeMissing", "msrtrace-b", "6.3", "", "vmx_enable_intercept_for_msr", ""): 120,
        ("MsrtraceTracesNothing", "msrtrace-a", "", "", "", ""): 10,
        ("MsrtraceTracesNothing", "msrtrace-b", "", "", "", ""): 10,
        ("MsrtraceDown", "msrtrace-b", "", "", "", "kvm7"): 1,
    }
    counted: dict[str, list[dict[str, object]]] = {alert: [] for alert in GROUPED}
    samples = []
    for values, hosts in firing.items():
        alert, *others = (f'{name}="{value}"' for name, value in zip(names, values, strict=True) if value)
        samples.append({"labels": f"{{{', '.join((alert, *others))}}}", "value": 1})
        if values[0] in GROUPED:
            counted[values[0]].append({"labels": f"{{{', '.join(others)}}}", "value": hosts})
    alerts = f'count by ({", ".join(names)}) (ALERTS{{alertstate="firing"}})'
    rules = {rule["alert"]: rule["expr"] for rule in alert_rules()}
    case = {
        "interval": "1m",
        "input_series": given,
        "promql_expr_test": [
            {"expr": alerts, "eval_time": "50m", "exp_samples": samples},
            *({"expr": rules[one], "eval_time": "50m", "exp_samples": hosts} for one, hosts in counted.items()),
        ],
    }
    shutil.copy(RULES, tmp_path)
    content = {"rule_files": [RULES.name], "evaluation_interval": "5m", "tests": [case]}
    (tmp_path / "test.yml").write_text(json.dumps(content))
    promtool("test", "rules", tmp_path / "test.yml")


def test_promtool_accepts_the_example(tmp_path: Path) -> None:
    """As copied by an operator, with the certificates made by the commands in its comments."""
    for path in (RULES, EXAMPLE):
        shutil.copy(path, tmp_path)
    make_certificates(tmp_path / TLS, "kvm1.example.com")
    promtool("check", "config", tmp_path / EXAMPLE.name)


@pytest.mark.parametrize("number", range(3))
def test_commented_parts_of_the_example_are_valid(tmp_path: Path, number: int) -> None:
    """Each commented part, when enabled, is a valid configuration: limits of series, federation, Alertmanager."""
    text = EXAMPLE.read_text()
    parts = [
        r"    # sample_limit:.*\n|    # metric_relabel_configs:\n(?:    #  .*\n)+|      # server_name:.*\n",
        r"  # - job_name: federate\n(?:  #  .*\n)+",
        r"# alerting:\n(?:#  .*\n)+",
    ]
    found = re.findall(parts[number], text)
    assert len(found) == (3, 1, 1)[number]
    for part in found:
        text = text.replace(part, re.sub(r"^( *)# ", r"\1", part, flags=re.MULTILINE))
    (tmp_path / "prometheus.yml").write_text(text)
    promtool("check", "config", "--syntax-only", tmp_path / "prometheus.yml")


# Made-up hosts, of which every scrape sees one more filter update on each of two vCPUs.
PASSED_THROUGH = {0x10: "read", 0xC0000100: "read_write"}  # in a filter change, one of two changes its bits
INTERCEPTED = {0x48: "read_write", 0x49: "write"}
ODD = 'we"b\\, é'  # a VM's name, which may be anything


class Host:
    """A tracer's counts on a host with the patch or without; `by_vm`: of two VMs, each with one vCPU."""

    def __init__(self, *, patched: bool, by_vm: bool) -> None:
        self._patched, self._by_vm, self._updates = patched, by_vm, 0
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(SnapshotCollector(self.snapshot, "0.1.0", "6.12" if patched else "6.1"))

    def snapshot(self, patience: float = 0) -> Snapshot:
        self._updates += 1
        n = self._updates * (1 if self._by_vm else 2)
        pids = {100: ODD, 200: "db"} if self._by_vm else {0: ""}
        calls: dict[Call, Outcome] = {}
        for pid in pids:
            for msr, access in PASSED_THROUGH.items():
                born = Call(msr, access, "disable", "vcpu_create", "vmx_vcpu_create", pid)
                calls[born] = Outcome(1, 0, 1, 0, 0)
                again = Call(msr, access, "disable", "filter_change", "vmx_msr_filter_changed", pid)
                calls[again] = Outcome(n, n if msr == 0x10 else 0, 0, 0, 0)
            for msr, access in {} if self._patched else INTERCEPTED.items():
                useless = Call(msr, access, "enable", "filter_change", "vmx_msr_filter_changed", pid)
                calls[useless] = Outcome(n, n, 0, 0, 0)
        functions = ("vmx_msr_filter_changed", "vmx_enable_intercept_for_msr", "vmx_disable_intercept_for_msr")
        return Snapshot(
            layout="toggle",
            calls=calls,
            updates={pid: Durations(n, n * 0.001, (n, *[0] * 24)) for pid in pids},
            probes=(*(Probe(f, f, True, f) for f in functions), Probe("vmx_vcpu_create", None, False, "none")),
            maps=(Map("calls", len(calls), 8192), Map("threads", 0, 16384)),
            by_vm=self._by_vm,
            vms={pid: VmInfo(name) for pid, name in pids.items()} if self._by_vm else {},
        )

    def series(self) -> set[Labels]:
        """The exported series by their labels, without those that are empty: Prometheus does not store them."""
        families = text_string_to_metric_families(generate_latest(self.registry).decode())
        samples = (sample for family in families for sample in family.samples)
        return {frozenset([("__name__", s.name), *((n, v) for n, v in s.labels.items() if v)]) for s in samples}


@dataclass
class Fleet:
    """Two hosts by their `patch` label, the targets, and the Prometheus that scrapes them."""

    hosts: dict[str, Host]
    targets: dict[str, str]
    certificates: Path
    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of Prometheus' HTTP API."""
        with urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}", timeout=10) as response:
            answer = json.load(response)
        assert answer["status"] == "success"
        return answer["data"]

    def values(self, query: str) -> dict[str, float]:
        """The answer to a query whose series differ only in `patch`."""
        result = self.ask("query", query=query)["result"]
        values = {series["metric"].get("patch", ""): float(series["value"][1]) for series in result}
        assert len(values) == len(result)
        return values


def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until the condition holds; a failure shows its last value."""
    deadline = time.monotonic() + seconds
    while not (last := condition()):
        assert time.monotonic() < deadline, last
        time.sleep(0.1)


@contextmanager
def served(host: Host, certificates: Path) -> Iterator[int]:
    """Serve a host's metrics on 127.0.0.1 as `msrtrace run --web.tls-client-ca-file` does; yields the port."""
    cert, key, ca = (str(certificates / name) for name in ("server.pem", "server.key", "ca.pem"))
    server = Server(host.registry, ("127.0.0.1", 0), security=TlsFiles(cert, key, ca)).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


def ready(url: str) -> bool:
    """Whether the Prometheus is ready: it answers 503 while it reads its files."""
    try:
        urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def prometheus(directory: Path) -> Iterator[str]:
    """A Prometheus with the prometheus.yml of a directory, on a free port of 127.0.0.1; yields its URL."""
    log = directory / "log"
    options = [f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    options += ["--web.listen-address=127.0.0.1:0", "--log.format=json"]
    with log.open("w") as out:
        process = subprocess.Popen([tool("prometheus"), *options], stdout=out, stderr=out, cwd=directory)

    def address() -> re.Match[str] | None:
        assert process.poll() is None, log.read_text()
        return re.search(r'"address":"(127\.0\.0\.1:[1-9]\d*)"', log.read_text())

    try:
        eventually(address)
        found = address()
        assert found
        eventually(lambda: ready(f"http://{found[1]}/-/ready"))
        yield f"http://{found[1]}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The example except its targets and intervals; the rules except their `for`."""
    directory = tmp_path_factory.mktemp("prometheus")
    make_certificates(directory / TLS, "localhost")
    hosts = {"patched": Host(patched=True, by_vm=False), "unpatched": Host(patched=False, by_vm=True)}
    with ExitStack() as stack:
        ports = {patch: stack.enter_context(served(host, directory / TLS)) for patch, host in hosts.items()}
        targets = {patch: f"localhost:{port}" for patch, port in ports.items()}
        example = EXAMPLE.read_text()
        for patch, names in {"patched": ["kvm1", "kvm2"], "unpatched": ["kvm3"]}.items():
            example = example.replace(f"{names[0]}.example.com:9753", targets[patch])
            for name in names[1:]:
                example = example.replace(f"          - {name}.example.com:9753\n", "")
        example, paced = re.subn(r"(scrape|evaluation)_interval: 15s", r"\1_interval: 1s", example)
        assert paced == 2
        (directory / "prometheus.yml").write_text(example)
        rules, hurried = re.subn(r"^( +for: ).*$", r"\g<1>0s", RULES.read_text(), flags=re.MULTILINE)
        assert hurried == 15
        (directory / "rules.yml").write_text(rules)
        url = stack.enter_context(prometheus(directory))
        yield Fleet(hosts, targets, directory / TLS, url)


@pytest.mark.timeout(240)
def test_the_example_scrapes_over_tls(fleet: Fleet) -> None:
    def targets() -> list[dict[str, Any]]:
        active: list[dict[str, Any]] = fleet.ask("targets", state="active")["activeTargets"]
        return active

    eventually(lambda: [target["health"] != "unknown" for target in targets()] == [True, True])
    assert [target["lastError"] for target in targets()] == ["", ""]
    assert {target["scrapeUrl"] for target in targets()} == {f"https://{t}/metrics" for t in fleet.targets.values()}
    eventually(lambda: fleet.values("up") == {"patched": 1, "unpatched": 1})
    anybody = ssl.create_default_context(cafile=str(fleet.certificates / "ca.pem"))
    with pytest.raises((OSError, URLError)):  # it takes a client's certificate, so Prometheus showed its own
        urlopen(f"https://{fleet.targets['patched']}/metrics", context=anybody, timeout=5)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("patch", ["patched", "unpatched"])
def test_labels_are_stored_unchanged(fleet: Fleet, patch: str) -> None:
    """Every series has its own labels and the three of its target: none is renamed exported_..., none replaced."""
    of_target = {"job": "msrtrace", "instance": fleet.targets[patch], "patch": patch}
    selector = f'{{__name__=~"msrtrace_.+|process_.+", patch="{patch}"}}'
    eventually(lambda: fleet.ask("query", query=selector)["result"])
    scraped = {frozenset(series["metric"].items()) for series in fleet.ask("query", query=selector)["result"]}
    assert scraped == {series.union(of_target.items()) for series in fleet.hosts[patch].series()}
    assert any(("vm", ODD) in series for series in scraped) == (patch == "unpatched")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("record", "patched", "unpatched"),
    [
        ("instance:msrtrace_filter_change_calls_per_filter_updates:ratio", 2, 4),
        ("instance:msrtrace_filter_change_redundant_calls_per_filter_updates:ratio", 1, 3),
        ("instance:msrtrace_intercept_redundant_calls_per_intercept_calls:ratio_rate5m", 1 / 2, 3 / 4),
        (
            'instance_cause:msrtrace_intercept_redundant_calls_per_intercept_calls:ratio_rate5m{cause="filter_change"}',
            1 / 2,
            3 / 4,
        ),
    ],
)
def test_recording_rules_have_the_expected_values(fleet: Fleet, record: str, patched: float, unpatched: float) -> None:
    eventually(lambda: len(fleet.values(record)) == 2)
    assert fleet.values(record) == pytest.approx({"patched": patched, "unpatched": unpatched}, rel=0.02)


@pytest.mark.timeout(240)
def test_only_the_unpatched_host_fires_an_alert(fleet: Fleet) -> None:
    """One host fires one alert; nothing else is even pending."""

    def alerts() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = fleet.ask("alerts")["alerts"]
        return found

    eventually(lambda: [alert for alert in alerts() if alert["state"] == "firing"])
    [alert] = alerts()
    expected = {"alertname": "MsrtracePatchMissing", "severity": "warning", "kernel": "6.1"}
    assert alert["labels"] == expected | {"job": "msrtrace", "patch": "unpatched"}
    assert "(hosts: 1)" in alert["annotations"]["summary"]
    assert f"such as {fleet.targets['unpatched']} (" in alert["annotations"]["description"]


@pytest.mark.timeout(240)
def test_rules_evaluate_without_errors(fleet: Fleet) -> None:
    """All were evaluated without errors, follow the conventions and tell an operator what to do."""

    def rules() -> list[dict[str, Any]]:
        return [rule for group in fleet.ask("rules")["groups"] for rule in group["rules"]]

    eventually(lambda: all(rule["health"] != "unknown" for rule in rules()))
    for rule in rules():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]
        if rule["type"] == "recording":
            assert re.fullmatch(r"instance(_\w+)?:msrtrace_\w+:(ratio_|)?(rate5m|ratio|info)", rule["name"])
        else:
            assert rule["labels"]["severity"] in ("warning", "info")
            summary, description = (rule["annotations"][name] for name in ("summary", "description"))
            if rule["name"] in GROUPED:
                assert re.match(r"(Kernel|Job) \{\{ \$labels.(kernel|job) }} \(hosts: \{\{ \$value }}\): ", summary)
                assert "instance" not in rule["labels"]
                assert re.match(r"count by \(job", rule["query"])
            else:
                assert summary.startswith("{{ $labels.instance }}: ")
                assert "{{ $labels.instance }}" in description
            assert re.search(r"msrtrace (doctor|state)|d895f28ed6da", description)
    assert all(int(minutes) for minutes in re.findall(r"^ +for: (\d+)m$", RULES.read_text(), re.MULTILINE))
