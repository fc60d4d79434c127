// The other loading warpgroup: draws items, and fills stages with weights (TMA) and the products of scales.
#pragma once
#include "load_items.cuh"

struct WeightLoader : Items {
    const TensorMap *map1, *map2;  // gemm1_weights, gemm2_weights

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

    // The next item is announced to the cluster as this one starts, the one after it drawn.
    INLINE void announce() const {
        barrier_arrive_expect(letter_bar(), 4);
        if (rank != 0) return;
#pragma unroll
        for (int r = 0; r < CLUSTER; ++r) send_to_cta(letter(), letter_bar(), r, note(DRAWN));
        set_note(DRAWN, atomicAdd(p.counters, 1) + 2 * (gridDim.x / CLUSTER));
    }

    // Thread t stores the products of token t's scale with the two waves'.
    template <int PHASE>
    INLINE void load_item(int all) {
        const int lane = thread & 31;
        const u32 scale_to = base + SCALES_AT + thread * 4;
        const int depth = p.depth(PHASE), columns = p.columns(PHASE), steps = depth / 128;
        const float* token_scale_at = (PHASE == 1 ? p.hidden_states_scale : p.requantized_scale) + token;
        const i64 token_scale_stride = PHASE == 1 ? p.hidden_states_scale_stride : p.requantized_scale_stride;
        const float* weight_scale = PHASE == 1 ? p.gemm1_weights_scale : p.gemm2_weights_scale;
        const Plan now = plan<PHASE>(item);
        if (thread == 0) {
            announce();
            store_shared4i(base + WORK_AT + count % MAIL_SLOTS * 16, PHASE | now.expert << 2, now.row, now.live,
                           now.column);
        }
        if (PHASE == 2 && p.phases == 3 && now.live > 0) wait_for_gemm1(now);

        const int scale_rows = (PHASE == 1 ? 2 : 1) * columns / 128;
        const int row0 = PHASE == 1 ? now.column : 2 * now.column;
        const int row1 = PHASE == 1 ? now.column + columns / 128 : min(row0 + 1, scale_rows - 1);
        const int scale0 = (now.expert * scale_rows + row0) * steps;
        const int to_scale1 = (row1 - row0) * steps;
        // Past the L1: it may hold what lay beside another tile's scales before this tile's were written.
        const auto token_scale = [&](int step) { return __ldcg(token_scale_at + step * token_scale_stride); };
        // Scales are asked for well before they are stored: no step waits for memory.
        float x[SCALES_AHEAD], w0 = 0.0f, w1 = 0.0f;  // a lane holds the weights' scales of every 32nd step
#pragma unroll
        for (int u = 0; u < SCALES_AHEAD; ++u) {
            if (u < steps) x[u] = token_scale(u);
        }
        int next = 0, next_token = 0;
        for (int start = 0; start < steps; start += SCALES_AHEAD) {
#pragma unroll
            for (int u = 0; u < SCALES_AHEAD; ++u) {
                const int step = start + u;
                if (step >= steps) break;
                if (u == 0 && step % 32 == 0 && step + lane < steps) {
                    w0 = weight_scale[scale0 + step + lane];
                    w1 = weight_scale[scale0 + to_scale1 + step + lane];
                }
                await_empty();
                if (thread == 0) {
                    barrier_arrive_expect(full(), WEIGHT_BYTES);
                    load_weights<PHASE>(now, step, full());
                }
                __syncwarp();
                const u32 to = scale_to + stage * SCALE_BYTES;
                store_shared(to, x[u] * __shfl_sync(ALL, w0, step % 32));
                store_shared(to + TILE_TOKENS * 4, x[u] * __shfl_sync(ALL, w1, step % 32));
                __syncwarp();
                if (lane < ARRIVING_LANES) barrier_arrive(full());
                if (step + SCALES_AHEAD < steps) x[u] = token_scale(step + SCALES_AHEAD);
                if (step == min(2, steps - 1)) {  // early enough that the next item's first loads find it there
                    next = read_letter();
                    if (next < all) next_token = source(next);
                }
                advance();
            }
        }
        item = next;
        token = next_token;
        ++count;
    }

    INLINE void run() {
        const int clusters = gridDim.x / CLUSTER;
        if (thread == 0) set_note(DRAWN, blockIdx.x / CLUSTER + clusters);
        const int first = items(1), all = first + items(2);
        first_item();
        while (item < first) load_item<1>(all);
        while (item < all) load_item<2>(all);
        await_empty();  // one more stage, which says that there is nothing left
        if (thread == 0) {
            store_shared4i(base + WORK_AT + count % MAIL_SLOTS * 16, 0, 0, 0, 0);
            barrier_arrive(full());
        }
        __syncwarp();
        if ((thread & 31) < ARRIVING_LANES) barrier_arrive(full());
        if (rank == 0 && thread == 0) {
            __threadfence();  // after this cluster's last draw
            if (atomicAdd(p.counters + 1, 1) == clusters - 1) p.counters[0] = 0, p.counters[1] = 0;
        }
    }
};
