// Every entry point of the native core that works on memory. Raw addresses, 64-bit sizes and, on a GPU, a stream: no torch
// and no Python, so that one build serves every torch version. bindings.cpp and row_bindings.cpp mirror this file one to
// one, and tensors.h, which looks at a caller's tensors.
#pragma once

#include <cstdint>
#include <vector>

#include "core/params.h"
#include "core/plan.h"
#include "core/top_k.h"

namespace fastpost {

// How a perturbation is cut from a gradient: e = scale * g, or for ASAM e = scale * t * t * g with t = |w| + eta.
struct Perturbation {
  double rho;
  bool adaptive;
  double eta;
  DType compute_dtype;  // what the forward pass computes in; the report's "seen" is w + e after a cast to it
};

// Sums over all elements, gathered by the pass that writes w + e. stored = what was added once w + e was rounded to the
// weights' dtype; seen = what the forward pass sees, once both w and w + e are cast to its dtype.
struct PerturbSums {
  double intended_sq, stored_sq, stored_dot, seen_sq, seen_dot;  // e.e, s.s, e.s, v.v, e.v
  double changed;                                                // elements whose stored weight differs
};

// A matrix whose rows are contiguous; stride counts elements from row to row. address may be null where that is said.
struct LogitRows {
  void* address;
  int64_t stride;
};

// What is asked of operand_rows beside its rows.
//   smoothing: label smoothing, of the cross-entropy's gradient; ce is the plain one.
//   cap: logits are cap * tanh(z / cap), and the gradients are those of z; 0: logits as they are.
//   teaches: whether the divergence sends a gradient to the clean stream. Where it does not and second is not wanted, a row
//   without a divergence has the gradient of its cross-entropy.
//   noised_classifies: in rows that have a divergence the noised stream has a cross-entropy as well, of the same label and
//   weight, and ce is the sum of both.
//   mixture: the divergence is Jensen-Shannon's. CUDA then has no cross-entropy of the noised stream.
struct OperandOptions {
  double smoothing, cap;
  bool teaches, noised_classifies, mixture;
};

// What is asked of distillation_rows beside its rows.
//   beta: the teacher's share in the mixture, of Divergence::js alone.
//   temperature: divides both streams' logits in the divergence, and not in the cross-entropy.
//   teacher_cap, student_cap: as cap above, each for its stream.
//   smoothing: label smoothing, as above, in the cross-entropy's value as well.
struct DistillationOptions {
  Divergence divergence;
  double beta, temperature, teacher_cap, student_cap, smoothing;
};

// What a teacher has said of each row, `rows` times: k classes, each once, and the logarithms of their probabilities, behind
// them that of all other classes where has_rest says so. -inf: the place is not used, whatever its class.
struct TopKTeacher {
  const int64_t* ids;
  const double* log_probs;
  int64_t classes;
  bool has_rest;
};

enum class NoiseType : int { uniform = 0, normal = 1 };

// How the losses of rows are summed up. A row counts unless its label is ignore_index or the mask leaves it out.
struct RowReduction {
  double kl_scale, ce_scale;  // of both sums
  bool averaged;              // both sums are divided by the number of rows that count, if there are any
  bool kl_everywhere;         // the divergence counts in every row, and its sum is not divided
  double kl_weight;           // of the divergence in the loss
};

// loss = task + kl_weight * divergence, of all rows.
struct RowLosses {
  double loss, task, divergence;
  bool served;                      // whether every label is a class or ignore_index; if not, nothing was done
  std::vector<double> divergences;  // of all rows, where one of them is not finite; else none
};

namespace cpu {

// Name of the instruction set in use; FASTPOST_CPU_ISA (a name below or the best by default) is read once.
const char* isa();
// The instruction sets that this build holds and this machine runs, best first, separated by spaces.
const char* isas();

// Sum of squares of the gradients in float64; adaptive: of (|w| + eta) * g. Not finite if and only if an element is not.
double squared_norm(const Plan& plan, bool adaptive, double eta, int threads);

// The sums of squares of the gradients that squared_norm adds up in this order: one for each chunk of the plan.
void chunk_squares(const Plan& plan, double* sums, int threads);

// Sum of squares of (weights - stash) in float64, of two lists of which neither is written.
double squared_distance(const Plan& plan, int threads);

// Sum of gradients * stash in float64, of two lists of which neither is written.
double dot(const Plan& plan, int threads);

// stash = w, w = w + e, for every tensor of the plan; squared_norm is the one over all plans of the step. Where it is
// zero or not finite, w keeps its bits. The caller has checked finiteness; sums are those of the writing pass.
// seed: 16-bit weights are rounded at random (core/params.h), or null: to nearest. Element e of tensor t takes half e % 2 of
// word e % 8 / 2 of philox(seed, e / 8, t).
PerturbSums sam_perturb(const Plan& plan, const Perturbation& how, double squared_norm, const uint64_t* seed, int threads);

// w = m + e, rounded to nearest, for 16-bit weights of which the stash column holds the float masters m (read only; the
// gradients have the weights' type). Where nothing may move, w = m.
PerturbSums sam_perturb_masters(const Plan& plan, const Perturbation& how, double squared_norm, int threads);

// As sam_perturb, with codes in the stash's column (core/params.h), half as wide as the weights, and a list of what has
// none. The list's count is set first; where it ends up above the capacity, elements are pending and have not been moved.
// Given a longer list that begins with the same entries, and with their number in its first word, a second call with
// `pending` moves those alone; its sums mean nothing. At most 2^16 chunks of float, 2^32 of others.
PerturbSums sam_perturb_coded(const Plan& plan, const Perturbation& how, double squared_norm, const uint64_t* seed,
                              const CodeList& list, bool pending, int threads);

// w, bit for bit, from w + e, codes and list; once, since a second call would go on by as much.
void sam_decode(const Plan& plan, const CodeList& list, int threads);

// w = m, rounded to nearest.
void sam_cast(const Plan& plan, int threads);

// w = stash, bit for bit.
void sam_restore(const Plan& plan, int threads);

// w = one step of AdamW from the stash (torch.optim.AdamW's formulas), with g and both moments in the plan's columns; steps
// counts each tensor's steps, this one included. The gradients are divided by grad_scale. skip: w = stash, bit for bit, and
// the moments stay.
void sam_restore_adamw(const Plan& plan, const AdamW& how, const double* steps, double grad_scale, bool skip, int threads);

// The same from w + e, codes and list: the bits of sam_decode and then that step. A tensor whose count is 0 is decoded and
// no more; its gradient and moments are not read.
void sam_decode_adamw(const Plan& plan, const AdamW& how, const double* steps, double grad_scale, bool skip,
                      const CodeList& list, int threads);

// g = -g, by its sign bit: exact for zeros, infinities and NaNs.
void negate(const Plan& plan, int threads);

// Flips the sign of each gradient element whose Philox bit is one; the same call again undoes it.
void flip_signs(const Plan& plan, uint64_t seed, int threads);

// g = -g, and the squared norm of the gradients in the same pass.
double negate_norm(const Plan& plan, int threads);

// g = -g * min(1, max_norm / sqrt(squared_norm)); where squared_norm is not finite, g = -g.
void negate_clip(const Plan& plan, double squared_norm, double max_norm, int threads);

// out = x + eps * z for n elements, z drawn from (seed, element); eps * z and the sum are rounded separately in float.
// rows (one per row of row_length elements, or null): the row draws as if it stood at this place, so that numbers need not
// depend on padding or batch layout; a negative place gets no noise. x may equal out.
// scales (one per row, or null): the row's noise is (eps * scale) * z, its factor rounded to float once.
void add_noise(const void* x, void* out, DType in_dtype, DType out_dtype, int64_t n, double eps, NoiseType type,
               uint64_t seed, const int64_t* rows, const float* scales, int64_t row_length, int threads);

// clean[t] = table[ids[t]], noised[t] = clean[t] + eps * z; each table row is read once. clean may be null; rows and scales
// as above.
void embedding_noise(const void* table, const int64_t* ids, void* clean, void* noised, DType table_dtype, DType noised_dtype,
                     int64_t tokens, int64_t width, int64_t table_stride, double eps, NoiseType type, uint64_t seed,
                     const int64_t* rows, const float* scales, int threads);

// Per row: kl = KL(p|q) + KL(q|p) for p = softmax(clean), q = softmax(noised), ce = cross-entropy of clean at its label, and
// the gradients of kl_weights[row] * kl + ce_weights[row] * ce with respect to both logits, in the logits' dtype.
//   Weights: null = 1. Where one is 0 its value and gradient are exactly 0, whatever the logits hold.
//   Gradients: a null address is not wanted; the logits' own addresses overwrite them.
//   noised may have a null address, labels be null: then without KL, without CE. A label outside [0, cols) other than
//   ignore_index gives ce = NaN and no CE gradient.
//   -inf in both streams is a class that does not exist; in one, kl is infinite and the gradients are NaN. NaN gives NaN.
void divergence_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean,
                     const LogitRows& grad_noised, DType dtype, int64_t rows, int64_t cols, const int64_t* labels,
                     int64_t ignore_index, const double* kl_weights, const double* ce_weights, double* kl, double* ce,
                     int threads);

// The rows of float logits as divergence_rows takes them, their gradients as operands of an output head's products: first
// gets the clean stream's, with the noised one's added where second gets that; null: not wanted. Operands of the logits'
// dtype may lie where the logits are.
void operand_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& first, const LogitRows& second,
                  DType operand_dtype, int64_t rows, int64_t cols, const int64_t* labels, int64_t ignore_index,
                  const double* kl_weights, const double* ce_weights, const OperandOptions& how, double* kl, double* ce,
                  int threads);

