# SPDX-License-Identifier: GPL-2.0-or-later
"""Report files: the schema, and what is no report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hostile import foreign, nested, oversized
from hypothesis import given
from made import amd, any_reports, patched, recalc, recalculated, report, svm_pass, svm_recalc, toggle, unpatched
from made_vms import FS_BASE, denies, state, vcpu, vm

from tracer.model.errors import MsrtraceError
from tracer.model.snapshot import Map, Snapshot
from tracer.report import file as reportfile
from tracer.report.file import SIZE_LIMIT, decode, encode, read
from tracer.report.report import Report
from tracer.report.report_view import report_document
from tracer.report.state_making import states_of_report

SCHEMA = Path(reportfile.__file__).with_name("report.schema.json")


EXAMPLES = {
    "patched": patched(),
    "unpatched": unpatched(),
    "unknown": report(toggle(exact=False)),
    "recalc": report(recalc()),
    "recalculated": report(recalculated()),
    "recalculated, by vm": report(recalculated(by_vm=True, vms={})),
    "by vm": report(toggle(pid=100)),
    "with a state": report(
        toggle(), state=states_of_report(state(vm("web-01", 812), vm("web-02", 844, vcpu(0, denies(FS_BASE)))))
    ),
    "AMD": amd(),
    "AMD, recalc, by vm": amd(svm_recalc(by_vm=True, vms={})),
    "AMD, unknown": amd(svm_pass(exact=False)),
    "nothing": report(Snapshot("toggle")),
    "filter-only": report(Snapshot("filter-only", updates=toggle().updates, calls_observable=False)),
    "no updates": report(replace(toggle(), updates={}, updates_observable=False), command=None),
    "lower bound": report(toggle(maps=(Map("calls", 9, 9, 3),), module_unloads=2), notes=["a note"], exit_status=137),
}


EXAMPLE = encode(EXAMPLES["by vm"])


@pytest.fixture(scope="session")
def valid() -> jsonschema.protocols.Validator:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_is_generated_from_the_types() -> None:
    done = subprocess.run([sys.executable, "-m", "tracer.report.file"], capture_output=True, text=True, check=True)
    assert done.stdout == SCHEMA.read_text(), f"{sys.executable} -m tracer.report.file > {SCHEMA}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_reports_fit_the_schema(valid: jsonschema.protocols.Validator, name: str) -> None:
    valid.validate(json.loads(encode(EXAMPLES[name])))
    assert decode(encode(EXAMPLES[name])) == EXAMPLES[name]


@given(made=any_reports)
def test_all_reports_fit_the_schema(valid: jsonschema.protocols.Validator, made: Report) -> None:
    valid.validate(json.loads(encode(made)))


def test_reports_without_a_state_are_read() -> None:
    content = json.loads(EXAMPLE)
    assert content.pop("state") is None
    assert decode(json.dumps(content).encode()) == EXAMPLES["by vm"]


def test_the_schema_refuses_what_the_reader_refuses(valid: jsonschema.protocols.Validator) -> None:
    for path, value in (
        (("totals", "calls"), -1),
        (("host", "redundancy"), "perhaps"),
        (("host", "vendor"), "tdx"),
        (("calls", 0, "msr"), "16"),
        (("calls", 0, "action"), "disable_both"),
    ):
        content = json.loads(EXAMPLE)
        at = content
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        assert not valid.is_valid(content)
        assert refusal(json.dumps(content).encode()).startswith("is a damaged report: ")


def refusal(data: bytes) -> str:
    """The error for data that is not a report: one printable line."""
    with pytest.raises(MsrtraceError) as error:
        decode(data)
    return checked(str(error.value))


def checked(text: str) -> str:
    assert text.isprintable()
    assert len(text) < 500
    return text


def edited(old: bytes, new: bytes) -> bytes:
    """The example with one text replaced."""
    assert old in EXAMPLE
    return EXAMPLE.replace(old, new)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        *foreign(EXAMPLE, "msrtrace-report/1", "report"),
        (edited(b'"calls": 1320', b'"calls": 1e999'), "is a damaged report: "),
        (edited(b"2.5,", b"1e999,"), "is "),
        (edited(b"2.5,", b"-1,"), "is a damaged report: "),
        (edited(b"2.5,", b"NaN,"), "is not JSON: "),
        (edited(b"2.5,", b"Infinity,"), "is not JSON: "),
        (
            edited(b"2.5,", b'"2.5",'),
            "is a damaged report: Expected `float`, got `str` - at `$.duration_seconds`",
        ),
        (edited(b'"pid": 100', b'"pid": ' + b"9" * 5000), "is a damaged report: "),
        (edited(b'"label": ""', b'"label": "' + b"x" * 4097 + b'"'), "is a damaged report: "),
        (edited(b'"label": ""', b'"label": "\\ud800"'), "is "),
        (edited(b'"label": ""', b'"label": "\x1b"'), "is not JSON: "),
    ],
)
def test_what_is_no_report_is_refused_with_the_reason(data: bytes, why: str) -> None:
    assert refusal(data).startswith(why)


def test_a_byte_order_mark_is_skipped() -> None:
    assert decode(b"\xef\xbb\xbf" + EXAMPLE) == decode(EXAMPLE)


def test_unknown_fields_are_ignored() -> None:
    content = json.loads(EXAMPLE)
    for part in (content, content["host"], content["totals"], content["calls"][0], content["verdict"], content["loss"]):
        part |= {"future": {"deep": [1, None, "x"]}, "": 1e308}
    assert decode(json.dumps(content).encode()) == decode(EXAMPLE)


def test_fields_that_have_defaults_may_be_missing() -> None:
    content = json.loads(EXAMPLE)
    for name in ("msrtrace", "label", "command", "exit_status", "vms", "notes"):
        del content[name]
    assert decode(json.dumps(content).encode()).title == "6.1.0-53-amd64"


def test_files_older_than_recalculations_can_be_read() -> None:
    made = EXAMPLES["recalculated, by vm"]
    content = json.loads(encode(made))
    del content["totals"]["recalculations"], content["recalculation_seconds"], content["vms"][0]["recalculations"]
    del content["totals"]["creation_recalculations"], content["totals"]["vcpus_created"], content["per_vcpu_creation"]
    old = decode(json.dumps(content).encode())
    assert (old.totals.recalculations, old.recalculation_seconds) == (None, None)
    assert (old.totals.vcpus_created, old.totals.creation_recalculations, old.per_vcpu_creation) == (None, None, None)
    assert "recalculation" not in report_document(old).text()
    assert (old.totals.calls, old.filter_update_seconds) == (made.totals.calls, made.filter_update_seconds)


def test_files_older_than_vendors_are_intels() -> None:
    content = json.loads(EXAMPLE)
    del content["host"]["vendor"]
    old = decode(json.dumps(content).encode())
    assert old == EXAMPLES["by vm"]
    assert (old.host.vendor, old.host.module_parameters) == ("vmx", {"ept": "Y", "nested": "Y"})
    del content["host"]["kvm_intel"]
    assert decode(json.dumps(content).encode()).host.module_parameters == {}


def test_parameters_of_another_vendors_module_are_not_the_hosts() -> None:
    content = json.loads(encode(EXAMPLES["AMD"]))
    content["host"]["kvm_intel"] = {"ept": "N"}
    read_back = decode(json.dumps(content).encode())
    assert read_back.host.module_parameters == {"avic": "N", "nested": "1"}
    assert "ept" not in report_document(read_back).text()


def test_the_last_of_duplicate_fields_counts() -> None:
    assert decode(edited(b'"label": ""', b'"label": "a", "label": "b"')).label == "b"


@pytest.mark.parametrize("data", nested(EXAMPLE))
def test_deep_nesting_is_refused(data: bytes) -> None:
    assert "too deeply" in refusal(data)


@pytest.mark.parametrize(
    "data",
    [
        *oversized(EXAMPLE, SIZE_LIMIT),
        edited(b'"duration_seconds": 2.5', b'"duration_seconds": 0.' + b"1" * (SIZE_LIMIT - 99_999) + b"x"),
    ],
)
def test_an_oversized_file_is_refused(data: bytes) -> None:
    before = time.process_time()
    refusal(data)
    assert time.process_time() - before < 10


def unreadable(path: Path) -> str:
    with pytest.raises(MsrtraceError) as error:
        read(path)
    return str(error.value).replace(str(path), "FILE")


def test_a_written_report_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(EXAMPLE)
    assert read(file) == EXAMPLES["by vm"]
    file.write_bytes(b"")
    assert unreadable(file) == "FILE is empty"
    file.write_bytes(b"{}")
    assert unreadable(file).startswith("FILE is not an msrtrace report: ")


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    assert unreadable(tmp_path) == "cannot read FILE: Is a directory"
    assert unreadable(tmp_path / "none") == "cannot read FILE: No such file or directory"
    assert unreadable(tmp_path / ("x" * 300)) == "cannot read FILE: File name too long"
    (tmp_path / "circle").symlink_to("circle")
    assert unreadable(tmp_path / "circle") == "cannot read FILE: Too many levels of symbolic links"
    assert unreadable(Path("/dev/null")) == "FILE is empty"
    assert unreadable(Path("/dev/zero")) == "FILE is larger than any report (32 MB)"


def test_missing_permission_to_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # root may read everything
    assert unreadable(tmp_path / "a.json") == "cannot read FILE: Permission denied"


def test_a_pipe_can_be_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(EXAMPLE,))
    writer.start()
    assert read(pipe) == EXAMPLES["by vm"]
    writer.join()


def test_standard_input_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(EXAMPLE)))
    assert read(Path("-")) == EXAMPLES["by vm"]
    with pytest.raises(MsrtraceError, match="standard input is empty"):
        read(Path("-"))
