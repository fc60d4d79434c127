// The whole layer for at most 8 tokens in one launch, one CTA an SM, made for reading the hit experts' weights and
// nothing else.
//
// Every CTA routes all tokens itself. Then a warp streams weights into a ring of slots in shared memory, without regard
// to what has been computed, and eight warps multiply: gemm1 in tiles of 8 columns of swiglu_out (16 rows of weights),
// shared out among the CTAs; then, when all of gemm1 is done, gemm2, where a CTA has some columns of the output for
// every expert, so that it sums the experts itself. While the CTAs wait for one another the ring fills with gemm2's weights.
//
// Tokens are the 8 columns of mma.m16n8k32, for every expert all of them; a token counts where it chose the expert.
// Shares of work are drawn, not assigned: only a CTA that runs holds any, so the wait for gemm1 ends whatever else
// occupies the card.
#include "choose.cuh"

struct Params {
    const float* routing_logits;  // [T, EXPERTS]
    const u16* routing_bias;  // [EXPERTS] bf16
    const u8* hidden_states;  // [T, HIDDEN] e4m3
    const float* hidden_states_scale;  // [HIDDEN/128, >= T], rows scale_stride apart
    const u8* gemm1_weights;  // [LOCAL, 2 INTER, HIDDEN] e4m3, rows [up ; gate]
    const float* gemm1_weights_scale;  // [LOCAL, 2 INTER/128, HIDDEN/128]
    const u8* gemm2_weights;  // [LOCAL, HIDDEN, INTER] e4m3
    const float* gemm2_weights_scale;  // [LOCAL, HIDDEN/128, INTER/128]
    u16* output;  // [T, HIDDEN] bf16
    float* swiglu_out;  // [MAX_HITS, TOKENS, INTER]
    int* counters;  // [4] of DRAWN.., zero between calls
    int tokens;  // T, at most TOKENS
    int offset;  // local_expert_offset
    float factor;  // routed_scaling_factor
    int scale_stride;
};

constexpr int TOKENS = 8, MATH_WARPS = 8, THREADS = 32 * (MATH_WARPS + 1);
constexpr int MAX_HITS = TOKENS * TOP_K < LOCAL ? TOKENS * TOP_K : LOCAL;
constexpr int WORDS = (LOCAL + 31) / 32;
constexpr int HIDDEN_BLOCKS = HIDDEN / 128, INTER_BLOCKS = INTER / 128;
// The warps share K: `part` w has blocks w * PART.. of 128, and warps without any still take part in the barriers.
constexpr int PART1 = (HIDDEN_BLOCKS + MATH_WARPS - 1) / MATH_WARPS, PARTS1 = (HIDDEN_BLOCKS + PART1 - 1) / PART1;
constexpr int PART2 = (INTER_BLOCKS + MATH_WARPS - 1) / MATH_WARPS;
constexpr int TILES = INTER / 8;  // of gemm1, an expert
constexpr int OUTPUT_TILES = HIDDEN / 8;
// Rows in a slot are 64 bytes further apart than they are long: two rows, read together, lie in different banks.
constexpr int ROW1 = PART1 * 128 + 64, ROW2 = INTER + 64;
constexpr int SLOT = 16 * ROW1 > 8 * ROW2 ? 16 * ROW1 : 8 * ROW2;
static_assert(PART1 <= 16 && ITEMS * PART2 <= 32, "a warp's scales must fit its lanes");

enum { DRAWN_GEMM1, DONE_GEMM1, DRAWN_GEMM2, LEFT };

struct Shared {
    u64 full[STAGES], empty[STAGES], drawn, taken;
    int next;  // the share that was drawn last
    int first[2];  // of gemm1, of gemm2
    int hits;
    u32 local_mask[WORDS];
    int expert[MAX_HITS];  // local id
    u32 chosen_by[MAX_HITS];  // a bit for each token
    float weight[MAX_HITS][TOKENS];
    float partial[2][MATH_WARPS][128];
};

// ---- the ring
struct Ring {
    u32 slots, full, empty;
    INLINE u32 slot(int n) const { return slots + n % STAGES * SLOT; }
    INLINE u32 full_bar(int n) const { return full + n % STAGES * 8; }
    INLINE void await_full(int n) const { barrier_wait(full_bar(n), n / STAGES & 1); }
    INLINE void await_empty(int n) const { barrier_wait(empty + n % STAGES * 8, (n / STAGES & 1) ^ 1); }
    INLINE void release(int n, u32 arrivals, int lane) const {
        __syncwarp();
        if (lane == 0) barrier_arrive_many(empty + n % STAGES * 8, arrivals);
    }
};

