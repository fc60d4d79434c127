// Route: choose TOP_K experts a token, one warp a token. The first CTAs bring the tokens' scales into another order.
#include "choose_token.cuh"
#include "token_scales.cuh"

struct Params {
    const float* routing_logits;       // [T, EXPERTS]
    const u16* routing_bias;           // [EXPERTS] bf16
    int* topk_ids;                     // [T, TOP_K], best first, local or not; null: not wanted
    float* topk_weights;               // [T, TOP_K] beside them
    int* token_rows;                   // [T, TOP_K], filled with -1 here
    float* token_weights;              // [T, TOP_K] those of the local experts, ascending; what is left is not written
    const float* hidden_states_scale;  // [H/128, stride]
    float* token_scales;               // [T, scale_columns]
    u32* local_mask;                   // [WORDS, T]: bit l % 32 of word l / 32 is set where local expert l was chosen
    i64 hidden_states_scale_stride;
    int scale_blocks;  // H/128
    int scale_columns;
    int scale_ctas;  // CTAs for the scales
    int tokens;
    int offset;    // local_expert_offset
    float factor;  // routed_scaling_factor
};

constexpr int WORDS = (LOCAL + 31) / 32;
constexpr int WARPS = 4;

extern "C" __global__ void __launch_bounds__(WARPS * 32) route_kernel(const __grid_constant__ Params p) {
    let_next_kernel_start();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (blockIdx.x < p.scale_ctas) {
        const int parts = (p.scale_blocks + SCALES_AT_ONCE - 1) / SCALES_AT_ONCE;
        transpose_scales(p.hidden_states_scale, p.hidden_states_scale_stride, p.token_scales, p.scale_columns,
                         p.scale_blocks, blockIdx.x % parts * SCALES_AT_ONCE, (blockIdx.x / parts * WARPS + warp) * 32,
                         p.tokens);
        return;
    }
    const int token = (blockIdx.x - p.scale_ctas) * WARPS + warp;
    if (token >= p.tokens) return;
    const Choice choice = choose_for_token(p.routing_logits + i64(token) * EXPERTS, p.routing_bias, p.factor, lane);
    const int id = choice.id;
    const float weight = choice.weight;
    if (lane < TOP_K) {
        const i64 at = i64(token) * TOP_K + lane;
        p.token_rows[at] = -1;
        if (p.topk_ids) p.topk_ids[at] = id, p.topk_weights[at] = weight;
    }
    const int local = lane < TOP_K ? id - p.offset : -1;
    int lower = 0;  // the token's lower local experts
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const bool here = local >= w * 32 && local < min(w * 32 + 32, LOCAL);
        const u32 word = __reduce_or_sync(ALL, here ? 1u << (local & 31) : 0u);
        if (lane == 0) p.local_mask[i64(w) * p.tokens + token] = word;
        lower += __popc(local >= w * 32 + 32 ? word : here ? word & ((1u << (local & 31)) - 1) : 0u);
    }
    if (local >= 0 && local < LOCAL) p.token_weights[i64(token) * TOP_K + lower] = weight;
}
