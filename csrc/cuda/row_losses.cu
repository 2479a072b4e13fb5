// The losses of all rows: one block makes their weights, the rows follow, one block sums up. What the host would otherwise
// ask of a dozen small kernels.
#include "api.h"
#include "cuda/launch.cuh"
#include "cuda/sums.cuh"

namespace fastpost::cuda {
namespace {

struct Columns {
  int64_t rows;
  const int64_t* labels;
  int64_t ignore_index;
  const bool* mask;
  RowReduction how;
  const double* items;
  double *kl, *ce, *kl_weights, *ce_weights;
};

__device__ __forceinline__ bool counts(const Columns& r, int64_t row) {
  if (r.labels != nullptr) return r.labels[row] != r.ignore_index;
  return r.mask == nullptr || r.mask[row];
}

// What both sums are multiplied by.
struct Scales {
  double kl, ce;
};

__device__ __forceinline__ Scales scales_of(const RowReduction& how, const double* items, double counted) {
  double share = how.averaged ? 1.0 / fmax(counted, 1.0) : 1.0;
  if (items != nullptr) share = *items == 0 ? 0 : 1.0 / *items;
  return {how.kl_everywhere ? how.kl_scale : how.kl_scale * share, how.ce_scale * share};
}

__global__ void __launch_bounds__(kThreads) weigh_rows_kernel(const __grid_constant__ Columns r) {
  __shared__ Scales scales;
  double counted[1] = {};
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < r.rows; row += kThreads) counted[0] += counts(r, row) ? 1 : 0;
  block_sum(counted);
  if (threadIdx.x == 0) scales = scales_of(r.how, r.items, counted[0]);
  __syncthreads();
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < r.rows; row += kThreads) {
    const bool counting = counts(r, row);
    r.ce_weights[row] = counting ? scales.ce : 0;
    r.kl_weights[row] = counting || r.how.kl_everywhere ? scales.kl * r.how.kl_weight : 0;
  }
}

__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const __grid_constant__ Columns r, float* loss, float* task, float* divergence) {
  double sums[4] = {};  // the loss, the cross-entropy, the divergence, rows that count
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < r.rows; row += kThreads) {
    sums[0] += r.kl[row] * r.kl_weights[row];
    if (r.kl_weights[row] != 0) sums[2] += r.kl[row];
    if (!counts(r, row)) continue;
    sums[3] += 1;
    if (r.labels == nullptr) continue;
    sums[0] += r.ce[row] * r.ce_weights[row];
    sums[1] += r.ce[row];
  }
  block_sum(sums);
  if (threadIdx.x != 0) return;
  const Scales scales = scales_of(r.how, r.items, sums[3]);
  *loss = static_cast<float>(sums[0]);
  if (task != nullptr) *task = static_cast<float>(sums[1] * scales.ce);
  if (divergence != nullptr) *divergence = static_cast<float>(sums[2] * scales.kl);
}

}  // namespace

void row_losses(const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean, const LogitRows& grad_noised,
                DType dtype, int64_t rows, int64_t cols, const int64_t* labels, int64_t ignore_index, const bool* mask,
                const RowReduction& how, const double* items, double* room, float* loss, float* task, float* divergence,
                int device, void* stream) {
  const Call call("row_losses", device, stream);
  const Columns columns{rows, labels, ignore_index, mask, how, items, room, room + rows, room + 2 * rows, room + 3 * rows};
  call.launch(weigh_rows_kernel, 1, kThreads, columns);
  divergence_rows(clean, noised, grad_clean, grad_noised, dtype, rows, cols, labels, ignore_index, columns.kl_weights,
                  columns.ce_weights, columns.kl, columns.ce, device, stream);
  call.launch(sum_rows_kernel, 1, kThreads, columns, loss, task, divergence);
}

}  // namespace fastpost::cuda
