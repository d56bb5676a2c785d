// Load and store of float32, bfloat16 and float16 elements as float32, shared by the C++ and the CUDA layer.
//
// Internal linkage, as the C++ layer compiles this file once per instruction set. The conversions are branch-free
// integer arithmetic, so that each instruction set vectorizes them and gives the same bits.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CNEXT_HD __host__ __device__ __forceinline__
#else
#define CNEXT_HD inline __attribute__((always_inline))
#endif

namespace {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

// The name of a type in calls from Python.
template <class T>
constexpr char letter = '?';
template <>
constexpr char letter<float> = 'f';
template <>
constexpr char letter<bf16> = 'b';
template <>
constexpr char letter<f16> = 'h';

union FloatBits {
  float value;
  uint32_t bits;
};

CNEXT_HD uint32_t bits_of(float x) {
  FloatBits f;
  f.value = x;
  return f.bits;
}

CNEXT_HD float from_bits(uint32_t x) {
  FloatBits f;
  f.bits = x;
  return f.value;
}

CNEXT_HD float load(float x) { return x; }

CNEXT_HD float load(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }

// A denormal half is normalized by a subtraction of normal floats: exact, also where denormals are flushed to zero.
CNEXT_HD float load(f16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const int32_t rest = int32_t(x.bits & 0x7fffu) << 13;
  const uint32_t denormal = uint32_t(-int32_t(rest < 0x00800000)), large = uint32_t(-int32_t(rest >= 0x0f800000));
  const uint32_t moved = uint32_t(rest) + 0x38000000u + (denormal & 0x00800000u) + (large & 0x38000000u);
  return from_bits(sign | bits_of(from_bits(moved) - from_bits(denormal & 0x38800000u)));
#endif
}

CNEXT_HD void store(float& to, float x) { to = x; }

// Round to nearest, ties to even; a NaN stays a NaN.
CNEXT_HD void store(bf16& to, float x) {
  const uint32_t b = bits_of(x);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  to.bits = uint16_t(x == x ? rounded : 0x7fc0u);
}

// Likewise, by adding 2^(e + 13) to a magnitude of exponent e, at least -14: the last bits of the sum are those of the
// half, rounded. Overflow is clamped to 2^16, which maps to infinity, and a NaN to 1.5 times that: one canonical NaN,
// as the sign of a computed one depends on the instructions. All steps are 32-bit with one select each, which compiles
// to fewer instructions.
CNEXT_HD void store(f16& to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
  to.bits = x == x ? to.bits : uint16_t(0x7e00u);
#else
  const int32_t whole = int32_t(bits_of(x) & 0x7fffffffu), bounded = whole < 0x47800000 ? whole : 0x47800000;
  const uint32_t b = x == x ? (bits_of(x) & 0x80000000u) | uint32_t(bounded) : 0x47c00000u;
  const int32_t rest = int32_t(b & 0x7fffffffu), exponent = rest & 0x7f800000;
  const uint32_t least = uint32_t(exponent > 0x38800000 ? exponent : 0x38800000), added = least + 0x06800000u;
  const uint32_t sum = bits_of(from_bits(uint32_t(rest)) + from_bits(added));
  to.bits = uint16_t((b >> 16 & 0x8000u) | (sum - added + (least >> 13) - 0x1c400u));
#endif
}

}  // namespace
