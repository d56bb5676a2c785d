// Addresses, dtypes and strides of tensors, read through DLPack's exchange API, without torch's headers.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

namespace {

constexpr int kDimensions = 16;

// Layout of DLPack 1.3 (dlpack.h: DLTensor and DLPackExchangeAPI).
struct DLTensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t dimensions;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);  // 0, or a Python error is set
  void* current_stream;
};

// A hash of shape and strides, without the strides of dimensions of one element. 0: there are gaps.
int64_t layout(const DLTensor& t, int64_t elements) {
  uint64_t hash = 1469598103934665603ull;
  const auto mix = [&hash](uint64_t value) { hash = (hash ^ value) * 1099511628211ull, hash ^= hash >> 29; };
  std::pair<int64_t, int64_t> strides[kDimensions];
  int kept = 0;
  for (int d = 0; d < t.dimensions; ++d) {
    mix(uint64_t(t.shape[d]));
    if (elements && t.shape[d] != 1 && t.strides) {
      mix(uint64_t(t.strides[d]) + 1);
      strides[kept++] = {t.strides[d], t.shape[d]};
    }
  }
  std::sort(strides, strides + kept);
  int64_t expected = 1;
  for (int k = 0; k < kept; ++k) {
    if (strides[k].first != expected) return 0;
    expected *= strides[k].second;
  }
  return int64_t(hash | 1);
}

// (tensors, 4): address, elements, kind (device and dtype), layout. A row of -1: not a dense tensor in memory.
pybind11::array_t<int64_t> describe(const pybind11::capsule& api, const pybind11::list& tensors) {
  const auto* exchange = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
  if (!exchange) throw pybind11::error_already_set();
  if (exchange->major != 1 || !exchange->tensor_from_object)
    throw std::invalid_argument("expected DLPack's exchange API of version 1");
  const auto count = pybind11::ssize_t(tensors.size());
  pybind11::array_t<int64_t> table({count, pybind11::ssize_t(4)});
  int64_t* row = table.mutable_data();
  for (pybind11::ssize_t i = 0; i < count; ++i, row += 4) {
    DLTensor t;
    std::fill(row, row + 4, -1);
    if (exchange->tensor_from_object(PyList_GET_ITEM(tensors.ptr(), i), &t)) {
      PyErr_Clear();
      continue;
    }
    if (t.dimensions > kDimensions) continue;
    int64_t elements = 1;
    for (int d = 0; d < t.dimensions; ++d) elements *= t.shape[d];
    const int64_t laid = layout(t, elements);
    if (!laid) continue;
    row[0] = int64_t(reinterpret_cast<uintptr_t>(t.data)) + int64_t(t.byte_offset);
    row[1] = elements;
    row[2] = (int64_t(t.device.type) << 40) + (int64_t(t.device.index) << 24) + (t.dtype.code << 8) + t.dtype.bits;
    row[3] = laid;
  }
  return table;
}

}  // namespace
