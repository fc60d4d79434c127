// Loading the tokens, then weights into the ring, by one thread.
#pragma once
#include "few_layout.cuh"

INLINE void load_tokens(const Params& p, const Ring& ring) {
    const u32 bytes = p.tokens * HIDDEN;
    barrier_arrive_expect(ring.tokens_full, bytes);
    bulk_load(ring.tokens(), p.hidden_states, bytes, ring.tokens_full, evict_normal_policy());
}

// Fills the ring's slots one after the other. A fast card brings one in half a microsecond, so little is done for one:
// a single copy, to a place that is counted on.
struct Filler {
    const Ring& ring;
    const u64 policy = evict_first_policy();  // read once
    int slot = 0, late = STAGES - UNDER_WAY;
    u32 parity = 1, late_parity = 1;  // of the round before the first one, which no barrier waits for
    bool first_round = true;

    // The slot has been read as often as it was filled, and of the slots before it fewer than UNDER_WAY have not come:
    // what is asked for queues behind them.
    INLINE void fill(const u8* from, u32 bytes) {
        barrier_wait(ring.full + late * 8, late_parity);
        if (first_round && slot == TOKENS_SLOT) barrier_wait(ring.tokens_empty, 0);
        barrier_wait(ring.empty + slot * 8, parity);
        const u32 full = ring.full + slot * 8;
        barrier_arrive_expect(full, bytes);
        bulk_load(ring.slots + slot * SLOT, from, bytes, full, policy);
        if (++slot == STAGES) slot = 0, parity ^= 1, first_round = false;
        if (++late == STAGES) late = 0, late_parity ^= 1;
    }
};

INLINE void load_gemm1_tile(const Params& p, const Shared& s, Filler& filler, int tile) {
    const u8* up = p.gemm1_weights + (i64(s.expert[tile / TILES]) * 2 * INTER + tile % TILES * COLUMNS) * HIDDEN;
#pragma unroll 1
    for (int i = 0; i < TILE_SLOTS; ++i) {
        if (i == TILE_SLOTS / 2) up += i64(INTER - COLUMNS) * HIDDEN;  // gate's
        filler.fill(up, 2 * HIDDEN);
        up += 2 * HIDDEN;
    }
}

// The next share; asked for while one is loaded, for the answer takes microseconds while weights stream in.
INLINE int draw(const Params& p, int which) { return atomicAdd(p.counters + which, 1); }

// Shows it to the math warps when they have seen the one before.
INLINE int show_drawn(Shared& s, int next, int& draws) {
    barrier_wait(shared_address(&s.taken), (draws & 1) ^ 1);
    s.next = next;
    barrier_arrive(shared_address(&s.drawn));
    ++draws;
    return next;
}

INLINE void load_everything(const Params& p, Shared& s, const Ring& ring) {
    const int shares = gridDim.x;
    Filler filler{ring};
    int draws = 0;
    for (int share = s.first[0]; share < shares;) {
        int next = 0;
#pragma unroll 1
        for (int tile = share; tile < s.hits * TILES || tile == share; tile += shares) {
            if (tile < s.hits * TILES) load_gemm1_tile(p, s, filler, tile);
            if (tile == share) next = draw(p, DRAWN_GEMM1);  // behind it: the compiler may wait for it
        }
        share = show_drawn(s, next, draws);
    }
    for (int share = s.first[1]; share < shares;) {
        const int next = draw(p, DRAWN_GEMM2);
        const int begin = share_begin(share, OUTPUT_TILES), end = share_begin(share + 1, OUTPUT_TILES);
        for (int hit = 0; hit < s.hits; ++hit) {
            const u8* from = p.gemm2_weights + (i64(s.expert[hit]) * HIDDEN + begin * 8) * INTER;
#pragma unroll 1
            for (int tile = begin; tile < end; ++tile, from += 8 * INTER) filler.fill(from, 8 * INTER);
        }
        share = show_drawn(s, next, draws);
    }
}
