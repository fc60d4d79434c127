// Route and permute at most MAX_TOKENS tokens in one launch, where reading the weights is the cost and every
// microsecond before it shows. A warp chooses for a token; the CTA that is the last to have chosen gives every local
// token-expert pair its row, sorted by expert, then by token.
#include "choose_token.cuh"

struct Params {
    const float* routing_logits;     // [T, EXPERTS]
    const u16* routing_bias;         // [EXPERTS] bf16
    int* topk_ids;                   // [T, TOP_K], best first, local or not
    float* topk_weights;             // [T, TOP_K] beside them
    int* token_rows;                 // [T, TOP_K] beside them: a choice's row, or -1
    int* expert_offsets;             // [LOCAL+1]
    int* tile_offsets;               // [LOCAL+1] [0] + cumsum of ceil(rows / tile_rows)
    int* permuted_idx_to_token_idx;  // [P]
    int* ticket;                     // [1], zero between launches
    int* counters;                   // [num_counters], zeroed here for the kernel that comes next
    int num_counters;
    int tokens;
    int offset;  // local_expert_offset
    int tile_rows;
    float factor;  // routed_scaling_factor
};

constexpr int WARPS = 8;
constexpr int CTA_THREADS = WARPS * 32;
constexpr int WORDS = (MAX_TOKENS + 31) / 32;                                  // a bit for each token
constexpr int CHOICES = (MAX_TOKENS * TOP_K + CTA_THREADS - 1) / CTA_THREADS;  // of a thread

// By one warp: both offset arrays from the tokens of each expert, and the rows before each.
INLINE void store_offsets(const Params& p, const u32 (&chosen_by)[LOCAL * WORDS], int (&rows_before)[LOCAL], int lane) {
    int rows = 0, tiles = 0;  // of earlier experts
    if (lane == 0) p.expert_offsets[0] = p.tile_offsets[0] = 0;
#pragma unroll 1
    for (int start = 0; start < LOCAL; start += 32) {
        const int local = start + lane;
        int mine = 0;
#pragma unroll
        for (int w = 0; w < WORDS; ++w) mine += local < LOCAL ? __popc(chosen_by[local * WORDS + w]) : 0;
        int upto = mine, tiles_upto = (mine + p.tile_rows - 1) / p.tile_rows;
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            const int other = __shfl_sync(ALL, upto, lane - d), other_tiles = __shfl_sync(ALL, tiles_upto, lane - d);
            if (lane >= d) upto += other, tiles_upto += other_tiles;
        }
        if (local < LOCAL) {
            rows_before[local] = rows + upto - mine;
            p.expert_offsets[local + 1] = rows + upto;
            p.tile_offsets[local + 1] = tiles + tiles_upto;
        }
        rows += __shfl_sync(ALL, upto, 31);
        tiles += __shfl_sync(ALL, tiles_upto, 31);
    }
}

extern "C" __global__ void __launch_bounds__(CTA_THREADS) route_permute_kernel(const __grid_constant__ Params p) {
    __shared__ u32 chosen_by[LOCAL * WORDS];
    __shared__ int rows_before[LOCAL];
    __shared__ int is_last[1];
    let_next_kernel_start();
    const int thread = threadIdx.x, lane = thread & 31, token = blockIdx.x * WARPS + (thread >> 5);
    if (token < p.tokens) {
        const Choice choice = choose_for_token(p.routing_logits + i64(token) * EXPERTS, p.routing_bias, p.factor, lane);
        const int at = token * TOP_K + lane;
        if (lane < TOP_K) p.topk_ids[at] = choice.id, p.topk_weights[at] = choice.weight;
    }
    for (int i = blockIdx.x * CTA_THREADS + thread; i < p.num_counters; i += gridDim.x * CTA_THREADS) p.counters[i] = 0;
    for (int i = thread; i < LOCAL * WORDS; i += CTA_THREADS) chosen_by[i] = 0;
    __syncthreads();
    if (thread == 0) {
        __threadfence();  // the CTA's choices are there before it counts as done
        is_last[0] = atomicAdd(p.ticket, 1) == int(gridDim.x) - 1;
        __threadfence();  // and the others' are seen after the last has counted
    }
    __syncthreads();
    if (!is_last[0]) return;
    if (thread == 0) *p.ticket = 0;

    int local[CHOICES];  // all are asked for at once
#pragma unroll
    for (int c = 0; c < CHOICES; ++c) {
        const int i = c * CTA_THREADS + thread;
        local[c] = i < p.tokens * TOP_K ? __ldcg(p.topk_ids + i) - p.offset : -1;
    }
#pragma unroll
    for (int c = 0; c < CHOICES; ++c) {
        const int at = (c * CTA_THREADS + thread) / TOP_K;
        if (local[c] < 0 || local[c] >= LOCAL) local[c] = -1;
        if (local[c] >= 0) atomicOr(&chosen_by[local[c] * WORDS + at / 32], 1u << at % 32);
    }
    __syncthreads();
    if (thread < 32) store_offsets(p, chosen_by, rows_before, lane);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < CHOICES; ++c) {
        const int i = c * CTA_THREADS + thread, at = i / TOP_K;
        if (i >= p.tokens * TOP_K) continue;
        int row = -1;
        if (local[c] >= 0) {
            const u32* words = chosen_by + local[c] * WORDS;
            row = rows_before[local[c]];
            for (int w = 0; w < at / 32; ++w) row += __popc(words[w]);
            row += __popc(words[at / 32] & ((1u << at % 32) - 1));
            p.permuted_idx_to_token_idx[row] = at;
        }
        p.token_rows[i] = row;
    }
}
