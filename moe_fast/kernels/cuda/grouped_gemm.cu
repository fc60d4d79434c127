// Grouped FP8 block-scale GEMM for Hopper: rows of one expert times its weights, two kernels from one template.
//
//   gemm1 (PHASE 1)  hidden_states rows (gathered) x gemm1_weights -> SwiGLU -> 1x128 re-quantisation, e4m3 + scale
//   gemm2 (PHASE 2)  requantized rows x gemm2_weights -> rows of gemm2_out, bf16 or fp32, not yet weighted
//
// Operands are swapped: weights are the matrix unit's M side, tokens its N side, so that a tile may have any multiple
// of 8 tokens and an expert's last tile wastes almost nothing. A tile is 256 weight rows x up to 128 tokens.
//
// A cluster of CLUSTER CTAs shares one item: the same 256 weight rows, each CTA its own tokens of the same expert. Every
// CTA loads a part of the weights and multicasts it. A CTA is three warpgroups: one loads (weights by TMA, tokens by
// cp.async, so that the gather costs nothing), two multiply, each 128 weight rows as two waves of 64:
//
//   gemm1  wave 0: 64 up rows, wave 1: the 64 gate rows of the same columns, so SwiGLU's pair meets in one thread
//   gemm2  wave v: rows 4i + 2v + {0, 1} of every 4i .. 4i+3, so one thread holds 4 neighbouring columns
//
// Each 128-wide step of K is a product from zero, promoted into the fp32 sum with scale_token * scale_weight; the
// loading warps multiply the two scales. Items come from a counter in global memory: sizes may be any, the grid is
// fixed, and the host never knows the counts.
#include "wgmma_e4m3.cuh"

#ifndef CLUSTER
#define CLUSTER 2
#endif
#ifndef GRAIN
#define GRAIN 8  // tokens of a tile are a multiple of this: 8 or 16
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

constexpr int WEIGHT_BYTES = 256 * 128;
constexpr int TOKEN_BYTES = TILE_TOKENS * 128;
constexpr int SCALE_BYTES = 2 * TILE_TOKENS * 4;
constexpr int BOX_BYTES = 64 * 128;

// Offsets in dynamic shared memory, which starts at a multiple of 1024.
constexpr int WEIGHTS_AT = 0;
constexpr int TOKENS_AT = WEIGHTS_AT + STAGES * WEIGHT_BYTES;
constexpr int SCALES_AT = TOKENS_AT + STAGES * TOKEN_BYTES;
constexpr int WORK_AT = SCALES_AT + STAGES * SCALE_BYTES;  // one int4 a stage
constexpr int AMAX_AT = WORK_AT + STAGES * 16;  // [8 warps][128 tokens] float
constexpr int INVERSE_AT = AMAX_AT + 8 * TILE_TOKENS * 4;  // [128 tokens] float
constexpr int BARRIERS_AT = INVERSE_AT + TILE_TOKENS * 4;
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

// What the math warpgroups must know of an item. tokens 0: no more items.
struct Work {
    int tokens;  // N of this CTA's tile
    int row;  // first permuted row
    int live;  // rows to write, 0 .. tokens
    int column;  // which tile of columns
};

// Scales lie so that a thread's 4 tokens of 16 are one 16-byte load: token 16t + 8j + 2q + b at 16t + 4q + 2j + b.
INLINE int scale_slot(int token) {
    return (token & ~15) | (((token >> 1) & 3) << 2) | (((token >> 3) & 1) << 1) | (token & 1);
}

INLINE int column_tiles(int phase, int columns) { return phase == 1 ? columns / 128 : (columns + 255) / 256; }

// ---------------------------------------------------------------------------------------------------- loading
struct Span {
    int expert, column, first, rows;  // permuted rows first .. first+rows-1, for the cluster
};

