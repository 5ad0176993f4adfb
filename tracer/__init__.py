"""msrtrace: what KVM does to the MSR bitmaps of its guests, counted on the live host."""
