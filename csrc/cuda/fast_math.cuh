// Single instructions that CUDA has no portable spelling for. Host compilers get theirs from the emulation.
#pragma once

#include <cuda_runtime.h>

#include "core/dtype.h"

namespace fastpost::cuda {

#if defined(__CUDACC__)

// 2^x to within 2^-22 of its value; 0 where that would leave float's normal range, and for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes from global memory into shared memory, in this thread's order of requests; they are there once no more than so
// many of its later groups are on their way. Other threads' copies need a barrier besides.
__device__ __forceinline__ void copy_ahead(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int later>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(later) : "memory");
}

// Will be read soon.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L1 [%0];" ::"l"(global)); }

// The larger one; NaN where one of them is.
__device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// Exactly. A signalling NaN becomes a quiet one.
__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(bf16 x) { return to_float(x); }
__device__ __forceinline__ float widened(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Both rounded to the nearest, ties to even. A NaN loses its sign and its payload.
__device__ __forceinline__ void round_pair(float first, float second, bf16* to) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  memcpy(to, &both, sizeof both);
}
__device__ __forceinline__ void round_pair(float first, float second, f16* to) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  memcpy(to, &both, sizeof both);
}

#else

inline float exp2_fast(float x) { return emulation::exp2_fast(x); }
inline void copy_ahead(void* shared, const void* global) { emulation::copy_ahead(shared, global); }
inline void end_group() { emulation::end_group(); }
inline void prefetch(const void*) {}
template <int later>
void wait_for_groups() {
  emulation::wait_for_groups(later);
}
inline float max_or_nan(float x, float y) { return x != x || y != y ? NAN : fmaxf(x, y); }
template <class T>
float widened(T x) {
  return to_float(x);
}
inline void round_pair(float first, float second, bf16* to) {
  to[0] = first == first ? from_float<bf16>(first) : bf16{0x7fff};
  to[1] = second == second ? from_float<bf16>(second) : bf16{0x7fff};
}
inline void round_pair(float first, float second, f16* to) {
  to[0] = first == first ? from_float<f16>(first) : f16{0x7fff};
  to[1] = second == second ? from_float<f16>(second) : f16{0x7fff};
}

#endif

__device__ __forceinline__ void round_pair(float first, float second, float* to) {
  to[0] = first;
  to[1] = second;
}

}  // namespace fastpost::cuda
