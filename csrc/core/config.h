// Decoration shared by everything in core/: the same source is compiled by the host compiler, once per instruction set,
// and by nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTPOST_HD __host__ __device__ __forceinline__
#else
#define FASTPOST_HD inline __attribute__((always_inline))
#endif

// Inline functions of one name, compiled with different instruction sets, would be merged by the linker into whichever
// copy it meets first: an AVX-512 body could end up on a machine without it. Each instruction set gets its own namespace.
#ifndef FASTPOST_ISA
#define FASTPOST_ISA base
#endif
