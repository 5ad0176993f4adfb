// SPDX-License-Identifier: GPL-2.0-or-later
/* VMs whose vCPUs are in 64-bit mode, at the start of guest.S. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "accesses.h"

#define APIC_BASE_X2APIC (1ULL << 10)
#define LEAF_1_ECX_VMX (1u << 5)
#define LEAF_1_ECX_TSC_DEADLINE (1u << 24)
#define LEAF_80000001_ECX_SVM (1u << 2)
#define MSR_FEATURE_CONTROL 0x3a
#define FEATURE_CONTROL_VMXON 5 /* locked; VMXON is allowed */
#define MSR_VMX_BASIC 0x480
#define VMX_CAPABILITIES 17 /* to 0x490, VMX_TRUE_ENTRY_CTLS */
#define MSR_VM_HSAVE_PA 0xc0010117

static int kvm_fd, run_size;
static bool svm; /* of which vendor L2 is */

void open_kvm(void)
{
	struct kvm_cpuid_entry2 *basic, *extended;

	kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm_fd < 0)
		fail(EXIT_SYSTEM, "/dev/kvm: %s", strerror(errno));
	run_size = KVM(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	basic = cpuid_leaf(supported_cpuid(kvm_fd), 1);
	extended = cpuid_leaf(supported_cpuid(kvm_fd), 0x80000001);
	svm = extended && extended->ecx & LEAF_80000001_ECX_SVM;
	if (opt.nested && !svm && !(basic && basic->ecx & LEAF_1_ECX_VMX))
		fail(EXIT_CPU_LACKS, "L2 cannot be had: KVM is loaded with nested=0, or has no CPU for it");
	if (opt.irqchip && basic) /* KVM has it, but leaves it to user space to say so */
		basic->ecx |= LEAF_1_ECX_TSC_DEADLINE;
}

/* By the request KVM_GET_MSRS or KVM_SET_MSRS. Returns whether KVM knows the MSR, and takes the value. */
static bool host_msr(const struct vcpu *vcpu, unsigned long request, uint32_t msr, uint64_t *value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} one = { .head = { .nmsrs = 1 }, .entry = { .index = msr, .data = *value } };
	int r = ioctl(vcpu->fd, request, &one);

	if (r < 0)
		fail(EXIT_SYSTEM, "KVM_%s_MSRS of %#x: %s", request == KVM_GET_MSRS ? "GET" : "SET", msr,
		     strerror(errno));
	*value = r == 1 ? one.entry.data : 0;
	return r == 1;
}

static void must_set_msr(const struct vcpu *vcpu, uint32_t msr, uint64_t value)
{
	if (!host_msr(vcpu, KVM_SET_MSRS, msr, &value))
		fail(EXIT_CPU_LACKS, "KVM_SET_MSRS refused MSR %#x, which L2 needs", msr);
}

static struct kvm_segment segment(uint16_t selector, uint8_t type, uint64_t base, uint32_t limit)
{
	bool code = selector == CODE_SELECTOR, tss = selector == TSS_SELECTOR;

	return (struct kvm_segment){ .selector = selector, .type = type, .base = base, .limit = limit, .present = 1,
				     .s = !tss, .l = code, .db = !code && !tss, .g = !tss };
}

static void set_registers(struct vcpu *vcpu)
{
	const struct guest *guest = vcpu->guest;
	const struct kvm_segment data = segment(DATA_SELECTOR, 3, 0, ~0u);
	struct kvm_regs regs = {
		.rip = vcpu->base,
		.rsp = ADDRESS(vcpu->base, stacks[1]),
		.r15 = ADDRESS(vcpu->base, control),
		.rflags = 2,
	};
	struct kvm_sregs sregs;

	KVM(vcpu->fd, KVM_GET_SREGS, &sregs);
	sregs.cs = segment(CODE_SELECTOR, 0xb, 0, ~0u);
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.tr = segment(TSS_SELECTOR, 0xb, ADDRESS(vcpu->base, tables.tss), sizeof(guest->tables.tss) - 1);
	sregs.gdt.base = ADDRESS(vcpu->base, tables.gdt);
	sregs.gdt.limit = sizeof(guest->tables.gdt) - 1;
	sregs.idt.base = ADDRESS(vcpu->base, tables.idt);
	sregs.idt.limit = sizeof(guest->tables.idt) - 1;
	sregs.cr0 = CR0;
	sregs.cr3 = ADDRESS(vcpu->base, level4);
	sregs.cr4 = CR4 | (opt.nested && !svm ? CR4_VMXE : 0);
	sregs.efer = EFER | (opt.nested && svm ? EFER_SVME : 0);
	if (opt.irqchip)
		sregs.apic_base |= APIC_BASE_X2APIC;
	KVM(vcpu->fd, KVM_SET_SREGS, &sregs);
	KVM(vcpu->fd, KVM_SET_REGS, &regs);
}

