// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What the programs that drive KVM have in common (workload.c, accesses/): how they fail, and calls of the KVM API.
 * A program defines PROGRAM, its name, before it includes this.
 */
#ifndef PROGRAM_H
#define PROGRAM_H

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { EXIT_SYSTEM = 1, EXIT_BAD_EXIT = 2, EXIT_CPU_LACKS = 3, EXIT_USAGE = 64 };

/* _exit(), as it may be a thread or a child: no atexit handlers, no second flush of stdout. */
#define fail(status, format, ...)                                           \
	do {                                                                \
		fprintf(stderr, PROGRAM ": " format "\n", ##__VA_ARGS__); \
		_exit(status);                                              \
	} while (0)

static inline int named_ioctl(int fd, unsigned long request, const char *name, unsigned long arg)
{
	int r = ioctl(fd, request, arg);

	if (r < 0)
		fail(EXIT_SYSTEM, "%s: %s", name, strerror(errno));
	return r;
}
#define KVM(fd, request, arg) named_ioctl(fd, request, #request, (unsigned long)(arg))

/* Zeroed memory, or that of a vCPU. */
static inline void *map(size_t size, int flags, int fd)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | flags, fd, 0);

	if (p == MAP_FAILED)
		fail(EXIT_SYSTEM, "mmap of %zu bytes: %s", size, strerror(errno));
	return p;
}

/* What KVM_GET_SUPPORTED_CPUID gives; the caller may change it. */
static inline struct kvm_cpuid2 *supported_cpuid(int kvm_fd)
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

/* The entry of a leaf of CPUID; NULL where there is none. */
static inline struct kvm_cpuid_entry2 *cpuid_leaf(struct kvm_cpuid2 *table, uint32_t function)
{
	for (unsigned int i = 0; i < table->nent; i++)
		if (table->entries[i].function == function)
			return &table->entries[i];
	return NULL;
}

/* A thread on the nth of the allowed CPUs, counted round and round. */
static inline void start_pinned(unsigned long nth, void *(*function)(void *), void *argument)
{
	cpu_set_t allowed, one;
	pthread_t thread;
	int cpu = 0, r;

	if (sched_getaffinity(0, sizeof(allowed), &allowed))
		fail(EXIT_SYSTEM, "sched_getaffinity: %s", strerror(errno));
	nth %= CPU_COUNT(&allowed);
	while (!CPU_ISSET(cpu, &allowed) || nth--)
		cpu++;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	r = pthread_create(&thread, NULL, function, argument);
	if (!r)
		r = pthread_setaffinity_np(thread, sizeof(one), &one);
	if (r)
		fail(EXIT_SYSTEM, "starting a thread on CPU %d: %s", cpu, strerror(r));
}

/* A number at *TEXT, decimal, or hexadecimal after 0x; *TEXT is then behind it. For --NAME, if it is none. */
static inline unsigned long leading_number(const char *name, char **text, unsigned long min, unsigned long max)
{
	unsigned long value;
	char *start = *text;

	errno = 0;
	value = strtoul(start, text, strncasecmp(start, "0x", 2) ? 10 : 16);
	if (!isdigit((unsigned char)*start) || errno || value < min || value > max)
		fail(EXIT_USAGE, "--%s: '%s' is not a number from %lu to %lu (see --help)", name, start, min, max);
	return value;
}

/* The value of the option just read. */
static inline unsigned long number(const struct option *option, unsigned long min, unsigned long max)
{
	char *end = optarg;
	unsigned long value = leading_number(option->name, &end, min, max);

	if (*end)
		fail(EXIT_USAGE, "--%s: '%s' is not a number from %lu to %lu (see --help)", option->name, optarg, min, max);
	return value;
}
#endif
