// gemm2 of one share: some columns of the output, for every expert.
#pragma once
#include "few_multiply.cuh"

// A token's SwiGLU for one hit expert, as gemm1 leaves it: token g's columns 64 h + 16 q.. of each block.
struct Swiglu {
    float4 value[PART2][8];

    INLINE void load(const Params& p, const Shared& s, int hit, int warp, int lane) {
        const int g = lane >> 2, q = lane & 3;
        const bool chosen = hit < s.hits && s.chosen_by[hit] >> g & 1;
        const float* row = p.swiglu_out + (i64(hit) * TOKENS + g) * INTER;
#pragma unroll
        for (int b = 0; b < PART2; ++b) {
            const bool real = chosen && warp * PART2 + b < INTER_BLOCKS;
            const float* from = row + (warp * PART2 + b) * 128 + q * 16;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float* at = from + (i >> 2) * 64 + (i & 3) * 4;
                value[b][i] = real ? load_relaxed4(at) : float4{};
            }
        }
    }

    INLINE bool unwritten() const {
        u32 largest = 0;
#pragma unroll
        for (int b = 0; b < PART2; ++b) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float4 v = value[b][i];
                largest = max(largest, max(max(__float_as_uint(v.x), __float_as_uint(v.y)),
                                           max(__float_as_uint(v.z), __float_as_uint(v.w))));
            }
        }
        return largest == UNWRITTEN;
    }
};

// The same, re-quantised.
struct Requantized {
    Pairs payload[PART2][2][4];
    float scale[PART2][2];

    INLINE void from(const Swiglu& swiglu, int lane) {
        const int q = lane & 3;
#pragma unroll
        for (int b = 0; b < PART2; ++b) {
            float largest = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float4 v = swiglu.value[b][i];
                largest = fmaxf(largest, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
            }
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 2));
            const float mine = requantize_scale(largest), inverse = __frcp_rn(mine);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float4 v = swiglu.value[b][i];
                const u32 high = pack_e4m3(v.z * inverse, v.w * inverse);
                payload[b][i >> 2][i & 3] = Pairs(pack_e4m3(v.x * inverse, v.y * inverse) | high << 16);
            }
            scale[b][0] = __shfl_sync(ALL, mine, 8 * q);
            scale[b][1] = __shfl_sync(ALL, mine, 8 * q + 4);
        }
    }
};

// Lane i * PART2 + b has the scale of block b for the share's i-th tile.
INLINE float gemm2_scale(const Params& p, const Shared& s, int hit, int begin, int end, int warp, int lane) {
    const int tile = begin + lane / PART2, block = warp * PART2 + lane % PART2;
    if (hit >= s.hits || tile >= end || block >= INTER_BLOCKS) return 0.0f;
    return __ldg(p.gemm2_weights_scale + (i64(s.expert[hit]) * HIDDEN_BLOCKS + tile / 16) * INTER_BLOCKS + block);
}

// One expert's part of two neighbouring output tiles, in slots n and n + 1 (if `both`), for tokens 2q and 2q + 1.
// Threads of even g have the first one's columns g / 2 and 4 + g / 2, those of odd g the second one's.
INLINE void multiply_gemm2(float (&sum)[4], const Requantized& x, const Ring& ring, int n, bool both, float scales,
                           int at, int warp, int lane) {
    const int tile = lane >> 2 & 1;
    ring.await_full(n);
    if (both) ring.await_full(n + 1);
    const u32 first = ring.slot(both ? n + tile : n) + (lane >> 3) * INTER + (lane & 3) * 16 + warp * PART2 * 128;
    const u32 second = first + 4 * INTER;
#pragma unroll
    for (int b = 0; b < PART2; ++b) {
        const float tile_scale = __shfl_sync(ALL, scales, at + tile * PART2 + b);
        if (warp * PART2 + b >= INTER_BLOCKS) continue;
        float d[4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int4 v = load_shared4i(first + b * 128 + h * 64), w = load_shared4i(second + b * 128 + h * 64);
            multiply_add(d, v.x, w.x, x.payload[b][h][0]);
            multiply_add(d, v.y, w.y, x.payload[b][h][1]);
            multiply_add(d, v.z, w.z, x.payload[b][h][2]);
            multiply_add(d, v.w, w.w, x.payload[b][h][3]);
        }
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const float scale = x.scale[b][t] * tile_scale;
            sum[t] += d[t] * scale;
            sum[2 + t] += d[2 + t] * scale;
        }
    }
    ring.release(n, both ? 2 : 1, lane);
}

