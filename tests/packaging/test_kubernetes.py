# SPDX-License-Identifier: GPL-2.0-or-later
"""The manifests, by the schemas of Kubernetes; and what they say of msrtrace, by msrtrace.

That a container with these rights works is shown by tests/kvmhost/test_container.py.
"""

from __future__ import annotations

import copy
import urllib.request
from typing import Any

import kubernetes_validate
import pytest
import yaml
from command_lines import root
from containers import ALL_FOUR
from project import PROJECT, REPO
from prometheus_client import CollectorRegistry

from tracer.cli.run import run
from tracer.export.server import Server

FOLDER = REPO / "packaging/container"
MANIFEST: list[dict[str, Any]] = list(yaml.safe_load_all((FOLDER / "daemonset.yaml").read_text()))
[DAEMONSET] = [document for document in MANIFEST if document["kind"] == "DaemonSet"]
POD = DAEMONSET["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
#: Of Kubernetes: the oldest that the validator knows of those that cloud providers still run, and the newest.
VERSIONS = ["1.29", kubernetes_validate.latest_version()]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", MANIFEST, ids=lambda document: document["kind"])
def test_each_document_is_as_kubernetes_has_it(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_what_kubernetes_does_not_have_is_noticed() -> None:
    wrong = copy.deepcopy(DAEMONSET)
    wrong["spec"]["template"]["spec"]["hostPIDs"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostPIDs"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_its_rights_are_those_that_were_tried() -> None:
    security = CONTAINER["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"], "add": ALL_FOUR.split(",")}
    assert (security["readOnlyRootFilesystem"], security["allowPrivilegeEscalation"]) == (True, False)
    assert POD["hostPID"]
    assert "volumes" not in POD


def test_msrtrace_takes_the_arguments() -> None:
    command, *arguments = CONTAINER["args"]
    assert command == "run"
    given = run.make_context("run", arguments, parent=root()).params
    [port] = CONTAINER["ports"]
    assert given["address"] == ("", port["containerPort"])  # every address of the pod
    assert given["wait_module"]
    annotations = DAEMONSET["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe"])
def test_msrtrace_answers_the_probes(probe: str) -> None:
    get = CONTAINER[probe]["httpGet"]
    assert get["port"] == CONTAINER["ports"][0]["name"]
    with Server(CollectorRegistry(), ("127.0.0.1", 0)) as server:
        server.start()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}{get['path']}", timeout=10) as answer:
            assert answer.status == 200
        server.shutdown()


def test_the_image_is_of_this_version() -> None:
    assert CONTAINER["image"].endswith(f"/msrtrace:{PROJECT['version']}")


def test_the_podmonitor_finds_the_pods() -> None:
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())
    labels = DAEMONSET["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    assert monitor["metadata"]["namespace"] == DAEMONSET["metadata"]["namespace"]
    assert [one["port"] for one in monitor["spec"]["podMetricsEndpoints"]] == [CONTAINER["ports"][0]["name"]]
