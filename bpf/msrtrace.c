// SPDX-License-Identifier: GPL-2.0-only
/*
 * Counts the calls that change a vCPU's MSR bitmap, and what each of them changed.
 *
 * Compiled by BCC at run time and configured by -D alone:
 *
 *   BITMAP_OFFSET  struct vcpu_vmx -> vmcs01.msr_bitmap, from the running module's BTF. Not defined: calls are
 *                  counted, their outcome is not known, and the caller is read at entry.
 *   FILTER_OFFSET  struct kvm_vcpu -> kvm. Defined where the update function also runs for other reasons than a
 *                  new MSR filter (6.17 and newer), to tell those apart.
 *   WANTED_PID     trace the threads of this process alone.
 *   BY_PID         count per process, for per-VM metrics.
 *
 * The functions are those of arch/x86/kvm/vmx/vmx.c: vmx_{enable,disable,set}_intercept_for_msr() run on the
 * thread that owns the vCPU, never nested and never from an interrupt, so whatever is under way belongs to the
 * thread: `threads` is keyed by its id and follows it from CPU to CPU.
 */
#include <uapi/linux/ptrace.h>

#define MSR_TYPE_R 1
#define MSR_TYPE_W 2

/* Sizes and numbers that tracer/engine.py knows too. */
#define CALLS_CAPACITY 8192
#define THREADS_CAPACITY 16384
#define UPDATES_CAPACITY 4096
#define VCPUS_CAPACITY 16384
#define BUCKETS 32 /* a power of two, so that masking bounds an index for every verifier */

enum action { DISABLE, ENABLE };

/* What the thread is inside of; the kinds of an update. */
enum within { NONE, FILTER_CHANGE, RECALC };

struct call {
	u64 caller; /* return address */
	u32 pid; /* 0 unless BY_PID */
	u32 msr;
	u8 type; /* MSR_TYPE_*: the bits that the call names */
	u8 action;
	u8 within; /* enum within */
	u8 unused[5];
};

/* A reader copies upwards, a writer adds `calls` first: a copy never has more outcomes than calls. */
struct outcome {
	u64 redundant; /* the named bits are after the call what they were before */
	u64 changed_read;
	u64 changed_write;
	u64 refused; /* a disable that left a named bit set: the filter said no */
	u64 unknown; /* the bitmap could not be read */
	u64 calls;
};

struct thread {
	u64 bitmap; /* address of the call's two bytes: read bits, and write bits 0x800 further on; 0: no bits */
	u64 started; /* ns, when the update began */
	u32 msr;
	u8 type;
	u8 action;
	u8 before; /* the named bits at entry, numbered as MSR_TYPE_* */
	u8 unreadable;
	u8 in_call;
	u8 within;
	u8 unused[6];
};

struct update {
	u64 count;
	u64 nanoseconds;
	u64 buckets[BUCKETS]; /* [i], i > 0: up to 64 << i ns, and more than 64 << (i - 1) unless i is 1; the last: any more */
};

struct update_key {
	u32 pid;
	u32 kind;
};

struct vcpu {
	u64 filter; /* the generation of the VM's filter that its bitmap was last computed from */
	u64 pid;
};

enum count {
	DROPPED_CALLS,
	DROPPED_THREADS,
	DROPPED_UPDATES,
	UNPAIRED_DISABLE, /* entered, and entered again without a return in between */
	UNPAIRED_ENABLE,
	UNPAIRED_UPDATE,
	UNPAIRED_RETURN, /* returned without an entry */
	READ_FAILED,
	VCPUS_SEEN,
	VMMS_SEEN,
	COUNTS,
};

BPF_HASH(calls, struct call, struct outcome, CALLS_CAPACITY);
BPF_HASH(threads, u32, struct thread, THREADS_CAPACITY);
BPF_HASH(updates, struct update_key, struct update, UPDATES_CAPACITY);
BPF_TABLE("lru_hash", u64, struct vcpu, vcpus, VCPUS_CAPACITY);
BPF_TABLE("lru_hash", u32, u8, vmms, UPDATES_CAPACITY);
BPF_ARRAY(counts, u64, COUNTS);

