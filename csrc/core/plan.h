// A plan of spans: where the elements of a tensor list lie, and how work on them is cut.
//
// A tensor list has columns of addresses (the weights, their gradients, their stash, ...) and one row per tensor.
// Two cuts exist. Chunks are cut per (tensor, element) and carry everything that sums or draws random numbers: their
// boundaries do not depend on addresses, so neither do the results. Spans are maximal runs that are contiguous in every
// column asked for; they carry element-wise work, where a flattened model is a single span.
#pragma once

#include <array>
#include <vector>

#include "core/dtype.h"

namespace fastpost {

// The last two are an optimizer's first and second moment.
enum Column : int { kWeight = 0, kGrad = 1, kStash = 2, kFirst = 3, kSecond = 4 };
constexpr int kColumns = 5;
constexpr int64_t kChunkElements = int64_t{1} << 16;
constexpr int64_t kWorthThreads = int64_t{1} << 15;  // elements; for less no thread is woken
constexpr int64_t kTensorAlignment = 256;            // bytes; every tensor of a flat buffer or stash starts on this boundary

struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t length;
};

struct Span {
  std::array<char*, kColumns> base;
  int64_t bytes;
};

class Plan {
 public:
  // numels: elements of each tensor; streams: the tensor's index in the user's list, which keys its random numbers.
  Plan(DType dtype, std::vector<int64_t> numels, std::vector<int64_t> streams);

  // Sets one column; a null address is allowed only for a tensor without elements. padded: the addresses lie in one
  // buffer that holds nothing else, each tensor on kTensorAlignment bytes; spans may then run across the padding.
  void point(Column column, const std::vector<uintptr_t>& addresses, bool padded);

  DType dtype() const { return dtype_; }
  int64_t tensors() const { return static_cast<int64_t>(numels_.size()); }
  int64_t elements() const { return elements_; }
  int64_t elements(int64_t tensor) const { return numels_[tensor]; }
  int64_t bytes() const { return elements_ * element_size(dtype_); }
  uint32_t stream(int64_t tensor) const { return streams_[tensor]; }
  const std::vector<Chunk>& chunks() const { return chunks_; }
  // Consecutive chunks gathered into pieces of work of about one full chunk; task t is chunks [tasks[t], tasks[t + 1]).
  const std::vector<int64_t>& tasks() const { return tasks_; }
  char* at(Column column, const Chunk& chunk) const {
    return addresses_[column][chunk.tensor] + chunk.begin * element_size(dtype_);
  }
  bool has(Column column) const { return !addresses_[column].empty(); }
  void require(Column column) const;  // throws unless the column has been pointed

  // Whether the stash holds the weights as they were. Set by the same call from Python that perturbs them, so that no
  // interrupt can come between the two; cleared by whoever is about to perturb.
  bool stashed = false;

  // Spans contiguous in every column of the mask (bit c = column c), in list order; computed once per set of addresses.
  const std::vector<Span>& spans(int column_mask) const;

 private:
  DType dtype_;
  std::vector<int64_t> numels_;
  std::vector<uint32_t> streams_;
  std::vector<Chunk> chunks_;
  std::vector<int64_t> tasks_;
  int64_t elements_ = 0;
  std::array<std::vector<char*>, kColumns> addresses_;
  std::array<bool, kColumns> padded_{};
  mutable std::array<std::vector<Span>, 1 << kColumns> spans_;
};

}  // namespace fastpost
