// The Python module cnext._cuda. It can be imported without a driver; a launch then raises.
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../calls.h"
#include "dropout.h"
#include "foreach.h"
#include "kron.h"
#include "products.h"

namespace py = pybind11;

namespace {

int64_t blocks(const Addresses& sizes) {
  int64_t total = 0;
  for (int64_t t = 0; t < sizes.shape(0); ++t)
    total += std::max<int64_t>(1, (sizes.data()[t] + kBlockElements - 1) / kBlockElements);
  return total;
}

// As in cnext._cpu, on the device. Where the rule has statistics, partial: (blocks(sizes), column_width) float64, and
// tickets: (tensors,) uint32 zeros.
void foreach (const std::string& rule, const std::string& dtypes, const Addresses& addresses, const Addresses& sizes,
              const std::vector<double>& scalars, uintptr_t columns, int64_t column_width, uintptr_t partial,
              uintptr_t tickets, uintptr_t rows, int64_t row_width, uintptr_t stream) {
  const Kernel& kernel = find(averaging_kernels(), "CUDA", rule, dtypes);
  check(kernel.signature, addresses, sizes, scalars.size(), {columns, column_width}, {rows, row_width});
  if (columns && !(partial && tickets))
    throw std::invalid_argument("rule " + rule + " has statistics: expected the addresses of partial and tickets");
  Scalars values{{}, reinterpret_cast<const double*>(rows), row_width};
  std::copy(scalars.begin(), scalars.end(), values.values);
  const Statistics statistics{reinterpret_cast<double*>(columns), reinterpret_cast<double*>(partial),
                      reinterpret_cast<uint32_t*>(tickets)};
  const Lists lists{addresses.data(), sizes.data(), sizes.shape(0)};
  py::gil_scoped_release nogil;
  const char* error = kernel.launch(lists, values, statistics, reinterpret_cast<Stream>(stream));
  if (error) throw std::runtime_error(rule + ": " + error);
}

char one_letter(const std::string& type) {
  if (type.size() != 1) throw std::invalid_argument("type must be one letter");
  return type[0];
}

Shape shape(int64_t rows, int64_t columns, int64_t rank, int64_t live) {
  if (rank < 1 || rank > kMaxRank) throw std::invalid_argument("rank must be 1 to 128");
  if (rows < 0 || columns < 0) throw std::invalid_argument("rows and columns must not be negative");
  if (live < 0 || live > rank) throw std::invalid_argument("live must be 0 to the rank");
  return {rows, columns, int(rank), int(live)};
}

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

Dropout dropout_of(uintptr_t seed, uint32_t threshold, uint32_t branch) {
  return {reinterpret_cast<const int64_t*>(seed), threshold, branch};
}

void succeed(const char* what, const char* error) {
  if (error) throw std::runtime_error(std::string(what) + ": " + error);
}

// As in cnext._cpu; the seed and the matrices are on the device.
void dropout(const std::string& type, bool add, uintptr_t x, uintptr_t out, int64_t rows, int64_t columns,
             int64_t x_stride, int64_t out_stride, int64_t first_row, int64_t first_column, uintptr_t seed,
             uint32_t threshold, uint32_t branch, uintptr_t stream) {
  const char letter = one_letter(type);
  if (first_column % 128) throw std::invalid_argument("first_column must be a multiple of 128");
  const Matrix matrix{rows, columns, x_stride, out_stride, first_row, first_column / 128};
  const Dropout options = dropout_of(seed, threshold, branch);
  py::gil_scoped_release nogil;
  succeed("dropout",
          launch_dropout(letter, add, at(x), at(out), matrix, options, reinterpret_cast<Stream>(stream)));
}

void project(const std::string& type, uintptr_t x, uintptr_t a, uintptr_t h, int64_t rows, int64_t columns,
             int64_t rank, int64_t x_stride, int64_t a_stride, int64_t h_stride, uintptr_t seed, uint32_t threshold,
             uint32_t branch, uintptr_t workspace, uintptr_t stream) {
  const char letter = one_letter(type);
  const Shape sizes = shape(rows, columns, rank, 0);
  py::gil_scoped_release nogil;
  succeed("project", launch_project(letter, sizes, {at(x), x_stride}, {at(a), a_stride}, {at(h), h_stride},
                                    dropout_of(seed, threshold, branch), static_cast<float*>(at(workspace)),
                                    reinterpret_cast<Stream>(stream)));
}

void grad_a(const std::string& type, uintptr_t dh, uintptr_t x, uintptr_t da, int64_t rows, int64_t columns,
           int64_t rank, int64_t dh_stride, int64_t x_stride, int64_t da_stride, uintptr_t seed, uint32_t threshold,
           uint32_t branch, uintptr_t workspace, uintptr_t stream) {
  const char letter = one_letter(type);
  const Shape sizes = shape(rows, columns, rank, 0);
  py::gil_scoped_release nogil;
  succeed("grad_a", launch_grad_a(letter, sizes, {at(dh), dh_stride}, {at(x), x_stride}, {at(da), da_stride},
                                dropout_of(seed, threshold, branch), static_cast<float*>(at(workspace)),
                                reinterpret_cast<Stream>(stream)));
}

// It needs no workspace; the argument keeps the calls uniform.
void expand(const std::string& type, uintptr_t dh, uintptr_t a, uintptr_t out, int64_t rows, int64_t columns,
            int64_t rank, int64_t dh_stride, int64_t a_stride, int64_t out_stride, uintptr_t bias, bool add,
            float scale, uintptr_t seed, uint32_t threshold, uint32_t branch, uintptr_t, uintptr_t stream) {
  const char letter = one_letter(type);
  const Shape sizes = shape(rows, columns, rank, 0);
  py::gil_scoped_release nogil;
  succeed("expand",
          launch_expand(letter, sizes, {at(dh), dh_stride}, {at(a), a_stride}, at(bias), {at(out), out_stride}, add,
                        scale, dropout_of(seed, threshold, branch), reinterpret_cast<Stream>(stream)));
}

void grad_b(const std::string& type, uintptr_t dy, uintptr_t bt, uintptr_t h, uintptr_t dh, uintptr_t db, int64_t rows,
            int64_t columns, int64_t rank, int64_t live, int64_t dy_stride, int64_t bt_stride, int64_t h_stride,
            int64_t dh_stride, int64_t db_stride, float scale, uintptr_t workspace, uintptr_t stream) {
  const char letter = one_letter(type);
  const Shape sizes = shape(rows, columns, rank, live);
  py::gil_scoped_release nogil;
  succeed("grad_b", launch_grad_b(letter, sizes, {at(dy), dy_stride}, {at(bt), bt_stride}, {at(h), h_stride},
                                  {at(dh), dh_stride}, {at(db), db_stride}, scale, static_cast<float*>(at(workspace)),
                                  reinterpret_cast<Stream>(stream)));
}

int64_t workspace(const std::string& what, int64_t rows, int64_t columns, int64_t rank, int64_t live) {
  const int64_t bytes = workspace_bytes(what.c_str(), shape(rows, columns, rank, live));
  if (bytes < 0) throw std::invalid_argument("expected project, grad_a, expand or grad_b, not " + what);
  return bytes;
}

int64_t kron_bytes(const std::string& op, const Addresses& groups) {
  if (groups.ndim() != 2 || groups.shape(1) != 4) throw std::invalid_argument(op + ": groups must be (groups, 4)");
  int64_t bytes = 0;
  succeed(op.c_str(), kron_workspace(op.c_str(), groups.data(), groups.shape(0), &bytes));
  return bytes;
}

void kron(const std::string& op, const std::string& letter, const Addresses& groups, const Addresses& parts,
          const Addresses& part_addresses, const Addresses& group_addresses, const std::vector<double>& scalars,
          uintptr_t workspace_address, uintptr_t stream) {
  check_kron(op, letter, groups, parts, part_addresses, group_addresses, scalars.size());
  if (kron_bytes(op, groups) && !workspace_address)
    throw std::invalid_argument(op + ": expected the address of a workspace");
  const KronCall call{letter[0], groups.data(), groups.shape(0), parts.data(), parts.shape(0),
                      part_addresses.data(), group_addresses.data(), scalars.data(), at(workspace_address)};
  py::gil_scoped_release nogil;
  succeed(op.c_str(), launch_kron(op.c_str(), call, reinterpret_cast<Stream>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of cnext, over raw addresses.";
  m.def("foreach", &foreach, py::arg("rule"), py::arg("dtypes"), py::arg("addresses").noconvert(),
        py::arg("sizes").noconvert(), py::arg("scalars"), py::arg("columns") = 0, py::arg("column_width") = 0,
        py::arg("partial") = 0, py::arg("tickets") = 0, py::arg("rows") = 0, py::arg("row_width") = 0,
        py::arg("stream") = 0);
  m.def("kernels", [] { return signatures(averaging_kernels()); }, "(rule, dtypes, reductions, scalars, row width) of each.");
  m.def("dropout", &dropout, py::arg("type"), py::arg("add"), py::arg("x"), py::arg("out"), py::arg("rows"),
        py::arg("columns"), py::arg("x_stride"), py::arg("out_stride"), py::arg("first_row"), py::arg("first_column"),
        py::arg("seed"), py::arg("threshold"), py::arg("branch"), py::arg("stream") = 0);
  m.def("project", &project, py::arg("type"), py::arg("x"), py::arg("a"), py::arg("h"), py::arg("rows"),
        py::arg("columns"), py::arg("rank"), py::arg("x_stride"), py::arg("a_stride"), py::arg("h_stride"),
        py::arg("seed"), py::arg("threshold"), py::arg("branch"), py::arg("workspace"), py::arg("stream") = 0,
        "h (rows, rank) = drop(x) a^T.");
  m.def("grad_a", &grad_a, py::arg("type"), py::arg("dh"), py::arg("x"), py::arg("da"), py::arg("rows"),
        py::arg("columns"), py::arg("rank"), py::arg("dh_stride"), py::arg("x_stride"), py::arg("da_stride"),
        py::arg("seed"), py::arg("threshold"), py::arg("branch"), py::arg("workspace"), py::arg("stream") = 0,
        "da (rank, columns) = dh^T drop(x).");
  m.def("expand", &expand, py::arg("type"), py::arg("dh"), py::arg("a"), py::arg("out"), py::arg("rows"),
        py::arg("columns"), py::arg("rank"), py::arg("dh_stride"), py::arg("a_stride"), py::arg("out_stride"),
        py::arg("bias"), py::arg("add"), py::arg("scale"), py::arg("seed"), py::arg("threshold"), py::arg("branch"),
        py::arg("workspace") = 0, py::arg("stream") = 0,
        "out (rows, columns) = drop(scale dh a) + bias, or += where `add`.");
  m.def("grad_b", &grad_b, py::arg("type"), py::arg("dy"), py::arg("bt"), py::arg("h"), py::arg("dh"), py::arg("db"),
        py::arg("rows"), py::arg("columns"), py::arg("rank"), py::arg("live"), py::arg("dy_stride"),
        py::arg("bt_stride"), py::arg("h_stride"), py::arg("dh_stride"), py::arg("db_stride"), py::arg("scale"),
        py::arg("workspace"), py::arg("stream") = 0,
        "dh (rows, rank) = scale dy bt^T and db (columns, live) = scale dy^T h, in one pass over dy.");
  m.def("workspace", &workspace, py::arg("what"), py::arg("rows"), py::arg("columns"), py::arg("rank"), py::arg("live"),
        "Bytes of workspace that project, grad_a, expand or grad_b needs on the current device.");
  m.def("kron_workspace", &kron_bytes, py::arg("op"), py::arg("groups").noconvert(),
        "Bytes of workspace that a Kronecker op needs for these groups.");
  m.def("kron", &kron, py::arg("op"), py::arg("letter"), py::arg("groups").noconvert(), py::arg("parts").noconvert(),
        py::arg("part_addresses").noconvert(), py::arg("group_addresses").noconvert(), py::arg("scalars"),
        py::arg("workspace_address"), py::arg("stream") = 0,
        "Runs kron_accumulate, kron_pull or kron_merge; groups (groups, 4): n, r, first matrix, matrices; parts "
        "(matrices, 3): rank, strides along n and along the rank.");
  m.def("blocks", &blocks, py::arg("sizes"), "Thread blocks that lists of these sizes take, all launches together.");
}
