// What becomes of a tile's sums: re-quantised SwiGLU (gemm1), or rows (gemm2).
#pragma once
#include "layout.cuh"

// silu(gate) * up, then one scale a row for the tile's 128 columns: amax / 448, or 1 for a block of zeros.
INLINE void store_requantized(float (&sum)[2][64], const Work& work, const Params& p, int row0, int lane) {
    const int q = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + 8 * half;
        float largest = 0.0f;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                const int at = 4 * j + 2 * half + b;
                sum[0][at] *= silu(sum[1][at]);
                largest = fmaxf(largest, fabsf(sum[0][at]));
            }
        }
        largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 2));
        const float scale = requantize_scale(largest);
        const float inverse = __frcp_rn(scale);
        if (row >= work.live) continue;
        if (q == 0) p.requantized_scale[work.column * p.requantized_scale_stride + work.row + row] = scale;
        u8* out = p.requantized + i64(work.row + row) * p.intermediate + work.column * 128 + q * 8;
#pragma unroll
        for (int a = 0; a < 4; ++a) {
            u32 packed[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int at = 16 * a + 4 * j + 2 * half;
                packed[j] = pack_e4m3(sum[0][at] * inverse, sum[0][at + 1] * inverse);
            }
            *reinterpret_cast<uint2*>(out + 32 * a) =
                make_uint2(packed[0] | packed[1] << 16, packed[2] | packed[3] << 16);
        }
    }
}

// A row that is all of its token goes straight to the output, weighted. targets: the tile's row_targets in shared
// memory.
INLINE void store_rows(float (&sum)[2][64], const Work& work, const Params& p, u32 targets, int row0, int lane) {
    const int column = work.column * 256 + (lane & 3) * 8;
    u16* to[2];
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + 8 * half;
        const int2 target = p.output ? load_shared2i(targets + row * 8) : make_int2(-1, 0);
        const bool alone = target.x >= 0;
        factor[half] = alone ? __int_as_float(target.y) : 1.0f;
        to[half] = alone ? p.output + (i64(target.x) * p.hidden + column)
                         : p.gemm2_out + (i64(work.row + row) * p.hidden + column);
    }
#pragma unroll
    for (int v = 0; v < 2; ++v) {
        if (column + v * 128 >= p.hidden) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (row0 + 8 * half >= work.live) continue;
#pragma unroll
            for (int a = 0; a < 4; ++a) {
                const float* s = &sum[v][16 * a + 2 * half];
                const float f = factor[half];
                *reinterpret_cast<uint4*>(to[half] + v * 128 + 32 * a) =
                    make_uint4(pack_bf16(f * s[0], f * s[1]), pack_bf16(f * s[4], f * s[5]),
                               pack_bf16(f * s[8], f * s[9]), pack_bf16(f * s[12], f * s[13]));
            }
        }
    }
}

// Says that this warpgroup's rows of a tile have one more block of columns.
INLINE void signal_gemm1(const Work& work, const Window& window, int group) {
    named_barrier_sync(GROUP_STORED + group, MATH_THREADS / 2);
    if ((threadIdx.x & 127) == 0) add_release(window.tiles_done + tile_of(work.row, work.expert), 1);
}
