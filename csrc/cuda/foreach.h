// Interface of the averaging kernels: a rule over lists of tensors on a stream. Independent of Python and torch.
#pragma once

#include <cstdint>

#include "../signature.h"

constexpr int64_t kBlockElements = 4096;  // elements that one thread block works on

using Stream = struct CUstream_st*;  // cudaStream_t, without a CUDA header

struct Lists {
  const int64_t* addresses;  // (operands, tensors)
  const int64_t* sizes;      // (tensors,) elements
  int64_t tensors;
};

struct Scalars {
  double values[8];
  const double* rows;  // (tensors, row_width) on the device, or null
  int64_t row_width;
};

struct Statistics {
  double* columns;   // (tensors, columns), written
  double* partial;   // (blocks, columns), scratch
  uint32_t* tickets;  // (tensors,) zeros; zeros again afterwards
};

struct Kernel {
  Signature signature;
  const char* (*launch)(const Lists&, const Scalars&, const Statistics&, Stream);  // an error's text, or null
};

struct KernelTable {
  const Kernel* kernels;
  int size;
};

KernelTable averaging_kernels();