// Per row: value = KL(p|m) / 2 + KL(q|m) / 2 with m = (p + q) / 2, and the gradients of weights[row] * value; weights and
// gradients as above. At most ln 2: a class that is -inf in one stream only is finite, in both it does not exist.
void js_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean, const LogitRows& grad_noised,
             DType dtype, int64_t rows, int64_t cols, const double* weights, double* value, int threads);

// Per row: value = the divergence of p = softmax(teacher / T) and q = softmax(student / T) (core/distillation.h), ce =
// cross-entropy of the student's logits at their label, and the gradients of weights[row] * value + ce_weights[row] * ce
// with respect to both streams' logits, in operand_dtype.
//   Weights, labels and gradients as in divergence_rows, weights not null.
//   -inf in both streams is a class that does not exist. In one, total variation and js are finite, and so is a KL that
//   weighs the class by its 0; else the value is infinite and the gradients are NaN. NaN gives NaN.
void distillation_rows(const LogitRows& teacher, const LogitRows& student, const LogitRows& grad_teacher,
                       const LogitRows& grad_student, DType operand_dtype, int64_t rows, int64_t cols, const int64_t* labels,
                       int64_t ignore_index, const double* weights, const double* ce_weights, const DistillationOptions& how,
                       double* value, double* ce, int threads);

