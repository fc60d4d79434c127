// The loading warpgroup: draws items, then fills stages with weights (TMA), tokens (cp.async) and scales.
#pragma once
#include "layout.cuh"
#include "schedule.cuh"

struct Loader {
    const TensorMap *map1, *map2;  // gemm1_weights, gemm2_weights
    const Params& p;
    const Tables tables;
    u32 base, rank;
    int thread;

    // The ring, and the item at hand.
    int stage = 0, parity = 0;
    int item = 0, count = 0;  // count: items this cluster has begun
    int token = 0;  // row of the item's tokens that this thread looks after

    // What one thread alone needs lies in shared memory, for registers are short.
    static constexpr int ZEROER = 32;  // the thread that overwrites idle tokens; not the one that issues the weights
    static constexpr int DRAWN = 0, IDLE = 4, IDLE_END = 8, IDLE_TOKEN = 12;  // offsets from NOTES_AT
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
        return first ? p.row_index[row] : row;
    }

    // The two waves' boxes of a stage's weights, 128 rows each; where they are shared, each CTA loads one for both.
    template <int PHASE>
    INLINE void load_weights(const Plan& plan, int step, u32 full) const {
        const int columns = p.columns(PHASE);
        const int row = PHASE == 1 ? plan.expert * 2 * columns + plan.column * 128
                                   : plan.expert * columns + plan.column * 256;
        const bool shared = CLUSTER > 1 && plan.shared;
#pragma unroll
        for (int wave = 0; wave < 2; ++wave) {
            if (shared && wave != int(rank)) continue;
            tma_load(base + WEIGHTS_AT + stage * WEIGHT_BYTES + wave * BOX_BYTES, PHASE == 1 ? map1 : map2, full,
                     step * 128, (row + wave * (PHASE == 1 ? columns : 128)) / 32, shared ? 3 : 0);
        }
    }

    // gemm1's rows of a tile are complete when each warpgroup with rows has done every tile of columns.
    INLINE void wait_for_gemm1(const Plan& plan) const {
        const int need = column_tiles(1, p.intermediate) * (plan.live > 64 ? 2 : 1);
        while (load_acquire(p.tiles_done + tile_of(plan.row, plan.expert)) < need) {
        }
    }

    // The CTA's next idle token; the one after it is asked for.
    INLINE void zero_idle_token() const {
        int idle = note(IDLE);
        if (idle >= note(IDLE_END)) return;
        u8* to = reinterpret_cast<u8*>(p.output) + i64(note(IDLE_TOKEN)) * p.hidden * 2;
        idle += gridDim.x;
        set_note(IDLE, idle);
        if (idle < note(IDLE_END)) set_note(IDLE_TOKEN, __ldcg(p.idle_tokens + idle));
        for (int at = 0; at < p.hidden * 2; at += ZERO_BYTES) {
            bulk_store(to + at, base + ZEROS_AT, min(ZERO_BYTES, p.hidden * 2 - at));
        }
        bulk_commit();
    }

    template <int PHASE>
    INLINE void load_item(int items, int clusters) {
        const int lane = thread & 31;
        const u32 full = base + BARRIERS_AT, empty = full + STAGES * 8, mail = empty + STAGES * 8;
        const int chunk = thread & 7, first_row = thread >> 3;  // this thread copies 16 bytes of rows first_row + 16j
        const u32 copy_to = base + TOKENS_AT + first_row * 128 + ((chunk ^ (first_row & 7)) << 4);
        const u32 scale_to = base + SCALES_AT + thread * 4;
        const int depth = p.depth(PHASE), columns = p.columns(PHASE), steps = depth / 128;
        const u8* tokens = PHASE == 1 ? p.hidden_states : p.requantized;
        const float* token_scale_at = (PHASE == 1 ? p.hidden_states_scale : p.requantized_scale) + token;
        const i64 token_scale_stride = PHASE == 1 ? p.hidden_states_scale_stride : p.requantized_scale_stride;
        const float* weight_scale = PHASE == 1 ? p.gemm1_weights_scale : p.gemm2_weights_scale;

        // The next item is announced to the cluster as this one starts, the one after it drawn.
        const u32 letter = base + MAIL_AT + count % MAIL_SLOTS * 4, letter_bar = mail + count % MAIL_SLOTS * 8;
        if (thread == 0) {
            barrier_arrive_expect(letter_bar, 4);
            if (rank == 0) {
#pragma unroll
                for (int r = 0; r < CLUSTER; ++r) send_to_cta(letter, letter_bar, r, note(DRAWN));
                set_note(DRAWN, atomicAdd(p.counters, 1) + 2 * clusters);
            }
        }
        const Plan now = plan<PHASE>(item);
        if (thread == 0) {
            store_shared4i(base + WORK_AT + count % MAIL_SLOTS * 16, PHASE | now.expert << 2, now.row, now.live,
                           now.column);
        }
        const u32 sources = base + SOURCES_AT + (count & 1) * TILE_TOKENS * 4;
        store_shared_int(sources + thread * 4, token);
        if (PHASE == 2 && p.phases == 3 && now.live > 0) wait_for_gemm1(now);
        named_barrier_sync(4, LOAD_THREADS);

        const int scale_rows = (PHASE == 1 ? 2 : 1) * columns / 128;
        const int row0 = PHASE == 1 ? now.column : 2 * now.column;
        const int row1 = PHASE == 1 ? now.column + columns / 128 : min(row0 + 1, scale_rows - 1);
        const int scale0 = (now.expert * scale_rows + row0) * steps;
        const int to_scale1 = (row1 - row0) * steps;
        // Past the L1: it may hold what lay beside another tile's scales before this tile's were written.
        const auto token_scale = [&](int step) { return __ldcg(token_scale_at + step * token_scale_stride); };
        // Scales are asked for well before they are stored: no step waits for memory.
        float x[AHEAD], w0 = 0.0f, w1 = 0.0f;  // a lane holds the weights' scales of every 32nd step
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            if (u < steps) x[u] = token_scale(u);
        }
        const u8* from[TILE_TOKENS / 16];  // pointers: with offsets the copies become eight chains, one after the other
