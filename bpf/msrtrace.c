// SPDX-License-Identifier: GPL-2.0-only
/*
 * Counts the calls that change a vCPU's MSR bitmap, and what each of them changed.
 *
 * There are two programs: for fentry and fexit (-DFENTRY), and for kprobes. All else that differs is in struct values.
 * The functions are those of arch/x86/kvm/vmx/vmx.c: vmx_{enable,disable,set}_intercept_for_msr(), and what calls them;
 * and of svm/svm.c: svm_set_intercept_for_msr(), set_msr_interception_bitmap().
 *
 * A call is seen at its entry alone: a probe on the return costs more than all the rest. Its outcome stays open until
 * the next thing that happens to the vCPU, and is then read from the bitmap, which nobody has written in the meantime:
 * all that write it are seen here (writer_entered(): those that do without a call). What stays open when nothing
 * more happens is settled by settle_call(), at the request of the reader.
 */
#include <uapi/linux/ptrace.h>
#include "values.h"
#include "value.h"
#include "context.h"
#include "maps.h"
#include "bitmap.h"
#include "caller.h"
#include "counters.h"
#include "vcpus.h"
#include "updates.h"

/* --- the functions that change a bit each --- */

/*
 * How a call says what it wants: vmx_{enable,disable}_intercept_for_msr(vcpu, msr, type),
 * {vmx,svm}_set_intercept_for_msr(vcpu, msr, type, bool set), and set_msr_interception_bitmap(vcpu, msrpm, msr, int read,
 * int write), where a 1 lets the guest pass.
 */
enum form { ENABLE, DISABLE, SET, PASS };

/* Of the directions TYPE that a call names, those that it wants intercepted. */
static __always_inline u32 enabled_by(context *ctx, enum form form, u32 type)
{
	if (form == PASS)
		return ((u32)ARGUMENT(ctx, 4) ? 0 : MSR_TYPE_R) | ((u32)ARGUMENT(ctx, 5) ? 0 : MSR_TYPE_W);
	return form == ENABLE || form == SET && (u8)ARGUMENT(ctx, 4) ? type : 0;
}

static __always_inline int call_entered(context *ctx, enum form form, u64 called)
{
	struct counter *counter;
	u64 key, caller, bitmap;
	u32 index, type;
	struct vcpu *v = slot_of(pointer_argument(ctx), &index);

	if (!v)
		return 0;
	settle(v);
	v->msr = form == PASS ? ARGUMENT(ctx, 3) : ARGUMENT(ctx, 2);
	type = form == PASS ? MSR_TYPE_RW : ARGUMENT(ctx, 3) & MSR_TYPE_RW;
	v->flags = type | ENABLES(enabled_by(ctx, form, type)) | v->inside | VALID;
	if (form == PASS) {
		bitmap = ARGUMENT(ctx, 2);
		if (bitmap != v->bitmap) { /* nobody has tried to read it */
			v->bitmap = bitmap;
			v->inside &= ~(u64)DIRECT;
			v->flags &= ~DIRECT;
		}
	}
	key = *(volatile u64 *)&v->key;
	if (v->inside) {
		index = v->counter = first_counter(key, v->order);
	} else {
		v->flags |= v->creating;
		key = *(volatile u64 *)&v->key;
		index = NOWHERE; /* that is known without a search */
		if (form != PASS)
			v->bitmap = bitmap_of(v->vcpu);
		note_thread(v);
	}
	counter = counters.lookup(&index);
	if (!counter || counter->key != key || (VALUE(by_pid) && counter->vmm != v->vmm)) {
		caller = caller_of(ctx, called);
		index = v->counter = find_counter(key, v->inside ? 0 : caller, caller, v->vmm);
	}
	if (!VALUE(exact)) {
		count_call(&index, v->flags, 0, FAILED);
		return 0;
	}
	v->address = byte_of(v->bitmap, v->msr);
	v->before = bits_at(v->address, v->msr, v->flags);
	barrier();
	v->seq++;
	return 0;
}

int enable_entered(context *ctx)
{
	return call_entered(ctx, ENABLE, NUMBER_OF(enable_at));
}

int disable_entered(context *ctx)
{
	return call_entered(ctx, DISABLE, NUMBER_OF(disable_at));
}

int set_entered(context *ctx)
{
	return call_entered(ctx, SET, NUMBER_OF(set_at));
}

int pass_entered(context *ctx)
{
	return call_entered(ctx, PASS, NUMBER_OF(pass_at));
}

static __always_inline int about_to_write(context *ctx)
{
	u32 index;
	struct vcpu *v = known_vcpu(pointer_argument(ctx), &index);

	if (v)
		settle(v);
	return 0;
}

/* What writes or frees a bitmap without a call, such as vmx_update_msr_bitmap_x2apic(vcpu). */
int writer_entered(context *ctx)
{
	return about_to_write(ctx);
}

int other_writer_entered(context *ctx)
{
	return about_to_write(ctx);
}

/*
 * For the reader, by BPF_PROG_TEST_RUN: count the call with the seq args[1] of the vCPU in slot args[0], if it has
 * returned: because args[2] says so, or if the vCPU left the guest between two looks, which no vCPU does in a call.
 * Whether it is still open.
 */