// Per row: value = the divergence of a teacher of whom k classes are known and q = softmax(logits / T) (core/top_k.h), ce =
// cross-entropy of the logits at their label, and the gradient of weights[row] * value + ce_weights[row] * ce in
// operand_dtype, which may take the logits' place; null: not wanted. The logits are overwritten.
//   Both weights 0: exactly 0, whatever the row holds. Else both values are made.
//   NaN, +inf, no class, a class of the teacher that is none or is there twice: NaN. An infinite value has a gradient of
//   NaN. Without a rest and a label, only the teacher's classes are read. labels, ce_weights and ce: all null or none.
void top_k_rows(const LogitRows& logits, const LogitRows& grad, DType operand_dtype, int64_t rows, int64_t cols,
                const TopKTeacher& teacher, const int64_t* labels, int64_t ignore_index, const double* weights,
                const double* ce_weights, const TopKOptions& how, double* value, double* ce, int threads);

// The losses of all rows and, where asked for, the gradients of the loss; everything as in the two above, of which
// jensen_shannon takes the second, which has no labels. labels, mask: null where there are none.
RowLosses row_losses(bool jensen_shannon, const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean,
                     const LogitRows& grad_noised, DType dtype, int64_t rows, int64_t cols, const int64_t* labels,
                     int64_t ignore_index, const bool* mask, const RowReduction& how, int threads);

