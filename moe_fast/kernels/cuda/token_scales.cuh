// The tokens' scales, a token's beside one another: a gathered token's scale then brings the next seven from the L2.
// SCALES_AT_ONCE: how many blocks of K a lane copies, a multiple of 4.
#pragma once
#include "hopper.cuh"

// to[token][k] = from[k][token] for 32 tokens from first_token and SCALES_AT_ONCE blocks from first_block; one warp.
// Rows of `to` are `columns` long, a multiple of 4; what lies past the last block becomes 0.
INLINE void transpose_scales(const float* from, i64 from_stride, float* to, int columns, int blocks, int first_block,
                             int first_token, int tokens) {
    const int token = first_token + (threadIdx.x & 31);
    if (token >= tokens) return;
    float x[SCALES_AT_ONCE];
#pragma unroll
    for (int u = 0; u < SCALES_AT_ONCE; ++u) {
        x[u] = first_block + u < blocks ? __ldg(from + (first_block + u) * from_stride + token) : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < SCALES_AT_ONCE; u += 4) {
        if (first_block + u >= blocks) break;
        *reinterpret_cast<float4*>(to + i64(token) * columns + first_block + u) =
            make_float4(x[u], x[u + 1], x[u + 2], x[u + 3]);
    }
}
