// Rows of a teacher's and a student's logits for one instruction set. Four passes over a row: maxima, sums of exponentials,
// terms of the divergence, gradients. All but the first find it in the second cache.
#include "core/distillation.h"
#include "cpu/loops.h"

namespace fastpost::cpu {
namespace {

// A row's scratch, `cols` of each: what the divergence's gradients are made of (core/distillation.h), both streams'
// probabilities, and the student's without a temperature.
template <class Share>
struct Scratch {
  Share *teacher_share, *student_share;
  float *teacher, *student, *task;
};

template <class Share>
Scratch<Share> scratch_of(const DistillationRow& row) {
  const int64_t n = row.cols;
  Share* shares = reinterpret_cast<Share*>(row.scratch);
  float* rest = reinterpret_cast<float*>(row.scratch + 2 * n);
  return {shares, shares + n, rest, rest + n, rest + 2 * n};
}

struct Extent {
  float teacher_max, student_max;
  bool teacher_lacks, student_lacks;  // a class that the other has
  bool meaningless;                   // NaN, +inf, or no class at all
};

Extent extent_of(const float* a, const float* b, int64_t n) {
  float teacher_max = -INFINITY, student_max = -INFINITY;
  int32_t teacher_lacks = 0, student_lacks = 0, undefined = 0;
#pragma omp simd reduction(max : teacher_max, student_max) reduction(| : teacher_lacks, student_lacks, undefined)
  for (int64_t i = 0; i < n; ++i) {
    const float x = a[i], y = b[i];
    teacher_max = x > teacher_max ? x : teacher_max;
    student_max = y > student_max ? y : student_max;
    const int32_t no_x = x == -INFINITY ? 1 : 0, no_y = y == -INFINITY ? 1 : 0;
    teacher_lacks |= no_x & ~no_y;
    student_lacks |= no_y & ~no_x;
    undefined |= (x < INFINITY ? 0 : 1) | (y < INFINITY ? 0 : 1);
  }
  return {teacher_max, student_max, teacher_lacks != 0, student_lacks != 0,
          undefined != 0 || teacher_max == -INFINITY || student_max == -INFINITY};
}

struct Sums {
  double teacher, student, excess;      // of e^(a - max), of e^(b - max), and their difference
  double teacher_delta, student_delta;  // of these times the differences, where both streams have the class
};

Sums sums_of(const float* a, const float* b, float* teacher_exp, float* student_exp, int64_t n, float teacher_max,
             float student_max, const TemperedShift shift) {
  const float scale = static_cast<float>(shift.scale);
  double teacher = 0, student = 0, excess = 0, teacher_delta = 0, student_delta = 0;
#pragma omp simd reduction(+ : teacher, student, excess, teacher_delta, student_delta)
  for (int64_t i = 0; i < n; ++i) {
    const float delta = centred(a[i], b[i], shift);
    const float ea = exp_nonpositive((a[i] - teacher_max) * scale);
    const float eb = exp_nonpositive((b[i] - student_max) * scale);
    teacher_exp[i] = ea;
    student_exp[i] = eb;
    teacher += ea;
    student += eb;
    excess += far_excess(delta, ea, eb);
    const float shared = select(fabsf(delta) < INFINITY, delta, 0.0f);
    teacher_delta += ea * shared;
    student_delta += eb * shared;
  }
  return {teacher, student, excess, teacher_delta, student_delta};
}

// The divergence, and E_p[g] and E_q[h]: means of the very floats that the gradients are made of, or a class that has nearly
// all of a stream would lose its digits.
struct Terms {
  double value, teacher_mean, student_mean;
  double log_normaliser;  // of the student's exponentials
};

template <Divergence kind, class Share = typename ShareOf<kind>::Type>
Terms terms_of(const float* a, const float* b, const Scratch<Share> s, int64_t n, const TemperedShift shift,
               double log_ratio, double above_centre, double below_centre, float teacher_scale, float student_scale,
               const Mixture mixture) {
  float *teacher = s.teacher, *student = s.student;
  Share *teacher_share = s.teacher_share, *student_share = s.student_share;
  double value = 0, teacher_sum = 0, student_sum = 0, teacher_mass = 0, student_mass = 0;
#pragma omp simd reduction(+ : value, teacher_sum, student_sum, teacher_mass, student_mass)
  for (int64_t i = 0; i < n; ++i) {
    const double delta = ((static_cast<double>(a[i]) - b[i]) - shift.centre) * shift.scale;
    const bool absent = (a[i] == -INFINITY) & (b[i] == -INFINITY);
    const float r = select(absent, 0.0f, static_cast<float>(delta - log_ratio));
    const float above = select(absent, 0.0f, static_cast<float>(delta - above_centre));
    const float below = select(absent, 0.0f, static_cast<float>(delta - below_centre));
    const float p = teacher[i] * teacher_scale, q = student[i] * student_scale;
    float term;
    Share own, other;
    divergence_share<kind>(r, above, below, p, q, mixture, &term, &own, &other);
    teacher[i] = p;
    student[i] = q;
    teacher_share[i] = own;
    student_share[i] = other;
    value += term;
    teacher_sum += own;
    student_sum += other;
    teacher_mass += p;
    student_mass += q;
  }
  return {value, teacher_sum / teacher_mass, student_sum / student_mass, 0};
}

// weight * share of the divergence + task_weight * task - uniform, as an operand. logits: the capped ones, or anything where
// slope is 0.
template <class T, class Share>
void gradient_of(T* out, const float* logits, const Share* share, const float* probability, double mean, float weight,
                 const float* task, float task_weight, float uniform, float slope, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float divergence = static_cast<float>(share[i] - static_cast<double>(probability[i]) * mean);
    out[i] = from_float<T>(before_cap(weight * divergence + (task_weight * task[i] - uniform), logits[i] * slope));
  }
}

template <class T>
void fill(T* x, int64_t n, float value) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = from_float<T>(value);
}

