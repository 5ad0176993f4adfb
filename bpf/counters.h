/* SPDX-License-Identifier: GPL-2.0-only */
/* Where calls are counted. */

/* The factor gives the calls that KVM makes inside updates a counter each (test_counters_of_updates). */
#define COUNTER_FACTOR 0xb1e9f5de3507f77f
#define COUNTER_SHIFT 54 /* what is left is less than OUTSIDE */
#define OUTSIDE 0x400 /* of a place: for calls outside updates, which are in nobody's way there */

/* Each process has the same counters in another order; 16 bits, as many as COUNTERS_CAPACITY takes. */
static __always_inline u32 order_of(u64 vmm)
{
	return PID_OF(vmm) * PID_FACTOR >> 16 & ~OUTSIDE;
}

static __always_inline u32 first_counter(u64 key, u32 order)
{
	return (key * COUNTER_FACTOR >> COUNTER_SHIFT) ^ order;
}

/*
 * Where such calls are counted, which may be a new counter; NOWHERE if its places are taken. It is the first place that
 * is free or has such calls: there may be another further on, made when a place here was taken. A reader adds them up.
 */
static __always_inline u32 find_counter(u64 key, u64 site, u64 caller, u64 vmm)
{
	u32 first = first_counter(key + site, order_of(vmm)) | (site ? OUTSIDE : 0);
	struct counter *counter;

#pragma clang loop unroll(disable)
	for (u32 way = 0; way < 2 * COUNTER_WAYS; way++) {
		u32 index = first ^ (way & (COUNTER_WAYS - 1)) ^ (way & COUNTER_WAYS ? OUTSIDE : 0);

		counter = counters.lookup(&index);
		if (!counter)
			continue;
		if (counter->key == key && counter->vmm == vmm && counter->site == site)
			return index;
		if (!counter->key && take(COUNTERS, index)) {
			counter->caller = caller;
			counter->site = site;
			counter->vmm = vmm;
			barrier();
			counter->key = key;
			COUNT(places_taken);
			return index;
		}
	}
	return NOWHERE;
}

/* BEFORE and AFTER are of bits_at(). */
static __always_inline void count_call(u32 *index, u32 flags, u64 before, u64 after)
{
	struct counter *counter = counters.lookup(index);
	u64 changed = before ^ after;
	struct outcome *outcome;

	if (!counter) {
		COUNT(dropped_calls);
		return;
	}
	outcome = &counter->outcome;
	if ((before | after) & FAILED) {
		if (VALUE(exact))
			COUNT(read_failed);
		__sync_fetch_and_add(&outcome->unknown, 1);
		return;
	}
	if (!changed) {
		__sync_fetch_and_add(&outcome->redundant, 1);
	} else {
		__sync_fetch_and_add(&outcome->changed, 1);
		if (changed & READ_BITS)
			__sync_fetch_and_add(&outcome->changed_read, 1);
		if (changed & WRITE_BITS)
			__sync_fetch_and_add(&outcome->changed_write, 1);
	}
	if (!after)
		return;
	barrier(); /* so that this is asked first: most bits are clear */
	if (after & READ_BITS && !(flags & ENABLES(MSR_TYPE_R)) || after & WRITE_BITS && !(flags & ENABLES(MSR_TYPE_W)))
		__sync_fetch_and_add(&outcome->refused, 1);
}
