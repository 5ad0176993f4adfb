/* SPDX-License-Identifier: GPL-2.0-only */
/* What a program gets from the probe that runs it: fentry and fexit (FENTRY), or a kprobe. */

#ifdef FENTRY
typedef u64 context;
#define ARGUMENT(ctx, n) ((ctx)[(n) - 1])
#define RESULT(ctx, arguments) ((ctx)[arguments])

/* bpf_get_func_arg(), 5.17 and newer. The verifier lets nobody calculate with a pointer that is read from ctx. */
static long (*get_argument)(u64 *ctx, u32 n, u64 *value) = (void *)183;

static __always_inline u64 pointer_argument(u64 *ctx)
{
	u64 value = 0;

	get_argument(ctx, 0, &value);
	return value;
}
#else
typedef struct pt_regs context;
#define ARGUMENT(ctx, n) PT_REGS_PARM##n(ctx)
#define RESULT(ctx, arguments) PT_REGS_RC(ctx)
#define pointer_argument(ctx) PT_REGS_PARM1(ctx)
#endif

#define barrier() asm volatile("" ::: "memory")
#define barrier_var(var) asm volatile("" : "+r"(var))

/* As BCC declares it, but for the types: with these, nothing is cut to 32 bits. */
static long (*read_kernel)(void *to, u64 size, u64 from) = (void *)BPF_FUNC_probe_read_kernel;
