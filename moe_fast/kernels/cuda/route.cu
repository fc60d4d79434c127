// Route: choose TOP_K experts a token, one warp a token.
#include "choose.cuh"

struct Params {
    const float* routing_logits;  // [T, EXPERTS]
    const u16* routing_bias;  // [EXPERTS] bf16
    int* topk_ids;  // [T, TOP_K]
    float* topk_weights;  // [T, TOP_K]
    int* token_rows;  // [T, TOP_K], filled with -1 here
    u32* local_mask;  // [WORDS, T]: bit l % 32 of word l / 32 is set where local expert l was chosen
    int tokens;
    int offset;  // local_expert_offset
    float factor;  // routed_scaling_factor
    int unused;
};

constexpr int WORDS = (LOCAL + 31) / 32;

extern "C" __global__ void __launch_bounds__(128) route_kernel(const __grid_constant__ Params p) {
    let_next_kernel_start();
    const int lane = threadIdx.x & 31;
    const int token = blockIdx.x * 4 + (threadIdx.x >> 5);
    if (token >= p.tokens) return;
    const float* logits = p.routing_logits + i64(token) * EXPERTS;
    u32 key[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const int expert = lane * PER_LANE + j;
        key[j] = expert < EXPERTS ? key_of(sigmoid(__ldg(logits + expert)) + bf16_to_float(__ldg(p.routing_bias + expert)))
                                  : 0;
    }
    const int id = choose<TOP_K>(key, lane);
    const float weight = weight_of(lane < TOP_K ? sigmoid(__ldg(logits + id)) : 0.0f, p.factor);
    if (lane < TOP_K) {
        const i64 at = i64(token) * TOP_K + lane;
        p.topk_ids[at] = id;
        p.topk_weights[at] = weight;
        p.token_rows[at] = -1;
    }
    const int local = lane < TOP_K ? id - p.offset : -1;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const bool here = local >= w * 32 && local < min(w * 32 + 32, LOCAL);
        const u32 word = __reduce_or_sync(ALL, here ? 1u << (local & 31) : 0u);
        if (lane == 0) p.local_mask[i64(w) * p.tokens + token] = word;
    }
}