INLINE Span find_item(int item, const int* offsets, const int* tiles_before, int experts, int column_count) {
    int low = 0, high = experts - 1;  // the last expert whose items start at or before this one, empty ones skipped
    while (low < high) {
        int middle = (low + high) >> 1;
        if (tiles_before[middle + 1] * column_count <= item) low = middle + 1;
        else high = middle;
    }
    int inner = item - tiles_before[low] * column_count;
    int tiles = tiles_before[low + 1] - tiles_before[low];
    int first = offsets[low] + (inner % tiles) * (CLUSTER * TILE_TOKENS);
    return {low, inner / tiles, first, min(CLUSTER * TILE_TOKENS, offsets[low + 1] - first)};
}

template <int PHASE>
INLINE void load_items(const TensorMap* map, const Params& p, u32 base, const int* offsets, const int* tiles_before) {
    const int thread = threadIdx.x - MATH_THREADS;  // 0..127
    const int lane = thread & 31;
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const int steps = p.depth / 128;
    const int column_count = column_tiles(PHASE, p.columns);
    const int items = tiles_before[p.experts] * column_count;
    const u32 full = base + BARRIERS_AT, empty = full + STAGES * 8, mail = empty + STAGES * 8;
    const int chunk = thread & 7, first_row = thread >> 3;  // this thread copies 16 bytes of rows first_row + 16j
    const u32 copy_to = base + TOKENS_AT + first_row * 128 + ((chunk ^ (first_row & 7)) << 4);
    const u32 scale_to = base + SCALES_AT + scale_slot(thread) * 4;

    int stage = 0, parity = 0, pending = -1;  // pending: the stage whose copies are under way, not yet announced
    auto announce = [&] {
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) barrier_arrive(full + pending * 8);
    };

    int item = cluster;
    for (int sent = 0;; ++sent) {
        if (item >= items) break;
        int next = 0;
        if (rank == 0 && thread == 0) next = atomicAdd(p.counters, 1) + clusters;

        const Span span = find_item(item, offsets, tiles_before, p.experts, column_count);
        const int share = ((span.rows + CLUSTER - 1) / CLUSTER + GRAIN - 1) / GRAIN * GRAIN;  // tokens of each CTA
        const int row = span.first + rank * share;
        const int last = span.first + span.rows - 1;  // rows past the end read this one
        int source[TILE_TOKENS / 16];
#pragma unroll
        for (int j = 0; j < TILE_TOKENS / 16; ++j) {
            int r = min(row + first_row + 16 * j, last);
            source[j] = p.row_index ? p.row_index[r] : r;
        }
        const int mine = min(row + thread, last);
        const float* token_scale = p.token_scale + (p.row_index ? p.row_index[mine] : mine);
        const int scale_rows = PHASE == 1 ? 2 * p.columns / 128 : p.columns / 128;
        const int scale_row0 = PHASE == 1 ? span.column : 2 * span.column;
        const int scale_row1 = PHASE == 1 ? span.column + p.columns / 128 : min(2 * span.column + 1, scale_rows - 1);
        const float* scale0 = p.weight_scale + (i64(span.expert) * scale_rows + scale_row0) * steps;
        const float* scale1 = p.weight_scale + (i64(span.expert) * scale_rows + scale_row1) * steps;
        const u8* tokens = p.tokens + chunk * 16;
        // Row of the weights' tensor map, in its units of 16 (gemm1) or 32 (gemm2) rows.
        const int box_row = PHASE == 1 ? (span.expert * 2 * p.columns + span.column * 128) / 16
                                       : (span.expert * p.columns + span.column * 256) / 32;

        float x = *token_scale, w0 = __ldg(scale0), w1 = __ldg(scale1);
        for (int step = 0; step < steps; ++step) {
            barrier_wait(empty + stage * 8, parity ^ 1);
            if (thread == 0) {
                *reinterpret_cast<int4*>(__cvta_shared_to_generic(base + WORK_AT + stage * 16)) =
                    make_int4(share, row, max(0, min(share, last + 1 - row)), span.column);
                barrier_arrive_expect(full + stage * 8, WEIGHT_BYTES);
#pragma unroll
                for (int b = 0; b < 4 / CLUSTER; ++b) {
                    int box = rank * (4 / CLUSTER) + b, group = box >> 1, wave = box & 1;
                    int at = PHASE == 1 ? box_row + wave * (p.columns / 16) + group * 4 : box_row + group * 4;
                    tma_load(base + WEIGHTS_AT + stage * WEIGHT_BYTES + box * BOX_BYTES, map, full + stage * 8,
                             step * 128, 0, PHASE == 1 ? 0 : 2 * wave, at, CLUSTER > 1 ? (1 << CLUSTER) - 1 : 0);
                }
            }
#pragma unroll
            for (int j = 0; j < TILE_TOKENS / 16; ++j) {
                if (16 * j + first_row < share) {
                    copy16_async(copy_to + stage * TOKEN_BYTES + j * 2048, tokens + i64(source[j]) * p.depth);
                }
            }
            copies_commit();
            tokens += 128;
            store_shared(scale_to + stage * SCALE_BYTES, x * w0);
            store_shared(scale_to + stage * SCALE_BYTES + TILE_TOKENS * 4, x * w1);
            if (step + 1 < steps) {  // a step ahead, so that no step waits for its scales
                token_scale += p.token_scale_stride;
                x = *token_scale;
                w0 = __ldg(scale0 + step + 1);
                w1 = __ldg(scale1 + step + 1);
            }
            if (pending >= 0) {
                copies_wait<1>();
                announce();
            }
            pending = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }

        const int slot = sent % MAIL_SLOTS;
        if (thread == 0) {
            barrier_arrive_expect(mail + slot * 8, 4);
            if (rank == 0) {
#pragma unroll
                for (int r = 0; r < CLUSTER; ++r) send_to_cta(base + MAIL_AT + slot * 4, mail + slot * 8, r, next);
            }
        }
        barrier_wait_cluster(mail + slot * 8, (sent / MAIL_SLOTS) & 1);
        item = *reinterpret_cast<volatile int*>(__cvta_shared_to_generic(base + MAIL_AT + slot * 4));
    }

    // The last stage, then one more that says that there is nothing left.
    if (pending >= 0) {
        copies_wait<0>();
        announce();
    }
    barrier_wait(empty + stage * 8, parity ^ 1);
    if (thread == 0) {
        *reinterpret_cast<int4*>(__cvta_shared_to_generic(base + WORK_AT + stage * 16)) = make_int4(0, 0, 0, 0);
        barrier_arrive(full + stage * 8);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(full + stage * 8);
    if (rank == 0 && thread == 0 && atomicAdd(p.counters + 1, 1) == clusters - 1) {  // every cluster drew its last item
        p.counters[0] = 0;
        p.counters[1] = 0;
    }
}

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