// block[row] *= factors[row * factor_stride] (stride 0: one factor for all); rows whose factor is 1 are not touched.
void scale_rows(const LogitRows& block, DType dtype, int64_t rows, int64_t cols, const double* factors,
                int64_t factor_stride, int threads);

// The rows of one or two matrices, all times one factor; nothing is touched where that is 1. second: null address: one.
void scale_gradients(const LogitRows& first, const LogitRows& second, DType dtype, int64_t rows, int64_t cols,
                     const float* factor, int threads);

// Asks the kernel to back [address, address + bytes) with huge pages, which saves most page faults of a fresh buffer.
// Returns whether the request was accepted.
bool advise_huge_pages(void* address, int64_t bytes);

}  // namespace cpu

// The same operations on CUDA tensors. Work is queued on `stream` (a cudaStream_t) of `device`; nothing waits for it and
// nothing is allocated, so a graph may capture it. Norms, seeds, scales and flags are read from device memory. Failures to
// launch throw std::runtime_error naming the operation and the device.
namespace cuda {

// Devices that this build runs on; throws where the driver is too old for it.
int device_count();

// Whether this build holds code for the device's architecture.
bool supports(int device);

// Where an operation that sums over a list writes, on the device.
struct SumRoom {
  double* out;       // the sums: one, or the six of PerturbSums
  double* partial;   // room for as many of each chunk of the plan
  unsigned* ticket;  // 0 between calls, and no call's on another stream; null: a second kernel adds up
};

void squared_norm(const Plan& plan, bool adaptive, double eta, const SumRoom& room, int device, void* stream);

void squared_distance(const Plan& plan, const SumRoom& room, int device, void* stream);

void dot(const Plan& plan, const SumRoom& room, int device, void* stream);

// seed: one int64 on the device, or null.
void sam_perturb(const Plan& plan, const Perturbation& how, const double* squared_norm, const int64_t* seed,
                 const SumRoom& room, int device, void* stream);

void sam_perturb_masters(const Plan& plan, const Perturbation& how, const double* squared_norm, const SumRoom& room,
                         int device, void* stream);

void sam_cast(const Plan& plan, int device, void* stream);

// sam_perturb with codes; the list's count is 0 before. What found no room is pending, and is perturbed by the second of
// these, as a second call of cpu::sam_perturb_coded does.
void sam_perturb_coded(const Plan& plan, const Perturbation& how, const double* squared_norm, const int64_t* seed,
                       const CodeList& list, const SumRoom& room, int device, void* stream);
void sam_perturb_pending(const Plan& plan, const Perturbation& how, const double* squared_norm, const int64_t* seed,
                         const CodeList& list, int device, void* stream);

void sam_decode(const Plan& plan, const CodeList& list, int device, void* stream);

void sam_restore(const Plan& plan, int device, void* stream);

// steps: an address on the device per tensor. grad_scale, found_inf: on the device, or null; found_inf other than 0: skip.
void sam_restore_adamw(const Plan& plan, const AdamW& how, const float* const* steps, const float* grad_scale,
                       const float* found_inf, int device, void* stream);

// A tensor whose address is null is decoded and no more.
void sam_decode_adamw(const Plan& plan, const AdamW& how, const float* const* steps, const float* grad_scale,
                      const float* found_inf, const CodeList& list, int device, void* stream);

void negate(const Plan& plan, int device, void* stream);

void flip_signs(const Plan& plan, const int64_t* seed, int device, void* stream);

void negate_norm(const Plan& plan, const SumRoom& room, int device, void* stream);

void negate_clip(const Plan& plan, const double* squared_norm, double max_norm, int device, void* stream);

void add_noise(const void* x, void* out, DType in_dtype, DType out_dtype, int64_t n, double eps, NoiseType type,
               const int64_t* seed, const int64_t* rows, const float* scales, int64_t row_length, int device, void* stream);

// An id outside the table gives rows of NaN.
void embedding_noise(const void* table, const int64_t* ids, void* clean, void* noised, DType table_dtype, DType noised_dtype,
                     int64_t tokens, int64_t table_rows, int64_t width, int64_t table_stride, double eps, NoiseType type,
                     const int64_t* seed, const int64_t* rows, const float* scales, int device, void* stream);

void divergence_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean,
                     const LogitRows& grad_noised, DType dtype, int64_t rows, int64_t cols, const int64_t* labels,
                     int64_t ignore_index, const double* kl_weights, const double* ce_weights, double* kl, double* ce,
                     int device, void* stream);

