// Place: give every local token-expert pair its row, sorted by expert, then by token; and list the tokens without a
// row, and those with several. SLICES CTAs an expert, and as many a list: each counts all tokens, and places a part.
//
// The rows of many tokens need not fit the workspace, so tokens are cut into windows: runs of whole groups of 32
// tokens, at most `capacity` rows each, cut where the count of earlier rows passes a multiple of capacity less one
// group's most. Later kernels do one window after the other in the same buffers; a usual call has one window with rows.
#include "hopper.cuh"

struct Params {
    const u32* local_mask;       // [WORDS, T], see route.cu
    int* token_rows;             // [T, TOP_K] a token's rows within its window, ascending; what is left is -1 already
    const float* token_weights;  // [T, TOP_K] beside token_rows
    int* permuted_idx_to_token_idx;  // [windows, capacity]
    int2* row_targets;     // [windows, capacity] the token whose only row this is and its weight's bits, or -1 and 0
    int* expert_offsets;   // [windows, LOCAL + 1]
    int* combine_tokens;   // [T] tokens with two rows or more
    int* combine_offsets;  // [windows + 1] how many of them lie before each window
    int* idle_tokens;      // [T] tokens without a row
    int* idle_count;       // [1]
    int* tiles_done;       // [tiles], zeroed here for the GEMMs
    int tokens;
    int windows;
    int capacity;
    int tiles;
};

constexpr int WORDS = (LOCAL + 31) / 32;
constexpr int WARPS = 32;
constexpr int ROWS_A_GROUP = 32 * (TOP_K < LOCAL ? TOP_K : LOCAL);
constexpr int MAX_WINDOWS = 32;
constexpr int FIRST_AT_ONCE = WORDS < 16 ? 16 / WORDS : 1;
enum { IDLE = LOCAL, COMBINED = LOCAL + 1, LISTS };  // after the experts

// Rows of this CTA's expert (or tokens of its list), of all lower local experts, of all local experts.
struct Count {
    int own = 0, below = 0, all = 0;
    INLINE void add(const Count& other) { own += other.own, below += other.below, all += other.all; }
};

struct Words {
    u32 word[WORDS];
};

INLINE Words load_words(const Params& p, int token) {
    Words words;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        words.word[w] = token < p.tokens ? p.local_mask[i64(w) * p.tokens + token] : 0;
    }
    return words;
}

INLINE Count count_words(const Words& words, bool real, int expert) {
    Count count;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
        const int bit = expert - w * 32;
        count.all += __popc(words.word[w]);
        count.below += __popc(bit >= 32 ? words.word[w] : bit > 0 ? words.word[w] & ((1u << bit) - 1) : 0u);
        if (bit >= 0 && bit < 32) count.own = words.word[w] >> bit & 1;
    }
    if (expert == IDLE) count.own = real && count.all == 0;
    if (expert == COMBINED) count.own = count.all >= 2;
    return count;
}

INLINE Count sum_lanes(const Count& count) {
    return {int(__reduce_add_sync(ALL, u32(count.own))), int(__reduce_add_sync(ALL, u32(count.below))),
            int(__reduce_add_sync(ALL, u32(count.all)))};
}

