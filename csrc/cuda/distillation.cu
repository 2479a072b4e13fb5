// Rows of a teacher's and a student's logits on CUDA. A wide row is read by one block: once for all sums, which say what a
// KL is, and once for the gradients; in between once more for what the sums do not say: the terms of Jensen-Shannon and of
// total variation, and a KL's mean for a teacher that has gradients. Narrow rows are a warp's work.
#include <stdexcept>

#include "api.h"
#include "cuda/distillation_loops.cuh"
#include "cuda/launch.cuh"
#include "cuda/narrow_rows.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/row_task.cuh"

namespace fastpost::cuda {
namespace {

// What is asked of all rows.
struct Distillation {
  LogitRows teacher, student, grad_teacher, grad_student;
  int64_t rows, cols;
  const int64_t* labels;
  int64_t ignore_index;
  const double *weights, *ce_weights;  // without weights no row has a divergence
  double *value, *ce;
  FDivergence divergence;
  double temperature, teacher_slope, student_slope;
  double smoothing, value_smoothing;  // of the cross-entropy's gradient, and of its value
  double student_share;               // what the divergence's gradient to the student is multiplied by
};

// What is asked of a row.
struct Asked {
  double weight, ce_weight;  // 0: not wanted
  int64_t label;
  bool bad_label;
};

__device__ __forceinline__ Asked asked_of(const Distillation& d, int64_t row) {
  Asked asked{d.weights == nullptr ? 0 : d.weights[row], 0, 0, false};
  if (d.labels == nullptr || d.labels[row] == d.ignore_index) return asked;
  asked.label = d.labels[row];
  asked.ce_weight = d.ce_weights == nullptr ? 1.0 : d.ce_weights[row];
  asked.bad_label = asked.ce_weight != 0 && (asked.label < 0 || asked.label >= d.cols);
  if (asked.bad_label) asked.ce_weight = 0;
  return asked;
}

__device__ __forceinline__ bool is_infinite(const FDivergence& how, bool teacher_lacks, bool student_lacks) {
  return (how.forward != 0 && student_lacks) || (how.reverse != 0 && teacher_lacks);
}

// Whether a KL, which is a mean of differences less a number, is next to nothing beside either.
__device__ __forceinline__ bool is_far(double mean, double kl) { return !(fabs(mean) <= 8 * fmax(kl, 1.0)); }

// NaN stays NaN.
__device__ __forceinline__ double bounded(double value, double most) { return value < 0 ? 0 : value > most ? most : value; }

// The cross-entropy's gradient at the label, short of its uniform part: p - 1 + smoothing with all the digits of p - 1.
__device__ __forceinline__ double at_label(const Asked& asked, double minus_log, double smoothing) {
  return asked.ce_weight * (expm1(-minus_log) + smoothing);
}

// -- wide rows
// --------------------------------------------------------------------------------------------------------------

// Whose sums are next: of both streams, or of the student against itself without a temperature, for its cross-entropy.
enum class Sums : int { both, student, none };

// A row's work, in shared memory: registers are for the loops.
struct DistillationWork {
  Asked asked;
  float student_label;  // the label's logit, read before a gradient may overwrite it
  Start start;
  Sums sums;
  bool finds_tops;  // these sums are taken again, less the largest logits
  double value, minus_log, student_sum;
  bool undefined;  // there is no divergence
  bool has_terms;  // they are summed up in a reading of their own
  Comparison row;
  double terms[5][kWarps];
};

__device__ __forceinline__ void set_up(DistillationWork& work, const Distillation& d, int64_t row) {
  work = {};
  work.asked = asked_of(d, row);
  const bool labelled = work.asked.ce_weight != 0;
  work.sums = work.asked.weight != 0 ? Sums::both : labelled ? Sums::student : Sums::none;
  work.row.task_unit = FLT_MAX;  // nothing
  work.row.label = -1;
  work.row.teacher_slope = static_cast<float>(d.teacher_slope);
  work.row.student_slope = static_cast<float>(d.student_slope);
  work.row.weight = static_cast<float>(work.asked.weight / d.temperature);
  work.row.student_weight = static_cast<float>(d.student_share) * work.row.weight;
  if (!labelled) return;
  work.row.flat = static_cast<float>(work.asked.ce_weight * d.smoothing / d.cols);
  work.student_label = row_of<float>(d.student, row)[work.asked.label];
}

// 1 / sum as a factor of exponentials in these units, of which the sum has a part.
__device__ __forceinline__ void scale_by(double sum, float unit, double weight, float* to_unit, float* to_scale) {
  const double part = exponent_of(sum);
  *to_unit = static_cast<float>(unit + part);
  *to_scale = static_cast<float>(weight * (power_of_two(part) / sum));
}

// The student's cross-entropy, from sums without a temperature.
__device__ __forceinline__ void classify(DistillationWork& work, const RowPart& sums, const RowMeaning& row,
                                         double smoothing) {
  if (work.asked.ce_weight == 0) return;
  // The origin and the label's logit first: both may be too large for a logarithm next to them to keep its digits.
  const double origin = work.start.noised_origin;
  work.minus_log = row.log_noised + (origin - work.student_label);
  scale_by(row.noised, sums.unit, work.asked.ce_weight, &work.row.task_unit, &work.row.task_scale);
  work.row.task_origin = work.start.noised_origin;
  work.row.label = work.asked.label;
  work.row.label_task = static_cast<float>(at_label(work.asked, work.minus_log, smoothing)) - work.row.flat;
}

// On one thread: what the sums come to, and which are next.
__device__ __forceinline__ void judge(DistillationWork& work, const Distillation& d, const RowPart& sums,
                                      const RowMeaning& row, const Scale& scale, const Room& room) {
  const bool both = work.sums == Sums::both;
  const FDivergence& how = d.divergence;
  const bool has_classes = row.noised > 0 && row.clean > 0;
  work.finds_tops = !room.undefined && !work.start.given && (room.huge || !has_classes);
  if (work.finds_tops) {
    work.start.given = work.start.careful = work.start.huge = true;
    return;
  }
  const bool undefined = room.undefined || !has_classes;
  const bool infinite = both && is_infinite(how, room.clean_lacks, room.noised_lacks);
  const bool defined = !undefined && !infinite;
  if (defined && both && !work.start.given && row.off_centre) {
    work.start.given = true;
    work.start.unit = sums.unit;
    work.start.clean_unit = sums.clean_unit;
    work.start.centre = static_cast<float>(sums.centre + row.noised_mean * d.temperature);
    return;
  }
  const bool plain = d.temperature == 1 || !both;
  if (defined && plain) classify(work, sums, row, d.smoothing);
  if (both) {
    work.undefined = !defined;
    work.value = undefined ? NAN : INFINITY;
  } else if (!defined) {
    work.minus_log = work.row.task_scale = NAN;
  }
  if (defined && both) {
    Comparison& c = work.row;
    c.inverse = scale.inverse;
    c.log2e = scale.log2e;
    c.teacher_origin = work.start.clean_origin;
    c.student_origin = work.start.noised_origin;
    const double temperature = 1.0 / scale.inverse;  // of the sums, or a far centre would not cancel
    c.equal.set(sums.centre + row.log_ratio * temperature);
    c.above.set(sums.centre + row.clean_mean * temperature);
    c.below.set(sums.centre + row.noised_mean * temperature);
    scale_by(row.clean, sums.clean_unit, 1, &c.teacher_unit, &c.teacher_scale);
    scale_by(row.noised, sums.unit, 1, &c.student_unit, &c.student_scale);
    // What is not asked for may be infinite.
    const double forward = how.forward != 0 ? row.clean_kl : 0, reverse = how.reverse != 0 ? row.noised_kl : 0;
    work.value = bounded(forward + reverse, how.most);
    // A KL's gradient to the teacher wants the mean of r where classes weigh p, from the very floats that it is made of:
    // they may all be far from the sums' centre, which is where the student has its weight. There values lose digits, too.
    const bool far = (how.forward != 0 && (d.grad_teacher.address != nullptr || is_far(row.clean_mean, row.clean_kl))) ||
                     (how.reverse != 0 && is_far(row.noised_mean, row.noised_kl));
    work.has_terms = how.family != Family::kl || far;
  }
  work.start = {};
  work.sums = both && work.asked.ce_weight != 0 && !(defined && plain) ? Sums::student : Sums::none;
}

__device__ __forceinline__ void judge_terms(DistillationWork& work, const FDivergence& how) {
  double sum[5] = {};
  for (int k = 0; k < 5; ++k)
    for (int w = 0; w < kWarps; ++w) sum[k] += work.terms[k][w];
  work.value = bounded(sum[0], how.most);
  work.row.teacher_mean.set(sum[1] / sum[3]);
  work.row.student_mean.set(sum[2] / sum[4]);
}

// Blocks that share a multiprocessor: what registers hold without a stack, and on sm_120 what its shared memory holds.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kWideBlocks = 2;
#else
constexpr int kWideBlocks = 3;
#endif

// One block, one row. Without a divergence the student stands in for the teacher.
template <class O>
__global__ void __launch_bounds__(kRowThreads, kWideBlocks)
    wide_distillation_kernel(const __grid_constant__ Distillation d, int64_t first) {
  __shared__ Room room;
  __shared__ DistillationWork work;
  const int64_t row = first + blockIdx.x;
  const float* b = row_of<float>(d.student, row);
  if (threadIdx.x == 0) set_up(work, d, row);
  __syncthreads();
#pragma unroll 1
  for (;;) {
    const Sums next = uniform(work.sums);
    if (next == Sums::none) break;
    if (threadIdx.x == 0) room.clear();
    __syncthreads();
    const float* a = next == Sums::both ? row_of<float>(d.teacher, row) : b;
    const double inverse = next == Sums::both ? 1 / d.temperature : 1;
    const Scale scale{static_cast<float>(inverse), static_cast<float>(kLog2e * inverse)};
    const RowPart sums = gathered(part_of(a, b, d.cols, scale, work.start, room), scale, room);
    if (threadIdx.x < kWarp) {
      const RowMeaning meaning = meaning_by_warp(sums, scale);
      if (threadIdx.x == 0) judge(work, d, sums, meaning, scale, room);
    }
    __syncthreads();
    if (uniform(work.finds_tops)) {
      const Seed top = tops_of(a, b, d.cols, room);
      if (threadIdx.x == 0) {
        work.start.clean_origin = top.clean;
        work.start.noised_origin = top.noised;
      }
      __syncthreads();
    }
  }
  const bool diverges = uniform(work.asked.weight != 0), labelled = uniform(work.asked.ce_weight != 0);
  const bool defined = !uniform(work.undefined);
  const float* a = diverges ? row_of<float>(d.teacher, row) : b;
  const bool has_terms = uniform(work.has_terms);
  if (has_terms) {
    TermSums terms;
    with_family(d.divergence.family, [&](auto family) {
      terms = sum_terms<decltype(family)::value>(a, b, d.cols, work.row, d.divergence, room.ahead);
    });
    const double all[5] = {terms.value, terms.teacher, terms.student, terms.teacher_mass, terms.student_mass};
#pragma unroll
    for (int k = 0; k < 5; ++k) {
      const double sum = warp_sum(all[k]);
      if (threadIdx.x % kWarp == 0) work.terms[k][threadIdx.x / kWarp] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) judge_terms(work, d.divergence);
    __syncthreads();
  }
  if (labelled && d.value_smoothing != 0) {  // its value wants the mean of the logits
    double sum = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < d.cols; i += kRowThreads) sum += b[i];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) work.terms[0][threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int w = 0; w < kWarps; ++w) work.student_sum += work.terms[0][w];
  }
  O* grad_a = row_of<O>(d.grad_teacher, row);
  O* grad_b = row_of<O>(d.grad_student, row);
  if (!defined || !(diverges || labelled)) {
    __syncthreads();  // all have read what gradients may overwrite
    fill(grad_a, d.cols, defined ? 0.0f : NAN);
    fill(grad_b, d.cols, defined ? 0.0f : NAN);
  } else if (grad_a != nullptr || grad_b != nullptr) {
    __syncthreads();
    O* const to_teacher = diverges ? grad_a : nullptr;
    if (!diverges) fill(grad_a, d.cols, 0.0f);
    with_family(d.divergence.family, [&](auto family) {
      write_gradients<decltype(family)::value>(a, b, to_teacher, grad_b, d.cols, work.row, d.divergence, !has_terms,
                                               room.ahead);
    });
  }
  if (threadIdx.x == 0) {
    if (d.value != nullptr) d.value[row] = work.value;
    double ce = work.minus_log;
    if (labelled && d.value_smoothing != 0) ce += d.value_smoothing * (work.student_label - work.student_sum / d.cols);
    if (d.ce != nullptr) d.ce[row] = work.asked.bad_label ? NAN : ce;
  }
}

