// Combine's own launch, see combine.cuh.
#include "combine.cuh"

using Params = CombineParams;

constexpr int THREADS = 224;

extern "C" __global__ void __launch_bounds__(THREADS, CTAS_PER_SM) combine_kernel(const __grid_constant__ Params p) {
    __shared__ Item items[2];
    let_next_kernel_start();  // it waits for this one's end itself
    combine<THREADS, true>(p, p.bounds, items);
}