// sum[v][4j + 2p + b]: wave v, weight row 16 warp + 8p + i of the wave, token 8j + 2q + b. The first stage is there.
template <int PHASE, int N>
INLINE void multiply(Pipe& pipe, float (&sum)[2][N / 2], int steps, int group, int lane) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
        for (int x = 0; x < N / 2; ++x) sum[v][x] = 0.0f;
    }
    const u32 quad = (lane & 3) * 16;
    for (int step = 0; step < steps; ++step) {
        if (step > 0) pipe.wait();
        const u64 tokens = tile_descriptor(pipe.base + TOKENS_AT + pipe.stage * TOKEN_BYTES);
        const u64 weights = tile_descriptor(pipe.base + WEIGHTS_AT + pipe.stage * WEIGHT_BYTES + group * 2 * BOX_BYTES);
        const u32 scales = pipe.base + SCALES_AT + pipe.stage * SCALE_BYTES + quad;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            float product[N / 2];
            pin(product);
            mma_fence();
#pragma unroll
            for (int k = 0; k < 4; ++k) {  // 32 bytes further along the swizzled row: 2 units of 16
                mma_step<N>(product, weights + v * (BOX_BYTES >> 4) + 2 * k, tokens + 2 * k, k > 0);
            }
            mma_commit();
            pin(product);
            const u32 row = scales + (PHASE == 1 ? v : group) * (TILE_TOKENS * 4);
            float4 s = load_shared4(row);  // while the product runs
            mma_wait();
            pin(product);
#pragma unroll
            for (int t = 0; t < (N + 15) / 16; ++t) {
                if (t > 0) s = load_shared4(row + t * 64);
                sum[v][8 * t + 0] += product[8 * t + 0] * s.x;
                sum[v][8 * t + 1] += product[8 * t + 1] * s.y;
                sum[v][8 * t + 2] += product[8 * t + 2] * s.x;
                sum[v][8 * t + 3] += product[8 * t + 3] * s.y;
                if (16 * t + 8 < N) {
                    sum[v][8 * t + 4] += product[8 * t + 4] * s.z;
                    sum[v][8 * t + 5] += product[8 * t + 5] * s.w;
                    sum[v][8 * t + 6] += product[8 * t + 6] * s.z;
                    sum[v][8 * t + 7] += product[8 * t + 7] * s.w;
                }
            }
        }
        pipe.release(lane);
    }
}

