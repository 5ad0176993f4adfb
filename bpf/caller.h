/* SPDX-License-Identifier: GPL-2.0-only */
/* Who called the function that is probed. */

/* The kernel's unwinder knows what was there before a trampoline, and takes its time: thousands of instructions. */
static __always_inline u64 caller_on_stack(context *ctx, u64 function)
{
	u64 frames[8] = {}, caller = 0;
	bool found = false;

	bpf_get_stack(ctx, frames, sizeof(frames), 0);
#pragma clang loop unroll(disable)
	for (int i = 0; i < 8; i++) {
		bool inside = frames[i] - function + 16 < 32;

		if (found && !inside && !caller)
			caller = frames[i];
		found = found || inside;
	}
	return caller;
}

/* The return address; AT is the number of the value that says where the function is. */
static __always_inline u64 caller_of(context *ctx, u64 at)
{
	u64 caller = 0, function;

#ifdef FENTRY
	/*
	 * arch_prepare_bpf_trampoline(), arch/x86/net/bpf_jit_comp.c: above the arguments there may be the return value,
	 * then the frame pointer, the address in the function and the one in its caller. At most four arguments.
	 */
	u64 words[8] = {};

	function = VALUE_OF(at);
	read_kernel(words, sizeof(words), (u64)(ctx + 3));
#pragma clang loop unroll(disable)
	for (int i = 1; i < 7; i++) {
		if (!caller && words[i] - function < 16)
			caller = words[i + 1];
	}
#else
	function = PT_REGS_IP(ctx);
	read_kernel(&caller, sizeof(caller), PT_REGS_SP(ctx));
#endif
	if (!caller || caller == VALUE(kretprobe_trampoline) || caller == VALUE(fgraph_trampoline))
		caller = caller_on_stack(ctx, function);
	return caller;
}