// Share s of `all` things among the grid's CTAs.
INLINE int share_begin(int s, int all) { return int(i64(s) * all / int(gridDim.x)); }

// ---- loading, by one warp
INLINE void load_gemm1_tile(const Params& p, const Shared& s, const Ring& ring, int tile, int& n, int lane, u64 policy) {
    const int row = tile % TILES * 8 + (lane & 7) + (lane & 8 ? INTER : 0);
    const u8* from = p.gemm1_weights + (i64(s.expert[tile / TILES]) * 2 * INTER + row) * HIDDEN;
    for (int part = 0; part < PARTS1; ++part, ++n) {
        const int bytes = min(PART1, HIDDEN_BLOCKS - part * PART1) * 128;
        if (lane == 0) {
            ring.await_empty(n);
            barrier_arrive_expect(ring.full_bar(n), 16 * bytes);
        }
        __syncwarp();
        if (lane < 16) {
            bulk_load(ring.slot(n) + lane * ROW1, from + part * PART1 * 128, bytes, ring.full_bar(n), policy);
        }
    }
}

INLINE void load_gemm2_tile(const Params& p, int expert, const Ring& ring, int tile, int& n, int lane, u64 policy) {
    if (lane == 0) {
        ring.await_empty(n);
        barrier_arrive_expect(ring.full_bar(n), 8 * INTER);
    }
    __syncwarp();
    if (lane < 8) {
        const u8* from = p.gemm2_weights + (i64(expert) * HIDDEN + tile * 8 + lane) * INTER;
        bulk_load(ring.slot(n) + lane * ROW2, from, INTER, ring.full_bar(n), policy);
    }
    ++n;
}

// Draws the next share and shows it to the math warps when they have seen the one before.
INLINE int draw(const Params& p, Shared& s, int which, int& draws, int lane) {
    int next = 0;
    if (lane == 0) {
        next = atomicAdd(p.counters + which, 1);
        barrier_wait(shared_address(&s.taken), (draws & 1) ^ 1);
        s.next = next;
        barrier_arrive(shared_address(&s.drawn));
    }
    ++draws;
    return __shfl_sync(ALL, next, 0);
}

INLINE void load_everything(const Params& p, Shared& s, const Ring& ring, int lane) {
    const u64 policy = s.hits <= EVICT_FIRST_HITS ? evict_first_policy() : evict_normal_policy();
    const int shares = gridDim.x;
    int n = 0, draws = 0;
    for (int share = s.first[0]; share < shares; share = draw(p, s, DRAWN_GEMM1, draws, lane)) {
        const int end = share_begin(share + 1, s.hits * TILES);
        for (int tile = share_begin(share, s.hits * TILES); tile < end; ++tile) {
            load_gemm1_tile(p, s, ring, tile, n, lane, policy);
        }
    }
    for (int share = s.first[1]; share < shares; share = draw(p, s, DRAWN_GEMM2, draws, lane)) {
        const int begin = share_begin(share, OUTPUT_TILES), end = share_begin(share + 1, OUTPUT_TILES);
        for (int hit = 0; hit < s.hits; ++hit) {
            for (int tile = begin; tile < end; ++tile) load_gemm2_tile(p, s.expert[hit], ring, tile, n, lane, policy);
        }
    }
}

// ---- multiplying, by eight warps; thread (g, q) of a warp: g = lane / 4, q = lane % 4
// d += a b^T for 32 of K. Which 32 is free, as long as a and b agree: a thread gives 8 neighbouring bytes of its rows.
INLINE void mma(float (&d)[4], u32 low0, u32 low1, u32 high0, u32 high1, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(low0), "r"(high0), "r"(low1), "r"(high1), "r"(b0), "r"(b1));
}

// Everything of the tokens that a warp needs for gemm1, held in registers: it is the same for every expert.
struct Activations {
    uint4 payload[PART1][2];  // token g's bytes 64 h + 16 q.. of each block
    float scale[PART1][2];  // of tokens 2q, 2q + 1

