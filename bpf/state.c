// SPDX-License-Identifier: GPL-2.0-only
/*
 * What every vCPU intercepts now: an iterator over the files of all processes (bpf_iter_task_file, kernel/bpf/task_iter.c)
 * writes a record for each descriptor of a vCPU. Nothing is remembered, so the kernel may show a file again.
 *
 * Holding the file keeps the vCPU and its VM: all pointers from there stay valid. A VM's filter is replaced, and freed
 * after a grace period of kvm->srcu; if the pointer is the same afterwards, the copy is whole
 * (kvm_vm_ioctl_set_msr_filter(), arch/x86/kvm/x86.c, 7.3: msrs.c).
 *
 * The bitmaps for nested guests have an iterator of their own: what is written of one file must not exceed eight pages
 * (bpf_seq_read(), kernel/bpf/bpf_iter.c). They are freed when the guest ends its use of VMX or SVM; if the pointer is
 * the same afterwards, they were not, but for one that was freed and made again in between.
 */
#include <uapi/linux/ptrace.h>

/* As in values.h. An offset is from the start of the struct that its name begins with; 0: it is not known. */
struct values {
	u64 vcpu_release; /* the address of kvm_vcpu_release() */
	u64 file_f_op;
	u64 file_operations_release;
	u64 file_private_data;
	u64 task_tgid;
	u64 task_mm;
	u64 vcpu_kvm; /* the first member: 0 is its offset */
	u64 vcpu_vcpu_id;
	u64 vcpu_requests;
	u64 vcpu_exits; /* stat.exits */
	u64 vcpu_bitmap; /* its address: vmcs01.msr_bitmap of struct vcpu_vmx, msrpm of struct vcpu_svm */
	u64 vcpu_shadow; /* shadow_msr_intercept, two words */
	u64 kvm_mm;
	u64 kvm_filter; /* arch.msr_filter */
	u64 kvm_vm_type; /* arch.vm_type */
	u64 kvm_srcu; /* where the sequence numbers of its grace periods are, or (srcu_pointer) the address of that */
	u64 srcu_pointer;
	u64 srcu_gp_seq; /* from there */
	u64 srcu_gp_seq_needed;
	u64 bitmap_bytes;
	u64 no_bitmap; /* the arch.vm_type of VMs whose vCPUs have none there; 0: there are none */
	/* As struct NestedBitmap of tracer/model/vendor.py says. */
	u64 nested_made;
	u64 nested_bitmap;
	u64 nested_changed;
	u64 nested_in_use;
	u64 nested_own;
	u64 nested_inside;
	u64 vcpu_guest_mode; /* stat.guest_mode: it is in a nested guest */
};
#include "value.h"

#define RANGES 16 /* KVM_MSR_FILTER_MAX_RANGES */
#define RANGE_BYTES 1536 /* KVM_MSR_FILTER_MAX_BITMAP_SIZE */
#define BITMAP_BYTES 6144 /* SVM's; VMX's has 4096 */

/* What could not be read. */
#define BITMAP_FAILED 1
#define FILTER_FAILED 2

/* What a read begins with; the bitmap follows (bitmap_bytes), and what each range of the filter allows (range_bytes). */
struct record {
	u64 vcpu;
	u64 kvm;
	u64 owned; /* the process is the one that made the VM: KVM lets no other run it */
	u64 bitmap; /* addresses */
	u64 filter;
	u64 filter_after; /* as `filter`, read last */
	u64 requests;
	u64 exits;
	u64 gp_seq;
	u64 gp_seq_needed;
	u64 shadow_read;
	u64 shadow_write;
	u64 nested; /* not 0: it has a bitmap for nested guests */
	u32 tgid;
	u32 fd;
	u32 vcpu_id;
	u32 failed;
	u32 vm_type;
	u32 bitmap_bytes;
	u32 default_allow;
	u32 ranges; /* how many */
	u32 range_flags[RANGES];
	u32 range_base[RANGES];
	u32 range_nmsrs[RANGES];
	u32 range_bytes[RANGES];
};
BPF_ARRAY(records, struct record, 1);

/* What a read of a bitmap for nested guests begins with; the bitmap follows (bitmap_bytes). */
struct nested_record {
	u64 vcpu;
	u64 nested; /* as in struct record */
	u64 nested_after; /* as `nested`, read last */
	u64 in_use;
	u64 own;
	u64 guest_mode;
	u32 changed;
	u32 failed;
	u32 bitmap_bytes;
	u32 unused;
};
BPF_ARRAY(nested_records, struct nested_record, 1);

/* struct msr_bitmap_range and struct kvm_x86_msr_filter, the same from 5.10 to 7.3 */
struct msr_range {
	u32 flags;
	u32 nmsrs;
	u32 base;
	u32 unused;
	u64 bitmap;
};
struct msr_filter {
	u8 count;
	u8 default_allow; /* one bit */
	u8 unused[6];
	struct msr_range ranges[RANGES];
};

