# SPDX-License-Identifier: GPL-2.0-or-later
# Takes the place of a bzImage's decompressor: puts the uncompressed kernel where it belongs and enters it.
#
# The kernel's real-mode setup code, which is left as it is, comes here in 32-bit mode as to any decompressor: paging
# and interrupts off, flat segments, %esi = boot_params ("32-bit Boot Protocol", Documentation/arch/x86/boot.rst).
# It leaves by the "64-bit Boot Protocol": long mode, this code and the kernel mapped where they are, CS 0x10,
# DS ES SS 0x18, interrupts off, %rsi = boot_params. direct.py links it at 0x100000, where a boot loader puts what
# follows the setup code, appends the list of moves and the kernel's pages, and defines ENTRY.

	.code32
	.globl	_start
_start:
	cli
	movl	%esi, %ebp
	# The moves: { last word of the target, last word of the source or 0 for zeros, number of words }, ended by a
	# number of 0. All go downwards, from the kernel's end to its start: the target overlaps pages yet to be moved.
	std
	movl	$moves, %ebx
	xorl	%eax, %eax
1:	movl	(%ebx), %edi
	movl	4(%ebx), %esi
	movl	8(%ebx), %ecx
	jecxz	3f
	addl	$12, %ebx
	testl	%esi, %esi
	jz	2f
	rep movsl
	jmp	1b
2:	rep stosl
	jmp	1b

3:	cld
	lgdt	gdt_register
	movl	%cr4, %eax
	orl	$0x20, %eax		# PAE
	movl	%eax, %cr4
	movl	$level4, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx	# EFER
	rdmsr
	orl	$0x100, %eax		# LME
	wrmsr
	movl	%cr0, %eax
	orl	$0x80000001, %eax	# PG, PE
	movl	%eax, %cr0
	ljmp	$0x10, $long_mode

	.code64
long_mode:
	movl	$0x18, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	$stack, %esp
	movl	%ebp, %esi
	movl	$ENTRY, %eax
	jmp	*%rax

	.balign	8
gdt:	.quad	0, 0
	.quad	0x00af9a000000ffff	# 0x10: 64-bit code
	.quad	0x00cf92000000ffff	# 0x18: data
gdt_register:
	.word	. - gdt - 1
	.long	gdt

	.balign	4096
stack:					# grows down into the padding
level4:	.quad	level3 + 3
	.balign	4096
level3:	.quad	level2 + 3
	.balign	4096
level2:	.set	page, 0			# the first GiB in pages of 2 MiB
	.rept	512
	.quad	page + 0x83
	.set	page, page + 0x200000
	.endr
moves:
