// The Python module cnext._cpu: choice of the instruction set, threads, and the calls into the kernels.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../calls.h"
#include "../reductions.h"
#include "../tensors.h"
#include "dropout.h"
#include "foreach.h"
#include "kron.h"
#include "low_rank.h"

namespace py = pybind11;

namespace {

constexpr int64_t kChunk = 16384;  // elements per unit of work: its operands fit into L2

// The kernels of an instruction set.
struct Kernels {
  const char* name;
  KernelTable table;
  DropoutTable dropout;
  const LowRankTable* low_rank;
  const KronTable* kron;
};

struct InstructionSet {
  const char* name;
  bool runs_here;
  // Called where the set runs alone: these functions themselves are compiled for it.
  KernelTable (*table)();
  DropoutTable (*dropout)();
  const LowRankTable* (*low_rank)();
  const KronTable* (*kron)();

  Kernels kernels() const { return {name, table(), dropout(), low_rank(), kron()}; }
};

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
#ifdef CNEXT_HAVE_avx512
  sets.push_back({"avx512",
                  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
                  averaging_avx512, branches_avx512, low_rank_avx512, kron_avx512});
#endif
#ifdef CNEXT_HAVE_avx2
  sets.push_back({"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), averaging_avx2,
                  branches_avx2, low_rank_avx2, kron_avx2});
#endif
  sets.push_back({"baseline", true, averaging_baseline, branches_baseline, low_rank_baseline, kron_baseline});
  return sets;
}

Kernels& active() {
  static Kernels kernels = [] {
    for (const InstructionSet& set : instruction_sets())
      if (set.runs_here) return set.kernels();
    throw std::logic_error("no instruction set");
  }();
  return kernels;
}

std::string use_instruction_set(const std::string& name) {
  const std::string before = active().name;
  for (const InstructionSet& set : instruction_sets())
    if (name == set.name && set.runs_here) {
      active() = set.kernels();
      return before;
    }
  throw std::invalid_argument("instruction set " + name + " was not built or does not run here");
}

struct Chunk {
  int64_t tensor, begin, count;
};

// addresses: (operands, tensors) of data pointers; sizes: (tensors,) of elements; columns and rows: addresses of
// float64 arrays, (tensors, column_width) that is written and (tensors, row_width) that is read, or 0.
void foreach (const std::string& rule, const std::string& dtypes, const Addresses& addresses, const Addresses& sizes,
              const std::vector<double>& scalars, uintptr_t columns, int64_t column_width, uintptr_t rows,
              int64_t row_width, int threads) {
  const Kernel& kernel = find(active().table, "C++", rule, dtypes);
  check(kernel.signature, addresses, sizes, scalars.size(), {columns, column_width}, {rows, row_width});
  const char* kinds = kernel.signature.kinds;
  const int operands = int(dtypes.size());
  const int width = int(std::strlen(kinds));
  const int64_t tensors = sizes.shape(0);
  const int64_t* size = sizes.data();
  const int64_t* address = addresses.data();
  py::gil_scoped_release nogil;

  std::vector<Chunk> chunks;
  for (int64_t t = 0; t < tensors; ++t)
    for (int64_t begin = 0; begin < size[t]; begin += kChunk)
      chunks.push_back({t, begin, std::min(kChunk, size[t] - begin)});
  std::vector<double> partial(chunks.size() * width);
  for (size_t i = 0; i < partial.size(); ++i) partial[i] = identity<double>(kinds[i % width]);

  const int64_t count = int64_t(chunks.size());
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, count / 2)));
  // Guided: a late thread takes less work, and each still streams through long ranges of memory.
#pragma omp parallel for schedule(guided) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    const Chunk& chunk = chunks[i];
    void* pointers[8];
    for (int k = 0; k < operands; ++k)
      pointers[k] = reinterpret_cast<void*>(address[k * tensors + chunk.tensor] + chunk.begin * (dtypes[k] == 'f' ? 4 : 2));
    const double* row = rows ? reinterpret_cast<const double*>(rows) + chunk.tensor * row_width : nullptr;
    kernel.run(scalars.data(), row, pointers, chunk.count, partial.data() + i * width);
  }

  double* out = reinterpret_cast<double*>(columns);
  for (int64_t i = 0; i < tensors * width; ++i) out[i] = identity<double>(kinds[i % width]);
  for (int64_t i = 0; i < count; ++i)
    for (int k = 0; k < width; ++k) {
      double& to = out[chunks[i].tensor * width + k];
      to = combine(kinds[k], to, partial[i * width + k]);
    }
}

// out = drop(x), or out += drop(x) where `add`. type: f float32, b bfloat16, h float16, d float64; x and out: addresses
// of (rows, columns), with their row strides in elements; first_row, first_column: their position in the mask, the
// column a multiple of a tile; seed: the address of an int64.
void dropout(const std::string& type, bool add, uintptr_t x, uintptr_t out, int64_t rows, int64_t columns,
             int64_t x_stride, int64_t out_stride, int64_t first_row, int64_t first_column, uintptr_t seed,
             uint32_t threshold, uint32_t branch, int threads) {
  const std::string types = "fbhd";
  const size_t which = types.find(type);
  if (type.size() != 1 || which == std::string::npos) throw std::invalid_argument("type must be one of " + types);
  if (first_column % 128) throw std::invalid_argument("first_column must be a multiple of 128");
  const int64_t size = type == "f" ? 4 : type == "d" ? 8 : 2;
  const DropoutTable& table = active().dropout;
  const DropoutRow run = (add ? table.dropout_add : table.dropout)[which];
  const Dropout options{*reinterpret_cast<const uint64_t*>(seed), threshold, branch, uint32_t(first_column / 128)};
  py::gil_scoped_release nogil;
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, rows * columns / kChunk)));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row)
    run(reinterpret_cast<const void*>(x + row * x_stride * size), reinterpret_cast<void*>(out + row * out_stride * size),
        first_row + row, columns, options);
}

// The products of cnext.ops.low_rank over addresses of float32 matrices, with row strides in elements. seed: the
// address of an int64, 0 without dropout; workspace: as many bytes as `workspace` returns.
using In = LowRankTable::In;
using Out = LowRankTable::Out;

const LowRankTable& low_rank(const std::string& type, const Sizes& sizes) {
  if (type != "f") throw std::invalid_argument("type must be f");
  if (sizes.rank < 1 || sizes.rank > 128) throw std::invalid_argument("rank must be from 1 to 128");
  if (!active().low_rank) throw std::invalid_argument(std::string(active().name) + " has no low-rank products");
  return *active().low_rank;
}

In in(uintptr_t address, int64_t stride) { return {reinterpret_cast<const float*>(address), stride}; }
Out out(uintptr_t address, int64_t stride) { return {reinterpret_cast<float*>(address), stride}; }

int64_t workspace(const std::string&, int64_t rows, int64_t columns, int64_t rank, int64_t live) {
  const Sizes sizes{rows, columns, rank};
  return 4 * low_rank("f", sizes).workspace(sizes, live);
}

// Calls a product with dropout.
template <class Run>
void dropped(uintptr_t seed, uint32_t threshold, uint32_t branch, uintptr_t workspace, const Run& run) {
  const bool drops = seed && threshold;
  const Dropout drop{drops ? *reinterpret_cast<const uint64_t*>(seed) : 0, threshold, branch, 0};
  py::gil_scoped_release nogil;
  run(drops ? &drop : nullptr, reinterpret_cast<float*>(workspace));
}

void project(const std::string& type, uintptr_t x, uintptr_t a, uintptr_t h, int64_t rows, int64_t columns,
             int64_t rank, int64_t x_stride, int64_t a_stride, int64_t h_stride, uintptr_t seed, uint32_t threshold, uint32_t branch,
             uintptr_t space, int threads) {
  const Sizes sizes{rows, columns, rank};
  const LowRankTable& table = low_rank(type, sizes);
  dropped(seed, threshold, branch, space, [&](const Dropout* drop, float* space) {
    table.project(in(x, x_stride), in(a, a_stride), out(h, h_stride), sizes, drop, space, threads);
  });
}

void grad_a(const std::string& type, uintptr_t dh, uintptr_t x, uintptr_t da, int64_t rows, int64_t columns,
           int64_t rank, int64_t dh_stride, int64_t x_stride, int64_t da_stride, uintptr_t seed, uint32_t threshold, uint32_t branch,
           uintptr_t space, int threads) {
  const Sizes sizes{rows, columns, rank};
  const LowRankTable& table = low_rank(type, sizes);
  dropped(seed, threshold, branch, space, [&](const Dropout* drop, float* space) {
    table.grad_a(in(dh, dh_stride), in(x, x_stride), out(da, da_stride), sizes, drop, space, threads);
  });
}

void expand(const std::string& type, uintptr_t dh, uintptr_t a, uintptr_t to, int64_t rows, int64_t columns,
            int64_t rank, int64_t dh_stride, int64_t a_stride, int64_t to_stride, uintptr_t bias, bool add, float scale,
            uintptr_t seed, uint32_t threshold, uint32_t branch, uintptr_t space, int threads) {
  const Sizes sizes{rows, columns, rank};
  const LowRankTable& table = low_rank(type, sizes);
  if (bias && (add || (seed && threshold))) throw std::invalid_argument("a bias needs add = false and no dropout");
  dropped(seed, threshold, branch, space, [&](const Dropout* drop, float* space) {
    if (bias)
#pragma omp parallel for schedule(static) num_threads(threads)
      for (int64_t row = 0; row < rows; ++row)
        std::memcpy(out(to, to_stride).at(row, 0), reinterpret_cast<const float*>(bias), size_t(columns) * 4);
    table.expand(in(dh, dh_stride), in(a, a_stride), out(to, to_stride), sizes, add || bias, scale, drop, space,
                 threads);
  });
}

void grad_b(const std::string& type, uintptr_t dy, uintptr_t b, uintptr_t h, uintptr_t dh, uintptr_t db, int64_t rows,
            int64_t columns, int64_t rank, int64_t live, int64_t dy_stride, int64_t b_stride, int64_t h_stride,
            int64_t dh_stride, int64_t db_stride, float scale, uintptr_t space, int threads) {
  const Sizes sizes{rows, columns, rank};
  const LowRankTable& table = low_rank(type, sizes);
  py::gil_scoped_release nogil;
  table.grad_b(in(dy, dy_stride), in(b, b_stride), in(h, h_stride), out(dh, dh_stride), out(db, db_stride), sizes, live,
               scale, reinterpret_cast<float*>(space), threads);
}

