// What the parts of few_tokens.cu share: parameters, sizes, shared memory, the ring.
#pragma once
#include "hopper.cuh"

struct Params {
    const float* routing_logits;       // [T, EXPERTS]
    const u16* routing_bias;           // [EXPERTS] bf16
    const u8* hidden_states;           // [T, HIDDEN] e4m3
    const float* hidden_states_scale;  // [HIDDEN/128, >= T], rows scale_stride apart
    const u8* gemm1_weights;           // [LOCAL, 2 INTER, HIDDEN] e4m3, rows [up ; gate]
    const float* gemm1_weights_scale;  // [LOCAL, 2 INTER/128, HIDDEN/128]
    const u8* gemm2_weights;           // [LOCAL, HIDDEN, INTER] e4m3
    const float* gemm2_weights_scale;  // [LOCAL, HIDDEN/128, INTER/128]
    u16* output;                       // [T, HIDDEN] bf16
    float* swiglu_out;                 // [MAX_HITS, TOKENS, INTER], or UNWRITTEN
    int* counters;                     // [4] of DRAWN.., zero between calls
    int tokens;                        // T, at most TOKENS
    int offset;                        // local_expert_offset
    float factor;                      // routed_scaling_factor
    int scale_stride;
};

// Two warpgroups multiply; of the third one warp loads and one watches, the others are there because registers move by
// the warpgroup.
constexpr int TOKENS = 8, MATH_WARPS = 8, THREADS = 384;
constexpr int MAX_HITS = TOKENS * TOP_K < LOCAL ? TOKENS * TOP_K : LOCAL;
constexpr int WORDS = (LOCAL + 31) / 32;
constexpr int HIDDEN_BLOCKS = HIDDEN / 128, INTER_BLOCKS = INTER / 128;
// The warps share K: warp w has blocks w * PART.. of 128; one without any still takes part in the barriers.
constexpr int PART1 = (HIDDEN_BLOCKS + MATH_WARPS - 1) / MATH_WARPS;
constexpr int PART2 = (INTER_BLOCKS + MATH_WARPS - 1) / MATH_WARPS;
constexpr int COLUMNS = 4, TILES = INTER / COLUMNS;  // of swiglu_out, in a tile of gemm1; tiles an expert
constexpr int OUTPUT_TILES = HIDDEN / 8, PAIRS = (ITEMS + 1) / 2;
// A slot holds two rows of gemm1's weights, so that a tile takes four (up's, then gate's), or a tile of gemm2's, as
// they lie in memory, so that one copy fills it. Slots are half a bank's round longer: two rows, read together, come
// from neighbouring slots, and so from different banks.
constexpr int TILE_SLOTS = COLUMNS;
constexpr int SLOT = (2 * HIDDEN > 8 * INTER ? 2 * HIDDEN : 8 * INTER) + 64;
// Until the weights come, the last slots hold the tokens, and the first ones routing's scores.
constexpr int TOKENS_SLOT = STAGES - TOKENS / 2;
static_assert(PART1 <= 16 && 2 * PAIRS * PART2 <= 32, "a warp's scales must fit its lanes");
static_assert(STAGES > TILE_SLOTS, "more than one tile of gemm1");
static_assert(UNDER_WAY > 0 && UNDER_WAY < STAGES, "a slot that is waited for must not be asked for again");
static_assert(COLUMNS * TOKENS == 32, "a lane for each value of a tile");
static_assert(MAX_HITS <= THREADS && WORDS <= THREADS && STAGES <= THREADS, "a thread each");

enum { DRAWN_GEMM1, BLANKED, DRAWN_GEMM2, LEFT };

// A value of swiglu_out that is still to come; no arithmetic gives it (its NaN is 0x7FFFFFFF). Who reads it asks again,
// so that a value takes one way through the L2; a counter would add the wait until it is stored, its own way and a
// poll's.
enum : u32 { UNWRITTEN = 0xFFFFFFFF };

struct Shared {
    u64 full[STAGES], empty[STAGES], drawn, taken;
    u64 tokens_full, tokens_empty;
    int next;      // the share that was drawn last
    int first[2];  // of gemm1, of gemm2
    int hits;
    u32 chosen[MATH_WARPS][WORDS];  // local experts, by the warp that chose them
    u32 local_mask[WORDS];          // those that any token chose
    int expert[MAX_HITS];           // local id
    u32 chosen_by[MAX_HITS];        // a bit for each token
    alignas(8) float weight[MAX_HITS][TOKENS];
    alignas(8) float x_scale[HIDDEN_BLOCKS][TOKENS];  // of the tokens' blocks; 0 where there is no token
    float partial[2][MATH_WARPS][128];
};

// ---- the ring
struct Ring {
    u32 slots, full, empty, tokens_full, tokens_empty;
    INLINE Ring(u8* of, Shared& s)
        : slots(shared_address(of)),
          full(shared_address(s.full)),
          empty(shared_address(s.empty)),
          tokens_full(shared_address(&s.tokens_full)),
          tokens_empty(shared_address(&s.tokens_empty)) {}
    INLINE u32 slot(int n) const { return slots + n % STAGES * SLOT; }
    INLINE u32 full_bar(int n) const { return full + n % STAGES * 8; }
    INLINE void await_full(int n) const { barrier_wait(full_bar(n), n / STAGES & 1); }
    INLINE u32 tokens() const { return slots + TOKENS_SLOT * SLOT; }
    INLINE void await_tokens() const { barrier_wait(tokens_full, 0); }
    // This warp has read them.
    INLINE void release_tokens(int lane) const {
        __syncwarp();
        if (EVERY_LANE_ARRIVES || lane == 0) barrier_arrive(tokens_empty);
    }
    // This warp has read `count` slots.
    INLINE void release(int n, int count, int lane) const {
        __syncwarp();
        if (EVERY_LANE_ARRIVES) {
            for (int i = 0; i < count; ++i) barrier_arrive(empty + (n + i) % STAGES * 8);
        } else if (lane < count) {
            barrier_arrive(empty + (n + lane) % STAGES * 8);
        }
    }
};

// ---- named barriers
enum : u32 { MATH = 1, SCORED, HITS_LISTED, ALL_BLANKED, ALL_DRAWN };
enum : u32 { MATH_AND_ONE = 32 * (MATH_WARPS + 1) };  // threads: the math warps and the loading or the watching one

INLINE void math_sync() { named_barrier_sync(MATH, 32 * MATH_WARPS); }

// Whether a warp has a b-th block of HIDDEN.
INLINE bool has_block1(int warp, int b) {
    return PART1 * MATH_WARPS == HIDDEN_BLOCKS || warp * PART1 + b < HIDDEN_BLOCKS;
}

// Share s of `all` neighbouring things among the grid's CTAs.
INLINE int share_begin(int s, int all) { return int(u32(s) * u32(all) / gridDim.x); }
