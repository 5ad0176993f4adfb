/* SPDX-License-Identifier: GPL-2.0-only */
/* What a program gets from the probe that runs it: fentry and fexit (FENTRY), or a kprobe. */

#ifdef FENTRY
typedef u64 context;
#define ARGUMENT(ctx, n) ((ctx)[(n) - 1])
#define RESULT(ctx, arguments) ((ctx)[arguments])

/* bpf_get_func_arg(), 5.17 and newer. The verifier lets nobody calculate with a pointer that is read from ctx. */
static long (*get_argument)(u64 *ctx, u32 n, u64 *value) = (void *)183;

static __always_inline u64 argument_at(u64 *ctx, u32 place)
{
	u64 value = 0;

	get_argument(ctx, place, &value);
	return value;
}
#define POINTER_ARGUMENT(ctx, n) argument_at(ctx, (n) - 1)
#else
typedef struct pt_regs context;
#define ARGUMENT(ctx, n) PT_REGS_PARM##n(ctx)
#define RESULT(ctx, arguments) PT_REGS_RC(ctx)
#define POINTER_ARGUMENT(ctx, n) PT_REGS_PARM##n(ctx)
#endif
#define pointer_argument(ctx) POINTER_ARGUMENT(ctx, 1)

#define barrier() asm volatile("" ::: "memory")
#define barrier_var(var) asm volatile("" : "+r"(var))

/* As BCC declares it, but for the types: with these, nothing is cut to 32 bits. */
static long (*read_kernel)(void *to, u64 size, u64 from) = (void *)BPF_FUNC_probe_read_kernel;

/*
 * bpf_rdonly_cast(), kernel/bpf/helpers.c: with a type for which reading is allowed, a load is an instruction instead of
 * 80. The number is a placeholder: BCC can call helpers alone, so tracer/program/relocation.py puts that of the kernel's in.
 */
static void *(*rdonly_cast)(u64 address, u32 type) = (void *)0x7f000001;
