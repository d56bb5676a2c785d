// The Python module cnext._cuda. It imports without a driver; a launch then raises.
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../calls.h"
#include "dropout.h"
#include "foreach.h"

namespace py = pybind11;

namespace {

int64_t blocks(const Addresses& sizes) {
  int64_t total = 0;
  for (int64_t t = 0; t < sizes.shape(0); ++t)
    total += std::max<int64_t>(1, (sizes.data()[t] + kBlockElements - 1) / kBlockElements);
  return total;
}

// As in cnext._cpu, on the device; partial: (blocks(sizes), column_width) of float64, and tickets: (tensors,) zeros of
// uint32, where the rule counts.
void foreach (const std::string& rule, const std::string& dtypes, const Addresses& addresses, const Addresses& sizes,
              const std::vector<double>& scalars, uintptr_t columns, int64_t column_width, uintptr_t partial,
              uintptr_t tickets, uintptr_t rows, int64_t row_width, uintptr_t stream) {
  const Kernel& kernel = find(averaging_kernels(), "CUDA", rule, dtypes);
  check(kernel.signature, addresses, sizes, scalars.size(), {columns, column_width}, {rows, row_width});
  if (columns && !(partial && tickets))
    throw std::invalid_argument("rule " + rule + " counts, and needs addresses of partial and tickets for it");
  Numbers numbers{{}, reinterpret_cast<const double*>(rows), row_width};
  std::copy(scalars.begin(), scalars.end(), numbers.scalars);
  const Counts counts{reinterpret_cast<double*>(columns), reinterpret_cast<double*>(partial),
                      reinterpret_cast<uint32_t*>(tickets)};
  const Lists lists{addresses.data(), sizes.data(), sizes.shape(0)};
  py::gil_scoped_release nogil;
  const char* error = kernel.launch(lists, numbers, counts, reinterpret_cast<Stream>(stream));
  if (error) throw std::runtime_error(rule + ": " + error);
}

// As in cnext._cpu; the seed and the matrices are on the device.
void dropout(const std::string& type, bool add, uintptr_t x, uintptr_t out, int64_t rows, int64_t columns,
             int64_t x_stride, int64_t out_stride, uintptr_t seed, uint32_t threshold, uint32_t branch,
             uintptr_t stream) {
  if (type.size() != 1) throw std::invalid_argument("type must be one letter");
  const Dropout options{reinterpret_cast<const int64_t*>(seed), threshold, branch};
  py::gil_scoped_release nogil;
  const char* error =
      launch_dropout(type[0], add, reinterpret_cast<const void*>(x), reinterpret_cast<void*>(out),
                     Matrix{rows, columns, x_stride, out_stride}, options, reinterpret_cast<Stream>(stream));
  if (error) throw std::runtime_error(std::string("dropout: ") + error);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of cnext, over raw addresses.";
  m.def("foreach", &foreach, py::arg("rule"), py::arg("dtypes"), py::arg("addresses").noconvert(),
        py::arg("sizes").noconvert(), py::arg("scalars"), py::arg("columns") = 0, py::arg("column_width") = 0,
        py::arg("partial") = 0, py::arg("tickets") = 0, py::arg("rows") = 0, py::arg("row_width") = 0,
        py::arg("stream") = 0);
  m.def("kernels", [] { return signatures(averaging_kernels()); }, "(rule, dtypes, kinds of columns, scalars, row width) of each.");
  m.def("dropout", &dropout, py::arg("type"), py::arg("add"), py::arg("x"), py::arg("out"), py::arg("rows"),
        py::arg("columns"), py::arg("x_stride"), py::arg("out_stride"), py::arg("seed"), py::arg("threshold"),
        py::arg("branch"), py::arg("stream") = 0);
  m.def("blocks", &blocks, py::arg("sizes"), "Thread blocks that lists of these sizes take, all launches together.");
}
