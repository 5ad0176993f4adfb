/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Arrays that readers have mapped into their memory, how their places are taken, and what is counted beside: struct counts
 * of whoever includes this, where PLACES are all the places that can be taken.
 *
 * A system call on a map would keep the kernel from running kprobe programs on that CPU until it is done, and it may be
 * preempted in the middle of it (bpf_disable_instrumentation(), include/linux/bpf.h; trace_call_bpf(),
 * kernel/trace/bpf_trace.c).
 */
#define MAPPED_ARRAY(name, type, capacity) BPF_F_TABLE("array", u32, type, name, capacity, BPF_F_MMAPABLE)

MAPPED_ARRAY(counts, struct counts, 1);

/* Which places are taken, by the number of their array: of two that want the same, one gets it. */
BPF_HASH(taken, u64, u8, PLACES);

#define COUNT(name) add_to_count(offsetof(struct counts, name) / sizeof(u64))

static __always_inline void add_to_count(u32 word)
{
	u32 zero = 0;
	u64 *words = (u64 *)counts.lookup(&zero);

	if (words)
		__sync_fetch_and_add(words + word, 1);
}

static __always_inline bool take(u32 table, u32 index)
{
	u64 place = (u64)table << 32 | index;
	u8 one = 1;

	return !taken.insert(&place, &one);
}

static __always_inline void give_back(u32 table, u32 index)
{
	u64 place = (u64)table << 32 | index;

	taken.delete(&place);
}

/* Nothing that is added to FROM meanwhile is lost. */
static __always_inline void move(u64 *to, u64 *from)
{
	u64 value = *(volatile u64 *)from;

	__sync_fetch_and_add(to, value);
	__sync_fetch_and_add(from, -value);
}

#define NOWHERE (~0u)
#define PID_FACTOR 0x9e3779b1

/*
 * The process that runs, whose pid is PID, as a number that no other process has: after it has ended, another may get its
 * pid. Above the pid (PID_MAX_LIMIT, include/linux/threads.h) is when it began, in ticks, as /proc/PID/stat has it
 * (nsec_to_clock_t(), kernel/time/time.c); 0 if that is not known. tracer/model/vmm_id.py takes it apart.
 */
#define PID_BITS 22
#define PID_OF(vmm) ((u32)(vmm) & ((1 << PID_BITS) - 1))
#define TICK_NS 10000000

static __always_inline u64 vmm_of(u32 pid)
{
	u64 leader = 0, began = 0;

	if (VALUE(start_offset)) {
		read_kernel(&leader, sizeof(leader), bpf_get_current_task() + VALUE(leader_offset));
		if (read_kernel(&began, sizeof(began), leader + VALUE(start_offset)))
			began = 0;
	}
	return began / TICK_NS << PID_BITS | pid;
}
