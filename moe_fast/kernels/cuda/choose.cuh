// Choosing TOP_K experts for a token, DeepSeek-V3's way, by one warp.
//
// Scores become unsigned keys of the same order: NaN is the largest (as torch sorts it), 0 stands for "taken". Of equal
// keys the lower id wins.
#pragma once
#include "hopper.cuh"

constexpr int PER_LANE = (EXPERTS + 31) / 32;  // lane l holds experts l * PER_LANE and on
constexpr int GROUP = EXPERTS / GROUPS;
// Whether a group is a power of two of whole lanes; if not, its scores are reduced over the warp, group by group.
constexpr int GROUP_LANES = GROUP / PER_LANE;
constexpr bool WHOLE_LANES =
    GROUP % PER_LANE == 0 && GROUP_LANES > 0 && (GROUP_LANES & (GROUP_LANES - 1)) == 0 && GROUP_LANES <= 32;

INLINE u32 key_of(float score) {
    if (score == 0.0f) score = 0.0f;  // -0 equals 0
    int bits = __float_as_int(score);
    if (score != score) bits = 0x7FFFFFFF;
    return u32(bits < 0 ? bits ^ 0x7FFFFFFF : bits) ^ 0x80000000u;
}

// The same of a sum of a usual_sigmoid, which is above 0, so that it is not -0. The unit's own NaN has no sign and is
// the largest.
INLINE u32 key_of_usual(float score) {
    const int bits = __float_as_int(score);
    return u32(bits) ^ (u32(bits >> 31) | 0x80000000u);
}

INLINE float score_of(u32 key) {
    const int bits = int(key ^ 0x80000000u);
    return __int_as_float(bits < 0 ? bits ^ 0x7FFFFFFF : bits);
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The same bits without a branch, for many at a time: an estimate of the inverse and one step of Newton's are what a
// division does unless an operand is out of the ordinary. Then `usual` becomes false, and the result means nothing.
INLINE float usual_sigmoid(float x, bool& usual) {
    const float divisor = 1.0f + expf(-x);
    usual = usual && divisor < 8.507059e37f;  // 2^126, whose inverse is the smallest normal number
    const float estimate = approximate_inverse(divisor);
    return fmaf(estimate, fmaf(-divisor, estimate, 1.0f), estimate);
}

// The bits of `sigmoid` for any x, by way of usual_sigmoid where that holds.
INLINE float any_sigmoid(float x) {
    bool usual = true;
    const float score = usual_sigmoid(x, usual);
    return usual ? score : sigmoid(x);
}

INLINE float bf16_to_float(u16 bits) { return __uint_as_float(u32(bits) << 16); }

// The two largest keys seen; 0 where there is none.
struct BestTwo {
    u32 first = 0, second = 0;
    INLINE void add(u32 key) {
        second = max(second, min(first, key));
        first = max(first, key);
    }
    INLINE void merge_lanes(int lanes) {
        for (int d = 1; d < lanes; d <<= 1) {
            const u32 other = __shfl_xor_sync(ALL, first, d), other_second = __shfl_xor_sync(ALL, second, d);
            second = max(min(first, other), max(second, other_second));
            first = max(first, other);
        }
    }
    INLINE u32 sum_key() const { return key_of(GROUP > 1 ? score_of(first) + score_of(second) : score_of(first)); }
};

// How many groups come before this lane's, where a group is whole lanes.
INLINE int groups_before(const u32 (&key)[PER_LANE], int lane) {
    BestTwo best;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) best.add(key[j]);
    best.merge_lanes(GROUP_LANES);
    const u32 mine = best.sum_key();
    const int group = lane / GROUP_LANES, first_lane = group * GROUP_LANES;
    int before = 0;
#pragma unroll
    for (int start = 0; start < GROUPS; start += GROUP_LANES) {  // a group's lanes look at as many other groups
        const int g = start + lane - first_lane;
        const u32 other = __shfl_sync(ALL, mine, g * GROUP_LANES & 31);
        const u32 lanes = __ballot_sync(ALL, g < GROUPS && (other > mine || (other == mine && g < group)));
        before += __popc(lanes >> first_lane & (ALL >> (32 - GROUP_LANES)));
    }
    return before;
}

// What experts of all but the TOPK_GROUP best groups become: the lowest finite number.
INLINE u32 masked_key() { return key_of(-3.4028234663852886e38f); }

INLINE void mask_groups(u32 (&key)[PER_LANE], int lane) {
    const u32 masked = masked_key();
    if constexpr (WHOLE_LANES) {
        const int before = groups_before(key, lane);
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            if (before >= TOPK_GROUP && key[j] != 0) key[j] = masked;
        }
    } else {
        u32 scores[GROUPS];
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            BestTwo best;
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j) best.add((lane * PER_LANE + j) / GROUP == g ? key[j] : 0);
            best.merge_lanes(32);
            scores[g] = best.sum_key();
        }
        u32 kept = 0;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            int before = 0;
#pragma unroll
            for (int other = 0; other < GROUPS; ++other) {
                before += scores[other] > scores[g] || (scores[other] == scores[g] && other < g);
            }
            kept |= u32(before < TOPK_GROUP) << g;
        }
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            const int expert = lane * PER_LANE + j;
            if (expert < EXPERTS && !(kept >> (expert / GROUP) & 1)) key[j] = masked;
        }
    }
}

// Lane k < TOP_K gets the id of the k-th best of the keys, where lane l has those of experts l * PER_LANE and on; the
// keys are used up.
template <int UNROLL>
INLINE int choose(u32 (&key)[PER_LANE], int lane) {
    if constexpr (TOPK_GROUP < GROUPS) mask_groups(key, lane);
    int chosen = 0;
#pragma unroll UNROLL
    for (int k = 0; k < TOP_K; ++k) {
        u32 best = 0;
        int at = 0;
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            if (key[j] > best) best = key[j], at = j;
        }
        const u32 top = __reduce_max_sync(ALL, best);
        const u32 first = __reduce_min_sync(ALL, best == top ? u32(lane * PER_LANE + at) : ALL);
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            if (u32(lane * PER_LANE + j) == first) key[j] = 0;
        }
        if (lane == k) chosen = int(first);
    }
    return chosen;
}

// Weight of lane k's choice, k < TOP_K, from its score, which is 0 in lanes without a choice.
INLINE float weight_of(float score, float factor) {
    constexpr int FURTHEST = TOP_K > 16 ? 16 : TOP_K > 8 ? 8 : TOP_K > 4 ? 4 : TOP_K > 2 ? 2 : TOP_K > 1 ? 1 : 0;
    float total = score;
#pragma unroll
    for (int d = FURTHEST; d > 0; d >>= 1) total += __shfl_xor_sync(ALL, total, d);
    return score / (total + 1e-20f) * factor;
}