// Probabilities without a temperature; returns the log of their normaliser.
double softmax_of(const float* logits, float* probabilities, int64_t n) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = logits[i] > top ? logits[i] : top;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float e = exp_nonpositive(logits[i] - top);
    probabilities[i] = e;
    sum += e;
  }
  const float scale = static_cast<float>(1.0 / sum);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) probabilities[i] *= scale;
  return top + log(sum);
}

double mean_of(const float* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum / n;
}

template <Divergence kind, class Share = typename ShareOf<kind>::Type>
Terms divergence_of(const DistillationRow& row, const Scratch<Share>& s, const Extent& extent) {
  const TemperedShift shift = {static_cast<double>(extent.teacher_max) - extent.student_max, 1 / row.temperature};
  const Sums sums =
      sums_of(row.teacher, row.student, s.teacher, s.student, row.cols, extent.teacher_max, extent.student_max, shift);
  const bool near = fabs(sums.excess) < 0.5 * sums.student;
  const double log_ratio = near ? log1p(sums.excess / sums.student) : log(sums.teacher / sums.student);
  const Mixture mixture = mixture_of(row.beta);
  Terms terms = terms_of<kind>(row.teacher, row.student, s, row.cols, shift, log_ratio, sums.teacher_delta / sums.teacher,
                               sums.student_delta / sums.student, static_cast<float>(1 / sums.teacher),
                               static_cast<float>(1 / sums.student), mixture);
  const double most = kind == Divergence::js                ? most_of(row.beta)
                      : kind == Divergence::total_variation ? 1
                                                            : INFINITY;  // what rounding may not go beyond
  terms.value = terms.value < 0 ? 0 : terms.value > most ? most : terms.value;
  terms.log_normaliser = extent.student_max * shift.scale + log(sums.student);
  return terms;
}

bool is_infinite(Divergence divergence, const Extent& extent) {
  const bool forward = divergence == Divergence::forward_kl || divergence == Divergence::symmetric_kl;
  const bool reverse = divergence == Divergence::reverse_kl || divergence == Divergence::symmetric_kl;
  return (forward && extent.student_lacks) || (reverse && extent.teacher_lacks);
}

