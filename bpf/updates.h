/* SPDX-License-Identifier: GPL-2.0-only */
/* Updates of a vCPU's bitmap: what each is for, who is in one, and where they are counted. */

/* The generation of each VM's MSR filter: a number that no other filter ever had; 0 before the first. */
BPF_TABLE("lru_hash", u64, u64, filters, VCPUS_CAPACITY);

/* The ioctl that a thread is in, to set a filter. */
struct attempt {
	u64 kvm;
	u64 previous;
};
BPF_HASH(attempts, u32, struct attempt, 1024);

static __always_inline u64 filter_of(u64 vcpu)
{
	u64 kvm = 0, *filter;

	if (read_kernel(&kvm, sizeof(kvm), vcpu + VALUE(filter_offset)))
		COUNT(read_failed);
	filter = filters.lookup(&kvm);
	return filter ? *filter : 0;
}

/* What the update of VCPU, whose slot is V, is for; of enum within. */
static __always_inline u64 kind_of_update(struct vcpu *v, u64 vcpu)
{
	u64 filter, kind;

	if (VALUE(update_kind))
		return VALUE(update_kind);
	filter = filter_of(vcpu);
	kind = filter == v->filter ? RECALC : FILTER_CHANGE;
	v->filter = filter;
	/* Since 6.18 the creation leaves it to the vCPU's first KVM_RUN. A new filter may come with it. */
	if (kind == RECALC && (v->creating || v->uncomputed))
		kind = CREATION;
	v->uncomputed = 0;
	return kind;
}

#ifndef FENTRY
/*
 * The slot of the vCPU that a thread updates: a return probe has no arguments. In an array, which takes a tenth of a hash
 * table's time; there is room for one of the threads that want the same place.
 */
#define THREADS_HERE 4096
struct thread {
	u64 claims; /* one: of the thread that is here; more: of others, which are about to go elsewhere */
	u64 here; /* its id, and the slot */
};
BPF_ARRAY(threads_here, struct thread, THREADS_HERE);
BPF_TABLE("lru_hash", u32, u32, threads, VCPUS_CAPACITY); /* the others; what they leave there is pushed out */

static __always_inline void thread_updates(u32 tid, u32 index)
{
	u32 place = tid & (THREADS_HERE - 1);
	struct thread *thread = threads_here.lookup(&place);

	if (!thread)
		return;
	if (thread->here >> 32 != tid) { /* or else its last return was not seen */
		__sync_fetch_and_add(&thread->claims, 1);
		if (*(volatile u64 *)&thread->claims != 1) {
			__sync_fetch_and_add(&thread->claims, -1);
			threads.update(&tid, &index);
			return;
		}
	}
	thread->here = (u64)tid << 32 | index;
}

static __always_inline struct vcpu *updated_by(u32 tid)
{
	u32 place = tid & (THREADS_HERE - 1), index, *slot;
	struct thread *thread = threads_here.lookup(&place);

	if (thread && thread->here >> 32 == tid) {
		index = thread->here;
		thread->here = 0;
		barrier();
		__sync_fetch_and_add(&thread->claims, -1);
		return vcpus.lookup(&index);
	}
	slot = threads.lookup(&tid);
	return slot ? vcpus.lookup(slot) : NULL;
}
#endif

/* Where updates of a process and a KIND are counted, which may be a new place; NOWHERE if its places are taken. */
static __always_inline u32 find_update(u64 vmm, u32 kind)
{
	u32 first = (PID_OF(vmm) * PID_FACTOR >> 20 & (UPDATES_CAPACITY - 1)) ^ kind;
	struct update *update;

#pragma clang loop unroll(disable)
	for (u32 way = 0; way < UPDATE_WAYS; way++) {
		u32 index = first ^ way;

		update = updates.lookup(&index);
		if (update && update->kind == kind && update->vmm == vmm)
			return index;
	}
#pragma clang loop unroll(disable)
	for (u32 way = 0; way < UPDATE_WAYS; way++) {
		u32 index = first ^ way;

		update = updates.lookup(&index);
		if (update && update->kind == NONE && take(UPDATES, index)) {
			update->vmm = vmm;
			barrier();
			update->kind = kind;
			COUNT(places_taken);
			return index;
		}
	}
	return NOWHERE;
}