static void fill_tables(struct guest *guest, uint64_t base)
{
	uint64_t tss = ADDRESS(base, tables.tss), gp = LABEL(base, guest_gp);

	memcpy(guest->code, guest_code, guest_code_end - guest_code);
	guest->level4[0] = ADDRESS(base, level3) | 3; /* present, writable */
	guest->level3[0] = ADDRESS(base, level2) | 3;
	for (uint64_t i = 0; i < 512; i++)
		guest->level2[i] = i << 21 | 0x83; /* a page of 2 MiB */
	guest->tables.gdt[CODE_SELECTOR / 8] = 0x00af9b000000ffff;
	guest->tables.gdt[DATA_SELECTOR / 8] = 0x00cf93000000ffff;
	guest->tables.gdt[TSS_SELECTOR / 8] = (sizeof(guest->tables.tss) - 1) | (tss & 0xffffff) << 16 |
					      0x8bULL << 40 | (tss >> 24 & 0xff) << 56;
	guest->tables.gdt[TSS_SELECTOR / 8 + 1] = tss >> 32;
	/* An interrupt gate for #GP. Anything else is a triple fault, which ends KVM_RUN. */
	guest->tables.idt[13][0] = (gp & 0xffff) | CODE_SELECTOR << 16 | 0x8eULL << 40 | (gp >> 16 & 0xffff) << 48;
	guest->tables.idt[13][1] = gp >> 32;
}

static void prepare_l2(struct vcpu *vcpu)
{
	uint64_t capabilities[VMX_CAPABILITIES] = { 0 };

	if (svm) {
		must_set_msr(vcpu, MSR_VM_HSAVE_PA, ADDRESS(vcpu->base, host));
		prepare_vmcb(vcpu->guest, vcpu->base, !opt.no_msr_bitmap);
	} else {
		must_set_msr(vcpu, MSR_FEATURE_CONTROL, FEATURE_CONTROL_VMXON);
		for (unsigned int i = 0; i < VMX_CAPABILITIES; i++)
			host_msr(vcpu, KVM_GET_MSRS, MSR_VMX_BASIC + i, &capabilities[i]);
		prepare_vmcs(vcpu->guest, vcpu->base, capabilities, !opt.no_msr_bitmap);
	}
	for (unsigned int i = 0; i < opt.reflect.n; i++)
		if (!(svm ? reflect_svm : reflect_vmx)(vcpu->guest, opt.reflect.msrs[i].msr))
			fail(EXIT_USAGE, "--reflect: MSR %#x has no bit, so L1 gets its exits anyway (see --help)",
			     opt.reflect.msrs[i].msr);
}

static void create_vcpu(const struct vm *vm, struct vcpu *vcpu)
{
	struct kvm_mp_state runnable = { .mp_state = KVM_MP_STATE_RUNNABLE };
	struct control *control = &vcpu->guest->control;

	vcpu->fd = KVM(vm->fd, KVM_CREATE_VCPU, vcpu->index);
	vcpu->run = map(run_size, 0, vcpu->fd);
	KVM(vcpu->fd, KVM_SET_CPUID2, supported_cpuid(kvm_fd));
	fill_tables(vcpu->guest, vcpu->base);
	set_registers(vcpu);
	if (opt.nested)
		prepare_l2(vcpu);
	if (opt.irqchip) /* with it all but vCPU 0 would wait for INIT and SIPI */
		KVM(vcpu->fd, KVM_SET_MP_STATE, &runnable);
	control->n_ops = opt.n_ops;
	for (unsigned int i = 0; i < opt.n_ops; i++) {
		control->ops[i] = opt.ops[i].op;
		if (opt.ops[i].own_value)
			host_msr(vcpu, KVM_GET_MSRS, control->ops[i].msr, &control->ops[i].value);
	}
}

void set_filter(const struct vm *vm)
{
	static uint64_t none; /* the kernel copies whole longs, even for one MSR */
	struct kvm_msr_filter filter = { .flags = KVM_MSR_FILTER_DEFAULT_ALLOW };

	for (unsigned int i = 0; i < opt.deny.n; i++)
		filter.ranges[i] = (struct kvm_msr_filter_range){
			.flags = opt.deny.msrs[i].flags,
			.nmsrs = 1,
			.base = opt.deny.msrs[i].msr,
			.bitmap = (uint8_t *)&none,
		};
	KVM(vm->fd, KVM_X86_SET_MSR_FILTER, &filter);
}

