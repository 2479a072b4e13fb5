// Rows of logits for one instruction set. Three passes over a row: the first reads it from memory (maxima, extent of the
// differences), the next two find it in the second cache (sums; value and gradients).
#include "core/divergence.h"
#include "cpu/loops.h"

namespace fastpost::cpu {
namespace {

// Elements whose float sums are folded into float64: about 16 additions a lane, or rounding shows in the gradients.
#if defined(__AVX512F__)
constexpr int64_t kBlock = 256;
#elif defined(__AVX__)
constexpr int64_t kBlock = 128;
#else
constexpr int64_t kBlock = 64;
#endif
constexpr int64_t kNarrow = 1024;  // below this many columns differences and sums are float64

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
RowExtent extent_of(const T* a, const T* b, int64_t n) {
  float clean_max = -INFINITY, noised_max = -INFINITY, low = INFINITY, high = -INFINITY;
#pragma omp simd reduction(max : clean_max, noised_max, high) reduction(min : low)
  for (int64_t i = 0; i < n; ++i) {
    const float x = to_float(a[i]), y = to_float(b[i]);
    const float d = x - y;  // NaN where both are -inf: compares false, so left out
    clean_max = x > clean_max ? x : clean_max;
    noised_max = y > noised_max ? y : noised_max;
    high = d > high ? d : high;
    low = d < low ? d : low;
  }
  return {clean_max, noised_max, low, high};
}

template <class T, class Real, bool close>
RowSums<double> sums_of(const T* a, const T* b, int64_t n, const RowShift<Real> shift) {
  RowSums<double> total = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = least(n, begin + kBlock);
    Real clean = 0, noised = 0, excess = 0, excess_delta = 0, clean_delta = 0, noised_delta = 0;
#pragma omp simd reduction(+ : clean, noised, excess, excess_delta, clean_delta, noised_delta)
    for (int64_t i = begin; i < end; ++i) {
      const float x = to_float(a[i]), y = to_float(b[i]);
      const float delta = static_cast<float>(centred(x, y, shift));
      const float eb = exp_nonpositive(y - shift.noised_max);
      noised += eb;
      noised_delta += eb * delta;
      if constexpr (close) {
        const float more = close_excess(delta, eb);
        excess += more;
        excess_delta += more * delta;
      } else {
        const float ea = exp_nonpositive(x - shift.clean_max);
        clean += ea;
        clean_delta += ea * delta;
        excess += far_excess(delta, ea, eb);
      }
    }
    total.noised += noised;
    total.noised_delta += noised_delta;
    total.excess += excess;
    total.clean += clean;
    total.clean_delta += clean_delta + excess_delta;
  }
  if constexpr (close) {
    total.clean = total.noised + total.excess;
    total.clean_delta += total.noised_delta;
  }
  return total;
}

// The scaled gradients, and the row's value. Without gradients (write off) only the value.
template <class T, class Real, bool close, bool write>
double finish_row(const T* a, const T* b, T* grad_clean, T* grad_noised, int64_t n, const RowShift<Real> shift,
                  const RowMoments<Real> moments, float kl_weight, float ce_weight) {
  double value = 0;
  T unwanted[write ? kBlock : 1];  // where a gradient that nobody asked for goes
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t m = least(kBlock, n - begin);
    const T* x = a + begin;
    const T* y = b + begin;
    T* dx = grad_clean == nullptr ? unwanted : grad_clean + begin;
    T* dy = grad_noised == nullptr ? unwanted : grad_noised + begin;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < m; ++i) {
      const float xi = to_float(x[i]), yi = to_float(y[i]);
      const float r = static_cast<float>(centred(xi, yi, shift) - moments.log_ratio);
      const float q = exp_nonpositive(yi - shift.noised_max) * moments.noised_scale;
      float p, excess;
      if constexpr (close) {
        excess = close_excess(r, q);
        p = q + excess;
      } else {
        p = exp_nonpositive(xi - shift.clean_max) * moments.clean_scale;
        excess = far_excess(r, p, q);
      }
      sum += excess * r;
      if constexpr (write) {
        dx[i] = from_float<T>(clean_gradient(p, r, excess, moments.clean_kl, kl_weight, ce_weight));
        dy[i] = from_float<T>(noised_gradient(q, r, excess, moments.noised_kl, kl_weight));
      }
    }
    value += sum;
  }
  return value;
}

template <class T>
void fill(T* x, int64_t n, float value) {
  if (x == nullptr) return;
  const T v = from_float<T>(value);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = v;
}

