// The product of 16 or 8 rows of weights and 8 tokens. Thread (g, q) of a warp: g = lane / 4, q = lane % 4.
#pragma once
#include "few_layout.cuh"

// Four e4m3 as two pairs of float16, which hold them exactly. Hopper has no mma.sync for e4m3: where one is written,
// the compiler converts both operands, and a conversion of a pair takes 8 cycles. So the tokens are converted once, by
// hand.
struct Pairs {
    u32 low, high;
    INLINE Pairs() {}
    INLINE explicit Pairs(u32 four) {
        asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.rn.f16x2.e4m3x2 %0, l;\ncvt.rn.f16x2.e4m3x2 %1, h;\n}"
            : "=r"(low), "=r"(high)
            : "r"(four));
    }
};

// d += a b^T for 16 of K. Which 16 is free, as long as a and b agree: a thread gives 4 neighbouring bytes of its rows.
INLINE void multiply_add(float (&d)[4], u32 upper, u32 lower, const Pairs& b) {
    const Pairs u(upper), l(lower);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(u.low), "r"(l.low), "r"(u.high), "r"(l.high), "r"(b.low), "r"(b.high));
}

// The same for 8 rows of weights; the other 8 are zeros, and so d[2] and d[3] stay. Half of the tensor core's work is
// nothing then, but converting is what takes the time.
INLINE void multiply_add(float (&d)[4], u32 upper, const Pairs& b) {
    const Pairs u(upper);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(u.low), "r"(0), "r"(u.high), "r"(b.low), "r"(b.high));
}
