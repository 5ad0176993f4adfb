// SPDX-License-Identifier: GPL-2.0-only
/*
 * Counts the calls that change a vCPU's MSR bitmap, and what each of them changed.
 *
 * Compiled by BCC and configured by -D, which says all that there is to say of a kernel, but for enum value:
 *
 *   FENTRY         the programs run at fentry and fexit, else at kprobes.
 *   BITMAP_OFFSET  struct vcpu_vmx -> vmcs01.msr_bitmap, from the running module's BTF. Not defined: calls are
 *                  counted, their outcome is not known.
 *   EXITS_OFFSET   struct kvm_vcpu -> stat.exits, likewise.
 *   CAST_TYPE      struct timespec64 in the kernel's BTF. Defined where bpf_rdonly_cast() can be called (6.2 and newer).
 *   FILTER_OFFSET  struct kvm_vcpu -> kvm. Defined where the update function also runs for other reasons than a
 *                  new MSR filter (6.17 and newer), to tell those apart; else UPDATE_KIND says what it runs for.
 *   SETS           one function enables and disables, and has a fourth argument that says which.
 *   ONE_PID        trace the threads of one process alone.
 *   BY_PID         count per process, for per-VM metrics.
 *
 * What a reader wants is in arrays that it has mapped into its memory. A system call on a map would keep the kernel
 * from running kprobe programs on that CPU until it is done, and it may be preempted in the middle of it
 * (bpf_disable_instrumentation(), include/linux/bpf.h; trace_call_bpf(), kernel/trace/bpf_trace.c).
 *
 * The functions are those of arch/x86/kvm/vmx/vmx.c: vmx_{enable,disable,set}_intercept_for_msr() run on a thread
 * that has the vCPU to itself (vcpu->mutex, or its creation), never nested and never from an interrupt. So there is a
 * slot for each vCPU and nothing else to lock.
 *
 * A call is seen at its entry alone: a probe on the return costs more than all the rest. Its outcome stays open until
 * the next thing that happens to the vCPU, and is then read from the bitmap, which nobody has written in the meantime:
 * all that write it are seen here (vmx_update_msr_bitmap_x2apic() does without a call). What stays open when nothing
 * more happens is settled by settle_call(), at the request of the reader.
 */
#include <uapi/linux/ptrace.h>

#define MSR_TYPE_R 1
#define MSR_TYPE_W 2

/* Sizes and numbers that tracer/trace/reader.py knows too. Capacities are powers of two. */
#ifdef BY_PID
#define COUNTERS_CAPACITY 32768 /* one half for calls inside updates, one for the others */
#define UPDATES_CAPACITY 4096
#else
#define COUNTERS_CAPACITY 2048
#define UPDATES_CAPACITY 16
#endif
#define VCPUS_CAPACITY 16384
#define VMMS_CAPACITY 4096
#define THREADS_HERE 4096
#define BUCKETS 32 /* a power of two, so that masking bounds an index for every verifier */

/* In how many places of its array something may be. */
#define COUNTER_WAYS 16
#define UPDATE_WAYS 16
#define VCPU_WAYS 8
#define VMM_WAYS 4
#define NOWHERE (~0u)
#define UNREADABLE 0xdead000000000000 /* no address */
#define READ_BITS 0x00ff
#define WRITE_BITS 0xff00
#define FAILED 0x10000

/* What the vCPU is inside of; the kinds of an update. */
enum within { NONE, FILTER_CHANGE, RECALC };

/* What settle_call() says. */
enum settled { SETTLED, OPEN };

/*
 * A call adds to one of the first three, of which the sum is the number of calls. A reader copies upwards, a writer
 * adds to `changed` first: a copy never has more changed bits than calls.
 */
struct outcome {
	u64 changed_read;
	u64 changed_write;
	u64 refused; /* a disable that left a named bit set: the filter said no */
	u64 redundant; /* the named bits are after the call what they were before */
	u64 changed; /* they are not */
	u64 unknown; /* the bitmap could not be read */
};

/* How an MSR is called for: MSR_TYPE_*, and these. Never 0. */
#define ENABLES 0x100
#define DIRECT 0x200 /* the bitmap is known to be readable, and may be read without asking */
#define INSIDE(within) ((within) << 16)
#define WITHIN_OF(inside) ((inside) >> 16)
#define VALID 0x1000000
#define WHAT_OF(v) (*(volatile u64 *)&(v)->msr)

