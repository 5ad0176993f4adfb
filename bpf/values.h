/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between kernels and between starts of msrtrace.c.
 */

/* Nothing is stored as this: the name of a member is the name of a value, and its place is the value's number. */
struct values {
	u64 exact; /* the outcomes of calls are known */
	u64 bitmap_offset; /* struct vcpu_vmx -> vmcs01.msr_bitmap, struct vcpu_svm -> msrpm; 0: it is not known */
	u64 msrpm; /* the bitmap is SVM's */
	u64 claims; /* of settle(): the kernel has no instruction that compares and exchanges (5.12) */
	u64 exits_offset; /* struct kvm_vcpu -> stat.exits; 0: it is not known */
	u64 filter_offset; /* struct kvm_vcpu -> kvm; if update_kind is 0 */
	u64 leader_offset; /* struct task_struct -> group_leader and comm; 0: they are not known */
	u64 command_offset;
	u64 start_offset; /* struct task_struct -> start_boottime; 0: it is not known */
	u64 update_kind; /* of enum within: what every update is for; 0: the generation of the filter tells (6.17) */
	u64 cast_type; /* struct timespec64 in the kernel's BTF; 0: there is no bpf_rdonly_cast() (6.2) */
	u64 by_pid; /* count per process, for per-VM metrics */
	u64 wanted_pid; /* trace the threads of this process alone; 0: of all */
	u64 kretprobe_trampoline; /* what another tracer may have put in a return address' place */
	u64 fgraph_trampoline;
	u64 enable_at; /* the functions that are called; for FENTRY */
	u64 disable_at;
	u64 set_at;
	u64 pass_at;
};
