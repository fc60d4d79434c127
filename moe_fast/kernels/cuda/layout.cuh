// What the warpgroups of the grouped GEMM share: sizes, places in shared memory, parameters, the stages' ring.
#pragma once
#include "hopper.cuh"

#ifndef CLUSTER
#define CLUSTER 2  // CTAs that share loads of weights: 1 or 2
#endif
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED 219136
#endif

constexpr int STAGES = 4;
constexpr int TILE_TOKENS = 128;
constexpr int MATH_THREADS = 256;
constexpr int LOAD_THREADS = 128;  // of each of the two loading warpgroups
constexpr int THREADS = MATH_THREADS + 2 * LOAD_THREADS;
#ifdef IN_A_LOOP  // the compiler keeps more from one window to the next, which must not be between products
constexpr int MATH_REGISTERS = 216, TOKEN_REGISTERS = 40, WEIGHT_REGISTERS = 40;
#else
constexpr int MATH_REGISTERS = 200, TOKEN_REGISTERS = 64, WEIGHT_REGISTERS = 48;
#endif
constexpr int LAUNCH_REGISTERS = 65536 / THREADS / 8 * 8;  // of each thread, before they are shared out anew
constexpr int MAX_EXPERTS = 512;
// Items that may be under way: more than STAGES, for an item may be one stage. The loading warpgroups go their own
// ways, but neither gets more than STAGES stages ahead of the other.
constexpr int MAIL_SLOTS = 8;
constexpr int WEIGHT_BYTES = 256 * 128;
constexpr int TOKEN_BYTES = TILE_TOKENS * 128;
// A stage's scales: the tokens', after up to 3 of rows before the tile, then those of the two waves of weights.
constexpr int TOKEN_SCALES = TILE_TOKENS + 4;
constexpr int SCALE_BYTES = (TOKEN_SCALES + 4) * 4;
constexpr int BOX_BYTES = 128 * 128;

// Named barriers; 0 is __syncthreads. One for each multiplying group, one of the tokens' loaders, one for each stage:
// that one is used again when its stage is full again, so when both groups have passed it.
enum : u32 { GROUP_STORED = 1, SOURCES_KNOWN = 3, FIRST_ISSUED = 4 };
static_assert(FIRST_ISSUED + STAGES <= 16, "a CTA has 16 barriers");

// Offsets in dynamic shared memory, which starts at a multiple of 1024.
constexpr int WEIGHTS_AT = 0;
constexpr int TOKENS_AT = WEIGHTS_AT + STAGES * WEIGHT_BYTES;
constexpr int SCALES_AT = TOKENS_AT + STAGES * TOKEN_BYTES;
constexpr int WORK_AT = SCALES_AT + STAGES * SCALE_BYTES;     // [MAIL_SLOTS] int4
constexpr int SOURCES_AT = WORK_AT + MAIL_SLOTS * 16;         // [2][128 tokens] int
constexpr int TARGETS_AT = SOURCES_AT + 2 * TILE_TOKENS * 4;  // [MAIL_SLOTS][128 tokens] int2, see Window::row_targets
constexpr int TARGET_BYTES = TILE_TOKENS * 8;
constexpr int BARRIERS_AT = TARGETS_AT + MAIL_SLOTS * TARGET_BYTES;
constexpr int MAIL_AT = BARRIERS_AT + (2 * STAGES + MAIL_SLOTS) * 8;
constexpr int NOTES_AT = MAIL_AT + MAIL_SLOTS * 4;
constexpr int TABLE_AT = NOTES_AT + 16;  // three tables, see Tables
constexpr int TABLE_INTS = MAX_EXPERTS + 1;
constexpr int ZERO_BYTES = 2048;
constexpr int ZEROS_AT = (TABLE_AT + 3 * TABLE_INTS * 4 + 127) / 128 * 128;  // what idle tokens are overwritten with
constexpr int SHARED_BYTES = ZEROS_AT + ZERO_BYTES;

struct Params {
    const u8* hidden_states;           // [T, H] e4m3
    const float* hidden_states_scale;  // of token t and block k at t * token_stride + k * stride
    const float* gemm1_weights_scale;  // [L, 2I/128, H/128]
    const float* gemm2_weights_scale;  // [L, H/128, I/128]
    u8* requantized;                   // [P, I] e4m3
    float* requantized_scale;          // [I/128, stride]
    u16* gemm2_out;                    // [P, H] bf16
    int* counters;           // [4], zero between launches: items drawn, clusters at an end; a grid's arrivals, leavers
    const int* idle_tokens;  // [T] tokens whose row of output becomes zero, so that combine need not do it
    const int* idle_count;   // [1]; null: none
    u16* output;             // [T, H] bf16; null: every row goes to gemm2_out
    i64 hidden_states_scale_stride;
    i64 hidden_states_scale_token_stride;
    i64 requantized_scale_stride;
    int hidden;        // H
    int intermediate;  // I
    int experts;       // L
    int phases;        // 1 gemm1, 2 gemm2, 3 both

    INLINE int depth(int phase) const { return phase == 1 ? hidden : intermediate; }    // K of the product
    INLINE int columns(int phase) const { return phase == 1 ? intermediate : hidden; }  // of what is stored
    INLINE int idle_end() const { return idle_count ? __ldcg(idle_count) : 0; }
};

// Where one window of rows lies.
struct Window {
    const int* row_index;       // permuted_idx_to_token_idx [P]
    const int* expert_offsets;  // [L+1]
    int* tiles_done;            // [tile_of(P, L)] zero before a launch that has both phases
    const int2* row_targets;    // [P] the token whose only row this is and its weight's bits, or -1 and 0
};

// Where the scale of a tile's first row lies in a stage: copies of 4 scales begin at multiples of 4 rows.
INLINE int first_scale(int row) { return row & 3; }

// In shared memory: expert_offsets [L+1], and the items before each expert [L+1] of gemm1 and of gemm2.
struct Tables {
    int* offsets;
    INLINE int* before(int phase) const { return offsets + phase * TABLE_INTS; }
    INLINE int items(int phase, int experts) const { return before(phase)[experts]; }
};

// A number for each tile of rows, whichever expert's: rows grow by 128 within an expert, experts by one.
INLINE int tile_of(int row, int expert) { return row / TILE_TOKENS + expert; }

// What the math warpgroups must know of an item.
struct Work {
    int phase;  // 0: no more items
    int expert;
    int row;     // first permuted row
    int live;    // rows, 0 .. 128
    int column;  // which tile of columns
};

// Tiles of 256 weight rows: 128 columns of swiglu_out, or 256 of gemm2_out.
INLINE int column_tiles(int phase, int columns) { return phase == 1 ? columns / 128 : (columns + 255) / 256; }
