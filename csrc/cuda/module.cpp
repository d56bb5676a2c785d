// The Python module cnext._cuda. It imports without a driver; a launch then raises.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "dropout.h"
#include "foreach.h"

namespace py = pybind11;

namespace {

using Table = py::array_t<int64_t, py::array::c_style>;

const Kernel& find(const std::string& rule, const std::string& dtypes) {
  const KernelTable table = averaging_kernels();
  for (int i = 0; i < table.size; ++i)
    if (rule == table.kernels[i].rule && dtypes == table.kernels[i].dtypes) return table.kernels[i];
  throw std::invalid_argument("no CUDA kernel for rule " + rule + " with dtypes " + dtypes);
}

int64_t blocks(const Table& sizes) {
  int64_t total = 0;
  for (int64_t t = 0; t < sizes.shape(0); ++t)
    total += std::max<int64_t>(1, (sizes.data()[t] + kBlockElements - 1) / kBlockElements);
  return total;
}

void foreach (const std::string& rule, const std::string& dtypes, const Table& addresses, const Table& sizes,
              const std::vector<double>& scalars, uintptr_t columns, uintptr_t partial, uintptr_t tickets,
              uintptr_t rows, int64_t row_width, uintptr_t stream) {
  const Kernel& kernel = find(rule, dtypes);
  if (addresses.ndim() != 2 || sizes.ndim() != 1 || size_t(addresses.shape(0)) != dtypes.size() ||
      addresses.shape(1) != sizes.shape(0))
    throw std::invalid_argument("addresses must be (operands, tensors) and sizes (tensors,)");
  if (*kernel.kinds && !(columns && partial && tickets))
    throw std::invalid_argument("rule " + rule + " counts, and needs addresses for it");
  Numbers numbers{{}, reinterpret_cast<const double*>(rows), row_width};
  std::copy_n(scalars.begin(), std::min<size_t>(scalars.size(), 8), numbers.scalars);
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
        py::arg("sizes").noconvert(), py::arg("scalars"), py::arg("columns") = 0, py::arg("partial") = 0,
        py::arg("tickets") = 0, py::arg("rows") = 0, py::arg("row_width") = 0, py::arg("stream") = 0);
  m.def("dropout", &dropout, py::arg("type"), py::arg("add"), py::arg("x"), py::arg("out"), py::arg("rows"),
        py::arg("columns"), py::arg("x_stride"), py::arg("out_stride"), py::arg("seed"), py::arg("threshold"),
        py::arg("branch"), py::arg("stream") = 0);
  m.def("blocks", &blocks, py::arg("sizes"), "Thread blocks that lists of these sizes take, all launches together.");
}
