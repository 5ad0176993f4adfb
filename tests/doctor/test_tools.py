# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks of what compiles and attaches the BPF program, on machines made of files."""

from __future__ import annotations

import pytest
from machines import FAILED, OK, RELEASE, Host

from tracer.doctor.check import Check
from tracer.doctor.examination import obstacle
from tracer.kernel.machine import Machine
from tracer.model.errors import MsrtraceError


def test_headers_in_one_tree(host: Host) -> None:
    host.remove(f"lib/modules/{RELEASE}/source")
    host.write(f"usr/src/linux-headers-{RELEASE}/include/linux/kconfig.h")
    assert host.found("headers") == (OK, None)


@pytest.mark.parametrize("lost", [f"usr/src/linux-headers-{RELEASE}", "usr/src/linux-headers-6.1.0-56-common"])
def test_half_of_the_headers(host: Host, lost: str) -> None:
    host.remove(lost)
    assert host.found("headers") == (FAILED, f"sudo apt-get install linux-headers-{RELEASE}")


def test_headers_of_another_kernel_will_do(host: Host) -> None:
    host.remove(f"lib/modules/{RELEASE}/build")
    assert host.found("headers") == (OK, None)
    assert host.check("headers").detail.endswith(f"linux-headers-{RELEASE}: those of another kernel, which will do")


def test_where_the_program_is_compiled_nothing_that_compiles_is_needed(host: Host) -> None:
    host.remove(f"lib/modules/{RELEASE}")
    host.remove("usr/src")
    host.remove("usr/lib/python3/dist-packages/bcc")
    assert {host.found(name)[0] for name in ("headers", "bcc")} == {FAILED}
    host.be(compiled=frozenset({"kprobe", "fentry"}), expected=lambda _: pytest.fail("asked, which takes time"))
    for name in ("headers", "bcc"):
        detail = "not needed: the BPF program is already compiled, for fentry and kprobe"
        assert host.check(name) == Check(name, OK, detail)
    assert obstacle(host.machine) is None


@pytest.mark.parametrize(
    ("compiled", "tried", "other"),
    [
        ("kprobe", ("kprobe",), "fentry"),
        ("kprobe", ("fentry", "kprobe"), "fentry"),
        ("fentry", ("fentry", "kprobe"), "kprobe"),
        ("fentry", ("fentry",), "kprobe"),
        ("fentry", (), "kprobe"),
    ],
)
def test_one_program_is_enough_if_a_trace_would_use_it(
    host: Host, compiled: str, tried: tuple[str, ...], other: str
) -> None:
    host.remove("usr/src")
    host.remove("usr/lib/python3/dist-packages/bcc")
    host.be(compiled=frozenset({compiled}), expected=lambda _: tried)
    for name in ("headers", "bcc"):
        detail = f"not needed: the BPF program is already compiled for {compiled} (not for {other})"
        assert host.check(name) == Check(name, OK, detail)
    assert obstacle(host.machine) is None


@pytest.mark.parametrize(("compiled", "tried"), [("kprobe", "fentry"), ("fentry", "kprobe")])
def test_a_program_that_a_trace_would_not_use_is_none(host: Host, compiled: str, tried: str) -> None:
    host.remove("usr/src")
    host.remove("usr/lib/python3/dist-packages/bcc")
    host.be(compiled=frozenset({compiled}), expected=lambda _: (tried,))
    why = f"the BPF program is compiled only for {compiled}, which is not used here"
    assert host.check("headers").detail.startswith(f"no kernel headers, which BCC needs to compile ({why}): ")
    assert host.check("bcc").detail == f"BCC is not installed ({why}; PyPI's bcc is an unrelated package)"
    assert {host.check(name).state for name in ("headers", "bcc")} == {FAILED}


def test_where_no_backend_can_be_expected_any_program_will_do(host: Host) -> None:
    def unknown(_: Machine) -> tuple[str, ...]:
        raise MsrtraceError("kvm is not loaded")

    host.remove("usr/src")
    host.be(compiled=frozenset({"fentry"}), expected=unknown)
    assert host.found("headers") == (OK, None)


