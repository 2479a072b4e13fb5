// Rows of a student's logits beside k classes of a teacher (core/top_k.h) for one instruction set. The known classes' logits
// are put aside and become -inf; of the rest there are three passes: the maximum, the sum of exponentials, the gradient. All
// but the first find the row in the second cache. Labels at another temperature than 1 sum exponentials once more, and label
// smoothing sums logits.
#include "core/top_k.h"
#include "cpu/loops.h"

namespace fastpost::cpu {
namespace {

float top_of(const float* z, int64_t n) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = z[i] > top ? z[i] : top;
  return top;
}

double exponentials_of(const float* z, float* out, int64_t n, float top, float scale) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float e = exp_nonpositive((z[i] - top) * scale);
    out[i] = e;
    sum += e;
  }
  return sum;
}

double total_of(const float* z, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += z[i];
  return sum;
}

// What the rest's classes get by their exponentials. logits: the capped ones, or anything where slope is 0.
template <class T>
void gradient_of(T* out, const float* logits, const float* rest, float rest_scale, const float* task, float task_scale,
                 float uniform, float slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    out[i] = from_float<T>(before_cap(rest_scale * rest[i] + (task_scale * task[i] - uniform), logits[i] * slope));
}

template <class T>
void fill(T* x, int64_t n, float value) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = from_float<T>(value);
}

double most_of(const double* x, int64_t n) {
  double most = -INFINITY;
  for (int64_t j = 0; j < n; ++j) most = x[j] > most ? x[j] : most;
  return most;
}

// The log of the sum of a few exponentials of (x - centre) * scale.
double log_sum_of(const double* x, int64_t n, double centre, double scale) {
  const double most = (most_of(x, n) - centre) * scale;
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += exp_less((x[j] - centre) * scale, most);
  return log_sum(most, sum);
}

// Puts the known classes' logits aside. Returns whether one of them is NaN, no class of the vocabulary, or there twice.
bool put_aside(const TopKRow& row, double* logits) {
  bool bad = false;
  for (int64_t j = 0; j < row.classes; ++j) {
    const bool known = row.log_probs[j] > -INFINITY, inside = row.ids[j] >= 0 && row.ids[j] < row.cols;
    bad = bad || (known && !inside);
    logits[j] = known && inside ? row.logits[row.ids[j]] : -INFINITY;
    bad = bad || logits[j] != logits[j];  // comparisons would pass over it
  }
  const auto is_here = [&](int64_t j) { return row.log_probs[j] > -INFINITY && row.ids[j] >= 0 && row.ids[j] < row.cols; };
  for (int64_t j = 0; j < row.classes; ++j)
    if (is_here(j)) row.logits[row.ids[j]] = bits_float(static_cast<uint32_t>(j));
  for (int64_t j = 0; j < row.classes; ++j) {
    if (!is_here(j)) continue;
    float& logit = row.logits[row.ids[j]];
    bad = bad || float_bits(logit) != static_cast<uint32_t>(j);  // a later place has the same class
    logit = -INFINITY;
  }
  return bad;
}