static __always_inline void count(int which)
{
	u64 *value = counts.lookup(&which);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline bool wanted(void)
{
#ifdef WANTED_PID
	return bpf_get_current_pid_tgid() >> 32 == WANTED_PID;
#else
	return true;
#endif
}

static __always_inline u32 pid_label(void)
{
#ifdef BY_PID
	return bpf_get_current_pid_tgid() >> 32;
#else
	return 0;
#endif
}

static __always_inline struct thread *thread_of(u32 tid)
{
	struct thread fresh = {};
	struct thread *thread = threads.lookup(&tid);

	if (!thread)
		thread = threads.lookup_or_try_init(&tid, &fresh);
	if (!thread)
		count(DROPPED_THREADS);
	return thread;
}

static __always_inline void count_call(struct call *call, u8 changed, u8 refused, u8 unreadable)
{
	struct outcome zero = {};
	struct outcome *outcome = calls.lookup(call);

	if (!outcome)
		outcome = calls.lookup_or_try_init(call, &zero);
	if (!outcome) {
		count(DROPPED_CALLS);
		return;
	}
	__sync_fetch_and_add(&outcome->calls, 1);
	if (unreadable)
		__sync_fetch_and_add(&outcome->unknown, 1);
	else if (!changed)
		__sync_fetch_and_add(&outcome->redundant, 1);
	if (changed & MSR_TYPE_R)
		__sync_fetch_and_add(&outcome->changed_read, 1);
	if (changed & MSR_TYPE_W)
		__sync_fetch_and_add(&outcome->changed_write, 1);
	if (refused)
		__sync_fetch_and_add(&outcome->refused, 1);
}

/* The bits of TYPE for the MSR whose bytes are at BITMAP. Intel SDM vol. 3, "MSR-Bitmap Address". */
static __always_inline u8 bits_at(u64 bitmap, u32 msr, u8 type, u8 *unreadable)
{
	u8 read = 0, write = 0, shift = msr & 7;

	if (!bitmap)
		return 0;
	if (bpf_probe_read_kernel(&read, 1, (void *)bitmap) ||
	    bpf_probe_read_kernel(&write, 1, (void *)(bitmap + 0x800)))
		*unreadable = 1;
	return ((read >> shift & 1) * MSR_TYPE_R | (write >> shift & 1) * MSR_TYPE_W) & type;
}

#ifdef BITMAP_OFFSET
/* Where the read bits of MSR are in the bitmap of VCPU; 0 for an MSR outside both ranges or a CPU without one. */
static __always_inline u64 byte_of(u64 vcpu, u32 msr, u8 *unreadable)
{
	u64 bitmap = 0;
	u32 quarter = msr >= 0xc0000000 ? 0x400 : 0;

	if ((msr & ~0x1fff) != 0 && (msr & ~0x1fff) != 0xc0000000)
		return 0;
	if (bpf_probe_read_kernel(&bitmap, sizeof(bitmap), (void *)(vcpu + BITMAP_OFFSET)))
		*unreadable = 1;
	return bitmap ? bitmap + quarter + ((msr & 0x1fff) >> 3) : 0;
}
#endif

static __always_inline int call_entered(struct pt_regs *ctx, u8 action)
{
	u32 tid = bpf_get_current_pid_tgid();
	u32 msr = PT_REGS_PARM2(ctx);
	u8 type = PT_REGS_PARM3(ctx) & (MSR_TYPE_R | MSR_TYPE_W);
	struct thread *thread;

	if (!wanted())
		return 0;
#ifdef BITMAP_OFFSET
	thread = thread_of(tid);
	if (!thread)
		return 0;
	if (thread->in_call) {
		count(thread->action == ENABLE ? UNPAIRED_ENABLE : UNPAIRED_DISABLE);
	}
	thread->in_call = 1;
	thread->msr = msr;
	thread->type = type;
	thread->action = action;
	thread->unreadable = 0;
	thread->bitmap = byte_of(PT_REGS_PARM1(ctx), msr, &thread->unreadable);
	thread->before = bits_at(thread->bitmap, msr, type, &thread->unreadable);
#else
	struct call call = { .pid = pid_label(), .msr = msr, .type = type, .action = action };

	thread = threads.lookup(&tid);
	call.within = thread ? thread->within : NONE;
	/* Alone on the function, so the word on top of the stack is the caller's, not a trampoline's. */
	bpf_probe_read_kernel(&call.caller, sizeof(call.caller), (void *)PT_REGS_SP(ctx));
	count_call(&call, 0, 0, 1);
#endif
	return 0;
}

int enable_entered(struct pt_regs *ctx)
{
	return call_entered(ctx, ENABLE);
}

int disable_entered(struct pt_regs *ctx)
{
	return call_entered(ctx, DISABLE);
}

int set_entered(struct pt_regs *ctx)
{
	return call_entered(ctx, (u8)PT_REGS_PARM4(ctx) ? ENABLE : DISABLE);
}

int call_returned(struct pt_regs *ctx)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct thread *thread;
	struct call call = { .pid = pid_label() };
	u8 after, unreadable;

	if (!wanted())
		return 0;
	thread = threads.lookup(&tid);
	if (!thread || !thread->in_call) {
		count(UNPAIRED_RETURN);
		return 0;
	}
	unreadable = thread->unreadable;
	after = bits_at(thread->bitmap, thread->msr, thread->type, &unreadable);
	call.caller = PT_REGS_IP(ctx); /* the handlers of a return probe see the real return address */
	call.msr = thread->msr;
	call.type = thread->type;
	call.action = thread->action;
	call.within = thread->within;
	if (unreadable)
		count(READ_FAILED);
	count_call(&call, thread->before ^ after, call.action == DISABLE ? after : 0, unreadable);
	thread->in_call = 0;
	if (!thread->within)
		threads.delete(&tid);
	return 0;
}

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

	if (bpf_probe_read_kernel(&kvm, sizeof(kvm), (void *)(vcpu + FILTER_OFFSET)))
		count(READ_FAILED);
	filter = filters.lookup(&kvm);
	return filter ? *filter : 0;
}

