// Random bits of the dropout mask: the counter-based generator Philox 4x32-7, shared by the C++ and the CUDA layer.
//
// Row m of x takes its bits from the counters (16 tile + lane, m, branch, 0) under a 64-bit seed. A tile is 128
// columns: column 32 w + 16 t + lane has the lower (t = 0) or upper (t = 1) half of word w. An element is dropped where
// its 16 bits are below the threshold. Internal linkage, as the C++ layer compiles this file once per instruction set.
#pragma once

#include "floats.h"

namespace {

constexpr int kTile = 128, kTileLanes = 16, kRounds = 7;

// Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u, kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

CNEXT_HD void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t(kMultiplier0) * c[0], p1 = uint64_t(kMultiplier1) * c[2];
    c[0] = uint32_t(p1 >> 32) ^ c[1] ^ key0;
    c[1] = uint32_t(p1);
    c[2] = uint32_t(p0 >> 32) ^ c[3] ^ key1;
    c[3] = uint32_t(p0);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
}

}  // namespace
