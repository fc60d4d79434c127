// Hopper's own instructions, one inline function each. Shared-memory addresses are 32-bit (`.shared` state space).
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define INLINE __device__ __forceinline__

enum : u32 { ALL = 0xFFFFFFFF };  // every lane of a warp

struct alignas(64) TensorMap {
    u64 opaque[16];  // filled on the host by cuTensorMapEncodeTiled
};

INLINE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

INLINE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
INLINE void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// ---- programmatic dependent launch: no-ops unless the launch asked for it
INLINE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
INLINE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- mbarriers
// Where a warp arrives as one, lane 0 does it after __syncwarp. compute-sanitizer's racecheck does not follow that
// order: compiled with EVERY_LANE_ARRIVES every lane arrives, and what it then reports is not about the ring's
// barriers.
#ifndef EVERY_LANE_ARRIVES
#define EVERY_LANE_ARRIVES 0
#endif
enum : u32 { ARRIVING_LANES = EVERY_LANE_ARRIVES ? 32 : 1 };

INLINE void barrier_init(u32 bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

// Its memory may then serve for something else, another barrier too.
INLINE void barrier_end(u32 bar) { asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bar) : "memory"); }

INLINE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

INLINE void barrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }

INLINE void barrier_arrive_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

INLINE u32 in_cta(u32 address, u32 rank) {
    u32 mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// Orders this thread's earlier reads only: a release at cluster scope would wait for its stores to global memory.
INLINE void barrier_arrive_in_cta(u32 bar, u32 rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(in_cta(bar, rank)) : "memory");
}

// Stores 4 bytes in a CTA of the cluster and counts them on that CTA's barrier.
INLINE void send_to_cta(u32 address, u32 bar, u32 rank, int value) {
    const u32 to = in_cta(address, rank), counted_by = in_cta(bar, rank);
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to), "r"(value),
                 "r"(counted_by)
                 : "memory");
}

// Sets bits of a word in a CTA of the cluster; seen there after the cluster's next meeting.
INLINE void or_in_cta(u32 address, u32 rank, u32 bits) {
    asm volatile("red.relaxed.cluster.shared::cluster.or.b32 [%0], %1;" ::"r"(in_cta(address, rank)), "r"(bits)
                 : "memory");
}

#define WAIT_LOOP(SCOPE) \
    "{\n.reg .pred done;\nagain:\n" \
    "mbarrier.try_wait.parity.acquire." SCOPE \
    ".shared::cta.b64 done, [%0], %1;\n" \
    "@done bra finished;\nbra again;\nfinished:\n}"

INLINE void barrier_wait(u32 bar, u32 parity) { asm volatile(WAIT_LOOP("cta")::"r"(bar), "r"(parity) : "memory"); }

// For data that another CTA of the cluster stored.
INLINE void barrier_wait_cluster(u32 bar, u32 parity) {
    asm volatile(WAIT_LOOP("cluster")::"r"(bar), "r"(parity) : "memory");
}
#undef WAIT_LOOP

INLINE void named_barrier_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

INLINE void named_barrier_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- copies
// One box of a rank-5 tensor map at (first, 0, 0, 0, last), to the same offset of every CTA in `mask` (0: only here).
INLINE void tma_load(u32 to, const TensorMap* map, u32 bar, int first, int last, u16 mask) {
    if (mask == 0) {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
            "[%1, {%3, %4, %4, %4, %5}], [%2];" ::"r"(to),
            "l"(map), "r"(bar), "r"(first), "r"(0), "r"(last)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
            "[%1, {%3, %4, %4, %4, %5}], [%2], %6;" ::"r"(to),
            "l"(map), "r"(bar), "r"(first), "r"(0), "r"(last), "h"(mask)
            : "memory");
    }
}

INLINE void tma_prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

INLINE u64 evict_first_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    return policy;
}

INLINE u64 evict_normal_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy));
    return policy;
}

// `bytes` (a multiple of 16) of contiguous memory, counted on a barrier.
INLINE void bulk_load(u32 to, const void* from, u32 bytes, u32 bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(bar), "l"(policy)
        : "memory");
}

INLINE void copy16_async(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// 4 or 8 bytes, by way of the L1: for memory that no kernel writes meanwhile.
template <int BYTES>
INLINE void copy_async(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}

// Arrives once on the barrier when all of this thread's earlier asynchronous copies are done, without holding it up.
INLINE void copies_arrive(u32 bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

// From shared memory, without holding the thread up.
INLINE void bulk_store(void* to, u32 from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}

INLINE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until every committed bulk_store has read its source.
INLINE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

INLINE int load_acquire(const int* from) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

// Values that need no order: each is there or is not.
INLINE float4 load_relaxed4(const float* from) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

INLINE void store_relaxed(float* to, float value) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}

// After this thread's earlier writes, and those that it knows of by a barrier.
INLINE void add_release(int* to, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// The same, and the number before.
INLINE int fetch_add_release(int* to, int value) {
    int before;
    asm volatile("atom.release.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(value) : "memory");
    return before;
}

// Makes ordinary writes to shared memory that this thread has seen visible to its tensor-core operations.
INLINE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers of a warpgroup
template <int COUNT>
INLINE void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
INLINE void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- small arithmetic
// Of a number whose inverse is normal, to one unit in the last place.
INLINE float approximate_inverse(float x) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
}

INLINE u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

INLINE float low_bf16(u32 packed) { return __uint_as_float(packed << 16); }
INLINE float high_bf16(u32 packed) { return __uint_as_float(packed & 0xFFFF0000u); }

// Clamps to +-448 as it casts; NaN stays NaN.
INLINE u16 pack_e4m3(float low, float high) {
    u16 packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}

INLINE float silu(float gate) { return __fdividef(gate, 1.0f + __expf(-gate)); }

// Scale of a block with that largest magnitude: amax / 448, or 1 for a block of zeros. Not below the smallest normal
// number, so that its inverse is finite.
INLINE float requantize_scale(float largest) {
    return largest > 0.0f ? fmaxf(__fdiv_rn(largest, 448.0f), 1.17549435e-38f) : 1.0f;
}

INLINE int4 load_shared4i(u32 address) {
    int4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address));
    return v;
}

INLINE int2 load_shared2i(u32 address) {
    int2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}

INLINE void store_shared4i(u32 address, int x, int y, int z, int w) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

INLINE void store_shared_int(u32 address, int value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

INLINE int load_shared_int(u32 address) {
    int v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

INLINE float load_shared(u32 address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
    return v;
}