    INLINE void load(const Params& p, int warp, int lane) {
        const int g = lane >> 2, q = lane & 3;
#pragma unroll
        for (int b = 0; b < PART1; ++b) {
            const int block = warp * PART1 + b;
            const bool real = block < HIDDEN_BLOCKS;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u8* from = p.hidden_states + i64(g) * HIDDEN + block * 128 + h * 64 + q * 16;
                payload[b][h] = real && g < p.tokens ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{};
                const float* of = p.hidden_states_scale + i64(block) * p.scale_stride + 2 * q + h;
                scale[b][h] = real && 2 * q + h < p.tokens ? __ldg(of) : 0.0f;
            }
        }
    }
};

// Lane b has the scale of block b of up's rows, lane 16 + b of gate's.
INLINE float gemm1_scale(const Params& p, const Shared& s, int tile, int end, int warp, int lane) {
    const int block = warp * PART1 + (lane & 15);
    if (tile >= end || (lane & 15) >= PART1 || block >= HIDDEN_BLOCKS) return 0.0f;
    const int row = tile % TILES / 16 + (lane < 16 ? 0 : INTER_BLOCKS);
    return __ldg(p.gemm1_weights_scale + (i64(s.expert[tile / TILES]) * 2 * INTER_BLOCKS + row) * HIDDEN_BLOCKS + block);
}

// sum: up of tokens 2q, 2q + 1 at column g of the tile, then gate.
INLINE void multiply_gemm1(float (&sum)[4], const Activations& x, u32 slot, float scales, int warp, int lane) {
    const u32 from = slot + (lane >> 2) * ROW1 + (lane & 3) * 16;
#pragma unroll
    for (int b = 0; b < PART1; ++b) {
        if (warp * PART1 + b >= HIDDEN_BLOCKS) break;
        float d[4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int4 up = load_shared4i(from + b * 128 + h * 64), gate = load_shared4i(from + 8 * ROW1 + b * 128 + h * 64);
            mma(d, up.x, up.y, gate.x, gate.y, x.payload[b][h].x, x.payload[b][h].y);
            mma(d, up.z, up.w, gate.z, gate.w, x.payload[b][h].z, x.payload[b][h].w);
        }
        const float up_scale = __shfl_sync(ALL, scales, b), gate_scale = __shfl_sync(ALL, scales, 16 + b);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            sum[t] += d[t] * (x.scale[b][t] * up_scale);
            sum[2 + t] += d[2 + t] * (x.scale[b][t] * gate_scale);
        }
    }
}

INLINE void store_swiglu(const Params& p, const Shared& s, const float (&partial)[MATH_WARPS][128], int tile, int lane) {
    const int hit = tile / TILES, column = tile % TILES * 8 + (lane >> 2);
    float sum[4] = {};
#pragma unroll
    for (int w = 0; w < PARTS1; ++w) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += partial[w][32 * i + lane];
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        const int token = 2 * (lane & 3) + t;
        if (s.chosen_by[hit] >> token & 1) {
            __stcg(p.swiglu_out + (i64(hit) * TOKENS + token) * INTER + column, sum[t] * silu(sum[2 + t]));
        }
    }
}

INLINE void math_sync() { named_barrier_sync(1, 32 * MATH_WARPS); }

// gemm1 of one share; n counts the ring's slots.
INLINE void multiply_share1(const Params& p, Shared& s, const Ring& ring, const Activations& x, int share, int& n, int warp, int lane) {
    const int begin = share_begin(share, s.hits * TILES), end = share_begin(share + 1, s.hits * TILES);
    float scales = gemm1_scale(p, s, begin, end, warp, lane);
    for (int tile = begin; tile < end; ++tile, n += PARTS1) {
        const float next = gemm1_scale(p, s, tile + 1, end, warp, lane);
        float sum[4] = {};
        if (warp < PARTS1) {
            ring.await_full(n + warp);
            multiply_gemm1(sum, x, ring.slot(n + warp), scales, warp, lane);
            ring.release(n + warp, MATH_WARPS, lane);
        }
        scales = next;
        auto& partial = s.partial[tile & 1];
#pragma unroll
        for (int i = 0; i < 4; ++i) partial[warp][32 * i + lane] = sum[i];
        math_sync();  // the other buffer's readers have come here too, so it is free
        if (warp == (tile & 7)) store_swiglu(p, s, partial, tile, lane);
    }
    math_sync();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(p.counters + DONE_GEMM1, 1);
    }
}

// Re-quantised SwiGLU of one hit expert, as Activations.
struct Requantized {
    uint4 payload[PART2][2];
    float scale[PART2][2];

