// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What L1 runs L2 with: a VMCB (SVM), or the values of a VMCS (VMX), in which L2 has L1's own registers and tables.
 * All that need not be intercepted is not, but for HLT, which ends L2's turn, and the MSRs that L1 is to intercept.
 */
#include <string.h>

#include "guest.h"

#define CODE_ACCESS 0xa09b /* G, L, present, code, accessed: as in the VMCS */
#define DATA_ACCESS 0xc093
#define TSS_ACCESS 0x008b
#define UNUSABLE 0x10000
#define LIMIT 0xffffffff

#define DR6_RESET 0xffff0ff0
#define DR7_RESET 0x400
#define RFLAGS_RESET 2

/* AMD's VMCB: APM vol. 2, appendix B. */
enum {
	VMCB_INTERCEPT_MISC1 = 0x00c,
	VMCB_INTERCEPT_MISC2 = 0x010,
	VMCB_MSRPM = 0x048,
	VMCB_ASID = 0x058,
	VMCB_ES = 0x400,
	VMCB_CS = 0x410,
	VMCB_SS = 0x420,
	VMCB_DS = 0x430,
	VMCB_GDTR = 0x460,
	VMCB_IDTR = 0x480,
	VMCB_EFER = 0x4d0,
	VMCB_CR4 = 0x548,
	VMCB_CR3 = 0x550,
	VMCB_CR0 = 0x558,
	VMCB_DR7 = 0x560,
	VMCB_DR6 = 0x568,
	VMCB_RFLAGS = 0x570,
	VMCB_RSP = 0x5d8,

	MISC1_HLT = 1 << 24,
	MISC1_MSR = 1 << 28,
	MISC2_VMRUN = 1, /* without it VMRUN fails */
};

static void put32(struct guest *guest, unsigned int at, uint32_t value)
{
	memcpy(guest->nested + at, &value, sizeof(value));
}

static void put64(struct guest *guest, unsigned int at, uint64_t value)
{
	memcpy(guest->nested + at, &value, sizeof(value));
}

static void put_segment(struct guest *guest, unsigned int at, uint16_t selector, uint16_t access, uint32_t limit,
			uint64_t base)
{
	uint16_t attributes = (access & 0xff) | ((access >> 4) & 0xf00);

	put32(guest, at, selector | (uint32_t)attributes << 16);
	put32(guest, at + 4, limit);
	put64(guest, at + 8, base);
}

void prepare_vmcb(struct guest *guest, uint64_t base, bool msr_bitmap)
{
	guest->control.vmcb = ADDRESS(base, nested);
	put32(guest, VMCB_INTERCEPT_MISC1, MISC1_HLT | (msr_bitmap ? MISC1_MSR : 0));
	put32(guest, VMCB_INTERCEPT_MISC2, MISC2_VMRUN);
	put64(guest, VMCB_MSRPM, ADDRESS(base, msr_bitmap));
	put32(guest, VMCB_ASID, 1);
	put_segment(guest, VMCB_CS, CODE_SELECTOR, CODE_ACCESS, LIMIT, 0);
	put_segment(guest, VMCB_SS, DATA_SELECTOR, DATA_ACCESS, LIMIT, 0);
	put_segment(guest, VMCB_DS, DATA_SELECTOR, DATA_ACCESS, LIMIT, 0);
	put_segment(guest, VMCB_ES, DATA_SELECTOR, DATA_ACCESS, LIMIT, 0);
	put_segment(guest, VMCB_GDTR, 0, 0, sizeof(guest->tables.gdt) - 1, ADDRESS(base, tables.gdt));
	put_segment(guest, VMCB_IDTR, 0, 0, sizeof(guest->tables.idt) - 1, ADDRESS(base, tables.idt));
	put64(guest, VMCB_EFER, EFER | EFER_SVME); /* VMRUN demands SVME of L2, too */
	put64(guest, VMCB_CR0, CR0);
	put64(guest, VMCB_CR3, ADDRESS(base, level4));
	put64(guest, VMCB_CR4, CR4);
	put64(guest, VMCB_DR6, DR6_RESET);
	put64(guest, VMCB_DR7, DR7_RESET);
	put64(guest, VMCB_RFLAGS, RFLAGS_RESET);
	put64(guest, VMCB_RSP, ADDRESS(base, stacks[2]));
}

