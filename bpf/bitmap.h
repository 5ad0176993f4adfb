/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Where the bits of an MSR are in a vCPU's bitmap: Intel SDM vol. 3, "MSR-Bitmap Address"; AMD APM vol. 2, "MSR
 * Intercepts". VMX has the read bits of all MSRs, then the write bits; SVM the two bits of an MSR side by side.
 */

#define UNREADABLE 0xdead000000000000 /* no address */
#define READ_BITS 0x00ff
#define WRITE_BITS 0xff00
#define FAILED 0x10000

static __always_inline u64 byte_at(u64 address)
{
	return *(volatile u8 *)rdonly_cast(address, VALUE(cast_type));
}

static __always_inline u64 bitmap_of(u64 vcpu)
{
	u64 bitmap = 0;

	if (!VALUE(bitmap_offset))
		return 0;
	if (read_kernel(&bitmap, sizeof(bitmap), vcpu + VALUE(bitmap_offset)))
		return UNREADABLE;
	return bitmap;
}

/* Where the (VMX: read) bits of MSR are in BITMAP; 0 for an MSR outside all ranges or a CPU without a bitmap. */
static __always_inline u64 byte_of(u64 bitmap, u64 msr)
{
	u64 byte = bitmap + (msr >> 3 & 0x3ff);

	if (VALUE(msrpm)) {
		byte = bitmap + (msr >> 2 & 0x7ff);
		if (bitmap && msr - 0xc0010000 < 0x2000)
			return byte + 0x1000;
		if (bitmap && msr - 0xc0000000 < 0x2000)
			return byte + 0x800;
		return bitmap && msr < 0x2000 ? byte : 0;
	}
	if (bitmap && msr < 0x2000)
		return byte;
	if (bitmap && msr - 0xc0000000 < 0x2000)
		return byte + 0x400;
	return 0;
}

/* The bits that a call for MSR names, each in its place in its byte: of READ_BITS and of WRITE_BITS; or FAILED. */
static __always_inline u64 bits_at(u64 address, u64 msr, u64 flags)
{
	u64 bits = 0;
	u8 byte;

	if (!address)
		return 0;
	if (VALUE(msrpm)) {
		barrier();
		if (VALUE(cast_type) && flags & DIRECT)
			bits = byte_at(address);
		else if (read_kernel(&byte, 1, address))
			return FAILED;
		else
			bits = byte;
		bits >>= (msr & 3) << 1;
		return (flags & MSR_TYPE_R ? bits & 1 : 0) | (flags & MSR_TYPE_W ? (bits & 2) << 7 : 0);
	}
	if (VALUE(cast_type)) {
		barrier(); /* so that it is asked first */
		if (flags & DIRECT) {
			if (flags & MSR_TYPE_R)
				bits = byte_at(address);
			if (flags & MSR_TYPE_W)
				bits |= byte_at(address + 0x800) << 8;
			return bits & 0x101 << (msr & 7);
		}
	}
	if (flags & MSR_TYPE_R) {
		if (read_kernel(&byte, 1, address))
			return FAILED;
		bits = byte;
	}
	if (flags & MSR_TYPE_W) {
		if (read_kernel(&byte, 1, address + 0x800))
			return FAILED;
		bits |= (u64)byte << 8;
	}
	return bits & 0x101 << (msr & 7);
}