struct copies {
	struct msr_filter filter;
	u8 bitmap[BITMAP_BYTES];
	u8 ranges[RANGES * RANGE_BYTES];
};
/* As words, since BCC can describe that. Readers have it in their memory, for copy_memory(). */
#define COPIES_WORDS 3889
struct words {
	u64 words[COPIES_WORDS];
};
_Static_assert(sizeof(struct words) == sizeof(struct copies), "COPIES_WORDS");
BPF_F_TABLE("array", u32, struct words, copies, 1, BPF_F_MMAPABLE);

#define barrier() asm volatile("" ::: "memory")

static long (*read_kernel)(void *to, u64 size, u64 from) = (void *)BPF_FUNC_probe_read_kernel;
static long (*seq_write)(u64 seq, const void *data, u64 size) = (void *)127; /* 5.10 */

static __always_inline u64 word_at(u64 address)
{
	u64 word = 0;

	read_kernel(&word, sizeof(word), address);
	return word;
}

static __always_inline u32 half_at(u64 address)
{
	u32 half = 0;

	read_kernel(&half, sizeof(half), address);
	return half;
}

/* Copy the filter of R; what its ranges allow goes behind each other. */
static __always_inline void copy_filter(struct record *r, struct copies *to)
{
	r->ranges = 0;
	r->default_allow = 1; /* as kvm_msr_allowed() has it without a filter */
	if (!r->filter)
		return;
	if (read_kernel(&to->filter, sizeof(to->filter), r->filter)) {
		r->failed |= FILTER_FAILED;
		return;
	}
	r->default_allow = to->filter.default_allow & 1;
	r->ranges = to->filter.count;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < RANGES; i++) {
		struct msr_range *range = &to->filter.ranges[i];
		u64 size = ((u64)range->nmsrs + 63) / 64 * 8; /* whole words, as allocated */

		if (i >= to->filter.count)
			break;
		if (size > RANGE_BYTES || read_kernel(to->ranges + i * RANGE_BYTES, size, range->bitmap)) {
			r->failed |= FILTER_FAILED;
			size = 0;
		}
		r->range_flags[i] = range->flags;
		r->range_base[i] = range->base;
		r->range_nmsrs[i] = range->nmsrs;
		r->range_bytes[i] = size;
	}
}

/* The vCPU whose file it is; 0: it is another file. */
static __always_inline u64 vcpu_of(u64 file)
{
	if (word_at(word_at(file + VALUE(file_f_op)) + VALUE(file_operations_release)) != VALUE(vcpu_release))
		return 0;
	return word_at(file + VALUE(file_private_data));
}

static __always_inline u32 vm_type_of(u64 kvm)
{
	u32 type = 0;

	if (VALUE(kvm_vm_type))
		read_kernel(&type, 1, kvm + VALUE(kvm_vm_type));
	return type;
}

/* Whether vCPUs of VMs of this type have bitmaps. */
static __always_inline int has_bitmaps(u32 vm_type)
{
	return !(VALUE(no_bitmap) && vm_type == VALUE(no_bitmap));
}

/* Copy a bitmap; how many bytes it has, 0 if there is none or it cannot be read. */
static __always_inline u32 copy_bitmap(u64 from, struct copies *to, u32 *failed)
{
	u32 bytes = 4096;

	if (VALUE(bitmap_bytes) == BITMAP_BYTES)
		bytes = BITMAP_BYTES;
	if (!from)
		return 0; /* this CPU has none: everything exits */
	if (read_kernel(to->bitmap, bytes, from)) {
		*failed |= BITMAP_FAILED;
		return 0;
	}
	return bytes;
}

/* Of the members of struct bpf_iter__task_file, each in 8 bytes: meta, task, fd, file. A macro: META must be a pointer. */
#define SEQ_OF(meta) ({ \
	u64 seq; \
	asm volatile("%0 = *(u64 *)(%1 + 0)" : "=r"(seq) : "r"(meta)); /* BCC would make it a call, which gives no pointer */ \
	seq; \
})

