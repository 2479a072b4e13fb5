// Rows of a student's logits beside k classes of a teacher (core/top_k.h), a block each. The known classes' logits are put
// aside and become -inf, so that what is left is the rest's. Then the row is read once for the sums of its exponentials and,
// where gradients are wanted, once more to write them; those of the known classes come last. Label smoothing sums the logits
// in one more reading.
#include <cfloat>

#include "api.h"
#include "core/top_k.h"
#include "cuda/fast_math.cuh"
#include "cuda/launch.cuh"
#include "cuda/row_gradients.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/row_task.cuh"
#include "cuda/row_tiles.cuh"

namespace fastpost::cuda {
namespace {

struct TopK {
  LogitRows logits, grad;
  int64_t cols;
  TopKTeacher teacher;
  float* known_logits;  // (rows, k): where they are put aside
  const int64_t* labels;
  int64_t ignore_index;
  const double *weights, *ce_weights;
  double *value, *ce;
  TopKOptions how;
};

// Packs that a thread loads before it uses the first.
constexpr int kTogether = 4;

// visit(i, classes, pack) for this thread's packs of a row: the last first, whose columns may still be in a cache, or the
// first. i: the first column; classes: how many the pack has. What is missing is -inf.
template <class Visit>
__device__ __forceinline__ void for_packs(const float* z, const Cut<float>& cut, bool backwards, Visit&& visit) {
  constexpr int64_t tile = int64_t{kTogether} * kRowThreads;
  const int64_t tiles = cut.packs / tile;
  // The packs of no whole tile, and behind them the singles, of which the first warp has some.
  const auto rest = [&] {
    const int64_t from = tiles * tile, rounds = (cut.packs - from + kRowThreads - 1) / kRowThreads;
#pragma unroll 1
    for (int64_t r = 0; r <= rounds; ++r) {
      const int64_t v = from + r * kRowThreads + threadIdx.x,
                    single = r < rounds || threadIdx.x >= kWarp ? -1 : cut.single();
      Pack<float> pack = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
      int64_t i = single;
      int classes = 0;
      if (r < rounds && v < cut.packs) {
        i = cut.head + v * cut.size;
        classes = cut.size;
        pack = load_pack(z + i, true);
      } else if (single >= 0) {
        classes = 1;
        pack.value[0] = z[single];
      }
      visit(i, classes, pack);
    }
  };
  if (backwards) rest();
#pragma unroll 1
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t v = (backwards ? tiles - 1 - t : t) * tile + threadIdx.x;
    Pack<float> pack[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) pack[u] = load_pack(z + cut.head + (v + u * kRowThreads) * cut.size, true);
#pragma unroll
    for (int u = 0; u < kTogether; ++u) visit(cut.head + (v + u * kRowThreads) * cut.size, cut.size, pack[u]);
  }
  if (!backwards) rest();
}

// 1 / T in units of log 2, with more digits than a float has.
struct Rate {
  float high, low;
};
__device__ __forceinline__ Rate rate_of(double inverse) {
  const double rate = 0x1.71547652b82fep+0 * inverse;
  return {static_cast<float>(rate), static_cast<float>(rate - static_cast<float>(rate))};
}
// e^(d / T) for d <= 0, -inf included.
__device__ __forceinline__ float exp_at(float d, const Rate& rate) {
  return exp2_fast(fmaf(fmaxf(d, -0x1p60f), rate.low, d * rate.high));
}

// Of a block's threads; all of them get the result. room: shared.
template <class Fold>
__device__ __forceinline__ double folded(double x, double* room, Fold&& fold) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fold(x, __shfl_xor_sync(0xffffffffu, x, step));
  __syncthreads();  // the last result has been read
  if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = room[0];
#pragma unroll 1
  for (int warp = 1; warp < kWarps; ++warp) x = fold(x, room[warp]);
  return x;
}
__device__ __noinline__ double block_total(double x, double* room) {
  return folded(x, room, [](double a, double b) { return a + b; });
}
__device__ __noinline__ double block_most(double x, double* room) {
  return folded(x, room, [](double a, double b) { return fmax(a, b); });
}

