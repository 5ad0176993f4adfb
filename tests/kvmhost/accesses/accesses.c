// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * accesses: let a guest of KVM execute a known number of RDMSR and WRMSR, by the plain KVM API.
 * Tests run it on a host of either vendor and compare the exits that were counted with what the guest itself counted.
 *
 *     gcc -O2 -Wall -Wextra -Werror -static -pthread -o accesses *.c guest.S ../program.c
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
 *   --no-msr-bitmap L1 has no bitmap for L2: SVM intercepts no MSR for it then, VMX all.
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
 *   --deny-in-l2 MSR
 *                   When all have stayed there, a filter that denies it, too, is set, and each vCPU runs on in L2.
 *   --done FILE     is created then; after it, --hold SECONDS keeps the VMs (--forever: or until another signal).
 *   --name NAME     sets the process name (comm); after -- anything may follow.
 *
 * Output, if all went well: a line for each operation, with totals over all vCPUs; the last line is of all operations.
 *
 *     op=0 level=1 access=write msr=0x48 executed=14 completed=0 gp=14 reflected=0 user=0 filter=0 unknown=0 invalid=0
 *     accesses: vms=1 vcpus=2 rounds=1 ops=1 executed=14 completed=0 gp=14 reflected=0 user=0 ticks=61302
 *
 *   executed        how often the guest tried: completed + gp + reflected
 *   gp              #GP in the level that tried
 *   reflected       exits of L2 that L1 got
 *   user            exits to the VMM, by reason: filter, unknown, invalid
 *   ticks           of the TSC, in the round that took the fewest; 0 without a round
 *
 * Exit status: 0 done; 1 a system call failed; 2 KVM_RUN ended as it should not, or counts do not add up; 3 this CPU
 * lacks what the options need; 64 wrong usage. A failure is one line on stderr.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <x86intrin.h>

#include "accesses.h"

struct options opt = { .vms = 1, .vcpus = 1, .rounds = 1 };

static pthread_barrier_t round_start, round_end;

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
static void print(struct vm *vms, unsigned long rounds, unsigned long ticks)
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
		printf("op=%u level=%u access=%s msr=%#x executed=%lu completed=%lu gp=%lu reflected=%lu user=%lu "
		       "filter=%lu unknown=%lu invalid=%lu\n", i, sum.level, sum.write ? "write" : "read", sum.msr,
		       sum.executed, sum.completed, sum.gp, sum.reflected, filter + unknown + invalid, filter, unknown,
		       invalid);
		all.executed += sum.executed;
		all.completed += sum.completed;
		all.gp += sum.gp;
		all.reflected += sum.reflected;
		all.user += filter + unknown + invalid;
	}
	printf("accesses: vms=%lu vcpus=%lu rounds=%lu ops=%u executed=%lu completed=%lu gp=%lu reflected=%lu "
	       "user=%lu ticks=%lu\n", opt.vms, opt.vcpus, rounds, opt.n_ops, all.executed, all.completed, all.gp, all.reflected,
	       all.user, ticks);
	if (fflush(stdout))
		fail(EXIT_SYSTEM, "standard output: %s", strerror(errno));
}

static void work(void)
{
	struct vm *vms = map(opt.vms * sizeof(*vms), MAP_ANONYMOUS, -1);
	unsigned long rounds = 0, ticks = 0, begun, taken;

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
		begun = __rdtsc();
		run_all(vms);
		taken = __rdtsc() - begun;
		ticks = rounds && ticks < taken ? ticks : taken;
		rounds++;
		if (opt.forever || rounds < opt.rounds)
			pause_for(opt.interval_ms / 1e3);
	}
	if (opt.stay_in_l2) {
		for_each_vcpu(vcpu, vms)
			vcpu->guest->control.stay = 1;
		run_all(vms);
	}
	if (opt.deny_in_l2.n) {
		for (unsigned int i = 0; i < opt.deny_in_l2.n; i++)
			opt.deny.msrs[opt.deny.n++] = opt.deny_in_l2.msrs[i];
		for (unsigned long v = 0; v < opt.vms; v++)
			set_filter(&vms[v]);
		run_all(vms);
	}
	if (opt.done)
		create_file(opt.done);
	pause_for(opt.hold);
	if (opt.stay_in_l2)
		for_each_vcpu(vcpu, vms)
			if (!is_in_l2(vcpu))
				bad_exit(vcpu, "it did not stay in L2");
	print(vms, rounds, ticks);
}

static const char usage[] =
	"usage: accesses [--read MSR=COUNT]... [--write MSR=COUNT[:VALUE]]... [--l2-read MSR=COUNT]...\n"
	"                [--l2-write MSR=COUNT[:VALUE]]... [--reflect MSR]... [--no-msr-bitmap]\n"
	"                [--deny MSR]... [--deny-read MSR]... [--deny-write MSR]...\n"
	"                [--to-user filter,unknown,invalid] [--user-error] [--irqchip]\n"
	"                [--vms N] [--vcpus N] [--threads] [--name NAME] [--ready FILE] [--go FILE]\n"
	"                [--rounds N | --forever] [--interval MS] [--stay-in-l2 [--deny-in-l2 MSR]...] [--done FILE]\n"
	"                [--hold SECONDS] [-- ignored...]\n\n"
	"Lets guests of KVM, and guests of these (l2), execute RDMSR and WRMSR, and prints how often each was executed\n"
	"and what became of it. The head of accesses.c explains every option.\n\n"
	"Exit status: 0 done, 1 a system call failed, 2 unexpected KVM exit, 3 the CPU lacks it, 64 wrong usage.\n";

static const struct option longopts[] = {
	{ "read", 1, NULL, 'R' },
	{ "write", 1, NULL, 'W' },
	{ "l2-read", 1, NULL, '2' },
	{ "l2-write", 1, NULL, '3' },
	{ "reflect", 1, NULL, 'f' },
	{ "no-msr-bitmap", 0, &opt.no_msr_bitmap, 1 },
	{ "deny", 1, NULL, 'd' },
	{ "deny-read", 1, NULL, 'e' },
	{ "deny-write", 1, NULL, 'E' },
	{ "deny-in-l2", 1, NULL, 'l' },
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
		case 'l': add_msr(o, &opt.deny_in_l2, KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE); break;
		case 't': opt.to_user = reasons(optarg); break;
		case 'm': opt.vms = number(o, 1, 4096); break;
		case 'c': opt.vcpus = number(o, 1, 4096); break;
		case 'u': opt.rounds = number(o, 0, many); break;
		case 'i': opt.interval_ms = number(o, 0, many); break;
		case 'H': opt.hold = seconds(o); break;
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
	if (opt.deny_in_l2.n && !opt.stay_in_l2)
		fail(EXIT_USAGE, "--deny-in-l2 is for --stay-in-l2 (see --help)");
	if (opt.deny.n + opt.deny_in_l2.n > MAX_MSRS)
		fail(EXIT_USAGE, "--deny-in-l2: more than %d MSRs with those of --deny (see --help)", MAX_MSRS);
	opt.nested = opt.stay_in_l2 || opt.reflect.n;
	for (unsigned int op = 0; op < opt.n_ops; op++)
		opt.nested |= opt.ops[op].op.level == 2;
	if (!opt.n_ops && !opt.stay_in_l2)
		fail(EXIT_USAGE, "nothing to do: no --read, --write, --l2-read, --l2-write, --stay-in-l2 (see --help)");
}

int main(int argc, char **argv)
{
	parse(argc, argv);
	open_kvm();
	if (opt.forever)
		be_stoppable();
	work();
	return 0;
}
