// Rows of logits for one instruction set. Three passes over a row: the first reads it from memory (maxima, extent of the
// differences), the next two find it in the second cache (sums; value and gradients).
#include <string.h>

#include "core/divergence.h"
#include "cpu/loops.h"

namespace fastpost::cpu {
namespace {

// Sums are kept lane by lane to the end of a row: folding them at the end of each block would cost as much as several
// elements of it. There are as many lanes as elements of T in a register.
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
template <class T>
constexpr int kLanes = kRegister / static_cast<int>(sizeof(T));
template <class T>
constexpr int64_t kBlock = 16 * kLanes<T>;  // goes into float64: after many more additions rounding shows in gradients
constexpr int64_t kNarrow = 1024;           // below this many columns differences and sums are float64

// How a row goes. Near and far rows have their divergence from the sums, so that without gradients there is no third pass.
enum class Way {
  near,     // no |delta| is above kNearRow: one exponential a pair, and p - q is q (e^r - 1)
  far,      // some are, and J is at least kFarDivergence: two exponentials; sums may take e_a - e_b as it stands
  careful,  // whatever else: of e_a - e_b and p - q the better form for each pair, and J summed up pair by pair
};
constexpr double kFarDivergence = 0.02;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// How many elements a loop over lanes has. Those at the end of a row come one by one.
template <int n>
struct Count {
  constexpr int operator()() const { return n; }
};

template <class Real, int n>
struct Vector {
  typedef Real type __attribute__((vector_size(n * sizeof(Real))));
};

// A sum over elements of T, lane by lane.
template <class Real, class T>
struct LaneSums {
  static constexpr int n = kLanes<T>;
  using Doubles = typename Vector<double, n>::type;
  Real part[n] = {};
  Doubles total = {};