// Once in the code, as exp and log in double are long.
__device__ __noinline__ double gradient_of(const TopKOptions& how, double log_p, double log_q, double slopes) {
  return class_gradient(how.divergence, how.beta, log_p, log_q, slopes);
}
__device__ __noinline__ double total_of(double most, double sum, double rest_log) {
  return log_sum_of_two(log_sum(most, sum), rest_log);
}

// Sums of exponentials over the classes that are left, less the largest of them: at the temperature, and without one.
struct RestSums {
  float top;
  double sum, plain;
};

__device__ __forceinline__ RestSums rest_sums(const float* z, int64_t cols, const Rate& rate, bool plainly, double* room) {
  const Cut<float> cut(z, cols);
  const Rate one = rate_of(1);
  float top = -FLT_MAX;
  double sum = 0, plain = 0;
  for_packs(z, cut, false, [&](int64_t, int, const Pack<float>& x) {
    const float here = fmaxf(fmaxf(x.value[0], x.value[1]), fmaxf(x.value[2], x.value[3]));
    if (here > top) {
      sum *= exp_at(top - here, rate);
      plain *= exp_at(top - here, one);
      top = here;
    }
    float part = 0, plain_part = 0;
#pragma unroll
    for (int k = 0; k < x.size; ++k) part += exp_at(x.value[k] - top, rate);
    if (plainly) {
#pragma unroll
      for (int k = 0; k < x.size; ++k) plain_part += exp_at(x.value[k] - top, one);
    }
    sum += part;
    plain += plain_part;
  });
  const float most = static_cast<float>(block_most(top, room));
  const double inverse = (static_cast<double>(rate.high) + rate.low), below = static_cast<double>(top) - most;
  const double all = block_total(sum * exp2(below * inverse), room);
  return {most, all, plainly ? block_total(plain * exp(below), room) : 0};
}

