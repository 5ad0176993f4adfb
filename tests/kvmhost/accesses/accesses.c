// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * accesses: let a guest of KVM execute a known number of RDMSR and WRMSR, by the plain KVM API.
 * Tests run it on a host of either vendor and compare the exits that were counted with what the guest itself counted.
 *
 *     gcc -O2 -Wall -Wextra -Werror -static -pthread -o accesses accesses.c nested.c guest.S
 *
 * The guest (guest.S) is in 64-bit mode with interrupts off. It executes a list of operations, in the order of the
 * options, and no other RDMSR or WRMSR; what it needs of MSRs is set by KVM_SET_SREGS and KVM_SET_MSRS, before it runs.
 * Each vCPU has a list of its own, and the CPUID that KVM supports. Needs nothing that Linux 5.10 lacks.
 *
 *   --read MSR=COUNT, --write MSR=COUNT[:VALUE]
 *                   COUNT accesses by the guest, L1. VALUE: by default what KVM_GET_MSRS gives, or 0 where that knows
 *                   no such MSR.
 *   --l2-read ..., --l2-write ...
 *                   The same by a guest of the guest, L2, which L1 enters for each of these operations. L1 does not
 *                   intercept them: what exits does so for L0, which resumes L2. But to L1, too, an MSR without a bit
 *                   in the bitmap always exits: those are reflected.
 *   --reflect MSR   L1 does intercept it, reads and writes: KVM reflects L2's exit to L1, which counts and skips it.
 *   --deny MSR, --deny-read MSR, --deny-write MSR
 *                   A filter (KVM_X86_SET_MSR_FILTER) denies it; all others are allowed.
 *   --to-user filter,unknown,invalid
 *                   Which refused accesses end KVM_RUN (KVM_CAP_X86_USER_SPACE_MSR). They are counted and completed:
 *                   reads give 0. --user-error: with an error, so the guest gets #GP.
 *   --irqchip       An in-kernel irqchip, with each APIC in x2APIC mode: for MSRs 0x800 ... and TSC_DEADLINE (0x6e0).
 *
 *   --vms N (1) of --vcpus N (1)
 *                   Each vCPU executes the whole list. --threads: a thread per vCPU, pinned to the allowed CPUs in turn.
 *   --ready FILE    is created when the VMs exist; then --go FILE is waited for (looked for every 10 ms).
 *   --rounds N (1)  The list again and again, or --forever until SIGINT or SIGTERM; --interval MS apart.
 *   --stay-in-l2    After the last round each vCPU enters L2 once more and does not come back: an `out` of L2, which L1
 *                   does not intercept, ends KVM_RUN, and the vCPU stays as it is (at the end KVM is asked).
 *   --done FILE     is created then; after it, --hold SECONDS keeps the VMs (--forever: or until another signal).
 *   --name NAME     sets the process name (comm); after -- anything may follow.
 *
 * Output, if all went well: a line for each operation, with totals over all vCPUs; the last line is of all operations.
 *
 *     op=0 level=1 access=write msr=0x48 executed=14 completed=0 gp=14 reflected=0 user=0 filter=0 unknown=0 invalid=0
 *     accesses: vms=1 vcpus=2 rounds=1 ops=1 executed=14 completed=0 gp=14 reflected=0 user=0
 *
 *   executed        how often the guest tried: completed + gp + reflected
 *   gp              #GP in the level that tried
 *   reflected       exits of L2 that L1 got
 *   user            exits to the VMM, by reason: filter, unknown, invalid
 *
 * Exit status: 0 done; 1 a system call failed; 2 KVM_RUN ended as it should not, or counts do not add up; 3 this CPU
 * lacks what the options need; 64 wrong usage. A failure is one line on stderr.
 */
#define _GNU_SOURCE
#define PROGRAM "accesses"
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <time.h>

#include "../program.h"
#include "guest.h"

