// Small kernels, right and with a planted defect, that show what the emulation sees. Prints "right" or "wrong"; a barrier
// that not all threads reach and a wide access off its boundary end the program.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/fast_math.cuh"
#include "cuda/launch.cuh"

using namespace fastpost;
using namespace fastpost::cuda;

namespace {

__global__ void rotate(const int* in, int* out, bool barrier) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 33) % kThreads];
}

__global__ void diverge(int* out) {
  if (threadIdx.x != 7) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void half_a_warp(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void fetch(const float* in, float* out, bool waits) {
  __shared__ float4 shared[32];
  copy_ahead(&shared[threadIdx.x], in + 4 * threadIdx.x);
  end_group();
  if (waits) wait_for_groups<0>();
  out[threadIdx.x] = shared[threadIdx.x].x;
}

__global__ void copy(const float* in, float* out, bool wide) { store_pack(out, load_pack(in, wide), wide); }

}  // namespace

int main(int, char** arguments) {
  const std::string defect = arguments[1];
  const Call call("defect", 0, nullptr);
  std::vector<int> in(kThreads), out(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = i + 1;
  try {
    if (defect == "none" || defect == "race") {
      call.launch(rotate, 1, kThreads, in.data(), out.data(), defect == "none");
      for (int i = 0; i < kThreads; ++i)
        if (out[i] != in[(i + 33) % kThreads]) return std::puts("wrong"), 0;
    } else if (defect == "barrier") {
      call.launch(diverge, 1, kThreads, out.data());
    } else if (defect == "warp") {
      call.launch(half_a_warp, 1, kThreads, out.data());
    } else if (defect == "waits" || defect == "does not wait") {
      alignas(16) float a[128], b[32];
      for (int i = 0; i < 128; ++i) a[i] = static_cast<float>(i);
      call.launch(fetch, 1, 32, static_cast<const float*>(a), static_cast<float*>(b), defect == "waits");
      for (int i = 0; i < 32; ++i)
        if (b[i] != a[4 * i]) return std::puts("wrong"), 0;
    } else if (defect == "misaligned" || defect == "aligned") {
      alignas(16) float a[8] = {0, 1, 2, 3, 4, 5, 6, 7}, b[8] = {};
      const int offset = defect == "misaligned";
      call.launch(copy, 1, 32, static_cast<const float*>(a + offset), static_cast<float*>(b), true);
      if (b[3] != a[3 + offset]) return std::puts("wrong"), 0;
    } else {
      call.launch(copy, 1, 33, static_cast<const float*>(nullptr), static_cast<float*>(nullptr), true);
    }
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  std::puts("right");
}
