// Grouped FP8 block-scale GEMMs of one window of rows, see gemms.cuh.
#include "gemms.cuh"

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    grouped_gemm_kernel(const __grid_constant__ TensorMap map1, const __grid_constant__ TensorMap map2,
                        const __grid_constant__ Params p, const __grid_constant__ Window window) {
    extern __shared__ __align__(1024) u8 shared[];
    prepare_gemms(&map1, &map2, shared);
    wait_for_previous_kernel();
    let_next_kernel_start();  // now, so that it may read what came before this one
    run_gemms<false>(&map1, &map2, p, window, shared);
}
