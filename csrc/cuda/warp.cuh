// What the 32 threads of a warp work out together.
#pragma once

#include <cuda_runtime.h>

namespace fastpost::cuda {

constexpr int kWarp = 32;

// A value that is the same on all lanes, now known to be: branches on it need no bookkeeping, and it may live in a uniform
// register. All lanes call it together.
template <class T>
__device__ __forceinline__ T uniform(T value) {
  return static_cast<T>(__shfl_sync(0xffffffffu, static_cast<int>(value), 0));
}

__device__ __forceinline__ float warp_max(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// The same bits on every lane: each step adds the same two numbers on both sides.
template <class Real>
__device__ __forceinline__ Real warp_sum(Real x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The value of the first lane for which `chosen` holds; some lane does.
__device__ __forceinline__ float value_of_first(bool chosen, float value) {
  int lane = chosen ? static_cast<int>(threadIdx.x % kWarp) : kWarp - 1;
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const int other = __shfl_xor_sync(0xffffffffu, lane, step);
    lane = other < lane ? other : lane;
  }
  return __shfl_sync(0xffffffffu, value, lane);
}

}  // namespace fastpost::cuda
