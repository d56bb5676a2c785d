// Interface of the averaging kernels, one table per instruction set.
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

// setup.py compiles averaging.cpp once for each instruction set that the compiler supports.
KernelTable averaging_baseline();
KernelTable averaging_avx2();
KernelTable averaging_avx512();
