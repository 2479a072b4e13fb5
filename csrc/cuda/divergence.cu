// Rows of logits on CUDA: the equations of core/divergence.h. Wide rows are read twice, by one block each: once for all sums
// (row_sums.cuh), once for the gradients. Narrow rows are a warp's work, in double.
#include "api.h"
#include "core/divergence.h"
#include "cuda/launch.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/warp.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kStep = 8;           // pairs that a thread adds up in float before it folds them into double
constexpr int64_t kNarrow = 1024;  // below this many columns everything is double
constexpr int kNarrowThreads = 256;

struct Rows {
  const LogitRows clean, noised, grad_clean, grad_noised;
  int64_t rows, cols;
  const int64_t* labels;
  int64_t ignore_index;
  const double *kl_weights, *ce_weights;
  double *kl, *ce;
};

template <class T>
__device__ __forceinline__ T* row_of(const LogitRows& block, int64_t row) {
  return block.address == nullptr ? nullptr : static_cast<T*>(block.address) + row * block.stride;
}

// What a row is asked for, as the API says it.
struct Task {
  double kl_weight, ce_weight;  // 0: not wanted
  int64_t label;
  bool bad_label;
};

__device__ __forceinline__ Task task_of(const Rows& r, int64_t row) {
  Task task{0, 0, 0, false};
  if (r.noised.address != nullptr) task.kl_weight = r.kl_weights == nullptr ? 1.0 : r.kl_weights[row];
  if (r.labels != nullptr && r.labels[row] != r.ignore_index) {
    task.label = r.labels[row];
    task.ce_weight = r.ce_weights == nullptr ? 1.0 : r.ce_weights[row];
    task.bad_label = task.ce_weight != 0 && (task.label < 0 || task.label >= r.cols);
    if (task.bad_label) task.ce_weight = 0;
  }
  return task;
}

// Walks a row whose columns are cut into single ones up to the clean stream's 16-byte boundary, packs, and single ones.
struct Cut {
  int64_t head, packs, tail;  // tail: where the last singles begin
};

template <class T>
__device__ __forceinline__ Cut cut_of(const T* clean, int64_t cols) {
  const int64_t head = head_of(cols, clean);
  const int64_t packs = (cols - head) / Pack<T>::size;
  return {head, packs, head + packs * Pack<T>::size};
}

// Column of this thread's single element: of the head for the first threads, of the tail for the next, or -1.
__device__ __forceinline__ int64_t single_column(const Cut& cut, int64_t cols) {
  const int64_t t = threadIdx.x;
  if (t < cut.head) return t;
  const int64_t column = cut.tail + t - cut.head;
  return column < cols ? column : -1;
}

template <class T>
__device__ __forceinline__ void unpack(const Pack<T>& pack, float* to) {
#pragma unroll
  for (int k = 0; k < Pack<T>::size; ++k) to[k] = to_float(pack.value[k]);
}

template <class T>
__device__ Part part_of(const T* a, const T* b, int64_t cols) {
  constexpr int size = Pack<T>::size, packs_per_step = kStep / size;
  const Cut cut = cut_of(a, cols);
  const bool wide_b = aligned(b + cut.head);
  Part part = nothing();
#pragma unroll 1
  for (int64_t base = threadIdx.x - threadIdx.x % kWarp; base < cut.packs; base += kRowThreads * packs_per_step) {
    float x[kStep], y[kStep];
#pragma unroll
    for (int u = 0; u < packs_per_step; ++u) {
      const int64_t v = base + threadIdx.x % kWarp + u * kRowThreads;
      if (v < cut.packs) {
        unpack(load_pack(a + cut.head + v * size, true), x + u * size);
        unpack(load_pack(b + cut.head + v * size, wide_b), y + u * size);
      } else {
#pragma unroll
        for (int k = 0; k < size; ++k) x[u * size + k] = y[u * size + k] = -INFINITY;
      }
    }
    add<T>(part, x, y);
  }
  if (threadIdx.x < kWarp) {  // at most 14 singles
    const int64_t i = single_column(cut, cols);
    const float x[1] = {i < 0 ? -INFINITY : to_float(a[i])}, y[1] = {i < 0 ? -INFINITY : to_float(b[i])};
    add<T>(part, x, y);
  }
  return part;
}

struct Gradient {
  float clean, noised;
};

