// Parameter-list operations on the CPU: walks a plan with threads and folds the chunks' sums in a fixed order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "api.h"
#include "cpu/loops.h"
#include "cpu/pool.h"

namespace fastpost::cpu {
namespace {

// Above this many bytes a column outlives the last-level cache anyway; writing past it saves reading the line first.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
constexpr int64_t kPieceBytes = int64_t{256} << 10;  // of a span, per task

int worth(int64_t elements, int threads) { return elements < kWorthThreads ? 1 : threads; }

// body(index of the chunk, chunk) for every chunk; a task is a run of them.
template <class F>
void for_chunks(const Plan& plan, int threads, F&& body) {
  const auto& tasks = plan.tasks();
  parallel_for(static_cast<int64_t>(tasks.size()) - 1, worth(plan.elements(), threads), [&](int64_t task) {
    for (int64_t c = tasks[task]; c < tasks[task + 1]; ++c) body(c, plan.chunks()[c]);
  });
}

// body(span, offset in bytes, bytes) over pieces of the spans of the given columns.
template <class F>
void for_spans(const Plan& plan, int column_mask, int threads, F&& body) {
  const std::vector<Span>& spans = plan.spans(column_mask);
  struct Piece {
    const Span* span;
    int64_t offset, bytes;
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> tasks{0};
  int64_t gathered = 0;
  for (const Span& span : spans)
    for (int64_t offset = 0; offset < span.bytes; offset += kPieceBytes) {
      pieces.push_back({&span, offset, std::min(kPieceBytes, span.bytes - offset)});
      gathered += pieces.back().bytes;
      if (gathered >= kPieceBytes) {
        tasks.push_back(static_cast<int64_t>(pieces.size()));
        gathered = 0;
      }
    }
  if (tasks.back() != static_cast<int64_t>(pieces.size())) tasks.push_back(static_cast<int64_t>(pieces.size()));
  parallel_for(static_cast<int64_t>(tasks.size()) - 1, worth(plan.elements(), threads), [&](int64_t task) {
    for (int64_t p = tasks[task]; p < tasks[task + 1]; ++p) body(*pieces[p].span, pieces[p].offset, pieces[p].bytes);
  });
}

double fold(const std::vector<double>& partial) {
  double total = 0;
  for (const double p : partial) total += p;
  return total;
}

}  // namespace

namespace {

void sums_of_chunks(const Plan& plan, Terms what, Column x, Column y, double eta, double* sums, int threads) {
  for_chunks(plan, threads, [&](int64_t index, const Chunk& chunk) {
    const void* second = what == Terms::squares ? nullptr : plan.at(y, chunk);
    sums[index] = params_loops().sum(plan.dtype(), what, plan.at(x, chunk), second, eta, chunk.length);
  });
}

double sum(const Plan& plan, Terms what, Column x, Column y, double eta, int threads) {
  std::vector<double> partial(plan.chunks().size());
  sums_of_chunks(plan, what, x, y, eta, partial.data(), threads);
  return fold(partial);
}

// Where the masters of a chunk begin; their elements are wider than the plan's.
float* masters_of(const Plan& plan, const Chunk& chunk) {
  return reinterpret_cast<float*>(plan.at(kStash, {chunk.tensor, 0, 0})) + chunk.begin;
}

// Where the codes of a chunk begin; they are half as wide as the plan's elements.
char* codes_of(const Plan& plan, const Chunk& chunk) {
  return plan.at(kStash, {chunk.tensor, 0, 0}) + chunk.begin * code_size(plan.dtype());
}

PerturbLoop loop_of(const Plan& plan, const Perturbation& how, double squared_norm, bool masters, const uint64_t* seed) {
  const SplitScale scale = split_scale(how.rho / std::sqrt(squared_norm));
  return {scale.high,
          scale.low,
          how.adaptive,
          static_cast<float>(how.eta),
          how.compute_dtype,
          plan.bytes() >= kStreamBytes,
          masters,
          seed != nullptr,
          seed == nullptr ? 0 : *seed};
}

// run(index of the chunk, chunk, its sums) for every chunk.
template <class Run>
PerturbSums summed(const Plan& plan, int threads, Run&& run) {
  std::vector<double> partial(plan.chunks().size() * kPerturbSums);
  for_chunks(plan, threads, [&](int64_t index, const Chunk& chunk) { run(index, chunk, &partial[index * kPerturbSums]); });
  double sums[kPerturbSums] = {};
  for (size_t i = 0; i < partial.size(); ++i) sums[i % kPerturbSums] += partial[i];
  return {sums[kIntendedSq], sums[kStoredSq], sums[kStoredDot], sums[kSeenSq], sums[kSeenDot], sums[kChanged]};
}

PerturbSums perturb(const Plan& plan, const Perturbation& how, double squared_norm, bool masters, const uint64_t* seed,
                    int threads) {
  const PerturbLoop loop = loop_of(plan, how, squared_norm, masters, seed);
  return summed(plan, threads, [&](int64_t, const Chunk& chunk, double* sums) {
    void* stash = masters ? static_cast<void*>(masters_of(plan, chunk)) : plan.at(kStash, chunk);
    params_loops().perturb(plan.dtype(), plan.at(kWeight, chunk), plan.at(kGrad, chunk), stash, chunk.length,
                           static_cast<uint64_t>(chunk.begin), plan.stream(chunk.tensor), loop, sums);
  });
}

// body(chunk) for every chunk, once w of what is listed stands in the place of w + e there, where decoding leaves it.
// Putting it there changes nothing for whoever decodes after an interrupt.
template <class F>
void for_listed_chunks(const Plan& plan, const CodeList& list, int threads, F&& body) {
  const uint64_t* words = list.words + 1;
  const int64_t entries = std::min(static_cast<int64_t>(*list.words), list.capacity);
  with_dtype(plan.dtype(), [&](auto t) {
    using Bits = typename SignBits<decltype(t)>::type;
    const auto where = [&](int64_t entry) { return words[entry] >> (8 * sizeof(Bits)); };  // its chunk, and 16 bits in that
    // The list's runs of entries of one chunk, so that they are put in while the chunk is in the cache.
    struct Run {
      int64_t begin, end, next;
    };
    std::vector<Run> runs;
    std::vector<int64_t> latest(plan.chunks().size(), -1);
    for (int64_t i = 0; i < entries; ++i) {
      if (i == 0 || where(i) >> 16 != where(i - 1) >> 16) {
        int64_t& run = latest[where(i) >> 16];
        runs.push_back({i, i, run});
        run = static_cast<int64_t>(runs.size()) - 1;
      }
      runs.back().end = i + 1;
    }
    for_chunks(plan, threads, [&](int64_t index, const Chunk& chunk) {
      Bits* w = reinterpret_cast<Bits*>(plan.at(kWeight, chunk));
      for (int64_t run = latest[index]; run >= 0; run = runs[run].next)
        for (int64_t i = runs[run].begin; i < runs[run].end; ++i) w[where(i) & 0xffffu] = static_cast<Bits>(words[i]);
      body(chunk);
    });
  });
}

}  // namespace

double squared_norm(const Plan& plan, bool adaptive, double eta, int threads) {
  return sum(plan, adaptive ? Terms::scaled : Terms::squares, kGrad, kWeight, eta, threads);
}

void chunk_squares(const Plan& plan, double* sums, int threads) {
  sums_of_chunks(plan, Terms::squares, kGrad, kWeight, 0, sums, threads);
}

double squared_distance(const Plan& plan, int threads) { return sum(plan, Terms::differences, kWeight, kStash, 0, threads); }

double dot(const Plan& plan, int threads) { return sum(plan, Terms::products, kGrad, kStash, 0, threads); }

PerturbSums sam_perturb(const Plan& plan, const Perturbation& how, double squared_norm, const uint64_t* seed, int threads) {
  if (moves(how.rho, squared_norm)) return perturb(plan, how, squared_norm, false, seed, threads);
  const bool stream = plan.bytes() >= kStreamBytes;
  for_spans(plan, 1 << kWeight | 1 << kStash, threads, [&](const Span& span, int64_t offset, int64_t bytes) {
    params_loops().copy(span.base[kStash] + offset, span.base[kWeight] + offset, bytes, stream);
  });
  return {};
}

PerturbSums sam_perturb_masters(const Plan& plan, const Perturbation& how, double squared_norm, int threads) {
  if (moves(how.rho, squared_norm)) return perturb(plan, how, squared_norm, true, nullptr, threads);
  sam_cast(plan, threads);
  return {};
}

PerturbSums sam_perturb_coded(const Plan& plan, const Perturbation& how, double squared_norm, const uint64_t* seed,
                              const CodeList& list, bool pending, int threads) {
  if (!pending) *list.words = 0;
  if (!moves(how.rho, squared_norm)) {
    for_chunks(plan, threads, [&](int64_t, const Chunk& chunk) {
      memset(codes_of(plan, chunk), 0, chunk.length * code_size(plan.dtype()));
    });
    return {};
  }
  const PerturbLoop loop = loop_of(plan, how, squared_norm, false, seed);
  return summed(plan, threads, [&](int64_t index, const Chunk& chunk, double* sums) {
    params_loops().perturb_coded(plan.dtype(), plan.at(kWeight, chunk), plan.at(kGrad, chunk), codes_of(plan, chunk),
                                 chunk.length, static_cast<uint64_t>(chunk.begin), plan.stream(chunk.tensor), index, loop,
                                 list, pending, sums);
  });
}

void sam_decode(const Plan& plan, const CodeList& list, int threads) {
  for_listed_chunks(plan, list, threads, [&](const Chunk& chunk) {
    params_loops().decode(plan.dtype(), plan.at(kWeight, chunk), codes_of(plan, chunk), chunk.length);
  });
}

void sam_decode_adamw(const Plan& plan, const AdamW& how, const double* steps, double grad_scale, bool skip,
                      const CodeList& list, int threads) {
  if (skip) return sam_decode(plan, list, threads);
  for_listed_chunks(plan, list, threads, [&](const Chunk& chunk) {
    char *w = plan.at(kWeight, chunk), *codes = codes_of(plan, chunk);
    if (steps[chunk.tensor] == 0) return params_loops().decode(plan.dtype(), w, codes, chunk.length);
    params_loops().decode_adamw(plan.dtype(), w, plan.at(kGrad, chunk), codes, plan.at(kFirst, chunk),
                                plan.at(kSecond, chunk), chunk.length, how, steps[chunk.tensor], grad_scale);
  });
}

void sam_cast(const Plan& plan, int threads) {
  for_chunks(plan, threads, [&](int64_t, const Chunk& chunk) {
    params_loops().cast(plan.dtype(), plan.at(kWeight, chunk), masters_of(plan, chunk), chunk.length);
  });
}

void sam_restore(const Plan& plan, int threads) {
  const bool stream = plan.bytes() >= kStreamBytes;
  for_spans(plan, 1 << kWeight | 1 << kStash, threads, [&](const Span& span, int64_t offset, int64_t bytes) {
    params_loops().copy(span.base[kWeight] + offset, span.base[kStash] + offset, bytes, stream);
  });
}

void sam_restore_adamw(const Plan& plan, const AdamW& how, const double* steps, double grad_scale, bool skip, int threads) {
  if (skip) return sam_restore(plan, threads);
  for_chunks(plan, threads, [&](int64_t, const Chunk& chunk) {
    params_loops().restore_adamw(plan.dtype(), plan.at(kWeight, chunk), plan.at(kGrad, chunk), plan.at(kStash, chunk),
                                 plan.at(kFirst, chunk), plan.at(kSecond, chunk), chunk.length, how, steps[chunk.tensor],
                                 grad_scale);
  });
}

void negate(const Plan& plan, int threads) {
  for_spans(plan, 1 << kGrad, threads, [&](const Span& span, int64_t offset, int64_t bytes) {
    params_loops().negate(plan.dtype(), span.base[kGrad] + offset, bytes / element_size(plan.dtype()));
  });
}

void flip_signs(const Plan& plan, uint64_t seed, int threads) {
  for_chunks(plan, threads, [&](int64_t, const Chunk& chunk) {
    params_loops().flip_signs(plan.dtype(), plan.at(kGrad, chunk), seed, static_cast<uint64_t>(chunk.begin),
                              plan.stream(chunk.tensor), chunk.length);
  });
}

double negate_norm(const Plan& plan, int threads) {
  std::vector<double> partial(plan.chunks().size());
  for_chunks(plan, threads, [&](int64_t index, const Chunk& chunk) {
    partial[index] = params_loops().sum(plan.dtype(), Terms::squares, plan.at(kGrad, chunk), nullptr, 0, chunk.length);
    params_loops().negate(plan.dtype(), plan.at(kGrad, chunk), chunk.length);
  });
  return fold(partial);
}

void negate_clip(const Plan& plan, double squared_norm, double max_norm, int threads) {
  const double norm = std::sqrt(squared_norm);
  if (!clips(norm, max_norm)) return negate(plan, threads);
  for_chunks(plan, threads, [&](int64_t, const Chunk& chunk) {
    params_loops().scale(plan.dtype(), plan.at(kGrad, chunk), -max_norm / norm, chunk.length);
  });
}

}  // namespace fastpost::cpu
