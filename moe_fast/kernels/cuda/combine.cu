// Combine: weighted sum of each token's rows in float32, experts in ascending order, one final cast to bfloat16.
//
// A CTA does one token after the other. A token's permuted rows ascend as its experts do. Tokens without a row become
// exactly zero, or are left alone where another kernel has written them already.
#include "hopper.cuh"

#ifndef WIDE
#define WIDE 0  // gemm2_out is fp32 instead of bf16
#endif
#ifndef TOP_K
#define TOP_K 8
#endif

struct Params {
    const void* gemm2_out;  // [P, hidden]
    const float* topk_weights;  // [T, TOP_K]
    const int* token_rows;  // [T, TOP_K], -1 where a choice is not local
    u16* output;  // [T, hidden] bf16
    const int* window_tokens;  // [2] first token and the one past the last; null: 0 and `tokens`
    int hidden;
    int tokens;
    int skip_idle;
    int unused;
};

constexpr int THREADS = 224;
constexpr int AT_ONCE = 4;  // vectors of 8 columns a thread has under way: H 7168 in one go

#if WIDE
struct Vector {
    float4 low, high;
};

INLINE Vector load8(const Params& p, i64 at) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(p.gemm2_out) + at);
    return {__ldcs(from), __ldcs(from + 1)};
}

INLINE void add8(float (&sum)[8], float weight, const Vector& v) {
    const float x[8] = {v.low.x, v.low.y, v.low.z, v.low.w, v.high.x, v.high.y, v.high.z, v.high.w};
#pragma unroll
    for (int c = 0; c < 8; ++c) sum[c] += weight * x[c];
}
#else
using Vector = uint4;

INLINE Vector load8(const Params& p, i64 at) {
    return __ldcs(reinterpret_cast<const uint4*>(static_cast<const u16*>(p.gemm2_out) + at));
}

INLINE void add8(float (&sum)[8], float weight, const Vector& v) {
    const u32 pair[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        sum[2 * c] += weight * __uint_as_float(pair[c] << 16);
        sum[2 * c + 1] += weight * __uint_as_float(pair[c] & 0xFFFF0000u);
    }
}
#endif

INLINE void combine_token(const Params& p, i64 token) {
    int row[TOP_K];
    float weight[TOP_K];
#pragma unroll
    for (int k = 0; k < TOP_K; ++k) {
        const int r = __ldg(p.token_rows + token * TOP_K + k);
        row[k] = r < 0 ? 0x7FFFFFFF : r;
        weight[k] = __ldg(p.topk_weights + token * TOP_K + k);
    }
#pragma unroll
    for (int round = 0; round < TOP_K; ++round) {  // odd-even sort: absent rows last
#pragma unroll
        for (int k = round & 1; k + 1 < TOP_K; k += 2) {
            const bool swap = row[k] > row[k + 1];
            const int r = row[k];
            const float w = weight[k];
            row[k] = swap ? row[k + 1] : r;
            weight[k] = swap ? weight[k + 1] : w;
            row[k + 1] = swap ? r : row[k + 1];
            weight[k + 1] = swap ? w : weight[k + 1];
        }
    }
    if (p.skip_idle && row[0] == 0x7FFFFFFF) return;
    const int vectors = p.hidden / 8;
    for (int start = threadIdx.x; start < vectors; start += THREADS * AT_ONCE) {
        float sum[AT_ONCE][8] = {};
#pragma unroll
        for (int k = 0; k < TOP_K; ++k) {
            if (row[k] == 0x7FFFFFFF) break;
            Vector x[AT_ONCE];
#pragma unroll
            for (int v = 0; v < AT_ONCE; ++v) {
                const int at = start + v * THREADS;
                x[v] = at < vectors ? load8(p, i64(row[k]) * p.hidden + at * 8) : Vector{};
            }
#pragma unroll
            for (int v = 0; v < AT_ONCE; ++v) add8(sum[v], weight[k], x[v]);
        }
#pragma unroll
        for (int v = 0; v < AT_ONCE; ++v) {
            const int at = start + v * THREADS;
            if (at < vectors) {
                const uint4 packed = {pack_bf16(sum[v][0], sum[v][1]), pack_bf16(sum[v][2], sum[v][3]),
                                      pack_bf16(sum[v][4], sum[v][5]), pack_bf16(sum[v][6], sum[v][7])};
                __stcs(reinterpret_cast<uint4*>(p.output + token * p.hidden + at * 8), packed);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) combine_kernel(const __grid_constant__ Params p) {
    wait_for_previous_kernel();
    const int begin = p.window_tokens ? __ldcg(p.window_tokens) : 0;
    const int end = p.window_tokens ? __ldcg(p.window_tokens + 1) : p.tokens;
    for (int token = begin + blockIdx.x; token < end; token += gridDim.x) combine_token(p, token);
    let_next_kernel_start();
}
