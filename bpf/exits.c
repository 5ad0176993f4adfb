// SPDX-License-Identifier: GPL-2.0-only
/*
 * Counts the exits of guests' RDMSR and WRMSR, each once: by MSR, by how KVM handled it, and by what became of it.
 *
 * An exit begins at the entry of a function that KVM calls once for it (arch/x86/kvm/x86.c, 7.3: msrs.c). What becomes of it
 * shows later, or never: so it stays open until the next one of its vCPU, and is counted then. What the fast path did not
 * handle goes to kvm_emulate_wrmsr(); an access that is refused goes to kvm_msr_user_space(). A reader sees what is open,
 * and adds what is over.
 */
#include <uapi/linux/ptrace.h>

/* As in values.h. */
struct values {
	u64 rcx_offset; /* struct kvm_vcpu -> arch.regs[VCPU_REGS_RCX]: the MSR */
	u64 nested_offset; /* struct kvm_vcpu -> what is not 0 while a nested guest runs, and which of its bits say so */
	u64 nested_bits;
	u64 cast_type;
	u64 by_pid;
	u64 wanted_pid;
	u64 places; /* in exits, without OTHERS, where processes are not told apart; 0: all that it has */
	/* What kvm_msr_user_space() is given for an exit, and for nothing else; 0: it is not known, or there is none. */
	u64 complete_read;
	u64 complete_read_imm;
	u64 complete_write;
	u64 exits_offset; /* struct kvm_vcpu -> stat.exits */
	u64 control_offset; /* struct vcpu_svm -> vmcb -> control.exit_code and exit_info_1 */
	u64 exit_code_offset;
	u64 exit_info_offset;
	u64 leader_offset; /* struct task_struct -> group_leader */
	u64 start_offset; /* struct task_struct -> start_boottime */
};
#include "value.h"
#include "context.h"

/* Where processes are not told apart there are fewer (tracer/trace/exits.py). The last are for what finds no other place. */
#define EXITS_CAPACITY 32832
#define OTHERS 64
#define VCPUS_CAPACITY 16384

/* A kind of exit. */
struct kind {
	u32 msr;
	u8 access; /* 1: read, 2: write */
	u8 fast;
	u8 result; /* of enum result */
	u8 nested; /* and OTHER */
};
#define READ (1ull << 32)
#define WRITE (2ull << 32)
#define ACCESS (3ull << 32)
#define FAST (1ull << 40)
#define BECAME(result) ((u64)(result) << 48)
#define NESTED (1ull << 56)
#define OTHER (1ull << 63) /* of any MSR, of any process */
enum result { OK, FILTERED, UNKNOWN, INVALID, REFLECTED };

struct exit {
	u64 count;
	u64 vmm; /* vmm_of() its process; 0 unless by_pid; of processes that have ended, too */
	union {
		u64 key; /* 0: free */
		struct kind kind;
	};
};

struct vcpu {
	u64 vcpu; /* struct kvm_vcpu *; 0: free */
	u64 seq; /* changes before the exit that is open is counted, and before another takes its place */
	union {
		u64 key; /* of the exit that is open; 0: none is */
		struct kind open;
	};
	u32 tid; /* of the thread that was in it, and of its process */
	u32 pid;
	u64 vmm; /* vmm_of() it; 0 unless by_pid */
};

struct counts {
	u64 dropped_exits;
	u64 dropped_vcpus;
	u64 unpaired_refusal; /* of an access whose exit was not seen */
	u64 vcpus_seen;
	u64 places_taken; /* in exits */
};

enum table { EXITS, VCPUS };
#define PLACES (EXITS_CAPACITY + VCPUS_CAPACITY)
#include "places.h"

MAPPED_ARRAY(exits, struct exit, EXITS_CAPACITY);
MAPPED_ARRAY(vcpus, struct vcpu, VCPUS_CAPACITY);

#include "slots.h"

static __always_inline void reset_slot(struct vcpu *v)
{
	v->key = 0;
	v->pid = 0;
}

static __always_inline void slot_taken(void)
{
	COUNT(vcpus_seen);
}

#include "exit_counters.h"

/* --- what is open --- */