template <class T>
__device__ __forceinline__ Gradient gradient_of(float a, float b, const Whole& w, float kl_weight, float ce_weight) {
  const float r = difference<T>(a, b, w.centre) - w.log_ratio;
  const float q = exp_nonpositive(b - w.noised_max) * w.noised_scale;
  float p, excess;
  if (w.close) {
    excess = close_excess(r, q);
    p = q + excess;
  } else {
    p = exp_nonpositive(a - w.clean_max) * w.clean_scale;
    excess = far_excess(r, p, q);
  }
  return {clean_gradient(p, r, excess, w.clean_kl, kl_weight, ce_weight),
          noised_gradient(q, r, excess, w.noised_kl, kl_weight)};
}

// From the end to the beginning: what was read last may still be in a cache. Each thread writes only what it has read, so
// the gradients may take the logits' place.
template <class T>
__device__ void write_gradients(const T* a, const T* b, T* grad_a, T* grad_b, int64_t cols, const Whole& whole,
                                float kl_weight, float ce_weight) {
  constexpr int size = Pack<T>::size;
  const Cut cut = cut_of(a, cols);
  const bool wide_b = aligned(b + cut.head), wide_grad_a = aligned(grad_a + cut.head),
             wide_grad_b = aligned(grad_b + cut.head);
  if (threadIdx.x < kWarp) {
    const int64_t i = single_column(cut, cols);
    if (i >= 0) {
      const Gradient gradient = gradient_of<T>(to_float(a[i]), to_float(b[i]), whole, kl_weight, ce_weight);
      if (grad_a != nullptr) grad_a[i] = from_float<T>(gradient.clean);
      if (grad_b != nullptr) grad_b[i] = from_float<T>(gradient.noised);
    }
  }
  const int64_t rounds = (cut.packs + kRowThreads - 1) / kRowThreads;
#pragma unroll 1
  for (int64_t round = rounds - 1; round >= 0; --round) {
    const int64_t v = round * kRowThreads + threadIdx.x;
    if (v >= cut.packs) continue;
    const int64_t i = cut.head + v * size;
    const Pack<T> x = load_pack<Cache::stream>(a + i, true), y = load_pack<Cache::stream>(b + i, wide_b);
    Pack<T> dx, dy;
#pragma unroll
    for (int k = 0; k < size; ++k) {
      const Gradient gradient = gradient_of<T>(to_float(x.value[k]), to_float(y.value[k]), whole, kl_weight, ce_weight);
      dx.value[k] = from_float<T>(gradient.clean);
      dy.value[k] = from_float<T>(gradient.noised);
    }
    if (grad_a != nullptr) store_pack<Cache::stream>(grad_a + i, dx, wide_grad_a);
    if (grad_b != nullptr) store_pack<Cache::stream>(grad_b + i, dy, wide_grad_b);
  }
}

template <class T>
__device__ void fill(T* x, int64_t cols, float value) {
  if (x == nullptr) return;
  const Cut cut = cut_of(x, cols);
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < Pack<T>::size; ++k) pack.value[k] = from_float<T>(value);
#pragma unroll 1
  for (int64_t v = threadIdx.x; v < cut.packs; v += kRowThreads)
    store_pack<Cache::stream>(x + cut.head + v * pack.size, pack, true);
  const int64_t i = threadIdx.x < kWarp ? single_column(cut, cols) : -1;
  if (i >= 0) x[i] = pack.value[0];
}

// Whether a row with an infinite difference holds NaN or +inf, which make it meaningless.
template <class T>
__device__ bool undefined(const T* a, const T* b, int64_t cols) {
  bool bad = false;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < cols; i += kRowThreads)
    bad = bad || !(to_float(a[i]) < INFINITY) || !(to_float(b[i]) < INFINITY);
  return __syncthreads_or(bad);
}

