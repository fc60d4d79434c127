// The other loading warpgroup: draws items, and fills stages with weights (TMA) and scales (cp.async).
#pragma once
#include "load_items.cuh"

struct WeightLoader : Items {
    static constexpr int WEIGHT_SCALERS = 64;  // the first of the two threads that copy the weights' scales

    const TensorMap *map1, *map2;  // gemm1_weights, gemm2_weights

    // The two waves' boxes of a stage's weights, 128 rows each; where they are shared, each CTA loads one for both.
    template <int PHASE>
    INLINE void load_weights(const Plan& plan, int step, u32 full) const {
        const int columns = p.columns(PHASE);
        const int row =
            PHASE == 1 ? plan.expert * 2 * columns + plan.column * 128 : plan.expert * columns + plan.column * 256;
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

    // A step's scales come by asynchronous copies, so that no step waits for memory. A thread copies one token's where
    // the rows are gathered, else those of 4 rows, past the L1, which may hold older ones; two threads the weights'.
    template <int PHASE>
    INLINE void load_item(int all) {
        const int columns = p.columns(PHASE), steps = p.depth(PHASE) / 128;
        const Plan now = plan<PHASE>(item);
        if (thread == 0) {
            announce();
            store_shared4i(base + WORK_AT + count % MAIL_SLOTS * 16, PHASE | now.expert << 2, now.row, now.live,
                           now.column);
        }
        if (PHASE == 2 && p.phases == 3 && now.live > 0) wait_for_gemm1(now);

        const int first = first_scale(now.row);
        const bool copies = PHASE == 1 || (now.live > 0 && 4 * thread < first + now.live);
        const u32 to = base + SCALES_AT + (PHASE == 1 ? first + thread : 4 * thread) * 4;
        const float* from = PHASE == 1 ? p.hidden_states_scale + token * p.hidden_states_scale_token_stride
                                       : p.requantized_scale + (now.row - first + 4 * thread);
        const i64 stride = PHASE == 1 ? p.hidden_states_scale_stride : p.requantized_scale_stride;

        const int wave = thread - WEIGHT_SCALERS;  // 0 or 1 in two threads
        const int scale_rows = (PHASE == 1 ? 2 : 1) * columns / 128;
        const int scale_row =
            PHASE == 1 ? now.column + wave * (columns / 128) : min(2 * now.column + wave, scale_rows - 1);
        const u32 weight_to = base + SCALES_AT + (TOKEN_SCALES + wave) * 4;
        const float* weight_from = (PHASE == 1 ? p.gemm1_weights_scale : p.gemm2_weights_scale) +
                                   (now.expert * scale_rows + scale_row) * steps;
        int next = 0, next_token = 0;
        for (int step = 0; step < steps; ++step) {
            await_empty();
            if (thread == 0) {
                barrier_arrive_expect(full(), WEIGHT_BYTES);
                load_weights<PHASE>(now, step, full());
            }
            if (copies && PHASE == 1) copy_async<4>(to + stage * SCALE_BYTES, from);
            if (copies && PHASE == 2) copy16_async(to + stage * SCALE_BYTES, from);
            if ((wave & ~1) == 0) copy_async<4>(weight_to + stage * SCALE_BYTES, weight_from + step);
            if (PHASE == 2 && step == 0 && p.output && thread < now.live) {
                copy_async<8>(base + TARGETS_AT + count % MAIL_SLOTS * TARGET_BYTES + thread * 8,
                              window.row_targets + now.row + thread);
            }
            copies_arrive(full());
            from += stride;
            if (step == min(2, steps - 1)) {  // early enough that the next item's first loads find it there
                next = read_letter();
                if (next < all) next_token = source(next);
            }
            advance();
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
        copies_arrive(full());
        if (rank == 0 && thread == 0) {
            __threadfence();  // after this cluster's last draw
            if (atomicAdd(p.counters + 1, 1) == clusters - 1) p.counters[0] = 0, p.counters[1] = 0;
        }
    }
};
