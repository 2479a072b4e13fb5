// Sums over whole lists in two stages, each in an order that follows from the elements' places alone.
#pragma once

#include "cuda/launch.cuh"

namespace fastpost::cuda {

// Sums of a block's threads, by warps and then across them, in an order fixed by the thread index alone. The result is on
// thread 0. Once per kernel: a second call would have to wait at a barrier first.
template <int count>
__device__ void block_sum(double (&value)[count]) {
  __shared__ double shared[count][kThreads / 32];
#pragma unroll
  for (int k = 0; k < count; ++k) {
    for (int step = 16; step > 0; step /= 2) value[k] += __shfl_down_sync(0xffffffffu, value[k], step);
    if (threadIdx.x % 32 == 0) shared[k][threadIdx.x / 32] = value[k];
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int k = 0; k < count; ++k) {
      value[k] = 0;
      for (int warp = 0; warp < kThreads / 32; ++warp) value[k] += shared[k][warp];
    }
}

namespace {

// Folds count sums per chunk into count sums, in an order that depends on the number of chunks alone.
template <int count>
__global__ void __launch_bounds__(kThreads) fold_kernel(const double* __restrict__ partial, int64_t chunks, double* out) {
  double sum[count] = {};
#pragma unroll 1
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads)
    for (int k = 0; k < count; ++k) sum[k] += partial[c * count + k];
  block_sum(sum);
  if (threadIdx.x == 0)
    for (int k = 0; k < count; ++k) out[k] = sum[k];
}

template <int count>
void fold(const Call& call, const Plan& plan, const double* partial, double* out) {
  call.launch(fold_kernel<count>, 1, kThreads, partial, static_cast<int64_t>(plan.chunks().size()), out);
}

}  // namespace

}  // namespace fastpost::cuda