// gemm2 of one share: its columns of the output for all experts, summed.
INLINE void multiply_share2(const Params& p, Shared& s, const Ring& ring, int share, int& n, int warp, int lane) {
    const int begin = share_begin(share, OUTPUT_TILES), end = share_begin(share + 1, OUTPUT_TILES);
    float acc[PAIRS][4] = {};  // of a tile: tokens 2q and 2q + 1 of column g / 2, then of column 4 + g / 2
    float scales = gemm2_scale(p, s, 0, begin, end, warp, lane);
    Swiglu swiglu;
    bool asked = false;
    for (int hit = 0; hit < s.hits; ++hit) {
#pragma unroll 1
        while (!asked || __any_sync(ALL, swiglu.unwritten())) {
            swiglu.load(p, s, hit, warp, lane);
            asked = true;
        }
        Requantized x;
        x.from(swiglu, lane);
        swiglu.load(p, s, hit + 1, warp, lane);
        const float next = gemm2_scale(p, s, hit + 1, begin, end, warp, lane);
        const u32 chosen = s.chosen_by[hit] >> 2 * (lane & 3);
        const float2 weight = *reinterpret_cast<const float2*>(&s.weight[hit][2 * (lane & 3)]);
#pragma unroll 1
        for (int i = 0; i < PAIRS; ++i) {  // a loop, for instructions come cold from memory, too
            float sum[4] = {};
            const int tile = begin + 2 * i;
            if (tile < end) {
                const bool both = tile + 1 < end;
                multiply_gemm2(sum, x, ring, n, both, scales, 2 * i * PART2, warp, lane);
                n += both ? 2 : 1;
            }
            float mine[4];
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                mine[t] = acc[0][t];
                if (chosen >> (t & 1) & 1) mine[t] += (t & 1 ? weight.y : weight.x) * sum[t];
            }
#pragma unroll
            for (int t = 0; t < 4; ++t) {  // the next pair comes first: after PAIRS rounds each is back in its place
#pragma unroll
                for (int j = 0; j + 1 < PAIRS; ++j) acc[j][t] = acc[j + 1][t];
                acc[PAIRS - 1][t] = mine[t];
            }
        }
        scales = next;
    }
#pragma unroll 1
    for (int i = 0; i < PAIRS; i += 2) {  // the warps' parts, summed in order, two pairs of tiles at a time
        if (i > 0) math_sync();
#pragma unroll
        for (int u = 0; u < 2; ++u) {
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                const int token = 2 * (lane & 3) + (t & 1), column = 4 * (t >> 1) + (lane >> 3);
                s.partial[u][warp][64 * (lane >> 2 & 1) + 8 * token + column] = acc[0][t];
#pragma unroll
                for (int j = 0; j + 1 < PAIRS; ++j) acc[j][t] = acc[j + 1][t];
            }
        }
        math_sync();
        const int u = threadIdx.x >> 7, at = threadIdx.x & 127;
        const int tile = begin + 2 * (i + u) + (at >> 6), token = at >> 3 & 7;
        if (i + u < PAIRS && tile < end && token < p.tokens) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < MATH_WARPS; ++w) sum += s.partial[u][w][at];
            p.output[i64(token) * HIDDEN + tile * 8 + (at & 7)] = u16(pack_bf16(sum, 0.0f));
        }
    }
    math_sync();
}
