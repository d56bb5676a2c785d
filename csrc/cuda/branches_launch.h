// Launch configurations of the low-rank products. Plain C++ but for launch(), so that an emulation runs it too.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "branches_kernels.h"

namespace {

struct Device {
  int processors = 132;
  int shared_bytes = 227 * 1024;  // at most, per block
};

constexpr int64_t ceiling(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

struct Cut {
  int64_t blocks, parts, units;  // each of `blocks` is split into `parts` of `units` of work
  int threads, shared;
  int64_t workspace;  // floats
  double cost;
};

// Splits `units` of work of each of `blocks` into the parts that finish first, where the device runs `slots` blocks at
// once. A block takes about one unit to start, and `extra` units to write and read back its part of a sum.
Cut cut(int64_t blocks, int64_t units, int64_t slots, double extra, int limit, int threads, int shared) {
  Cut best{blocks, 1, units, threads, shared, 0, -1};
  for (int64_t parts = 1; parts <= limit && (parts == 1 || parts <= units); ++parts) {
    const int64_t each = ceiling(units, parts);
    const double waves = double(std::max<int64_t>(1, ceiling(blocks * parts, slots)));
    const double cost = waves * (double(each) + 1 + (parts > 1 ? extra : 0));
    if (best.cost < 0 || cost < best.cost) best.parts = parts, best.units = each, best.cost = cost;
  }
  if (best.units) best.parts = ceiling(units, best.units);  // no part without work
  return best;
}

// The best number of warps per block, with 16 `fragments` rows per warp. The time of a block is that of its rows and of
// the `ranks` rows of a that it reads as well; the number of idle processors in the last wave depends on the choice.
template <class Cuts>
Cut with_warps(const Device& device, int fragments, int ranks, const Cuts& cuts) {
  Cut best{};
  for (int warps = 4; warps <= 8; ++warps) {
    Cut c = cuts(warps);
    c.cost *= warps * 16 * fragments + ranks;
    if (warps == 4 || (c.shared <= device.shared_bytes && c.cost <= best.cost)) best = c;
  }
  return best;
}

template <class T, int Ranks>
struct Products {
  // For rank 96 a warp has 32 rows, which halves its reads of a: the largest size without spills.
  static constexpr int kFragments = Ranks == 96 ? 2 : 1, kProjectResident = Ranks <= 64 ? 2 : 1;
  static constexpr int kGradAResident = Ranks <= 32 ? 3 : 2;
  template <bool Plus>
  static constexpr int kExpandResident = Ranks <= (Plus ? 64 : 96) ? 2 : 1;
  static constexpr int kGradBColumns = Ranks <= 32 ? 64 : 32;  // of a warp
  static constexpr int kGradBThreads = Ranks <= 32 ? 384 : 256, kSlab = kGradBColumns * kGradBThreads / kWarp;

  static Cut project(const Shape& s, const Device& device) {
    Cut c = with_warps(device, kFragments, Ranks, [&](int warps) {
      const int rows = warps * 16 * kFragments;
      return cut(ceiling(s.rows, rows), ceiling(s.columns, kTile), int64_t(kProjectResident) * device.processors,
                 Ranks / 32.0, 32, warps * kWarp, 2 * (rows + Ranks) * kPitch * 2);
    });
    c.workspace = c.parts > 1 ? s.rows * Ranks * c.parts : 0;
    return c;
  }

  static Cut grad_a(const Shape& s, const Device& device) {
    constexpr int bytes = 2 * kGradARows * (kPitch + Ranks + kPad) * 2 + kGradARows * kTile * 2;
    Cut c = cut(ceiling(s.columns, kTile), ceiling(s.rows, kGradARows), int64_t(kGradAResident) * device.processors,
                Ranks / 16.0, 64, kGradAThreads, bytes);
    c.workspace = c.parts > 1 ? s.rank * s.columns * c.parts : 0;
    return c;
  }

  static Cut expand(const Shape& s, bool plus, bool add, const Device& device) {
    const int64_t resident = plus ? kExpandResident<true> : kExpandResident<false>;
    return with_warps(device, 1, Ranks, [&](int warps) {
      const int rows = warps * 16;
      return cut(ceiling(s.rows, rows), ceiling(s.columns, kTile), resident * device.processors, 0, 64, warps * kWarp,
                 (2 * Ranks + (add ? 2 : 1) * rows) * kPitch * 2);
    });
  }

  static constexpr int grad_b_bytes(int stages) {
    return stages * kGradBRows * (kSlab + kPad + Ranks + kPad) * 2 +
           kGradBThreads / kWarp * kGradBRows * (Ranks + kPad) * 4;
  }

  static int grad_b_stages(const Device& device) { return grad_b_bytes(3) <= device.shared_bytes ? 3 : 2; }

  static Cut grad_b(const Shape& s, const Device& device) {
    Cut c = cut(ceiling(s.columns, kSlab), ceiling(s.rows, kGradBRows), device.processors, Ranks / 8.0, 64,
                kGradBThreads, grad_b_bytes(grad_b_stages(device)));
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
    p.tiles = int(c.units);
    p.partial = c.parts > 1 ? workspace : nullptr;
    const auto kernel = project_kernel<T, Ranks, kFragments, 256, kProjectResident>;
    const char* error = launch(kernel, dim3(unsigned(c.blocks), unsigned(c.parts)), c.threads, c.shared, stream, p);
    if (error || c.parts == 1) return error;
    return combine({workspace, p.h, s.rows, s.rank, Ranks, p.h_stride, int(c.parts), p.factor}, {}, stream);
  }

  static const char* run_grad_a(const GradA& given, const Shape& s, float* workspace, const Device& device,
                               Stream stream) {
    const Cut c = grad_a(s, device);
    GradA p = given;
    p.steps = int(c.units);
    p.partial = c.parts > 1 ? workspace : nullptr;
    const auto kernel = grad_a_kernel<T, Ranks, kGradAResident>;
    const char* error = launch(kernel, dim3(unsigned(c.blocks), unsigned(c.parts)), c.threads, c.shared, stream, p);
    if (error || c.parts == 1) return error;
    return combine({workspace, p.da, s.rank, s.columns, s.columns, p.da_stride, int(c.parts), p.factor}, {}, stream);
  }

  static const char* run_expand(const Expand& given, const Shape& s, const Device& device, Stream stream) {
    const bool plus = given.add || given.bias;
    const Cut c = expand(s, plus, given.add, device);
    Expand p = given;
    p.tiles = int(c.units);
    const auto kernel = plus ? expand_kernel<T, Ranks, true, kExpandResident<true>>
                             : expand_kernel<T, Ranks, false, kExpandResident<false>>;
    return launch(kernel, dim3(unsigned(c.blocks), unsigned(c.parts)), c.threads, c.shared, stream, p);
  }

  static const char* run_grad_b(const GradB& given, const Narrow& dh, const Narrow& db, float scale, const Shape& s,
                                float* workspace, const Device& device, Stream stream) {
    const Cut c = grad_b(s, device);
    GradB p = given;
    p.steps = int(c.units);
    p.stages = grad_b_stages(device);
    p.dh = workspace;
    p.db = workspace + c.blocks * s.rows * Ranks;
    const auto kernel = grad_b_kernel<T, Ranks, kGradBColumns, kGradBThreads>;
    const char* error = launch(kernel, dim3(unsigned(c.blocks), unsigned(c.parts)), c.threads, c.shared, stream, p);
    if (error) return error;
    return combine({p.dh, dh.data, s.rows, s.rank, Ranks, dh.stride, int(c.blocks), scale},
                   {p.db, db.data, s.columns, s.live, Ranks, db.stride, int(c.parts), scale}, stream);
  }
};

constexpr int kGradBRank = 96, kGradBPart = 64;  // a wider grad_b takes two launches, the first of 64 ranks

// work(Products<T, Ranks>()) with the smallest Ranks that holds the rank.
template <class T, int Widest, class Work>
auto with_rank(int rank, const Work& work) {
  if (rank <= 16) return work(Products<T, 16>());
  if (rank <= 32) return work(Products<T, 32>());
  if (rank <= 64) return work(Products<T, 64>());
  if constexpr (Widest > 96)
    if (rank > 96) return work(Products<T, Widest>());
  return work(Products<T, 96>());
}

template <int Widest, class Work>
const char* with_type(char type, int rank, const Work& work) {
  switch (type) {
    case 'b': return with_rank<bf16, Widest>(rank, work);
    case 'h': return with_rank<f16, Widest>(rank, work);
    default: return "type must be b or h";
  }
}

// The same for both types.
int64_t workspace_bytes(const char* what, const Shape& s, const Device& device) {
  if (!std::strcmp(what, "grad_b"))
    return 4 * with_rank<bf16, kGradBRank>(s.rank > kGradBRank ? kGradBPart : s.rank,
                                            [&](auto products) { return products.grad_b(s, device).workspace; });
  const bool project = !std::strcmp(what, "project"), grad_a = !std::strcmp(what, "grad_a");
  return 4 * with_rank<bf16, kMaxRank>(s.rank, [&](auto products) -> int64_t {
    return project ? products.project(s, device).workspace : grad_a ? products.grad_a(s, device).workspace : 0;
  });
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
  return with_type<kMaxRank>(type, s.rank,
                             [&](auto products) { return products.run_project(p, s, workspace, device, stream); });
}

const char* grad_a(char type, const Shape& s, Narrow dh, Wide x, Wide da, const Dropout& dropout, float* workspace,
                  const Device& device, Stream stream) {
  if (const char* error = wrong(s, {x, da}, dropout)) return error;
  if (!s.columns) return nullptr;
  const GradA p{of<uint16_t>(dh), of<uint16_t>(x), da.data, nullptr, s.rows, s.columns, dh.stride, x.stride,
                da.stride, s.rank, 0, kept_factor(dropout), dropout};
  return with_type<kMaxRank>(type, s.rank,
                             [&](auto products) { return products.run_grad_a(p, s, workspace, device, stream); });
}

const char* expand(char type, const Shape& s, Narrow dh, Wide a, const void* bias, Wide out, bool add, float scale,
                   const Dropout& dropout, const Device& device, Stream stream) {
  if (const char* error = wrong(s, {a, out}, dropout)) return error;
  if (!s.rows || !s.columns) return nullptr;
  const Expand p{of<uint16_t>(dh), of<uint16_t>(a), bias, static_cast<uint16_t*>(out.data), s.rows, s.columns,
                 dh.stride, a.stride, out.stride, s.rank, 0, add, kept_factor(dropout) * scale, dropout};
  return with_type<kMaxRank>(type, s.rank, [&](auto products) { return products.run_expand(p, s, device, stream); });
}

const char* grad_b(char type, const Shape& s, Wide dy, Wide bt, Narrow h, Narrow dh, Narrow db, float scale,
                   float* workspace, const Device& device, Stream stream) {
  if (const char* error = wrong(s, {dy, bt}, Dropout{})) return error;
  if (!s.columns) return "columns must not be 0";
  if (s.live < 0 || s.live > s.rank) return "live must be 0 to the rank";
  const int width = s.rank > kGradBRank ? kGradBPart : s.rank;
  for (int from = 0; from < s.rank; from += width) {
    const auto moved = [&](const Narrow& n) { return Narrow{static_cast<uint16_t*>(n.data) + from, n.stride}; };
    const Shape part{s.rows, s.columns, std::min(width, s.rank - from), std::min(width, std::max(0, s.live - from))};
    const GradB p{of<uint16_t>(dy), of<uint16_t>(bt) + from * bt.stride, of<uint16_t>(moved(h)), nullptr, nullptr,
                   s.rows, s.columns, dy.stride, bt.stride, h.stride, part.rank, part.live, 0, 0};
    const char* error = with_type<kGradBRank>(type, width, [&](auto products) {
      return products.run_grad_b(p, moved(dh), moved(db), scale, part, workspace, device, stream);
    });
    if (error) return error;
  }
  return nullptr;
}

}  // namespace
