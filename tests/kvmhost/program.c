// SPDX-License-Identifier: GPL-2.0-or-later
#define _GNU_SOURCE
#include "program.h"

#include <ctype.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

sigset_t stop_signals;
bool stop;
static bool stoppable;

int named_ioctl(int fd, unsigned long request, const char *name, unsigned long arg)
{
	int r = ioctl(fd, request, arg);

	if (r < 0)
		fail(EXIT_SYSTEM, "%s: %s", name, strerror(errno));
	return r;
}

void *map(size_t size, int flags, int fd)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | flags, fd, 0);

	if (p == MAP_FAILED)
		fail(EXIT_SYSTEM, "mmap of %zu bytes: %s", size, strerror(errno));
	return p;
}

void be_stoppable(void)
{
	stoppable = true;
	sigemptyset(&stop_signals);
	sigaddset(&stop_signals, SIGINT);
	sigaddset(&stop_signals, SIGTERM);
	sigprocmask(SIG_BLOCK, &stop_signals, NULL);
}

void pause_for(double seconds)
{
	struct timespec ts = { .tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (time_t)seconds) * 1e9) };

	if (stoppable)
		stop |= sigtimedwait(&stop_signals, NULL, &ts) > 0;
	else if (seconds > 0)
		while (nanosleep(&ts, &ts) && errno == EINTR)
			;
}

void create_file(const char *name)
{
	int fd = open(name, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);

	if (fd < 0)
		fail(EXIT_SYSTEM, "%s: %s", name, strerror(errno));
	close(fd);
}

struct kvm_cpuid2 *supported_cpuid(int kvm_fd)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256]; /* the most any kernel gives */
	} table;

	if (!table.head.nent) {
		table.head.nent = 256;
		KVM(kvm_fd, KVM_GET_SUPPORTED_CPUID, &table);
	}
	return &table.head;
}

struct kvm_cpuid_entry2 *cpuid_leaf(struct kvm_cpuid2 *table, uint32_t function)
{
	for (unsigned int i = 0; i < table->nent; i++)
		if (table->entries[i].function == function)
			return &table->entries[i];
	return NULL;
}

static int nth_allowed_cpu(unsigned long nth)
{
	cpu_set_t allowed;
	int cpu = 0;

	if (sched_getaffinity(0, sizeof(allowed), &allowed))
		fail(EXIT_SYSTEM, "sched_getaffinity: %s", strerror(errno));
	nth %= CPU_COUNT(&allowed);
	while (!CPU_ISSET(cpu, &allowed) || nth--)
		cpu++;
	return cpu;
}

void start_pinned(unsigned long nth, void *(*function)(void *), void *argument)
{
	cpu_set_t one;
	pthread_t thread;
	int cpu, r;

	r = pthread_create(&thread, NULL, function, argument);
	if (r)
		fail(EXIT_SYSTEM, "starting a thread: %s", strerror(r));
	do {
		cpu = nth_allowed_cpu(nth);
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		r = pthread_setaffinity_np(thread, sizeof(one), &one);
	} while (r == EINVAL); /* it has gone offline since it was allowed */
	if (r)
		fail(EXIT_SYSTEM, "moving a thread to CPU %d: %s", cpu, strerror(r));
}

unsigned long leading_number(const char *name, char **text, unsigned long min, unsigned long max)
{
	unsigned long value;
	char *start = *text;

	errno = 0;
	value = strtoul(start, text, strncasecmp(start, "0x", 2) ? 10 : 16);
	if (!isdigit((unsigned char)*start) || errno || value < min || value > max)
		fail(EXIT_USAGE, "--%s: '%s' is not a number from %lu to %lu (see --help)", name, start, min, max);
	return value;
}

unsigned long number(const struct option *option, unsigned long min, unsigned long max)
{
	char *end = optarg;
	unsigned long value = leading_number(option->name, &end, min, max);

	if (*end)
		fail(EXIT_USAGE, "--%s: '%s' is not a number from %lu to %lu (see --help)", option->name, optarg, min,
		     max);
	return value;
}

double seconds(const struct option *option)
{
	char *end;
	double value = strtod(optarg, &end);

	if (end == optarg || *end || !(value >= 0 && value <= 1e9))
		fail(EXIT_USAGE, "--%s: '%s' is not a number of seconds (see --help)", option->name, optarg);
	return value;
}