int file_listed(u64 *ctx)
{
	u64 meta = ctx[0], task = ctx[1], file = ctx[3], srcu, seq;
	u32 zero = 0, bytes = 0;
	struct record *r = records.lookup(&zero);
	struct copies *to = (struct copies *)copies.lookup(&zero);

	if (!r || !to || !task || !file)
		return 0;
	r->vcpu = vcpu_of(file);
	if (!r->vcpu)
		return 0;
	r->failed = 0;
	r->fd = ctx[2];
	r->tgid = half_at(task + VALUE(task_tgid));
	r->kvm = word_at(r->vcpu + VALUE(vcpu_kvm));
	r->owned = word_at(task + VALUE(task_mm)) == word_at(r->kvm + VALUE(kvm_mm));
	r->vcpu_id = half_at(r->vcpu + VALUE(vcpu_vcpu_id));
	r->exits = VALUE(vcpu_exits) ? word_at(r->vcpu + VALUE(vcpu_exits)) : 0;
	r->vm_type = vm_type_of(r->kvm);

	/* What KVM makes of the filter before the filter: what is newer than the filter says so at the end. */
	r->bitmap = r->nested = 0;
	if (VALUE(vcpu_bitmap) && has_bitmaps(r->vm_type)) {
		r->bitmap = word_at(r->vcpu + VALUE(vcpu_bitmap));
		bytes = copy_bitmap(r->bitmap, to, &r->failed);
		if (VALUE(nested_made))
			r->nested = word_at(r->vcpu + VALUE(nested_made));
	}
	r->bitmap_bytes = bytes;
	r->shadow_read = r->shadow_write = 0;
	if (VALUE(vcpu_shadow)) {
		r->shadow_read = word_at(r->vcpu + VALUE(vcpu_shadow));
		r->shadow_write = word_at(r->vcpu + VALUE(vcpu_shadow) + sizeof(u64));
	}
	barrier();
	r->filter = word_at(r->kvm + VALUE(kvm_filter));
	copy_filter(r, to);
	barrier();
	r->gp_seq = r->gp_seq_needed = 0;
	if (VALUE(kvm_srcu)) {
		srcu = r->kvm + VALUE(kvm_srcu);
		if (VALUE(srcu_pointer))
			srcu = word_at(srcu);
		r->gp_seq_needed = word_at(srcu + VALUE(srcu_gp_seq_needed));
		r->gp_seq = word_at(srcu + VALUE(srcu_gp_seq));
	}
	r->requests = word_at(r->vcpu + VALUE(vcpu_requests));
	barrier();
	r->filter_after = word_at(r->kvm + VALUE(kvm_filter));

	seq = SEQ_OF(meta);
	seq_write(seq, r, sizeof(*r));
	if (bytes)
		seq_write(seq, to->bitmap, bytes);
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < RANGES; i++) {
		u32 size = r->range_bytes[i];

		if (i >= r->ranges || size > RANGE_BYTES)
			break;
		seq_write(seq, to->ranges + i * RANGE_BYTES, size);
	}
	return 0;
}

/* The bitmaps for nested guests, of vCPUs that have one. */
int nested_listed(u64 *ctx)
{
	u64 meta = ctx[0], task = ctx[1], file = ctx[3], in_use, own, seq;
	u32 zero = 0, bytes;
	struct nested_record *r = nested_records.lookup(&zero);
	struct copies *to = (struct copies *)copies.lookup(&zero);

	if (!r || !to || !task || !file)
		return 0;
	r->vcpu = vcpu_of(file);
	if (!r->vcpu || !has_bitmaps(vm_type_of(word_at(r->vcpu + VALUE(vcpu_kvm)))))
		return 0;
	r->nested = word_at(r->vcpu + VALUE(nested_made));
	if (!r->nested)
		return 0;
	r->failed = r->changed = r->unused = 0;
	r->guest_mode = VALUE(vcpu_guest_mode) ? word_at(r->vcpu + VALUE(vcpu_guest_mode)) : 0;
	if (VALUE(nested_changed))
		read_kernel(&r->changed, 1, r->vcpu + VALUE(nested_changed));
	in_use = r->vcpu + VALUE(nested_in_use);
	own = r->vcpu + VALUE(nested_own);
	if (VALUE(nested_inside)) {
		in_use = word_at(in_use) + VALUE(nested_inside);
		own = word_at(own) + VALUE(nested_inside);
	}
	r->in_use = word_at(in_use);
	r->own = VALUE(nested_own) ? word_at(own) : 0;
	barrier();
	bytes = copy_bitmap(word_at(r->vcpu + VALUE(nested_bitmap)), to, &r->failed);
	r->bitmap_bytes = bytes;
	barrier();
	r->nested_after = word_at(r->vcpu + VALUE(nested_made));

	seq = SEQ_OF(meta);
	seq_write(seq, r, sizeof(*r));
	if (bytes)
		seq_write(seq, to->bitmap, bytes);
	return 0;
}

/*
 * For the reader, by BPF_PROG_TEST_RUN: copy args[1] bytes from the address args[0] to the start of `copies`; whether that
 * failed.
 */
int copy_memory(struct bpf_raw_tracepoint_args *ctx)
{
	u64 from = ctx->args[0], size = ctx->args[1];
	u32 zero = 0;
	struct words *to = copies.lookup(&zero);

	if (!to || size > BITMAP_BYTES)
		return 1;
	return read_kernel(to, size, from) != 0;
}
