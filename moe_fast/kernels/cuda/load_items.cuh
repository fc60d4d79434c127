// What both loading warpgroups know: the ring, the items one after the other, and when gemm1's rows may be read.
#pragma once
#include "layout.cuh"
#include "schedule.cuh"

struct Items {
    const Params& p;
    const Window& window;
    const Tables tables;
    u32 base, rank;
    int thread;  // of the warpgroup

    // The ring, and the item at hand.
    int stage = 0, parity = 0;
    int item = 0, count = 0;  // count: items this cluster has begun
    int token = 0;            // row of the item's tokens that this thread looks after

    INLINE u32 full() const { return base + BARRIERS_AT + stage * 8; }
    INLINE void await_empty() const { barrier_wait(full() + STAGES * 8, parity ^ 1); }
    INLINE void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    // What one thread alone needs lies in shared memory, for registers are short: the item after the next (weights'
    // loader), and the idle tokens' place, end and next one (tokens').
    enum { DRAWN = 0, IDLE = 4, IDLE_END = 8, IDLE_TOKEN = 12 };  // offsets from NOTES_AT
    INLINE int note(int at) const { return load_shared_int(base + NOTES_AT + at); }
    INLINE void set_note(int at, int value) const { store_shared_int(base + NOTES_AT + at, value); }

    template <int PHASE>
    INLINE Plan plan(int of) const {
        const int first = PHASE == 1 ? 0 : tables.items(1, p.experts);
        return plan_item<CLUSTER, TILE_TOKENS>(of - first, int(rank), tables.offsets, tables.before(PHASE), p.experts,
                                               column_tiles(PHASE, p.columns(PHASE)));
    }

    // Row of the phase's tokens that holds this thread's token of an item.
    INLINE int source(int of) const {
        const bool first = of < tables.items(1, p.experts);
        const Plan plan = first ? this->plan<1>(of) : this->plan<2>(of);
        if (plan.live == 0) return 0;
        const int row = plan.row + min(thread, plan.live - 1);
        return first ? window.row_index[row] : row;
    }

    // The letter that tells the cluster which item comes after the one at hand, and its barrier.
    INLINE u32 letter() const { return base + MAIL_AT + count % MAIL_SLOTS * 4; }
    INLINE u32 letter_bar() const { return base + BARRIERS_AT + (2 * STAGES + count % MAIL_SLOTS) * 8; }
    INLINE int read_letter() const {
        barrier_wait_cluster(letter_bar(), (count / MAIL_SLOTS) & 1);
        return load_shared_int(letter());
    }

    // gemm1's rows of a tile are complete when each warpgroup with rows has done every tile of columns.
    INLINE void wait_for_gemm1(const Plan& plan) const {
        const int need = column_tiles(1, p.intermediate) * (plan.live > 64 ? 2 : 1);
        while (load_acquire(window.tiles_done + tile_of(plan.row, plan.expert)) < need) {
        }
    }

    // Both loaders go through the items of gemm1, then of gemm2, by load_item<phase>(items of both).
    INLINE int items(int phase) const { return tables.items(phase, p.experts); }
    INLINE void first_item() {  // the first two items are given, the others drawn
        item = blockIdx.x / CLUSTER;
        if (item < items(1) + items(2)) token = source(item);
    }
};