int settle_call(struct bpf_raw_tracepoint_args *ctx)
{
	u32 index = ctx->args[0], counter, flags;
	u64 seq = ctx->args[1], exits = 0, vcpu, before, after;
	struct vcpu *v = vcpus.lookup(&index);

	if (!v || *(volatile u64 *)&v->seq != seq)
		return false;
	if (!ctx->args[2]) {
		if (VALUE(exits_offset) && read_kernel(&exits, sizeof(exits), v->vcpu + VALUE(exits_offset)))
			return true;
		if (v->looked_at != seq || v->exits == exits) {
			v->looked_at = seq;
			v->exits = exits;
			return true;
		}
	}
	/* All of it is read before the number is changed: then none of it is the next call's. */
	counter = v->counter;
	flags = v->flags;
	before = v->before;
	vcpu = v->vcpu;
	after = bits_at(v->address, v->msr, flags);
	barrier();
	if (VALUE(claims)) {
		if (!claim(vcpu, seq)) /* settle() is at it, or it was counted here before */
			return false;
		if (*(volatile u64 *)&v->seq != seq && unclaim(vcpu, seq)) /* settle() has counted it */
			return false;
	} else if (__sync_val_compare_and_swap(&v->seq, seq, seq + 1) != seq) {
		return false;
	}
	count_call(&counter, flags, before, after);
	return false;
}

/* --- vCPUs, and the MSR filters of their VMs --- */

/* vmx_vcpu_create(vcpu): a vCPU starts out with the VM's current filter, and may have the address of a dead one. */
int vcpu_created(context *ctx)
{
	u64 vcpu = pointer_argument(ctx);
	u32 index;
	struct vcpu *v;

	v = known_vcpu(vcpu, &index);
	if (v) { /* one whose end was not seen */
		v->address = UNREADABLE;
		end_of(v, index);
	}
	v = slot_of(vcpu, &index);
	if (!v)
		return 0;
	if (!VALUE(update_kind))
		v->filter = filter_of(vcpu);
	if (creations_are_followed()) {
		v->creating = INSIDE(CREATION);
		v->uncomputed = 1;
	}
	return 0;
}

/* kvm_arch_vcpu_postcreate(vcpu), arch/x86/kvm/x86.c: the vCPU is there. Where its creation fails, this is not called. */
int creation_ended(context *ctx)
{
	u32 index;
	struct vcpu *v = known_vcpu(pointer_argument(ctx), &index);

	if (v && v->creating) {
		v->creating = 0;
		COUNT(vcpus_created);
	}
	return 0;
}

/* vmx_vcpu_free(vcpu): its bitmap is still there. */
int vcpu_freed(context *ctx)
{
	u32 index;
	struct vcpu *v = known_vcpu(pointer_argument(ctx), &index);

	if (v)
		end_of(v, index);
	return 0;
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

/* --- the function that recomputes a vCPU's bitmap --- */

int update_entered(context *ctx)
{
	u64 vcpu = pointer_argument(ctx), kind;
	u32 index, place;
	struct update *update;
	struct vcpu *v;
	u8 byte;

	v = slot_of(vcpu, &index);
	if (!v)
		return 0;
	settle(v);
	if (v->inside)
		COUNT(unpaired_update);
	kind = kind_of_update(v, vcpu);
	v->inside = INSIDE(kind);
	v->bitmap = bitmap_of(vcpu);
	if (VALUE(cast_type) && !read_kernel(&byte, 1, v->bitmap)) /* a page: then all of it can be read */
		v->inside |= DIRECT;
	note_thread(v);
	/*
	 * It counts from here on. A return may not be seen: the kernel has a number of places, by CPUs, for all threads that
	 * are in a function with a kretprobe (struct kretprobe.maxactive), and threads that are preempted there keep theirs.
	 */
	place = find_update(v->vmm, kind);
	v->update = place;
	update = updates.lookup(&place);
	if (update)
		__sync_fetch_and_add(&update->count, 1);
	else
		COUNT(dropped_updates);
#ifndef FENTRY
	thread_updates(v->tid, index);
#endif
	v->started = bpf_ktime_get_ns();
	return 0;
}

int update_returned(context *ctx)
{
	u64 now = bpf_ktime_get_ns(), spent;
	u32 bucket, index = 0;
	struct update *update;
	struct vcpu *v;

#ifdef FENTRY
	v = known_vcpu(pointer_argument(ctx), &index);
#else
	u32 tid = bpf_get_current_pid_tgid();

	v = updated_by(tid);
	if (v && v->tid != tid)
		v = NULL;
#endif
	if (!v || !v->inside) {
		if (wanted())
			COUNT(unpaired_return);
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

/* The counter in place args[0] is of a process that has ended: add it to that of all those, and free its place. */
int counter_ended(struct bpf_raw_tracepoint_args *ctx)
{
	u32 index = ctx->args[0], other;
	struct counter *from = counters.lookup(&index), *to;

	if (!from || !from->key || !from->vmm)
		return 0;
	other = find_counter(from->key, from->site, from->caller, 0);
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
	from->key = 0;
	barrier();
	give_back(COUNTERS, index);
	return 0;
}

/* The same of updates. */
int update_ended(struct bpf_raw_tracepoint_args *ctx)
{
	u32 index = ctx->args[0], other;
	struct update *from = updates.lookup(&index), *to;

	if (!from || from->kind == NONE || !from->vmm)
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