  void fold() {
    typename Vector<Real, n>::type lanes;
    memcpy(&lanes, part, sizeof lanes);
    total += __builtin_convertvector(lanes, Doubles);
    memset(part, 0, sizeof part);
  }
  double sum() const {
    double all = 0;
    for (int k = 0; k < n; ++k) all += total[k];
    return all;
  }
};

// Calls body(at, count) for a row's elements, begin(from, to) before those of a block and end() behind them.
template <class T, class Body, class Begin, class End>
inline void for_lanes(int64_t cols, const Body& body, const Begin& begin, const End& end) {
  constexpr int n = kLanes<T>;
  const int64_t whole = cols - cols % n;
  int64_t i = 0;
  while (i < whole) {
    const int64_t stop = least(whole, i + kBlock<T>);
    begin(i, stop);
    for (; i < stop; i += n) body(i, Count<n>());
    end();
  }
  if (i == cols) return;
  begin(i, cols);
  for (; i < cols; ++i) body(i, Count<1>());
  end();
}

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

template <class T, class Shift, Way way>
RowSums sums_of(const T* a, const T* b, const T* next, float* clean_exp, float* noised_exp, int64_t n, const Shift shift) {
  using Real = typename Shift::Real;
  LaneSums<Real, T> clean, noised, excess, excess_delta, clean_delta, noised_delta;
  const auto add = [&](int64_t at, auto count) {
#pragma omp simd
    for (int k = 0; k < count(); ++k) {
      const float x = to_float(a[at + k]), y = to_float(b[at + k]);
      const float delta = static_cast<float>(centred(x, y, shift));
      const float eb = exp_nonpositive(y - shift.noised_max);
      const float eb_delta = eb * delta;
      noised_exp[at + k] = eb;
      noised.part[k] += eb;
      noised_delta.part[k] += eb_delta;
      if constexpr (way == Way::near) {
        const float more = eb_delta * expm1_ratio_near(delta);
        excess.part[k] += more;
        excess_delta.part[k] += more * delta;
      } else {
        const float ea = exp_nonpositive(x - shift.clean_max);
        clean_exp[at + k] = ea;
        clean.part[k] += ea;
        clean_delta.part[k] += ea * delta;
        excess.part[k] += way == Way::far ? ea - eb : far_excess(delta, ea, eb);
      }
    }
  };
  const auto fold = [&] {
    noised.fold();
    noised_delta.fold();
    excess.fold();
    if constexpr (way == Way::near) {
      excess_delta.fold();
    } else {
      clean.fold();
      clean_delta.fold();
    }
  };
  for_lanes<T>(n, add, [&](int64_t begin, int64_t end) { prefetch(next, begin, end); }, fold);
  RowSums total = {};
  total.noised = noised.sum();
  total.noised_delta = noised_delta.sum();
  total.excess = excess.sum();
  if constexpr (way == Way::near) {
    total.clean = total.noised + total.excess;
    total.clean_delta = total.noised_delta + excess_delta.sum();
  } else {
    total.clean = clean.sum();
    total.clean_delta = clean_delta.sum();
  }
  return total;
}

// What the third pass needs beside a row's moments. With P = kl_weight p, Q = kl_weight q and E = P - Q the gradients are
//
//   P (r + clean_shift) + E        -(Q (r + noised_shift) + E)        short of the -ce_weight at the label
struct Folded {
  float clean_scale, noised_scale;  // P = e_a clean_scale, Q = e_b noised_scale
  float clean_shift, noised_shift;
};

struct Weights {
  float kl, ce, noised_ce;
};

Weights weights_of(const DivergenceRow& row) {
  return {static_cast<float>(row.kl_weight), static_cast<float>(row.ce_weight), static_cast<float>(row.noised_ce_weight)};
}

// Whether products and quotients of weights keep their digits.
bool foldable(const DivergenceRow& row) {
  const double kl = fabs(row.kl_weight), most = 0x1p20 * kl;
  return kl > 0x1p-30 && kl < 0x1p30 && fabs(row.ce_weight) <= most && fabs(row.noised_ce_weight) <= most;
}

template <class Real>
Folded folded(const RowMoments<Real>& moments, const Weights& weights) {
  return {moments.clean_scale * weights.kl, moments.noised_scale * weights.kl, weights.ce / weights.kl - moments.clean_kl,
          moments.noised_kl - weights.noised_ce / weights.kl};
}

// The scaled gradients, and where they are asked for (valued) the row's value.
template <class T, class Shift, Way way, bool write, bool valued>
double finish_row(const T* a, const T* b, const T* next, const float* clean_exp, const float* noised_exp, T* grad_clean,
                  T* grad_noised, int64_t n, const Shift shift, const RowMoments<typename Shift::Real> moments,
                  const Weights weights) {
  using Real = typename Shift::Real;
  const Folded fold = folded(moments, weights);
  LaneSums<Real, T> value;
  T unwanted[write ? kBlock<T> : 1];  // where a gradient that nobody asked for goes
  T *dx = unwanted, *dy = unwanted;
  int64_t start = 0;
  const auto begin = [&](int64_t from, int64_t to) {
    prefetch(next, from, to);
    start = from;
    dx = grad_clean == nullptr ? unwanted : grad_clean + from;
    dy = grad_noised == nullptr ? unwanted : grad_noised + from;
  };
  const auto differentiate = [&](int64_t at, auto count) {
#pragma omp simd
    for (int k = 0; k < count(); ++k) {
      const int64_t i = at + k;
      const float r = static_cast<float>(centred(to_float(a[i]), to_float(b[i]), shift) - moments.log_ratio);
      if constexpr (way == Way::careful) {
        const float p = clean_exp[i] * moments.clean_scale, q = noised_exp[i] * moments.noised_scale;
        const float excess = far_excess(r, p, q);
        value.part[k] += excess * r;
        if constexpr (write) {
          dx[i - start] = from_float<T>(clean_gradient(p, r, excess, moments.clean_kl, weights.kl, weights.ce));
          dy[i - start] =
              from_float<T>(noised_gradient(q, r, excess, moments.noised_kl, weights.kl) + weights.noised_ce * q);
        }
      } else {
        const float q = noised_exp[i] * fold.noised_scale;
        float p, excess;
        if constexpr (way == Way::near) {
          excess = q * r * expm1_ratio_near(r);
          p = q + excess;
        } else {
          p = clean_exp[i] * fold.clean_scale;
          excess = select(fabsf(r) < 0.25f, q * r * expm1_ratio_quarter(r), p - q);
        }
        if constexpr (valued) value.part[k] += excess * r;
        if constexpr (write) {
          dx[i - start] = from_float<T>(p * (r + fold.clean_shift) + excess);
          dy[i - start] = from_float<T>(-(q * (r + fold.noised_shift) + excess));
        }
      }
    }
  };
  for_lanes<T>(n, differentiate, begin, [&] {
    if constexpr (valued) value.fold();
  });
  if constexpr (!valued) return 0;
  return way == Way::careful ? value.sum() : value.sum() / weights.kl;
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
  LaneSums<float, T> exponentials;
  const auto add = [&](int64_t at, auto count) {
#pragma omp simd
    for (int k = 0; k < count(); ++k) exponentials.part[k] += exp_nonpositive(to_float(a[at + k]) - max);
  };
  for_lanes<T>(n, add, [](int64_t, int64_t) {}, [&] { exponentials.fold(); });
  const double sum = exponentials.sum();
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

// The second and third pass in one way. Returns false, and has written nothing but off_centre, if the sums say that the row
// asks for care.
template <class T, class Shift, Way way>
bool divergence_row(const DivergenceRow& row, const RowExtent& extent, const Shift& shift, double* kl, double* ce,
                    double* off_centre) {
  using Real = typename Shift::Real;
  const T* a = static_cast<const T*>(row.clean);
  const T* b = static_cast<const T*>(row.noised);
  const T* next_clean = static_cast<const T*>(row.next_clean);
  const T* next_noised = static_cast<const T*>(row.next_noised);
  T* grad_clean = static_cast<T*>(row.grad_clean);
  T* grad_noised = static_cast<T*>(row.grad_noised);
  const RowSums sums = sums_of<T, Shift, way>(a, b, next_clean, row.clean_exp, row.noised_exp, row.cols, shift);
  const RowMoments<Real> moments = row_moments<Real>(sums);
  if (isnan(moments.clean_kl) || isnan(moments.noised_kl)) {
    *kl = NAN;
    undefined_row<T>(row, ce);
    return true;
  }
  // Of few terms the rounding errors do not average out: they are summed up as terms of the divergence itself.
  constexpr bool valued = way == Way::careful || sizeof(Real) == 8;
  const RowDivergence found = divergence_of(sums);
  *off_centre = found.off_centre;
  if (!valued && found.off_centre != 0) return false;
  if constexpr (__is_same(Shift, PlainShift))  // a - b is rounded: by less than 3e-7 of what r is like
    if (static_cast<double>(shift.centre) * shift.centre > 64 * found.value) return false;
  if (way == Way::far && !(found.value >= kFarDivergence)) return false;
  if (way == Way::near) {
    const double origin = static_cast<double>(shift.centre) + moments.log_ratio;  // r = a - b - origin
    if (!(extent.difference_max - origin <= kNearRow && origin - extent.difference_min <= kNearRow)) return false;
  }

  const bool labelled = row.ce_weight != 0 || row.noised_ce_weight != 0;
  const float clean_label = labelled ? to_float(a[row.label]) : 0.0f;  // gradients may overwrite them
  const float noised_label = labelled ? to_float(b[row.label]) : 0.0f;
  const bool write = grad_clean != nullptr || grad_noised != nullptr;
  const Weights weights = write ? weights_of(row) : Weights{1, 0, 0};
  const auto finish = [&](auto pass) {
    return pass(a, b, next_noised, row.clean_exp, row.noised_exp, grad_clean, grad_noised, row.cols, shift, moments,
                weights);
  };
  *kl = found.value;
  if constexpr (valued)
    *kl = write ? finish(finish_row<T, Shift, way, true, true>) : finish(finish_row<T, Shift, way, false, true>);
  else if (write)
    finish(finish_row<T, Shift, way, true, false>);
  if (*kl < 0) *kl = 0;  // where a probability underflows in one stream a term may be -1e-38
  if (!labelled) return true;
  const double clean_ce = (static_cast<double>(shift.clean_max) - clean_label) + log(sums.clean);
  const double noised_ce = (static_cast<double>(shift.noised_max) - noised_label) + log(sums.noised);
  *ce = (row.ce_weight != 0 ? clean_ce : 0) + (row.noised_ce_weight != 0 ? noised_ce : 0);
  if (!write) return true;
  // p - 1 at the label, from the logarithm so that a confident row keeps its digits.
  const float r = static_cast<float>(centred(clean_label, noised_label, shift) - moments.log_ratio);
  const float p = exp_nonpositive(clean_label - shift.clean_max) * moments.clean_scale;
  const float q = exp_nonpositive(noised_label - shift.noised_max) * moments.noised_scale;
  const float excess = far_excess(r, p, q);
  const auto put = [&](T* gradient, float divergence, double weight, double value) {
    if (gradient != nullptr && weight != 0)
      gradient[row.label] = from_float<T>(divergence + static_cast<float>(weight * expm1(-value)));
  };
  put(grad_clean, clean_gradient(p, r, excess, moments.clean_kl, weights.kl), row.ce_weight, clean_ce);
  put(grad_noised, noised_gradient(q, r, excess, moments.noised_kl, weights.kl), row.noised_ce_weight, noised_ce);
  return true;
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
  // Between equal rows there is no divergence, whose weight then must not even round the gradient of the cross-entropy.
  const bool folds = foldable(row) && extent.difference_max > extent.difference_min;
  const bool near = folds && spread <= kNearRow;
  double off_centre = 0;
  if (row.cols < kNarrow) {
    const NarrowShift shift = narrow_shift(extent);
    if (near && divergence_row<T, NarrowShift, Way::near>(row, extent, shift, kl, ce, &off_centre)) return;
    divergence_row<T, NarrowShift, Way::careful>(row, extent, shift, kl, ce, &off_centre);
    return;
  }
  if (plain_suffices(extent, spread)) {
    const PlainShift shift = plain_shift(extent);
    if (near && divergence_row<T, PlainShift, Way::near>(row, extent, shift, kl, ce, &off_centre)) return;
    if (folds && !near && divergence_row<T, PlainShift, Way::far>(row, extent, shift, kl, ce, &off_centre)) return;
  } else if (near) {
    const ExactShift shift = exact_shift(extent.clean_max, extent.noised_max);
    if (divergence_row<T, ExactShift, Way::near>(row, extent, shift, kl, ce, &off_centre)) return;
  }
  // A centre of its own, as far as e^(a - clean_max) allows.
  const float clean_max = extent.clean_max + static_cast<float>(fabs(off_centre) <= 64 ? off_centre : 0);
  const ExactShift shift = exact_shift(clean_max, extent.noised_max);
  divergence_row<T, ExactShift, Way::careful>(row, extent, shift, kl, ce, &off_centre);
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
  for (int64_t begin = 0; begin < cols; begin += kBlock<float>) {
    const int64_t m = least(kBlock<float>, cols - begin);
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
  const RowSums sums = sums_of<T, MixtureShift, Way::careful>(a, b, next, row.clean_exp, row.noised_exp, n, shift);
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