/* Intel's VMCS: SDM vol. 3, appendix B. */
enum {
	GUEST_SELECTORS = 0x0800, /* ES, CS, SS, DS, FS, GS, LDTR, TR: each two further */
	HOST_SELECTORS = 0x0c00, /* the same without LDTR */
	MSR_BITMAP = 0x2004,
	LINK_POINTER = 0x2800,
	PIN_CONTROLS = 0x4000,
	PROCESSOR_CONTROLS = 0x4002,
	EXIT_CONTROLS = 0x400c,
	ENTRY_CONTROLS = 0x4012,
	GUEST_LIMITS = 0x4800, /* as the selectors; then GDTR, IDTR */
	GUEST_ACCESS = 0x4814,
	GUEST_CR0 = 0x6800,
	GUEST_CR3 = 0x6802,
	GUEST_CR4 = 0x6804,
	GUEST_BASES = 0x6806, /* as the limits */
	GUEST_DR7 = 0x681a,
	GUEST_RSP = 0x681c,
	GUEST_RFLAGS = 0x6820,
	HOST_CR0 = 0x6c00,
	HOST_CR3 = 0x6c02,
	HOST_CR4 = 0x6c04,
	HOST_FS_BASE = 0x6c06,
	HOST_GS_BASE = 0x6c08,
	HOST_TR_BASE = 0x6c0a,
	HOST_GDTR_BASE = 0x6c0c,
	HOST_IDTR_BASE = 0x6c0e,
	HOST_RIP = 0x6c16,

	ES = 0, CS = 2, SS = 4, DS = 6, FS = 8, GS = 10, LDTR = 12, TR = 14, GDTR = 16, IDTR = 18,

	PROCESSOR_HLT = 1 << 7,
	PROCESSOR_MSR_BITMAPS = 1 << 28,
	EXIT_TO_64_BIT = 1 << 9,
	ENTER_64_BIT = 1 << 9,

	/* Places in `capabilities`: MSRs less 0x480. */
	VMX_BASIC = 0,
	TRUE_PIN = 0xd,
	TRUE_PROCESSOR = 0xe,
	TRUE_EXIT = 0xf,
	TRUE_ENTRY = 0x10,
};

static void add(struct guest *guest, unsigned int field, uint64_t value)
{
	guest->fields[guest->control.n_fields++] = (struct vmcs_field){ field, value };
}

/* A control's bits: the low half of its capability must be set, and no others than the high half may be. */
static uint32_t control(uint32_t wanted, uint64_t capability)
{
	return (wanted | (uint32_t)capability) & (uint32_t)(capability >> 32);
}

static void add_segment(struct guest *guest, unsigned int which, uint16_t selector, uint32_t access, uint32_t limit,
			uint64_t base)
{
	add(guest, GUEST_SELECTORS + which, selector);
	add(guest, GUEST_LIMITS + which, limit);
	add(guest, GUEST_ACCESS + which, access);
	add(guest, GUEST_BASES + which, base);
}

static void add_l2(struct guest *guest, uint64_t base)
{
	add(guest, LINK_POINTER, ~0ULL); /* none */
	add_segment(guest, CS, CODE_SELECTOR, CODE_ACCESS, LIMIT, 0);
	add_segment(guest, SS, DATA_SELECTOR, DATA_ACCESS, LIMIT, 0);
	for (unsigned int which = DS; which <= GS; which += 2)
		add_segment(guest, which, DATA_SELECTOR, DATA_ACCESS, LIMIT, 0);
	add_segment(guest, ES, DATA_SELECTOR, DATA_ACCESS, LIMIT, 0);
	add_segment(guest, LDTR, 0, UNUSABLE, 0, 0);
	add_segment(guest, TR, TSS_SELECTOR, TSS_ACCESS, sizeof(guest->tables.tss) - 1, ADDRESS(base, tables.tss));
	add(guest, GUEST_LIMITS + GDTR, sizeof(guest->tables.gdt) - 1);
	add(guest, GUEST_BASES + GDTR, ADDRESS(base, tables.gdt));
	add(guest, GUEST_LIMITS + IDTR, sizeof(guest->tables.idt) - 1);
	add(guest, GUEST_BASES + IDTR, ADDRESS(base, tables.idt));
	add(guest, GUEST_CR0, CR0);
	add(guest, GUEST_CR3, ADDRESS(base, level4));
	add(guest, GUEST_CR4, CR4 | CR4_VMXE);
	add(guest, GUEST_DR7, DR7_RESET);
	add(guest, GUEST_RSP, ADDRESS(base, stacks[2]));
	add(guest, GUEST_RFLAGS, RFLAGS_RESET);
}