void operand_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& first, const LogitRows& second,
                  DType operand_dtype, int64_t rows, int64_t cols, const int64_t* labels, int64_t ignore_index,
                  const double* kl_weights, const double* ce_weights, const OperandOptions& how, double* kl, double* ce,
                  int device, void* stream);

// Rows of float logits whose columns are cut across ranks, whole as operand_rows has them. All ranks call shard_sums and add
// up what it gives, kShardSums numbers a row; call it again with that and add up again; and call shard_operands with both.
//   before: the added sums of the first call, null in it. vocab: on the device, how many columns there are in all.
constexpr int kShardSums = 12;
constexpr int64_t kShardNoClass = -2, kShardIgnored = -3;

// What both calls are told of the rows.
//   tops: the largest logits over all ranks, the clean stream's of all rows and then the noised one's; 0 for a stream
//   without a class.
//   labels: a column of this rank; -1, a column of another one; no class; or that the row has no cross-entropy, as above.
//   null: no row has one.
struct ShardRows {
  const float* tops;
  const int64_t* labels;
  const double *kl_weights, *ce_weights;
};

void shard_sums(const LogitRows& clean, const LogitRows& noised, int64_t rows, int64_t cols, const ShardRows& shard,
                const double* before, double* sums, int device, void* stream);

// noised_classifies and mixture of `how` are not served.
void shard_operands(const LogitRows& clean, const LogitRows& noised, const LogitRows& first, const LogitRows& second,
                    DType operand_dtype, int64_t rows, int64_t cols, const ShardRows& shard, const double* before,
                    const double* sums, const double* vocab, const OperandOptions& how, double* kl, double* ce, int device,
                    void* stream);

// operand_rows with the Jensen-Shannon divergence, which calls it.
void js_operand_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& first, const LogitRows& second,
                     DType operand_dtype, int64_t rows, int64_t cols, const int64_t* labels, int64_t ignore_index,
                     const double* kl_weights, const double* ce_weights, const OperandOptions& how, double* kl, double* ce,
                     int device, void* stream);

// Operands are float32 or bfloat16.
void distillation_rows(const LogitRows& teacher, const LogitRows& student, const LogitRows& grad_teacher,
                       const LogitRows& grad_student, DType operand_dtype, int64_t rows, int64_t cols, const int64_t* labels,
                       int64_t ignore_index, const double* weights, const double* ce_weights, const DistillationOptions& how,
                       double* value, double* ce, int device, void* stream);

// known_logits: room for rows * k floats. Gradients are float32 or bfloat16.
void top_k_rows(const LogitRows& logits, const LogitRows& grad, DType operand_dtype, int64_t rows, int64_t cols,
                const TopKTeacher& teacher, const int64_t* labels, int64_t ignore_index, const double* weights,
                const double* ce_weights, const TopKOptions& how, double* value, double* ce, float* known_logits, int device,
                void* stream);

// items: the number that both sums are divided by (0 gives 0), on the device; null: how says it all. room: 4 * rows doubles.
// loss, task, divergence: a float each on the device; null: not wanted. Labels that are no class and divergences that are
// not finite show in the values.
void row_losses(const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean, const LogitRows& grad_noised,
                DType dtype, int64_t rows, int64_t cols, const int64_t* labels, int64_t ignore_index, const bool* mask,
                const RowReduction& how, const double* items, double* room, float* loss, float* task, float* divergence,
                int device, void* stream);

void scale_rows(const LogitRows& block, DType dtype, int64_t rows, int64_t cols, const double* factors,
                int64_t factor_stride, int device, void* stream);

// factor: on the device, and never read from here.
void scale_gradients(const LogitRows& first, const LogitRows& second, DType dtype, int64_t rows, int64_t cols,
                     const float* factor, int device, void* stream);

}  // namespace cuda
}  // namespace fastpost
