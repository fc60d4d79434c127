// wgmma m64n128k32, e4m3 x e4m3 -> float32, both operands K-major in shared memory with the 128-byte swizzle.
//
// Accumulator layout: thread (warp w of 4, lane = 4i + q) holds d[4j + 2p + b] = D[16w + 8p + i][8j + 2q + b].
#pragma once
#include "hopper.cuh"

// Descriptor of a K-major tile of 128-byte rows: groups of 8 rows are 1024 bytes apart, swizzle 128 bytes.
// Its low word counts in units of 16 bytes, so that a place further along is a sum.
INLINE u32 descriptor_low(u32 address) { return 1u << 16 | (address & 0x3FFFF) >> 4; }

INLINE u64 tile_descriptor(u32 low) { return u64(1u << 30 | 1024 >> 4) << 32 | low; }

INLINE void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
INLINE void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Keeps the compiler from moving uses of the accumulators across the asynchronous product.
template <int COUNT>
INLINE void pin(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define HOLD4(o) "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3])
#define HOLD16(o) HOLD4(o), HOLD4(o + 4), HOLD4(o + 8), HOLD4(o + 12)

// d = accumulate ? d + a b^T : a b^T for one step of 32 along K; 64 rows of a, 128 of b.
INLINE void mma_step(float (&d)[64], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, add, 1, 1;\n}"
        : HOLD16(0), HOLD16(16), HOLD16(32), HOLD16(48)
        : "l"(a), "l"(b), "r"(accumulate));
}

#undef HOLD16
#undef HOLD4
