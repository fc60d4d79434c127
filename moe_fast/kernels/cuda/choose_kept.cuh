// Choosing for many tokens, where comparisons are the cost: the same choice as `choose`, with fewer of them.
//
// Where the kept groups are half of the lanes, all lanes share their experts, each sorts its few, and what is chosen
// next is the largest of the lanes' firsts. Masked experts can only be chosen when a kept one has as low a score: then,
// and for other geometries, `choose` does it.
#pragma once
#include "choose.cuh"

constexpr bool HALF_IS_KEPT =
    WHOLE_LANES && TOPK_GROUP < GROUPS && TOPK_GROUP * GROUP_LANES == 16 && GROUPS <= 8 && PER_LANE % 2 == 0;
constexpr int SHARE = (PER_LANE + 1) / 2;  // experts a lane of the kept ones

// Keys of SHARE kept experts for this lane, best first, the lower id first among equals, and their ids.
INLINE void share_kept(const u32 (&key)[PER_LANE], int lane, u32 (&mine)[SHARE], int (&id)[SHARE]) {
    // Which group has which rank, 4 bits each; a rank's experts go to two lanes for each of its own.
    const int before = groups_before(key, lane);
    const u32 ranked = __reduce_or_sync(ALL, before < TOPK_GROUP ? u32(lane / GROUP_LANES) << 4 * before : 0u);
    const int group = ranked >> lane / (2 * GROUP_LANES) * 4 & 15;
    const int from = group * GROUP_LANES + lane / 2 % GROUP_LANES;
#pragma unroll
    for (int j = 0; j < SHARE; ++j) {
        const u32 low = __shfl_sync(ALL, key[j], from), high = __shfl_sync(ALL, key[SHARE + j], from);
        mine[j] = lane & 1 ? high : low;
        id[j] = from * PER_LANE + (lane & 1) * SHARE + j;
    }
    // Neighbours change places only if the second is larger, so that equals keep their order.
#pragma unroll
    for (int turn = 0; turn < SHARE; ++turn) {
#pragma unroll
        for (int j = turn & 1; j + 1 < SHARE; j += 2) {
            const bool swap = mine[j + 1] > mine[j];
            const u32 first = mine[j];
            const int first_id = id[j];
            mine[j] = swap ? mine[j + 1] : first;
            id[j] = swap ? id[j + 1] : first_id;
            mine[j + 1] = swap ? first : mine[j + 1];
            id[j + 1] = swap ? first_id : id[j + 1];
        }
    }
}

// As `choose`.
INLINE int choose_for_many(u32 (&key)[PER_LANE], int lane) {
    if constexpr (HALF_IS_KEPT) {
        u32 mine[SHARE];
        int id[SHARE], chosen = 0;
        share_kept(key, lane, mine, id);
        if (__ballot_sync(ALL, mine[SHARE - 1] > masked_key()) == ALL) {
#pragma unroll
            for (int k = 0; k < TOP_K; ++k) {
                const u32 top = __reduce_max_sync(ALL, mine[0]);
                const int first = int(__reduce_min_sync(ALL, mine[0] == top ? u32(id[0]) : ALL));
                const bool taken = first == id[0];
#pragma unroll
                for (int j = 0; j < SHARE; ++j) {
                    mine[j] = !taken ? mine[j] : j + 1 < SHARE ? mine[j + 1] : 0;
                    if (j + 1 < SHARE) id[j] = taken ? id[j + 1] : id[j];
                }
                if (lane == k) chosen = first;
            }
            return chosen;
        }
    }
    return choose<TOP_K>(key, lane);
}
