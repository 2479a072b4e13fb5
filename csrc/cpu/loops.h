// The inner loops, compiled once per instruction set and chosen at run time. Those translation units hold nothing but
// plain functions over raw addresses: a template of the standard library instantiated there could be linked into code
// that runs everywhere.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/params.h"
#include "core/top_k.h"

#define FASTPOST_PASTE_(a, b) a##b
#define FASTPOST_PASTE(a, b) FASTPOST_PASTE_(a, b)

namespace fastpost::cpu {

// Offsets into the sums of one perturbed chunk; the order of PerturbSums.
enum PerturbSum : int { kIntendedSq, kStoredSq, kStoredDot, kSeenSq, kSeenDot, kChanged, kPerturbSums };

struct PerturbLoop {
  float scale_high, scale_low;
  bool adaptive;
  float eta;
  DType compute_dtype;
  bool stream;      // write the stash past the caches
  bool masters;     // the stash holds float masters to read, and is not written
  bool stochastic;  // round 16-bit weights at random
  uint64_t seed;
};

struct ParamsLoops {
  double (*sum)(DType, Terms, const void* x, const void* y, double eta, int64_t n);  // y: null for squares
  // first, stream: where the elements stand in their tensor, and the tensor's number; they key the random bits.
  void (*perturb)(DType, void* w, const void* g, void* stash, int64_t n, uint64_t first, uint32_t stream, const PerturbLoop&,
                  double* sums);
  // The same with codes in the stash's place. pending: only of what found no room in the list before; sums are as if all
  // did.
  void (*perturb_coded)(DType, void* w, const void* g, void* codes, int64_t n, uint64_t first, uint32_t stream,
                        int64_t chunk, const PerturbLoop&, const CodeList&, bool pending, double* sums);
  void (*decode)(DType, void* w, const void* codes, int64_t n);
  // decode and then restore_adamw from what it has found, a block at a time.
  void (*decode_adamw)(DType, void* w, const void* g, const void* codes, void* first, void* second, int64_t n,
                       const AdamW& how, double steps, double grad_scale);
  void (*cast)(DType, void* w, const float* masters, int64_t n);
  void (*copy)(void* to, const void* from, int64_t bytes, bool stream);
  void (*negate)(DType, void* g, int64_t n);
  void (*scale)(DType, void* g, double factor, int64_t n);
  void (*flip_signs)(DType, void* g, uint64_t seed, uint64_t first_element, uint32_t stream, int64_t n);
  // One step of AdamW from the stash into w; how and steps: csrc/api.h.
  void (*restore_adamw)(DType, void* w, const void* g, const void* stash, void* first, void* second, int64_t n,
                        const AdamW& how, double steps, double grad_scale);
};

struct NoiseLoops {
  // out = x + eps * z for elements [first, first + n) of the counter sequence; noise off: a conversion.
  void (*add_noise)(DType in, DType out, const void* x, void* y, uint64_t first, int64_t n, float eps, int type,
                    uint64_t seed, bool noise);
};

// One row of divergence_rows. Without a noised stream, kl_weight is 0; without a label in range, ce_weight is.
// noised_ce_weight: of the noised stream's cross-entropy, 0 where kl_weight is. ce is the sum of both.
struct DivergenceRow {
  const void *clean, *noised;
  const void *next_clean, *next_noised;  // the row that the same thread will be given next, or null
  float *clean_exp, *noised_exp;         // scratch, cols each: exponentials of the second pass, for the third
  void *grad_clean, *grad_noised;        // null: not wanted; may be the logits themselves
  int64_t cols, label;
  double kl_weight, ce_weight, noised_ce_weight;
};

// What operand_rows makes of a row's gradients (csrc/api.h): first and second of grad_clean and grad_noised. Null gradients
// are not wanted, nor are their operands. slope: 1 / cap, or 0. flat, noised_flat: subtracted from all gradients of a
// stream.
struct OperandRow {
  const float *clean, *noised, *grad_clean, *grad_noised;
  void *first, *second;
  int64_t cols;
  float flat, noised_flat, slope;
};

struct DivergenceLoops {
  void (*row)(DType, const DivergenceRow&, double* kl, double* ce);
  // The same with the Jensen-Shannon divergence in the place of kl; logs: scratch, 2 * cols.
  void (*jensen_shannon)(DType, const DivergenceRow&, double* logs, double* value, double* ce);
  // The gradients of one row as operands; any of the four gradients may lie where a logit or another of its place does.
  void (*operands)(DType, const OperandRow&);
};

// One row of distillation_rows (csrc/api.h). Without a label in range, ce_weight is 0.
struct DistillationRow {
  const float *teacher, *student;
  double* scratch;                    // 4 * cols
  void *grad_teacher, *grad_student;  // null: not wanted; float ones may be the logits themselves
  int64_t cols, label;
  double weight, ce_weight;
  Divergence divergence;
  double beta, temperature, teacher_cap, student_cap, smoothing;
};

struct DistillationLoops {
  // The gradients have this type.
  void (*row)(DType, const DistillationRow&, double* value, double* ce);
};

// One row of top_k_rows (csrc/api.h), whose logits are overwritten. Without a label in range, ce_weight is 0.
struct TopKRow {
  float *logits, *scratch;  // scratch: 2 * cols
  double* known;            // scratch, one for each of classes
  void* grad;               // null: not wanted; a float one may be the logits themselves
  int64_t cols, label;
  const int64_t* ids;
  const double* log_probs;
  int64_t classes;
  bool teacher_has_rest, labelled;
  double weight, ce_weight;
  TopKOptions how;
};

struct TopKLoops {
  // The gradient has this type.
  void (*row)(DType, const TopKRow&, double* value, double* ce);
};

// The tables of the instruction set in use.
const ParamsLoops& params_loops();
const DivergenceLoops& divergence_loops();
const DistillationLoops& distillation_loops();
const TopKLoops& top_k_loops();
const NoiseLoops& noise_loops();

}  // namespace fastpost::cpu