/* The exit of V that is open is over, and one of the kind KEY begins; 0: none does. */
static __always_inline void begin_exit(struct vcpu *v, u64 key)
{
	u64 open = v->key, id = bpf_get_current_pid_tgid();

	v->seq++;
	barrier();
	if (open)
		count_exit(open, v->vmm);
	if (VALUE(by_pid) && v->pid != id >> 32)
		v->vmm = vmm_of(id >> 32);
	barrier();
	v->key = key;
	*(u64 *)&v->tid = id; /* and the pid */
}

static __always_inline void amend_exit(struct vcpu *v, u64 key)
{
	v->seq++;
	barrier();
	v->key = key;
}

/* A word at an offset from the first argument, a pointer that the kernel's types know. */
static __always_inline u64 word_of_first(context *ctx, u64 offset)
{
	u64 word = 0;

#ifdef FENTRY
	u64 first = ctx[0];

	/* BCC would make it a call of bpf_probe_read_kernel(). */
	asm volatile("%0 = %1\n%0 += %2\n%0 = *(u64 *)(%0 + 0)" : "=&r"(word) : "r"(first), "r"(offset));
#else
	if (VALUE(cast_type)) {
		barrier(); /* so that it is asked first */
		return *(volatile u64 *)rdonly_cast(pointer_argument(ctx) + offset, VALUE(cast_type));
	}
	read_kernel(&word, sizeof(word), pointer_argument(ctx) + offset);
#endif
	return word;
}

static __always_inline u64 msr_of(context *ctx)
{
	return (u32)word_of_first(ctx, VALUE(rcx_offset));
}

static __always_inline u64 nested_of(context *ctx)
{
	return word_of_first(ctx, VALUE(nested_offset)) & VALUE(nested_bits) ? NESTED : 0;
}

static __always_inline int exit_entered(context *ctx, u64 kind, bool in_instruction)
{
	u32 index;
	struct vcpu *v = slot_of(pointer_argument(ctx), &index);
	u64 key;

	if (!v)
		return 0;
	key = kind | (in_instruction ? (u32)ARGUMENT(ctx, 2) : msr_of(ctx)) | nested_of(ctx);
	if (kind == WRITE && v->key == (key | FAST)) /* which that path has left to this function */
		amend_exit(v, key);
	else
		begin_exit(v, key);
	return 0;
}

/* --- the functions that are probed --- */

int read_entered(context *ctx)
{
	return exit_entered(ctx, READ, false);
}

int write_entered(context *ctx)
{
	return exit_entered(ctx, WRITE, false);
}

int fast_write_entered(context *ctx)
{
	return exit_entered(ctx, WRITE | FAST, false);
}

int read_imm_entered(context *ctx)
{
	return exit_entered(ctx, READ, true);
}

int write_imm_entered(context *ctx)
{
	return exit_entered(ctx, WRITE, true);
}

int fast_write_imm_entered(context *ctx)
{
	return exit_entered(ctx, WRITE | FAST, true);
}

#define KVM_EXIT_X86_RDMSR 29
#define KVM_EXIT_X86_WRMSR 30
/* arch/x86/kvm/x86.h; all else is an error */
#define KVM_MSR_RET_UNSUPPORTED 2
#define KVM_MSR_RET_FILTERED 3

/*
 * kvm_msr_user_space(vcpu, index, exit_reason, data, completion, r): the access is refused. The instruction emulator's,
 * which are no exits, come here too; since 5.11 those have other completions.
 */
int access_refused(context *ctx)
{
	u64 access = (u32)ARGUMENT(ctx, 3) == KVM_EXIT_X86_WRMSR ? WRITE : READ, completion = POINTER_ARGUMENT(ctx, 5);
	u32 index, r = ARGUMENT(ctx, 6);
	struct vcpu *v = known_vcpu(pointer_argument(ctx), &index);
	enum result result = INVALID;

	if (VALUE(complete_read) && completion != VALUE(complete_read) && completion != VALUE(complete_write) &&
	    completion != VALUE(complete_read_imm))
		return 0;
	if (!v || (v->key & (BECAME(0xff) | ACCESS | 0xffffffff)) != (access | (u32)ARGUMENT(ctx, 2))) {
		if (wanted())
			COUNT(unpaired_refusal);
		return 0;
	}
	if (r == KVM_MSR_RET_FILTERED)
		result = FILTERED;
	else if (r == KVM_MSR_RET_UNSUPPORTED)
		result = UNKNOWN;
	amend_exit(v, v->key | BECAME(result));
	return 0;
}

