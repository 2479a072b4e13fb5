// Philox4x32-10 (Salmon et al., SC 2011): a counter-based generator, so that a random number depends on its place and
// its seed alone, never on threads, grids or call order.
#pragma once

#include "core/config.h"

namespace fastpost {
inline namespace FASTPOST_ISA {

struct PhiloxWords {
  uint32_t word[4];
};

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

FASTPOST_HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  const uint64_t m0 = static_cast<uint64_t>(0xD2511F53u) * c0;
  const uint64_t m1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
  const uint32_t n0 = static_cast<uint32_t>(m1 >> 32) ^ c1 ^ k0;
  const uint32_t n2 = static_cast<uint32_t>(m0 >> 32) ^ c3 ^ k1;
  c1 = static_cast<uint32_t>(m1);
  c3 = static_cast<uint32_t>(m0);
  c0 = n0;
  c2 = n2;
}

// counter: index of the four words within one tensor; stream: the tensor's index in its list.
FASTPOST_HD PhiloxWords philox(uint64_t seed, uint64_t counter, uint32_t stream) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = stream, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(c0, c1, c2, c3, k0, k1);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  return PhiloxWords{{c0, c1, c2, c3}};
}

}  // namespace FASTPOST_ISA
}  // namespace fastpost
