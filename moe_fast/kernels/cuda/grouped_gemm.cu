// Grouped FP8 block-scale GEMM for Hopper: rows of one expert times its weights, two kernels from one template.
//
//   gemm1 (PHASE 1)  hidden_states rows (gathered) x gemm1_weights -> SwiGLU -> 1x128 re-quantisation, e4m3 + scale
//   gemm2 (PHASE 2)  requantized rows x gemm2_weights -> rows of gemm2_out, bf16 or fp32, not yet weighted
//
// Tokens are the matrix unit's M side, weights its N side. (The other way round a tile may have any multiple of 8
// tokens, but then every column has its own scale: reading those cost half of shared memory's bandwidth.)
//
// A tile is up to 128 tokens x 256 weight rows. A cluster of CLUSTER CTAs shares one item: the same weights, each CTA its
// own tokens of the same expert; every CTA loads a part of the weights and multicasts it. A CTA is three warpgroups: one
// loads (weights by TMA, tokens by cp.async, so that the gather costs nothing), two multiply, each 64 tokens with the
// weights in two waves of 128 rows:
//
//   gemm1  wave 0: 128 up rows, wave 1: the 128 gate rows of the same columns, so SwiGLU's pair and a whole block of
//          re-quantisation meet in four neighbouring lanes
//   gemm2  wave v: rows 128v .. 128v+127
//
// Weight rows are ordered so that each thread accumulates 8 neighbouring columns: matrix column 32a + 8j + 2q + b is
// weight row 32a + 8q + 2j + b.
//
// Each 128-wide step of K is a product from zero, promoted into the fp32 sum with scale_token * scale_weight; the
// loading warps multiply the two scales. Items come from a counter in global memory: sizes may be any, the grid is
// fixed, and the host never knows the counts.
#include "wgmma_e4m3.cuh"

#ifndef CLUSTER
#define CLUSTER 2
#endif
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED 212992
#endif

constexpr int STAGES = 4;
constexpr int TILE_TOKENS = 128;
constexpr int MATH_THREADS = 256;
constexpr int LOAD_THREADS = 128;
constexpr int MAX_EXPERTS = 512;
constexpr int MAIL_SLOTS = 8;
constexpr int AHEAD = 2;  // steps of K

constexpr int WEIGHT_BYTES = 256 * 128;
constexpr int TOKEN_BYTES = TILE_TOKENS * 128;
constexpr int SCALE_BYTES = 2 * TILE_TOKENS * 4;
constexpr int BOX_BYTES = 128 * 128;

// Offsets in dynamic shared memory, which starts at a multiple of 1024.
constexpr int WEIGHTS_AT = 0;
constexpr int TOKENS_AT = WEIGHTS_AT + STAGES * WEIGHT_BYTES;
constexpr int SCALES_AT = TOKENS_AT + STAGES * TOKEN_BYTES;
constexpr int WORK_AT = SCALES_AT + STAGES * SCALE_BYTES;  // one int4 a stage
constexpr int SOURCES_AT = WORK_AT + STAGES * 16;  // [2][128 tokens] int
constexpr int BARRIERS_AT = SOURCES_AT + 2 * TILE_TOKENS * 4;
constexpr int MAIL_AT = BARRIERS_AT + (2 * STAGES + MAIL_SLOTS) * 8;
constexpr int TABLE_AT = MAIL_AT + MAIL_SLOTS * 4;  // expert_offsets, then first tile of each expert
constexpr int SHARED_BYTES = TABLE_AT + 2 * (MAX_EXPERTS + 1) * 4;

struct Params {
    const u8* tokens;  // [T or P, K] e4m3
    const float* token_scale;  // [K/128, token_scale_stride], rows of tokens along the second axis
    const int* row_index;  // [P] row of `tokens` of each permuted row; null: the same row
    const float* weight_scale;  // gemm1 [L, 2I/128, H/128], gemm2 [L, H/128, I/128]
    const int* expert_offsets;  // [L+1]
    void* out;  // gemm1 e4m3 [P, columns]; gemm2 bf16 or fp32 [P, columns]
    float* out_scale;  // gemm1 [I/128, out_scale_stride]
    int* counters;  // [2], zero between launches
    i64 token_scale_stride;
    i64 out_scale_stride;
    int depth;  // K: gemm1 H, gemm2 I
    int columns;  // of out: gemm1 I, gemm2 H
    int experts;  // L
    int wide;  // gemm2: out is fp32
};

// What the math warpgroups must know of an item.
struct Work {
    int more;  // 0: no more items
    int row;  // first permuted row
    int live;  // rows, 0 .. 128
    int column;  // which tile of columns
};

INLINE int column_tiles(int phase, int columns) { return phase == 1 ? columns / 128 : (columns + 255) / 256; }

// ---------------------------------------------------------------------------------------------------- loading
// One CTA's part of an item.
struct Plan {
    int expert, column;
    int row, live;  // first permuted row; how many, 0 .. 128
};

