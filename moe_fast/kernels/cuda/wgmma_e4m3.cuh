// wgmma m64nNk32, e4m3 x e4m3 -> float32, both operands K-major in shared memory with the 128-byte swizzle.
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

// d = accumulate ? d + a b^T : a b^T for one step of 32 along K.
template <int N>
INLINE void mma_step(float (&d)[N / 2], u64 a, u64 b, int accumulate);

#define REGS_8 "%0, %1, %2, %3"
#define REGS_16 REGS_8 ", %4, %5, %6, %7"
#define REGS_24 REGS_16 ", %8, %9, %10, %11"
#define REGS_32 REGS_24 ", %12, %13, %14, %15"
#define REGS_40 REGS_32 ", %16, %17, %18, %19"
#define REGS_48 REGS_40 ", %20, %21, %22, %23"
#define REGS_56 REGS_48 ", %24, %25, %26, %27"
#define REGS_64 REGS_56 ", %28, %29, %30, %31"
#define REGS_72 REGS_64 ", %32, %33, %34, %35"
#define REGS_80 REGS_72 ", %36, %37, %38, %39"
#define REGS_88 REGS_80 ", %40, %41, %42, %43"
#define REGS_96 REGS_88 ", %44, %45, %46, %47"
#define REGS_104 REGS_96 ", %48, %49, %50, %51"
#define REGS_112 REGS_104 ", %52, %53, %54, %55"
#define REGS_120 REGS_112 ", %56, %57, %58, %59"
#define REGS_128 REGS_120 ", %60, %61, %62, %63"
#define HOLD(o) "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3])
#define HOLD_8 HOLD(0)
#define HOLD_16 HOLD_8, HOLD(4)
#define HOLD_24 HOLD_16, HOLD(8)
#define HOLD_32 HOLD_24, HOLD(12)
#define HOLD_40 HOLD_32, HOLD(16)
#define HOLD_48 HOLD_40, HOLD(20)
#define HOLD_56 HOLD_48, HOLD(24)
#define HOLD_64 HOLD_56, HOLD(28)
#define HOLD_72 HOLD_64, HOLD(32)
#define HOLD_80 HOLD_72, HOLD(36)
#define HOLD_88 HOLD_80, HOLD(40)
#define HOLD_96 HOLD_88, HOLD(44)
#define HOLD_104 HOLD_96, HOLD(48)
#define HOLD_112 HOLD_104, HOLD(52)
#define HOLD_120 HOLD_112, HOLD(56)
#define HOLD_128 HOLD_120, HOLD(60)

// A, B, C: numbers of the operands after the accumulators.
// clang-format off
#define DEFINE_MMA(N, A, B, C) \
    template <> \
    INLINE void mma_step<N>(float (&d)[N / 2], u64 a, u64 b, int accumulate) { \
        asm volatile( \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %" #C ", 0;\n" \
            "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGS_##N "}, %" #A ", %" #B ", add, 1, 1;\n}" \
            : HOLD_##N \
            : "l"(a), "l"(b), "r"(accumulate)); \
    }
// clang-format on

DEFINE_MMA(128, 64, 65, 66)

#undef DEFINE_MMA
