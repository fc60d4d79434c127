// Loading the tokens, then weights into the ring, by one warp.
#pragma once
#include "few_layout.cuh"

INLINE void load_tokens(const Params& p, const Ring& ring, int lane) {
    if (lane == 0) barrier_arrive_expect(ring.tokens_full, p.tokens * HIDDEN);
    __syncwarp();
    if (lane < p.tokens) {
        const u8* from = p.hidden_states + i64(lane) * HIDDEN;
        bulk_load(ring.token(lane), from, HIDDEN, ring.tokens_full, evict_normal_policy());
    }
}

INLINE void load_gemm1_tile(const Params& p, const Shared& s, const Ring& ring, int tile, int& n, int lane,
                            u64 policy) {
    const u8* up = p.gemm1_weights + (i64(s.expert[tile / TILES]) * 2 * INTER + tile % TILES * COLUMNS) * HIDDEN;
#pragma unroll 1
    for (int i = 0; i < TILE_SLOTS; ++i, ++n) {
        if (lane == 0) {
            ring.await_empty(n);
            barrier_arrive_expect(ring.full_bar(n), 2 * HIDDEN);
        }
        __syncwarp();
        if (lane < 2) {
            const int row = 2 * i + lane;  // of the tile: up's, then gate's
            const u8* from = up + i64(row < COLUMNS ? row : INTER + row - COLUMNS) * HIDDEN;
            bulk_load(ring.slot(n) + lane * ROW1, from, HIDDEN, ring.full_bar(n), policy);
        }
    }
}

INLINE void load_gemm2_tile(const Params& p, int expert, const Ring& ring, int tile, int& n, int lane, u64 policy) {
    if (lane == 0) {
        ring.await_empty(n);
        barrier_arrive_expect(ring.full_bar(n), 8 * INTER);
    }
    __syncwarp();
    if (lane < 8) {
        const u8* from = p.gemm2_weights + (i64(expert) * HIDDEN + tile * 8 + lane) * INTER;
        bulk_load(ring.slot(n) + lane * ROW2, from, INTER, ring.full_bar(n), policy);
    }
    ++n;
}

// The next share; asked for while one is loaded, for the answer takes microseconds while weights stream in.
INLINE int draw(const Params& p, int which, int lane) { return lane == 0 ? atomicAdd(p.counters + which, 1) : 0; }

// Shows it to the math warps when they have seen the one before.
INLINE int show_drawn(Shared& s, int next, int& draws, int lane) {
    if (lane == 0) {
        barrier_wait(shared_address(&s.taken), (draws & 1) ^ 1);
        s.next = next;
        barrier_arrive(shared_address(&s.drawn));
    }
    ++draws;
    return __shfl_sync(ALL, next, 0);
}

INLINE void load_everything(const Params& p, Shared& s, const Ring& ring, int lane) {
    const u64 policy = evict_first_policy();  // read once
    const int shares = gridDim.x;
    int n = 0, draws = 0;
    for (int share = s.first[0]; share < shares;) {
        int next = 0;
#pragma unroll 1
        for (int tile = share; tile < s.hits * TILES || tile == share; tile += shares) {
            if (tile < s.hits * TILES) load_gemm1_tile(p, s, ring, tile, n, lane, policy);
            if (tile == share) next = draw(p, DRAWN_GEMM1, lane);  // behind it: the compiler makes the warp wait for it
        }
        share = show_drawn(s, next, draws, lane);
    }
    for (int share = s.first[1]; share < shares;) {
        const int next = draw(p, DRAWN_GEMM2, lane);
        const int begin = share_begin(share, OUTPUT_TILES), end = share_begin(share + 1, OUTPUT_TILES);
        for (int hit = 0; hit < s.hits; ++hit) {
#pragma unroll 1
            for (int tile = begin; tile < end; ++tile) {
                load_gemm2_tile(p, s.expert[hit], ring, tile, n, lane, policy);
            }
        }
        share = show_drawn(s, next, draws, lane);
    }
}