template <class O>
__global__ void __launch_bounds__(kRowThreads, 2) top_k_kernel(const __grid_constant__ TopK w, int64_t first) {
  __shared__ double room[kWarps];
  const int64_t row = first + blockIdx.x, k = w.teacher.classes;
  const TopKOptions& how = w.how;
  float* const z = row_of<float>(w.logits, row);
  O* const grad = row_of<O>(w.grad, row);
  const double weight = w.weights[row];
  double ce_weight = w.ce_weights == nullptr ? 0 : w.ce_weights[row];
  if (weight == 0 && ce_weight == 0) {  // it may hold anything
    fill(grad, w.cols, 0.0f);
    if (threadIdx.x == 0) {
      w.value[row] = 0;
      if (w.ce != nullptr) w.ce[row] = 0;
    }
    return;
  }
  const int64_t label = w.labels == nullptr ? w.ignore_index : w.labels[row];
  const bool classified = w.ce != nullptr && label != w.ignore_index;
  const bool bad_label = classified && (label < 0 || label >= w.cols), labelled = classified && !bad_label;
  if (!labelled) ce_weight = 0;
  const float label_logit = labelled ? z[label] : 0.0f;
  const double inverse = 1 / how.temperature;

  // The known classes' logits are put aside.
  const int64_t* const ids = w.teacher.ids + row * k;
  const double* const log_probs = w.teacher.log_probs + row * (k + (w.teacher.has_rest ? 1 : 0));
  float* const known = w.known_logits + row * k;
  bool bad = false;
  double most = -INFINITY, teacher_most = -INFINITY;
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < k; j += kRowThreads) {
    const bool is_known = log_probs[j] > -INFINITY, inside = ids[j] >= 0 && ids[j] < w.cols;
    const float logit = is_known && inside ? z[ids[j]] : -INFINITY;
    bad = bad || (is_known && !inside) || logit != logit;  // fmax would pass over it
    known[j] = logit;
    most = fmax(most, static_cast<double>(logit));
    teacher_most = fmax(teacher_most, log_probs[j]);
  }
  double logits = 0;
  if (labelled && how.smoothing != 0) {  // its value wants their mean
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < w.cols; i += kRowThreads) logits += z[i];
    logits = block_total(logits, room);
  }
  most = block_most(most, room);
  teacher_most = block_most(teacher_most, room);
  const auto is_here = [&](int64_t j) { return log_probs[j] > -INFINITY && ids[j] >= 0 && ids[j] < w.cols; };
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < k; j += kRowThreads)
    if (is_here(j)) z[ids[j]] = bits_float(static_cast<uint32_t>(j));
  __syncthreads();
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < k; j += kRowThreads) {
    if (!is_here(j)) continue;
    bad = bad || float_bits(z[ids[j]]) != static_cast<uint32_t>(j);  // somebody else has the same class
    z[ids[j]] = -INFINITY;
  }
  bad = block_most(bad ? 1 : 0, room) != 0;

  const bool plainly = labelled && how.temperature != 1, rest_counts = how.has_rest || labelled;
  const Rate rate = rate_of(inverse);
  RestSums rest = {-INFINITY, 0, 0};
  if (rest_counts) rest = rest_sums(z, w.cols, rate, plainly, room);
  if (!plainly) rest.plain = rest.sum;

  // From here on k + 1 numbers.
  const double centre = centre_of(most, rest.top), from_centre = rest.top - centre;
  const double plain_most = most - centre;
  most = plain_most * inverse;
  double sum = 0, plain = 0, teacher_sum = 0;
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < k; j += kRowThreads) {
    sum += exp_less((known[j] - centre) * inverse, most);
    if (plainly) plain += exp_less(known[j] - centre, plain_most);
    teacher_sum += exp_less(log_probs[j], teacher_most);
  }
  sum = block_total(sum, room);
  plain = plainly ? block_total(plain, room) : sum;
  teacher_sum = block_total(teacher_sum, room);
  const double rest_log = how.has_rest ? from_centre * inverse + log(rest.sum) : -INFINITY;
  const double total = total_of(most, sum, rest_log);
  const double teacher_total = log_sum(teacher_most, teacher_sum);
  const KnownTeacher teacher =
      known_teacher(teacher_total, how.has_rest, w.teacher.has_rest ? log_probs + k : nullptr, rest_log);
  const double student_rest = rest_log - total;
  double value = 0, slopes = 0, term, slope;
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < k + (how.has_rest ? 1 : 0); j += kRowThreads) {
    const double log_p = j < k ? log_probs[j] - teacher.shift : teacher.rest;
    class_share(how.divergence, how.beta, log_p, j < k ? (known[j] - centre) * inverse - total : student_rest, &term,
                &slope);
    value += term;
    slopes += slope;
  }
  value = block_total(value, room);
  slopes = block_total(slopes, room);
  value = value < 0 ? 0 : value;
  if (bad || !is_meaningful(total) || !is_meaningful(teacher_total) || !(teacher.rest < INFINITY)) value = NAN;

  double plain_total = 0, minus_log = 0;
  if (labelled) {
    plain_total = total_of(plain_most, plain, from_centre + log(rest.plain));
    minus_log = bad || !is_meaningful(plain_total) ? NAN : plain_total - (label_logit - centre);
  }
  if (threadIdx.x == 0) {
    w.value[row] = value;
    double ce = minus_log;
    if (labelled && how.smoothing != 0) ce += how.smoothing * (label_logit - logits / w.cols);
    if (w.ce != nullptr) w.ce[row] = bad_label ? NAN : ce;
  }
  if (grad == nullptr) return;
  __syncthreads();
  const bool taught = weight != 0;
  if ((taught && !(value < INFINITY)) || (ce_weight != 0 && minus_log != minus_log)) return fill(grad, w.cols, NAN);

  const double each = weight * inverse, flat = ce_weight * how.smoothing / w.cols;
  const double to_rest = taught && how.has_rest ? each * gradient_of(how, teacher.rest, student_rest, slopes) : 0;
  // The rest's gradient is shared out by its exponentials; so is the cross-entropy's, which is of all classes.
  float scale = static_cast<float>(to_rest == 0 ? 0 : to_rest / rest.sum);
  double task = ce_weight == 0 ? 0 : ce_weight * exp(from_centre - plain_total);
  if (!plainly) {
    scale = static_cast<float>((to_rest == 0 ? 0 : to_rest / rest.sum) + task);
    task = 0;
  }
  const float task_scale = static_cast<float>(task), even = static_cast<float>(flat);
  const float cap_slope = static_cast<float>(how.cap != 0 ? 1 / how.cap : 0), top = rest.top;
  const float at_label = static_cast<float>(ce_weight * (expm1(-minus_log) + how.smoothing) - flat);
  const auto before = [&](double gradient, double logit) {
    return static_cast<float>(how.cap == 0 || gradient == 0 ? gradient : before_cap(gradient, logit / how.cap));
  };
  const Rate one = rate_of(1);
  const Cut<float> cut(z, w.cols);
  const bool wide = stored_whole<float>(grad + cut.head);
  // The label's class takes what it gets of the rest by way of its exponential, in double.
  const double label_rest =
      labelled && to_rest != 0 ? to_rest / rest.sum * exp((static_cast<double>(label_logit) - top) * inverse) : 0;
  if (!rest_counts) {  // there is no largest logit to count from
    fill(grad, w.cols, 0.0f);
  } else {
    for_packs(z, cut, true, [&](int64_t i, int classes, const Pack<float>& x) {
      Pack<float> out;
#pragma unroll
      for (int u = 0; u < x.size; ++u) {
        const float d = x.value[u] - top;
        float gradient = fmaf(scale, exp_at(d, rate), -even);
        if (task_scale != 0) gradient = fmaf(task_scale, exp_at(d, one), gradient);
        const float t = fmaxf(x.value[u], -FLT_MAX) * cap_slope;
        out.value[u] = cap_slope == 0 ? gradient : fmaf(-t * t, gradient, gradient);
      }
      if (classes > 0) store_some(grad + i, classes, out, wide);
    });
  }
  __syncthreads();
  if (ce_weight != 0 && threadIdx.x == 0) grad[label] = from_float<O>(before(label_rest + at_label, label_logit));
  __syncthreads();  // the label may be among the known classes
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < k; j += kRowThreads) {
    if (!is_here(j)) continue;
    double gradient = 0;
    if (taught)
      gradient = each * gradient_of(how, log_probs[j] - teacher.shift, (known[j] - centre) * inverse - total, slopes);
    if (ce_weight != 0)
      gradient += labelled && ids[j] == label ? static_cast<double>(at_label)
                                              : ce_weight * exp(known[j] - centre - plain_total) - flat;
    grad[ids[j]] = from_float<O>(before(gradient, known[j]));
  }
}

}  // namespace

void top_k_rows(const LogitRows& logits, const LogitRows& grad, DType operand_dtype, int64_t rows, int64_t cols,
                const TopKTeacher& teacher, const int64_t* labels, int64_t ignore_index, const double* weights,
                const double* ce_weights, const TopKOptions& how, double* value, double* ce, float* known_logits, int device,
                void* stream) {
  const Call call("top_k_rows", device, stream);
  const TopK work{logits, grad, cols, teacher, known_logits, labels, ignore_index, weights, ce_weights, value, ce, how};
  with_operand_dtype("top_k_rows", operand_dtype,
                     [&](auto t) { launch_wide_rows(call, rows, top_k_kernel<decltype(t)>, work); });
}

}  // namespace fastpost::cuda