def test_no_headers_in_a_container(host: Host) -> None:
    host.remove("usr/src")
    host.remove(f"lib/modules/{RELEASE}")
    host.write(".dockerenv")
    check = host.check("headers")
    assert (check.state, check.fix) == (FAILED, f"sudo apt-get install linux-headers-{RELEASE}")
    assert "-v /lib/modules:/lib/modules:ro -v /usr/src:/usr/src:ro" in check.detail


def test_headers_that_the_kernel_carries(host: Host) -> None:
    host.remove("usr/src")
    host.remove(f"lib/modules/{RELEASE}/build")
    host.write("sys/kernel/kheaders.tar.xz")
    assert host.found("headers") == (OK, None)
    host.remove("sys/kernel/kheaders.tar.xz")
    host.write(f"lib/modules/{RELEASE}/modules.dep", "kernel/kernel/kheaders.ko.zst:\n")
    assert host.found("headers") == (OK, None)


def test_headers_that_the_kernel_carries_do_not_complete_a_tree(host: Host) -> None:
    host.write("sys/kernel/kheaders.tar.xz")
    host.remove(f"usr/src/linux-headers-{RELEASE}/include/generated/autoconf.h")
    assert host.found("headers") == (FAILED, f"sudo apt-get install linux-headers-{RELEASE}")


def test_headers_elsewhere(host: Host) -> None:
    host.be(environ={"BCC_KERNEL_SOURCE": "/opt/linux"})
    check = host.check("headers")
    assert (check.state, check.fix) == (FAILED, "unset BCC_KERNEL_SOURCE")
    assert check.detail == "BCC_KERNEL_SOURCE is set, but there is no /opt/linux/include/linux/kconfig.h"
    host.write("opt/linux/include/generated/autoconf.h")
    assert host.found("headers") == (FAILED, "unset BCC_KERNEL_SOURCE")
    host.write("opt/linux/include/linux/kconfig.h")
    assert host.found("headers") == (OK, None)


@pytest.mark.parametrize(
    ("os_release", "fix"),
    [
        ("ID=debian", "sudo apt-get install python3-bpfcc"),
        ("ID=ubuntu\nID_LIKE=debian", "sudo apt-get install python3-bpfcc"),
        ("ID=fedora", "sudo dnf install python3-bcc"),
        ('ID="almalinux"\nID_LIKE="rhel centos fedora"', "sudo dnf install python3-bcc"),
        ("ID=arch", "sudo pacman -S python-bcc"),
        ('ID="sles"\nID_LIKE="suse"', "sudo zypper install python3-bcc"),
        ("ID=alpine", "sudo apk add py3-bcc"),
        ("ID=plan9", "install BCC's Python module with the system's package manager"),
    ],
)
def test_no_bcc(host: Host, os_release: str, fix: str) -> None:
    host.write("etc/os-release", os_release)
    host.remove("usr/lib/python3/dist-packages/bcc")
    detail = (
        "BCC is not installed (this msrtrace came without the compiled BPF program; PyPI's bcc is an unrelated package)"
    )
    assert host.check("bcc") == Check("bcc", FAILED, detail, fix)
    assert obstacle(host.machine) == f"{detail}: {fix}"


def test_bcc_of_pypi(host: Host) -> None:
    host.package("__author__ = 'Will Sheffler'\n__version__ = '0.1.10'\nfrom .bcc import *\n", site="venv/lib")
    python = "/srv/venv/bin/python3"
    host.be(python_path=(f"{host.root}/venv/lib", *host.machine.python_path), python=python)
    check = host.check("bcc")
    assert check.detail == f"{host.root}/venv/lib/bcc is not BCC but PyPI's unrelated package bcc (it has no BPF)"
    assert (check.state, check.fix) == (
        FAILED,
        f"{python} -m pip uninstall bcc && sudo apt-get install python3-bpfcc",
    )


