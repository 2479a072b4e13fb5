// Just enough of CUDA to run csrc/cuda on the CPU, so that its indexing, barriers and sums are tested where there is no GPU.
// Each thread of a block is a fiber; blocks run one after another. Threads take turns in an order that is shuffled between
// barriers, so that a missing barrier shows as a result that changes; a barrier that some threads never reach is an error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __forceinline__ inline
#define __noinline__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {
struct Index {
  unsigned x = 0;
};
void sync_block();
// Hands in this lane's value and returns the one of lane `from` of the same warp.
uint64_t exchange(uint64_t value, unsigned from);
bool vote(bool value);
bool vote_block(bool value);
void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);
// cp.async: 16 bytes are copied when their group is waited for, and not before; until then there is NaN.
void copy_ahead(void* shared, const void* global);
void end_group();
void wait_for_groups(unsigned later);
// 2^x as the hardware may give it: off by up to 2^-22 of its value, the same for the same x; no subnormal results.
float exp2_fast(float x);
}  // namespace emulation

extern emulation::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulation::sync_block(); }
inline int __syncthreads_or(int predicate) { return emulation::vote_block(predicate != 0); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  memcpy(&word, &value, sizeof value);
  word = emulation::exchange(word, static_cast<unsigned>(lane) % 32);
  memcpy(&value, &word, sizeof value);
  return value;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, lane + step < 32 ? lane + step : lane);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned step) {
  return __shfl_sync(mask, value, (threadIdx.x % 32) ^ step);
}

inline void __syncwarp() { emulation::vote(false); }

inline int __any_sync(unsigned, int predicate) { return emulation::vote(predicate != 0); }

template <class T>
T __ldcs(const T* at) {
  return *at;
}

template <class T>
T __ldca(const T* at) {
  return *at;
}

template <class T>
T __ldcg(const T* at) {
  return *at;
}

// One fiber runs at a time, and blocks one after another.
inline float __fadd_rn(float a, float b) { return a + b; }
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned before = *at;
  *at = before >= most ? 0 : before + 1;
  return before;
}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long by) {
  const unsigned long long before = *at;
  *at = before + by;
  return before;
}

template <class T>
void __stcs(T* at, T value) {
  *at = value;
}

template <class T>
void __stwb(T* at, T value) {
  *at = value;
}

// -- the runtime: one device, and failures on request ---------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209
};
struct cudaFuncAttributes {};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
// Few, so that small inputs make a grid that stays walk several chunks.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }

// How many kernels this process has launched, for tests that count.
inline int64_t launch_count = 0;
extern "C" __attribute__((visibility("default"), used)) inline int64_t emulated_launches() { return launch_count; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "kernel parameters");
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  ++launch_count;
  emulation::run(config->gridDim.x, config->blockDim.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}