// One block, one row. Without a divergence the noised stream stands in for itself: a row against itself costs a read that is
// in the cache, and saves a second set of loops.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 2) wide_rows_kernel(const __grid_constant__ Rows r) {
  __shared__ Part shared[kWarps];
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < r.rows; row += gridDim.x) {
    const Task task = task_of(r, row);
    T* grad_a = row_of<T>(r.grad_clean, row);
    T* grad_b = row_of<T>(r.grad_noised, row);
    double kl = 0, ce = task.bad_label ? NAN : 0;
    if (task.kl_weight == 0 && task.ce_weight == 0) {
      fill(grad_a, r.cols, 0.0f);
      fill(grad_b, r.cols, 0.0f);
    } else {
      const T* a = row_of<T>(r.clean, row);
      const bool diverges = task.kl_weight != 0;
      const T* b = diverges ? row_of<T>(r.noised, row) : a;
      // Read before gradients may overwrite them.
      const float clean_label = task.ce_weight != 0 ? to_float(a[task.label]) : 0;
      const float noised_label = task.ce_weight != 0 ? to_float(b[task.label]) : 0;
      __syncthreads();  // the last row's parts have been read
      const Whole whole = whole_of(part_of(a, b, r.cols), shared);
      const bool infinite = diverges && whole.infinite;
      if (diverges) kl = !infinite ? whole.divergence : undefined(a, b, r.cols) ? NAN : INFINITY;
      if (task.ce_weight != 0) ce = whole.log_clean - clean_label;
      const float kl_weight = static_cast<float>(task.kl_weight), ce_weight = static_cast<float>(task.ce_weight);
      if (infinite) {
        fill(grad_a, r.cols, NAN);
        fill(grad_b, r.cols, NAN);
      } else if (grad_a != nullptr || (grad_b != nullptr && diverges)) {
        write_gradients(a, b, grad_a, diverges ? grad_b : nullptr, r.cols, whole, kl_weight, ce_weight);
        __syncthreads();
        if (task.ce_weight != 0 && grad_a != nullptr && threadIdx.x == 0) {
          // p - 1 at the label, from the logarithm so that a confident row keeps its digits.
          const float divergence = gradient_of<T>(clean_label, noised_label, whole, kl_weight, 0.0f).clean;
          grad_a[task.label] = from_float<T>(divergence + static_cast<float>(task.ce_weight * expm1(-ce)));
        }
      }
      if (!diverges) fill(grad_b, r.cols, 0.0f);
    }
    if (threadIdx.x == 0) {
      r.kl[row] = kl;
      r.ce[row] = ce;
    }
  }
}

// One warp, one row, in double: sums of so few terms that their rounding errors do not average out.
template <class T>
__global__ void __launch_bounds__(kNarrowThreads, 2) narrow_rows_kernel(const __grid_constant__ Rows r) {
  const int lane = threadIdx.x % kWarp;
  constexpr int warps = kNarrowThreads / kWarp;
#pragma unroll 1
  for (int64_t row = int64_t{blockIdx.x} * warps + threadIdx.x / kWarp; row < r.rows; row += int64_t{gridDim.x} * warps) {
    const Task task = task_of(r, row);
    const bool diverges = task.kl_weight != 0, any = diverges || task.ce_weight != 0;
    const T* a = row_of<T>(r.clean, row);
    const T* b = diverges ? row_of<T>(r.noised, row) : a;
    T* grad_a = row_of<T>(r.grad_clean, row);
    T* grad_b = row_of<T>(r.grad_noised, row);
    float clean_max = -INFINITY, noised_max = -INFINITY;
    bool bad = false, infinite = false;
    if (any) {
#pragma unroll 1
      for (int64_t i = lane; i < r.cols; i += kWarp) {
        const float x = to_float(a[i]), y = to_float(b[i]);
        clean_max = fmaxf(clean_max, x);
        noised_max = fmaxf(noised_max, y);
        bad = bad || !(x < INFINITY) || !(y < INFINITY);
        infinite = infinite || (x == -INFINITY) != (y == -INFINITY);
      }
    }
    clean_max = warp_max(clean_max);
    noised_max = warp_max(noised_max);
    bad = __any_sync(0xffffffffu, bad);
    infinite = __any_sync(0xffffffffu, infinite);
    const double centre = static_cast<double>(clean_max) - noised_max;
    const auto delta_of = [&](double x, double y) { return x + y == -INFINITY ? 0.0 : (x - y) - centre; };
    const auto excess_of = [&](double delta, double clean, double noised) {
      return fabs(delta) < 0.5 ? noised * expm1(delta) : clean - noised;
    };
    double clean = 0, noised = 0, excess = 0, clean_delta = 0, noised_delta = 0;
    if (any) {
#pragma unroll 1
      for (int64_t i = lane; i < r.cols; i += kWarp) {
        const double x = to_float(a[i]), y = to_float(b[i]), delta = delta_of(x, y);
        const double ea = exp(x - clean_max), eb = exp(y - noised_max);
        clean += ea;
        noised += eb;
        excess += excess_of(delta, ea, eb);
        clean_delta += ea * delta;
        noised_delta += eb * delta;
      }
    }
    const RowSums sums = {warp_sum(clean), warp_sum(noised), warp_sum(excess), warp_sum(clean_delta),
                          warp_sum(noised_delta)};
    const double growth = sums.excess / sums.noised;
    const double log_ratio = fabs(growth) < 0.5 ? log1p(growth) : log(sums.clean / sums.noised);
    const double clean_kl = sums.clean_delta / sums.clean - log_ratio;
    const double noised_kl = log_ratio - sums.noised_delta / sums.noised;
    double ce = task.bad_label ? NAN : 0;
    if (task.ce_weight != 0) ce = log(sums.clean) + (static_cast<double>(clean_max) - to_float(a[task.label]));
    __syncwarp();  // the label's logit has been read by all lanes before a gradient may take its place
    const bool undefined = diverges && (bad || infinite);
    double kl = 0;
#pragma unroll 1
    for (int64_t i = lane; i < r.cols; i += kWarp) {
      double dx = 0, dy = 0;
      if (undefined) {
        dx = dy = NAN;
      } else if (any) {
        const double x = to_float(a[i]), y = to_float(b[i]);
        const double p = exp(x - clean_max) / sums.clean;
        if (diverges) {
          const double rest = delta_of(x, y) - log_ratio, q = exp(y - noised_max) / sums.noised;
          const double more = excess_of(rest, p, q);
          kl += more * rest;
          dx = task.kl_weight * (p * (rest - clean_kl) + more);
          dy = -task.kl_weight * (q * (rest + noised_kl) + more);
        }
        if (task.ce_weight != 0) dx += task.ce_weight * (i == task.label ? expm1(-ce) : p);
      }
      if (grad_a != nullptr) grad_a[i] = from_float<T>(static_cast<float>(dx));
      if (grad_b != nullptr) grad_b[i] = from_float<T>(static_cast<float>(dy));
    }
    kl = warp_sum(kl);
    if (lane == 0) {
      r.kl[row] = undefined ? (bad ? NAN : INFINITY) : kl < 0 ? 0 : kl;
      r.ce[row] = ce;
    }
  }
}

