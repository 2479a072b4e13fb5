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

// Asks for the part of the next row that this thread will read, while it computes on the present one.
template <class T>
inline void prefetch(const T* next, int64_t begin, int64_t end) {
  if (next == nullptr) return;
  for (int64_t i = begin; i < end; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(next + i, 0, 2);
}

template <class T>
RowExtent extent_of(const T* a, const T* b, int64_t n) {
  float clean_max = -INFINITY, noised_max = -INFINITY, low = INFINITY, high = -INFINITY;
  float clean_min = INFINITY;
#pragma omp simd reduction(max : clean_max, noised_max, high) reduction(min : low, clean_min)
  for (int64_t i = 0; i < n; ++i) {
    const float x = to_float(a[i]), y = to_float(b[i]);
    const float d = x - y;  // NaN where both are -inf: compares false, so left out
    clean_max = x > clean_max ? x : clean_max;
    clean_min = x < clean_min ? x : clean_min;
    noised_max = y > noised_max ? y : noised_max;
    high = d > high ? d : high;
    low = d < low ? d : low;
  }
  return {clean_max, noised_max, clean_min, low, high};
}

template <class T, class Shift, bool close>
RowSums sums_of(const T* a, const T* b, const T* next, float* clean_exp, float* noised_exp, int64_t n, const Shift shift) {
  using Real = typename Shift::Real;
  RowSums total = {};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = least(n, begin + kBlock);
    prefetch(next, begin, end);
    Real clean = 0, noised = 0, excess = 0, excess_delta = 0, clean_delta = 0, noised_delta = 0;
#pragma omp simd reduction(+ : clean, noised, excess, excess_delta, clean_delta, noised_delta)
    for (int64_t i = begin; i < end; ++i) {
      const float x = to_float(a[i]), y = to_float(b[i]);
      const float delta = static_cast<float>(centred(x, y, shift));
      const float eb = exp_nonpositive(y - shift.noised_max);
      noised_exp[i] = eb;
      noised += eb;
      noised_delta += eb * delta;
      if constexpr (close) {
        const float more = close_excess(delta, eb);
        excess += more;
        excess_delta += more * delta;
      } else {
        const float ea = exp_nonpositive(x - shift.clean_max);
        clean_exp[i] = ea;
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
template <class T, class Shift, bool close, bool write>
double finish_row(const T* a, const T* b, const T* next, const float* clean_exp, const float* noised_exp, T* grad_clean,
                  T* grad_noised, int64_t n, const Shift shift, const RowMoments<typename Shift::Real> moments,
                  float kl_weight, float ce_weight, float noised_ce_weight) {
  using Real = typename Shift::Real;
  double value = 0;
  T unwanted[write ? kBlock : 1];  // where a gradient that nobody asked for goes
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t m = least(kBlock, n - begin);
    prefetch(next, begin, begin + m);
    const T* x = a + begin;
    const T* y = b + begin;
    const float* ea = clean_exp + begin;
    const float* eb = noised_exp + begin;
    T* dx = grad_clean == nullptr ? unwanted : grad_clean + begin;
    T* dy = grad_noised == nullptr ? unwanted : grad_noised + begin;
    Real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < m; ++i) {
      const float xi = to_float(x[i]), yi = to_float(y[i]);
      const float r = static_cast<float>(centred(xi, yi, shift) - moments.log_ratio);
      const float q = eb[i] * moments.noised_scale;
      float p, excess;
      if constexpr (close) {
        excess = close_excess(r, q);
        p = q + excess;
      } else {
        p = ea[i] * moments.clean_scale;
        excess = far_excess(r, p, q);
      }
      sum += excess * r;
      if constexpr (write) {
        dx[i] = from_float<T>(clean_gradient(p, r, excess, moments.clean_kl, kl_weight, ce_weight));
        dy[i] = from_float<T>(noised_gradient(q, r, excess, moments.noised_kl, kl_weight) + noised_ce_weight * q);
      }
    }
    value += sum;
  }
  return value;
}

template <class T>
void fill(T* x, int64_t n, float value) {
  if (x == nullptr) return;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = from_float<T>(value);
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

// A row without a gradient: one stream rules a class out that the other does not, or it is meaningless. Each stream's
// cross-entropy has a value still.
template <class T>
void undefined_row(const DivergenceRow& row, double* ce) {
  const auto add = [&](const void* logits, double weight) {
    if (weight != 0) *ce += cross_entropy_row<T>(static_cast<const T*>(logits), nullptr, row.cols, row.label, 0.0f);
  };
  add(row.clean, row.ce_weight);
  add(row.noised, row.noised_ce_weight);
  fill(static_cast<T*>(row.grad_clean), row.cols, NAN);
  fill(static_cast<T*>(row.grad_noised), row.cols, NAN);
}

template <class T, class Shift>
void divergence_row(const DivergenceRow& row, const RowExtent& extent, const Shift& shift, bool close, double* kl,
                    double* ce) {
  using Real = typename Shift::Real;
  const T* a = static_cast<const T*>(row.clean);
  const T* b = static_cast<const T*>(row.noised);
  const T* next_clean = static_cast<const T*>(row.next_clean);
  const T* next_noised = static_cast<const T*>(row.next_noised);
  T* grad_clean = static_cast<T*>(row.grad_clean);
  T* grad_noised = static_cast<T*>(row.grad_noised);
  const float kl_weight = static_cast<float>(row.kl_weight), ce_weight = static_cast<float>(row.ce_weight);
  const float noised_ce_weight = static_cast<float>(row.noised_ce_weight);
  const auto sum = close ? sums_of<T, Shift, true> : sums_of<T, Shift, false>;
  const RowSums sums = sum(a, b, next_clean, row.clean_exp, row.noised_exp, row.cols, shift);
  const RowMoments<Real> moments = row_moments<Real>(sums);
  if (isnan(moments.clean_kl) || isnan(moments.noised_kl)) {
    *kl = NAN;
    return undefined_row<T>(row, ce);
  }

  const bool labelled = row.ce_weight != 0 || row.noised_ce_weight != 0;
  const float clean_label = labelled ? to_float(a[row.label]) : 0.0f;  // gradients may overwrite them
  const float noised_label = labelled ? to_float(b[row.label]) : 0.0f;
  const bool write = grad_clean != nullptr || grad_noised != nullptr;
  const auto finish = close ? (write ? finish_row<T, Shift, true, true> : finish_row<T, Shift, true, false>)
                            : (write ? finish_row<T, Shift, false, true> : finish_row<T, Shift, false, false>);
  *kl = finish(a, b, next_noised, row.clean_exp, row.noised_exp, grad_clean, grad_noised, row.cols, shift, moments,
               kl_weight, ce_weight, noised_ce_weight);
  if (*kl < 0) *kl = 0;  // where a probability underflows in one stream a term may be -1e-38
  if (!labelled) return;
  const double clean_ce = (static_cast<double>(extent.clean_max) - clean_label) + log(sums.clean);
  const double noised_ce = (static_cast<double>(extent.noised_max) - noised_label) + log(sums.noised);
  *ce = (row.ce_weight != 0 ? clean_ce : 0) + (row.noised_ce_weight != 0 ? noised_ce : 0);
  if (!write) return;
  // p - 1 at the label, from the logarithm so that a confident row keeps its digits.
  const float r = static_cast<float>(centred(clean_label, noised_label, shift) - moments.log_ratio);
  const float p = exp_nonpositive(clean_label - shift.clean_max) * moments.clean_scale;
  const float q = exp_nonpositive(noised_label - shift.noised_max) * moments.noised_scale;
  const float excess = far_excess(r, p, q);
  const auto put = [&](T* gradient, float divergence, double weight, double value) {
    if (gradient != nullptr && weight != 0)
      gradient[row.label] = from_float<T>(divergence + static_cast<float>(weight * expm1(-value)));
  };
  put(grad_clean, clean_gradient(p, r, excess, moments.clean_kl, kl_weight), row.ce_weight, clean_ce);
  put(grad_noised, noised_gradient(q, r, excess, moments.noised_kl, kl_weight), row.noised_ce_weight, noised_ce);
}

template <class T>
void two_stream_row(const DivergenceRow& row, double* kl, double* ce) {
  const T* a = static_cast<const T*>(row.clean);
  const T* b = static_cast<const T*>(row.noised);
  const RowExtent extent = extent_of(a, b, row.cols);
  if (extent.difference_max == INFINITY || extent.difference_min == -INFINITY) {
    *kl = undefined(a, b, row.cols) ? NAN : INFINITY;
    return undefined_row<T>(row, ce);
  }
  const float spread = row_spread(extent);
  const bool close = spread <= kCloseSpread;
  if (row.cols < kNarrow)
    divergence_row<T>(row, extent, narrow_shift(extent), close, kl, ce);
  else if (plain_suffices(extent, spread))
    divergence_row<T>(row, extent, plain_shift(extent), close, kl, ce);
  else
    divergence_row<T>(row, extent, exact_shift(extent), close, kl, ce);
}

void row(DType dtype, const DivergenceRow& row, double* kl, double* ce) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    T* grad_clean = static_cast<T*>(row.grad_clean);
    *kl = *ce = 0;
    if (row.kl_weight != 0) return two_stream_row<T>(row, kl, ce);
    if (row.ce_weight != 0)
      *ce = cross_entropy_row<T>(static_cast<const T*>(row.clean), grad_clean, row.cols, row.label,
                                 static_cast<float>(row.ce_weight));
    else
      fill(grad_clean, row.cols, 0.0f);
    fill(static_cast<T*>(row.grad_noised), row.cols, 0.0f);
  });
}

