// Routing all tokens, by the math warps.
#pragma once
#include "choose.cuh"
#include "few_layout.cuh"

// What choosing needs of all tokens; it lies where the ring will be.
struct Scores {
    float score[TOKENS * EXPERTS];
    u32 key[TOKENS * EXPERTS];
};
static_assert(sizeof(Scores) <= TOKENS_SLOT * SLOT, "the scores must fit beside the tokens");

// An expert a thread. All tokens' logits are asked for at once; the rest is a loop over pairs of tokens, for
// instructions come cold from memory, too, and a short program is fetched sooner. Of an odd number the last pair has
// one too many.
INLINE void score_all(const Params& p, Scores& of) {
#pragma unroll 1
    for (int expert = threadIdx.x; expert < EXPERTS; expert += 32 * MATH_WARPS) {
        float logit[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t)
            logit[t] = t < p.tokens ? __ldg(p.routing_logits + t * EXPERTS + expert) : 0.0f;
        const float bias = bf16_to_float(__ldg(p.routing_bias + expert));
#pragma unroll 1
        for (int t = 0; t < p.tokens; t += 2) {
            bool usual = true;
            float score[2] = {usual_sigmoid(logit[0], usual), usual_sigmoid(logit[1], usual)};
            if (!usual) score[0] = sigmoid(logit[0]), score[1] = sigmoid(logit[1]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                of.score[(t + i) * EXPERTS + expert] = score[i];
                of.key[(t + i) * EXPERTS + expert] = key_of(score[i] + bias);
            }
#pragma unroll
            for (int j = 0; j + 2 < TOKENS; ++j) logit[j] = logit[j + 2];
        }
    }
}

// Lane k < TOP_K gets the local id of the token's k-th choice, or -1, and its score; other lanes -1 and 0.
INLINE void choose_experts(const Params& p, const Scores& of, int token, int lane, int& local, float& score) {
    u32 key[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const int expert = lane * PER_LANE + j;
        key[j] = expert < EXPERTS ? of.key[token * EXPERTS + expert] : 0;
    }
    const int id = choose<1>(key, lane);
    score = lane < TOP_K ? of.score[token * EXPERTS + id] : 0.0f;
    local = lane < TOP_K ? id - p.offset : -1;
    if (local < 0 || local >= LOCAL) local = -1;
}

// Each lane has a local expert, or -1.
INLINE void note_choices(Shared& s, int local, int warp, int lane) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const u32 word = __reduce_or_sync(ALL, local >= 0 && local / 32 == w ? 1u << local % 32 : 0u);
        if (lane == 0) s.chosen[warp][w] = word;
    }
}

// By one warp.
INLINE void list_hits(Shared& s, int lane) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const u32 word = __reduce_or_sync(ALL, lane < MATH_WARPS ? s.chosen[lane][w] : 0u);
        if (lane == 0) s.local_mask[w] = word;
    }
    __syncwarp();
#pragma unroll 1
    for (int local = lane; local < LOCAL; local += 32) {
        int before = 0;
#pragma unroll 1
        for (int w = 0; w < local / 32; ++w) before += __popc(s.local_mask[w]);
        const u32 word = s.local_mask[local / 32], bit = 1u << local % 32;
        if (word & bit) s.expert[before + __popc(word & (bit - 1))] = local;
        if (local == LOCAL - 1) s.hits = before + __popc(word);
    }
    __syncwarp();
}

INLINE int hit_of(const Shared& s, int local) {
    int before = 0;
    for (int w = 0; w < local / 32; ++w) before += __popc(s.local_mask[w]);
    return before + __popc(s.local_mask[local / 32] & ((1u << local % 32) - 1));
}
