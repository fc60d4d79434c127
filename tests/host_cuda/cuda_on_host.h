// Runs a CUDA kernel's own source on the host: every thread is a fiber, and who goes on is drawn where threads meet.
//
// Stands in for hopper.cuh. Bulk copies arrive late and in any order, CTAs and warps are slow by turns, so that what
// only holds by luck of timing shows: a wrong parity, a buffer written while it is read, a wait that never ends. Memory
// is sequentially consistent and fibers change at synchronisation alone, so missing fences do not show.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define INLINE inline
#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define EVERY_LANE_ARRIVES 0
enum : u32 { ALL = 0xFFFFFFFF, ARRIVING_LANES = 1 };

struct float2 {
    float x, y;
};
struct int2 {
    int x, y;
};
struct uint2 {
    u32 x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class A, class B>
auto min(A a, B b) {
    return a < b ? a : b;
}
template <class A, class B>
auto max(A a, B b) {
    return a > b ? a : b;
}

enum { VARIABLE_BYTES = 2048 };

namespace host {

struct Mbarrier {
    int count, pending, bytes, parity;
    void settle() {
        if (pending == 0 && bytes == 0) parity ^= 1, pending = count;
    }
};

struct NamedBarrier {
    u32 arrived = 0;
    u64 generation = 0;
    void arrive(u32 threads) {
        if (++arrived == threads) arrived = 0, ++generation;
    }
};

struct Copy {
    u32 to;
    const void* from;
    u32 bytes, barrier;
};

// What the lanes of a warp show one another when they meet.
struct Warp {
    u64 in[2][32], out[2][32];
    int arrived = 0;
    u64 generation = 0;
    bool slow = false;
};

struct Cta {
    std::vector<u8> shared;
    std::map<u32, Mbarrier> barriers;
    NamedBarrier named[16];
    std::vector<Warp> warps;
    std::vector<Copy> copies;  // under way
    bool slow = false;
    int running = 0;  // threads
};

struct Index {
    u32 x;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Cta* cta;
    Index thread, block;
    u64 met = 0;  // meetings of the cluster before this thread last came to one
    bool done = false;
    std::function<bool()> ready;
};

inline Fiber* now;
inline ucontext_t scheduler;
inline Index grid;
inline std::vector<std::unique_ptr<Cta>> ctas;
inline NamedBarrier cluster;  // of all CTAs
inline std::mt19937 dice;

inline const char* broken = nullptr;  // what a thread did that no kernel may do

inline void check(bool holds, const char* what) {
    if (holds) return;
    broken = what;
    swapcontext(&now->context, &scheduler);  // for good
}

inline void wait(std::function<bool()> ready) {
    if (ready() && dice() % 8) return;
    now->ready = std::move(ready);
    swapcontext(&now->context, &scheduler);
}

inline void let_others() {
    wait([] { return true; });
}

inline Mbarrier& barrier(u32 at) {
    auto found = now->cta->barriers.find(at);
    check(found != now->cta->barriers.end(), "a barrier was used that was not made");
    return found->second;
}

inline Warp& warp() { return now->cta->warps[now->thread.x / 32]; }

inline void meet(u64 first = 0, u64 second = 0) {
    Warp& w = warp();
    const int lane = now->thread.x & 31;
    w.in[0][lane] = first, w.in[1][lane] = second;
    const u64 generation = w.generation;
    if (++w.arrived == 32) {
        memcpy(w.out, w.in, sizeof w.in);
        w.arrived = 0;
        ++w.generation;
    }
    wait([&w, generation] { return w.generation != generation; });
}

template <class T>
u64 bits(T value) {
    u64 raw = 0;
    memcpy(&raw, &value, sizeof value);
    return raw;
}
template <class T>
T of_bits(u64 raw) {
    T value;
    memcpy(&value, &raw, sizeof value);
    return value;
}

}  // namespace host

#define threadIdx (host::now->thread)
#define blockIdx (host::now->block)
#define gridDim (host::grid)

// ---- programmatic dependent launch: a grid runs alone here
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

// ---- shared memory and its barriers
// A kernel's k-th variable in shared memory.
template <class T>
T& shared_variable(int k) {
    static_assert(sizeof(T) <= VARIABLE_BYTES, "more than a variable's place");
    return *reinterpret_cast<T*>(host::now->cta->shared.data() + k * VARIABLE_BYTES);
}

inline u32 shared_address(const void* p) { return u32(static_cast<const u8*>(p) - host::now->cta->shared.data()); }

inline int4 load_shared4i(u32 address) {
    host::check(address % 16 == 0 && address + 16 <= host::now->cta->shared.size(), "a load from no shared memory");
    int4 value;
    memcpy(&value, host::now->cta->shared.data() + address, 16);
    return value;
}

inline void barrier_init(u32 at, u32 arrivals) { host::now->cta->barriers[at] = {int(arrivals), int(arrivals), 0, 0}; }
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(u32 at, u32 bytes) {
    host::Mbarrier& b = host::barrier(at);
    host::check(b.pending > 0, "more arrivals than a barrier was made for");
    b.bytes += bytes;
    --b.pending;
    b.settle();
}
inline void barrier_arrive(u32 at) {
    barrier_arrive_expect(at, 0);
    host::let_others();
}
inline void barrier_wait(u32 at, u32 parity) {
    host::Mbarrier* b = &host::barrier(at);
    host::wait([b, parity] { return u32(b->parity) != parity; });
}
inline void named_barrier_arrive(u32 id, u32 threads) { host::now->cta->named[id].arrive(threads); }
inline void named_barrier_sync(u32 id, u32 threads) {
    host::NamedBarrier* b = &host::now->cta->named[id];
    const u64 generation = b->generation;
    b->arrive(threads);
    host::wait([b, generation] { return b->generation != generation; });
}
inline void __syncthreads() { named_barrier_sync(0, u32(host::now->cta->warps.size()) * 32); }
inline void __syncwarp() { host::meet(); }
inline void cluster_arrive() {
    host::now->met = host::cluster.generation;
    host::cluster.arrive(u32(host::ctas.size() * host::now->cta->warps.size()) * 32);
}
inline void cluster_wait() {
    host::wait([before = host::now->met] { return host::cluster.generation != before; });
}
inline void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
inline void or_in_cta(u32 address, u32 rank, u32 bits) {
    host::let_others();
    host::check(host::ctas[rank]->running > 0, "shared memory of a CTA that has ended");
    u32 word;
    u8* at = host::ctas[rank]->shared.data() + address;
    memcpy(&word, at, 4);
    word |= bits;
    memcpy(at, &word, 4);
}
inline void __threadfence() {}
inline void async_proxy_fence() {}

inline u64 evict_first_policy() { return 1; }
inline u64 evict_normal_policy() { return 2; }
inline void bulk_load(u32 to, const void* from, u32 bytes, u32 at, u64) {
    host::check(to % 16 == 0 && u64(from) % 16 == 0 && bytes % 16 == 0, "a bulk copy that is not aligned to 16 bytes");
    host::check(to + bytes <= host::now->cta->shared.size(), "a bulk copy past shared memory");
    host::now->cta->copies.push_back({to, from, bytes, at});
}

template <int COUNT>
void registers_up() {}
template <int COUNT>
void registers_down() {}

// ---- lanes
template <class T>
T __shfl_sync(u32, T value, int lane) {
    host::meet(host::bits(value));
    return host::of_bits<T>(host::warp().out[0][lane & 31]);
}
template <class T>
T __shfl_xor_sync(u32, T value, int distance) {
    const int lane = threadIdx.x & 31;
    host::meet(host::bits(value));
    return host::of_bits<T>(host::warp().out[0][lane ^ distance]);
}
inline u32 __reduce_max_sync(u32, u32 value) {
    host::meet(value);
    u32 largest = 0;
    for (u64 one : host::warp().out[0]) largest = max(largest, u32(one));
    return largest;
}
inline u32 __reduce_min_sync(u32, u32 value) {
    host::meet(value);
    u32 smallest = ALL;
    for (u64 one : host::warp().out[0]) smallest = min(smallest, u32(one));
    return smallest;
}

inline u32 __reduce_add_sync(u32, u32 value) {
    host::meet(value);
    u32 sum = 0;
    for (u64 one : host::warp().out[0]) sum += u32(one);
    return sum;
}
inline u32 __reduce_or_sync(u32, u32 value) {
    host::meet(value);
    u32 all = 0;
    for (u64 one : host::warp().out[0]) all |= u32(one);
    return all;
}
inline u32 __ballot_sync(u32, int holds) {
    host::meet(holds != 0);
    u32 lanes = 0;
    for (int lane = 0; lane < 32; ++lane) lanes |= u32(host::warp().out[0][lane]) << lane;
    return lanes;
}

inline bool __any_sync(u32, bool holds) { return __ballot_sync(ALL, holds) != 0; }

// ---- global memory
inline int atomicAdd(int* at, int value) {
    host::let_others();
    const int before = *at;
    *at += value;
    return before;
}
inline u32 atomicOr(u32* at, u32 value) {
    const u32 before = *at;
    *at |= value;
    return before;
}
inline void add_release(int* at, int value) { atomicAdd(at, value); }
inline int load_acquire(const int* from) {
    host::let_others();
    return *from;
}
inline float4 load_relaxed4(const float* from) {
    host::let_others();
    return *reinterpret_cast<const float4*>(from);
}
inline void store_relaxed(float* to, float value) {
    *to = value;
    host::let_others();
}
template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcg(const T* from) {
    return *from;
}
template <class T>
T __ldcs(const T* from) {
    return *from;
}
template <class T>
void __stcs(T* to, T value) {
    *to = value;
}

// ---- arithmetic
inline int __float_as_int(float f) { return host::of_bits<int>(host::bits(f)); }
inline float __int_as_float(int i) { return host::of_bits<float>(host::bits(i)); }
inline u32 __float_as_uint(float f) { return u32(host::bits(f)); }
inline float __uint_as_float(u32 i) { return host::of_bits<float>(host::bits(i)); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float approximate_inverse(float x) { return nextafterf(1.0f / x, 0.0f); }
inline int __popc(u32 word) { return __builtin_popcount(word); }
inline float silu(float gate) { return gate / (1.0f + expf(-gate)); }
inline float requantize_scale(float largest) {
    return largest > 0.0f ? fmaxf(largest / 448.0f, 1.17549435e-38f) : 1.0f;
}

inline u32 bf16_bits(float f) {
    const u32 raw = u32(host::bits(f));
    return f != f ? 0x7FFF : (raw + 0x7FFF + (raw >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline float low_bf16(u32 packed) { return __uint_as_float(packed << 16); }
inline float high_bf16(u32 packed) { return __uint_as_float(packed & 0xFFFF0000u); }

inline float e4m3_value(u8 code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = (code & 127) == 127 ? NAN
                       : exponent          ? ldexpf(8 + mantissa, exponent - 10)
                                           : ldexpf(mantissa, -9);
    return code & 128 ? -size : size;
}
// To nearest, ties to even; what is larger than 448 becomes 448.
inline u8 e4m3_bits(float f) {
    if (f != f) return 0x7F;
    const u8 sign = signbit(f) ? 128 : 0;
    const float size = fabsf(f);
    if (size >= 448.0f) return sign | 0x7E;
    if (size < ldexpf(1.0f, -6)) return sign | u8(nearbyintf(size * 512.0f));
    int exponent;
    frexpf(size, &exponent);
    float mantissa = nearbyintf(ldexpf(size, 4 - exponent));  // 8 to 16
    if (mantissa == 16.0f) mantissa = 8.0f, ++exponent;
    return sign | u8((exponent + 6) << 3 | (int(mantissa) - 8));
}
inline u16 pack_e4m3(float low, float high) { return u16(e4m3_bits(low) | e4m3_bits(high) << 8); }
