# SPDX-License-Identifier: GPL-2.0-or-later
"""How each hypervisor is made to give its VMs hardware virtualisation."""

from __future__ import annotations

from tracer.doctor.containers import in_wsl
from tracer.kernel.machine import Machine
from tracer.model.vendor import Vendor

_WSL = (
    "on Windows, put nestedVirtualization=true below [wsl2] in %UserProfile%\\.wslconfig, then wsl --shutdown "
    "(Windows 11 or newer)"
)
_HYPER_V = "on its Hyper-V host, with the VM off: Set-VMProcessor -VMName NAME -ExposeVirtualizationExtensions $true"
#: The asset tag of Azure's VMs, by which cloud-init knows them, too.
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"
_AZURE = "take a size of VM that supports nested virtualization"
#: By the beginning of sys_vendor or product_name in DMI.
_BY_DMI = {
    "VMware": 'with the VM off, expose hardware-assisted virtualization to the guest (vhv.enable = "TRUE" in its .vmx)',
    "innotek": "on its host, with the VM off: VBoxManage modifyvm NAME --nested-hw-virt on",
    "VirtualBox": "on its host, with the VM off: VBoxManage modifyvm NAME --nested-hw-virt on",
    "Xen": "give the VM nestedhvm=1 in its configuration",
    "Parallels": "on its host, with the VM off: prlctl set NAME --nested-virt on",
    "BHYVE": "run msrtrace on another host: bhyve has no nested virtualization",
    "Google": "enable nested virtualization for the VM (enableNestedVirtualization)",
    "Amazon EC2": "take an instance type that is bare metal (*.metal), or one that supports nested virtualization",
}


def enable_nested(machine: Machine, vendor: Vendor) -> str:
    """What to do where a VM has no hardware virtualisation of the vendor's."""
    if in_wsl(machine):
        return _WSL
    maker, product, tag = (
        machine.text(f"/sys/class/dmi/id/{name}", "") for name in ("sys_vendor", "product_name", "chassis_asset_tag")
    )
    if tag == _AZURE_TAG:
        return _AZURE
    if (maker.startswith("Microsoft") and product == "Virtual Machine") or machine.at("/sys/bus/vmbus").exists():
        return _HYPER_V
    for name, fix in _BY_DMI.items():
        if maker.startswith(name) or product.startswith(name):
            return fix
    given = f"give the VM a CPU with {vendor.cpu_flag} (QEMU: -cpu host, or +{vendor.cpu_flag})"
    return f"on its host, load {vendor.module} with nested=1 (the default), and {given}"