// Value of the Jensen-Shannon divergence, and KL(p|m), KL(q|m). The exponentials become p and q; behind them, `cols` further
// on, come ln(p / m) and ln(q / m). Where one class has nearly all of p its logarithm is nearly KL(p|m): so the KLs are
// means of these very floats, under weights that sum to 1.
template <class T>
double mixture_sums(const T* a, const T* b, float* clean, float* noised, double* logs, int64_t cols,
                    const MixtureShift shift, const RowMoments<double> moments, double* clean_kl, double* noised_kl) {
  double value = 0, from_clean = 0, from_noised = 0, clean_mass = 0, noised_mass = 0;
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    const int64_t m = least(kBlock, cols - begin);
    const T* x = a + begin;
    const T* y = b + begin;
    float* p = clean + begin;
    float* q = noised + begin;
    double* clean_logs = logs + begin;
    double* noised_logs = logs + cols + begin;
    double sum = 0, clean_sum = 0, noised_sum = 0, ps = 0, qs = 0;
#pragma omp simd reduction(+ : sum, clean_sum, noised_sum, ps, qs)
    for (int64_t i = 0; i < m; ++i) {
      const float r = static_cast<float>(centred(to_float(x[i]), to_float(y[i]), shift) - moments.log_ratio);
      double clean_log, noised_log;
      float term;
      mixture_logs(r, &clean_log, &noised_log, &term);
      const float pi = p[i] * moments.clean_scale, qi = q[i] * moments.noised_scale;
      p[i] = pi;
      q[i] = qi;
      clean_logs[i] = clean_log;
      noised_logs[i] = noised_log;
      sum += 0.5f * (pi + qi) * term;
      ps += pi;
      qs += qi;
      clean_sum += pi * clean_log;
      noised_sum += qi * noised_log;
    }
    value += sum;
    from_clean += clean_sum;
    from_noised += noised_sum;
    clean_mass += ps;
    noised_mass += qs;
  }
  *clean_kl = from_clean / clean_mass;
  *noised_kl = from_noised / noised_mass;
  return value;
}

