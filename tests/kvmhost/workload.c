// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * workload: make kvm_intel or kvm_amd change MSR intercepts a known number of times, by the plain KVM API.
 * Tests run it on a host of either vendor and compare what the tracer counted with the line it prints last.
 *
 *     gcc -O2 -Wall -Wextra -Werror -static -pthread -o workload workload.c program.c
 *
 * A filter update is KVM_X86_SET_MSR_FILTER on every VM, then one KVM_RUN of every vCPU. The ioctl only leaves a request
 * with each vCPU, which edits its MSR bitmap (SVM: its MSR permission map) inside its next KVM_RUN: so every vCPU applies
 * every update exactly once. The guest is `out %al,$0x10; jmp`; each KVM_RUN ends at the out. It touches no MSR, so
 * KVM_CAP_X86_USER_SPACE_MSR is not needed, nor anything else that Linux 5.10 lacks.
 *
 * In order of execution, with what the kernel does then (VMX: read from 6.1, 6.12 and 7.2; SVM: counted by kprobes in
 * 5.10, 6.1, 6.12, 6.17 and 7.2). A call is one of vmx_disable_intercept_for_msr(), vmx_enable_intercept_for_msr() or
 * (6.17 on) vmx_set_intercept_for_msr(), or of set_msr_interception_bitmap() or (6.17 on) svm_set_intercept_for_msr();
 * a recalculation is vmx_ or svm_recalc_intercepts(), in 6.17 ..._recalc_msr_intercepts().
 *
 *   creation        --vms N (1) of --vcpus N (1). VMX: 6.1, 6.12: 7 calls per vCPU. SVM: 8 (5.10), 11 (6.1, 6.12).
 *                   6.17: a recalculation (SVM: two). 7.2: none, but the vCPU's first KVM_RUN recalculates.
 *   --ready FILE    is created now; then --go FILE is waited for (looked for every 10 ms).
 *   --cpuid N       N KVM_SET_CPUID2 of the supported CPUID on each vCPU; before any KVM_RUN, as later ones do
 *                   nothing. VMX: a call each for XFD_ERR, from 6.12 PRED_CMD and FLUSH_CMD, if the host has it.
 *                   SVM: none (5.10), 2 for SYSENTER_EIP and _ESP (6.1), from 6.12 one more for PRED_CMD if the host
 *                   has IBPB, which disables for writes and enables for reads. 6.17: a recalculation each. 7.2: no
 *                   call, but a recalculation in the next KVM_RUN, one whatever N is.
 *   --x2apic N      N rounds xAPIC, x2APIC, disabled, xAPIC by KVM_SET_SREGS on each vCPU. VMX: TPR disabled, and
 *                   enabled again; with APICv also TMCCT (not 7.2), EOI, SELF_IPI, and ICR with IPI virtualisation.
 *                   SVM: nothing without x2AVIC. The VMs get an in-kernel irqchip, each vCPU at least one
 *                   KVM_SET_CPUID2. Needs no KVM_RUN: use --updates 0 where VM entry with an irqchip fails.
 *   --svme N        SVM only: N rounds EFER.SVME set and cleared by KVM_SET_SREGS on each vCPU, as guests do that
 *                   have guests. Setting it gets the vCPU a second map: 8 calls on that (5.10), 9 (6.1, 6.12), none
 *                   (6.17, 7.2). Each vCPU gets at least one KVM_SET_CPUID2.
 *   --initial-run   one KVM_RUN of each vCPU, not counted as applied: takes the requests pending since creation,
 *                   which on 7.2 would merge with the first update.
 *   updates         --updates N (10), or --forever until SIGINT or SIGTERM; --interval MS apart. Even ones (0, 2,
 *                   ...) deny reads and writes of each --msr INDEX (up to 16 of them; 0xc0000100), odd ones allow
 *                   them. --deny-all: even ones also deny all others, by default (x2APIC's cannot be denied).
 *                   vmx_ or svm_msr_filter_changed(), from 6.17 a recalculation, once per vCPU and update.
 *                   SVM: 14 (5.10), 44 (6.1), 47 (6.12), 11 (6.17, 7.2) calls each, and one more with IBPB in the last.
 *   --spec-ctrl N   N host-initiated writes of 1 (IBRS) to SPEC_CTRL on each vCPU. Never 0: KVM returns early then.
 *                   One disable (6.17 on: set) call each, RW; the first changes the bitmap, if the last filter
 *                   allows it. SVM: none where the CPU has V_SPEC_CTRL.
 *   --create-vms N  N more VMs of --vcpus vCPUs, each destroyed before the next, none run. As creation.
 *   --held FILE     is created now that all VMs have done all this.
 *   --hold SECONDS  keeps the VMs, idle (--forever: or until another signal).
 *
 *   --threads       a thread per vCPU, pinned to the allowed CPUs in turn; barriers keep the counts exact.
 *   --processes     a child process per VM; all start together. --create-vms happens in VM 0's.
 *   --ticks         prints the TSC ticks of every KVM_RUN that applied an update (not with --forever).
 *   --name NAME     sets the process name (comm); the command line is left alone, and after -- anything may follow.
 *
 * The last line of output, if all went well. updates is per VM (the most, if --forever --processes left them
 * different), created_vms are those of --create-vms, the others are totals of what was really done:
 *
 *     workload: vms=2 vcpus=3 updates=101 applied=606 created_vms=0 created_vcpus=6 spec_ctrl=0 cpuid=0 x2apic=0 svme=0
 *
 * Exit status: 0 done; 1 a system call failed; 2 KVM_RUN ended with anything but the guest's out; 3 this CPU
 * lacks SPEC_CTRL or SVM for the option; 64 wrong usage. A failure is one line on stderr (from each thread
 * or process that failed).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <x86intrin.h>

#include "program.h"

#define GUEST_PAGE 0x1000 /* guest-physical address and size of the only page */
#define APIC_BASE_X2APIC (1ULL << 10)
#define APIC_BASE_ENABLE (1ULL << 11)
#define EFER_SVME (1ULL << 12)

struct vcpu {
	int fd;
	struct kvm_run *run;
	unsigned long vm, index, ticks; /* ticks: of the last KVM_RUN */
};

struct vm {
	int fd;
	uint8_t *page;
	struct vcpu *vcpus;
};

/* What was really done, and when to start: shared by all processes. */
static struct shared {
	atomic_ulong updates, applied, created_vms, created_vcpus, spec_ctrl, cpuid, x2apic, svme;
	atomic_ulong ready, held; /* processes whose VMs exist, and have done all there is to do */
	atomic_bool go;
} *shared;

static struct {
	unsigned long vms, vcpus, updates, create_vms, spec_ctrl, cpuid, x2apic, svme, interval_ms;
	int threads, processes, forever, initial_run, deny_all, ticks; /* flags, for getopt_long() */
	double hold;
	const char *ready, *go, *held;
	uint32_t msrs[KVM_MSR_FILTER_MAX_RANGES];
	unsigned int n_msrs;
} opt = { .vms = 1, .vcpus = 1, .updates = 10 };

static int kvm_fd, run_size;
static unsigned long *ticks; /* --ticks: [update][vm][vcpu] */
static pthread_barrier_t round_start, round_end;

#define for_each_vcpu(vcpu, vms, n)            \
	for (unsigned long v_ = 0; v_ < (n); v_++) \
		for (struct vcpu *vcpu = (vms)[v_].vcpus; vcpu < (vms)[v_].vcpus + opt.vcpus; vcpu++)

static void create_vcpu(struct vm *vm, struct vcpu *vcpu)
{
	struct kvm_mp_state runnable = { .mp_state = KVM_MP_STATE_RUNNABLE };
	struct kvm_regs regs = { .rip = GUEST_PAGE, .rflags = 2 };
	struct kvm_sregs sregs;

	vcpu->fd = KVM(vm->fd, KVM_CREATE_VCPU, vcpu->index);
	vcpu->run = map(run_size, 0, vcpu->fd);
	KVM(vcpu->fd, KVM_GET_SREGS, &sregs);
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	KVM(vcpu->fd, KVM_SET_SREGS, &sregs);
	KVM(vcpu->fd, KVM_SET_REGS, &regs);
	if (opt.x2apic) /* with an irqchip all but vCPU 0 would wait for INIT and SIPI */
		KVM(vcpu->fd, KVM_SET_MP_STATE, &runnable);
	shared->created_vcpus++;
}

static void create_vm(struct vm *vm, unsigned long index)
{
	static const uint8_t code[] = { 0xe6, 0x10, 0xeb, 0xfc }; /* 1: out %al,$0x10; jmp 1b */
	struct kvm_userspace_memory_region region = { .guest_phys_addr = GUEST_PAGE, .memory_size = GUEST_PAGE };

	vm->fd = KVM(kvm_fd, KVM_CREATE_VM, 0);
	KVM(vm->fd, KVM_SET_TSS_ADDR, 0xfffbd000); /* for real mode without unrestricted guest; else ignored */
	if (opt.x2apic)
		KVM(vm->fd, KVM_CREATE_IRQCHIP, 0);
	vm->page = map(GUEST_PAGE, MAP_ANONYMOUS, -1);
	memcpy(vm->page, code, sizeof(code));
	region.userspace_addr = (uintptr_t)vm->page;
	KVM(vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
	vm->vcpus = map(opt.vcpus * sizeof(*vm->vcpus), MAP_ANONYMOUS, -1);
	for (unsigned long c = 0; c < opt.vcpus; c++) {
		vm->vcpus[c].vm = index;
		vm->vcpus[c].index = c;
		create_vcpu(vm, &vm->vcpus[c]);
	}
}

static void destroy_vm(struct vm *vm)
{
	for (unsigned long c = 0; c < opt.vcpus; c++) {
		munmap(vm->vcpus[c].run, run_size); /* the mapping holds the vCPU too */
		close(vm->vcpus[c].fd);
	}
	munmap(vm->vcpus, opt.vcpus * sizeof(*vm->vcpus));
	close(vm->fd);
	munmap(vm->page, GUEST_PAGE);
}

static void set_filter(struct vm *vm, bool deny)
{
	uint64_t bits = deny ? 0 : ~0ULL; /* the kernel copies whole longs, even for one MSR */
	struct kvm_msr_filter filter = { .flags = KVM_MSR_FILTER_DEFAULT_ALLOW };

	if (deny && opt.deny_all) /* refused without a range; there always is one */
		filter.flags = KVM_MSR_FILTER_DEFAULT_DENY;
	for (unsigned int i = 0; i < opt.n_msrs; i++)
		filter.ranges[i] = (struct kvm_msr_filter_range){
			.flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE,
			.nmsrs = 1,
			.base = opt.msrs[i],
			.bitmap = (uint8_t *)&bits,
		};
	KVM(vm->fd, KVM_X86_SET_MSR_FILTER, &filter);
}

static void run_vcpu(struct vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	unsigned long start = __rdtsc();
	int r;

	do /* a filter update is applied once, also if the first try is interrupted after it */
		r = ioctl(vcpu->fd, KVM_RUN, 0);
	while (r < 0 && errno == EINTR);
	vcpu->ticks = __rdtsc() - start;

	if (r < 0)
		fail(EXIT_SYSTEM, "KVM_RUN: %s", strerror(errno));
	if (run->exit_reason == KVM_EXIT_FAIL_ENTRY)
		fail(EXIT_BAD_EXIT, "vm %lu vcpu %lu: exit reason 9 (FAIL_ENTRY), hardware_entry_failure_reason %#llx",
		     vcpu->vm, vcpu->index, (unsigned long long)run->fail_entry.hardware_entry_failure_reason);
	if (run->exit_reason == KVM_EXIT_INTERNAL_ERROR)
		fail(EXIT_BAD_EXIT, "vm %lu vcpu %lu: exit reason 17 (INTERNAL_ERROR), suberror %u", vcpu->vm, vcpu->index,
		     run->internal.suberror);
	if (run->exit_reason != KVM_EXIT_IO)
		fail(EXIT_BAD_EXIT, "vm %lu vcpu %lu: exit reason %u, not 2 (IO)", vcpu->vm, vcpu->index, run->exit_reason);
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

static void run_all(struct vm *vms, unsigned long n)
{
	if (opt.threads) {
		pthread_barrier_wait(&round_start);
		pthread_barrier_wait(&round_end);
	} else {
		for_each_vcpu(vcpu, vms, n)
			run_vcpu(vcpu);
	}
}

static void set_cpuid(struct vcpu *vcpu, unsigned long times)
{
	for (unsigned long i = 0; i < times; i++, shared->cpuid++)
		KVM(vcpu->fd, KVM_SET_CPUID2, supported_cpuid(kvm_fd));
}

static bool has_svm(void)
{
	const struct kvm_cpuid_entry2 *leaf = cpuid_leaf(supported_cpuid(kvm_fd), 0x80000001);

	return leaf && leaf->ecx & 4;
}

/* KVM would let its host go from x2APIC straight to xAPIC, but a CPU may not, and 6.1 keeps the x2APIC ID then. */
static void toggle_x2apic(struct vcpu *vcpu)
{
	static const uint64_t modes[] = { APIC_BASE_ENABLE | APIC_BASE_X2APIC, 0, APIC_BASE_ENABLE };
	struct kvm_sregs sregs;

	KVM(vcpu->fd, KVM_GET_SREGS, &sregs);
	for (int i = 0; i < 3; i++) {
		sregs.apic_base &= ~(APIC_BASE_ENABLE | APIC_BASE_X2APIC);
		sregs.apic_base |= modes[i];
		KVM(vcpu->fd, KVM_SET_SREGS, &sregs);
	}
	shared->x2apic++;
}

static void toggle_svme(struct vcpu *vcpu)
{
	struct kvm_sregs sregs;

	if (!has_svm())
		fail(EXIT_CPU_LACKS, "--svme: this CPU has no SVM, or kvm_amd is loaded with nested=0");
	KVM(vcpu->fd, KVM_GET_SREGS, &sregs);
	for (int i = 0; i < 2; i++) {
		sregs.efer ^= EFER_SVME;
		KVM(vcpu->fd, KVM_SET_SREGS, &sregs);
	}
	shared->svme++;
}

static void write_spec_ctrl(struct vcpu *vcpu)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} write = { .head = { .nmsrs = 1 }, .entry = { .index = 0x48, .data = 1 } };

	if (KVM(vcpu->fd, KVM_SET_MSRS, &write) != 1) /* the number of MSRs set */
		fail(EXIT_CPU_LACKS, "KVM_SET_MSRS refused MSR_IA32_SPEC_CTRL (0x48): this CPU has no SPEC_CTRL");
	shared->spec_ctrl++;
}

static unsigned long run_updates(struct vm *vms, unsigned long n)
{
	unsigned long u;

	for (u = 0; opt.forever || u < opt.updates; u++) {
		pause_for(u ? opt.interval_ms / 1e3 : 0);
		if (stop)
			break;
		for (unsigned long v = 0; v < n; v++)
			set_filter(&vms[v], u % 2 == 0);
		run_all(vms, n);
		shared->applied += n * opt.vcpus;
		if (ticks)
			for_each_vcpu(vcpu, vms, n)
				ticks[(u * opt.vms + vcpu->vm) * opt.vcpus + vcpu->index] = vcpu->ticks;
	}
	return u;
}

/* --ready and --go. Returns whether to start. */
static bool may_start(void)
{
	static bool ready;

	if (opt.ready && !ready)
		create_file(opt.ready);
	ready = true;
	return !opt.go || access(opt.go, F_OK) == 0;
}

/* All there is to do with n VMs, numbered from first: all of them, or the one of this process. */
static void work(unsigned long first, unsigned long n)
{
	struct vm *vms = map(n * sizeof(*vms), MAP_ANONYMOUS, -1), extra;
	unsigned long done, most = 0;

	for (unsigned long v = 0; v < n; v++)
		create_vm(&vms[v], first + v);
	if (opt.threads) {
		pthread_barrier_init(&round_start, NULL, n * opt.vcpus + 1);
		pthread_barrier_init(&round_end, NULL, n * opt.vcpus + 1);
		for_each_vcpu(vcpu, vms, n)
			start_pinned(vcpu->vm * opt.vcpus + vcpu->index, vcpu_thread, vcpu);
	}
	shared->ready++;
	while (!(opt.processes ? shared->go : may_start())) {
		pause_for(0.01);
		if (stop)
			return;
	}
	for_each_vcpu(vcpu, vms, n) {
		set_cpuid(vcpu, (opt.x2apic || opt.svme) && !opt.cpuid ? 1 : opt.cpuid);
		for (unsigned long i = 0; i < opt.x2apic; i++)
			toggle_x2apic(vcpu);
		for (unsigned long i = 0; i < opt.svme; i++)
			toggle_svme(vcpu);
	}
	if (opt.initial_run)
		run_all(vms, n);
	done = run_updates(vms, n);
	while (done > most && !atomic_compare_exchange_weak(&shared->updates, &most, done))
		;
	for_each_vcpu(vcpu, vms, n)
		for (unsigned long i = 0; i < opt.spec_ctrl; i++)
			write_spec_ctrl(vcpu);
	for (unsigned long i = 0; first == 0 && i < opt.create_vms; i++, shared->created_vms++) {
		create_vm(&extra, opt.vms + i);
		destroy_vm(&extra);
	}
	if (++shared->held == (opt.processes ? opt.vms : 1) && opt.held)
		create_file(opt.held);
	pause_for(opt.hold);
}

/* --processes: a child for each VM. Returns the status of the first that failed, or 0. Children end with their
 * parent, whatever ended it: the loss of another child too. */
static int supervise(void)
{
	static const struct timespec poll = { .tv_nsec = 10000000 };
	pid_t *pids = map(opt.vms * sizeof(*pids), MAP_ANONYMOUS, -1), parent = getpid(), pid;
	sigset_t wanted = stop_signals;
	int sig, how;

	sigaddset(&wanted, SIGCHLD);
	sigprocmask(SIG_BLOCK, &wanted, NULL);
	for (unsigned long v = 0; v < opt.vms; v++) {
		pid = fork();
		if (pid < 0)
			fail(EXIT_SYSTEM, "fork: %s", strerror(errno));
		if (pid == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (getppid() == parent)
				work(v, 1);
			_exit(0);
		}
		pids[v] = pid;
	}
	for (unsigned long alive = opt.vms; alive;) {
		sig = sigtimedwait(&wanted, NULL, shared->go ? NULL : &poll);
		for (unsigned long v = 0; v < opt.vms; v++) {
			if (pids[v] && (sig == SIGINT || sig == SIGTERM))
				kill(pids[v], SIGTERM);
			if (!pids[v] || waitpid(pids[v], &how, WNOHANG) <= 0)
				continue;
			if (WIFSIGNALED(how))
				fail(EXIT_SYSTEM, "the process of VM %lu was killed by signal %d", v, WTERMSIG(how));
			if (WEXITSTATUS(how))
				return WEXITSTATUS(how); /* it has said why */
			pids[v] = 0;
			alive--;
		}
		if (!shared->go && shared->ready == opt.vms)
			shared->go = may_start();
	}
	return 0;
}

static int compare_ticks(const void *a, const void *b)
{
	unsigned long x = *(const unsigned long *)a, y = *(const unsigned long *)b;

	return x < y ? -1 : x > y;
}

static void print_ticks(size_t n)
{
	for (size_t i = 0; i < n; i++)
		printf("update %zu vm %zu vcpu %zu ticks %lu\n", i / opt.vcpus / opt.vms, i / opt.vcpus % opt.vms,
		       i % opt.vcpus, ticks[i]);
	if (!n) {
		puts("ticks: n=0");
		return;
	}
	qsort(ticks, n, sizeof(*ticks), compare_ticks);
	printf("ticks: n=%zu min=%lu median=%lu p90=%lu max=%lu\n", n, ticks[0], ticks[n / 2], ticks[n * 9 / 10],
	       ticks[n - 1]);
}

static const char usage[] =
	"usage: workload [--vms N] [--vcpus N] [--threads] [--processes] [--name NAME] [--ready FILE] [--go FILE]\n"
	"                [--cpuid N] [--x2apic N] [--svme N] [--initial-run] [--updates N | --forever]\n"
	"                [--interval MS] [--msr INDEX]... [--deny-all] [--ticks] [--spec-ctrl N] [--create-vms N]\n"
	"                [--held FILE] [--hold SECONDS] [-- ignored...]\n\n"
	"Runs KVM guests so that KVM changes MSR intercepts a known number of times: by default one VM of one vCPU and\n"
	"10 filter updates that deny and allow MSR 0xc0000100 in turn. N counts per VM (--vcpus, --updates) or per\n"
	"vCPU (--cpuid, --x2apic, --svme, --spec-ctrl). The head of workload.c explains every option.\n\n"
	"Exit status: 0 done, 1 a system call failed, 2 unexpected KVM exit, 3 the CPU lacks it, 64 wrong usage.\n";

static const struct option longopts[] = {
	{ "vms", 1, NULL, 'm' },
	{ "vcpus", 1, NULL, 'c' },
	{ "threads", 0, &opt.threads, 1 },
	{ "processes", 0, &opt.processes, 1 },
	{ "name", 1, NULL, 'n' },
	{ "ready", 1, NULL, 'r' },
	{ "go", 1, NULL, 'g' },
	{ "cpuid", 1, NULL, 'C' },
	{ "x2apic", 1, NULL, 'x' },
	{ "svme", 1, NULL, 'S' },
	{ "initial-run", 0, &opt.initial_run, 1 },
	{ "updates", 1, NULL, 'u' },
	{ "forever", 0, &opt.forever, 1 },
	{ "interval", 1, NULL, 'i' },
	{ "msr", 1, NULL, 'M' },
	{ "deny-all", 0, &opt.deny_all, 1 },
	{ "ticks", 0, &opt.ticks, 1 },
	{ "spec-ctrl", 1, NULL, 's' },
	{ "create-vms", 1, NULL, 'V' },
	{ "held", 1, NULL, 'd' },
	{ "hold", 1, NULL, 'H' },
	{ "help", 0, NULL, 'h' },
	{ 0 },
};

static void parse(int argc, char **argv)
{
	const unsigned long many = 1000000000;
	const struct option *o;
	int c, i = 0;

	while ((c = getopt_long(argc, argv, "+", longopts, &i)) != -1) {
		o = &longopts[i];
		switch (c) {
		case 0: break; /* a flag */
		case 'm': opt.vms = number(o, 1, 4096); break;
		case 'c': opt.vcpus = number(o, 1, 4096); break;
		case 'u': opt.updates = number(o, 0, many); break;
		case 'i': opt.interval_ms = number(o, 0, many); break;
		case 'M':
			if (opt.n_msrs == KVM_MSR_FILTER_MAX_RANGES)
				fail(EXIT_USAGE, "--msr: more than %d MSRs (see --help)", KVM_MSR_FILTER_MAX_RANGES);
			opt.msrs[opt.n_msrs++] = number(o, 0, UINT32_MAX);
			break;
		case 'C': opt.cpuid = number(o, 0, many); break;
		case 'x': opt.x2apic = number(o, 0, many); break;
		case 'S': opt.svme = number(o, 0, many); break;
		case 's': opt.spec_ctrl = number(o, 0, many); break;
		case 'V': opt.create_vms = number(o, 0, many); break;
		case 'H': opt.hold = seconds(o); break;
		case 'r': opt.ready = optarg; break;
		case 'g': opt.go = optarg; break;
		case 'd': opt.held = optarg; break;
		case 'n': prctl(PR_SET_NAME, optarg); break;
		case 'h': fputs(usage, stdout); exit(0);
		default: exit(EXIT_USAGE); /* getopt_long() has said why */
		}
	}
	if (optind < argc && strcmp(argv[optind - 1], "--"))
		fail(EXIT_USAGE, "'%s': only options are taken, others after -- (see --help)", argv[optind]);
	if (opt.ticks && opt.forever)
		fail(EXIT_USAGE, "--ticks needs a number of updates, not --forever (see --help)");
	if (!opt.n_msrs)
		opt.msrs[opt.n_msrs++] = 0xc0000100; /* MSR_FS_BASE: always passed through */
}

int main(int argc, char **argv)
{
	size_t samples;
	int status = 0;

	parse(argc, argv);
	kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm_fd < 0)
		fail(EXIT_SYSTEM, "/dev/kvm: %s", strerror(errno));
	run_size = KVM(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	shared = map(sizeof(*shared), MAP_ANONYMOUS, -1);
	samples = opt.ticks ? opt.updates * opt.vms * opt.vcpus : 0;
	if (samples)
		ticks = map(samples * sizeof(*ticks), MAP_ANONYMOUS | MAP_POPULATE, -1);
	if (opt.forever)
		be_stoppable();
	if (opt.processes)
		status = supervise();
	else
		work(0, opt.vms);
	if (status)
		return status;
	if (opt.ticks)
		print_ticks(samples);
	printf("workload: vms=%lu vcpus=%lu updates=%lu applied=%lu created_vms=%lu created_vcpus=%lu spec_ctrl=%lu "
	       "cpuid=%lu x2apic=%lu svme=%lu\n", opt.vms, opt.vcpus, shared->updates, shared->applied, shared->created_vms,
	       shared->created_vcpus, shared->spec_ctrl, shared->cpuid, shared->x2apic, shared->svme);
	if (fflush(stdout))
		fail(EXIT_SYSTEM, "standard output: %s", strerror(errno));
	return 0;
}
