/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A slot for each vCPU, in the array `vcpus`. The functions that are probed run on a thread that has the vCPU to itself
 * (vcpu->mutex, or its creation), never nested and never from an interrupt: so there is nothing else to lock.
 */
#define VCPU_WAYS 32 /* so that 8,000 of 16,384 places are taken before a vCPU finds none: with 8 it was some of 4,000 */

/* For whoever includes this: what a new slot holds, and what else there is to do then. */
static __always_inline void reset_slot(struct vcpu *v);
static __always_inline void slot_taken(void);

static __always_inline u32 first_slot(u64 vcpu)
{
	return vcpu * 0x9e3779b97f4a7c15 >> 50 & (VCPUS_CAPACITY - 1);
}

static __always_inline bool wanted(void)
{
	return !VALUE(wanted_pid) || bpf_get_current_pid_tgid() >> 32 == VALUE(wanted_pid);
}

/* The slot of VCPU if it has one, and its INDEX. None has that of a process that is not wanted. */
static __always_inline struct vcpu *known_vcpu(u64 vcpu, u32 *index)
{
	u32 first = first_slot(vcpu);
	struct vcpu *v;

	*index = first;
	v = vcpus.lookup(index);
	if (v && v->vcpu == vcpu)
		return v;
	if (!wanted())
		return NULL;
#pragma clang loop unroll(disable)
	for (u32 way = 1; way < VCPU_WAYS; way++) {
		*index = first ^ way;
		v = vcpus.lookup(index);
		if (v && v->vcpu == vcpu)
			return v;
	}
	return NULL;
}

/* The slot of VCPU, and its INDEX; NULL if its places are taken, or its process is not wanted. */
static __always_inline struct vcpu *slot_of(u64 vcpu, u32 *index)
{
	u32 first = first_slot(vcpu);
	struct vcpu *v = known_vcpu(vcpu, index);

	if (v || !wanted())
		return v;
#pragma clang loop unroll(disable)
	for (u32 way = 0; way < VCPU_WAYS; way++) {
		*index = first ^ way;
		v = vcpus.lookup(index);
		if (v && !v->vcpu && take(VCPUS, *index)) {
			reset_slot(v);
			barrier();
			v->vcpu = vcpu;
			slot_taken();
			return v;
		}
	}
	COUNT(dropped_vcpus);
	return NULL;
}