// -- narrow rows
// ------------------------------------------------------------------------------------------------------------

// What all lanes know of a narrow row.
struct NarrowRow {
  float teacher_max, student_max;
  double inverse, centre, log_ratio, teacher_sum, student_sum;
  double above, below;  // the means of r, where classes weigh p and q
  double plain_sum;     // of the student's exponentials without a temperature
};

__device__ __forceinline__ double delta_of(float a, float b, const NarrowRow& n) {
  return (static_cast<double>(a) - b - n.centre) * n.inverse;
}

__device__ __forceinline__ double exp_of(float x, float top, double inverse) {
  return exp((static_cast<double>(x) - top) * inverse);
}

__device__ __forceinline__ Pair compare(float a, float b, const NarrowRow& n) {
  const bool exists = !(a == b && b == -INFINITY);
  const double difference = exists ? delta_of(a, b, n) - n.log_ratio : 0;
  const double r = fmin(fmax(difference, -double{kMostLog}), double{kMostLog});
  return {static_cast<float>(r), static_cast<float>(r - n.above), static_cast<float>(r - n.below),
          static_cast<float>(exp_of(a, n.teacher_max, n.inverse) / n.teacher_sum),
          static_cast<float>(exp_of(b, n.student_max, n.inverse) / n.student_sum)};
}