// amax[x], x < HALF: the larger of this lane's and its partner's; lanes with bit HALF set keep the upper half.
template <int HALF>
INLINE void exchange_max(float (&amax)[32], int lane) {
    const bool upper = lane & HALF;
#pragma unroll
    for (int x = 0; x < HALF; ++x) {
        const float keep = upper ? amax[x + HALF] : amax[x], give = upper ? amax[x] : amax[x + HALF];
        amax[x] = fmaxf(keep, __shfl_xor_sync(0xFFFFFFFF, give, HALF));
    }
}

// silu(gate) * up, then one scale a row for the tile's 128 columns: amax / 448, or 1 for a block of zeros.
template <int N>
INLINE void store_requantized(float (&sum)[2][N / 2], const Work& work, const Params& p, u32 base, int group, int warp,
                              int lane) {
    const int i = lane >> 2, q = lane & 3;
    float amax[32];  // x = 2j + b: token 8j + 2q + b
#pragma unroll
    for (int x = 0; x < 32; ++x) amax[x] = 0.0f;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const int at = 4 * j + 2 * pair + b;
                const float gate = sum[1][at];
                sum[0][at] *= __fdividef(gate, 1.0f + __expf(-gate));
                amax[2 * j + b] = fmaxf(amax[2 * j + b], fabsf(sum[0][at]));
            }
        }
    }
    // Each exchange halves the tokens a lane keeps: afterwards lane (i, q) has x = 4i .. 4i+3 over the warp's 16 rows.
    exchange_max<16>(amax, lane);
    exchange_max<8>(amax, lane);
    exchange_max<4>(amax, lane);
    const u32 mine = base + AMAX_AT + (group * 4 + warp) * TILE_TOKENS * 4;
#pragma unroll
    for (int x = 0; x < 4; ++x) {
        const int from = 4 * i + x;
        store_shared(mine + (8 * (from >> 1) + 2 * q + (from & 1)) * 4, amax[x]);
    }
    named_barrier_sync(1, MATH_THREADS);
    const int token = threadIdx.x;
    if (token < N) {
        float largest = 0.0f;
#pragma unroll
        for (int w = 0; w < 8; ++w) largest = fmaxf(largest, load_shared(base + AMAX_AT + (w * TILE_TOKENS + token) * 4));
        // Not below the smallest normal number, so that its inverse is finite.
        const float scale = largest > 0.0f ? fmaxf(__fdiv_rn(largest, 448.0f), 1.17549435e-38f) : 1.0f;
        store_shared(base + INVERSE_AT + scale_slot(token) * 4, __frcp_rn(scale));
        if (token < work.live) p.out_scale[i64(work.column) * p.out_scale_stride + work.row + token] = scale;
    }
    named_barrier_sync(1, MATH_THREADS);
    u8* out = static_cast<u8*>(p.out) + i64(work.row) * p.columns + work.column * 128 + group * 64 + warp * 16 + i * 2;