template <class T>
void top_k_row(const TopKRow& row, double* value, double* ce) {
  const int64_t n = row.cols, k = row.classes;
  const TopKOptions& how = row.how;
  T* grad = static_cast<T*>(row.grad);
  *value = *ce = 0;
  if (row.weight == 0 && row.ce_weight == 0) {
    if (grad != nullptr) fill(grad, n, 0.0f);
    return;
  }
  const double inverse = 1 / how.temperature, ce_weight = row.labelled ? row.ce_weight : 0;
  const double label_logit = row.labelled ? row.logits[row.label] : 0;
  const double mean = row.labelled && how.smoothing != 0 ? total_of(row.logits, n) / static_cast<double>(n) : 0;
  double* known = row.known;
  const bool bad = put_aside(row, known);

  // The rest's exponentials, less the largest: at the temperature, and without one for the cross-entropy.
  const bool apart = row.labelled && how.temperature != 1, rest_counts = how.has_rest || row.labelled;
  float *rest = row.scratch, *task = apart ? row.scratch + n : rest;
  double sum = 0, plain = 0;
  const float most = rest_counts ? top_of(row.logits, n) : -INFINITY, top = most == -INFINITY ? 0.0f : most;
  if (rest_counts) sum = exponentials_of(row.logits, rest, n, top, static_cast<float>(inverse));
  plain = apart ? exponentials_of(row.logits, task, n, top, 1.0f) : sum;

  const double centre = centre_of(most_of(known, k), most), from_centre = top - centre;
  const double rest_log = how.has_rest ? from_centre * inverse + log(sum) : -INFINITY;
  const double total = log_sum_of_two(log_sum_of(known, k, centre, inverse), rest_log);
  const double teacher_total = log_sum_of(row.log_probs, k, 0, 1);
  const auto log_q = [&](int64_t j) { return (known[j] - centre) * inverse - total; };
  const KnownTeacher teacher =
      known_teacher(teacher_total, how.has_rest, row.teacher_has_rest ? row.log_probs + k : nullptr, rest_log);
  const double student_rest = rest_log - total;
  double slopes = 0, term, slope;
  for (int64_t j = 0; j < k + (how.has_rest ? 1 : 0); ++j) {
    const double log_p = j < k ? row.log_probs[j] - teacher.shift : teacher.rest;
    class_share(how.divergence, how.beta, log_p, j < k ? log_q(j) : student_rest, &term, &slope);
    *value += term;
    slopes += slope;
  }
  *value = *value < 0 ? 0 : *value;
  if (bad || !is_meaningful(total) || !is_meaningful(teacher_total) || !(teacher.rest < INFINITY)) *value = NAN;
  double plain_total = 0, minus_log = 0;
  if (row.labelled) {
    plain_total = log_sum_of_two(log_sum_of(known, k, centre, 1), from_centre + log(plain));
    minus_log = bad || !is_meaningful(plain_total) ? NAN : plain_total - (label_logit - centre);
    *ce = minus_log + (how.smoothing != 0 ? how.smoothing * (label_logit - mean) : 0);
  }
  if (grad == nullptr) return;
  const bool taught = row.weight != 0;
  if ((taught && !(*value < INFINITY)) || (ce_weight != 0 && minus_log != minus_log)) return fill(grad, n, NAN);

  const double each = row.weight * inverse, uniform = ce_weight * how.smoothing / static_cast<double>(n);
  const auto to_class = [&](double log_p, double log_q) {
    return taught ? each * class_gradient(how.divergence, how.beta, log_p, log_q, slopes) : 0.0;
  };
  const double to_rest = how.has_rest ? to_class(teacher.rest, student_rest) : 0;
  const double rest_scale = to_rest == 0 ? 0 : to_rest / sum;
  const double task_scale = ce_weight == 0 || plain == 0 ? 0 : ce_weight * exp(from_centre - plain_total);
  const double at_label = ce_weight * (expm1(-minus_log) + how.smoothing) - uniform;
  const double label_rest = ce_weight != 0 && rest_scale != 0 ? rest_scale * exp((label_logit - top) * inverse) : 0;
  const auto before = [&](double gradient, double logit) {
    return from_float<T>(
        static_cast<float>(how.cap == 0 || gradient == 0 ? gradient : before_cap(gradient, logit / how.cap)));
  };
  if (rest_counts) {
    const float slope_of_cap = static_cast<float>(how.cap != 0 ? 1 / how.cap : 0);
    const float* logits = how.cap != 0 ? row.logits : rest;  // -inf times 0 would be NaN
    gradient_of(grad, logits, rest, static_cast<float>(rest_scale), task, static_cast<float>(task_scale),
                static_cast<float>(uniform), slope_of_cap, n);
  } else {
    fill(grad, n, 0.0f);
  }
  if (ce_weight != 0) grad[row.label] = before(label_rest + at_label, label_logit);
  for (int64_t j = 0; j < k; ++j) {
    if (!(row.log_probs[j] > -INFINITY)) continue;
    const double of_task = ce_weight == 0            ? 0
                           : row.ids[j] == row.label ? at_label
                                                     : ce_weight * exp(known[j] - centre - plain_total) - uniform;
    if (row.ids[j] >= 0 && row.ids[j] < n)
      grad[row.ids[j]] = before(to_class(row.log_probs[j] - teacher.shift, log_q(j)) + of_task, known[j]);
  }
}

void top_k(DType dtype, const TopKRow& row, double* value, double* ce) {
  with_dtype(dtype, [&](auto t) { top_k_row<decltype(t)>(row, value, ce); });
}

}  // namespace

extern const TopKLoops FASTPOST_PASTE(top_k_loops_, FASTPOST_ISA);
const TopKLoops FASTPOST_PASTE(top_k_loops_, FASTPOST_ISA) = {top_k};

}  // namespace fastpost::cpu
