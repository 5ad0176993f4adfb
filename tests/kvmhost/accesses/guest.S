// SPDX-License-Identifier: GPL-2.0-or-later
// The guest of accesses.c, in 64-bit mode, interrupts off: executes a list of RDMSR and WRMSR, and counts.
//
// It is copied and uses no absolute address. The VMM has set up all registers, tables and, for L2, the VMCB or the
// values of the VMCS; so no MSR is accessed but those of the list. L1 and L2 are the same code in the same memory:
//
//	%r15	struct control, in both levels
//	%rdi	the struct op that is being executed, in both levels
//	%rsi	how often it still is to be
//	%r14	how many ops are left, in L1

#include "guest.h"

	.section guest, "a"
	.globl	guest_code, guest_code_end, guest_l2, guest_gp, guest_vmx_exit
guest_code:
	cmpq	$0, CONTROL_VMXON(%r15)
	je	list
	call	vmx_on

list:	movq	CONTROL_N_OPS(%r15), %r14
	leaq	CONTROL_OPS(%r15), %rdi
1:	testq	%r14, %r14
	jz	4f
	movq	%rdi, CONTROL_CURRENT(%r15)
	cmpl	$2, OP_LEVEL(%rdi)
	je	2f
	call	execute
	jmp	3f
2:	leaq	guest_l2(%rip), %rbp
	call	enter_l2
3:	addq	$OP_SIZE, %rdi
	decq	%r14
	jmp	1b
4:	outb	%al, $PORT_DONE
	cmpq	$0, CONTROL_STAY(%r15)
	je	list
	leaq	stay(%rip), %rbp
	call	enter_l2		// does not return
	ud2

// Executes the op at %rdi.
execute:
	movq	OP_COUNT(%rdi), %rsi
again:	testq	%rsi, %rsi
	jz	1f
	decq	%rsi
	movl	OP_MSR(%rdi), %ecx
	movl	OP_VALUE(%rdi), %eax
	movl	OP_VALUE + 4(%rdi), %edx
	incq	OP_EXECUTED(%rdi)
	cmpl	$0, OP_WRITE(%rdi)
	jne	write
read:	rdmsr
	jmp	completed
write:	wrmsr
completed:
	incq	OP_COMPLETED(%rdi)
	jmp	again
1:	ret

// #GP, in either level: counted instead of completed.
guest_gp:
	leaq	read(%rip), %rax
	cmpq	%rax, 8(%rsp)
	je	1f
	leaq	write(%rip), %rax
	cmpq	%rax, 8(%rsp)
	jne	2f
1:	incq	OP_GP(%rdi)
	leaq	again(%rip), %rax
	movq	%rax, 8(%rsp)
	addq	$8, %rsp		// the error code
	iretq
2:	movl	$UNEXPECTED_GP, %eax
unexpected:
	outl	%eax, $PORT_UNEXPECTED
	jmp	unexpected

// L2: both vendors let L1 intercept HLT, which ends its turn.
guest_l2:
	call	execute
	hlt
	ud2
stay:	outb	%al, $PORT_IN_L2
	jmp	stay

// Lets L2 run from %rbp on, to its HLT. What L1 intercepts is counted, and skipped.
enter_l2:
	cmpq	$0, CONTROL_VMCB(%r15)
	je	vmx_enter

	movq	CONTROL_VMCB(%r15), %rax
svm_enter:
	movq	%rbp, VMCB_RIP(%rax)
	clgi
	vmrun
	stgi
	movl	VMCB_EXIT_CODE(%rax), %edx
	cmpl	$SVM_EXIT_HLT, %edx
	je	2f
	cmpl	$SVM_EXIT_MSR, %edx
	je	1f
	movl	%edx, %eax
	jmp	unexpected
1:	incq	OP_REFLECTED(%rdi)
	leaq	again(%rip), %rbp
	jmp	svm_enter
2:	ret

vmx_enter:
	movl	$VMCS_GUEST_RIP, %eax
	vmwrite	%rbp, %rax
	movl	$VMCS_HOST_RSP, %eax
	vmwrite	%rsp, %rax
	cmpq	$0, CONTROL_LAUNCHED(%r15)
	jne	1f
	movq	$1, CONTROL_LAUNCHED(%r15)
	vmlaunch
	jmp	vmx_failed
1:	vmresume
	jmp	vmx_failed
guest_vmx_exit:
	movl	$VMCS_EXIT_REASON, %edx
	vmread	%rdx, %rax
	cmpl	$VMX_EXIT_HLT, %eax
	je	3f
	cmpl	$VMX_EXIT_RDMSR, %eax
	je	2f
	cmpl	$VMX_EXIT_WRMSR, %eax
	jne	unexpected
2:	incq	OP_REFLECTED(%rdi)
	leaq	again(%rip), %rbp
	jmp	vmx_enter
3:	ret

vmx_on:
	vmxon	CONTROL_VMXON(%r15)
	jbe	vmx_failed
	vmclear	CONTROL_VMCS(%r15)
	jbe	vmx_failed
	vmptrld	CONTROL_VMCS(%r15)
	jbe	vmx_failed
	movq	CONTROL_FIELDS(%r15), %rbx
	movq	CONTROL_N_FIELDS(%r15), %rcx
1:	movq	(%rbx), %rax
	movq	8(%rbx), %rdx
	vmwrite	%rdx, %rax
	jbe	vmx_failed
	addq	$16, %rbx
	decq	%rcx
	jnz	1b
	ret

vmx_failed:
	movl	$VMCS_INSTRUCTION_ERROR, %edx
	xorl	%eax, %eax
	vmread	%rdx, %rax		// leaves it where there is no VMCS
	orl	$UNEXPECTED_VMX, %eax
	jmp	unexpected
guest_code_end:

	.section .note.GNU-stack, "", @progbits
