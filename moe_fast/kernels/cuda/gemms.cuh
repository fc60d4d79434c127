// Grouped FP8 block-scale GEMMs for Hopper: rows of one expert times its weights, both products in one launch.
//
//   gemm1 (phase 1)  hidden_states rows (gathered) x gemm1_weights -> SwiGLU -> 1x128 re-quantisation, e4m3 + scale
//   gemm2 (phase 2)  requantized rows x gemm2_weights -> rows of gemm2_out, bf16, not yet weighted
//
// Tokens are the matrix unit's M side, weights its N side. (The other way round a tile may have any multiple of 8
// tokens, but then every column has its own scale: reading those cost half of shared memory's bandwidth.)
//
// A tile is up to 128 tokens x 256 weight rows. A cluster of 2 CTAs takes two tiles at a time: the same weights and two
// tiles of one expert's tokens, each CTA loading half of the weights for both; or, for the last tile of an odd number,
// the same tokens and two different tiles of weights. A CTA is four warpgroups: one loads tokens (by cp.async, so
// that the gather costs nothing), one weights (by TMA) and scales (by cp.async), two multiply, each 64 tokens with the
// weights in two waves of 128 rows:
//
//   gemm1  wave 0: 128 up rows, wave 1: the 128 gate rows of the same columns, so SwiGLU's pair and a whole block of
//          re-quantisation meet in four neighbouring lanes
//   gemm2  wave v: rows 128v .. 128v+127
//
// Weight rows are ordered so that each thread accumulates 8 neighbouring columns: matrix column 32a + 8j + 2q + b is
// weight row 32a + 8q + 2j + b.
//
// Each 128-wide step of K is a product from zero, promoted into the fp32 sum with scale_token * scale_weight. gemm2's
// items come after gemm1's: a CTA that finds no more of the first begins with the second, whose loads wait until the
// tile's rows are complete (tiles_done). Meanwhile the rows of output that no expert writes are overwritten with zeros,
// and rows that are all of their token are written there, weighted: combine is left with tokens of several rows. Items
// come from a counter in global memory: sizes may be any, the grid is fixed, and the host never knows the counts.
#pragma once
#include "epilogue.cuh"
#include "load_tokens.cuh"
#include "load_weights.cuh"
#include "multiply.cuh"

INLINE void compute_items(const Params& p, const Window& window, u32 base) {
    const int lane = threadIdx.x & 31;
    const int warp = __shfl_sync(0xFFFFFFFF, (threadIdx.x >> 5) & 3, 0);
    const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x >> 7, 0);
    Pipe pipe{__shfl_sync(ALL, base, 0), 0, 0};
    for (int count = 0;; ++count) {
        pipe.wait();
        const int4 w = load_shared4i(base + WORK_AT + count % MAIL_SLOTS * 16);
        const Work work{__shfl_sync(0xFFFFFFFF, w.x & 3, 0), w.x >> 2, w.y, w.z, w.w};
        if (work.phase == 0) return;
        const int steps = p.depth(work.phase) / 128;
        if (group * 64 >= __shfl_sync(0xFFFFFFFF, work.live, 0)) {  // no rows for this group
            pipe.release();
            for (int step = 1; step < steps; ++step) {
                pipe.wait();
                pipe.release();
            }
            continue;
        }
        float sum[2][64];
        multiply(pipe, sum, work.row, steps, group, warp, lane, __shfl_sync(ALL, work.live, 0) > 64);
        const int row0 = group * 64 + warp * 16 + (lane >> 2);
        if (work.phase == 1) {
            store_requantized(sum, work, p, row0, lane);
            if (p.phases == 3) signal_gemm1(work, window, group);
        } else {
            const u32 targets = base + TARGETS_AT + count % MAIL_SLOTS * TARGET_BYTES;
            store_rows(sum, work, p, targets, row0, lane);
        }
    }
}

