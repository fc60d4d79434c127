// The whole layer for at most 8 tokens in one launch, one CTA an SM, made for reading the hit experts' weights and
// nothing else.
//
// Every CTA routes all tokens itself. Then a thread streams weights into a ring of slots in shared memory, without
// regard to what has been computed, and eight warps multiply: gemm1 in tiles of 4 columns of swiglu_out (8 rows of
// weights), dealt to the CTAs in turn, so that all of them are at the same expert; then, as gemm1's values come, gemm2,
// where a CTA has some columns of the output for every expert, so that it sums the experts itself. The first expert's
// values are long there by then, and the last one's come while the others are multiplied.
//
// Tokens are the 8 columns of mma.m16n8k16, for every expert all of them; a token counts where it chose the expert.
// Shares of work are drawn, not assigned: only a CTA that runs holds any, so the wait for gemm1's values ends whatever
// else occupies the card.
#include "few_gemm1.cuh"
#include "few_gemm2.cuh"
#include "few_load.cuh"
#include "few_route.cuh"

// By one thread.
INLINE void init_barriers(Shared& s, const Ring& ring) {
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) {
        barrier_init(ring.full + 8 * i, 1);
        barrier_init(ring.empty + 8 * i, MATH_WARPS * ARRIVING_LANES);
    }
    barrier_init(shared_address(&s.drawn), 1);
    barrier_init(shared_address(&s.taken), MATH_WARPS);
    barrier_init(ring.tokens_full, 1);
    barrier_init(ring.tokens_empty, MATH_WARPS * ARRIVING_LANES);
    barrier_init_fence();
}

// The share that was drawn after the draws'th one.
INLINE int see_drawn(Shared& s, int& draws, int lane) {
    int next = 0;
    if (lane == 0) {
        barrier_wait(shared_address(&s.drawn), draws & 1);
        next = s.next;
        barrier_arrive(shared_address(&s.taken));
    }
    ++draws;
    return __shfl_sync(ALL, next, 0);
}

INLINE void multiply_everything(const Params& p, Shared& s, const Ring& ring, int warp, int lane) {
    const Activations x(p, ring, warp, lane);
    math_sync();
    const int shares = gridDim.x;
    int n = 0, draws = 0;
    for (int share = s.first[0]; share < shares; share = see_drawn(s, draws, lane)) {
        multiply_share1(p, s, ring, x, share, n, warp, lane);
    }
    named_barrier_sync(ALL_BLANKED, MATH_AND_ONE);  // no value of an earlier call is left
    for (int share = s.first[1]; share < shares; share = see_drawn(s, draws, lane)) {
        multiply_share2(p, s, ring, share, n, warp, lane);
    }
}

// One warp waits on the others' behalf, and leaves the counters as they were found.
INLINE void watch(const Params& p, int lane) {
    const int shares = gridDim.x;
    if (lane == 0) {
        while (load_acquire(p.counters + BLANKED) < shares) {
        }
    }
    __syncwarp();
    named_barrier_arrive(ALL_BLANKED, MATH_AND_ONE);
    named_barrier_sync(ALL_DRAWN, 64);  // this CTA draws no more
    if (lane == 0 && atomicAdd(p.counters + LEFT, 1) == shares - 1) {
        for (int i = 0; i < 4; ++i) p.counters[i] = 0;  // nobody else reads them any more
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) few_tokens_kernel(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 slots[];
    __shared__ Shared s;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const Ring ring(slots, s);
    int local = -1;
    float score = 0.0f;
    // The math warps begin with the scores: everything else waits for those.
    if (warp == MATH_WARPS) {
        if (lane == 0) init_barriers(s, ring);
        if (lane < 2) s.first[lane] = atomicAdd(p.counters + (lane ? DRAWN_GEMM2 : DRAWN_GEMM1), 1);
        named_barrier_sync(SCORED, MATH_AND_ONE);
        if (lane == 0) load_tokens(p, ring);  // behind the logits, before the weights: what is asked for queues
    } else if (warp > MATH_WARPS) {
        const int first = threadIdx.x - (THREADS - SCALE_THREADS);
        for (int i = first; i < MAX_HITS; i += SCALE_THREADS) s.chosen_by[i] = 0;
        load_x_scale(p, s, first);
    } else {
        Scores& scores = *reinterpret_cast<Scores*>(slots);
        score_all(p, scores);
        named_barrier_sync(SCORED, MATH_AND_ONE);
        if (warp < p.tokens) choose_experts(p, scores, warp, lane, local, score);
        note_choices(s, local, warp, lane);
        async_proxy_fence();  // the ring's copies come after the scores
    }
    __syncthreads();
    if (warp >= MATH_WARPS) {
        registers_down<40>();
        if (warp == MATH_WARPS) {
            list_hits(s, lane);
            named_barrier_arrive(HITS_LISTED, MATH_AND_ONE);
            if (lane == 0) load_everything(p, s, ring);
            __syncwarp();
            named_barrier_arrive(ALL_DRAWN, 64);
        } else if (warp == MATH_WARPS + 1) {
            watch(p, lane);
        }
        return;
    }
    registers_up<224>();
    named_barrier_sync(HITS_LISTED, MATH_AND_ONE);
    const float weight = weight_of(score, p.factor);
    if (local >= 0) {
        const int hit = hit_of(s, local);
        s.weight[hit][warp] = weight;
        atomicOr(&s.chosen_by[hit], 1u << warp);
    }
    multiply_everything(p, s, ring, warp, lane);
}
