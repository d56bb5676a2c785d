// A rule over lists of tensors: what the per-instruction-set kernels give to the driver in module.cpp.
#pragma once

#include <cstdint>

#include "../signature.h"

struct Kernel {
  Signature signature;
  void (*run)(const double* scalars, const double* row, void* const* operands, int64_t n, double* columns);
};

struct KernelTable {
  const Kernel* kernels;
  int size;
};

// One table per instruction set; setup.py compiles averaging.cpp once for each that the compiler knows.
KernelTable averaging_baseline();
KernelTable averaging_avx2();
KernelTable averaging_avx512();
