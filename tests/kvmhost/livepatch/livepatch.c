// SPDX-License-Identifier: GPL-2.0-only
/*
 * A livepatch of kvm_amd that replaces set_msr_interception_bitmap() (arch/x86/kvm/svm/svm.c, 5.10 to 6.16) by a copy
 * that does the same for a vCPU without nested guests: what tracers see while the kernel is patched live.
 */
#include <linux/kvm_host.h>
#include <linux/livepatch.h>
#include <linux/module.h>

/* arch/x86/kvm/x86.h, which headers packages lack */
bool kvm_msr_allowed(struct kvm_vcpu *vcpu, u32 index, u32 type);

static void msr_interception_bitmap(struct kvm_vcpu *vcpu, u32 *msrpm, u32 msr, int read, int write)
{
	u32 first = msr & ~0x1fffU;
	unsigned int range = first == 0xc0010000 ? 2 : first == 0xc0000000 ? 1 : 0;
	u32 *word = &msrpm[range * 512 + (msr & 0x1fff) / 16];
	unsigned int bit = 2 * (msr & 15);

	if (read && !kvm_msr_allowed(vcpu, msr, KVM_MSR_FILTER_READ))
		read = 0;
	if (write && !kvm_msr_allowed(vcpu, msr, KVM_MSR_FILTER_WRITE))
		write = 0;
	*word = (*word & ~(3U << bit)) | (!read << bit) | (!write << (bit + 1));
}

static struct klp_func functions[] = {
	{ .old_name = "set_msr_interception_bitmap", .new_func = msr_interception_bitmap },
	{}
};

static struct klp_object objects[] = {
	{ .name = "kvm_amd", .funcs = functions },
	{}
};

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objects };

static int __init start(void)
{
	return klp_enable_patch(&patch);
}

static void __exit end(void)
{
}

module_init(start);
module_exit(end);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
MODULE_DESCRIPTION("kvm_amd's set_msr_interception_bitmap() once more");
