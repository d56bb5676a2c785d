// A GPU's thread block on the host, for kernels written against csrc/cuda/device.h: every thread is a fiber, and fibers
// change at barriers and at what a warp does together. What has not been written reads as NaN, an asynchronous copy
// lands when it is waited for, and every access is checked for its alignment and its bounds.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "../../csrc/floats.h"

#define CNEXT_DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

using Stream = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

static dim3 threadIdx, blockIdx, blockDim;

namespace simt {

struct Copy {
  char* to;
  const void* from;
  int bytes, group;
};

struct Meeting {  // of a warp or a block
  int members = 0, arrived = 0;
  unsigned round = 0;
  const char* what = nullptr;
};

struct Warp {
  Meeting meeting;
  uint32_t in[32][12], out[32][4];
};

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  std::vector<Copy> copies;
  int group = 0;
  bool started = false, done = false;
  const Meeting* waits = nullptr;
  unsigned round = 0;
};

constexpr size_t kShared = 227 * 1024;
static std::vector<std::unique_ptr<Fiber>> fibers;
static std::vector<Warp> warps;
static Meeting block;
static int running = 0;
static jmp_buf scheduler;
static std::function<void()> body;
static size_t shared_size = 0;
static bool backwards = false;  // threads take turns from the last to the first
static bool apart = false;      // a warp goes on as long as it can before the next one does
alignas(1024) static char shared[kShared];
static std::map<uintptr_t, size_t> buffers;

[[noreturn]] inline void fail(const char* what) {
  std::printf("block (%u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what);
  std::fflush(stdout);
  std::_Exit(1);
}

inline void check(const void* p, size_t bytes, size_t alignment) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(shared);
  if (at % alignment) fail("an access is not aligned");
  if (at >= base && at < base + kShared) {
    if (at + bytes > base + shared_size) fail("an access is outside the shared memory asked for");
    return;
  }
  auto after = buffers.upper_bound(at);
  if (after == buffers.begin()) fail("an access is outside every buffer");
  --after;
  if (at + bytes > after->first + after->second) fail("an access is outside its buffer");
}

// A buffer without an element to spare, every byte 0xff.
template <class T>
T* buffer(size_t count) {
  char* made = static_cast<char*>(std::aligned_alloc(64, (sizeof(T) * count + 127) / 64 * 64));
  std::memset(made, 0xff, sizeof(T) * count);
  buffers[reinterpret_cast<uintptr_t>(made)] = sizeof(T) * count;
  return reinterpret_cast<T*>(made);
}

inline void release() {
  for (const auto& one : buffers) std::free(reinterpret_cast<void*>(one.first));
  buffers.clear();
}

inline void enter() {
  body();
  fibers[size_t(running)]->done = true;
  _longjmp(scheduler, 1);
}

inline void resume(int i) {
  running = i;
  threadIdx.x = unsigned(i);
  Fiber& fiber = *fibers[size_t(i)];
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

// The last to arrive does the work for all.
template <class Work>
void meet(Meeting& meeting, const char* what, const Work& work) {
  if (meeting.arrived && std::strcmp(meeting.what, what)) fail("threads meet at different instructions");
  meeting.what = what;
  if (++meeting.arrived == meeting.members) {
    work();
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  Fiber& fiber = *fibers[size_t(running)];
  fiber.waits = &meeting;
  fiber.round = meeting.round;
  if (!_setjmp(fiber.place)) _longjmp(scheduler, 1);
}

inline Warp& warp() { return warps[size_t(running) / 32]; }
inline uint32_t* in() { return warp().in[running % 32]; }
inline uint32_t* out() { return warp().out[running % 32]; }

inline void run_block(int threads) {
  std::memset(shared, 0xff, sizeof shared);
  while (int(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  warps.assign(size_t(threads / 32), Warp());
  for (Warp& one : warps) one.meeting.members = 32;
  block = Meeting();
  block.members = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[size_t(i)];
    fiber.started = fiber.done = false;
    fiber.waits = nullptr;
    fiber.copies.clear();
  }
  const auto turn = [](int first, int last) {  // of each of these that can go on; whether there is one
    bool moved = false;
    for (int k = first; k < last; ++k) {
      const int i = backwards ? last - 1 - (k - first) : k;
      Fiber& fiber = *fibers[size_t(i)];
      if (fiber.done || (fiber.waits && fiber.waits->round == fiber.round)) continue;
      fiber.waits = nullptr;
      resume(i);
      moved = true;
    }
    return moved;
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (int k = 0; k < threads / 32; ++k) {
      const int w = backwards ? threads / 32 - 1 - k : k;
      while (turn(32 * w, 32 * w + 32)) {
        moved = true;
        if (!apart) break;
      }
    }
  }
  for (int i = 0; i < threads; ++i)
    if (!fibers[size_t(i)]->done) fail("threads wait for others that do not come");
}

inline float product(bf16, uint32_t a, uint32_t b) { return load(bf16{uint16_t(a)}) * load(bf16{uint16_t(b)}); }
inline float product(f16, uint32_t a, uint32_t b) { return load(f16{uint16_t(a)}) * load(f16{uint16_t(b)}); }

inline void load_four(uint32_t (&v)[4], uint32_t address, bool transposed) {
  if (address % 16) fail("a row of a matrix is not aligned");
  in()[0] = address;
  meet(warp().meeting, transposed ? "load_transposed" : "load_matrices", [&] {
    for (int m = 0; m < 4; ++m)
      for (int lane = 0; lane < 32; ++lane) {
        uint16_t pair[2];
        for (int h = 0; h < 2; ++h) {
          const int row = transposed ? lane % 4 * 2 + h : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + h;
          const char* from = shared + warp().in[8 * m + row][0] + 2 * column;
          check(from, 2, 2);
          std::memcpy(&pair[h], from, 2);
        }
        warp().out[lane][m] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
      }
  });
  std::memcpy(v, out(), 16);
}

}  // namespace simt

inline char* shared_memory() { return simt::shared; }
inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const char*>(p) - simt::shared); }

