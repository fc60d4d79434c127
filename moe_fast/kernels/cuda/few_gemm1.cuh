// gemm1 of one share: tiles of 8 columns of swiglu_out.
#pragma once
#include "few_multiply.cuh"

// The tokens' bytes that a warp needs for gemm1, held in registers: they are the same for every expert.
struct Activations {
    Pairs payload[PART1][2][4];  // token g's bytes 64 h + 16 q.. of each block

    INLINE void load(const Params& p, int warp, int lane) {
        const u8* from = p.hidden_states + i64(lane >> 2) * HIDDEN + warp * PART1 * 128 + (lane & 3) * 16;
#pragma unroll
        for (int b = 0; b < PART1; ++b) {
            const bool real = warp * PART1 + b < HIDDEN_BLOCKS && (lane >> 2) < p.tokens;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint4 bytes = real ? __ldg(reinterpret_cast<const uint4*>(from + b * 128 + h * 64)) : uint4{};
                payload[b][h][0] = Pairs(bytes.x), payload[b][h][1] = Pairs(bytes.y);
                payload[b][h][2] = Pairs(bytes.z), payload[b][h][3] = Pairs(bytes.w);
            }
        }
    }
};

INLINE void load_x_scale(const Params& p, Shared& s) {
#pragma unroll 1
    for (int i = threadIdx.x; i < HIDDEN_BLOCKS * TOKENS; i += 32 * MATH_WARPS) {
        const int block = i / TOKENS, token = i % TOKENS;
        s.x_scale[block][token] =
            token < p.tokens ? __ldg(p.hidden_states_scale + i64(block) * p.scale_stride + token) : 0.0f;
    }
}

// Lane b has the scale of block b of up's rows, lane 16 + b of gate's.
INLINE float gemm1_scale(const Params& p, const Shared& s, int tile, int end, int warp, int lane) {
    const int block = warp * PART1 + (lane & 15);
    if (tile >= end || (lane & 15) >= PART1 || block >= HIDDEN_BLOCKS) return 0.0f;
    const int row = tile % TILES / 16 + (lane < 16 ? 0 : INTER_BLOCKS);
    return __ldg(p.gemm1_weights_scale + (i64(s.expert[tile / TILES]) * 2 * INTER_BLOCKS + row) * HIDDEN_BLOCKS +
                 block);
}

// sum: up of tokens 2q, 2q + 1 at column g of the tile, whose slots begin with n, then gate.
INLINE void multiply_gemm1(float (&sum)[4], const Shared& s, const Activations& x, const Ring& ring, int n,
                           float scales, int warp, int lane) {
    const int g = lane >> 2;
    const u32 within = (g & 1) * ROW1 + (lane & 3) * 16 + warp * PART1 * 128;
    const u32 up_row = ring.slot(n + g / 2) + within, gate_row = ring.slot(n + 4 + g / 2) + within;
#pragma unroll
    for (int b = 0; b < PART1; ++b) {
        const float up_scale = __shfl_sync(ALL, scales, b), gate_scale = __shfl_sync(ALL, scales, 16 + b);
        if (warp * PART1 + b >= HIDDEN_BLOCKS) break;
        float d[4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int4 up = load_shared4i(up_row + b * 128 + h * 64), gate = load_shared4i(gate_row + b * 128 + h * 64);
            multiply_add(d, up.x, gate.x, x.payload[b][h][0]);
            multiply_add(d, up.y, gate.y, x.payload[b][h][1]);
            multiply_add(d, up.z, gate.z, x.payload[b][h][2]);
            multiply_add(d, up.w, gate.w, x.payload[b][h][3]);
        }
        const float2 scale = *reinterpret_cast<const float2*>(&s.x_scale[warp * PART1 + b][2 * (lane & 3)]);
        sum[0] += d[0] * (scale.x * up_scale);
        sum[1] += d[1] * (scale.y * up_scale);
        sum[2] += d[2] * (scale.x * gate_scale);
        sum[3] += d[3] * (scale.y * gate_scale);
    }
}

INLINE void store_swiglu(const Params& p, const Shared& s, const float (&partial)[MATH_WARPS][128], int tile,
                         int lane) {
    const int hit = tile / TILES, column = tile % TILES * 8 + (lane >> 2);
    float sum[4] = {};
#pragma unroll
    for (int w = 0; w < MATH_WARPS; ++w) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += partial[w][32 * i + lane];
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        const int token = 2 * (lane & 3) + t;
        if (s.chosen_by[hit] >> token & 1) {
            __stcg(p.swiglu_out + (i64(hit) * TOKENS + token) * INTER + column, sum[t] * silu(sum[2 + t]));
        }
    }
}

// gemm1 of one share; n counts the ring's slots.
INLINE void multiply_share1(const Params& p, Shared& s, const Ring& ring, const Activations& x, int share, int& n,
                            int warp, int lane) {
    const int begin = share_begin(share, s.hits * TILES), end = share_begin(share + 1, s.hits * TILES);
    float scales = gemm1_scale(p, s, begin, end, warp, lane);
    for (int tile = begin; tile < end; ++tile, n += TILE_SLOTS) {
        const float next = gemm1_scale(p, s, tile + 1, end, warp, lane);
#pragma unroll 1
        for (int i = 0; i < TILE_SLOTS; ++i) ring.await_full(n + i);
        float sum[4] = {};
        multiply_gemm1(sum, s, x, ring, n, scales, warp, lane);
        ring.release(n, TILE_SLOTS, lane);
        scales = next;
        auto& partial = s.partial[tile & 1];
#pragma unroll
        for (int i = 0; i < 4; ++i) partial[warp][32 * i + lane] = sum[i];
        math_sync();  // the other buffer's readers have come here too, so it is free
        if (warp == (tile & 7)) store_swiglu(p, s, partial, tile, lane);
    }
    math_sync();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(p.counters + DONE_GEMM1, 1);
    }
}