#define APIC_BASE_X2APIC (1ULL << 10)
#define LEAF_1_ECX_VMX (1u << 5)
#define LEAF_1_ECX_TSC_DEADLINE (1u << 24)
#define LEAF_80000001_ECX_SVM (1u << 2)
#define MSR_FEATURE_CONTROL 0x3a
#define FEATURE_CONTROL_VMXON 5 /* locked; VMXON is allowed */
#define MSR_VMX_BASIC 0x480
#define VMX_CAPABILITIES 17 /* to 0x490, VMX_TRUE_ENTRY_CTLS */
#define MSR_VM_HSAVE_PA 0xc0010117
#define MAX_MSRS KVM_MSR_FILTER_MAX_RANGES

struct vcpu {
	int fd;
	struct kvm_run *run;
	struct guest *guest;
	uint64_t base; /* where guest is for the guest */
	unsigned long vm, index;
	struct { unsigned long filter, unknown, invalid; } user[MAX_OPS];
};

struct vm {
	int fd;
	struct vcpu *vcpus;
};

struct wanted {
	struct op op;
	bool own_value; /* of the VCPU, as KVM_GET_MSRS gives it */
};

struct msr_list {
	struct { uint32_t msr, flags; } msrs[MAX_MSRS]; /* KVM_MSR_FILTER_... */
	unsigned int n;
};

static struct {
	unsigned long vms, vcpus, rounds, interval_ms;
	int threads, forever, irqchip, user_error, stay_in_l2; /* flags, for getopt_long() */
	double hold;
	const char *ready, *go, *done;
	uint64_t to_user; /* KVM_MSR_EXIT_REASON_... */
	struct msr_list deny, reflect;
	struct wanted ops[MAX_OPS];
	unsigned int n_ops;
} opt = { .vms = 1, .vcpus = 1, .rounds = 1 };

static int kvm_fd, run_size;
static bool nested, svm; /* whether L2 is needed; and of which kind */
static sigset_t stop_signals; /* --forever: blocked, so that they never interrupt a KVM_RUN */
static bool stop; /* one came */
static pthread_barrier_t round_start, round_end;

#define for_each_vcpu(vcpu, vms)                     \
	for (unsigned long v_ = 0; v_ < opt.vms; v_++) \
		for (struct vcpu *vcpu = (vms)[v_].vcpus; vcpu < (vms)[v_].vcpus + opt.vcpus; vcpu++)

/* Sleeps; with --forever it is also where a stop signal is noticed. */
static void pause_for(double seconds)
{
	struct timespec ts = { .tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (time_t)seconds) * 1e9) };

	if (opt.forever)
		stop |= sigtimedwait(&stop_signals, NULL, &ts) > 0;
	else if (seconds > 0)
		while (nanosleep(&ts, &ts) && errno == EINTR)
			;
}

static void create_file(const char *name)
{
	int fd = open(name, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);

	if (fd < 0)
		fail(EXIT_SYSTEM, "%s: %s", name, strerror(errno));
	close(fd);
}

/* By the request KVM_GET_MSRS or KVM_SET_MSRS. Returns whether KVM knows the MSR, and takes the value. */
static bool host_msr(const struct vcpu *vcpu, unsigned long request, uint32_t msr, uint64_t *value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} one = { .head = { .nmsrs = 1 }, .entry = { .index = msr, .data = *value } };
	int r = ioctl(vcpu->fd, request, &one);

	if (r < 0)
		fail(EXIT_SYSTEM, "KVM_%s_MSRS of %#x: %s", request == KVM_GET_MSRS ? "GET" : "SET", msr, strerror(errno));
	*value = r == 1 ? one.entry.data : 0;
	return r == 1;
}

static void must_set_msr(const struct vcpu *vcpu, uint32_t msr, uint64_t value)
{
	if (!host_msr(vcpu, KVM_SET_MSRS, msr, &value))
		fail(EXIT_CPU_LACKS, "KVM_SET_MSRS refused MSR %#x, which L2 needs", msr);
}