#pragma unroll
    for (int t = 0; t < (N + 15) / 16; ++t) {
        const float4 s = load_shared4(base + INVERSE_AT + t * 64 + q * 16);
        const float inverse[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
        for (int x = 0; x < 4; ++x) {  // x = 2j + b of these 16 tokens
            const int at = 8 * t + 4 * (x >> 1) + (x & 1);
            if (16 * t + 8 * (x >> 1) < N) {
                const int n = 16 * t + 8 * (x >> 1) + 2 * q + (x & 1);
                const u16 packed = pack_e4m3(sum[0][at] * inverse[x], sum[0][at + 2] * inverse[x]);
                if (n < work.live) *reinterpret_cast<u16*>(out + i64(n) * p.columns) = packed;
            }
        }
    }
}

template <int N>
INLINE void store_rows(float (&sum)[2][N / 2], const Work& work, const Params& p, int group, int warp, int lane) {
    const int i = lane >> 2, q = lane & 3;
    const int column = work.column * 256 + group * 128 + warp * 32 + i * 4;
    if (column >= p.columns) return;
    const i64 at = i64(work.row) * p.columns + column;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const int n = 8 * j + 2 * q + b;
            if (n >= work.live) continue;
            const float4 v = {sum[0][4 * j + b], sum[0][4 * j + 2 + b], sum[1][4 * j + b], sum[1][4 * j + 2 + b]};
            if (p.wide) {
                *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at + i64(n) * p.columns) = v;
            } else {
                *reinterpret_cast<uint2*>(static_cast<u16*>(p.out) + at + i64(n) * p.columns) =
                    make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
            }
        }
    }
}

template <int PHASE, int N>
INLINE void tile(Pipe& pipe, const Work& work, const Params& p, int group, int warp, int lane) {
    float sum[2][N / 2];
    multiply<PHASE, N>(pipe, sum, p.depth / 128, group, lane);
    if constexpr (PHASE == 1) store_requantized<N>(sum, work, p, pipe.base, group, warp, lane);
    else store_rows<N>(sum, work, p, group, warp, lane);
}

template <int PHASE>
INLINE void compute_items(const Params& p, u32 base) {
    const int lane = threadIdx.x & 31;
    const int warp = __shfl_sync(0xFFFFFFFF, (threadIdx.x >> 5) & 3, 0);
    const int group = __shfl_sync(0xFFFFFFFF, threadIdx.x >> 7, 0);
    Pipe pipe{base, 0, 0};
    for (;;) {
        pipe.wait();
        const int4 w = load_shared4i(base + WORK_AT + pipe.stage * 16);
        const Work work{w.x, w.y, w.z, w.w};
        const int tokens = __shfl_sync(0xFFFFFFFF, work.tokens, 0);
        if (tokens == 0) return;
#define CASE(N) \
    case N: tile<PHASE, N>(pipe, work, p, group, warp, lane); break;
        switch (tokens) {
            CASE(16) CASE(32) CASE(48) CASE(64) CASE(80) CASE(96) CASE(112) CASE(128)
#if GRAIN == 8
            CASE(8) CASE(24) CASE(40) CASE(56) CASE(72) CASE(88) CASE(104) CASE(120)
#endif
        }
#undef CASE
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
            barrier_init(base + BARRIERS_AT + s * 8, LOAD_THREADS / 32 + 1);
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
        registers_down<64>();
        load_items<PHASE>(map, p, base, offsets, tiles_before);
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