// d(weight * JSD + ce_weight * cross-entropy)/dz for one stream.
template <class T>
void mixture_gradient(T* grad, const float* p, const double* logs, int64_t n, double kl, float weight, double ce_weight,
                      int64_t label, double ce) {
  if (grad == nullptr) return;
  const auto divergence = [&](int64_t i) { return 0.5f * weight * (p[i] * static_cast<float>(logs[i] - kl)); };
  const float factor = static_cast<float>(ce_weight);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    grad[i] = from_float<T>(0.5f * weight * (p[i] * static_cast<float>(logs[i] - kl)) + factor * p[i]);
  if (ce_weight != 0) grad[label] = from_float<T>(divergence(label) + static_cast<float>(ce_weight * expm1(-ce)));
}

template <class T>
void jensen_shannon_row(const DivergenceRow& row, double* logs, double* value, double* ce) {
  const T* a = static_cast<const T*>(row.clean);
  const T* b = static_cast<const T*>(row.noised);
  const int64_t n = row.cols;
  const RowExtent extent = extent_of(a, b, n);
  const MixtureShift shift = mixture_shift(extent);
  const T* next = static_cast<const T*>(row.next_clean);
  const RowSums sums = sums_of<T, MixtureShift, false>(a, b, next, row.clean_exp, row.noised_exp, n, shift);
  const RowMoments<double> moments = row_moments<double>(sums);
  double clean_kl, noised_kl;
  *value = mixture_sums(a, b, row.clean_exp, row.noised_exp, logs, n, shift, moments, &clean_kl, &noised_kl);
  const double most = 0x1.62e42fefa39efp-1;  // ln 2; rounding can go beyond
  if (*value > most) *value = most;
  double clean_ce = 0, noised_ce = 0;  // before gradients may overwrite the logits
  if (row.ce_weight != 0) clean_ce = (static_cast<double>(extent.clean_max) - to_float(a[row.label])) + log(sums.clean);
  if (row.noised_ce_weight != 0)
    noised_ce = (static_cast<double>(extent.noised_max) - to_float(b[row.label])) + log(sums.noised);
  *ce = clean_ce + noised_ce;
  const float weight = static_cast<float>(row.kl_weight);
  mixture_gradient(static_cast<T*>(row.grad_clean), row.clean_exp, logs, n, clean_kl, weight, row.ce_weight, row.label,
                   clean_ce);
  mixture_gradient(static_cast<T*>(row.grad_noised), row.noised_exp, logs + n, n, noised_kl, weight, row.noised_ce_weight,
                   row.label, noised_ce);
}

