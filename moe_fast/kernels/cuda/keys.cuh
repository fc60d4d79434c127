// Keys of a token's experts, for many tokens, where instructions are the cost: without a branch an expert, vectors at a
// time.
#pragma once
#include "choose.cuh"

constexpr bool VECTORS = EXPERTS % 128 == 0;  // each lane has whole vectors of 4 experts

// This lane's experts' logits and biases; past the last expert, 0.
INLINE void load_experts(const float* logits, const u16* biases, int lane, float (&logit)[PER_LANE],
                         float (&bias)[PER_LANE]) {
    const int first = lane * PER_LANE;
    if constexpr (VECTORS) {
#pragma unroll
        for (int j = 0; j < PER_LANE; j += 4) {
            const float4 l = __ldg(reinterpret_cast<const float4*>(logits + first + j));
            const uint2 b = __ldg(reinterpret_cast<const uint2*>(biases + first + j));
            logit[j] = l.x, logit[j + 1] = l.y, logit[j + 2] = l.z, logit[j + 3] = l.w;
            bias[j] = low_bf16(b.x), bias[j + 1] = high_bf16(b.x);
            bias[j + 2] = low_bf16(b.y), bias[j + 3] = high_bf16(b.y);
        }
    } else {
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            logit[j] = first + j < EXPERTS ? __ldg(logits + first + j) : 0.0f;
            bias[j] = first + j < EXPERTS ? bf16_to_float(__ldg(biases + first + j)) : 0.0f;
        }
    }
}

INLINE void keys_of(const float (&logit)[PER_LANE], const float (&bias)[PER_LANE], int lane, u32 (&key)[PER_LANE]) {
    bool usual = true;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        key[j] = key_of_usual(usual_sigmoid(logit[j], usual) + bias[j]);
    }
    if (!usual) {
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) key[j] = key_of(sigmoid(logit[j]) + bias[j]);
    }
    if constexpr (EXPERTS % 32 != 0) {
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            if (lane * PER_LANE + j >= EXPERTS) key[j] = 0;
        }
    }
}
