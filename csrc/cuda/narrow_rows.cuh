// Narrow rows of logits: a warp each, three readings, in double: sums of so few terms that their rounding errors do not
// average out.
#pragma once

#include "core/divergence.h"
#include "cuda/row_task.cuh"
#include "cuda/warp.cuh"

namespace fastpost::cuda {

constexpr int64_t kNarrow = 1024;  // columns from which on a row is wide
constexpr int kNarrowThreads = 256;

inline int64_t narrow_blocks(int64_t rows) {
  constexpr int64_t per_block = kNarrowThreads / kWarp;
  return std::min((rows + per_block - 1) / per_block, kMostBlocks);
}

// Gradients are of type O; operand: as the rule has them.
template <class T, class O, bool operand>
__device__ __forceinline__ void narrow_rows(const Rows& r, const OperandRule& rule) {
  const int lane = threadIdx.x % kWarp;
  constexpr int warps = kNarrowThreads / kWarp;
#pragma unroll 1
  for (int64_t row = int64_t{blockIdx.x} * warps + threadIdx.x / kWarp; row < r.rows; row += int64_t{gridDim.x} * warps) {
    const Task task = task_of(r, rule, row);
    const bool diverges = task.kl_weight != 0, any = diverges || task.ce_weight != 0;
    const T* a = row_of<T>(r.clean, row);
    const T* b = diverges ? row_of<T>(r.noised, row) : a;
    O* grad_a = row_of<O>(r.grad_clean, row);
    O* grad_b = row_of<O>(r.grad_noised, row);
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
    double ce = task.bad_label ? NAN : 0, noised_ce = 0;
    if (task.ce_weight != 0) ce = log(sums.clean) + (static_cast<double>(clean_max) - to_float(a[task.label]));
    if (task.noised_ce_weight != 0)
      noised_ce = log(sums.noised) + (static_cast<double>(noised_max) - to_float(b[task.label]));
    __syncwarp();  // the label's logit has been read by all lanes before a gradient may take its place
    // What has no divergence has no gradient of it; a stream that it would not reach has that of its cross-entropy.
    const bool undefined = diverges && (bad || infinite);
    const bool taught = diverges && (!operand || rule.teaches), clean_weighs = taught || task.ce_weight != 0;
    const bool clean_undefined = undefined && (taught || (operand && rule.both));
    double kl = 0;
#pragma unroll 1
    for (int64_t i = lane; i < r.cols; i += kWarp) {
      double dx = 0, dy = 0;
      if (any) {
        const double x = to_float(a[i]), y = to_float(b[i]);
        const double p = exp(x - clean_max) / sums.clean;
        if (diverges && !undefined) {
          const double rest = delta_of(x, y) - log_ratio, q = exp(y - noised_max) / sums.noised;
          const double more = excess_of(rest, p, q);
          kl += more * rest;
          if (taught) dx = clean_gradient(p, rest, more, clean_kl, task.kl_weight);
          dy = noised_gradient(q, rest, more, noised_kl, task.kl_weight);
          if (task.noised_ce_weight != 0) dy += task.noised_ce_weight * (i == task.label ? expm1(-noised_ce) : q);
        }
        if (task.ce_weight != 0) dx += task.ce_weight * (i == task.label ? expm1(-ce) : p);
        if constexpr (operand) {
          const double u = rule.slope != 0 && clean_weighs ? x * rule.slope : 0;
          const double v = rule.slope != 0 && diverges ? y * rule.slope : 0;
          const double smoothed = rule.smoothing * ((i == task.label ? 1.0 : 0.0) - 1.0 / r.cols);
          dx = before_cap(dx + task.ce_weight * smoothed, u);
          dy = before_cap(dy + task.noised_ce_weight * smoothed, v);
          if (rule.both) dx += dy;
        }
      }
      if (clean_undefined) dx = NAN;
      if (undefined) dy = NAN;
      if (grad_a != nullptr) grad_a[i] = from_float<O>(static_cast<float>(dx));
      if (grad_b != nullptr) grad_b[i] = from_float<O>(static_cast<float>(dy));
    }
    kl = warp_sum(kl);
    if (lane == 0) {
      r.kl[row] = undefined ? (bad ? NAN : INFINITY) : kl < 0 ? 0 : kl;
      if (r.ce != nullptr) r.ce[row] = ce + noised_ce;
    }
  }
}

}  // namespace fastpost::cuda