// Calls visit(group, each lane's count) for a run of groups; AT_ONCE groups' words are asked for at once. The first
// time they come from the L2, then from the L1. Only what must wait is unrolled: the program comes cold from memory,
// too.
template <int AT_ONCE, class Visit>
INLINE void for_groups(const Params& p, int begin, int end, int expert, Visit visit) {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int start = begin; start < end; start += AT_ONCE) {
        Words words[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) words[u] = load_words(p, (start + u) * 32 + lane);
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
            if (start + u < end) {
                visit(start + u, count_words(words[u], (start + u) * 32 + lane < p.tokens, expert));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) place_kernel(const __grid_constant__ Params p) {
    __shared__ Count warp_sums[WARPS];
    __shared__ Count bounds[MAX_WINDOWS + 1];  // everything before each window
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int expert = blockIdx.x % LISTS, slice = blockIdx.x / LISTS;
    const int slack = p.capacity - ROWS_A_GROUP;
    const int groups = (p.tokens + 31) / 32, share = (groups + WARPS - 1) / WARPS;
    const int begin = min(warp * share, groups), end = min(begin + share, groups);
    // Of the warp's groups, those that this CTA places.
    const int part = (share + SLICES - 1) / SLICES;
    const int part_begin = min(begin + slice * part, end), part_end = min(part_begin + part, end);
    let_next_kernel_start();
    wait_for_previous_kernel();
    for (int at = blockIdx.x * WARPS * 32 + threadIdx.x; at < p.tiles; at += gridDim.x * WARPS * 32)
        p.tiles_done[at] = 0;

    Count mine, skipped;
    for_groups<FIRST_AT_ONCE>(p, begin, end, expert, [&](int group, const Count& count) {
        mine.add(count);
        if (group < part_begin) skipped.add(count);
    });
    mine = sum_lanes(mine);
    if (lane == 0) warp_sums[warp] = mine;
    __syncthreads();
    static_assert(WARPS <= 32, "a lane for each warp's sums");
    const Count of_lane = lane < WARPS ? warp_sums[lane] : Count{};
    // Rows of earlier warps' tokens, of all tokens.
    const Count before = sum_lanes(lane < warp ? of_lane : Count{}), total = sum_lanes(of_lane);
    if (threadIdx.x <= p.windows) bounds[threadIdx.x] = threadIdx.x == 0 ? Count{} : total;
    __syncthreads();

    const auto window_of = [&](int rows_before) { return p.windows == 1 ? 0 : rows_before / slack; };
    // Where a window may begin among this warp's groups. The group before the first has at most ROWS_A_GROUP rows.
    if (begin < end && window_of(max(before.all - ROWS_A_GROUP, 0)) != window_of(before.all + mine.all)) {
        Count running = before;
        int last = 0;
        if (begin > 0) {
            const Count previous = count_words(load_words(p, begin * 32 - 32 + lane), true, expert);
            last = window_of(before.all - sum_lanes(previous).all);
        }
        for_groups<1>(p, begin, end, expert, [&](int, const Count& count) {
            const int window = window_of(running.all);
            if (window != last && lane == 0) bounds[window] = running;
            last = window;
            running.add(sum_lanes(count));
        });
    }
    __syncthreads();

    int own_before = before.own + int(__reduce_add_sync(ALL, u32(skipped.own)));
    int all_before = before.all + int(__reduce_add_sync(ALL, u32(skipped.all)));
    int window = window_of(all_before);
    for_groups<1>(p, part_begin, part_end, expert, [&](int group, const Count& count) {
        const int token = group * 32 + lane;
        if (p.windows > 1) {
            if (all_before >= (window + 1) * slack) ++window;  // no group has more rows than slack
            all_before += int(__reduce_add_sync(ALL, u32(count.all)));
        }
        const u32 owners = __ballot_sync(ALL, count.own);
        const int rank = own_before + __popc(owners & ((1u << lane) - 1));
        own_before += __popc(owners);
        if (count.own && expert == IDLE) p.idle_tokens[rank] = token;
        if (count.own && expert == COMBINED) p.combine_tokens[rank] = token;
        if (count.own && expert < LOCAL) {
            const int row = bounds[window + 1].below - bounds[window].below + rank - bounds[window].own;
            p.permuted_idx_to_token_idx[i64(window) * p.capacity + row] = token;
            const i64 at = i64(token) * TOP_K + count.below;
            p.token_rows[at] = row;
            int2 target = make_int2(-1, 0);
            if (count.all == 1) target = make_int2(token, __float_as_int(__ldcg(p.token_weights + at)));
            p.row_targets[i64(window) * p.capacity + row] = target;
        }
    });
    if (slice > 0) return;
    if (threadIdx.x < p.windows && expert < LOCAL) {
        const Count &from = bounds[threadIdx.x], &to = bounds[threadIdx.x + 1];
        int* offsets = p.expert_offsets + threadIdx.x * (LOCAL + 1);
        offsets[expert] = to.below - from.below;
        if (expert == LOCAL - 1) offsets[LOCAL] = to.all - from.all;
    }
    if (threadIdx.x <= p.windows && expert == COMBINED) p.combine_offsets[threadIdx.x] = bounds[threadIdx.x].own;
    if (threadIdx.x == 0 && expert == IDLE) *p.idle_count = total.own;
}
