# SPDX-License-Identifier: GPL-2.0-or-later
"""Ansible on a fresh host with systemd: the role in /in/ansible, twice, from an apt repository; and what it made."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path
from typing import Any

URL = "https://127.0.0.1:9754/metrics"
USER, PASSWORD = "prometheus", "correct horse"
APT = ["apt-get", "-o", "Dpkg::Use-Pty=0", "--quiet"]
PLAY = [*("env", "PYTHONPATH=/in/site", "python3", "-m", "ansible", "playbook")]
PLAY += ["--inventory", "localhost,", "--connection", "local", "/in/ansible/play.yml"]
FILES = ["/etc/default/msrtrace", "/etc/msrtrace", "/etc/msrtrace/web.yml", "/etc/msrtrace/server.key"]


ENVIRONMENT = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}


def output_of(*command: str) -> dict[str, Any]:
    """Run COMMAND; its status and output. (guest.py needs msrtrace, which is not here yet.)"""
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=ENVIRONMENT)
    return {"status": done.returncode, "stdout": done.stdout, "stderr": done.stderr}


def asked(*passwords: str) -> int:
    """The status of the answer to a scrape over TLS, with the password if one is given."""
    request = urllib.request.Request(URL)
    for password in passwords:
        request.add_header("Authorization", "Basic " + b64encode(f"{USER}:{password}".encode()).decode())
    context = ssl.create_default_context(cafile="/in/ansible/server.pem")
    try:
        with urllib.request.urlopen(request, context=context, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def owned(path: str) -> str:
    """Owner, group and mode of a file."""
    status = Path(path).stat()
    return f"{Path(path).owner()} {Path(path).group()} {status.st_mode & 0o7777:o}"


def main() -> None:
    """Leaves /out/configured.json."""
    shutil.copy("/in/repository/kvmhost.list", "/etc/apt/sources.list.d/")
    found: dict[str, Any] = {"update": output_of(*APT, "update")}
    found["module"] = output_of(*APT, "install", "-y", "python3-apt")
    found["runs"] = [output_of(*PLAY) for _ in range(2)]
    found["service"] = output_of("systemctl", "show", "msrtrace.service", "-p", "ActiveState,UnitFileState,NRestarts")
    found["answers"] = {"no password": asked(), "wrong": asked("wrong"), "right": asked(PASSWORD)}
    found["options"] = Path(FILES[0]).read_text()
    found["files"] = {path: owned(path) for path in FILES}
    found["journal"] = output_of("journalctl", "--unit=msrtrace.service", "--no-pager")["stdout"]
    Path("/out/configured.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
