// gemm1 of one share: tiles of 4 columns of swiglu_out.
#pragma once
#include "few_multiply.cuh"

// The tokens' bytes that a warp needs for gemm1, converted: token g's bytes 64 h + 16 q.. of each block. They stay in
// registers, for they are the same for every expert. A column without a token has the last one's: nobody looks at it.
struct Activations {
    Pairs payload[PART1][2][4];

    INLINE Activations(const Params& p, const Ring& ring, int warp, int lane) {
        const u32 row = ring.tokens() + min(lane >> 2, p.tokens - 1) * HIDDEN + (lane & 3) * 16 + warp * PART1 * 128;
        ring.await_tokens();
#pragma unroll
        for (int b = 0; b < PART1; ++b) {
            if (!has_block1(warp, b)) break;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int4 bytes = load_shared4i(row + b * 128 + h * 64);
                payload[b][h][0] = Pairs(bytes.x), payload[b][h][1] = Pairs(bytes.y);
                payload[b][h][2] = Pairs(bytes.z), payload[b][h][3] = Pairs(bytes.w);
            }
        }
        ring.release_tokens(lane);
    }
};

// By SCALE_THREADS threads, of which this is number `first`. All of a thread's are asked for at once: everybody waits
// for them.
constexpr int SCALE_THREADS = THREADS - 32 * (MATH_WARPS + 1);
INLINE void load_x_scale(const Params& p, Shared& s, int first) {
    constexpr int COUNT = (HIDDEN_BLOCKS * TOKENS + SCALE_THREADS - 1) / SCALE_THREADS;
    float scale[COUNT];
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
        const int i = first + j * SCALE_THREADS, block = i / TOKENS, token = i % TOKENS;
        scale[j] = block < HIDDEN_BLOCKS && token < p.tokens
                       ? __ldg(p.hidden_states_scale + i64(block) * p.scale_stride + token)
                       : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
        const int i = first + j * SCALE_THREADS;
        if (i < HIDDEN_BLOCKS * TOKENS) s.x_scale[i / TOKENS][i % TOKENS] = scale[j];
    }
}

// Lane b has the scale of block b of up's rows, lane 16 + b of gate's.
INLINE float gemm1_scale(const Params& p, const Shared& s, int tile, int end, int warp, int lane) {
    const int block = warp * PART1 + (lane & 15);
    if (tile >= end || (lane & 15) >= PART1 || block >= HIDDEN_BLOCKS) return 0.0f;
    const int row = tile % TILES * COLUMNS / 128 + (lane < 16 ? 0 : INTER_BLOCKS);
    return __ldg(p.gemm1_weights_scale + (i64(s.expert[tile / TILES]) * 2 * INTER_BLOCKS + row) * HIDDEN_BLOCKS +
                 block);
}

// Which of up's columns of a tile thread g has, and thread COLUMNS + g of gate's: two threads that read together, g and
// g ^ 1, have columns in neighbouring slots. It is its own inverse: which thread has column g.
INLINE int column_of(int g) { return (g & 1) << 1 | (g >> 1 & 1); }

// sum: of tokens 2q, 2q + 1 with thread g's row of the tile, whose slots begin with n.
INLINE void multiply_gemm1(float (&sum)[2], const Shared& s, const Activations& x, const Ring& ring, int n,
                           float scales, int warp, int lane) {
    const int g = lane >> 2;
    const int of = column_of(g);
    const u32 row = ring.slot(n + g / COLUMNS * 2 + of / 2) + of % 2 * HIDDEN + (lane & 3) * 16 + warp * PART1 * 128;
#pragma unroll
    for (int b = 0; b < PART1; ++b) {
        const float row_scale = __shfl_sync(ALL, scales, g < COLUMNS ? b : 16 + b);
        if (!has_block1(warp, b)) break;
        float d[4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int4 v = load_shared4i(row + b * 128 + h * 64);
            multiply_add(d, v.x, x.payload[b][h][0]);
            multiply_add(d, v.y, x.payload[b][h][1]);
            multiply_add(d, v.z, x.payload[b][h][2]);
            multiply_add(d, v.w, x.payload[b][h][3]);
        }
        const float2 scale = *reinterpret_cast<const float2*>(&s.x_scale[warp * PART1 + b][2 * (lane & 3)]);
        sum[0] += d[0] * (scale.x * row_scale);
        sum[1] += d[1] * (scale.y * row_scale);
    }
}

// Where a lane's value of a tile goes, or null where its token did not choose the expert.
INLINE float* swiglu_at(const Params& p, const Shared& s, int tile, int lane) {
    const int hit = tile / TILES, token = lane / COLUMNS, column = tile % TILES * COLUMNS + lane % COLUMNS;
    return s.chosen_by[hit] >> token & 1 ? p.swiglu_out + (i64(hit) * TOKENS + token) * INTER + column : nullptr;
}

INLINE void store_swiglu(const Params& p, const Shared& s, const float (&partial)[MATH_WARPS][128], int tile,
                         int lane) {
    // A token's sum for a column is sum[token & 1] of that column's thread, q = token / 2; gate's is COLUMNS further.
    const int token = lane / COLUMNS, at = 32 * (token & 1) + 4 * column_of(lane % COLUMNS) + token / 2;
    float up = 0.0f, gate = 0.0f;
#pragma unroll
    for (int w = 0; w < MATH_WARPS; ++w) up += partial[w][at], gate += partial[w][at + 4 * COLUMNS];
    float* to = swiglu_at(p, s, tile, lane);
    if (to) store_relaxed(to, up * silu(gate));
}

// The share's values of an earlier call go, so that nobody takes one for this call's: everybody waits until all have.
INLINE void blank_share1(const Params& p, const Shared& s, int share, int warp, int lane) {
#pragma unroll 1
    for (int tile = share + warp * gridDim.x; tile < s.hits * TILES; tile += MATH_WARPS * gridDim.x) {
        float* to = swiglu_at(p, s, tile, lane);
        if (to) store_relaxed(to, __uint_as_float(UNWRITTEN));
    }
    math_sync();
    if (threadIdx.x == 0) add_release(p.counters + BLANKED, 1);
}

// gemm1 of one share: tiles `share`, and every gridDim.x-th from there on; n counts the ring's slots.
INLINE void multiply_share1(const Params& p, Shared& s, const Ring& ring, const Activations& x, int share, int& n,
                            int warp, int lane) {
    const int step = gridDim.x, end = s.hits * TILES;
    float scales = gemm1_scale(p, s, share, end, warp, lane);
    blank_share1(p, s, share, warp, lane);
    int count = 0;
    for (int tile = share; tile < end; tile += step, ++count, n += TILE_SLOTS) {
        const float next = gemm1_scale(p, s, tile + step, end, warp, lane);
#pragma unroll 1
        for (int i = 0; i < TILE_SLOTS; ++i) ring.await_full(n + i);
        float sum[2] = {};
        multiply_gemm1(sum, s, x, ring, n, scales, warp, lane);
        ring.release(n, TILE_SLOTS, lane);
        scales = next;
        auto& partial = s.partial[count & 1];
#pragma unroll
        for (int i = 0; i < 2; ++i) partial[warp][32 * i + lane] = sum[i];
        math_sync();  // the other buffer's readers have come here too, so it is free
        if (warp == (count & 7)) store_swiglu(p, s, partial, tile, lane);
    }
    math_sync();  // the last buffer is free
}
