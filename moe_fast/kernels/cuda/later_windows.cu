// The windows after the first, in one launch: for each the grouped GEMMs, then combine, in the same buffers. In a usual
// call they have no rows, and the launch ends at once.
//
// CTAs wait for one another, so that all of them must run at once: it is launched cooperatively.
#define IN_A_LOOP
#include "gemms.cuh"
#include "combine.cuh"

struct Windows {
    Window first;
    int count;
    int capacity;  // rows from one window to the next, of row_index and row_targets
    int tiles;     // the same of tiles_done
    int unused;
};

// Until every CTA of the grid has come here; what they wrote before can then be read. A multiple of the grid has
// arrived before and after.
INLINE void await_grid(int* arrivals) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const int grid = gridDim.x, end = (fetch_add_release(arrivals, 1) / grid + 1) * grid;
        while (load_acquire(arrivals) < end) {
        }
    }
    __syncthreads();
}

// Not inlined, so that what they keep in registers is not kept from the products.
__device__ __noinline__ void combine_window(const CombineParams& c, const int* bounds) {
    __shared__ Item items[2];
    combine<THREADS, false>(c, bounds, items);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    later_windows_kernel(const __grid_constant__ TensorMap map1, const __grid_constant__ TensorMap map2,
                         const __grid_constant__ Params p, const __grid_constant__ CombineParams c,
                         const __grid_constant__ Windows windows) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ Window window;
    __shared__ int number;  // of the window; here, for the products leave no register free
    if (threadIdx.x == 0) number = 0;
    wait_for_previous_kernel();
    const int* rows = windows.first.expert_offsets + threadIdx.x * (p.experts + 1) + p.experts;
    if (!__syncthreads_or(threadIdx.x < windows.count && __ldcg(rows) != 0)) return;  // so too in every other CTA
    for (;;) {
        __syncthreads();
        const int w = number;
        if (w == windows.count) break;
        __syncthreads();
        if (threadIdx.x == 0) {
            const i64 skipped = i64(w) * windows.capacity;
            window = {windows.first.row_index + skipped, windows.first.expert_offsets + w * (p.experts + 1),
                      windows.first.tiles_done + w * windows.tiles, windows.first.row_targets + skipped};
            number = w + 1;
        }
        __syncthreads();
        if (__ldcg(window.expert_offsets + p.experts) == 0) continue;
        prepare_gemms(&map1, &map2, shared);
        run_gemms<true>(&map1, &map2, p, window, shared);
        await_grid(p.counters + 2);
        combine_window(c, c.bounds + (number - 1));
        await_grid(p.counters + 2);
    }
    // The last CTA leaves zeros.
    if (threadIdx.x == 0 && atomicAdd(p.counters + 3, 1) == int(gridDim.x) - 1) p.counters[2] = 0, p.counters[3] = 0;
}