void jensen_shannon(DType dtype, const DivergenceRow& r, double* logs, double* value, double* ce) {
  if (r.kl_weight == 0) return row(dtype, r, value, ce);
  with_dtype(dtype, [&](auto t) { jensen_shannon_row<decltype(t)>(r, logs, value, ce); });
}

template <class T, bool both>
void operands_of(const OperandRow& r) {
  const float* x = r.clean;
  const float* y = r.noised;
  const float* dx = r.grad_clean;
  const float* dy = r.grad_noised;
  T* first = static_cast<T*>(r.first);
  T* second = static_cast<T*>(r.second);
  const float flat = r.flat, noised_flat = r.noised_flat, slope = r.slope;
#pragma omp simd
  for (int64_t i = 0; i < r.cols; ++i) {
    float clean = before_cap(dx[i] - flat, x[i] * slope);
    if constexpr (both) {
      const float noised = before_cap(dy[i] - noised_flat, y[i] * slope);
      clean += noised;
      second[i] = from_float<T>(noised);
    }
    first[i] = from_float<T>(clean);
  }
}

void operands(DType dtype, const OperandRow& row) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    if (row.grad_clean == nullptr)
      operands_of<T, false>(
          {row.noised, nullptr, row.grad_noised, nullptr, row.second, nullptr, row.cols, row.noised_flat, 0, row.slope});
    else if (row.grad_noised == nullptr)
      operands_of<T, false>(row);
    else
      operands_of<T, true>(row);
  });
}

}  // namespace

extern const DivergenceLoops FASTPOST_PASTE(divergence_loops_, FASTPOST_ISA);
const DivergenceLoops FASTPOST_PASTE(divergence_loops_, FASTPOST_ISA) = {row, jensen_shannon, operands};

}  // namespace fastpost::cpu