// Rounded once from double, as on every backend; a factor of 1 leaves its row alone.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 2)
    scale_rows_kernel(T* block, int64_t stride, int64_t rows, int64_t cols, const double* __restrict__ factors,
                      int64_t factor_stride) {
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const double factor = factors[row * factor_stride];
    if (factor == 1.0) continue;
    T* x = block + row * stride;
    const Cut cut = cut_of(x, cols);
    const auto scaled = [&](T value) { return from_float<T>(static_cast<float>(to_float(value) * factor)); };
#pragma unroll 1
    for (int64_t v = threadIdx.x; v < cut.packs; v += kRowThreads) {
      T* at = x + cut.head + v * Pack<T>::size;
      Pack<T> pack = load_pack(at, true);
#pragma unroll
      for (int k = 0; k < Pack<T>::size; ++k) pack.value[k] = scaled(pack.value[k]);
      store_pack(at, pack, true);
    }
    const int64_t i = threadIdx.x < kWarp ? single_column(cut, cols) : -1;
    if (i >= 0) x[i] = scaled(x[i]);
  }
}

constexpr int64_t kMostBlocks = int64_t{1} << 30;

}  // namespace

void divergence_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean,
                     const LogitRows& grad_noised, DType dtype, int64_t rows, int64_t cols, const int64_t* labels,
                     int64_t ignore_index, const double* kl_weights, const double* ce_weights, double* kl, double* ce,
                     int device, void* stream) {
  const Call call("divergence_rows", device, stream);
  if (rows == 0) return;
  const Rows work{clean, noised, grad_clean, grad_noised, rows, cols, labels, ignore_index, kl_weights, ce_weights, kl, ce};
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int64_t per_block = kNarrowThreads / kWarp;
    if (cols < kNarrow)
      call.launch(narrow_rows_kernel<T>, std::min((rows + per_block - 1) / per_block, kMostBlocks), kNarrowThreads, work);
    else
      call.launch(wide_rows_kernel<T>, std::min(rows, kMostBlocks), kRowThreads, work);
  });
}

void scale_rows(const LogitRows& block, DType dtype, int64_t rows, int64_t cols, const double* factors,
                int64_t factor_stride, int device, void* stream) {
  const Call call("scale_rows_", device, stream);
  if (rows == 0 || cols == 0) return;
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    call.launch(scale_rows_kernel<T>, std::min(rows, kMostBlocks), kRowThreads, static_cast<T*>(block.address), block.stride,
                rows, cols, factors, factor_stride);
  });
}

}  // namespace fastpost::cuda
