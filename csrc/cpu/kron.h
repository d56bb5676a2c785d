// Interface of the kernels of cnext.ops.kron, one table per instruction set.
#pragma once

#include <cstdint>

// A group of matrices that share their n rows. lists, stride: element [k * stride + p] is the address of matrix p of
// the op's list k.
struct KronGroup {
  int64_t n, r, count;
  const int64_t* parts;  // (count, 3): rank, strides along n and along the rank
  const int64_t* lists;
  int64_t stride;
};

// A unit of work: the rows [begin, end) of a group.
struct KronTable {
  // Doubles of a unit's sum of products.
  int64_t (*sums_size)(int64_t r);
  // rows += the rows' sums of squares; sums = G^T G of the unit, in the kernel's order.
  void (*accumulate[3])(const KronGroup&, int64_t begin, int64_t end, float* rows, double* sums);
  // factor += sums.
  void (*add)(int64_t r, const double* sums, float* factor);
  void (*pull[3])(const KronGroup&, int64_t begin, int64_t end, const float* rows, const float* values,
                  const float* vectors, float weight);
  void (*merge[3])(const KronGroup&, int64_t begin, int64_t end, const float* rows_new, const double* factor_new,
                   const float* rows_old, const double* factor_old, double c, double damping);
};

const KronTable* kron_baseline();
const KronTable* kron_avx2();
const KronTable* kron_avx512();
