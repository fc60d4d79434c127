// Stands in for few_multiply.cuh: the tensor cores' product by loops.
#pragma once

struct Pairs {
    u32 four;
    Pairs() {}
    explicit Pairs(u32 four) : four(four) {}
};

inline void multiply_add(float (&d)[4], u32 upper, u32 lower, const Pairs& b);
inline void multiply_add(float (&d)[4], u32 upper, const Pairs& b) { multiply_add(d, upper, 0, b); }

inline void multiply_add(float (&d)[4], u32 upper, u32 lower, const Pairs& b) {
    host::meet(u64(upper) | u64(lower) << 32, b.four);
    const host::Warp& w = host::warp();
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
    for (int half = 0; half < 2; ++half) {
        for (int t = 0; t < 2; ++t) {
            for (int i = 0; i < 16; ++i) {
                const u8 weight = u8(w.out[0][4 * g + i / 4] >> (32 * half + 8 * (i & 3)));
                const u8 token = u8(w.out[1][4 * (2 * q + t) + i / 4] >> 8 * (i & 3));
                d[2 * half + t] += e4m3_value(weight) * e4m3_value(token);
            }
        }
    }
}