    INLINE void load(const Params& p, const Shared& s, int hit, int warp, int lane) {
        const int g = lane >> 2, q = lane & 3;
        const bool chosen = s.chosen_by[hit] >> g & 1;
        const float* row = p.swiglu_out + (i64(hit) * TOKENS + g) * INTER;
        float value[PART2][32];
#pragma unroll
        for (int b = 0; b < PART2; ++b) {
            const int block = warp * PART2 + b;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int at = block * 128 + (i >> 2) * 64 + q * 16 + (i & 3) * 4;
                const bool real = chosen && block < INTER_BLOCKS;
                const float4 four = real ? __ldcg(reinterpret_cast<const float4*>(row + at)) : float4{};
                value[b][4 * i] = four.x, value[b][4 * i + 1] = four.y;
                value[b][4 * i + 2] = four.z, value[b][4 * i + 3] = four.w;
            }
        }
#pragma unroll
        for (int b = 0; b < PART2; ++b) {
            float largest = 0.0f;
#pragma unroll
            for (int i = 0; i < 32; ++i) largest = fmaxf(largest, fabsf(value[b][i]));
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 2));
            const float mine = requantize_scale(largest), inverse = __frcp_rn(mine);
            u32 packed[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float* v = value[b] + 4 * i;
                packed[i] = pack_e4m3(v[0] * inverse, v[1] * inverse) | u32(pack_e4m3(v[2] * inverse, v[3] * inverse)) << 16;
            }
            payload[b][0] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
            payload[b][1] = make_uint4(packed[4], packed[5], packed[6], packed[7]);
            scale[b][0] = __shfl_sync(ALL, mine, 8 * q);
            scale[b][1] = __shfl_sync(ALL, mine, 8 * q + 4);
        }
    }
};

// Lane i * PART2 + b has the scale of block b for the share's i-th tile.
INLINE float gemm2_scale(const Params& p, const Shared& s, int hit, int begin, int end, int warp, int lane) {
    const int tile = begin + lane / PART2, block = warp * PART2 + lane % PART2;
    if (hit >= s.hits || tile >= end || block >= INTER_BLOCKS) return 0.0f;
    return __ldg(p.gemm2_weights_scale + (i64(s.expert[hit]) * HIDDEN_BLOCKS + tile / 16) * INTER_BLOCKS + block);
}

// gemm2 of one share: its columns of the output for all experts, summed.
INLINE void multiply_share2(const Params& p, Shared& s, const Ring& ring, int share, int& n, int warp, int lane) {
    const int begin = share_begin(share, OUTPUT_TILES), end = share_begin(share + 1, OUTPUT_TILES);
    const int g = lane >> 2, q = lane & 3;
    float acc[ITEMS][2] = {};  // column g, tokens 2q and 2q + 1
    float scales = gemm2_scale(p, s, 0, begin, end, warp, lane);
    for (int hit = 0; hit < s.hits; ++hit) {
        const float next = gemm2_scale(p, s, hit + 1, begin, end, warp, lane);
        Requantized x;
        x.load(p, s, hit, warp, lane);
        const u32 chosen = s.chosen_by[hit] >> 2 * q;
        const float2 weight = *reinterpret_cast<const float2*>(&s.weight[hit][2 * q]);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (begin + i >= end) break;
            ring.await_full(n);
            const u32 from = ring.slot(n) + g * ROW2 + q * 16 + warp * PART2 * 128;
            float sum[2] = {};
#pragma unroll
            for (int b = 0; b < PART2; ++b) {
                const float scale = __shfl_sync(ALL, scales, i * PART2 + b);
                if (warp * PART2 + b >= INTER_BLOCKS) continue;
                float d[4] = {};
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int4 w = load_shared4i(from + b * 128 + h * 64);
                    mma(d, w.x, w.y, 0, 0, x.payload[b][h].x, x.payload[b][h].y);
                    mma(d, w.z, w.w, 0, 0, x.payload[b][h].z, x.payload[b][h].w);
                }
                sum[0] += d[0] * (x.scale[b][0] * scale);
                sum[1] += d[1] * (x.scale[b][1] * scale);
            }
            ring.release(n++, 1, lane);
            if (chosen & 1) acc[i][0] += weight.x * sum[0];
            if (chosen & 2) acc[i][1] += weight.y * sum[1];
        }
        scales = next;
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i += 2) {  // two tiles a round, the warps' parts summed in order
        auto& partial = s.partial[i / 2 & 1];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (i + j >= ITEMS) break;
            partial[warp][64 * j + 16 * q + g] = acc[i + j][0];
            partial[warp][64 * j + 16 * q + 8 + g] = acc[i + j][1];
        }
        math_sync();
        const int tile = begin + i + int(threadIdx.x >> 6), token = threadIdx.x >> 3 & 7;
        if (threadIdx.x < 128 && tile < end && token < p.tokens) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < MATH_WARPS; ++w) sum += partial[w][threadIdx.x];
            p.output[i64(token) * HIDDEN + tile * 8 + (threadIdx.x & 7)] = u16(pack_bf16(sum, 0.0f));
        }
    }
    math_sync();
}

