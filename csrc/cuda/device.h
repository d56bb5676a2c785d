// Device intrinsics of the branches' kernels, each in one small function. An emulation on the host provides its own in
// simt.h and compiles the same kernels.
#pragma once

#include <cstdint>

#include "../floats.h"

#ifndef __CUDACC__
#include "simt.h"
#else

#define CNEXT_DEVICE __device__ __forceinline__

namespace {

CNEXT_DEVICE char* shared_memory() {
  extern __shared__ uint4 dynamic[];
  return reinterpret_cast<char*>(dynamic);
}

CNEXT_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// The type that moves 2, 4, 8 or 16 bytes in one instruction: copies of single members might not be merged.
template <int Bytes>
struct Whole;
template <>
struct Whole<2> {
  using type = uint16_t;
};
template <>
struct Whole<4> {
  using type = uint32_t;
};
template <>
struct Whole<8> {
  using type = uint2;
};
template <>
struct Whole<16> {
  using type = uint4;
};

template <class V>
CNEXT_DEVICE V read(const void* p) {
  const auto whole = *static_cast<const typename Whole<sizeof(V)>::type*>(p);
  V value;
  memcpy(&value, &whole, sizeof value);
  return value;
}

template <class V>
CNEXT_DEVICE void write(void* p, const V& value) {
  typename Whole<sizeof(V)>::type whole;
  memcpy(&whole, &value, sizeof whole);
  *static_cast<decltype(whole)*>(p) = whole;
}

// Stores 16 bytes of device memory; the compiler splits a plain store into four where it increments the address.
template <class V>
CNEXT_DEVICE void write_global(void* p, const V& value) {
  uint4 w;
  static_assert(sizeof(V) == sizeof w, "16 bytes");
  memcpy(&w, &value, sizeof w);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
}

// 16 bytes into shared memory, of which the first `bytes` are read and the rest are zeros.
CNEXT_DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

CNEXT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's latest groups are in flight.
template <int Pending>
CNEXT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 2-byte elements: lane i gives the address of row i % 8 of matrix i / 8.
CNEXT_DEVICE void load_matrices(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

CNEXT_DEVICE void load_transposed(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

// sum (16 x 8, float32) += a (16 x 16) b (16 x 8).
CNEXT_DEVICE void multiply(bf16, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

CNEXT_DEVICE void multiply(f16, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

CNEXT_DEVICE uint32_t pack(bf16, float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

CNEXT_DEVICE uint32_t pack(f16, float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

CNEXT_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }

template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, int threads, int shared, cudaStream_t stream,
                   const A&... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (set != cudaSuccess) return cudaGetErrorString(set);
  }
  kernel<<<grid, threads, size_t(shared), stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

#endif

namespace {

struct alignas(16) Words {
  uint32_t word[4];
};

}  // namespace
