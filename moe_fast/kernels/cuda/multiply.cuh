// A multiplying warpgroup's main loop: wgmma, and promotion of each 128-wide step of K into the fp32 sum.
#pragma once
#include "layout.cuh"
#include "wgmma_e4m3.cuh"

struct Pipe {
    u32 base;
    int stage, parity;

    INLINE u32 full() const { return base + BARRIERS_AT + stage * 8; }
    // Until the stage is full. Its tokens came by ordinary copies, which the matrix unit must not overtake.
    INLINE void wait() const {
        barrier_wait(full(), parity);
        async_proxy_fence();
    }
    // The same of the stage after it, before this one is released.
    INLINE void wait_for_next() const {
        const bool wraps = stage == STAGES - 1;
        barrier_wait(base + BARRIERS_AT + (wraps ? 0 : stage + 1) * 8, parity ^ int(wraps));
        async_proxy_fence();
    }
    INLINE void release() {  // this warp has read everything of the stage
        u32 lane;
        asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));  // asked anew: no register is free to keep it
        __syncwarp();
        if (CLUSTER > 1 && EVERY_LANE_ARRIVES) {
            for (int rank = 0; rank < CLUSTER; ++rank) barrier_arrive_in_cta(full() + STAGES * 8, rank);
        } else if (CLUSTER > 1) {
            if (lane < CLUSTER) barrier_arrive_in_cta(full() + STAGES * 8, lane);
        } else if (lane < ARRIVING_LANES) {
            barrier_arrive(full() + STAGES * 8);
        }
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// sum[v][4j + 2p + b]: wave v, token 16 warp + 8p + i of the group, matrix column 8j + 2q + b.
// `row`: the tile's first permuted row. The first stage has been waited for. If both groups have rows, the second one's
// product follows the first one's: one promotes while the other's is under way.
INLINE void multiply(Pipe& pipe, float (&sum)[2][64], int row, int steps, int group, int warp, int lane, bool both) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
        for (int x = 0; x < 64; ++x) sum[v][x] = 0.0f;
    }
    // The same in every lane, said in a way that the compiler keeps: else it derives them anew before each product.
    const u32 tokens0 = __shfl_sync(ALL, descriptor_low(pipe.base + TOKENS_AT + group * (TOKEN_BYTES / 2)), 0);
    const u32 weights0 = __shfl_sync(ALL, descriptor_low(pipe.base + WEIGHTS_AT), 0);
    const u32 my_scales = pipe.base + SCALES_AT + (first_scale(row) + group * 64 + warp * 16 + (lane >> 2)) * 4;
    const u32 weight_scales = pipe.base + SCALES_AT + TOKEN_SCALES * 4;
    for (int step = 0; step < steps; ++step) {
        const u32 tokens = tokens0 + pipe.stage * (TOKEN_BYTES >> 4);
        const u32 weights = weights0 + pipe.stage * (WEIGHT_BYTES >> 4);
        float token_scale[2];  // of the thread's two tokens
        if (both && group == 1) named_barrier_sync(FIRST_ISSUED + pipe.stage, MATH_THREADS);
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            float product[64];
            pin(product);
            mma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) {  // 32 bytes further along the swizzled row: 2 units of 16
                mma_step(product, tile_descriptor(tokens + 2 * k),
                         tile_descriptor(weights + v * (BOX_BYTES >> 4) + 2 * k), k > 0);
            }
            mma_commit();
            if (v == 0 && both && group == 0) named_barrier_arrive(FIRST_ISSUED + pipe.stage, MATH_THREADS);
            // While the product is under way. Few at a time: registers are short.
            if (v == 0) {
                token_scale[0] = load_shared(my_scales + pipe.stage * SCALE_BYTES);
                token_scale[1] = load_shared(my_scales + pipe.stage * SCALE_BYTES + 32);
            }
            const float weight_scale = load_shared(weight_scales + pipe.stage * SCALE_BYTES + v * 4);
            const float scale[2] = {token_scale[0] * weight_scale, token_scale[1] * weight_scale};
            if (v == 1 && step + 1 < steps) pipe.wait_for_next();  // now, so that the next product need not wait for it
            pin(product);
            mma_wait();
            pin(product);
            if (v == 1) pipe.release();
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                sum[v][4 * j + 0] += product[4 * j + 0] * scale[0];
                sum[v][4 * j + 1] += product[4 * j + 1] * scale[0];
                sum[v][4 * j + 2] += product[4 * j + 2] * scale[1];
                sum[v][4 * j + 3] += product[4 * j + 3] * scale[1];
            }
        }
    }
}
