// Route and permute at most MAX_TOKENS tokens in one launch, where reading the weights is the cost and every
// microsecond before it shows. One cluster of CTAS CTAs, a warp a token: each choice that is local is noted in every
// CTA's shared memory, so that after one meeting of the cluster each warp knows the rows of its own token's choices,
// sorted by expert, then by token.
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
    int* counters;                   // [num_counters], zeroed here for the kernel that comes next
    int num_counters;
    int tokens;
    int offset;  // local_expert_offset
    int tile_rows;
    float factor;  // routed_scaling_factor
};

constexpr int WORDS = (MAX_TOKENS + 31) / 32;  // a bit for each token
constexpr int MAX_WARPS = (MAX_TOKENS + CTAS - 1) / CTAS;

// By one warp: the rows before each local expert; by the first CTA's, both offset arrays.
INLINE void sum_up(const Params& p, const u32 (&chosen_by)[LOCAL * WORDS], int (&rows_before)[LOCAL], bool stores,
                   int lane) {
    int rows = 0, tiles = 0;  // of earlier experts
    if (stores && lane == 0) p.expert_offsets[0] = p.tile_offsets[0] = 0;
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
            if (stores) p.expert_offsets[local + 1] = rows + upto, p.tile_offsets[local + 1] = tiles + tiles_upto;
        }
        rows += __shfl_sync(ALL, upto, 31);
        tiles += __shfl_sync(ALL, tiles_upto, 31);
    }
}

extern "C" __global__ void __cluster_dims__(CTAS) __launch_bounds__(MAX_WARPS * 32)
    route_permute_kernel(const __grid_constant__ Params p) {
    __shared__ u32 chosen_by[LOCAL * WORDS];  // bits of tokens
    __shared__ int rows_before[LOCAL];
    let_next_kernel_start();
    const int thread = threadIdx.x, lane = thread & 31, rank = blockIdx.x;
    const int token = (thread >> 5) * CTAS + rank;
    for (int i = thread; i < LOCAL * WORDS; i += blockDim.x) chosen_by[i] = 0;
    cluster_arrive();
    Choice choice{-1, 0.0f};
    if (token < p.tokens)
        choice = choose_for_token(p.routing_logits + i64(token) * EXPERTS, p.routing_bias, p.factor, lane);
    const bool chooses = token < p.tokens && lane < TOP_K;
    int local = chooses ? choice.id - p.offset : -1;
    if (local >= LOCAL) local = -1;
    cluster_wait();  // every CTA's bits are zero
    if (local >= 0) {
        const u32 word = shared_address(chosen_by + local * WORDS + token / 32);
#pragma unroll
        for (int r = 0; r < CTAS; ++r) or_in_cta(word, r, 1u << token % 32);
    }
    cluster_sync();  // nothing was stored to global memory yet: it would be waited for
    if (thread < 32) sum_up(p, chosen_by, rows_before, rank == 0, lane);
    for (int i = rank * blockDim.x + thread; i < p.num_counters; i += CTAS * blockDim.x) p.counters[i] = 0;
    __syncthreads();
    if (!chooses) return;
    int row = -1;
    if (local >= 0) {
        const u32* words = chosen_by + local * WORDS;
        row = rows_before[local];
        for (int w = 0; w < token / 32; ++w) row += __popc(words[w]);
        row += __popc(words[token / 32] & ((1u << token % 32) - 1));
        p.permuted_idx_to_token_idx[row] = token;
    }
    const int at = token * TOP_K + lane;
    p.topk_ids[at] = choice.id;
    p.topk_weights[at] = choice.weight;
    p.token_rows[at] = row;
}