static __always_inline void exit_reflected(u64 vcpu, u64 kind)
{
	u32 index;
	struct vcpu *v = slot_of(vcpu, &index);

	if (v)
		begin_exit(v, kind | NESTED | BECAME(REFLECTED));
}

/* Exit reasons: Intel SDM vol. 3, appendix C; of a failed entry of the nested guest, other bits are set. */
#define EXIT_REASON_MSR_READ 31
#define EXIT_REASON_MSR_WRITE 32
#define EXIT_REASON_MSR_READ_IMM 84
#define EXIT_REASON_MSR_WRITE_IMM 85

/*
 * nested_vmx_vmexit(vcpu, reason, interruption info, qualification), since 6.17 __nested_vmx_vmexit() with one more: an
 * exit of the nested guest becomes its guest's.
 */
int nested_vmx_exit_entered(context *ctx)
{
	u32 reason = ARGUMENT(ctx, 2);

	if (reason == EXIT_REASON_MSR_READ || reason == EXIT_REASON_MSR_WRITE)
		exit_reflected(pointer_argument(ctx), (reason == EXIT_REASON_MSR_READ ? READ : WRITE) | msr_of(ctx));
	else if (reason == EXIT_REASON_MSR_READ_IMM || reason == EXIT_REASON_MSR_WRITE_IMM)
		exit_reflected(pointer_argument(ctx),
			       (reason == EXIT_REASON_MSR_READ_IMM ? READ : WRITE) | (u32)ARGUMENT(ctx, 4));
	return 0;
}

#define SVM_EXIT_MSR 0x7c

/* nested_svm_vmexit(svm): the same. The vCPU is the first member of struct vcpu_svm. */
int nested_svm_exit_entered(context *ctx)
{
	u64 svm = pointer_argument(ctx), vmcb = 0, info = 0;
	u32 code = 0;

	read_kernel(&vmcb, sizeof(vmcb), svm + VALUE(control_offset));
	read_kernel(&code, sizeof(code), vmcb + VALUE(exit_code_offset));
	if (code != SVM_EXIT_MSR)
		return 0;
	read_kernel(&info, sizeof(info), vmcb + VALUE(exit_info_offset));
	exit_reflected(svm, (info & 1 ? WRITE : READ) | msr_of(ctx));
	return 0;
}

/* vmx_vcpu_free(vcpu), svm_vcpu_free(vcpu) */
int vcpu_freed(context *ctx)
{
	u32 index;
	struct vcpu *v = known_vcpu(pointer_argument(ctx), &index);

	if (v) {
		begin_exit(v, 0);
		v->vcpu = 0;
		give_back(VCPUS, index);
	}
	return 0;
}

/* For the reader, by BPF_PROG_TEST_RUN: how often the vCPU in slot args[0] has left its guest, as 32 bits. */
int exits_of_vcpu(struct bpf_raw_tracepoint_args *ctx)
{
	u32 index = ctx->args[0];
	u64 exits = 0;
	struct vcpu *v = vcpus.lookup(&index);

	if (v && v->vcpu)
		read_kernel(&exits, sizeof(exits), v->vcpu + VALUE(exits_offset));
	return exits;
}

/*
 * The same: what place args[0] counts is of a process that has ended. Add it to that of all
 * those, and free the place.
 */
int exit_ended(struct bpf_raw_tracepoint_args *ctx)
{
	u32 index = ctx->args[0], other;
	struct exit *from = exits.lookup(&index), *to;

	if (!from || !from->key || !from->vmm)
		return 0;
	other = find_place(from->key, 0);
	to = exits.lookup(&other);
	if (!to) /* no room: it stays where it is */
		return 0;
	move(&to->count, &from->count);
	from->key = 0;
	barrier();
	give_back(EXITS, index);
	return 0;
}
