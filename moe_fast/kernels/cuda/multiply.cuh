// A multiplying warpgroup's main loop: wgmma, and promotion of each 128-wide step of K into the fp32 sum.
#pragma once
#include "layout.cuh"
#include "wgmma_e4m3.cuh"

struct Pipe {
    u32 base;
    int stage, parity;

    INLINE u32 full() const { return base + BARRIERS_AT + stage * 8; }
    INLINE void wait() const { barrier_wait(full(), parity); }
    INLINE void release(int lane) {  // this warp has read everything of the stage
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
// The first stage has been waited for.
INLINE void multiply(Pipe& pipe, float (&sum)[2][64], int steps, int group, int warp, int lane) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
        for (int x = 0; x < 64; ++x) sum[v][x] = 0.0f;
    }
    const u32 my_scales = pipe.base + SCALES_AT + (group * 64 + warp * 16 + (lane >> 2)) * 4;
    for (int step = 0; step < steps; ++step) {
        if (step > 0) pipe.wait();
        async_proxy_fence();  // the tokens came by ordinary copies
        const u32 tokens_at = pipe.base + TOKENS_AT + pipe.stage * TOKEN_BYTES;
        const u64 tokens = tile_descriptor(tokens_at + group * (TOKEN_BYTES / 2));
        const u64 weights = tile_descriptor(pipe.base + WEIGHTS_AT + pipe.stage * WEIGHT_BYTES);
        float scale[2][2];  // [wave][p]
#pragma unroll
        for (int v = 0; v < 2; ++v) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                scale[v][half] = load_shared(my_scales + pipe.stage * SCALE_BYTES + v * (TILE_TOKENS * 4) + half * 32);
            }
        }
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            float product[64];
            pin(product);
            mma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) {  // 32 bytes further along the swizzled row: 2 units of 16
                mma_step<128>(product, tokens + 2 * k, weights + v * (BOX_BYTES >> 4) + 2 * k, k > 0);
            }
            mma_commit();
            pin(product);
            mma_wait();
            pin(product);
            if (v == 1) pipe.release(lane);
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                sum[v][4 * j + 0] += product[4 * j + 0] * scale[v][0];
                sum[v][4 * j + 1] += product[4 * j + 1] * scale[v][0];
                sum[v][4 * j + 2] += product[4 * j + 2] * scale[v][1];
                sum[v][4 * j + 3] += product[4 * j + 3] * scale[v][1];
            }
        }
    }
}
