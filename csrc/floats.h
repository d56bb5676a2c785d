// Element types as they lie in memory, and float32 as every kernel computes in; shared by the C++ and the CUDA layer.
//
// Everything has internal linkage, because the C++ layer compiles this file once per instruction set. Both conversions
// are branch-free integer arithmetic, so that each instruction set vectorises them and gives the same bits.
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

// What a type is called in a call from Python.
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

// A denormal half is normalised by a subtraction of normal floats: exact, and the same where denormals are flushed.
CNEXT_HD float load(f16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t small = bits_of(from_bits(rest + 0x38800000u) - 0x1p-14f);
  const uint32_t large = rest + (rest >= 0x0f800000u ? 0x70000000u : 0x38000000u);  // infinities and NaN, or normal
  return from_bits(sign | (rest < 0x00800000u ? small : large));
#endif
}

CNEXT_HD void store(float& to, float x) { to = x; }

// Round to nearest, ties to even; a NaN stays a NaN.
CNEXT_HD void store(bf16& to, float x) {
  const uint32_t b = bits_of(x);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  to.bits = uint16_t(x == x ? rounded : 0x7fc0u);
}

// Likewise. Below the smallest normal half an addition of 0.5 rounds at the right place. A NaN has one form, as the sign
// of one that was computed depends on the instructions.
CNEXT_HD void store(f16& to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
  to.bits = x == x ? to.bits : uint16_t(0x7e00u);
#else
  const uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000u, rest = b & 0x7fffffffu;
  const uint32_t normal = (rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13;
  const uint32_t small = bits_of(from_bits(rest) + 0.5f) - 0x3f000000u;
  const uint32_t finite = sign | (rest >= 0x47800000u ? 0x7c00u : rest < 0x38800000u ? small : normal);
  to.bits = uint16_t(rest > 0x7f800000u ? 0x7e00u : finite);
#endif
}

}  // namespace