// The share that was drawn after the draws'th one.
INLINE int see_drawn(Shared& s, int& draws, int lane) {
    barrier_wait(shared_address(&s.drawn), draws++ & 1);
    const int next = s.next;
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&s.taken));
    return next;
}

INLINE void multiply_everything(const Params& p, Shared& s, const Ring& ring, const Activations& x, int warp, int lane) {
    const int shares = gridDim.x;
    int n = 0, draws = 0;
    for (int share = s.first[0]; share < shares; share = see_drawn(s, draws, lane)) {
        multiply_share1(p, s, ring, x, share, n, warp, lane);
    }
    if (threadIdx.x == 0) {
        while (load_acquire(p.counters + DONE_GEMM1) < shares) __nanosleep(20);
    }
    math_sync();
    for (int share = s.first[1]; share < shares; share = see_drawn(s, draws, lane)) {
        multiply_share2(p, s, ring, share, n, warp, lane);
    }
    if (threadIdx.x == 0 && atomicAdd(p.counters + LEFT, 1) == shares - 1) {
        for (int i = 0; i < 4; ++i) p.counters[i] = 0;  // nobody else reads them any more
    }
}

// ---- routing, by the math warps, a token each
INLINE void list_hits(Shared& s) {
    for (int local = threadIdx.x; local < LOCAL; local += THREADS) {
        int before = 0;
        for (int w = 0; w < local / 32; ++w) before += __popc(s.local_mask[w]);
        const u32 word = s.local_mask[local / 32], bit = 1u << local % 32;
        if (word & bit) s.expert[before + __popc(word & (bit - 1))] = local;
        if (local == LOCAL - 1) s.hits = before + __popc(word);
    }
}

INLINE int hit_of(const Shared& s, int local) {
    int before = 0;
    for (int w = 0; w < local / 32; ++w) before += __popc(s.local_mask[w]);
    return before + __popc(s.local_mask[local / 32] & ((1u << local % 32) - 1));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) few_tokens_kernel(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 slots[];
    __shared__ Shared s;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const Ring ring = {shared_address(slots), shared_address(s.full), shared_address(s.empty)};
    for (int i = threadIdx.x; i < STAGES; i += THREADS) {
        barrier_init(ring.full + 8 * i, 1);
        barrier_init(ring.empty + 8 * i, MATH_WARPS);
    }
    for (int i = threadIdx.x; i < WORDS; i += THREADS) s.local_mask[i] = 0;
    for (int i = threadIdx.x; i < MAX_HITS; i += THREADS) s.chosen_by[i] = 0;
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&s.drawn), 1);
        barrier_init(shared_address(&s.taken), MATH_WARPS);
        barrier_init_fence();
    }
    Activations x;
    if (warp < MATH_WARPS) x.load(p, warp, lane);
    __syncthreads();
    int local = -1;
    float weight = 0.0f;
    if (warp == MATH_WARPS) {
        if (lane < 2) s.first[lane] = atomicAdd(p.counters + (lane ? DRAWN_GEMM2 : DRAWN_GEMM1), 1);
    } else if (warp < p.tokens) {
        int id;
        choose_experts(p.routing_logits + i64(warp) * EXPERTS, p.routing_bias, p.factor, lane, id, weight);
        local = lane < TOP_K ? id - p.offset : -1;
        if (local < 0 || local >= LOCAL) local = -1;
        if (local >= 0) atomicOr(&s.local_mask[local / 32], 1u << local % 32);
    }
    __syncthreads();
    list_hits(s);
    __syncthreads();
    if (warp == MATH_WARPS) {
        load_everything(p, s, ring, lane);
        return;
    }
    if (local >= 0) {
        const int hit = hit_of(s, local);
        s.weight[hit][warp] = weight;
        atomicOr(&s.chosen_by[hit], 1u << warp);
    }
    math_sync();
    multiply_everything(p, s, ring, x, warp, lane);
}
