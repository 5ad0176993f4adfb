// SPDX-License-Identifier: GPL-2.0-or-later
/* What was asked for (accesses.c), and the VMs that do it (vm.c). */
#ifndef ACCESSES_H
#define ACCESSES_H

#include "../program.h"
#include "guest.h"

#define MAX_MSRS KVM_MSR_FILTER_MAX_RANGES

struct vcpu {
	int fd;
	struct kvm_run *run;
	struct guest *guest;
	uint64_t base; /* where guest is for the guest */
	unsigned long vm, index;
	struct { unsigned long filter, unknown, invalid; } user[MAX_OPS];
};

struct vm {
	int fd;
	struct vcpu *vcpus;
};

struct wanted {
	struct op op;
	bool own_value; /* of the vCPU, as KVM_GET_MSRS gives it */
};

struct msr_list {
	struct { uint32_t msr, flags; } msrs[MAX_MSRS]; /* KVM_MSR_FILTER_... */
	unsigned int n;
};

extern struct options {
	unsigned long vms, vcpus, rounds, interval_ms;
	int threads, forever, irqchip, user_error, stay_in_l2, no_msr_bitmap; /* flags, for getopt_long() */
	double hold;
	const char *ready, *go, *done;
	uint64_t to_user; /* KVM_MSR_EXIT_REASON_... */
	struct msr_list deny, deny_in_l2, reflect;
	struct wanted ops[MAX_OPS];
	unsigned int n_ops;
	bool nested; /* there is an L2 */
} opt;

#define for_each_vcpu(vcpu, vms)                     \
	for (unsigned long v_ = 0; v_ < opt.vms; v_++) \
		for (struct vcpu *vcpu = (vms)[v_].vcpus; vcpu < (vms)[v_].vcpus + opt.vcpus; vcpu++)

#define bad_exit(vcpu, format, ...) \
	fail(EXIT_BAD_EXIT, "vm %lu vcpu %lu: " format, (vcpu)->vm, (vcpu)->index, ##__VA_ARGS__)

/* Opens KVM. Fails where the CPU lacks what was asked for. */
void open_kvm(void);
/* A VM with its vCPUs, and their guests, which have not run. */
void create_vm(struct vm *vm, unsigned long index);
/* The filter that opt.deny says. */
void set_filter(const struct vm *vm);
/* KVM_RUN until the guest has executed its list, or, if it is to stay there, is in L2. */
void run_vcpu(struct vcpu *vcpu);
/* What KVM says of it. */
bool is_in_l2(const struct vcpu *vcpu);
#endif