static void add_l1(struct guest *guest, uint64_t base)
{
	add(guest, HOST_SELECTORS + CS, CODE_SELECTOR);
	add(guest, HOST_SELECTORS + SS, DATA_SELECTOR);
	for (unsigned int which = DS; which <= GS; which += 2)
		add(guest, HOST_SELECTORS + which, DATA_SELECTOR);
	add(guest, HOST_SELECTORS + ES, DATA_SELECTOR);
	add(guest, HOST_SELECTORS + LDTR, TSS_SELECTOR); /* where TR's would be: there is no LDTR */
	add(guest, HOST_CR0, CR0);
	add(guest, HOST_CR3, ADDRESS(base, level4));
	add(guest, HOST_CR4, CR4 | CR4_VMXE);
	add(guest, HOST_FS_BASE, 0);
	add(guest, HOST_GS_BASE, 0);
	add(guest, HOST_TR_BASE, ADDRESS(base, tables.tss));
	add(guest, HOST_GDTR_BASE, ADDRESS(base, tables.gdt));
	add(guest, HOST_IDTR_BASE, ADDRESS(base, tables.idt));
	add(guest, HOST_RIP, LABEL(base, guest_vmx_exit));
}

void prepare_vmcs(struct guest *guest, uint64_t base, const uint64_t *capabilities, bool msr_bitmap)
{
	uint32_t processor = PROCESSOR_HLT | (msr_bitmap ? PROCESSOR_MSR_BITMAPS : 0);
	uint32_t revision = capabilities[VMX_BASIC] & 0x7fffffff;

	guest->control.vmcs = ADDRESS(base, nested);
	guest->control.vmxon = ADDRESS(base, host);
	guest->control.fields = ADDRESS(base, fields);
	memcpy(guest->nested, &revision, sizeof(revision));
	memcpy(guest->host, &revision, sizeof(revision));
	add(guest, PIN_CONTROLS, control(0, capabilities[TRUE_PIN]));
	add(guest, PROCESSOR_CONTROLS, control(processor, capabilities[TRUE_PROCESSOR]));
	add(guest, EXIT_CONTROLS, control(EXIT_TO_64_BIT, capabilities[TRUE_EXIT]));
	add(guest, ENTRY_CONTROLS, control(ENTER_64_BIT, capabilities[TRUE_ENTRY]));
	add(guest, MSR_BITMAP, ADDRESS(base, msr_bitmap));
	add_l2(guest, base);
	add_l1(guest, base);
}

bool reflect_svm(struct guest *guest, uint32_t msr)
{
	static const uint32_t ranges[] = { 0, 0xc0000000, 0xc0010000 };

	for (int i = 0; i < 3; i++)
		if (msr - ranges[i] < 0x2000) {
			guest->msr_bitmap[i * 0x800 + (msr - ranges[i]) / 4] |= 3 << (msr & 3) * 2;
			return true;
		}
	return false;
}

bool reflect_vmx(struct guest *guest, uint32_t msr)
{
	static const uint32_t ranges[] = { 0, 0xc0000000 };

	for (int i = 0; i < 2; i++)
		if (msr - ranges[i] < 0x2000) {
			for (int write = 0; write < 2; write++)
				guest->msr_bitmap[write * 0x800 + i * 0x400 + (msr - ranges[i]) / 8] |= 1 << (msr & 7);
			return true;
		}
	return false;
}
