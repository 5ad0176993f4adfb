/* SPDX-License-Identifier: GPL-2.0-only */
/* vCPUs: which are seen, and the calls for them that are open. */

#include "slots.h"

/* The command of the process that makes a vCPU: not of its thread, whose name QEMU says to be `CPU 0/KVM`. */
static __always_inline void read_command(char *command, u32 size)
{
	u64 leader = 0;

	if (VALUE(leader_offset) &&
	    !read_kernel(&leader, sizeof(leader), bpf_get_current_task() + VALUE(leader_offset)) &&
	    !read_kernel(command, size, leader + VALUE(command_offset)))
		return;
	bpf_get_current_comm(command, size);
}

static __always_inline void slot_taken(void)
{
	u32 pid = bpf_get_current_pid_tgid() >> 32, first = pid * PID_FACTOR >> 20 & (VMMS_CAPACITY - 1), index;
	u64 id = vmm_of(pid);
	char command[16] = {};
	struct vmm *vmm;

	COUNT(vcpus_seen);
#pragma clang loop unroll(disable)
	for (u32 way = 0; way < VMM_WAYS; way++) {
		index = first ^ way;
		vmm = vmms.lookup(&index);
		if (vmm && vmm->id == id)
			return;
	}
	read_command(command, sizeof(command));
	/* A free place; or else that of any other, which has been there for long. */
	index = first ^ (bpf_ktime_get_ns() >> 10 & (VMM_WAYS - 1));
#pragma clang loop unroll(disable)
	for (u32 way = 0; way < VMM_WAYS; way++) {
		u32 place = first ^ way;

		vmm = vmms.lookup(&place);
		if (vmm && !vmm->id)
			index = place;
	}
	vmm = vmms.lookup(&index);
	if (vmm) {
		vmm->id = 0;
		barrier();
		__builtin_memcpy(vmm->command, command, sizeof(command));
		barrier();
		vmm->id = id;
	}
	COUNT(vmms_seen);
}

static __always_inline void reset_slot(struct vcpu *v)
{
	v->inside = INSIDE(NONE);
	v->filter = 0;
	v->started = 0;
	v->creating = 0;
	v->uncomputed = 0;
	v->pid = 0;
}

/* The thread that has the vCPU V. */
static __always_inline void note_thread(struct vcpu *v)
{
	u64 id = bpf_get_current_pid_tgid();

	v->tid = id;
	if (VALUE(by_pid) && v->pid != id >> 32) { /* or else these are 0, or are as they were */
		v->pid = id >> 32;
		v->vmm = vmm_of(v->pid);
		v->order = order_of(v->vmm);
	}
}

/*
 * Where nothing compares and exchanges: which of settle() and settle_call() counts the call SEQ of VCPU. The one that makes
 * the element does. settle() then moves v->seq, and removes it; if it was the other's, settle() removes it first. So who
 * finds v->seq moved and its own element removed knows that settle() left the count to it.
 */
static __always_inline u64 claim_of(u64 vcpu, u64 seq)
{
	return vcpu << 18 | seq & 0xffffff; /* a vCPU is in a cache line of its own, in the upper half of memory */
}

static __always_inline bool claim(u64 vcpu, u64 seq)
{
	u64 key = claim_of(vcpu, seq);
	u8 one = 1;

	return !taken.insert(&key, &one);
}

static __always_inline bool unclaim(u64 vcpu, u64 seq)
{
	u64 key = claim_of(vcpu, seq);

	return !taken.delete(&key);
}

/*
 * The call of V that is open has returned, and the bitmap is as it left it: count it.
 *
 * 5.11 and older refuse the instruction that compares and exchanges: tracer/program/relocation.py takes it out.
 */
static __always_inline void settle(struct vcpu *v)
{
	u64 seq = v->seq, found;
	u32 counter = v->counter;

	if (!VALUE(exact) || !(seq & 1))
		return;
	if (!VALUE(claims)) {
		found = __sync_val_compare_and_swap(&v->seq, seq, seq + 1); /* whoever makes it even counts */
	} else if (claim(v->vcpu, seq)) {
		v->seq = seq + 1;
		barrier();
		unclaim(v->vcpu, seq);
		found = seq;
	} else {
		unclaim(v->vcpu, seq);
		barrier();
		v->seq = found = seq + 1;
	}
	barrier_var(found); /* so that it is compared in one instruction */
	if (found == seq)
		count_call(&counter, v->flags, v->before, bits_at(v->address, v->msr, v->flags));
}

/* The vCPU V, whose slot has the INDEX, is no more. */
static __always_inline void end_of(struct vcpu *v, u32 index)
{
	settle(v);
	if (v->inside) /* whose return was not seen, or it would not be at its end */
		COUNT(unpaired_update);
	v->vcpu = 0;
	give_back(VCPUS, index);
}
