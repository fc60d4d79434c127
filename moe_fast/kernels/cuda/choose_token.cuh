// A token's choice and weights from its logits, by one warp.
#pragma once
#include "choose_kept.cuh"
#include "keys.cuh"

// Of lane k < TOP_K: the k-th best expert's id and its weight.
struct Choice {
    int id;
    float weight;
};

INLINE Choice choose_for_token(const float* logits, const u16* biases, float factor, int lane) {
    float logit[PER_LANE], bias[PER_LANE];
    load_experts(logits, biases, lane, logit, bias);
    u32 key[PER_LANE];
    keys_of(logit, bias, lane, key);
    const int id = choose_for_many(key, lane);
    return {id, weight_of(lane < TOP_K ? any_sigmoid(__ldg(logits + id)) : 0.0f, factor)};
}