/*
 * The outcomes of a kind of call, found without a hash table. Inside an update `site` is 0 and `caller` that of the
 * first such call.
 */
struct counter {
	struct outcome outcome;
	u64 caller;
	u64 site;
	u64 pid; /* 0 unless BY_PID; of processes that have ended, too */
	u64 what; /* WHAT_OF() a vCPU; 0: free */
};

struct vcpu {
	u64 vcpu; /* struct kvm_vcpu *; 0: free */
	u64 number; /* of the last call: odd while it is open, one more when it was counted */
	/* the call that is open */
	u64 address; /* of the byte with its read bits; its write bits are 0x800 further on. 0: it has none */
	u32 msr; /* this and the next, together: what is called */
	u32 how;
	u32 before; /* bits_at() its entry */
	u32 counter;
	u32 pid; /* 0 unless BY_PID */
	u32 tid;
	/* the update that is under way */
	u64 inside; /* INSIDE() */
	u64 started; /* ns */
	u64 bitmap;
	u64 filter; /* the generation of the VM's filter that the bitmap was last computed from */
	u64 update; /* where it is counted */
	/* settle_call()'s alone */
	u64 looked_at;
	u64 exits;
};

struct update {
	u64 count; /* entered */
	u64 nanoseconds; /* of those that were seen to return, and so are in a bucket */
	u64 buckets[BUCKETS]; /* [i], i > 0: up to 64 << i ns, and more than 64 << (i - 1) unless i is 1; the last: any more */
	u32 pid; /* as in struct counter */
	u32 kind; /* of enum within; NONE: free */
};
#define UPDATE_WORDS (2 + BUCKETS)

/* A process that made a vCPU, and what it was called then. */
struct vmm {
	u32 pid; /* 0: free */
	u32 unused;
	char command[16];
};

enum count {
	DROPPED_CALLS,
	DROPPED_VCPUS,
	DROPPED_UPDATES,
	UNPAIRED_UPDATE, /* entered, and entered again without a return in between */
	UNPAIRED_RETURN, /* returned without an entry */
	READ_FAILED,
	VCPUS_SEEN,
	VMMS_SEEN,
	PLACES_TAKEN, /* in counters and in updates */
	COUNTS,
};

#define MAPPED_ARRAY(name, type, capacity) BPF_F_TABLE("array", u32, type, name, capacity, BPF_F_MMAPABLE)

MAPPED_ARRAY(counters, struct counter, COUNTERS_CAPACITY);
MAPPED_ARRAY(updates, struct update, UPDATES_CAPACITY);
MAPPED_ARRAY(vcpus, struct vcpu, VCPUS_CAPACITY);
MAPPED_ARRAY(vmms, struct vmm, VMMS_CAPACITY);
MAPPED_ARRAY(counts, u64, COUNTS);

/* Which places of those arrays are taken: of two that want the same, one gets it. */
enum table { COUNTERS, UPDATES, VCPUS };
BPF_HASH(taken, u64, u8, COUNTERS_CAPACITY + UPDATES_CAPACITY + VCPUS_CAPACITY);

#ifdef FENTRY
typedef u64 context;
#define ARGUMENT(ctx, n) ((ctx)[(n) - 1])
#define RESULT(ctx, arguments) ((ctx)[arguments])

/* bpf_get_func_arg(), 5.17 and newer. The verifier lets nobody calculate with a pointer that is read from ctx. */
static long (*get_argument)(u64 *ctx, u32 n, u64 *value) = (void *)183;

static __always_inline u64 pointer_argument(u64 *ctx)
{
	u64 value = 0;

	get_argument(ctx, 0, &value);
	return value;
}
#else
typedef struct pt_regs context;
#define ARGUMENT(ctx, n) PT_REGS_PARM##n(ctx)
#define RESULT(ctx, arguments) PT_REGS_RC(ctx)
#define pointer_argument(ctx) PT_REGS_PARM1(ctx)
#endif

/* What differs with every boot or start: whoever loads the program puts it in (tracer/program/program.py). Or else 0. */
enum value {
	ENABLE_AT, /* the functions that are called; for FENTRY */
	DISABLE_AT,
	SET_AT,
	KRETPROBE_TRAMPOLINE, /* what another tracer may have put in a return address' place */
	FGRAPH_TRAMPOLINE,
	WANTED_PID, /* for ONE_PID */
	LEADER_OFFSET, /* struct task_struct -> group_leader and comm */
	COMMAND_OFFSET,
};
#define VALUE(which) ({ u64 value; asm("%0 = %1 ll" : "=r"(value) : "i"(0x6d73727400000000 + (which))); value; })

