// One loading warpgroup: the tokens' rows, gathered by cp.async. It also overwrites idle tokens.
#pragma once
#include "load_items.cuh"

struct TokenLoader : Items {
    static constexpr int ZEROER = 32;  // the thread that overwrites idle tokens

    // The CTA's next idle token; the one after it is asked for.
    INLINE void zero_idle_token() const {
        int idle = note(IDLE);
        if (idle >= note(IDLE_END)) return;
        u8* to = reinterpret_cast<u8*>(p.output) + i64(note(IDLE_TOKEN)) * p.hidden * 2;
        idle += gridDim.x;
        set_note(IDLE, idle);
        if (idle < note(IDLE_END)) set_note(IDLE_TOKEN, __ldcg(p.idle_tokens + idle));
        for (int at = 0; at < p.hidden * 2; at += ZERO_BYTES) {
            bulk_store(to + at, base + ZEROS_AT, min(ZERO_BYTES, p.hidden * 2 - at));
        }
        bulk_commit();
    }

    template <int PHASE>
    INLINE void load_item(int all) {
        constexpr int AT_ONCE = 2;                              // steps of K
        const int chunk = thread & 7, first_row = thread >> 3;  // this thread copies 16 bytes of rows first_row + 16j
        const u32 copy_to = base + TOKENS_AT + first_row * 128 + ((chunk ^ (first_row & 7)) << 4);
        const int depth = p.depth(PHASE), steps = depth / 128;
        const u8* tokens = PHASE == 1 ? p.hidden_states : p.requantized;
        const Plan now = plan<PHASE>(item);
        const u32 sources = base + SOURCES_AT + (count & 1) * TILE_TOKENS * 4;
        store_shared_int(sources + thread * 4, token);
        if (PHASE == 2 && p.phases == 3 && now.live > 0) wait_for_gemm1(now);
        named_barrier_sync(SOURCES_KNOWN, LOAD_THREADS);
        const u8* from[TILE_TOKENS / 16];  // pointers: with offsets the copies become eight chains, one after the other
#pragma unroll
        for (int j = 0; j < TILE_TOKENS / 16; ++j) {
            from[j] = tokens + (i64(load_shared_int(sources + (16 * j + first_row) * 4)) * depth + chunk * 16);
        }
        const int left = now.live - first_row;
        int next = 0, next_token = 0;
        for (int start = 0; start < steps; start += AT_ONCE) {
            if (PHASE == 1 && thread == ZEROER) zero_idle_token();
#pragma unroll
            for (int u = 0; u < AT_ONCE; ++u) {
                const int step = start + u;
                if (step >= steps) break;
                await_empty();
#pragma unroll
                for (int j = 0; j < TILE_TOKENS / 16; ++j) {
                    if (left > 16 * j) copy16_async(copy_to + stage * TOKEN_BYTES + j * 2048, from[j] + u * 128);
                }
                copies_arrive(full());
                if (step == min(2, steps - 1)) {  // early enough that the next item's first loads find it there
                    next = read_letter();
                    if (next < all) next_token = source(next);
                }
                advance();
            }
#pragma unroll
            for (int j = 0; j < TILE_TOKENS / 16; ++j) from[j] += AT_ONCE * 128;
        }
        item = next;
        token = next_token;
        ++count;
    }

    INLINE void run() {
        if (thread == ZEROER) {
            const int end = p.idle_end();
            set_note(IDLE, blockIdx.x);
            set_note(IDLE_END, end);
            if (blockIdx.x < end) set_note(IDLE_TOKEN, __ldcg(p.idle_tokens + blockIdx.x));
        }
        const int first = items(1), all = first + items(2);
        first_item();
        while (item < first) load_item<1>(all);
        while (item < all) load_item<2>(all);
        await_empty();  // one more stage, which says that there is nothing left
        copies_arrive(full());
        if (thread == ZEROER) {
            while (note(IDLE) < note(IDLE_END)) zero_idle_token();
            bulk_wait_read();
        }
    }
};