template <int PHASE>
struct Loader {
    const TensorMap* map;
    const Params& p;
    const int* offsets;
    const int* tiles_before;  // [L+1] tiles of tokens before each expert
    u32 base, rank;
    int thread, column_count;

    INLINE Plan plan(int item) const {
        int low = 0, high = p.experts - 1;  // the last expert whose items start at or before this one, of those hit
        while (low < high) {
            const int middle = (low + high) >> 1;
            if (tiles_before[middle + 1] * column_count <= item) low = middle + 1;
            else high = middle;
        }
        const int inner = item - tiles_before[low] * column_count;
        const int tiles = tiles_before[low + 1] - tiles_before[low];
        const int first = offsets[low] + (inner % tiles) * (CLUSTER * TILE_TOKENS);
        const int rows = min(CLUSTER * TILE_TOKENS, offsets[low + 1] - first);
        const int share = (rows + CLUSTER * 64 - 1) / (CLUSTER * 64) * 64;  // rows of each CTA, the last ones fewer
        const int before = int(rank) * share;
        return {low, inner / tiles, first + before, max(0, min(share, rows - before))};
    }

    // Row of `p.tokens` that holds this thread's token of a plan.
    INLINE int source(const Plan& plan) const {
        const int row = plan.row + min(thread, plan.live - 1);
        if (plan.live == 0) return 0;
        return p.row_index ? p.row_index[row] : row;
    }

    // The two waves' boxes of a stage's weights, 128 rows each. Each CTA loads its part for the whole cluster.
    INLINE void load_weights(const Plan& plan, int step, int stage, u32 full) const {
        const int row = PHASE == 1 ? plan.expert * 2 * p.columns + plan.column * 128
                                   : plan.expert * p.columns + plan.column * 256;
#pragma unroll
        for (int b = 0; b < 2 / CLUSTER; ++b) {
            const int wave = int(rank) * (2 / CLUSTER) + b;
            tma_load(base + WEIGHTS_AT + stage * WEIGHT_BYTES + wave * BOX_BYTES, map, full, step * 128,
                     (row + wave * (PHASE == 1 ? p.columns : 128)) / 32, CLUSTER > 1 ? (1 << CLUSTER) - 1 : 0);
        }
    }

    INLINE void run() {
        const int lane = thread & 31;
        const int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
        const int steps = p.depth / 128;
        const int items = tiles_before[p.experts] * column_count;
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

// ---------------------------------------------------------------------------------------------------- arithmetic
struct Pipe {
    u32 base;
    int stage, parity;

    INLINE u32 full() const { return base + BARRIERS_AT + stage * 8; }
    INLINE void wait() const { barrier_wait(full(), parity); }
    INLINE void release(int lane) {  // this warp has read everything of the stage
        __syncwarp();
        if (CLUSTER > 1) {
            if (lane < CLUSTER) barrier_arrive_in_cta(full() + STAGES * 8, lane);
        } else if (lane == 0) {
            barrier_arrive(full() + STAGES * 8);
        }
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// sum[v][4j + 2p + b]: wave v, token 16 warp + 8p + i of the group, matrix column 8j + 2q + b. The first stage is there.
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
        const u64 tokens = tile_descriptor(pipe.base + TOKENS_AT + pipe.stage * TOKEN_BYTES + group * (TOKEN_BYTES / 2));
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

// silu(gate) * up, then one scale a row for the tile's 128 columns: amax / 448, or 1 for a block of zeros.
INLINE void store_requantized(float (&sum)[2][64], const Work& work, const Params& p, int row0, int lane) {
    const int q = lane & 3;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + 8 * half;
        float largest = 0.0f;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                const int at = 4 * j + 2 * half + b;
                const float gate = sum[1][at];
                sum[0][at] *= __fdividef(gate, 1.0f + __expf(-gate));
                largest = fmaxf(largest, fabsf(sum[0][at]));
            }
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFF, largest, 2));
        // Not below the smallest normal number, so that its inverse is finite.
        const float scale = largest > 0.0f ? fmaxf(__fdiv_rn(largest, 448.0f), 1.17549435e-38f) : 1.0f;
        const float inverse = __frcp_rn(scale);
        if (row >= work.live) continue;
        if (q == 0) p.out_scale[i64(work.column) * p.out_scale_stride + work.row + row] = scale;
        u8* out = static_cast<u8*>(p.out) + i64(work.row + row) * p.columns + work.column * 128 + q * 8;
#pragma unroll
        for (int a = 0; a < 4; ++a) {
            u32 packed[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int at = 16 * a + 4 * j + 2 * half;
                packed[j] = pack_e4m3(sum[0][at] * inverse, sum[0][at + 1] * inverse);
            }
            *reinterpret_cast<uint2*>(out + 32 * a) = make_uint2(packed[0] | packed[1] << 16, packed[2] | packed[3] << 16);
        }
    }
}

INLINE void store_rows(float (&sum)[2][64], const Work& work, const Params& p, int row0, int lane) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
        const int column = work.column * 256 + v * 128 + (lane & 3) * 8;
        if (column >= p.columns) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row0 + 8 * half;
            if (row >= work.live) continue;
            const i64 start = i64(work.row + row) * p.columns + column;