// Cross-entropy alone: the clean stream only.
template <class T>
double cross_entropy_row(const T* a, T* grad, int64_t n, int64_t label, float weight) {
  float max = -INFINITY;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) {
    const float x = to_float(a[i]);
    max = x > max ? x : max;
  }
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = least(n, begin + kBlock);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += exp_nonpositive(to_float(a[i]) - max);
    sum += part;
  }
  const double value = (static_cast<double>(max) - to_float(a[label])) + log(sum);
  if (grad != nullptr) {
    const float scale = static_cast<float>(1.0 / sum);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) grad[i] = from_float<T>(weight * (exp_nonpositive(to_float(a[i]) - max) * scale));
    grad[label] = from_float<T>(static_cast<float>(weight * expm1(-value)));
  }
  return value;
}

// Whether a NaN or +inf makes the row meaningless, where the extent shows an infinite difference.
template <class T>
bool undefined(const T* a, const T* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (!(to_float(a[i]) < INFINITY) || !(to_float(b[i]) < INFINITY)) return true;
  return false;
}

template <class T, class Real>
void divergence_row(const DivergenceRow& row, const T* a, const T* b, double* kl, double* ce) {
  T* grad_clean = static_cast<T*>(row.grad_clean);
  T* grad_noised = static_cast<T*>(row.grad_noised);
  const int64_t n = row.cols;
  const float kl_weight = static_cast<float>(row.kl_weight);
  const float ce_weight = static_cast<float>(row.ce_weight);
  const RowExtent extent = extent_of(a, b, n);
  if (extent.difference_max == INFINITY || extent.difference_min == -INFINITY) {
    // One stream rules a class out that the other does not: the divergence is infinite and has no gradient.
    *kl = undefined(a, b, n) ? NAN : INFINITY;
    if (row.ce_weight != 0) *ce = cross_entropy_row<T>(a, nullptr, n, row.label, ce_weight);
    fill(grad_clean, n, NAN);
    fill(grad_noised, n, NAN);
    return;
  }
  const RowShift<Real> shift = row_shift(extent, Real{});
  const Real above = extent.difference_max - shift.centre, below = shift.centre - extent.difference_min;
  const bool close = above <= kCloseSpread && below <= kCloseSpread;  // false where a NaN took part
  const RowSums<double> sums = close ? sums_of<T, Real, true>(a, b, n, shift) : sums_of<T, Real, false>(a, b, n, shift);
  const RowMoments<Real> moments = row_moments<Real>(sums);

  const float clean_label = row.ce_weight != 0 ? to_float(a[row.label]) : 0.0f;  // gradients may overwrite them
  const float noised_label = row.ce_weight != 0 ? to_float(b[row.label]) : 0.0f;
  const bool write = grad_clean != nullptr || grad_noised != nullptr;
  const auto finish = close ? (write ? finish_row<T, Real, true, true> : finish_row<T, Real, true, false>)
                            : (write ? finish_row<T, Real, false, true> : finish_row<T, Real, false, false>);
  *kl = finish(a, b, grad_clean, grad_noised, n, shift, moments, kl_weight, ce_weight);
  if (*kl < 0) *kl = 0;  // where a probability underflows in one stream a term may be -1e-38
  if (row.ce_weight == 0) return;
  *ce = (static_cast<double>(extent.clean_max) - clean_label) + log(sums.clean);
  if (grad_clean == nullptr) return;
  // p - 1 at the label, from the logarithm so that a confident row keeps its digits.
  const float r = static_cast<float>(centred(clean_label, noised_label, shift) - moments.log_ratio);
  const float p = exp_nonpositive(clean_label - shift.clean_max) * moments.clean_scale;
  const float q = exp_nonpositive(noised_label - shift.noised_max) * moments.noised_scale;
  const float divergence = clean_gradient(p, r, far_excess(r, p, q), moments.clean_kl, kl_weight, 0.0f);
  grad_clean[row.label] = from_float<T>(divergence + static_cast<float>(row.ce_weight * expm1(-*ce)));
}

void row(DType dtype, const DivergenceRow& row, double* kl, double* ce) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const T* a = static_cast<const T*>(row.clean);
    const T* b = static_cast<const T*>(row.noised);
    T* grad_clean = static_cast<T*>(row.grad_clean);
    *kl = *ce = 0;
    if (row.kl_weight != 0)
      return row.cols < kNarrow ? divergence_row<T, double>(row, a, b, kl, ce) : divergence_row<T, float>(row, a, b, kl, ce);
    if (row.ce_weight != 0)
      *ce = cross_entropy_row<T>(a, grad_clean, row.cols, row.label, static_cast<float>(row.ce_weight));
    else
      fill(grad_clean, row.cols, 0.0f);
    fill(static_cast<T*>(row.grad_noised), row.cols, 0.0f);
  });
}

}  // namespace

extern const DivergenceLoops FASTPOST_PASTE(divergence_loops_, FASTPOST_ISA);
const DivergenceLoops FASTPOST_PASTE(divergence_loops_, FASTPOST_ISA) = {row};

}  // namespace fastpost::cpu
