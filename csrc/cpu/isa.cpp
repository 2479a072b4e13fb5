// Picks, once, the instruction set whose loops run on this machine.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "api.h"
#include "cpu/loops.h"

namespace fastpost::cpu {

#define FASTPOST_DECLARE_ISA(isa)                          \
  extern const ParamsLoops params_loops_##isa;             \
  extern const NoiseLoops noise_loops_##isa;               \
  extern const DivergenceLoops divergence_loops_##isa;     \
  extern const DistillationLoops distillation_loops_##isa; \
  extern const TopKLoops top_k_loops_##isa;

#if defined(__x86_64__)
FASTPOST_DECLARE_ISA(sse)
FASTPOST_DECLARE_ISA(avx2)
FASTPOST_DECLARE_ISA(avx512)
#else
FASTPOST_DECLARE_ISA(portable)
#endif

namespace {

struct Isa {
  const char* name;
  bool runs_here;
  const ParamsLoops* params;
  const NoiseLoops* noise;
  const DivergenceLoops* divergence;
  const DistillationLoops* distillation;
  const TopKLoops* top_k;
};

#if defined(__x86_64__)
// Whether this machine runs what -march=x86-64-v3 and -v4 allow. The builtin, which also asks whether the system saves the
// registers, takes the levels' own names in GCC 12 and Clang 18 and newer, but f16c, movbe and lzcnt in fewer.
bool runs_avx2() {
  unsigned int a, b, c, d;
  const bool f16c_movbe = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0 && (c >> 22 & 1) != 0;
  const bool lzcnt = __get_cpuid(0x80000001, &a, &b, &c, &d) != 0 && (c >> 5 & 1) != 0;
  return f16c_movbe && lzcnt && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#define FASTPOST_ISA_ENTRY(isa, runs_here) \
  {#isa,                                   \
   runs_here,                              \
   &params_loops_##isa,                    \
   &noise_loops_##isa,                     \
   &divergence_loops_##isa,                \
   &distillation_loops_##isa,              \
   &top_k_loops_##isa}

// Best first.
const std::vector<Isa>& built() {
  static const std::vector<Isa> all = {
#if defined(__x86_64__)
      FASTPOST_ISA_ENTRY(avx512, runs_avx512()),
      FASTPOST_ISA_ENTRY(avx2, runs_avx2()),
      FASTPOST_ISA_ENTRY(sse, true),
#else
      FASTPOST_ISA_ENTRY(portable, true),
#endif
  };
  return all;
}

const Isa& chosen() {
  static const Isa* const isa = [] {
    const char* wanted = std::getenv("FASTPOST_CPU_ISA");
    for (const Isa& candidate : built())
      if (candidate.runs_here && (wanted == nullptr || *wanted == '\0' || std::string(wanted) == candidate.name))
        return &candidate;
    throw std::invalid_argument(std::string("FASTPOST_CPU_ISA=") + wanted +
                                " is not among what this machine runs: " + isas());
  }();
  return *isa;
}

}  // namespace

const char* isa() { return chosen().name; }

const char* isas() {
  static const std::string names = [] {
    std::string joined;
    for (const Isa& candidate : built())
      if (candidate.runs_here) joined += (joined.empty() ? "" : " ") + std::string(candidate.name);
    return joined;
  }();
  return names.c_str();
}

const ParamsLoops& params_loops() { return *chosen().params; }
const NoiseLoops& noise_loops() { return *chosen().noise; }
const DivergenceLoops& divergence_loops() { return *chosen().divergence; }
const DistillationLoops& distillation_loops() { return *chosen().distillation; }
const TopKLoops& top_k_loops() { return *chosen().top_k; }

bool advise_huge_pages(void* address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(address) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + bytes) / huge * huge;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)address, (void)bytes;
  return false;
#endif
}

}  // namespace fastpost::cpu
