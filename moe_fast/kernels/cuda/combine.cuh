// Combine: weighted sum of a token's rows in float32, experts in ascending order, one final cast to bfloat16.
//
// For the tokens of a list. A CTA of COUNT threads takes one part of a token's columns after the other, and asks for
// what it must know of the next one before it sums the one at hand. A token without a row becomes exactly zero.
#pragma once
#include "hopper.cuh"

struct CombineParams {
    const u16* gemm2_out;        // [P, hidden] bf16
    const float* token_weights;  // [T, TOP_K] beside token_rows
    const int* token_rows;       // [T, TOP_K] a token's rows, ascending, then -1
    const int* tokens;           // [T] the list
    const int* bounds;           // [2] its first entry, and the one past its last; then the next window's
    u16* output;                 // [T, hidden] bf16
    int hidden;
    int unused;
};

constexpr int VECTORS = 2;  // of 8 columns, a thread: half of H 7168 with 224 threads
constexpr int ROWS_AT_ONCE = 2;

// A token and its rows, in shared memory.
struct Item {
    int token;
    int rows[TOP_K];
    float weights[TOP_K];
};

INLINE void add8(float (&sum)[8], float weight, const uint4& v) {
    const u32 pair[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        sum[2 * c] += weight * low_bf16(pair[c]);
        sum[2 * c + 1] += weight * high_bf16(pair[c]);
    }
}

template <int COUNT>
INLINE void sum_rows(const CombineParams& p, const Item& item, int part) {
    const int vectors = p.hidden / 8, first = part * COUNT * VECTORS + threadIdx.x;
    float sum[VECTORS][8] = {};
#pragma unroll 1
    for (int start = 0; start < TOP_K && item.rows[start] >= 0; start += ROWS_AT_ONCE) {
        uint4 x[ROWS_AT_ONCE][VECTORS];
        bool real[ROWS_AT_ONCE];
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; ++r) {
            const int index = start + r < TOP_K ? item.rows[start + r] : -1;
            real[r] = index >= 0;
            const u16* row = p.gemm2_out + i64(index) * p.hidden;
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) {
                const int at = first + v * COUNT;
                if (real[r] && at < vectors) x[r][v] = __ldcs(reinterpret_cast<const uint4*>(row + at * 8));
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; ++r) {
            if (!real[r]) break;
            const float weight = item.weights[start + r];
#pragma unroll
            for (int v = 0; v < VECTORS; ++v) add8(sum[v], weight, x[r][v]);
        }
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int at = first + v * COUNT;
        if (at < vectors) {
            const uint4 packed = {pack_bf16(sum[v][0], sum[v][1]), pack_bf16(sum[v][2], sum[v][3]),
                                  pack_bf16(sum[v][4], sum[v][5]), pack_bf16(sum[v][6], sum[v][7])};
            __stcs(reinterpret_cast<uint4*>(p.output + i64(item.token) * p.hidden + at * 8), packed);
        }
    }
}

// This CTA's part of the list between two bounds. `items` may be used again when all threads have returned. With WAITS
// only gemm2_out is the previous kernel's; the rest was there before that one, which has seen it.
template <int COUNT, bool WAITS>
INLINE void combine(const CombineParams& p, const int* bounds, Item (&items)[2]) {
    const int parts = (p.hidden / 8 + COUNT * VECTORS - 1) / (COUNT * VECTORS);
    const int end = __ldcg(bounds + 1) * parts;
    int at = __ldcg(bounds) * parts + blockIdx.x;
    // Thread k knows the next item's k-th row and its weight before the item at hand is summed, and says so after it.
    const int k = threadIdx.x;
    int token = 0, row = 0;
    float weight = 0.0f;
    const auto ask = [&](int item) {  // past the L1, which may hold what an earlier call left there
        if (item >= end || k >= TOP_K) return;
        token = __ldcg(p.tokens + item / parts);
        row = __ldcg(p.token_rows + i64(token) * TOP_K + k);
        weight = __ldcg(p.token_weights + i64(token) * TOP_K + k);
    };
    const auto say = [&](Item& item) {
        if (k < TOP_K) item.rows[k] = row, item.weights[k] = weight;
        if (k == 0) item.token = token;
        __syncthreads();
    };
    ask(at);
    say(items[0]);
    if (WAITS) wait_for_previous_kernel();
    for (int count = 0; at < end; ++count, at += gridDim.x) {
        ask(at + gridDim.x);
        sum_rows<COUNT>(p, items[count & 1], at % parts);
        say(items[~count & 1]);
    }
}
