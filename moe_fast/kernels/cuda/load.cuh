// The loading warpgroup: draws items, then fills stages with weights (TMA), tokens (cp.async) and scales.
#pragma once
#include "layout.cuh"
#include "schedule.cuh"

template <int PHASE>
struct Loader {
    const TensorMap* map;
    const Params& p;
    const int* offsets;
    const int* items_before;  // [L+1] items before each expert
    u32 base, rank;
    int thread, column_count;

    INLINE Plan plan(int item) const {
        return plan_item<CLUSTER, TILE_TOKENS>(item, int(rank), offsets, items_before, p.experts, column_count);
    }

    // Row of `p.tokens` that holds this thread's token of a plan.
    INLINE int source(const Plan& plan) const {
        const int row = plan.row + min(thread, plan.live - 1);
        if (plan.live == 0) return 0;
        return p.row_index ? p.row_index[row] : row;
    }

    // The two waves' boxes of a stage's weights, 128 rows each; where they are shared, each CTA loads one for both.
    INLINE void load_weights(const Plan& plan, int step, int stage, u32 full) const {
        const int row = PHASE == 1 ? plan.expert * 2 * p.columns + plan.column * 128
                                   : plan.expert * p.columns + plan.column * 256;
        const bool shared = CLUSTER > 1 && plan.shared;
#pragma unroll
        for (int wave = 0; wave < 2; ++wave) {
            if (shared && wave != int(rank)) continue;
            tma_load(base + WEIGHTS_AT + stage * WEIGHT_BYTES + wave * BOX_BYTES, map, full, step * 128,
                     (row + wave * (PHASE == 1 ? p.columns : 128)) / 32, shared ? 3 : 0);
        }
    }

    INLINE void run() {
        const int lane = thread & 31;
        const int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
        const int steps = p.depth / 128;
        const int items = items_before[p.experts];
        const u32 full = base + BARRIERS_AT, empty = full + STAGES * 8, mail = empty + STAGES * 8;
        const int chunk = thread & 7, first_row = thread >> 3;  // this thread copies 16 bytes of rows first_row + 16j
        const u32 copy_to = base + TOKENS_AT + first_row * 128 + ((chunk ^ (first_row & 7)) << 4);
        const u32 scale_to = base + SCALES_AT + thread * 4;

        int stage = 0, parity = 0;
        int item = cluster, drawn = cluster + clusters;  // the first two items are given, the others drawn
        int token = item < items ? source(plan(item)) : 0;
        for (int n = 0; item < items; ++n) {
            // The next item is announced to the cluster as this one starts, the one after it drawn.
            const u32 letter = base + MAIL_AT + n % MAIL_SLOTS * 4, letter_bar = mail + n % MAIL_SLOTS * 8;
            if (thread == 0) {
                barrier_arrive_expect(letter_bar, 4);
                if (rank == 0) {
#pragma unroll
                    for (int r = 0; r < CLUSTER; ++r) send_to_cta(letter, letter_bar, r, drawn);
                    drawn = atomicAdd(p.counters, 1) + 2 * clusters;
                }
            }
            const Plan now = plan(item);
            const u32 sources = base + SOURCES_AT + (n & 1) * TILE_TOKENS * 4;
            store_shared_int(sources + thread * 4, token);
            named_barrier_sync(4, LOAD_THREADS);

            const int scale_rows = (PHASE == 1 ? 2 : 1) * p.columns / 128;
            const int row0 = PHASE == 1 ? now.column : 2 * now.column;
            const int row1 = PHASE == 1 ? now.column + p.columns / 128 : min(row0 + 1, scale_rows - 1);
            const int scale0 = (now.expert * scale_rows + row0) * steps;
            const int to_scale1 = (row1 - row0) * steps;
            const auto token_scale = [&](int step) { return p.token_scale[step * p.token_scale_stride + token]; };
            // Scales are asked for well before they are stored: no step waits for memory.
            float x[AHEAD], w0 = 0.0f, w1 = 0.0f;  // a lane holds the weights' scales of every 32nd step
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                if (u < steps) x[u] = token_scale(u);
            }
            const u8* from[TILE_TOKENS / 16];
#pragma unroll
            for (int j = 0; j < TILE_TOKENS / 16; ++j) {
                from[j] = p.tokens + (i64(load_shared_int(sources + (16 * j + first_row) * 4)) * p.depth + chunk * 16);
            }
            int next = 0, next_token = 0;
            for (int start = 0; start < steps; start += AHEAD) {
#pragma unroll
                for (int u = 0; u < AHEAD; ++u) {
                    const int step = start + u;
                    if (step >= steps) break;
                    if (u == 0 && step % 32 == 0 && step + lane < steps) {
                        w0 = p.weight_scale[scale0 + step + lane];
                        w1 = p.weight_scale[scale0 + to_scale1 + step + lane];
                    }
                    barrier_wait(empty + stage * 8, parity ^ 1);
                    if (thread == 0) {
                        store_shared4i(base + WORK_AT + stage * 16, 1, now.row, now.live, now.column);
                        barrier_arrive_expect(full + stage * 8, WEIGHT_BYTES);
                        load_weights(now, step, stage, full + stage * 8);
                    }
                    __syncwarp();
#pragma unroll
                    for (int j = 0; j < TILE_TOKENS / 16; ++j) {
                        if (16 * j + first_row < now.live) {
                            copy16_async(copy_to + stage * TOKEN_BYTES + j * 2048, from[j] + u * 128);
                        }
                    }
                    copies_arrive(full + stage * 8);
                    const u32 to = scale_to + stage * SCALE_BYTES;
                    store_shared(to, x[u] * __shfl_sync(0xFFFFFFFF, w0, step % 32));
                    store_shared(to + TILE_TOKENS * 4, x[u] * __shfl_sync(0xFFFFFFFF, w1, step % 32));
                    __syncwarp();
                    if (lane == 0) barrier_arrive(full + stage * 8);
                    if (step + AHEAD < steps) x[u] = token_scale(step + AHEAD);
                    if (step == min(2, steps - 1)) {  // early enough that the next item's first loads find it there
                        barrier_wait_cluster(letter_bar, (n / MAIL_SLOTS) & 1);
                        next = load_shared_int(letter);
                        if (next < items) next_token = source(plan(next));
                    }
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
#pragma unroll
                for (int j = 0; j < TILE_TOKENS / 16; ++j) from[j] += AHEAD * 128;
            }
            item = next;
            token = next_token;
        }

        // One more stage, which says that there is nothing left.
        barrier_wait(empty + stage * 8, parity ^ 1);
        if (thread == 0) {
            store_shared4i(base + WORK_AT + stage * 16, 0, 0, 0, 0);
            barrier_arrive(full + stage * 8);
        }
        copies_arrive(full + stage * 8);
        __syncwarp();
        if (lane == 0) barrier_arrive(full + stage * 8);
        if (rank == 0 && thread == 0) {
            __threadfence();  // after this cluster's last draw
            if (atomicAdd(p.counters + 1, 1) == clusters - 1) p.counters[0] = 0, p.counters[1] = 0;
        }
    }
};