static struct kvm_segment segment(uint16_t selector, uint8_t type, uint64_t base, uint32_t limit)
{
	bool code = selector == CODE_SELECTOR, tss = selector == TSS_SELECTOR;

	return (struct kvm_segment){ .selector = selector, .type = type, .base = base, .limit = limit, .present = 1,
				     .s = !tss, .l = code, .db = !code && !tss, .g = !tss };
}

static void set_registers(struct vcpu *vcpu)
{
	const struct guest *guest = vcpu->guest;
	const struct kvm_segment data = segment(DATA_SELECTOR, 3, 0, ~0u);
	struct kvm_regs regs = {
		.rip = vcpu->base,
		.rsp = ADDRESS(vcpu->base, stacks[1]),
		.r15 = ADDRESS(vcpu->base, control),
		.rflags = 2,
	};
	struct kvm_sregs sregs;

	KVM(vcpu->fd, KVM_GET_SREGS, &sregs);
	sregs.cs = segment(CODE_SELECTOR, 0xb, 0, ~0u);
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.tr = segment(TSS_SELECTOR, 0xb, ADDRESS(vcpu->base, tables.tss), sizeof(guest->tables.tss) - 1);
	sregs.gdt.base = ADDRESS(vcpu->base, tables.gdt);
	sregs.gdt.limit = sizeof(guest->tables.gdt) - 1;
	sregs.idt.base = ADDRESS(vcpu->base, tables.idt);
	sregs.idt.limit = sizeof(guest->tables.idt) - 1;
	sregs.cr0 = CR0;
	sregs.cr3 = ADDRESS(vcpu->base, level4);
	sregs.cr4 = CR4 | (nested && !svm ? CR4_VMXE : 0);
	sregs.efer = EFER | (nested && svm ? EFER_SVME : 0);
	if (opt.irqchip)
		sregs.apic_base |= APIC_BASE_X2APIC;
	KVM(vcpu->fd, KVM_SET_SREGS, &sregs);
	KVM(vcpu->fd, KVM_SET_REGS, &regs);
}

static void fill_tables(struct guest *guest, uint64_t base)
{
	uint64_t tss = ADDRESS(base, tables.tss), gp = LABEL(base, guest_gp);

	memcpy(guest->code, guest_code, guest_code_end - guest_code);
	guest->level4[0] = ADDRESS(base, level3) | 3; /* present, writable */
	guest->level3[0] = ADDRESS(base, level2) | 3;
	for (uint64_t i = 0; i < 512; i++)
		guest->level2[i] = i << 21 | 0x83; /* a page of 2 MiB */
	guest->tables.gdt[CODE_SELECTOR / 8] = 0x00af9b000000ffff;
	guest->tables.gdt[DATA_SELECTOR / 8] = 0x00cf93000000ffff;
	guest->tables.gdt[TSS_SELECTOR / 8] = (sizeof(guest->tables.tss) - 1) | (tss & 0xffffff) << 16 |
					      0x8bULL << 40 | (tss >> 24 & 0xff) << 56;
	guest->tables.gdt[TSS_SELECTOR / 8 + 1] = tss >> 32;
	/* An interrupt gate for #GP. Anything else is a triple fault, which ends KVM_RUN. */
	guest->tables.idt[13][0] = (gp & 0xffff) | CODE_SELECTOR << 16 | 0x8eULL << 40 | (gp >> 16 & 0xffff) << 48;
	guest->tables.idt[13][1] = gp >> 32;
}