#pragma unroll
            for (int a = 0; a < 4; ++a) {
                const float* s = &sum[v][16 * a + 2 * half];
                if (p.wide) {
                    float4* out = reinterpret_cast<float4*>(static_cast<float*>(p.out) + start + 32 * a);
                    out[0] = make_float4(s[0], s[1], s[4], s[5]);
                    out[1] = make_float4(s[8], s[9], s[12], s[13]);
                } else {
                    *reinterpret_cast<uint4*>(static_cast<u16*>(p.out) + start + 32 * a) =
                        make_uint4(pack_bf16(s[0], s[1]), pack_bf16(s[4], s[5]), pack_bf16(s[8], s[9]), pack_bf16(s[12], s[13]));
                }
            }
        }
    }
}

template <int PHASE>
INLINE void compute_items(const Params& p, u32 base) {
    const int lane = threadIdx.x & 31;
    const int warp = __shfl_sync(0xFFFFFFFF, (threadIdx.x >> 5) & 3, 0);
    const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x >> 7, 0);
    const int steps = p.depth / 128;
    Pipe pipe{base, 0, 0};
    for (;;) {
        pipe.wait();
        const int4 w = load_shared4i(base + WORK_AT + pipe.stage * 16);
        const Work work{w.x, w.y, w.z, w.w};
        if (__shfl_sync(0xFFFFFFFF, work.more, 0) == 0) return;
        if (group * 64 >= __shfl_sync(0xFFFFFFFF, work.live, 0)) {  // no rows for this group
            pipe.release(lane);
            for (int step = 1; step < steps; ++step) {
                pipe.wait();
                pipe.release(lane);
            }
            continue;
        }
        float sum[2][64];
        multiply(pipe, sum, steps, group, warp, lane);
        const int row0 = group * 64 + warp * 16 + (lane >> 2);
        if constexpr (PHASE == 1) store_requantized(sum, work, p, row0, lane);
        else store_rows(sum, work, p, row0, lane);
    }
}

// ---------------------------------------------------------------------------------------------------- kernel
template <int PHASE>
INLINE void grouped_gemm(const TensorMap* map, const Params& p) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared);
    int* offsets = reinterpret_cast<int*>(shared + TABLE_AT);
    int* tiles_before = offsets + MAX_EXPERTS + 1;

    if (threadIdx.x == 0) {
        tma_prefetch_map(map);
        for (int s = 0; s < STAGES; ++s) {
            // Each loading thread's copies, each loading warp's scales, the weights.
            barrier_init(base + BARRIERS_AT + s * 8, LOAD_THREADS + LOAD_THREADS / 32 + 1);
            barrier_init(base + BARRIERS_AT + (STAGES + s) * 8, CLUSTER * MATH_THREADS / 32);
        }
        for (int s = 0; s < MAIL_SLOTS; ++s) barrier_init(base + BARRIERS_AT + (2 * STAGES + s) * 8, 1);
        barrier_init_fence();
    }
    wait_for_previous_kernel();
    if (threadIdx.x < 32) {  // offsets, and the tiles before each expert
        const int lane = threadIdx.x;
        int before = 0;
        for (int start = 0; start <= p.experts; start += 32) {
            const int e = start + lane;
            const int first = e <= p.experts ? __ldcg(p.expert_offsets + e) : 0;
            const int end = e < p.experts ? __ldcg(p.expert_offsets + e + 1) : first;
            const int tiles = (end - first + CLUSTER * TILE_TOKENS - 1) / (CLUSTER * TILE_TOKENS);
            int sum = tiles;
#pragma unroll
            for (int d = 1; d < 32; d <<= 1) {
                const int other = __shfl_up_sync(0xFFFFFFFF, sum, d);
                if (lane >= d) sum += other;
            }
            if (e <= p.experts) offsets[e] = first, tiles_before[e] = before + sum - tiles;
            before += __shfl_sync(0xFFFFFFFF, sum, 31);
        }
    }
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();

    if (threadIdx.x >= MATH_THREADS) {
        registers_down<72>();
        Loader<PHASE>{map, p, offsets, tiles_before, base, CLUSTER > 1 ? cluster_rank() : 0,
                      int(threadIdx.x) - MATH_THREADS, column_tiles(PHASE, p.columns)}
            .run();
    } else {
        registers_up<216>();
        compute_items<PHASE>(p, base);
    }
    __syncwarp();
    let_next_kernel_start();
    if (CLUSTER > 1) cluster_sync();  // the other CTA may still signal barriers of this one
}

#define KERNEL extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(MATH_THREADS + LOAD_THREADS, 1)

KERNEL gemm1_kernel(const __grid_constant__ TensorMap map, const __grid_constant__ Params p) { grouped_gemm<1>(&map, p); }
KERNEL gemm2_kernel(const __grid_constant__ TensorMap map, const __grid_constant__ Params p) { grouped_gemm<2>(&map, p); }

static_assert(SHARED_BYTES <= DYNAMIC_SHARED, "the launch asks for DYNAMIC_SHARED bytes");
