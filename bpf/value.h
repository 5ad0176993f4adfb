/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How a program gets what differs between kernels and between starts: whoever loads it puts the members of its struct
 * values in (tracer/program/relocation.py), as constants: the verifier then removes what can no longer be reached, so a
 * condition on one costs one instruction.
 */
BPF_ARRAY(values, struct values, 1); /* for BCC to describe; no such map is made */

#define NUMBER_OF(name) (offsetof(struct values, name) / sizeof(u64))
#define VALUE_OF(number) ({ u64 value; asm volatile("%0 = %1 ll" : "=r"(value) : "i"(0x6d73727400000000 + (number))); value; })
#define VALUE(name) VALUE_OF(NUMBER_OF(name))