template <class O>
__global__ void __launch_bounds__(kNarrowThreads, 2) narrow_distillation_kernel(const __grid_constant__ Distillation d) {
  const int lane = threadIdx.x % kWarp;
  constexpr int warps = kNarrowThreads / kWarp;
  const FDivergence& how = d.divergence;
#pragma unroll 1
  for (int64_t row = int64_t{blockIdx.x} * warps + threadIdx.x / kWarp; row < d.rows; row += int64_t{gridDim.x} * warps) {
    const Asked asked = asked_of(d, row);
    const bool diverges = asked.weight != 0, labelled = asked.ce_weight != 0;
    const float* b = row_of<float>(d.student, row);
    const float* a = diverges ? row_of<float>(d.teacher, row) : b;
    const float label_logit = labelled ? b[asked.label] : 0.0f;
    NarrowRow n = {-INFINITY, -INFINITY, 1 / d.temperature, 0, 0, 0, 0, 0, 0, 0};
    bool bad = false, bad_student = false, teacher_lacks = false, student_lacks = false;
    double logits = 0;
    if (diverges || labelled) {
#pragma unroll 1
      for (int64_t i = lane; i < d.cols; i += kWarp) {
        const float x = a[i], y = b[i];
        n.teacher_max = fmaxf(n.teacher_max, x);
        n.student_max = fmaxf(n.student_max, y);
        bad = bad || !(x < INFINITY) || !(y < INFINITY);
        bad_student = bad_student || !(y < INFINITY);
        teacher_lacks = teacher_lacks || (x == -INFINITY && y > -INFINITY);
        student_lacks = student_lacks || (y == -INFINITY && x > -INFINITY);
        logits += y;
      }
    }
    n.teacher_max = warp_max(n.teacher_max);
    n.student_max = warp_max(n.student_max);
    bad = __any_sync(0xffffffffu, bad) || n.teacher_max == -INFINITY || n.student_max == -INFINITY;
    bad_student = __any_sync(0xffffffffu, bad_student) || n.student_max == -INFINITY;
    const bool infinite = is_infinite(how, __any_sync(0xffffffffu, teacher_lacks), __any_sync(0xffffffffu, student_lacks));
    const bool compares = diverges && !bad && !infinite;
    n.centre = static_cast<double>(n.teacher_max) - n.student_max;
    double excess = 0, teacher_delta = 0, student_delta = 0;
    if (compares || labelled) {
#pragma unroll 1
      for (int64_t i = lane; i < d.cols; i += kWarp) {
        const float x = a[i], y = b[i];
        if (compares) {
          const double delta = delta_of(x, y, n), ea = exp_of(x, n.teacher_max, n.inverse);
          const double eb = exp_of(y, n.student_max, n.inverse);
          n.teacher_sum += ea;
          n.student_sum += eb;
          excess += fabs(delta) < 0.5 ? eb * expm1(delta) : ea - eb;
          if (fabs(delta) < INFINITY) {
            teacher_delta += ea * delta;
            student_delta += eb * delta;
          }
        }
        if (labelled) n.plain_sum += exp_of(y, n.student_max, 1);
      }
    }
    n.teacher_sum = warp_sum(n.teacher_sum);
    n.student_sum = warp_sum(n.student_sum);
    n.plain_sum = warp_sum(n.plain_sum);
    const double growth = warp_sum(excess) / n.student_sum;
    n.log_ratio = fabs(growth) < 0.5 ? log1p(growth) : log(n.teacher_sum / n.student_sum);
    n.above = warp_sum(teacher_delta) / n.teacher_sum - n.log_ratio;
    n.below = warp_sum(student_delta) / n.student_sum - n.log_ratio;
    TermSums sums = {};
    double teacher_mean = 0, student_mean = 0;
    if (compares) {
      with_family(how.family, [&](auto family) {
#pragma unroll 1
        for (int64_t i = lane; i < d.cols; i += kWarp) {
          const Pair pair = compare(a[i], b[i], n);
          float term;
          ShareIn<decltype(family)::value> teacher, student;
          share_of<decltype(family)::value>(pair, how, &term, &teacher, &student);
          sums.value += term;
          sums.teacher += teacher;
          sums.student += student;
          sums.teacher_mass += pair.p;
          sums.student_mass += pair.q;
        }
      });
      teacher_mean = warp_sum(sums.teacher) / warp_sum(sums.teacher_mass);
      student_mean = warp_sum(sums.student) / warp_sum(sums.student_mass);
    }
    double value = bounded(warp_sum(sums.value), how.most);
    if (diverges && !compares) value = bad ? NAN : INFINITY;
    double ce = 0;
    if (labelled) ce = bad_student ? NAN : log(n.plain_sum) + (static_cast<double>(n.student_max) - label_logit);
    const double flat = labelled ? asked.ce_weight * d.smoothing / d.cols : 0, minus_log = ce;
    if (labelled && d.value_smoothing != 0) ce += d.value_smoothing * (label_logit - warp_sum(logits) / d.cols);
    O* grad_a = row_of<O>(d.grad_teacher, row);
    O* grad_b = row_of<O>(d.grad_student, row);
    const double weight = asked.weight / d.temperature;
    const auto before = [](double gradient, float logit, double slope) {
      return slope == 0 ? gradient : before_cap(gradient, logit * slope);
    };
    __syncwarp();  // the label's logit has been read by all lanes before a gradient may take its place
    with_family(how.family, [&](auto family) {
#pragma unroll 1
      for (int64_t i = lane; i < d.cols; i += kWarp) {
        double to_teacher = 0, to_student = 0;
        if (compares) {
          const float x = a[i], y = b[i];
          const Pair pair = compare(x, y, n);
          float term;
          ShareIn<decltype(family)::value> teacher, student;
          share_of<decltype(family)::value>(pair, how, &term, &teacher, &student);
          to_teacher = before(weight * (teacher - pair.p * teacher_mean), x, d.teacher_slope);
          to_student = d.student_share * weight * (student - pair.q * student_mean);
        }
        if (labelled) {
          const double task = asked.ce_weight * exp_of(b[i], n.student_max, 1) / n.plain_sum;
          to_student += (i == asked.label ? at_label(asked, minus_log, d.smoothing) : task) - flat;
        }
        if (compares || labelled) to_student = before(to_student, b[i], d.student_slope);
        if (how.sums != 0) to_student += to_teacher;
        if (diverges && !compares) to_teacher = to_student = NAN;
        if (grad_a != nullptr) grad_a[i] = from_float<O>(static_cast<float>(to_teacher));
        if (grad_b != nullptr) grad_b[i] = from_float<O>(static_cast<float>(to_student));
      }
    });
    if (lane == 0) {
      if (d.value != nullptr) d.value[row] = value;
      if (d.ce != nullptr) d.ce[row] = asked.bad_label ? NAN : ce;
    }
  }
}

