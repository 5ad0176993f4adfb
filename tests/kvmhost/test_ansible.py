# SPDX-License-Identifier: GPL-2.0-or-later
"""The Ansible role on an emulated host with systemd, fresh but for an apt repository: twice, and what it made."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import yaml
from cache import REPO, cached, retried, sh
from configured import FILES, PASSWORD, URL, USER
from conftest import HERE, LIMIT_SECONDS, RUN
from deb import packages
from dispositions import as_begun
from hosts import HOSTS, Host, userland
from payload import pip
from repository import repository

HOST = "trixie-amd"
ROLE = REPO / "packaging/ansible/roles/msrtrace"
[LISTEN] = re.findall(r"https://([\d.:]+)/", URL)


def play(folder: Path) -> list[dict[str, Any]]:
    """As packaging/ansible/example.yml, from a repository."""
    [example] = yaml.safe_load((REPO / "packaging/ansible/example.yml").read_text())
    [role] = example["roles"]
    variables = role["vars"]
    del variables["msrtrace_deb"]
    variables["msrtrace_listen"] = LISTEN
    key, certificate = folder / "server.key", folder / "server.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "9999"]
    sh([*make, "-keyout", key, "-out", certificate])
    variables["msrtrace_tls_files"] = {file.name: file.read_text() for file in (key, certificate)}
    users = {USER: bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()}
    variables["msrtrace_web_config"]["basic_auth_users"] = users
    return [example]


def ansible(host: Host) -> Path:
    """A directory of Python modules with Ansible, compiled: to install it and compile it there takes a quarter hour."""
    root = userland(host, "fresh")

    def make(work: Path) -> None:
        scratch = work / "root"  # links: what is written there is new
        sh(["cp", "-al", root, scratch])
        site = scratch / "mnt/site"
        version = sh(["chroot", scratch, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()
        options: list[str | Path] = [
            "--quiet",
            "--only-binary=:all:",
            "--no-compile",
            "--python-version",
            version,
            "--target",
            site,
        ]
        retried("Ansible", lambda: sh([*pip(), "install", *options, "ansible-core"]))
        compiling = ["-q", "-s", "/mnt/site", "-p", "/in/site", "/mnt/site"]
        sh(["chroot", scratch, "sh", "-c", 'python3 -m compileall "$@" || :', "-", *compiling])
        site.rename(work / "site")
        shutil.rmtree(scratch)

    return cached(f"ansible-{host.userland.name}", [root.parent.name], make) / "site"


def configured_host(folder: Path) -> dict[str, Any]:
    sent, host = folder / "in", HOSTS[HOST]
    [package] = packages(host.userland).glob("msrtrace_*_amd64.deb")
    others = ["python3-apt", "python3-yaml", "python3-bcrypt"]
    repository(host, [package], sent / "repository", others=others)
    shutil.copytree(ansible(host), sent / "site")
    shutil.copytree(ROLE, sent / "ansible/roles/msrtrace")
    (sent / "ansible/play.yml").write_text(yaml.safe_dump(play(sent / "ansible")))
    shutil.copy(HERE / "scenarios/configured.py", sent)
    options = ["--host", HOST, "--stock", "--init", "systemd", "--fresh", "--timeout", "3000"]
    options += ["--in", str(sent), "--out", str(folder / "out")]
    subprocess.run(
        as_begun([sys.executable, str(RUN), *options, "--", "python3", "/in/configured.py"]),
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    found: dict[str, Any] = json.loads((folder / "out/configured.json").read_text())
    return found


beside_ansible = pytest.mark.beside(boot=configured_host, host="ansible")


@beside_ansible
def test_the_first_run_changes_the_host_and_the_second_nothing(beside: Any) -> None:
    first, second = (run["stdout"] for run in beside["runs"])
    assert [run["status"] for run in beside["runs"]] == [0, 0], first + second
    changed = [int(number) for text in (first, second) for number in re.findall(r"\bchanged=(\d+)", text)]
    assert changed[0] > 4
    assert changed[1] == 0, second


@beside_ansible
def test_no_secret_is_shown(beside: Any) -> None:
    shown = "".join(run["stdout"] + run["stderr"] for run in beside["runs"])
    assert "PRIVATE KEY" not in shown
    assert "$2b$" not in shown


@beside_ansible
def test_the_service_runs_as_it_was_told(beside: Any) -> None:
    state = dict(line.split("=", 1) for line in beside["service"]["stdout"].split())
    assert state == {"ActiveState": "active", "UnitFileState": "enabled", "NRestarts": "0"}, beside["journal"]
    assert beside["answers"] == {"no password": 401, "wrong": 401, "right": 200}
    assert 'MSRTRACE_OPTIONS="--by-vm --web.config.file=/etc/msrtrace/web.yml"' in beside["options"].splitlines()


@beside_ansible
def test_keys_and_passwords_are_the_service_s_alone(beside: Any) -> None:
    files = beside["files"]
    assert {files[path].split()[0] for path in FILES} == {"root"}
    assert files["/etc/msrtrace"] == "root msrtrace 750"
    assert files["/etc/msrtrace/web.yml"] == files["/etc/msrtrace/server.key"] == "root msrtrace 640"
