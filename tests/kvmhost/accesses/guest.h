// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What the VMM (accesses.c, nested.c) and the guest (guest.S) share: the memory of a vCPU, at the same address in both
 * of its levels.
 */
#ifndef GUEST_H
#define GUEST_H

/* `out` to these ports ends a KVM_RUN. */
#define PORT_DONE 0x10 /* the list was executed */
#define PORT_IN_L2 0x11 /* from L2, which L1 lets reach L0 */
#define PORT_UNEXPECTED 0x12 /* %eax: an exit of L2, or an exception, that should not have been */
#define UNEXPECTED_GP 0x1000 /* #GP where no MSR is accessed */
#define UNEXPECTED_VMX 0x2000 /* a VMX instruction failed; with its error number, if there is one */

#define CODE_SELECTOR 0x08
#define DATA_SELECTOR 0x10
#define TSS_SELECTOR 0x18

/* struct op */
#define OP_LEVEL 0x00
#define OP_WRITE 0x04
#define OP_MSR 0x08
#define OP_COUNT 0x10
#define OP_VALUE 0x18
#define OP_EXECUTED 0x20
#define OP_COMPLETED 0x28
#define OP_GP 0x30
#define OP_REFLECTED 0x38
#define OP_SIZE 0x40

/* struct control */
#define CONTROL_N_OPS 0x00
#define CONTROL_CURRENT 0x08
#define CONTROL_STAY 0x10
#define CONTROL_VMCB 0x18
#define CONTROL_VMXON 0x20
#define CONTROL_VMCS 0x28
#define CONTROL_FIELDS 0x30
#define CONTROL_N_FIELDS 0x38
#define CONTROL_LAUNCHED 0x40
#define CONTROL_OPS 0x48

/* Of AMD's VMCB: APM vol. 2, appendix B. */
#define VMCB_EXIT_CODE 0x70
#define VMCB_RIP 0x578
#define SVM_EXIT_HLT 0x78
#define SVM_EXIT_MSR 0x7c
/* Of Intel's VMCS: SDM vol. 3, appendices B and C. */
#define VMCS_INSTRUCTION_ERROR 0x4400
#define VMCS_EXIT_REASON 0x4402
#define VMCS_GUEST_RIP 0x681e
#define VMCS_HOST_RSP 0x6c14
#define VMX_EXIT_HLT 12
#define VMX_EXIT_RDMSR 31
#define VMX_EXIT_WRMSR 32

#ifndef __ASSEMBLER__
#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 0x1000
#define MAX_OPS 64
#define MAX_FIELDS 96

/* An operation, and what became of it: executed = completed + gp + reflected. */
struct op {
	uint32_t level, write, msr, unused;
	uint64_t count, value;
	uint64_t executed; /* so often it was tried */
	uint64_t completed, gp;
	uint64_t reflected; /* exits of L2 that L1 got, and skipped */
};

/* What the guest is to do: %r15. */
struct control {
	uint64_t n_ops;
	uint64_t current; /* the address of the op that is being executed */
	uint64_t stay; /* run on, into L2 for good */
	uint64_t vmcb; /* addresses; SVM: the VMCB, or 0 */
	uint64_t vmxon, vmcs; /* VMX: the VMXON region, or 0; the VMCS */
	uint64_t fields, n_fields; /* struct vmcs_field[], which L1 writes into the VMCS */
	uint64_t launched;
	struct op ops[MAX_OPS];
};

struct vmcs_field {
	uint64_t field, value;
};

/* The memory of a vCPU. Each member begins a page, but for the tables. */
struct guest {
	uint8_t code[PAGE];
	uint64_t level4[512], level3[512], level2[512]; /* the first GiB, each address where it is */
	struct {
		uint64_t gdt[5];
		uint64_t idt[14][2];
		uint32_t tss[26];
	} __attribute__((aligned(PAGE))) tables;
	struct control control __attribute__((aligned(PAGE)));
	struct vmcs_field fields[MAX_FIELDS] __attribute__((aligned(PAGE)));
	uint8_t stacks[2][PAGE] __attribute__((aligned(PAGE))); /* of L1, of L2 */
	uint8_t nested[PAGE]; /* the VMCB or the VMCS */
	uint8_t host[PAGE]; /* where the CPU saves L1's state (SVM), or the VMXON region */
	uint8_t msr_bitmap[2 * PAGE]; /* L1's for L2; VMX has one page */
} __attribute__((aligned(PAGE)));

static_assert(offsetof(struct op, level) == OP_LEVEL && offsetof(struct op, write) == OP_WRITE, "struct op");
static_assert(offsetof(struct op, msr) == OP_MSR && offsetof(struct op, count) == OP_COUNT, "struct op");
static_assert(offsetof(struct op, value) == OP_VALUE && offsetof(struct op, executed) == OP_EXECUTED, "struct op");
static_assert(offsetof(struct op, completed) == OP_COMPLETED && offsetof(struct op, gp) == OP_GP, "struct op");
static_assert(offsetof(struct op, reflected) == OP_REFLECTED && sizeof(struct op) == OP_SIZE, "struct op");
static_assert(offsetof(struct control, n_ops) == CONTROL_N_OPS, "struct control");
static_assert(offsetof(struct control, current) == CONTROL_CURRENT, "struct control");
static_assert(offsetof(struct control, stay) == CONTROL_STAY, "struct control");
static_assert(offsetof(struct control, vmcb) == CONTROL_VMCB, "struct control");
static_assert(offsetof(struct control, vmxon) == CONTROL_VMXON, "struct control");
static_assert(offsetof(struct control, vmcs) == CONTROL_VMCS, "struct control");
static_assert(offsetof(struct control, fields) == CONTROL_FIELDS, "struct control");
static_assert(offsetof(struct control, n_fields) == CONTROL_N_FIELDS, "struct control");
static_assert(offsetof(struct control, launched) == CONTROL_LAUNCHED, "struct control");
static_assert(offsetof(struct control, ops) == CONTROL_OPS, "struct control");

/* guest.S: what is copied to struct guest's code, and what lies within. */
extern const uint8_t guest_code[], guest_code_end[];
extern const uint8_t guest_l2[], guest_gp[], guest_vmx_exit[];

#define CR0 0x80010033ULL /* PG, WP, NE, ET, MP, PE */
#define CR4 0x20ULL /* PAE */
#define CR4_VMXE 0x2000ULL
#define EFER 0x500ULL /* LMA, LME */
#define EFER_SVME 0x1000ULL

/* Where MEMBER of a vCPU's memory at BASE is for the guest. */
#define ADDRESS(base, member) ((base) + offsetof(struct guest, member))
/* Where a label of guest.S is for the guest. */
#define LABEL(base, label) ((base) + (uint64_t)((label) - guest_code))

/* nested.c: what L1 needs to run L2, but for control registers. BASE is where GUEST is for the guest. MSR_BITMAP: L1 has one. */
void prepare_vmcb(struct guest *guest, uint64_t base, bool msr_bitmap);
/* CAPABILITIES: the vCPU's MSRs from 0x480 (VMX_BASIC) to 0x490. */
void prepare_vmcs(struct guest *guest, uint64_t base, const uint64_t *capabilities, bool msr_bitmap);
/* L1 intercepts MSR, which has a bit, in both directions. Returns whether it has one. */
bool reflect_svm(struct guest *guest, uint32_t msr);
bool reflect_vmx(struct guest *guest, uint32_t msr);
#endif
#endif