static void prepare_l2(struct vcpu *vcpu)
{
	uint64_t capabilities[VMX_CAPABILITIES] = { 0 };

	if (svm) {
		must_set_msr(vcpu, MSR_VM_HSAVE_PA, ADDRESS(vcpu->base, host));
		prepare_vmcb(vcpu->guest, vcpu->base);
	} else {
		must_set_msr(vcpu, MSR_FEATURE_CONTROL, FEATURE_CONTROL_VMXON);
		for (unsigned int i = 0; i < VMX_CAPABILITIES; i++)
			host_msr(vcpu, KVM_GET_MSRS, MSR_VMX_BASIC + i, &capabilities[i]);
		prepare_vmcs(vcpu->guest, vcpu->base, capabilities);
	}
	for (unsigned int i = 0; i < opt.reflect.n; i++)
		if (!(svm ? reflect_svm : reflect_vmx)(vcpu->guest, opt.reflect.msrs[i].msr))
			fail(EXIT_USAGE, "--reflect: MSR %#x has no bit, so L1 gets its exits anyway (see --help)",
			     opt.reflect.msrs[i].msr);
}

static void create_vcpu(const struct vm *vm, struct vcpu *vcpu)
{
	struct kvm_mp_state runnable = { .mp_state = KVM_MP_STATE_RUNNABLE };
	struct control *control = &vcpu->guest->control;

	vcpu->fd = KVM(vm->fd, KVM_CREATE_VCPU, vcpu->index);
	vcpu->run = map(run_size, 0, vcpu->fd);
	KVM(vcpu->fd, KVM_SET_CPUID2, supported_cpuid(kvm_fd));
	fill_tables(vcpu->guest, vcpu->base);
	set_registers(vcpu);
	if (nested)
		prepare_l2(vcpu);
	if (opt.irqchip) /* with it all but vCPU 0 would wait for INIT and SIPI */
		KVM(vcpu->fd, KVM_SET_MP_STATE, &runnable);
	control->n_ops = opt.n_ops;
	for (unsigned int i = 0; i < opt.n_ops; i++) {
		control->ops[i] = opt.ops[i].op;
		if (opt.ops[i].own_value)
			host_msr(vcpu, KVM_GET_MSRS, control->ops[i].msr, &control->ops[i].value);
	}
}

static void set_filter(const struct vm *vm)
{
	static uint64_t none; /* the kernel copies whole longs, even for one MSR */
	struct kvm_msr_filter filter = { .flags = KVM_MSR_FILTER_DEFAULT_ALLOW };

	for (unsigned int i = 0; i < opt.deny.n; i++)
		filter.ranges[i] = (struct kvm_msr_filter_range){
			.flags = opt.deny.msrs[i].flags,
			.nmsrs = 1,
			.base = opt.deny.msrs[i].msr,
			.bitmap = (uint8_t *)&none,
		};
	KVM(vm->fd, KVM_X86_SET_MSR_FILTER, &filter);
}

