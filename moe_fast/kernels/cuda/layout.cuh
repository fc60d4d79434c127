// What the warpgroups of the grouped GEMM share: sizes, places in shared memory, parameters, the stages' ring.
#pragma once
#include "hopper.cuh"

#ifndef CLUSTER
#define CLUSTER 2  // CTAs that share loads of weights: 1 or 2
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
constexpr int TABLE_AT = MAIL_AT + MAIL_SLOTS * 4;  // expert_offsets, then items before each expert
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

// Tiles of 256 weight rows: 128 columns of swiglu_out, or 256 of gemm2_out.
INLINE int column_tiles(int phase, int columns) { return phase == 1 ? columns / 128 : (columns + 255) / 256; }