@pytest.mark.parametrize(("file", "shown"), [("bcc/__init__.py", "bcc"), ("bcc.py", "bcc.py")])
def test_bcc_in_the_working_directory(host: Host, file: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host.write(f"work/{file}", "import sys\n")
    monkeypatch.chdir(host.root / "work")
    host.be(python_path=("", *host.machine.python_path))
    check = host.check("bcc")
    assert check.detail == f"{host.root}/work/{shown} in the working directory hides BCC"
    assert (check.state, check.fix) == (FAILED, "start msrtrace elsewhere: cd /")


@pytest.mark.parametrize(
    ("link", "site"),
    [
        ("python3.9", "usr/lib/python3.9/site-packages"),
        ("python3.9", "usr/lib/python3/dist-packages"),
        ("python3.9", ""),
    ],
)
def test_bcc_for_a_python_that_is_too_old(host: Host, link: str, site: str) -> None:
    host.remove("usr/lib/python3")
    if site:
        host.package("", site=site)
    (host.root / "usr/bin").mkdir()
    (host.root / "usr/bin/python3").symlink_to(link)
    host.be(python_path=("/nowhere",), python="/usr/bin/python3.11")
    check = host.check("bcc")
    assert check.detail == (
        "BCC's package is for Python 3.9, and msrtrace needs 3.10 (this msrtrace came without the compiled BPF program)"
    )
    assert (check.state, check.fix) == (
        FAILED,
        "install a wheel of msrtrace that has the compiled BPF program (make wheel): it needs BCC's library alone",
    )
    host.be(compiled=frozenset({"kprobe", "fentry"}))
    assert host.check("bcc").state is OK


@pytest.mark.parametrize("link", ["python3.10", "python3.13", "python3"])
def test_bcc_for_a_python_that_is_new_enough(host: Host, link: str) -> None:
    host.be(python_path=("/nowhere",))
    (host.root / "usr/bin").mkdir()
    (host.root / "usr/bin/python3").symlink_to(link)
    assert host.check("bcc").detail.startswith("BCC is installed for /usr/bin/python3, but ")


def test_directory_named_bcc_without_a_module_hides_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.write("work/bcc/README.md")
    monkeypatch.chdir(host.root / "work")
    host.be(python_path=("", *host.machine.python_path))
    assert host.found("bcc") == (OK, None)
    host.be(python_path=("",))
    assert host.check("bcc").state is FAILED


def test_virtual_environment_without_system_packages(host: Host) -> None:
    host.be(python_path=("/nowhere",), python="/srv/venv/bin/python3", venv="/srv/venv")
    check = host.check("bcc")
    assert check.detail == "BCC is installed for /usr/bin/python3, but /srv/venv/bin/python3 does not find it"
    assert (check.state, check.fix) == (
        FAILED,
        "/usr/bin/python3 -m venv --clear --system-site-packages /srv/venv, then install msrtrace there",
    )


def test_no_library(host: Host) -> None:
    host.write("etc/ld.so.cache", b"glibc-ld.so.cache1.1\0libc.so.6\0")
    check = host.check("library")
    assert check.detail == "BCC's library, which attaches probes, is missing (libbcc_bpf.so.0 and libbcc.so.0)"
    assert (check.state, check.fix) == (FAILED, "sudo apt-get install libbpfcc")
    host.be(environ={"LD_LIBRARY_PATH": "/opt/bcc/lib"})
    assert host.found("library") == (OK, None)


@pytest.mark.parametrize("place", ["usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/lib"])
def test_a_library_that_the_linker_does_not_list_yet(host: Host, place: str) -> None:
    """As dpkg has it that starts the service of a package and renews the list at its end."""
    host.write("etc/ld.so.cache", b"glibc-ld.so.cache1.1\0libc.so.6\0")
    host.write(f"{place}/libbcc_bpf.so.0", b"")
    assert host.found("library") == (OK, None)