template <class V>
V read(const void* p) {
  simt::check(p, sizeof(V), alignof(V));
  V value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <class V>
void write(void* p, const V& value) {
  simt::check(p, sizeof(V), alignof(V));
  std::memcpy(p, &value, sizeof value);
}

template <class V>
void write_global(void* p, const V& value) {
  static_assert(sizeof(V) == 16, "16 bytes");
  simt::check(p, 16, 16);
  write(p, value);
}

inline void copy_async(uint32_t to, const void* from, int bytes) {
  simt::check(simt::shared + to, 16, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16) simt::fail("a copy is not aligned");
  if (bytes) simt::check(from, size_t(bytes), 16);
  simt::Fiber& fiber = *simt::fibers[size_t(simt::running)];
  fiber.copies.push_back({simt::shared + to, from, bytes, fiber.group});
}

inline void commit_copies() { ++simt::fibers[size_t(simt::running)]->group; }

template <int Pending>
void wait_copies() {
  simt::Fiber& fiber = *simt::fibers[size_t(simt::running)];
  std::vector<simt::Copy> later;
  for (const simt::Copy& copy : fiber.copies) {
    if (copy.group >= fiber.group - Pending) {
      later.push_back(copy);
      continue;
    }
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, size_t(copy.bytes));
  }
  fiber.copies = later;
}

inline void __syncthreads() {
  simt::meet(simt::block, "__syncthreads", [] {});
}

inline void __syncwarp() {
  simt::meet(simt::warp().meeting, "__syncwarp", [] {});
}

inline uint32_t ballot(bool vote) {
  simt::in()[0] = vote;
  simt::meet(simt::warp().meeting, "ballot", [] {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= simt::warp().in[lane][0] << lane;
    for (int lane = 0; lane < 32; ++lane) simt::warp().out[lane][0] = all;
  });
  return simt::out()[0];
}

inline void load_matrices(uint32_t (&v)[4], uint32_t address) { simt::load_four(v, address, false); }
inline void load_transposed(uint32_t (&v)[4], uint32_t address) { simt::load_four(v, address, true); }

template <class T>
void multiply(T type, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t* in = simt::in();
  std::memcpy(in, a, 16);
  in[4] = b0;
  in[5] = b1;
  std::memcpy(in + 6, sum, 16);
  simt::meet(simt::warp().meeting, "multiply", [&] {
    const auto& all = simt::warp().in;
    const auto half = [](uint32_t word, int h) { return h ? word >> 16 : word & 0xffffu; };
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4, column = lane % 4 * 2 + e % 2;
        float total = from_bits(all[lane][6 + e]);
        for (int k = 0; k < 16; ++k) {
          const int q = k % 8 / 2;
          const uint32_t left = half(all[row * 4 + q][k / 8 * 2 + e / 2], k % 2);
          const uint32_t right = half(all[column * 4 + q][4 + k / 8], k % 2);
          total += simt::product(type, left, right);
        }
        simt::warp().out[lane][e] = bits_of(total);
      }
  });
  std::memcpy(sum, simt::out(), 16);
}

template <class T>
uint32_t pack(T, float low, float high) {
  T a, b;
  store(a, low);
  store(b, high);
  return uint32_t(a.bits) | uint32_t(b.bits) << 16;
}

template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, int threads, int shared_bytes, Stream, const A&... arguments) {
  if (size_t(shared_bytes) > simt::kShared) return "too much shared memory";
  simt::shared_size = size_t(shared_bytes);
  simt::body = [&] { kernel(arguments...); };
  blockDim = dim3(unsigned(threads));
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      simt::run_block(threads);
    }
  return nullptr;
}
