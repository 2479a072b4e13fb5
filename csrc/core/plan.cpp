#include "core/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastpost {

Plan::Plan(DType dtype, std::vector<int64_t> numels, std::vector<int64_t> streams)
    : dtype_(dtype), numels_(std::move(numels)), streams_(streams.begin(), streams.end()) {
  if (streams_.size() != numels_.size()) throw std::invalid_argument("Plan: one stream index per tensor is needed");
  tasks_.push_back(0);
  int64_t gathered = 0;
  for (int64_t t = 0; t < tensors(); ++t) {
    if (numels_[t] < 0) throw std::invalid_argument("Plan: a tensor has a negative number of elements");
    elements_ += numels_[t];
    for (int64_t begin = 0; begin < numels_[t]; begin += kChunkElements) {
      const int64_t length = std::min(kChunkElements, numels_[t] - begin);
      chunks_.push_back({t, begin, length});
      gathered += length;
      if (gathered >= kChunkElements) {
        tasks_.push_back(static_cast<int64_t>(chunks_.size()));
        gathered = 0;
      }
    }
  }
  if (tasks_.back() != static_cast<int64_t>(chunks_.size())) tasks_.push_back(static_cast<int64_t>(chunks_.size()));
}

void Plan::point(Column column, const std::vector<uintptr_t>& addresses, bool padded) {
  if (addresses.size() != numels_.size())
    throw std::invalid_argument("Plan: " + std::to_string(addresses.size()) + " addresses for " +
                                std::to_string(numels_.size()) + " tensors");
  for (size_t t = 0; t < addresses.size(); ++t)
    if (addresses[t] == 0 && numels_[t] != 0)
      throw std::invalid_argument("Plan: tensor " + std::to_string(t) + " has elements but no storage");
  auto& target = addresses_[column];
  padded_[column] = padded;
  target.resize(addresses.size());
  for (size_t t = 0; t < addresses.size(); ++t) target[t] = reinterpret_cast<char*>(addresses[t]);
  for (int mask = 0; mask < static_cast<int>(spans_.size()); ++mask)
    if (mask & (1 << column)) spans_[mask].clear();
}

void Plan::require(Column column) const {
  if (!has(column) && tensors() != 0)
    throw std::invalid_argument("Plan: column " + std::to_string(column) + " has no addresses yet");
}

const std::vector<Span>& Plan::spans(int column_mask) const {
  if (column_mask <= 0 || column_mask >= 1 << kColumns) throw std::invalid_argument("Plan: no such columns");
  for (int c = 0; c < kColumns; ++c)
    if (column_mask & (1 << c)) require(static_cast<Column>(c));
  std::vector<Span>& spans = spans_[column_mask];
  if (!spans.empty() || elements_ == 0) return spans;
  for (int64_t t = 0; t < tensors(); ++t) {
    if (numels_[t] == 0) continue;
    const int64_t bytes = numels_[t] * element_size(dtype_);
    // The neighbour starts right after the last tensor or, in padded buffers, on the next tensor boundary; in either
    // case by the same distance in every column.
    bool joined = false;
    if (!spans.empty()) {
      Span& last = spans.back();
      const int64_t boundary = (last.bytes + kTensorAlignment - 1) / kTensorAlignment * kTensorAlignment;
      for (const int64_t distance : {last.bytes, boundary}) {
        joined = true;
        for (int c = 0; c < kColumns; ++c)
          if (column_mask & (1 << c))
            joined = joined && addresses_[c][t] == last.base[c] + distance && (distance == last.bytes || padded_[c]);
        if (!joined) continue;
        last.bytes = distance + bytes;
        break;
      }
    }
    if (!joined) {
      Span span{{}, bytes};
      for (int c = 0; c < kColumns; ++c)
        if (column_mask & (1 << c)) span.base[c] = addresses_[c][t];
      spans.push_back(span);
    }
  }
  return spans;
}

}  // namespace fastpost