FDivergence divergence_of(Divergence kind, double beta) {
  FDivergence found = {Family::kl, 0, 0, {}, INFINITY, 0};
  if (kind == Divergence::forward_kl || kind == Divergence::symmetric_kl) found.forward = 1;
  if (kind == Divergence::reverse_kl || kind == Divergence::symmetric_kl) found.reverse = 1;
  if (kind == Divergence::total_variation) {
    found.family = Family::total_variation;
    found.most = 1;
  } else if (kind == Divergence::js) {
    found.family = Family::js;
    found.mixture = mixture_of(beta);
    found.most = most_of(beta);
  }
  return found;
}

double slope_of(double cap) { return cap != 0 ? 1 / cap : 0; }

void launch(const Call& call, DType operand_dtype, const Distillation& work) {
  with_operand_dtype("rows of a distillation", operand_dtype, [&](auto t) {
    using O = decltype(t);
    launch_rows(call, work.rows, work.cols, narrow_distillation_kernel<O>, wide_distillation_kernel<O>, work);
  });
}

}  // namespace

void distillation_rows(const LogitRows& teacher, const LogitRows& student, const LogitRows& grad_teacher,
                       const LogitRows& grad_student, DType operand_dtype, int64_t rows, int64_t cols, const int64_t* labels,
                       int64_t ignore_index, const double* weights, const double* ce_weights, const DistillationOptions& how,
                       double* value, double* ce, int device, void* stream) {
  const Call call("distillation_rows", device, stream);
  launch(call, operand_dtype,
         {teacher, student, grad_teacher, grad_student, rows, cols, labels, ignore_index, weights, ce_weights, value, ce,
          divergence_of(how.divergence, how.beta), how.temperature, slope_of(how.teacher_cap), slope_of(how.student_cap),
          how.smoothing, how.smoothing, 1});
}

