// How the products are cut into blocks, and launched. Plain C++ but for launch(), so that an emulation runs it too.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "branches_kernels.h"

namespace {

struct Device {
  int processors = 132;
  int shared_bytes = 227 * 1024;  // that a block may have
};

constexpr int64_t ceiling(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// Parts of `units` of work for each of `blocks`, where the device runs `slots` blocks at once: those that end first. A
// block takes about a unit to begin, and `extra` units for a part of a sum to be written and read again.
int parts(int64_t blocks, int64_t units, int64_t slots, double extra, int limit) {
  int best = 1;
  double least = 0;
  for (int p = 1; p <= limit && (p == 1 || p <= units); ++p) {
    const double cost = double(ceiling(blocks * p, slots)) * (double(ceiling(units, p)) + 1 + (p > 1 ? extra : 0));
    if (p == 1 || cost < least) best = p, least = cost;
  }
  return int(ceiling(units, std::max<int64_t>(1, ceiling(units, best))));  // no part without work
}

struct Cut {
  int blocks, parts, units;  // units: of work per block
  int threads, shared;
  int64_t workspace;  // floats
};

Cut cut(int64_t blocks, int64_t units, int64_t slots, double extra, int limit, int threads, int shared) {
  const int n = std::max(1, parts(std::max<int64_t>(1, blocks), units, slots, extra, limit));
  return {int(blocks), n, int(ceiling(units, n)), threads, shared, 0};
}

template <class T, int Ranks>
struct Products {
  // Of rank 96 a warp has 32 rows, which halves what it reads of a: the widest with which nothing spills.
  static constexpr int kFragments = Ranks == 96 ? 2 : 1, kProjectResident = Ranks <= 64 ? 2 : 1;
  static constexpr int kWeighResident = Ranks <= 32 ? 3 : 2;
  static constexpr int kSpreadResident = Ranks <= 96 ? 2 : 1;
  static constexpr int kGatherColumns = Ranks <= 32 ? 64 : Ranks <= 96 ? 32 : 16;  // of a warp
  static constexpr int kGatherThreads = Ranks <= 32 ? 384 : 256, kSlab = kGatherColumns * kGatherThreads / kWarp;

  static Cut project(const Shape& s, const Device& device) {
    const auto bytes = [](int warps) { return 2 * (warps * 16 * kFragments + Ranks) * kPitch * 2; };
    const int warps = bytes(8) <= device.shared_bytes ? 8 : 4;
    Cut c = cut(ceiling(s.rows, warps * 16 * kFragments), ceiling(s.columns, kTile),
                int64_t(kProjectResident) * device.processors, Ranks / 32.0, 32, warps * kWarp, bytes(warps));
    c.workspace = c.parts > 1 ? s.rows * Ranks * c.parts : 0;
    return c;
  }

  static Cut weigh(const Shape& s, const Device& device) {
    constexpr int bytes = 2 * kWeighRows * (kPitch + Ranks + kPad) * 2 + kWeighRows * kTile * 2;
    Cut c = cut(ceiling(s.columns, kTile), ceiling(s.rows, kWeighRows), int64_t(kWeighResident) * device.processors,
                Ranks / 16.0, 64, kWeighThreads, bytes);
    c.workspace = c.parts > 1 ? s.rank * s.columns * c.parts : 0;
    return c;
  }

  static Cut spread(const Shape& s, bool add, const Device& device) {
    const int bytes = (2 * Ranks + (add ? 2 : 1) * kSpreadRows) * kPitch * 2;
    return cut(ceiling(s.rows, kSpreadRows), ceiling(s.columns, kTile), int64_t(kSpreadResident) * device.processors, 0,
               64, kSpreadThreads, bytes);
  }

  static constexpr int gather_bytes(int stages) {
    return stages * kGatherRows * (kSlab + kPad + Ranks + kPad) * 2 +
           kGatherThreads / kWarp * kGatherRows * (Ranks + kPad) * 4;
  }

  static int gather_stages(const Device& device) { return gather_bytes(3) <= device.shared_bytes ? 3 : 2; }

  static Cut gather(const Shape& s, const Device& device) {
    Cut c = cut(ceiling(s.columns, kSlab), ceiling(s.rows, kGatherRows), device.processors, Ranks / 8.0, 64,
                kGatherThreads, gather_bytes(gather_stages(device)));
    c.workspace = Ranks * (c.blocks * s.rows + s.columns * c.parts);
    return c;
  }

  static const char* combine(const Sum& one, const Sum& other, Stream stream) {
    const auto count = [](const Sum& sum) { return sum.rows * ceiling(sum.columns, 4); };
    const int64_t blocks = ceiling(count(one) + count(other), kCombineThreads);
    if (!blocks) return nullptr;
    return launch(combine_kernel<T>, dim3(unsigned(blocks)), kCombineThreads, 0, stream, one, other);
  }

  static const char* run_project(const Project& given, const Shape& s, float* workspace, const Device& device,
                                 Stream stream) {
    const Cut c = project(s, device);
    Project p = given;
    p.tiles = c.units;
    p.partial = c.parts > 1 ? workspace : nullptr;
    const auto kernel = project_kernel<T, Ranks, kFragments, 256, kProjectResident>;
    const char* error = launch(kernel, dim3(unsigned(c.blocks), unsigned(c.parts)), c.threads, c.shared, stream, p);
    if (error || c.parts == 1) return error;
    return combine({workspace, p.h, s.rows, s.rank, Ranks, p.h_stride, c.parts, p.factor}, {}, stream);
  }

  static const char* run_weigh(const Weigh& given, const Shape& s, float* workspace, const Device& device,
                               Stream stream) {
    const Cut c = weigh(s, device);
    Weigh p = given;
    p.steps = c.units;
    p.partial = c.parts > 1 ? workspace : nullptr;
    const auto kernel = weigh_kernel<T, Ranks, kWeighResident>;
    const char* error = launch(kernel, dim3(unsigned(c.blocks), unsigned(c.parts)), c.threads, c.shared, stream, p);
    if (error || c.parts == 1) return error;
    return combine({workspace, p.da, s.rank, s.columns, s.columns, p.da_stride, c.parts, p.factor}, {}, stream);
  }

  static const char* run_spread(const Spread& given, const Shape& s, float*, const Device& device, Stream stream) {
    const Cut c = spread(s, given.add, device);
    Spread p = given;
    p.tiles = c.units;
    const auto kernel = p.add || p.bias ? spread_kernel<T, Ranks, true, kSpreadResident>
                                        : spread_kernel<T, Ranks, false, kSpreadResident>;
    return launch(kernel, dim3(unsigned(c.blocks), unsigned(c.parts)), c.threads, c.shared, stream, p);
  }

  static const char* run_gather(const Gather& given, const Narrow& dh, const Narrow& db, float scale, const Shape& s,
                                float* workspace, const Device& device, Stream stream) {
    const Cut c = gather(s, device);
    Gather p = given;
    p.steps = c.units;
    p.stages = gather_stages(device);
    p.dh = workspace;
    p.db = workspace + int64_t(c.blocks) * s.rows * Ranks;
    const auto kernel = gather_kernel<T, Ranks, kGatherColumns, kGatherThreads>;
    const char* error = launch(kernel, dim3(unsigned(c.blocks), unsigned(c.parts)), c.threads, c.shared, stream, p);
    if (error) return error;
    return combine({p.dh, dh.data, s.rows, s.rank, Ranks, dh.stride, c.blocks, scale},
                   {p.db, db.data, s.columns, s.live, Ranks, db.stride, c.parts, scale}, stream);
  }
};

// work(Products<T, Ranks>()) of the narrowest kernel that holds the rank.
template <class T, class Work>
auto with_rank(int rank, const Work& work) {
  if (rank <= 16) return work(Products<T, 16>());
  if (rank <= 32) return work(Products<T, 32>());
  if (rank <= 64) return work(Products<T, 64>());
  if (rank <= 96) return work(Products<T, 96>());
  return work(Products<T, kMaxRank>());
}

template <class Work>
const char* with_type(char type, int rank, const Work& work) {
  switch (type) {
    case 'b': return with_rank<bf16>(rank, work);
    case 'h': return with_rank<f16>(rank, work);
    default: return "type must be b or h";
  }
}

int64_t workspace_bytes(const char* what, const Shape& s, const Device& device) {
  const auto floats = [&](auto products) -> int64_t {
    if (!std::strcmp(what, "project")) return products.project(s, device).workspace;
    if (!std::strcmp(what, "weigh")) return products.weigh(s, device).workspace;
    if (!std::strcmp(what, "gather")) return products.gather(s, device).workspace;
    return 0;
  };
  return 4 * with_rank<bf16>(s.rank, floats);  // the same for both types
}

const char* wrong(const Shape& s, std::initializer_list<Wide> wide, const Dropout& dropout) {
  if (s.rank < 1 || s.rank > kMaxRank) return "rank must be 1 to 128";
  if (s.rows < 0 || s.columns < 0 || s.columns % 8) return "columns must be a multiple of 8";
  if (s.rows > INT32_MAX || s.columns > INT32_MAX) return "rows and columns must be below 2^31";
  for (const Wide& w : wide)
    if (w.stride % 8 || reinterpret_cast<uintptr_t>(w.data) % 16)
      return "a wide matrix needs a stride that is a multiple of 8, and an address that is one of 16 bytes";
  if (dropout.threshold >= 65536) return "threshold must be below 65536";
  if (dropout.threshold && !dropout.seed) return "dropout needs a seed";
  return nullptr;
}

float kept_factor(const Dropout& dropout) { return float(65536.0 / (65536.0 - dropout.threshold)); }

template <class P>
const P* of(const Wide& w) {
  return static_cast<const P*>(w.data);
}

template <class P>
const P* of(const Narrow& n) {
  return static_cast<const P*>(n.data);
}

const char* project(char type, const Shape& s, Wide x, Wide a, Narrow h, const Dropout& dropout, float* workspace,
                    const Device& device, Stream stream) {
  if (const char* error = wrong(s, {x, a}, dropout)) return error;
  if (!s.rows) return nullptr;
  const Project p{of<uint16_t>(x), of<uint16_t>(a), h.data, nullptr, s.rows, s.columns, x.stride, a.stride,
                  h.stride, s.rank, 0, kept_factor(dropout), dropout};
  return with_type(type, s.rank, [&](auto products) { return products.run_project(p, s, workspace, device, stream); });
}

const char* weigh(char type, const Shape& s, Narrow dh, Wide x, Wide da, const Dropout& dropout, float* workspace,
                  const Device& device, Stream stream) {
  if (const char* error = wrong(s, {x, da}, dropout)) return error;
  if (!s.columns) return nullptr;
  const Weigh p{of<uint16_t>(dh), of<uint16_t>(x), da.data, nullptr, s.rows, s.columns, dh.stride, x.stride,
                da.stride, s.rank, 0, kept_factor(dropout), dropout};
  return with_type(type, s.rank, [&](auto products) { return products.run_weigh(p, s, workspace, device, stream); });
}

const char* spread(char type, const Shape& s, Narrow dh, Wide a, const void* bias, Wide out, bool add, float scale,
                   const Dropout& dropout, const Device& device, Stream stream) {
  if (const char* error = wrong(s, {a, out}, dropout)) return error;
  if (!s.rows || !s.columns) return nullptr;
  const Spread p{of<uint16_t>(dh), of<uint16_t>(a), bias, static_cast<uint16_t*>(out.data), s.rows, s.columns, dh.stride,
                 a.stride, out.stride, s.rank, 0, add, kept_factor(dropout) * scale, dropout};
  return with_type(type, s.rank, [&](auto products) { return products.run_spread(p, s, nullptr, device, stream); });
}

const char* gather(char type, const Shape& s, Wide dy, Wide bt, Narrow h, Narrow dh, Narrow db, float scale,
                   float* workspace, const Device& device, Stream stream) {
  if (const char* error = wrong(s, {dy, bt}, Dropout{})) return error;
  if (s.live < 0 || s.live > s.rank) return "live must be 0 to the rank";
  const Gather p{of<uint16_t>(dy), of<uint16_t>(bt), of<uint16_t>(h), nullptr, nullptr, s.rows, s.columns, dy.stride,
                 bt.stride, h.stride, s.rank, s.live, 0, 0};
  return with_type(type, s.rank, [&](auto products) {
    return products.run_gather(p, dh, db, scale, s, workspace, device, stream);
  });
}

}  // namespace
