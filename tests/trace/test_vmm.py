# SPDX-License-Identifier: GPL-2.0-or-later
"""What command lines of VMMs say."""

from __future__ import annotations

import pytest

from tracer.trace.vmm import given_name, given_uuid

UUID = "6f1d7d5e-0c1b-4b6e-9a58-2d0a6f4f0001"


@pytest.mark.parametrize(
    ("command_line", "name"),
    [
        # QEMU, as libvirt starts it and by hand
        (["qemu", "-name", "guest=web,debug-threads=on", "-S"], "web"),
        (["qemu", "-name", "web"], "web"),
        (["qemu", "--name", "web"], "web"),
        (["qemu", "-name", "web,process=db"], "web"),
        (["qemu", "-name", "debug-threads=on,guest=web"], "web"),
        (["qemu", "-name", "guest=web,guest=db"], "db"),
        (["qemu", "-name", "debug-threads=on", "-name", "web"], "web"),
        (["qemu", "-name", "web", "-name", "debug-threads=on"], "web"),
        (["qemu", "-name", "web", "-name", "db"], "db"),
        (["qemu", "-name", "guest=a,,b,debug-threads=on"], "a,b"),
        (["qemu", "-name", "a,,b"], "a,b"),
        (["qemu", "-name", "a,,b=c,debug-threads=on"], "a,b=c"),
        (["qemu", "-name", "a,,,guest=b"], "b"),
        (["qemu", "-name", "guest=a=b"], "a=b"),
        (["qemu", "-name", "guest=web 1"], "web 1"),
        (["/opt/renamed", "-name", "web"], "web"),
        (["qemu", "-name", "", "-id", "web"], None),
        (["qemu", "-name", "process=web"], None),
        (["qemu", "-name"], None),
        (["qemu", "-append", "-name web"], None),
        (["qemu", "-device", "virtio-net,id=web"], None),
        (["-name", "web"], None),
        # kvmtool
        (["lkvm", "run", "--name", "web", "-k", "bzImage"], "web"),
        (["lkvm", "run", "--name=web"], "web"),
        # Firecracker
        (["firecracker", "--id", "web", "--api-sock", "/run/api.sock"], "web"),
        (["firecracker", "--id=web"], "web"),
        (["firecracker", "--api-sock", "/run/fc/web.socket"], "web"),
        (["firecracker", "--api-sock", "/run/firecracker.socket"], None),
        # Cloud Hypervisor by hand, by libvirt (old, then new), by Kata (Go, then Rust)
        (["cloud-hypervisor", "--api-socket", "/run/ch/web.sock"], "web"),
        (["cloud-hypervisor", "--api-socket", "path=/run/ch/web.sock"], "web"),
        (["cloud-hypervisor", "--api-socket=path=/run/ch/web.v2.sock"], "web.v2"),
        (["cloud-hypervisor", "--api-socket", "/run/libvirt/ch/web-socket"], "web"),
        (
            [
                "cloud-hypervisor",
                "--api-socket",
                "fd=23",
                "--event-monitor",
                "path=/run/libvirt/ch/web-event-monitor-fifo",
            ],
            "web",
        ),
        (["cloud-hypervisor", "--api-socket", "/run/vc/vm/6fa1/clh-api.sock"], "6fa1"),
        (["cloud-hypervisor", "--api-socket", "/run/kata/6fa1/root/ch-api.sock"], "6fa1"),
        (["cloud-hypervisor", "--api-socket", "/tmp/cloud-hypervisor.sock"], None),
        (["cloud-hypervisor", "--api-socket", "fd=23"], None),
        (["cloud-hypervisor", "--kernel", "vmlinux"], None),
        # in a directory that is a user's, or the system's
        (["cloud-hypervisor", "--api-socket", "/run/user/1000/ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "path=/var/run/user/0/ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "/home/ada/cloud-hypervisor.sock"], None),
        (["cloud-hypervisor", "--api-socket", "/dev/shm/ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "/home/ada/.local/state/ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "/usr/local/var/ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "ch.sock"], None),
        (["cloud-hypervisor", "--api-socket", "/run/user/1000/web/ch.sock"], "web"),
        (["cloud-hypervisor", "--api-socket", "/run/user/1000/web.sock"], "web"),
        (["cloud-hypervisor", "--api-socket", "/srv/vms/1000/ch.sock"], "1000"),
        (["firecracker", "--api-sock", "/run/user/1000/firecracker.socket"], None),
        # Kata with the VMM in its shim
        (["containerd-shim-kata-v2", "-namespace", "k8s.io", "-address", "/run/c.sock", "-id", "6fa1"], "6fa1"),
        (["/opt/kata/bin/containerd-shim-kata-v2", "-id=6fa1", "-debug"], "6fa1"),
        (["containerd-shim-kata-v2", "-namespace", "k8s.io"], None),
        (["/usr/local/bin/containerd-shim-rund-v2", "-id", "6fa1"], "6fa1"),
        # gVisor
        (["/proc/self/exe", "--platform=kvm", "boot", "--apply-caps=true", "--bundle=/run/b", "--", "6fa1"], "6fa1"),
        (["runsc-sandbox", "--root=/run/r", "--platform=kvm", "boot", "--bundle=/run/b", "6fa1"], "6fa1"),
        (["runsc-sandbox", "boot", "--bundle", "/run/b", "--start-sync-fd=3", "6fa1"], "6fa1"),
        (["runsc-sandbox", "boot", "--bundle", "/run/b"], None),
        (["runsc-sandbox", "boot", "--bundle=/run/b"], None),
        (["runsc-sandbox", "boot"], None),
        (["lkvm", "run", "boot", "vmlinux"], None),
        # Multipass
        (["qemu-system-x86_64", "-drive", "file=/m/vault/instances/relay/x.img,if=none,format=qcow2"], "relay"),
        (["qemu-system-x86_64", "-cdrom", "/m/vault/instances/relay/cloud-init-config.iso"], "relay"),
        (["qemu-system-x86_64", "-drive", "file=/m/vault/instances/x.img"], None),
        # Android
        (["qemu-system-x86_64-headless", "-avd", "Pixel_6", "-no-window"], "Pixel_6"),
        (["/sdk/emulator/qemu/linux-x86_64/qemu-system-x86_64", "@Pixel_6"], "Pixel_6"),
        # crosvm: by hand, ChromeOS, Cuttlefish
        (["crosvm", "run", "-s", "/run/vm/crosvm-a.sock", "bzImage"], "crosvm-a"),
        (["crosvm", "run", "--socket=/run/vm/web.sock"], "web"),
        (["/usr/bin/crosvm", "run", "--socket", "/run/vm/vm.Xq3/crosvm.sock"], "vm.Xq3"),
        (["crosvm", "run", "--socket=/home/ada/cuttlefish/instances/cvd-1/internal/crosvm_control.sock"], "cvd-1"),
        (["crosvm", "run", "-s", "/run/crosvm.sock"], None),
        (["qemu-system-x86_64", "-s", "-S"], None),
        (["crosvm", "run", "--name", "web", "--socket", "/run/x.sock"], "web"),
        # podman machine, krunvm, Firecracker without an API
        (["qemu-system-x86_64", "-qmp", "unix:/run/user/1000/podman/qmp_web.sock,server=on,wait=off"], "web"),
        (["krunvm", "start", "web", "/bin/sh"], "web"),
        (["krunvm", "list"], None),
        (["krunvm", "start"], None),
        (["firecracker", "--no-api", "--config-file", "/srv/vms/web.json"], "web"),
        (["firecracker", "--no-api", "--config-file=/srv/web/vm_config.json"], "web"),
        (["firecracker", "--no-api", "--config-file", "vm_config.json"], None),
        # others who start QEMU
        (["/usr/bin/kvm", "-id", "100", "-name", "web,debug-threads=on", "-no-shutdown"], "web"),
        (
            ["/usr/bin/qemu-system-x86_64", "-drive", "file=/home/ada/.lima/web/diffdisk", "-name", "lima-web"],
            "lima-web",
        ),
        (["microvm@web", "-name", "web", "-M", "microvm"], "web"),
        # VirtualBox on KVM
        (["/usr/lib/virtualbox/VBoxHeadless", "--comment", "web", "--startvm", UUID], "web"),
    ],
)
def test_the_name_is_found(command_line: list[str], name: str | None) -> None:
    assert next(given_name(command_line), None) == name


@pytest.mark.parametrize(
    ("command_line", "uuid"),
    [
        # QEMU: by hand, libvirt, Proxmox; the last one is in force
        (["qemu-system-x86_64", "-uuid", UUID], UUID),
        (
            ["/usr/bin/qemu-system-x86_64", "-name", "guest=web,debug-threads=on", "-uuid", UUID, "-no-user-config"],
            UUID,
        ),
        (["/usr/bin/kvm", "-id", "100", "-name", "web", "-smbios", f"type=1,uuid={UUID}"], UUID),
        (["qemu-system-x86_64", "-smbios", f"type=1,manufacturer=A,,uuid=1,uuid={UUID},family=F"], UUID),
        (["qemu-system-x86_64", "-smbios", f'type=1,product=19" rack,uuid={UUID}'], UUID),
        (["qemu-system-x86_64", "-smbios", f"type=1,product=[x,uuid={UUID}"], UUID),
        (["qemu-system-x86_64", "-smbios", f"type=2,uuid={UUID}"], ""),
        (["qemu-system-x86_64", "-smbios", f"type=1,serial=a,,uuid={UUID}"], ""),
        (["qemu-system-x86_64", "-uuid", UUID, "-smbios", "type=1,manufacturer=OpenStack Foundation"], UUID),
        (["qemu-system-x86_64", "-uuid", UUID.replace("1", "2"), "-smbios", f"type=1,uuid={UUID}"], UUID),
        (["qemu-system-x86_64", "-smbios", f"type=1,uuid={UUID.replace('1', '2')}", "--uuid", UUID], UUID),
        (["qemu-system-x86_64", "-uuid", UUID.upper()], UUID),
        (["qemu-system-x86_64", "-uuid", "00000000-0000-0000-0000-000000000000"], ""),
        (["qemu-system-x86_64", "-uuid", "web"], ""),
        (["qemu-system-x86_64", "-uuid", UUID[:-1]], ""),
        (["qemu-system-x86_64", "-uuid", f"{UUID}\x1b[2J"], ""),
        (["qemu-system-x86_64", "-uuid", f"{UUID}\n"], ""),
        (["qemu-system-x86_64", "-uuid"], ""),
        (["qemu-system-x86_64", "-append", f"-uuid {UUID}"], ""),
        (["qemu-system-x86_64", "-device", f"vmgenid,guid={UUID}"], ""),
        (["qemu-system-x86_64", "-drive", f"file=/var/lib/nova/instances/{UUID}/disk"], ""),
        (["stratovirt", "-name", "web", "-uuid", UUID], UUID),
        # Cloud Hypervisor takes other forms of a UUID, too
        (["cloud-hypervisor", "--platform", f"uuid={UUID}"], UUID),
        (["cloud-hypervisor", f"--platform=num_pci_segments=2,oem_strings=[a,uuid=b],uuid={UUID},tdx=on"], UUID),
        (["cloud-hypervisor", "--platform", f'serial_number="a,uuid=b",uuid="{UUID}"'], UUID),
        (["cloud-hypervisor", "--platform", f"uuid={UUID.replace('-', '')}"], UUID),
        (["cloud-hypervisor", "--platform", f"uuid=urn:uuid:{UUID}"], UUID),
        (["cloud-hypervisor", "--platform", f"uuid={{{UUID}}}"], UUID),
        (["cloud-hypervisor", "--platform", f"uuid={{{UUID}"], ""),
        (["cloud-hypervisor", "--platform", f"oem_strings=[uuid={UUID}]"], ""),
        (["cloud-hypervisor", "--platform", f"oem_strings=[a,uuid={UUID}]"], ""),
        (["cloud-hypervisor", "--api-socket", f"/run/{UUID}.sock"], ""),
        (["crosvm", "run", "--smbios", f"uuid={UUID},serial-number=7", "bzImage"], UUID),
        # an id is no UUID, even if it looks like one
        (["firecracker", "--id", UUID, "--api-sock", "/run/api.sock"], ""),
        (["containerd-shim-kata-v2", "-namespace", "k8s.io", "-id", UUID], ""),
        (["runsc-sandbox", "--platform=kvm", "boot", "--bundle=/run/b", UUID], ""),
        (["VBoxHeadless", "--comment", "web", "--startvm", UUID, "--vrde", "config"], UUID),
        (["VBoxHeadless", "--startvm", "web"], ""),
        (["lkvm", "run", "--name", "web", "--startvm", UUID], ""),
    ],
)
def test_the_uuid_is_found(command_line: list[str], uuid: str) -> None:
    assert given_uuid(command_line) == uuid
