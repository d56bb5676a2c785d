// The skinny products of the branches: which device they run on, and what module.cpp calls.
#include "branches_launch.h"

namespace {

// Of the current device; without one the numbers of an H100, so that sizes can be asked for anywhere.
Device current() {
  static thread_local int known = -1;
  static thread_local Device device;
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess) {
    cudaGetLastError();
    return Device();
  }
  if (index == known) return device;
  Device found;
  if (cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, index) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index) != cudaSuccess) {
    cudaGetLastError();
    return Device();
  }
  known = index;
  return device = found;
}

}  // namespace

const char* launch_project(char type, const Shape& shape, Wide x, Wide a, Narrow h, const Dropout& dropout,
                           float* workspace, CUstream_st* stream) {
  return project(type, shape, x, a, h, dropout, workspace, current(), stream);
}

const char* launch_weigh(char type, const Shape& shape, Narrow dh, Wide x, Wide da, const Dropout& dropout,
                         float* workspace, CUstream_st* stream) {
  return weigh(type, shape, dh, x, da, dropout, workspace, current(), stream);
}

const char* launch_spread(char type, const Shape& shape, Narrow dh, Wide a, const void* bias, Wide out, bool add,
                          float scale, const Dropout& dropout, CUstream_st* stream) {
  return spread(type, shape, dh, a, bias, out, add, scale, dropout, current(), stream);
}

const char* launch_gather(char type, const Shape& shape, Wide dy, Wide bt, Narrow h, Narrow dh, Narrow db, float scale,
                          float* workspace, CUstream_st* stream) {
  return gather(type, shape, dy, bt, h, dh, db, scale, workspace, current(), stream);
}

int64_t workspace_bytes(const char* what, const Shape& shape) {
  for (const char* known : {"project", "weigh", "spread", "gather"})
    if (!std::strcmp(what, known)) return workspace_bytes(what, shape, current());
  return -1;
}