// An op of cnext.ops.kron on every group. The arrays are those of `check_kron`.
void kron(const std::string& op, const std::string& letter, const Addresses& groups, const Addresses& parts,
          const Addresses& part_addresses, const Addresses& group_addresses, const std::vector<double>& scalars,
          int threads) {
  check_kron(op, letter, groups, parts, part_addresses, group_addresses, scalars.size());
  constexpr int64_t kUnit = 262144;  // elements: `kron_accumulate` reads the first tile of a unit without prefetch
  const bool merges = op == "kron_merge";  // whose rows cost far more
  const KronTable& table = *active().kron;
  const size_t type = std::string("fbh").find(letter);
  const int64_t count = groups.shape(0), matrices = parts.shape(0);
  const int64_t *group_rows = groups.data(), *part_rows = parts.data(), *lists = part_addresses.data();
  const auto list = [&](int which, int64_t group) {
    return reinterpret_cast<float*>(group_addresses.data()[which * count + group]);
  };
  py::gil_scoped_release nogil;

  std::vector<Chunk> units;
  std::vector<KronGroup> shapes;
  int64_t elements = 0, most = 0;
  for (int64_t g = 0; g < count; ++g) {
    const int64_t n = group_rows[4 * g], r = group_rows[4 * g + 1], first = group_rows[4 * g + 2];
    shapes.push_back({n, r, group_rows[4 * g + 3], part_rows + 3 * first, lists + first, matrices});
    elements += n * r;
    most = std::max(most, table.sums_size(r));
    const int64_t step = (merges ? kUnit / 8 : kUnit) / r / 64 * 64;
    for (int64_t begin = 0; begin < n; begin += step) units.push_back({g, begin, std::min(step, n - begin)});
  }
  const int64_t size = int64_t(units.size());
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, std::min(size, elements / kChunk))));
  if (op != "kron_accumulate") {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t u = 0; u < size; ++u) {
      const int64_t g = units[u].tensor, begin = units[u].begin, end = begin + units[u].count;
      if (merges)
        table.merge[type](shapes[g], begin, end, list(0, g), reinterpret_cast<double*>(list(1, g)), list(2, g),
                          reinterpret_cast<double*>(list(3, g)), scalars[0], scalars[1]);
      else
        table.pull[type](shapes[g], begin, end, list(0, g), list(1, g), list(2, g), float(scalars[0]));
    }
    return;
  }
  // Units that are computed side by side are added in order, so that no sum depends on the number of threads.
  const int64_t batch = threads > 1 ? 16 * threads : 1;
  std::vector<double> sums(batch * most), total(most);
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < size; first += batch) {
    const int64_t last = std::min(size, first + batch);
#pragma omp for schedule(dynamic)
    for (int64_t u = first; u < last; ++u) {
      const int64_t g = units[u].tensor, begin = units[u].begin;
      table.accumulate[type](shapes[g], begin, begin + units[u].count, list(0, g), sums.data() + (u - first) * most);
    }
#pragma omp single
    for (int64_t u = first; u < last; ++u) {
      const int64_t g = units[u].tensor;
      for (int64_t k = 0; k < most; ++k) total[k] = (units[u].begin ? total[k] : 0.0) + sums[(u - first) * most + k];
      if (units[u].begin + units[u].count == shapes[g].n) table.add(shapes[g].r, total.data(), list(1, g));
    }
  }
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels of cnext, over raw addresses.";
  m.def("foreach", &foreach, py::arg("rule"), py::arg("dtypes"), py::arg("addresses").noconvert(),
        py::arg("sizes").noconvert(), py::arg("scalars"), py::arg("columns") = 0, py::arg("column_width") = 0,
        py::arg("rows") = 0, py::arg("row_width") = 0, py::arg("threads") = 1);
  m.def("kernels", [] { return signatures(active().table); }, "(rule, dtypes, reductions, scalars, row width) of each.");
  m.def("dropout", &dropout, py::arg("type"), py::arg("add"), py::arg("x"), py::arg("out"), py::arg("rows"),
        py::arg("columns"), py::arg("x_stride"), py::arg("out_stride"), py::arg("first_row"), py::arg("first_column"),
        py::arg("seed"), py::arg("threshold"), py::arg("branch"), py::arg("threads") = 1);
  m.def("has_low_rank", [] { return active().low_rank != nullptr; },
        "Whether the instruction set has project, grad_a, expand and grad_b.");
  m.def("workspace", &workspace, py::arg("what"), py::arg("rows"), py::arg("columns"), py::arg("rank"),
        py::arg("live"));
  m.def("project", &project);
  m.def("grad_a", &grad_a);
  m.def("expand", &expand);
  m.def("grad_b", &grad_b);
  m.def("kron", &kron, py::arg("op"), py::arg("letter"), py::arg("groups").noconvert(), py::arg("parts").noconvert(),
        py::arg("part_addresses").noconvert(), py::arg("group_addresses").noconvert(), py::arg("scalars"),
        py::arg("threads") = 1);
  m.def("describe", &describe, py::arg("api"), py::arg("tensors"),
        "(tensors, 4) int64 through torch.Tensor.__dlpack_c_exchange_api__: address, elements, kind, layout; -1: not dense.");
  m.def("instruction_set", [] { return std::string(active().name); });
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const InstructionSet& set : instruction_sets())
      if (set.runs_here) names.push_back(set.name);
    return names;
  });
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"), "Switches to an instruction set by name; returns the previous one.");
}