/*
 * kvm_vm_ioctl_set_msr_filter(kvm, filter), arch/x86/kvm/x86.c: replaces the filter, then asks every vCPU to
 * recompute. The generation moves at entry, since a vCPU may have recomputed before the function returns.
 */
int filter_set_entered(struct pt_regs *ctx)
{
	u32 tid = bpf_get_current_pid_tgid();
	u64 kvm = PT_REGS_PARM1(ctx), generation = bpf_ktime_get_ns();
	u64 *previous = filters.lookup(&kvm);
	struct attempt attempt = { .kvm = kvm, .previous = previous ? *previous : 0 };

	attempts.update(&tid, &attempt);
	filters.update(&kvm, &generation);
	return 0;
}

int filter_set_returned(struct pt_regs *ctx)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct attempt *attempt = attempts.lookup(&tid);

	if (attempt && PT_REGS_RC(ctx)) /* refused as invalid: nobody was asked to recompute */
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

static __always_inline void vcpu_seen(u64 vcpu, u64 filter)
{
	u32 pid = bpf_get_current_pid_tgid() >> 32;
	struct vcpu seen = { .filter = filter, .pid = pid };
	u8 one = 1;

	vcpus.update(&vcpu, &seen);
	count(VCPUS_SEEN);
	if (!vmms.lookup(&pid)) {
		vmms.update(&pid, &one);
		count(VMMS_SEEN);
	}
}

/* vmx_vcpu_create(vcpu): a vCPU starts out with the filter of the day, and may have the address of a dead one. */
int vcpu_created(struct pt_regs *ctx)
{
	u64 vcpu = PT_REGS_PARM1(ctx);

	if (wanted())
		vcpu_seen(vcpu, filter_of(vcpu));
	return 0;
}

/* Why the update function runs; remembers that this vCPU has seen the filter. */
static __always_inline u8 update_kind(u64 vcpu)
{
	struct vcpu *known = vcpus.lookup(&vcpu);
	u64 filter = filter_of(vcpu);
	u64 applied = known ? known->filter : 0;

	if (!known)
		vcpu_seen(vcpu, filter);
	else
		known->filter = filter;
#ifdef FILTER_OFFSET
	return filter != applied ? FILTER_CHANGE : RECALC;
#else
	return UPDATE_KIND;
#endif
}

int update_entered(struct pt_regs *ctx)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct thread *thread;

	if (!wanted())
		return 0;
	thread = thread_of(tid);
	if (!thread)
		return 0;
	if (thread->within)
		count(UNPAIRED_UPDATE);
	thread->within = update_kind(PT_REGS_PARM1(ctx));
	thread->in_call = 0;
	thread->started = bpf_ktime_get_ns();
	return 0;
}

int update_returned(struct pt_regs *ctx)
{
	u64 now = bpf_ktime_get_ns();
	u32 tid = bpf_get_current_pid_tgid();
	struct update_key key = { .pid = pid_label() };
	struct update zero = {}, *update;
	struct thread *thread;
	u64 spent, started;
	u32 bucket;

	if (!wanted())
		return 0;
	thread = threads.lookup(&tid);
	if (!thread || !thread->within) {
		count(UNPAIRED_RETURN);
		return 0;
	}
	started = thread->started;
	spent = now - started;
	key.kind = thread->within;
	threads.delete(&tid);
	update = updates.lookup_or_try_init(&key, &zero);
	if (!update) {
		count(DROPPED_UPDATES);
		return 0;
	}
	/*
	 * BCC's log2 is 1 + floor(log2), and 1 for 0; so at most BUCKETS - 1 here. The mask says so to the verifier,
	 * and must not be what the compiler knows already, or it is gone when the verifier looks.
	 */
	spent = spent ? (spent - 1) >> 6 : 0;
	bucket = bpf_log2l(spent < 0x7fffffff ? spent : 0x7fffffff);
	__sync_fetch_and_add(&update->count, 1);
	__sync_fetch_and_add(&update->nanoseconds, now - started);
	__sync_fetch_and_add(&update->buckets[bucket & (BUCKETS - 1)], 1);
	return 0;
}