void create_vm(struct vm *vm, unsigned long index)
{
	struct kvm_userspace_memory_region region = { .memory_size = opt.vcpus * sizeof(struct guest) };
	struct kvm_enable_cap to_user = { .cap = KVM_CAP_X86_USER_SPACE_MSR, .args = { opt.to_user } };
	struct guest *guests = map(region.memory_size, MAP_ANONYMOUS, -1);

	vm->fd = KVM(kvm_fd, KVM_CREATE_VM, 0);
	KVM(vm->fd, KVM_SET_TSS_ADDR, 0xfffbd000); /* VMX without unrestricted guest; else ignored */
	if (opt.irqchip)
		KVM(vm->fd, KVM_CREATE_IRQCHIP, 0);
	if (opt.to_user)
		KVM(vm->fd, KVM_ENABLE_CAP, &to_user);
	if (opt.deny.n)
		set_filter(vm);
	region.userspace_addr = (uintptr_t)guests;
	KVM(vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
	vm->vcpus = map(opt.vcpus * sizeof(*vm->vcpus), MAP_ANONYMOUS, -1);
	for (unsigned long c = 0; c < opt.vcpus; c++) {
		vm->vcpus[c].vm = index;
		vm->vcpus[c].index = c;
		vm->vcpus[c].guest = &guests[c];
		vm->vcpus[c].base = c * sizeof(struct guest);
		create_vcpu(vm, &vm->vcpus[c]);
	}
}

/* Counts and completes an access that KVM left to its user space. */
static void complete(struct vcpu *vcpu)
{
	const struct control *control = &vcpu->guest->control;
	struct kvm_run *run = vcpu->run;
	unsigned long nth = (control->current - ADDRESS(vcpu->base, control.ops)) / sizeof(struct op);
	bool write = run->exit_reason == KVM_EXIT_X86_WRMSR;

	if (nth >= opt.n_ops || control->ops[nth].msr != run->msr.index || control->ops[nth].write != write)
		bad_exit(vcpu, "%s of MSR %#x came to user space, which is not the operation being executed",
			 write ? "WRMSR" : "RDMSR", run->msr.index);
	switch (run->msr.reason) {
	case KVM_MSR_EXIT_REASON_FILTER: vcpu->user[nth].filter++; break;
	case KVM_MSR_EXIT_REASON_UNKNOWN: vcpu->user[nth].unknown++; break;
	case KVM_MSR_EXIT_REASON_INVAL: vcpu->user[nth].invalid++; break;
	default:
		bad_exit(vcpu, "MSR %#x came to user space for reason %u", run->msr.index, run->msr.reason);
	}
	run->msr.error = opt.user_error;
	if (!write)
		run->msr.data = 0;
}

void run_vcpu(struct vcpu *vcpu)
{
	const uint16_t port = vcpu->guest->control.stay ? PORT_IN_L2 : PORT_DONE;
	struct kvm_run *run = vcpu->run;

	for (;;) {
		if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
			if (errno == EINTR)
				continue;
			fail(EXIT_SYSTEM, "KVM_RUN: %s", strerror(errno));
		}
		switch (run->exit_reason) {
		case KVM_EXIT_X86_RDMSR:
		case KVM_EXIT_X86_WRMSR:
			complete(vcpu);
			continue;
		case KVM_EXIT_IO:
			if (run->io.port == port)
				return;
			if (run->io.port == PORT_UNEXPECTED)
				bad_exit(vcpu, "the guest did not expect %#x (see guest.h)",
					 *(uint32_t *)((uint8_t *)run + run->io.data_offset));
			bad_exit(vcpu, "`out` to port %#x, not %#x", run->io.port, port);
		case KVM_EXIT_FAIL_ENTRY:
			bad_exit(vcpu, "exit reason 9 (FAIL_ENTRY), hardware_entry_failure_reason %#llx",
				 (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
		case KVM_EXIT_INTERNAL_ERROR:
			bad_exit(vcpu, "exit reason 17 (INTERNAL_ERROR), suberror %u", run->internal.suberror);
		default:
			bad_exit(vcpu, "exit reason %u, not 2 (IO)", run->exit_reason);
		}
	}
}

bool is_in_l2(const struct vcpu *vcpu)
{
	static struct {
		struct kvm_nested_state state; /* the head */
		uint8_t data[4 * PAGE]; /* more than any vendor's */
	} nested_state;

	nested_state.state.size = sizeof(nested_state);
	KVM(vcpu->fd, KVM_GET_NESTED_STATE, &nested_state);
	return nested_state.state.flags & KVM_STATE_NESTED_GUEST_MODE;
}
