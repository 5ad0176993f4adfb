/* SPDX-License-Identifier: GPL-2.0-only */
/* Where exits are counted: found without a hash table, as calls are (counters.h). */

#define EXIT_WAYS 16

/* The first 11 bits tell kinds apart; all 15 tell processes apart. */
static __always_inline u32 first_place(u64 key, u64 vmm)
{
	return (key * 0x9e3779b97f4a7c15 >> 53) ^ (PID_OF(vmm) * PID_FACTOR >> 17);
}

/* Where exits of the kind KEY and of the process VMM are counted, maybe a new place; NOWHERE if its places are taken. */
static __always_inline u32 find_place(u64 key, u64 vmm)
{
	u32 first = first_place(key, vmm);
	struct exit *exit;

#pragma clang loop unroll(disable)
	for (u32 way = 0; way < EXIT_WAYS; way++) {
		u32 index = first ^ way;

		exit = exits.lookup(&index);
		if (exit && exit->key == key && exit->vmm == vmm)
			return index;
	}
#pragma clang loop unroll(disable)
	for (u32 way = 0; way < EXIT_WAYS; way++) {
		u32 index = first ^ way;

		exit = exits.lookup(&index);
		if (exit && !exit->key && take(EXITS, index)) {
			exit->vmm = vmm;
			barrier();
			exit->key = key;
			COUNT(places_taken);
			return index;
		}
	}
	return NOWHERE;
}

/* The same for what has no place: a guest chooses the MSRs that it accesses, and may choose many. */
static __always_inline u32 place_of_others(u64 key)
{
	u32 index = VALUE(places) ? VALUE(places) : EXITS_CAPACITY - OTHERS;
	struct exit *exit;

	index += (key & WRITE ? 1 : 0) | (key & FAST ? 2 : 0) | (key & NESTED ? 4 : 0) | (key >> 48 & 7) << 3;
	exit = exits.lookup(&index);

	if (exit && !exit->key) {
		exit->key = OTHER | (key & ~0xffffffffull);
		COUNT(places_taken);
	}
	return index;
}

static __always_inline void count_exit(u64 key, u64 vmm)
{
	u32 index = first_place(key, vmm);
	struct exit *exit = exits.lookup(&index);

	if (!exit || exit->key != key || exit->vmm != vmm) {
		index = find_place(key, vmm);
		if (index == NOWHERE)
			index = place_of_others(key);
		exit = exits.lookup(&index);
	}
	if (exit)
		__sync_fetch_and_add(&exit->count, 1);
	else
		COUNT(dropped_exits);
}
