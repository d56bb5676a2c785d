// Dropout of a matrix and the skinny products of the branches: which device they run on, and what module.cpp calls.
// Nothing waits for the host, and the seed is read on the device, so that a captured graph draws anew where its seed is
// drawn anew.
#include "branches_launch.h"
#include "dropout_kernels.h"

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

const char* launch_dropout(char type, bool add, const void* x, void* out, const Matrix& matrix, const Dropout& dropout,
                           Stream stream) {
  return drop(type, add, x, out, matrix, dropout, stream);
}

const char* launch_project(char type, const Shape& shape, Wide x, Wide a, Narrow h, const Dropout& dropout,
                           float* workspace, Stream stream) {
  return project(type, shape, x, a, h, dropout, workspace, current(), stream);
}

const char* launch_weigh(char type, const Shape& shape, Narrow dh, Wide x, Wide da, const Dropout& dropout,
                         float* workspace, Stream stream) {
  return weigh(type, shape, dh, x, da, dropout, workspace, current(), stream);
}

const char* launch_spread(char type, const Shape& shape, Narrow dh, Wide a, const void* bias, Wide out, bool add,
                          float scale, const Dropout& dropout, Stream stream) {
  return spread(type, shape, dh, a, bias, out, add, scale, dropout, current(), stream);
}

const char* launch_gather(char type, const Shape& shape, Wide dy, Wide bt, Narrow h, Narrow dh, Narrow db, float scale,
                          float* workspace, Stream stream) {
  return gather(type, shape, dy, bt, h, dh, db, scale, workspace, current(), stream);
}

int64_t workspace_bytes(const char* what, const Shape& shape) {
  for (const char* known : {"project", "weigh", "spread", "gather"})
    if (!std::strcmp(what, known)) return workspace_bytes(what, shape, current());
  return -1;
}