#define barrier() asm volatile("" ::: "memory")

/* As BCC declares it, but for the types: with these, nothing is cut to 32 bits. */
static long (*read_kernel)(void *to, u64 size, u64 from) = (void *)BPF_FUNC_probe_read_kernel;

static __always_inline void count(int which)
{
	u64 *value = counts.lookup(&which);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline bool take(enum table table, u32 index)
{
	u64 place = (u64)table << 32 | index;
	u8 one = 1;

	return !taken.insert(&place, &one);
}

static __always_inline void give_back(enum table table, u32 index)
{
	u64 place = (u64)table << 32 | index;

	taken.delete(&place);
}

static __always_inline bool wanted(void)
{
#ifdef ONE_PID
	return bpf_get_current_pid_tgid() >> 32 == VALUE(WANTED_PID);
#else
	return true;
#endif
}

#ifdef CAST_TYPE
/*
 * bpf_rdonly_cast(), kernel/bpf/helpers.c: with a type for which reading is allowed, a load is an instruction instead of
 * 80. The number is a placeholder: BCC can call helpers alone, so tracer/program/program.py puts that of the kernel's in.
 */
static void *(*rdonly_cast)(u64 address, u32 type) = (void *)0x7f000001;

static __always_inline u64 byte_at(u64 address)
{
	return *(volatile u8 *)rdonly_cast(address, CAST_TYPE);
}
#endif

/* --- who called --- */

/* The kernel's unwinder knows what was there before a trampoline, and takes its time: thousands of instructions. */
static __always_inline u64 caller_on_stack(context *ctx, u64 function)
{
	u64 frames[8] = {}, caller = 0;
	bool found = false;

	bpf_get_stack(ctx, frames, sizeof(frames), 0);
#pragma clang loop unroll(disable)
	for (int i = 0; i < 8; i++) {
		bool inside = frames[i] - function + 16 < 32;

		if (found && !inside && !caller)
			caller = frames[i];
		found = found || inside;
	}
	return caller;
}

/* The return address; CALLED is of enum value. */
static __always_inline u64 caller_of(context *ctx, enum value called)
{
	u64 caller = 0, function;

#ifdef FENTRY
	/*
	 * arch_prepare_bpf_trampoline(), arch/x86/net/bpf_jit_comp.c: above the arguments there may be the return value,
	 * then the frame pointer, the address in the function and the one in its caller. At most four arguments.
	 */
	u64 words[8] = {};

	function = VALUE(called);
	read_kernel(words, sizeof(words), (u64)(ctx + 3));
#pragma clang loop unroll(disable)
	for (int i = 1; i < 7; i++) {
		if (!caller && words[i] - function < 16)
			caller = words[i + 1];
	}
#else
	function = PT_REGS_IP(ctx);
	read_kernel(&caller, sizeof(caller), PT_REGS_SP(ctx));
#endif
	if (!caller || caller == VALUE(KRETPROBE_TRAMPOLINE) || caller == VALUE(FGRAPH_TRAMPOLINE))
		caller = caller_on_stack(ctx, function);
	return caller;
}

/* --- counting calls --- */

/* The factor gives the calls that KVM makes inside updates a counter each (test_counters_of_updates). */
#define COUNTER_FACTOR 0xdbeef77adcd69029
#define COUNTER_SHIFT 54 /* what is left is less than half of the capacity */

#define PID_FACTOR 0x9e3779b1

/* For whose process the calls of V are counted. */
static __always_inline u32 counted_pid(struct vcpu *v)
{
#ifdef BY_PID
	return v->pid;
#else
	return 0;
#endif
}

static __always_inline bool counts_for(struct counter *counter, u32 pid)
{
#ifdef BY_PID
	return counter->pid == pid;
#else
	return true;
#endif
}

/* Each process has the same counters in another order. */
static __always_inline u32 first_counter(u64 what, u32 pid)
{
	return (what * COUNTER_FACTOR >> COUNTER_SHIFT) ^ (pid * PID_FACTOR >> 18 & (COUNTERS_CAPACITY / 2 - 1));
}

/* Where such calls are counted; NOWHERE if none was yet. */
static __always_inline u32 known_counter(u64 what, u64 site, u32 pid)
{
	u32 first = first_counter(what + site, pid) + (site ? COUNTERS_CAPACITY / 2 : 0);
	struct counter *counter;

#pragma clang loop unroll(disable)
	for (u32 way = 0; way < COUNTER_WAYS; way++) {
		u32 index = first ^ way;

		counter = counters.lookup(&index);
		if (counter && counter->what == what && counter->site == site && counts_for(counter, pid))
			return index;
	}
	return NOWHERE;
}

/* The same, or a new counter; NOWHERE if its places are taken. */
static __always_inline u32 find_counter(u64 what, u64 site, u64 caller, u32 pid)
{
	u32 first = first_counter(what + site, pid) + (site ? COUNTERS_CAPACITY / 2 : 0);
	u32 known = known_counter(what, site, pid);
	struct counter *counter;

	if (known != NOWHERE)
		return known;
#pragma clang loop unroll(disable)
	for (u32 way = 0; way < COUNTER_WAYS; way++) {
		u32 index = first ^ way;

		counter = counters.lookup(&index);
		if (counter && !counter->what && take(COUNTERS, index)) {
			counter->caller = caller;
			counter->site = site;
			counter->pid = pid;
			barrier();
			counter->what = what;
			count(PLACES_TAKEN);
			return index;
		}
	}
	return NOWHERE;
}

/* BEFORE and AFTER are of bits_at(). */
static __always_inline void count_call(u32 *index, u32 how, u64 before, u64 after)
{
	struct counter *counter = counters.lookup(index);
	u64 changed = before ^ after;
	struct outcome *outcome;

	if (!counter) {
		count(DROPPED_CALLS);
		return;
	}
	outcome = &counter->outcome;
	if ((before | after) & FAILED) {
#ifdef BITMAP_OFFSET
		count(READ_FAILED);
#endif
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
	if (after && !(how & ENABLES))
		__sync_fetch_and_add(&outcome->refused, 1);
}

#ifdef BITMAP_OFFSET
static __always_inline u64 bitmap_of(u64 vcpu)
{
	u64 bitmap = 0;

	if (read_kernel(&bitmap, sizeof(bitmap), vcpu + BITMAP_OFFSET))
		return UNREADABLE;
	return bitmap;
}

/* Where the read bits of MSR are in BITMAP; 0 for an MSR outside both ranges or a CPU without a bitmap. */
static __always_inline u64 byte_of(u64 bitmap, u64 msr)
{
	u64 byte = bitmap + (msr >> 3 & 0x3ff);

	if (bitmap && msr < 0x2000)
		return byte;
	if (bitmap && msr - 0xc0000000 < 0x2000)
		return byte + 0x400;
	return 0;
}

/*
 * The bits that a call for MSR names, each in its place in its byte: of READ_BITS and of WRITE_BITS; or FAILED.
 * Intel SDM vol. 3, "MSR-Bitmap Address".
 */
static __always_inline u64 bits_at(u64 address, u64 msr, u64 how)
{
	u64 bits = 0;
	u8 byte;

	if (!address)
		return 0;
#ifdef CAST_TYPE
	if (how & DIRECT) {
		if (how & MSR_TYPE_R)
			bits = byte_at(address);
		if (how & MSR_TYPE_W)
			bits |= byte_at(address + 0x800) << 8;
		return bits & 0x101 << (msr & 7);
	}
#endif
	if (how & MSR_TYPE_R) {
		if (read_kernel(&byte, 1, address))
			return FAILED;
		bits = byte;
	}
	if (how & MSR_TYPE_W) {
		if (read_kernel(&byte, 1, address + 0x800))
			return FAILED;
		bits |= (u64)byte << 8;
	}
	return bits & 0x101 << (msr & 7);
}

/* The call of V that is open has returned, and the bitmap is as it left it: count it. */
static __always_inline void settle(struct vcpu *v)
{
	u64 number = v->number;

	/* Whoever makes it even counts. */
	if (number & 1 && __sync_val_compare_and_swap(&v->number, number, number + 1) == number)
		count_call(&v->counter, v->how, v->before, bits_at(v->address, v->msr, v->how));
}

/*
 * For the reader, by BPF_PROG_TEST_RUN: count the call with the number args[1] of the vCPU in slot args[0], if it has
 * returned: because args[2] says so, or if the vCPU left the guest between two looks, which no vCPU does in a call.
 */
int settle_call(struct bpf_raw_tracepoint_args *ctx)
{
	u32 index = ctx->args[0], how, counter;
	u64 number = ctx->args[1], exits = 0, before, after;
	struct vcpu *v = vcpus.lookup(&index);

	if (!v || *(volatile u64 *)&v->number != number)
		return SETTLED;
	if (!ctx->args[2]) {
#ifdef EXITS_OFFSET
		if (read_kernel(&exits, sizeof(exits), v->vcpu + EXITS_OFFSET))
			return OPEN;
#endif
		if (v->looked_at != number || v->exits == exits) {
			v->looked_at = number;
			v->exits = exits;
			return OPEN;
		}
	}
	/* All of it is read before the number is changed: then none of it is the next call's. */
	counter = v->counter;
	how = v->how;
	before = v->before;
	after = bits_at(v->address, v->msr, how);
	barrier();
	if (__sync_val_compare_and_swap(&v->number, number, number + 1) == number)
		count_call(&counter, how, before, after);
	return SETTLED;
}
#else
static __always_inline void settle(struct vcpu *v)
{
}
#endif

/* --- vCPUs --- */

static __always_inline u32 first_slot(u64 vcpu)
{
	return vcpu * 0x9e3779b97f4a7c15 >> 50 & (VCPUS_CAPACITY - VCPU_WAYS);
}

/* The slot of VCPU if it has one, and its INDEX. */
static __always_inline struct vcpu *known_vcpu(u64 vcpu, u32 *index)
{
	u32 first = first_slot(vcpu);
	struct vcpu *v;

	*index = first;
	v = vcpus.lookup(index);
	if (v && v->vcpu == vcpu)
		return v;
#pragma clang loop unroll(disable)
	for (u32 way = 1; way < VCPU_WAYS; way++) {
		*index = first + way;
		v = vcpus.lookup(index);
		if (v && v->vcpu == vcpu)
			return v;
	}
	return NULL;
}

/* The command of the process that makes a vCPU: not of its thread, whose name QEMU says to be `CPU 0/KVM`. */
static __always_inline void read_command(char *command, u32 size)
{
	u64 leader_offset = VALUE(LEADER_OFFSET), leader = 0;

	if (leader_offset && !read_kernel(&leader, sizeof(leader), bpf_get_current_task() + leader_offset) &&
	    !read_kernel(command, size, leader + VALUE(COMMAND_OFFSET)))
		return;
	bpf_get_current_comm(command, size);
}

static __always_inline void vcpu_seen(void)
{
	u32 pid = bpf_get_current_pid_tgid() >> 32, first = pid * PID_FACTOR >> 20 & (VMMS_CAPACITY - 1), index;
	char command[16] = {};
	struct vmm *vmm;

	count(VCPUS_SEEN);
#pragma clang loop unroll(disable)
	for (u32 way = 0; way < VMM_WAYS; way++) {
		index = first ^ way;
		vmm = vmms.lookup(&index);
		if (vmm && vmm->pid == pid)
			return;
	}
	read_command(command, sizeof(command));
	/* A free place; or else that of any other, which has been there for long. */
	index = first ^ (bpf_ktime_get_ns() >> 10 & (VMM_WAYS - 1));
#pragma clang loop unroll(disable)
	for (u32 way = 0; way < VMM_WAYS; way++) {
		u32 place = first ^ way;

		vmm = vmms.lookup(&place);
		if (vmm && !vmm->pid)
			index = place;
	}
	vmm = vmms.lookup(&index);
	if (vmm) {
		vmm->pid = 0;
		barrier();
		__builtin_memcpy(vmm->command, command, sizeof(command));
		barrier();
		vmm->pid = pid;
	}
	count(VMMS_SEEN);
}

/* The slot of VCPU, and its INDEX; NULL if its places are taken. */
static __always_inline struct vcpu *slot_of(u64 vcpu, u32 *index)
{
	u32 first = first_slot(vcpu);
	struct vcpu *v = known_vcpu(vcpu, index);

	if (v)
		return v;
#pragma clang loop unroll(disable)
	for (u32 way = 0; way < VCPU_WAYS; way++) {
		*index = first + way;
		v = vcpus.lookup(index);
		if (v && !v->vcpu && take(VCPUS, *index)) {
			v->inside = INSIDE(NONE);
			v->filter = 0;
			barrier();
			v->vcpu = vcpu;
			vcpu_seen();
			return v;
		}
	}
	count(DROPPED_VCPUS);
	return NULL;
}

/* --- the functions that change a bit each --- */

static __always_inline int call_entered(context *ctx, u32 action, enum value called)
{
	u64 vcpu = pointer_argument(ctx), msr, what;
	struct counter *counter = NULL;
	struct vcpu *v;
	u64 how;
	u32 index;

	if (!wanted())
		return 0;
	v = slot_of(vcpu, &index);
	if (!v)
		return 0;
	settle(v);
	v->msr = ARGUMENT(ctx, 2);
	v->how = ARGUMENT(ctx, 3) & (MSR_TYPE_R | MSR_TYPE_W) | v->inside | action | VALID;
	what = WHAT_OF(v);
	v->counter = first_counter(what, counted_pid(v));
	if (v->inside)
		counter = counters.lookup(&v->counter);
	if (!counter || counter->what != what || !counts_for(counter, v->pid)) {
		u64 id = bpf_get_current_pid_tgid(), caller;

		v->tid = id;
#ifdef BY_PID
		v->pid = id >> 32;
#endif
		v->counter = v->inside ? known_counter(what, 0, counted_pid(v)) : NOWHERE;
		if (v->counter == NOWHERE) {
			caller = caller_of(ctx, called);
			v->counter = find_counter(what, v->inside ? 0 : caller, caller, counted_pid(v));
		}
	}
	msr = v->msr;
	how = v->how;
#ifdef BITMAP_OFFSET
	v->address = byte_of(v->inside ? v->bitmap : bitmap_of(vcpu), msr);
	v->before = bits_at(v->address, msr, how);
	barrier();
	v->number++;
#else
	count_call(&v->counter, how, 0, FAILED);
#endif
	return 0;
}

#ifndef SETS
int enable_entered(context *ctx)
{
	return call_entered(ctx, ENABLES, ENABLE_AT);
}

int disable_entered(context *ctx)
{
	return call_entered(ctx, 0, DISABLE_AT);
}

#else
int set_entered(context *ctx)
{
	return call_entered(ctx, (u8)ARGUMENT(ctx, 4) ? ENABLES : 0, SET_AT);
}
#endif

/* vmx_update_msr_bitmap_x2apic(vcpu), and what calls it: about to write bits of MSRs 0x800-0x83f, without a call. */
int x2apic_entered(context *ctx)
{
	u32 index;
	struct vcpu *v = known_vcpu(pointer_argument(ctx), &index);

	if (v)
		settle(v);
	return 0;
}

/* --- MSR filters --- */

/* The generation of each VM's MSR filter: a number that no other filter ever had; 0 before the first. */
#ifdef FILTER_OFFSET
BPF_TABLE("lru_hash", u64, u64, filters, VCPUS_CAPACITY);

struct attempt {
	u64 kvm;
	u64 previous;
};
BPF_HASH(attempts, u32, struct attempt, 1024);

static __always_inline u64 filter_of(u64 vcpu)
{
	u64 kvm = 0, *filter;

	if (read_kernel(&kvm, sizeof(kvm), vcpu + FILTER_OFFSET))
		count(READ_FAILED);
	filter = filters.lookup(&kvm);
	return filter ? *filter : 0;
}

/*
 * kvm_vm_ioctl_set_msr_filter(kvm, filter), arch/x86/kvm/x86.c: replaces the filter, then asks every vCPU to
 * recompute. The generation moves at entry, since a vCPU may have recomputed before the function returns.
 */
int filter_set_entered(context *ctx)
{
	u32 tid = bpf_get_current_pid_tgid();
	u64 kvm = pointer_argument(ctx), generation = bpf_ktime_get_ns();
	u64 *previous = filters.lookup(&kvm);
	struct attempt attempt = { .kvm = kvm, .previous = previous ? *previous : 0 };

	attempts.update(&tid, &attempt);
	filters.update(&kvm, &generation);
	return 0;
}

int filter_set_returned(context *ctx)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct attempt *attempt = attempts.lookup(&tid);

	if (attempt && (int)RESULT(ctx, 2)) /* refused as invalid: nobody was asked to recompute */
		filters.update(&attempt->kvm, &attempt->previous);
	attempts.delete(&tid);
	return 0;
}
#else
static __always_inline u64 filter_of(u64 vcpu)
{
	return 0;
}
#endif

/* vmx_vcpu_create(vcpu): a vCPU starts out with the VM's current filter, and may have the address of a dead one. */
int vcpu_created(context *ctx)
{
	u64 vcpu = pointer_argument(ctx);
	u32 index;
	struct vcpu *v;

	if (!wanted())
		return 0;
	v = known_vcpu(vcpu, &index);
	if (v) { /* one whose end was not seen */
		v->address = UNREADABLE;
		settle(v);
		v->inside = INSIDE(NONE);
		vcpu_seen();
	} else {
		v = slot_of(vcpu, &index);
	}
	if (v)
		v->filter = filter_of(vcpu);
	return 0;
}

/* vmx_vcpu_free(vcpu): its bitmap is still there. */
int vcpu_freed(context *ctx)
{
	u32 index;
	struct vcpu *v = known_vcpu(pointer_argument(ctx), &index);

	if (v) {
		settle(v);
		v->vcpu = 0;
		give_back(VCPUS, index);
	}
	return 0;
}

/* --- the function that recomputes a vCPU's bitmap --- */

/* The slot of the vCPU that a thread updates: a return probe has no arguments. What threads leave there is pushed out. */
#ifndef FENTRY
BPF_TABLE("lru_hash", u32, u32, threads, VCPUS_CAPACITY);

#ifdef BITMAP_OFFSET /* so the kernel has atomic operations that return what was there */
BPF_ARRAY(threads_here, u64, THREADS_HERE); /* the thread's id, and the slot; without a hash table, if there is room */

static __always_inline void thread_updates(u32 tid, u32 index)
{
	u32 place = tid & (THREADS_HERE - 1);
	u64 *here = threads_here.lookup(&place), there = here ? *here : 0;

	if (!here || (there && there >> 32 != tid) ||
	    __sync_val_compare_and_swap(here, there, (u64)tid << 32 | index) != there)
		threads.update(&tid, &index);
}

static __always_inline bool thread_updated(u32 tid, u32 *index)
{
	u32 place = tid & (THREADS_HERE - 1), *slot;
	u64 *here = threads_here.lookup(&place);

	if (here && *here >> 32 == tid) {
		*index = *here;
		*here = 0;
		return true;
	}
	slot = threads.lookup(&tid);
	if (slot)
		*index = *slot;
	return slot;
}
#else
static __always_inline void thread_updates(u32 tid, u32 index)
{
	threads.update(&tid, &index);
}

static __always_inline bool thread_updated(u32 tid, u32 *index)
{
	u32 *slot = threads.lookup(&tid);

	if (slot)
		*index = *slot;
	return slot;
}
#endif
#else
static __always_inline void thread_updates(u32 tid, u32 index)
{
}
#endif

/* Where updates of a process and a KIND are counted, which may be a new place; NOWHERE if its places are taken. */
static __always_inline u32 find_update(u32 pid, u32 kind)
{
	u32 first = (pid * PID_FACTOR >> 20 & (UPDATES_CAPACITY - 1)) ^ kind;
	struct update *update;

#pragma clang loop unroll(disable)
	for (u32 way = 0; way < UPDATE_WAYS; way++) {
		u32 index = first ^ way;

		update = updates.lookup(&index);
		if (update && update->kind == kind && update->pid == pid)
			return index;
	}
#pragma clang loop unroll(disable)
	for (u32 way = 0; way < UPDATE_WAYS; way++) {
		u32 index = first ^ way;

		update = updates.lookup(&index);
		if (update && update->kind == NONE && take(UPDATES, index)) {
			update->pid = pid;
			barrier();
			update->kind = kind;
			count(PLACES_TAKEN);
			return index;
		}
	}
	return NOWHERE;
}

int update_entered(context *ctx)
{
	u64 vcpu = pointer_argument(ctx), id = bpf_get_current_pid_tgid(), filter;
	u32 index, tid = id, place;
	struct update *update;
	struct vcpu *v;
	u8 byte;

	if (!wanted())
		return 0;
	v = slot_of(vcpu, &index);
	if (!v)
		return 0;
	settle(v);
	if (v->inside)
		count(UNPAIRED_UPDATE);
#ifdef FILTER_OFFSET
	filter = filter_of(vcpu);
	v->inside = filter != v->filter ? INSIDE(FILTER_CHANGE) : INSIDE(RECALC);
	v->filter = filter;
#else
	v->inside = INSIDE(UPDATE_KIND);
#endif
#ifdef BITMAP_OFFSET
	v->bitmap = bitmap_of(vcpu);
#ifdef CAST_TYPE
	if (!read_kernel(&byte, 1, v->bitmap)) /* a page: then all of it can be read */
		v->inside |= DIRECT;
#endif
#endif
	v->tid = tid;
#ifdef BY_PID
	v->pid = id >> 32;
#endif
	/*
	 * It counts from here on. A return may not be seen: the kernel has a number of places, by CPUs, for all threads that
	 * are in a function with a kretprobe (struct kretprobe.maxactive), and threads that are preempted there keep theirs.
	 */
	place = find_update(counted_pid(v), WITHIN_OF(v->inside) & 0xff);
	v->update = place;
	update = updates.lookup(&place);
	if (update)
		__sync_fetch_and_add(&update->count, 1);
	else
		count(DROPPED_UPDATES);
	thread_updates(tid, index);
	v->started = bpf_ktime_get_ns();
	return 0;
}

int update_returned(context *ctx)
{
	u64 now = bpf_ktime_get_ns(), spent;
	u32 bucket, index = 0;
	struct update *update;
	struct vcpu *v;

	if (!wanted())
		return 0;
#ifdef FENTRY
	v = known_vcpu(pointer_argument(ctx), &index);
#else
	u32 tid = bpf_get_current_pid_tgid();

	v = thread_updated(tid, &index) ? vcpus.lookup(&index) : NULL;
	if (v && v->tid != tid)
		v = NULL;
#endif
	if (!v || !v->inside) {
		count(UNPAIRED_RETURN);
		return 0;
	}
	settle(v);
	v->inside = INSIDE(NONE);
	spent = now - v->started;
	index = v->update;
	update = updates.lookup(&index);
	if (!update) /* it was dropped when it was entered */
		return 0;
	__sync_fetch_and_add(&update->nanoseconds, spent);
	/*
	 * BCC's log2 is 1 + floor(log2), and 1 for 0; so at most BUCKETS - 1 here. The mask says so to the verifier,
	 * and must not be what the compiler knows already, or it is gone when the verifier looks.
	 */
	spent = spent ? (spent - 1) >> 6 : 0;
	bucket = bpf_log2l(spent < 0x7fffffff ? spent : 0x7fffffff);
	__sync_fetch_and_add(&update->buckets[bucket & (BUCKETS - 1)], 1);
	return 0;
}

/* --- processes that have ended, by BPF_PROG_TEST_RUN --- */

/* Nothing that is added to FROM meanwhile is lost. */
static __always_inline void move(u64 *to, u64 *from)
{
	u64 value = *(volatile u64 *)from;

	__sync_fetch_and_add(to, value);
	__sync_fetch_and_add(from, -value);
}

/* The counter in place args[0] is of a process that has ended: add it to that of all those, and free its place. */
int counter_ended(struct bpf_raw_tracepoint_args *ctx)
{
	u32 index = ctx->args[0], other;
	struct counter *from = counters.lookup(&index), *to;

	if (!from || !from->what || !from->pid)
		return 0;
	other = find_counter(from->what, from->site, from->caller, 0);
	to = counters.lookup(&other);
	if (!to) /* no room: it stays where it is */
		return 0;
	/* The reverse of the order in which they are added to: see struct outcome. */
	move(&to->outcome.unknown, &from->outcome.unknown);
	move(&to->outcome.changed, &from->outcome.changed);
	move(&to->outcome.redundant, &from->outcome.redundant);
	move(&to->outcome.refused, &from->outcome.refused);
	move(&to->outcome.changed_write, &from->outcome.changed_write);
	move(&to->outcome.changed_read, &from->outcome.changed_read);
	from->what = 0;
	barrier();
	give_back(COUNTERS, index);
	return 0;
}

/* The same of updates. */
int update_ended(struct bpf_raw_tracepoint_args *ctx)
{
	u32 index = ctx->args[0], other;
	struct update *from = updates.lookup(&index), *to;

	if (!from || from->kind == NONE || !from->pid)
		return 0;
	other = find_update(0, from->kind);
	to = updates.lookup(&other);
	if (!to)
		return 0;
#pragma clang loop unroll(disable)
	for (u32 word = 0; word < UPDATE_WORDS; word++)
		move((u64 *)to + word, (u64 *)from + word);
	from->kind = NONE;
	barrier();
	give_back(UPDATES, index);
	return 0;
}