#pragma unroll
        for (int j = 0; j < TILE_TOKENS / 16; ++j) {
            from[j] = tokens + (i64(load_shared_int(sources + (16 * j + first_row) * 4)) * depth + chunk * 16);
        }
        const int left = now.live - first_row;
        int next = 0, next_token = 0;
        for (int start = 0; start < steps; start += AHEAD) {
            if (PHASE == 1 && thread == ZEROER) zero_idle_token();
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                const int step = start + u;
                if (step >= steps) break;
                if (u == 0 && step % 32 == 0 && step + lane < steps) {
                    w0 = weight_scale[scale0 + step + lane];
                    w1 = weight_scale[scale0 + to_scale1 + step + lane];
                }
                barrier_wait(empty + stage * 8, parity ^ 1);
                if (thread == 0) {
                    barrier_arrive_expect(full + stage * 8, WEIGHT_BYTES);
                    load_weights<PHASE>(now, step, full + stage * 8);
                }
                __syncwarp();
#pragma unroll
                for (int j = 0; j < TILE_TOKENS / 16; ++j) {
                    if (left > 16 * j) {
                        copy16_async(copy_to + stage * TOKEN_BYTES + j * 2048, from[j] + u * 128);
                    }
                }
                copies_arrive(full + stage * 8);
                const u32 to = scale_to + stage * SCALE_BYTES;
                store_shared(to, x[u] * __shfl_sync(0xFFFFFFFF, w0, step % 32));
                store_shared(to + TILE_TOKENS * 4, x[u] * __shfl_sync(0xFFFFFFFF, w1, step % 32));
                __syncwarp();
                if (lane < ARRIVING_LANES) barrier_arrive(full + stage * 8);
                if (step + AHEAD < steps) x[u] = token_scale(step + AHEAD);
                if (step == min(2, steps - 1)) {  // early enough that the next item's first loads find it there
                    barrier_wait_cluster(letter_bar, (count / MAIL_SLOTS) & 1);
                    next = load_shared_int(letter);
                    if (next < items) next_token = source(next);
                }
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
#pragma unroll
            for (int j = 0; j < TILE_TOKENS / 16; ++j) from[j] += AHEAD * 128;
        }
        item = next;
        token = next_token;
        ++count;
    }

    INLINE void run() {
        const int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
        const int items1 = tables.items(1, p.experts), items = items1 + tables.items(2, p.experts);
        item = cluster;  // the first two items are given, the others drawn
        if (item < items) token = source(item);
        if (thread == 0) set_note(DRAWN, cluster + clusters);
        if (thread == ZEROER) {
            const int end = p.idle_end();
            set_note(IDLE, blockIdx.x);
            set_note(IDLE_END, end);
            if (blockIdx.x < end) set_note(IDLE_TOKEN, __ldcg(p.idle_tokens + blockIdx.x));
        }
        while (item < items1) load_item<1>(items, clusters);
        while (item < items) load_item<2>(items, clusters);

        // One more stage, which says that there is nothing left.
        const u32 full = base + BARRIERS_AT, empty = full + STAGES * 8;
        barrier_wait(empty + stage * 8, parity ^ 1);
        if (thread == 0) {
            store_shared4i(base + WORK_AT + count % MAIL_SLOTS * 16, 0, 0, 0, 0);
            barrier_arrive(full + stage * 8);
        }
        copies_arrive(full + stage * 8);
        __syncwarp();
        if ((thread & 31) < ARRIVING_LANES) barrier_arrive(full + stage * 8);
        if (thread == ZEROER) {
            while (note(IDLE) < note(IDLE_END)) zero_idle_token();
            bulk_wait_read();
        }
        if (rank == 0 && thread == 0) {
            __threadfence();  // after this cluster's last draw
            if (atomicAdd(p.counters + 1, 1) == clusters - 1) p.counters[0] = 0, p.counters[1] = 0;
        }
    }
};