template <class T, Divergence kind>
void distillation_row(const DistillationRow& row, double* value, double* ce) {
  const int64_t n = row.cols;
  const auto s = scratch_of<typename ShareOf<kind>::Type>(row);
  T* grad_teacher = static_cast<T*>(row.grad_teacher);
  T* grad_student = static_cast<T*>(row.grad_student);
  const bool diverges = row.weight != 0, labelled = row.ce_weight != 0;
  Terms terms = {};
  *value = *ce = 0;
  if (diverges) {
    const Extent extent = extent_of(row.teacher, row.student, n);
    if (extent.meaningless || is_infinite(kind, extent))
      *value = extent.meaningless ? NAN : INFINITY;
    else
      *value = (terms = divergence_of<kind>(row, s, extent)).value;
  }
  const bool defined = *value < INFINITY;
  float* task = s.student;
  if (labelled) {
    if (diverges && defined && row.temperature == 1) {
      *ce = terms.log_normaliser;
    } else {
      task = s.task;
      *ce = softmax_of(row.student, task, n);
    }
    *ce -= row.student[row.label];
  }
  const double label_log = -*ce;  // log-probability
  if (labelled && row.smoothing != 0) *ce += row.smoothing * (row.student[row.label] - mean_of(row.student, n));
  if (!defined || !(diverges || labelled)) {
    const float nothing = defined ? 0.0f : NAN;
    if (grad_teacher != nullptr) fill(grad_teacher, n, nothing);
    if (grad_student != nullptr) fill(grad_student, n, nothing);
    return;
  }
  const float weight = static_cast<float>(row.weight / row.temperature), ce_weight = static_cast<float>(row.ce_weight);
  const double uniform = labelled ? row.ce_weight * row.smoothing / n : 0;
  if (grad_student != nullptr) {
    const float slope = static_cast<float>(row.student_cap != 0 ? 1 / row.student_cap : 0);
    const float u = labelled && slope != 0 ? row.student[row.label] * slope : 0.0f;  // gradients may overwrite it
    const float* logits = slope != 0 ? row.student : task;                           // -inf times 0 would be NaN
    if (diverges)
      gradient_of(grad_student, logits, s.student_share, s.student, terms.student_mean, weight, task, ce_weight,
                  static_cast<float>(uniform), slope, n);
    else
      gradient_of(grad_student, logits, task, task, 0, 0.0f, task, ce_weight, static_cast<float>(uniform), slope, n);
    if (labelled) {
      const int64_t i = row.label;
      const float divergence = diverges ? static_cast<float>(s.student_share[i] - s.student[i] * terms.student_mean) : 0.0f;
      // p - 1 + smoothing - uniform, with all the digits of p - 1
      const float labelled_part = static_cast<float>(row.ce_weight * (expm1(label_log) + row.smoothing) - uniform);
      grad_student[i] = from_float<T>(before_cap((diverges ? weight * divergence : 0.0f) + labelled_part, u));
    }
  }
  if (grad_teacher == nullptr) return;
  if (!diverges) return fill(grad_teacher, n, 0.0f);
  const float slope = static_cast<float>(row.teacher_cap != 0 ? 1 / row.teacher_cap : 0);
  gradient_of(grad_teacher, slope != 0 ? row.teacher : s.teacher, s.teacher_share, s.teacher, terms.teacher_mean, weight,
              s.teacher, 0.0f, 0.0f, slope, n);
}

template <class T>
void row_of(const DistillationRow& row, double* value, double* ce) {
  switch (row.divergence) {
    case Divergence::forward_kl:
      return distillation_row<T, Divergence::forward_kl>(row, value, ce);
    case Divergence::reverse_kl:
      return distillation_row<T, Divergence::reverse_kl>(row, value, ce);
    case Divergence::symmetric_kl:
      return distillation_row<T, Divergence::symmetric_kl>(row, value, ce);
    case Divergence::js:
      return distillation_row<T, Divergence::js>(row, value, ce);
    case Divergence::total_variation:
      return distillation_row<T, Divergence::total_variation>(row, value, ce);
  }
}

void distillation(DType dtype, const DistillationRow& row, double* value, double* ce) {
  with_dtype(dtype, [&](auto t) { row_of<decltype(t)>(row, value, ce); });
}

}  // namespace

extern const DistillationLoops FASTPOST_PASTE(distillation_loops_, FASTPOST_ISA);
const DistillationLoops FASTPOST_PASTE(distillation_loops_, FASTPOST_ISA) = {distillation};

}  // namespace fastpost::cpu
