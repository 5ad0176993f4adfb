// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What the programs that drive KVM have in common (workload.c, accesses/): how they fail, wait and end, their options,
 * and calls of the KVM API.
 */
#ifndef PROGRAM_H
#define PROGRAM_H

#include <errno.h>
#include <getopt.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { EXIT_SYSTEM = 1, EXIT_BAD_EXIT = 2, EXIT_CPU_LACKS = 3, EXIT_USAGE = 64 };

/* _exit(), as it may be a thread or a child: no atexit handlers, no second flush of stdout. */
#define fail(status, format, ...)                                                                      \
	do {                                                                                           \
		fprintf(stderr, "%s: " format "\n", program_invocation_short_name, ##__VA_ARGS__); \
		_exit(status);                                                                         \
	} while (0)

/* An ioctl that must not fail. */
int named_ioctl(int fd, unsigned long request, const char *name, unsigned long arg);
#define KVM(fd, request, arg) named_ioctl(fd, request, #request, (unsigned long)(arg))

/* Zeroed memory, or that of a vCPU. */
void *map(size_t size, int flags, int fd);

extern sigset_t stop_signals; /* none, or once stoppable: blocked, so that they never interrupt a KVM_RUN */
extern bool stop; /* one came */

/* From now on SIGINT and SIGTERM end a pause, and not the program. */
void be_stoppable(void);
/* Sleeps; if stoppable it is also where a stop signal is noticed. */
void pause_for(double seconds);

void create_file(const char *name);

/* A thread on the nth of the allowed CPUs, counted round and round. */
void start_pinned(unsigned long nth, void *(*function)(void *), void *argument);

/* What KVM_GET_SUPPORTED_CPUID gives; the caller may change it. */
struct kvm_cpuid2 *supported_cpuid(int kvm_fd);
/* The entry of a leaf of CPUID; NULL where there is none. */
struct kvm_cpuid_entry2 *cpuid_leaf(struct kvm_cpuid2 *table, uint32_t function);

/* A number at *TEXT, decimal, or hexadecimal after 0x; *TEXT is then behind it. For --NAME, if it is none. */
unsigned long leading_number(const char *name, char **text, unsigned long min, unsigned long max);
/* The value of the option just read. */
unsigned long number(const struct option *option, unsigned long min, unsigned long max);
/* The same, in seconds. */
double seconds(const struct option *option);
#endif
