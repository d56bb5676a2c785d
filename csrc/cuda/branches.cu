// Entry points of dropout and of the low-rank products on the current device. They do not synchronize, and the seed is
// read on the device: a captured graph drops other elements where its seed has changed.
#include "branches_launch.h"
#include "dropout_kernels.h"

namespace {

// Properties of the current device; without one those of an H100, so that sizes can be computed anywhere.
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

const char* launch_grad_a(char type, const Shape& shape, Narrow dh, Wide x, Wide da, const Dropout& dropout,
                         float* workspace, Stream stream) {
  return grad_a(type, shape, dh, x, da, dropout, workspace, current(), stream);
}

const char* launch_expand(char type, const Shape& shape, Narrow dh, Wide a, const void* bias, Wide out, bool add,
                          float scale, const Dropout& dropout, Stream stream) {
  return expand(type, shape, dh, a, bias, out, add, scale, dropout, current(), stream);
}

const char* launch_grad_b(char type, const Shape& shape, Wide dy, Wide bt, Narrow h, Narrow dh, Narrow db, float scale,
                          float* workspace, Stream stream) {
  return grad_b(type, shape, dy, bt, h, dh, db, scale, workspace, current(), stream);
}

int64_t workspace_bytes(const char* what, const Shape& shape) {
  for (const char* known : {"project", "grad_a", "expand", "grad_b"})
    if (!std::strcmp(what, known)) return workspace_bytes(what, shape, current());
  return -1;
}