// The noised stream is the teacher: the mixture's halves are the same, and the student has the cross-entropy.
void js_operand_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& first, const LogitRows& second,
                     DType operand_dtype, int64_t rows, int64_t cols, const int64_t* labels, int64_t ignore_index,
                     const double* kl_weights, const double* ce_weights, const OperandOptions& how, double* kl, double* ce,
                     int device, void* stream) {
  const Call call("js_operand_rows", device, stream);
  if (how.noised_classifies)
    throw std::invalid_argument("js_operand_rows: CUDA has no cross-entropy of the noised stream beside this divergence");
  Distillation work = {noised,
                       clean,
                       second,
                       first,
                       rows,
                       cols,
                       labels,
                       ignore_index,
                       kl_weights,
                       ce_weights,
                       kl,
                       ce,
                       divergence_of(Divergence::js, 0.5),
                       1,
                       slope_of(how.cap),
                       slope_of(how.cap),
                       how.smoothing,
                       0,
                       how.teaches ? 1.0 : 0.0};
  work.divergence.sums = first.address != nullptr && second.address != nullptr ? 1 : 0;
  if (how.teaches || first.address == nullptr || second.address != nullptr) return launch(call, operand_dtype, work);
  // The first operand is the cross-entropy's gradient, as if there were no divergence, even where that is undefined.
  work.grad_student.address = nullptr;
  launch(call, operand_dtype, work);
  work.grad_student = first;
  work.weights = nullptr;
  work.value = nullptr;
  launch(call, operand_dtype, work);
}

}  // namespace fastpost::cuda
