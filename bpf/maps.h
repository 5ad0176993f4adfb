/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is counted, where readers find it: in mapped arrays. They know these structs by the names of their members
 * (tracer/program/structs.py). Capacities are powers of two; those of counters and updates are smaller where processes are
 * not told apart (tracer/trace/plan.py).
 */
#define COUNTERS_CAPACITY 65536
#define UPDATES_CAPACITY 4096
#define VCPUS_CAPACITY 16384
#define VMMS_CAPACITY 4096
#define BUCKETS 32 /* a power of two, so that masking bounds an index for every verifier */

/* What the vCPU is inside of; but for NONE, the kinds of an update. The creation of a vCPU asks for those of CREATION. */
enum within { NONE, FILTER_CHANGE, RECALC, CREATION };

/* A kind of call, as readers see it. The program has all but the MSR in one number, and the whole in one word. */
struct call {
	u32 msr;
	u8 type; /* MSR_TYPE_*: the directions that it names */
	u8 enables; /* those of them that it wants intercepted */
	u8 within; /* of enum within */
	u8 state;
};
#define MSR_TYPE_R 1
#define MSR_TYPE_W 2
#define MSR_TYPE_RW 3
#define ENABLES(type) ((type) << 8)
#define INSIDE(within) ((within) << 16)
#define VALID 0x1000000 /* so none is 0 */
#define DIRECT 0x2000000 /* the bitmap is known to be readable, and may be read without asking */

/*
 * A call adds to one of the last three, of which the sum is the number of calls. A reader copies upwards, a writer
 * adds to `changed` first: a copy never has more changed bits than calls.
 */
struct outcome {
	u64 changed_read;
	u64 changed_write;
	u64 refused; /* a disable that left a named bit set: the filter said no */
	u64 redundant; /* the named bits are after the call what they were before */
	u64 changed; /* they are not */
	u64 unknown; /* the bitmap could not be read */
};

/*
 * The outcomes of a kind of call, found without a hash table. Inside an update `site` is 0 and `caller` that of the
 * first such call.
 */
struct counter {
	struct outcome outcome;
	u64 caller;
	u64 site;
	u64 vmm; /* vmm_of() its process; 0 unless by_pid; of processes that have ended, too */
	union {
		u64 key; /* 0: free */
		struct call call;
	};
};

struct vcpu {
	u64 vcpu; /* struct kvm_vcpu *; 0: free */
	u64 seq; /* of the last call: odd while it is open, one more when it was counted */
	/* the call that is open */
	u64 address; /* byte_of() its MSR. 0: it has none */
	union {
		u64 key; /* these two, together */
		struct {
			u32 msr;
			u32 flags; /* the rest of struct call */
		};
	};
	u32 before; /* bits_at() its entry */
	u32 counter;
	u32 pid; /* 0 unless by_pid, as the next two */
	u32 tid;
	u64 vmm; /* vmm_of() it */
	u64 order; /* order_of() its counters */
	/* the update that is under way */
	u64 inside; /* INSIDE(), maybe DIRECT */
	u64 started; /* ns; 0: none was seen */
	u64 bitmap;
	u64 filter; /* the generation of the VM's filter that the bitmap was last computed from */
	u64 update; /* where it is counted */
	u32 creating; /* INSIDE(CREATION) until the vCPU is there; only if creations are followed */
	u32 uncomputed; /* the bitmap has not been recalculated since then */
	/* settle_call()'s alone */
	u64 looked_at;
	u64 exits;
};

struct update {
	u64 count; /* entered */
	u64 nanoseconds; /* of those that were seen to return, and so are in a bucket */
	u64 buckets[BUCKETS]; /* [i], i > 0: up to 64 << i ns, and more than 64 << (i - 1) unless i is 1; the last: any more */
	u64 vmm; /* as in struct counter */
	u32 kind; /* of enum within; NONE: free */
	u32 unused;
};
#define UPDATE_WORDS (2 + BUCKETS)

/* A process that made a vCPU, and what it was called then. */
struct vmm {
	u64 id; /* vmm_of() it; 0: free */
	char command[16];
};

struct counts {
	u64 dropped_calls;
	u64 dropped_vcpus;
	u64 dropped_updates;
	u64 unpaired_update; /* entered, and then entered again, or its vCPU was freed, without a return in between */
	u64 unpaired_return; /* returned without an entry */
	u64 read_failed;
	u64 vcpus_seen;
	u64 vmms_seen;
	u64 vcpus_created; /* whose creation was followed to its end */
	u64 places_taken; /* in counters and in updates */
	u64 follow_creations; /* set by a reader: the functions that begin and end one are probed */
};

/* The arrays whose places are taken; and claim() takes some. */
enum table { COUNTERS, UPDATES, VCPUS };
#define PLACES (COUNTERS_CAPACITY + UPDATES_CAPACITY + 2 * VCPUS_CAPACITY)
#include "places.h"

MAPPED_ARRAY(counters, struct counter, COUNTERS_CAPACITY);
MAPPED_ARRAY(updates, struct update, UPDATES_CAPACITY);
MAPPED_ARRAY(vcpus, struct vcpu, VCPUS_CAPACITY);
MAPPED_ARRAY(vmms, struct vmm, VMMS_CAPACITY);

static __always_inline bool creations_are_followed(void)
{
	u32 zero = 0;
	struct counts *read = counts.lookup(&zero);

	return read && read->follow_creations;
}

/*
 * In how many places of its array something may be. A counter may also be in as many of the other half: 600 processes
 * have room for 58 counters each, where 150 had with half the places and 16 ways.
 */
#define COUNTER_WAYS 32
#define UPDATE_WAYS 16
#define VMM_WAYS 16