// One warp: expert_offsets, and the items before each expert of each phase that is wanted.
INLINE void fill_tables(const Params& p, const Window& window, const Tables& tables) {
    const int lane = threadIdx.x;
    int before[2] = {0, 0};
    for (int start = 0; start <= p.experts; start += 32) {
        const int e = start + lane;
        const int first = e <= p.experts ? __ldcg(window.expert_offsets + e) : 0;
        const int end = e < p.experts ? __ldcg(window.expert_offsets + e + 1) : first;
        if (e <= p.experts) tables.offsets[e] = first;
#pragma unroll
        for (int phase = 1; phase <= 2; ++phase) {
            const int columns = p.phases & phase ? column_tiles(phase, p.columns(phase)) : 0;
            const int items = count_items<CLUSTER, TILE_TOKENS>(end - first, columns);
            int sum = items;
#pragma unroll
            for (int d = 1; d < 32; d <<= 1) {
                const int other = __shfl_up_sync(0xFFFFFFFF, sum, d);
                if (lane >= d) sum += other;
            }
            if (e <= p.experts) tables.before(phase)[e] = before[phase - 1] + sum - items;
            before[phase - 1] += __shfl_sync(0xFFFFFFFF, sum, 31);
        }
    }
}

// What needs none of the window's data: barriers, and the zeros that idle tokens are overwritten with.
INLINE void prepare_gemms(const TensorMap* map1, const TensorMap* map2, u8* shared) {
    const u32 base = shared_address(shared);
    if (threadIdx.x == 0) {
        tma_prefetch_map(map1);
        tma_prefetch_map(map2);
        for (int s = 0; s < STAGES; ++s) {
            // Each loading thread's copies, the weights.
            barrier_init(base + BARRIERS_AT + s * 8, 2 * LOAD_THREADS + 1);
            barrier_init(base + BARRIERS_AT + (STAGES + s) * 8, CLUSTER * MATH_THREADS / 32 * ARRIVING_LANES);
        }
        for (int s = 0; s < MAIL_SLOTS; ++s) barrier_init(base + BARRIERS_AT + (2 * STAGES + s) * 8, 1);
        barrier_init_fence();
    }
    if (threadIdx.x < ZERO_BYTES / 16) store_shared4i(base + ZEROS_AT + threadIdx.x * 16, 0, 0, 0, 0);
    async_proxy_fence();  // the zeros are read by bulk copies
}

// Both products of one window, after prepare_gemms. Everything of a CTA that a caller may use again is free when it
// returns; with AGAIN the registers are shared out evenly once more, too.
template <bool AGAIN>
INLINE void run_gemms(const TensorMap* map1, const TensorMap* map2, const Params& p, const Window& window, u8* shared) {
    const u32 base = shared_address(shared);
    const Tables tables{reinterpret_cast<int*>(shared + TABLE_AT)};
    if (threadIdx.x < 32) fill_tables(p, window, tables);
    if (CLUSTER > 1)
        cluster_sync();
    else
        __syncthreads();
    // Nothing to do, in no other CTA either. Asked of a lane, for else ptxas spills registers.
    if (!AGAIN && __shfl_sync(ALL, tables.offsets[p.experts], 0) == 0 && p.idle_end() == 0) return;

    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    if (threadIdx.x >= MATH_THREADS + LOAD_THREADS) {
        registers_down<WEIGHT_REGISTERS>();
        WeightLoader{{p, window, tables, base, rank, int(threadIdx.x) - MATH_THREADS - LOAD_THREADS}, map1, map2}.run();
        if (AGAIN) registers_up<LAUNCH_REGISTERS>();
    } else if (threadIdx.x >= MATH_THREADS) {
        registers_down<TOKEN_REGISTERS>();
        TokenLoader{{p, window, tables, base, rank, int(threadIdx.x) - MATH_THREADS}}.run();
        if (AGAIN) registers_up<LAUNCH_REGISTERS>();
    } else {
        registers_up<MATH_REGISTERS>();
        compute_items(p, window, base);
        if (AGAIN) registers_down<LAUNCH_REGISTERS>();
    }
    __syncwarp();
    if (CLUSTER > 1) cluster_sync();  // the other CTA may still signal barriers of this one
    if (!AGAIN) return;
    __syncthreads();
    if (threadIdx.x < 2 * STAGES + MAIL_SLOTS) barrier_end(base + BARRIERS_AT + threadIdx.x * 8);
    __syncthreads();
}

static_assert(SHARED_BYTES <= DYNAMIC_SHARED, "the launch asks for DYNAMIC_SHARED bytes");
static_assert(ZERO_BYTES <= THREADS * 16, "a thread writes 16 bytes of zeros");
// With more the launch would hang: what the loading warps give back is all that the others can get.
static_assert(MATH_THREADS * MATH_REGISTERS + LOAD_THREADS * (TOKEN_REGISTERS + WEIGHT_REGISTERS) <=
                  THREADS * LAUNCH_REGISTERS,
              "registers at launch");