static void create_vm(struct vm *vm, unsigned long index)
{
	struct kvm_userspace_memory_region region = { .memory_size = opt.vcpus * sizeof(struct guest) };
	struct kvm_enable_cap to_user = { .cap = KVM_CAP_X86_USER_SPACE_MSR, .args = { opt.to_user } };
	struct guest *guests = map(region.memory_size, MAP_ANONYMOUS, -1);

	vm->fd = KVM(kvm_fd, KVM_CREATE_VM, 0);
	KVM(vm->fd, KVM_SET_TSS_ADDR, 0xfffbd000); /* VMX without unrestricted guest; else ignored */
	if (opt.irqchip)
		KVM(vm->fd, KVM_CREATE_IRQCHIP, 0);
	if (opt.to_user)
		KVM(vm->fd, KVM_ENABLE_CAP, &to_user);
	if (opt.deny.n)
		set_filter(vm);
	region.userspace_addr = (uintptr_t)guests;
	KVM(vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
	vm->vcpus = map(opt.vcpus * sizeof(*vm->vcpus), MAP_ANONYMOUS, -1);
	for (unsigned long c = 0; c < opt.vcpus; c++) {
		vm->vcpus[c].vm = index;
		vm->vcpus[c].index = c;
		vm->vcpus[c].guest = &guests[c];
		vm->vcpus[c].base = c * sizeof(struct guest);
		create_vcpu(vm, &vm->vcpus[c]);
	}
}

#define bad_exit(vcpu, format, ...) \
	fail(EXIT_BAD_EXIT, "vm %lu vcpu %lu: " format, (vcpu)->vm, (vcpu)->index, ##__VA_ARGS__)

/* Counts and completes an access that KVM left to its user space. */
static void complete(struct vcpu *vcpu)
{
	const struct control *control = &vcpu->guest->control;
	struct kvm_run *run = vcpu->run;
	unsigned long nth = (control->current - ADDRESS(vcpu->base, control.ops)) / sizeof(struct op);
	bool write = run->exit_reason == KVM_EXIT_X86_WRMSR;

	if (nth >= opt.n_ops || control->ops[nth].msr != run->msr.index || control->ops[nth].write != write)
		bad_exit(vcpu, "%s of MSR %#x came to user space, which is not the operation being executed",
			 write ? "WRMSR" : "RDMSR", run->msr.index);
	switch (run->msr.reason) {
	case KVM_MSR_EXIT_REASON_FILTER: vcpu->user[nth].filter++; break;
	case KVM_MSR_EXIT_REASON_UNKNOWN: vcpu->user[nth].unknown++; break;
	case KVM_MSR_EXIT_REASON_INVAL: vcpu->user[nth].invalid++; break;
	default:
		bad_exit(vcpu, "MSR %#x came to user space for reason %u", run->msr.index, run->msr.reason);
	}
	run->msr.error = opt.user_error;
	if (!write)
		run->msr.data = 0;
}

/* KVM_RUN until the guest's next `out`. */
static void run_vcpu(struct vcpu *vcpu)
{
	const uint16_t port = vcpu->guest->control.stay ? PORT_IN_L2 : PORT_DONE;
	struct kvm_run *run = vcpu->run;

	for (;;) {
		if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
			if (errno == EINTR)
				continue;
			fail(EXIT_SYSTEM, "KVM_RUN: %s", strerror(errno));
		}
		switch (run->exit_reason) {
		case KVM_EXIT_X86_RDMSR:
		case KVM_EXIT_X86_WRMSR:
			complete(vcpu);
			continue;
		case KVM_EXIT_IO:
			if (run->io.port == port)
				return;
			if (run->io.port == PORT_UNEXPECTED)
				bad_exit(vcpu, "the guest did not expect %#x (see guest.h)",
					 *(uint32_t *)((uint8_t *)run + run->io.data_offset));
			bad_exit(vcpu, "`out` to port %#x, not %#x", run->io.port, port);
		case KVM_EXIT_FAIL_ENTRY:
			bad_exit(vcpu, "exit reason 9 (FAIL_ENTRY), hardware_entry_failure_reason %#llx",
				 (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
		case KVM_EXIT_INTERNAL_ERROR:
			bad_exit(vcpu, "exit reason 17 (INTERNAL_ERROR), suberror %u", run->internal.suberror);
		default:
			bad_exit(vcpu, "exit reason %u, not 2 (IO)", run->exit_reason);
		}
	}
}

/* What KVM says of it. */
static bool is_in_l2(const struct vcpu *vcpu)
{
	static struct {
		struct kvm_nested_state state; /* the head */
		uint8_t data[4 * PAGE]; /* more than any vendor's */
	} nested_state;

	nested_state.state.size = sizeof(nested_state);
	KVM(vcpu->fd, KVM_GET_NESTED_STATE, &nested_state);
	return nested_state.state.flags & KVM_STATE_NESTED_GUEST_MODE;
}

static void *vcpu_thread(void *vcpu)
{
	for (;;) { /* until the process ends */
		pthread_barrier_wait(&round_start);
		run_vcpu(vcpu);
		pthread_barrier_wait(&round_end);
	}
	return NULL;
}

static void run_all(struct vm *vms)
{
	if (opt.threads) {
		pthread_barrier_wait(&round_start);
		pthread_barrier_wait(&round_end);
	} else {
		for_each_vcpu(vcpu, vms)
			run_vcpu(vcpu);
	}
}

/* Prints what became of each operation, over all vCPUs, and all together. */
static void print(struct vm *vms, unsigned long rounds)
{
	struct { unsigned long executed, completed, gp, reflected, user; } all = { 0 };

	for (unsigned int i = 0; i < opt.n_ops; i++) {
		struct op sum = opt.ops[i].op;
		unsigned long filter = 0, unknown = 0, invalid = 0;

		for_each_vcpu(vcpu, vms) {
			const struct op *op = &vcpu->guest->control.ops[i];

			if (op->executed != rounds * op->count || op->executed != op->completed + op->gp + op->reflected)
				bad_exit(vcpu, "op %u: executed %lu of %lu, completed %lu, gp %lu, reflected %lu", i,
					 op->executed, rounds * op->count, op->completed, op->gp, op->reflected);
			sum.executed += op->executed;
			sum.completed += op->completed;
			sum.gp += op->gp;
			sum.reflected += op->reflected;
			filter += vcpu->user[i].filter;
			unknown += vcpu->user[i].unknown;
			invalid += vcpu->user[i].invalid;
		}
		printf("op=%u level=%u access=%s msr=%#x executed=%lu completed=%lu gp=%lu reflected=%lu user=%lu filter=%lu "
		       "unknown=%lu invalid=%lu\n", i, sum.level, sum.write ? "write" : "read", sum.msr, sum.executed,
		       sum.completed, sum.gp, sum.reflected, filter + unknown + invalid, filter, unknown, invalid);
		all.executed += sum.executed;
		all.completed += sum.completed;
		all.gp += sum.gp;
		all.reflected += sum.reflected;
		all.user += filter + unknown + invalid;
	}
	printf("accesses: vms=%lu vcpus=%lu rounds=%lu ops=%u executed=%lu completed=%lu gp=%lu reflected=%lu user=%lu\n",
	       opt.vms, opt.vcpus, rounds, opt.n_ops, all.executed, all.completed, all.gp, all.reflected, all.user);
	if (fflush(stdout))
		fail(EXIT_SYSTEM, "standard output: %s", strerror(errno));
}

static void work(void)
{
	struct vm *vms = map(opt.vms * sizeof(*vms), MAP_ANONYMOUS, -1);
	unsigned long rounds = 0;

	for (unsigned long v = 0; v < opt.vms; v++)
		create_vm(&vms[v], v);
	if (opt.threads) {
		pthread_barrier_init(&round_start, NULL, opt.vms * opt.vcpus + 1);
		pthread_barrier_init(&round_end, NULL, opt.vms * opt.vcpus + 1);
		for_each_vcpu(vcpu, vms)
			start_pinned(vcpu->vm * opt.vcpus + vcpu->index, vcpu_thread, vcpu);
	}
	if (opt.ready)
		create_file(opt.ready);
	while (opt.go && access(opt.go, F_OK) && !stop)
		pause_for(0.01);
	while (!stop && (opt.forever || rounds < opt.rounds)) {
		run_all(vms);
		rounds++;
		if (opt.forever || rounds < opt.rounds)
			pause_for(opt.interval_ms / 1e3);
	}
	if (opt.stay_in_l2) {
		for_each_vcpu(vcpu, vms)
			vcpu->guest->control.stay = 1;
		run_all(vms);
	}
	if (opt.done)
		create_file(opt.done);
	pause_for(opt.hold);
	if (opt.stay_in_l2)
		for_each_vcpu(vcpu, vms)
			if (!is_in_l2(vcpu))
				bad_exit(vcpu, "it did not stay in L2");
	print(vms, rounds);
}

static const char usage[] =
	"usage: accesses [--read MSR=COUNT]... [--write MSR=COUNT[:VALUE]]... [--l2-read MSR=COUNT]...\n"
	"                [--l2-write MSR=COUNT[:VALUE]]... [--reflect MSR]...\n"
	"                [--deny MSR]... [--deny-read MSR]... [--deny-write MSR]...\n"
	"                [--to-user filter,unknown,invalid] [--user-error] [--irqchip]\n"
	"                [--vms N] [--vcpus N] [--threads] [--name NAME] [--ready FILE] [--go FILE]\n"
	"                [--rounds N | --forever] [--interval MS] [--stay-in-l2] [--done FILE] [--hold SECONDS]\n"
	"                [-- ignored...]\n\n"
	"Lets guests of KVM, and guests of these (l2), execute RDMSR and WRMSR, and prints how often each was executed and\n"
	"what became of it. The head of accesses.c explains every option.\n\n"
	"Exit status: 0 done, 1 a system call failed, 2 unexpected KVM exit, 3 the CPU lacks it, 64 wrong usage.\n";

static const struct option longopts[] = {
	{ "read", 1, NULL, 'R' },
	{ "write", 1, NULL, 'W' },
	{ "l2-read", 1, NULL, '2' },
	{ "l2-write", 1, NULL, '3' },
	{ "reflect", 1, NULL, 'f' },
	{ "deny", 1, NULL, 'd' },
	{ "deny-read", 1, NULL, 'e' },
	{ "deny-write", 1, NULL, 'E' },
	{ "to-user", 1, NULL, 't' },
	{ "user-error", 0, &opt.user_error, 1 },
	{ "irqchip", 0, &opt.irqchip, 1 },
	{ "vms", 1, NULL, 'm' },
	{ "vcpus", 1, NULL, 'c' },
	{ "threads", 0, &opt.threads, 1 },
	{ "name", 1, NULL, 'n' },
	{ "ready", 1, NULL, 'r' },
	{ "go", 1, NULL, 'g' },
	{ "rounds", 1, NULL, 'u' },
	{ "forever", 0, &opt.forever, 1 },
	{ "interval", 1, NULL, 'i' },
	{ "stay-in-l2", 0, &opt.stay_in_l2, 1 },
	{ "done", 1, NULL, 'D' },
	{ "hold", 1, NULL, 'H' },
	{ "help", 0, NULL, 'h' },
	{ 0 },
};

/* MSR=COUNT, for writes with :VALUE. */
static void add_op(const struct option *option, unsigned int level, bool write)
{
	struct wanted *wanted = &opt.ops[opt.n_ops];
	char *at = optarg;

	if (opt.n_ops++ == MAX_OPS)
		fail(EXIT_USAGE, "--%s: more than %d operations (see --help)", option->name, MAX_OPS);
	wanted->op = (struct op){ .level = level, .write = write };
	wanted->own_value = write;
	wanted->op.msr = leading_number(option->name, &at, 0, UINT32_MAX);
	if (*at++ != '=')
		fail(EXIT_USAGE, "--%s: '%s' is not MSR=COUNT (see --help)", option->name, optarg);
	wanted->op.count = leading_number(option->name, &at, 0, 1000000000);
	if (write && *at == ':') {
		at++;
		wanted->own_value = false;
		wanted->op.value = leading_number(option->name, &at, 0, UINT64_MAX);
	}
	if (*at)
		fail(EXIT_USAGE, "--%s: '%s' has '%s' after its numbers (see --help)", option->name, optarg, at);
}

static void add_msr(const struct option *option, struct msr_list *list, uint32_t flags)
{
	if (list->n == MAX_MSRS)
		fail(EXIT_USAGE, "--%s: more than %d MSRs (see --help)", option->name, MAX_MSRS);
	list->msrs[list->n].flags = flags;
	list->msrs[list->n++].msr = number(option, 0, UINT32_MAX);
}

static uint64_t reasons(char *names)
{
	uint64_t found = 0;

	for (char *name = strtok(names, ","); name; name = strtok(NULL, ","))
		if (!strcmp(name, "filter"))
			found |= KVM_MSR_EXIT_REASON_FILTER;
		else if (!strcmp(name, "unknown"))
			found |= KVM_MSR_EXIT_REASON_UNKNOWN;
		else if (!strcmp(name, "invalid"))
			found |= KVM_MSR_EXIT_REASON_INVAL;
		else
			fail(EXIT_USAGE, "--to-user: '%s' is not filter, unknown or invalid (see --help)", name);
	return found;
}

static void parse(int argc, char **argv)
{
	const unsigned long many = 1000000000;
	const struct option *o;
	char *end;
	int c, i = 0;

	while ((c = getopt_long(argc, argv, "+", longopts, &i)) != -1) {
		o = &longopts[i];
		switch (c) {
		case 0: break; /* a flag */
		case 'R': add_op(o, 1, false); break;
		case 'W': add_op(o, 1, true); break;
		case '2': add_op(o, 2, false); break;
		case '3': add_op(o, 2, true); break;
		case 'f': add_msr(o, &opt.reflect, KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE); break;
		case 'd': add_msr(o, &opt.deny, KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE); break;
		case 'e': add_msr(o, &opt.deny, KVM_MSR_FILTER_READ); break;
		case 'E': add_msr(o, &opt.deny, KVM_MSR_FILTER_WRITE); break;
		case 't': opt.to_user = reasons(optarg); break;
		case 'm': opt.vms = number(o, 1, 4096); break;
		case 'c': opt.vcpus = number(o, 1, 4096); break;
		case 'u': opt.rounds = number(o, 0, many); break;
		case 'i': opt.interval_ms = number(o, 0, many); break;
		case 'H':
			opt.hold = strtod(optarg, &end);
			if (end == optarg || *end || !(opt.hold >= 0 && opt.hold <= many))
				fail(EXIT_USAGE, "--hold: '%s' is not a number of seconds (see --help)", optarg);
			break;
		case 'r': opt.ready = optarg; break;
		case 'g': opt.go = optarg; break;
		case 'D': opt.done = optarg; break;
		case 'n': prctl(PR_SET_NAME, optarg); break;
		case 'h': fputs(usage, stdout); exit(0);
		default: exit(EXIT_USAGE); /* getopt_long() has said why */
		}
	}
	if (optind < argc && strcmp(argv[optind - 1], "--"))
		fail(EXIT_USAGE, "'%s': only options are taken, others after -- (see --help)", argv[optind]);
	nested = opt.stay_in_l2 || opt.reflect.n;
	for (unsigned int op = 0; op < opt.n_ops; op++)
		nested |= opt.ops[op].op.level == 2;
	if (!opt.n_ops && !opt.stay_in_l2)
		fail(EXIT_USAGE, "nothing to do: no --read, --write, --l2-read, --l2-write or --stay-in-l2 (see --help)");
}

/* What the vCPUs get of CPUID, and whether they can have guests. */
static void look_at_cpuid(void)
{
	struct kvm_cpuid2 *table = supported_cpuid(kvm_fd);
	struct kvm_cpuid_entry2 *basic = cpuid_leaf(table, 1), *extended = cpuid_leaf(table, 0x80000001);

	svm = extended && extended->ecx & LEAF_80000001_ECX_SVM;
	if (nested && !svm && !(basic && basic->ecx & LEAF_1_ECX_VMX))
		fail(EXIT_CPU_LACKS, "L2 cannot be had: KVM is loaded with nested=0, or has no CPU for it");
	if (opt.irqchip && basic) /* KVM has it, but leaves it to user space to say so */
		basic->ecx |= LEAF_1_ECX_TSC_DEADLINE;
}

int main(int argc, char **argv)
{
	parse(argc, argv);
	kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm_fd < 0)
		fail(EXIT_SYSTEM, "/dev/kvm: %s", strerror(errno));
	run_size = KVM(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	look_at_cpuid();
	sigemptyset(&stop_signals);
	if (opt.forever) {
		sigaddset(&stop_signals, SIGINT);
		sigaddset(&stop_signals, SIGTERM);
		sigprocmask(SIG_BLOCK, &stop_signals, NULL);
	}
	work();
	return 0;
}
