// Every CUDA kernel on buffers without a byte to spare, for compute-sanitizer: no torch, no Python. Compiled and run by
// ``python bench/gpu.py --parts sanitize``.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "dropout.h"
#include "foreach.h"
#include "kron.h"
#include "products.h"

namespace {

// 0x3c in every byte: 0.0115 as float32 and as bfloat16, 1.06 as float16.
constexpr int kFill = 0x3c;
int ran = 0;

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

void require(const char* error, const char* what) {
  if (!error) return;
  std::printf("%s: %s\n", what, error);
  std::exit(1);
}

template <class T>
T* filled(int64_t count, int byte) {
  void* made = nullptr;
  require(cudaMalloc(&made, sizeof(T) * size_t(count) + !count), "cudaMalloc");
  require(cudaMemset(made, byte, sizeof(T) * size_t(count)), "cudaMemset");
  return static_cast<T*>(made);
}

// A kernel over tensors of many sizes, each `beside` elements off a multiple of 16 bytes.
void run(const Kernel& kernel, int beside, cudaStream_t stream) {
  const std::vector<int64_t> sizes = {0, 1, 3, 4, 5, 16, 1023, 4095, 4096, 4097, 40960};
  const int64_t tensors = int64_t(sizes.size());
  const Signature& signature = kernel.signature;
  const int64_t operands = int64_t(std::strlen(signature.dtypes)), columns = int64_t(std::strlen(signature.kinds));
  int64_t blocks = 0;
  for (const int64_t size : sizes) blocks += size > kBlockElements ? (size + kBlockElements - 1) / kBlockElements : 1;
  std::vector<int64_t> addresses(size_t(operands * tensors));
  std::vector<char*> buffers;
  for (int64_t o = 0; o < operands; ++o)
    for (int64_t t = 0; t < tensors; ++t) {
      const int64_t width = signature.dtypes[o] == 'f' ? 4 : 2;
      buffers.push_back(filled<char>(width * (sizes[size_t(t)] + beside), kFill));
      addresses[size_t(o * tensors + t)] = int64_t(buffers.back() + beside * width);
    }
  // What the kernels write before they read stays as cudaMalloc gave it, for initcheck.
  double *out = nullptr, *partial = nullptr;
  require(cudaMalloc(&out, sizeof(double) * size_t(tensors * columns) + 8), "cudaMalloc");
  require(cudaMalloc(&partial, sizeof(double) * size_t(blocks * columns) + 8), "cudaMalloc");
  uint32_t* tickets = filled<uint32_t>(tensors, 0);
  double* rows = filled<double>(tensors * (signature.row_width + !signature.row_width), 0x3f);
  Scalars scalars{{}, signature.row_width ? rows : nullptr, signature.row_width};
  for (int k = 0; k < signature.scalars; ++k) scalars.values[k] = 0.125 * (k + 1);
  const Statistics statistics{columns ? out : nullptr, partial, tickets};
  require(kernel.launch(Lists{addresses.data(), sizes.data(), tensors}, scalars, statistics, stream), signature.rule);
  require(cudaStreamSynchronize(stream), signature.rule);
  std::vector<uint32_t> left(sizes.size());
  require(cudaMemcpy(left.data(), tickets, 4 * left.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
  for (const uint32_t ticket : left) require(ticket ? "a ticket is left" : nullptr, signature.rule);
  for (char* one : buffers) require(cudaFree(one), "cudaFree");
  for (void* one : {static_cast<void*>(out), static_cast<void*>(partial), static_cast<void*>(tickets), static_cast<void*>(rows)})
    require(cudaFree(one), "cudaFree");
  ++ran;
}

void run_dropout(char type, bool add, int64_t columns, const int64_t* seed, cudaStream_t stream) {
  const int64_t rows = 19, width = type == 'f' ? 4 : 2;
  char *x = filled<char>(rows * columns * width, kFill), *y = filled<char>(rows * columns * width, kFill);
  const Matrix matrix{rows, columns, columns, columns};
  require(launch_dropout(type, add, x, y, matrix, Dropout{seed, 3277, 1}, stream), "dropout");
  require(cudaStreamSynchronize(stream), "dropout");
  require(cudaFree(x), "cudaFree");
  require(cudaFree(y), "cudaFree");
  ++ran;
}

// Every product, in a shape and layout; `gap` elements between the rows of the narrow matrices.
void run_products(char type, const Shape& shape, int64_t gap, const Dropout& dropout, cudaStream_t stream) {
  const int64_t rows = shape.rows, columns = shape.columns, rank = shape.rank, stride = rank + gap;
  std::vector<void*> buffers;
  const auto made = [&](int64_t bytes) {
    buffers.push_back(filled<char>(bytes, kFill));
    return buffers.back();
  };
  const auto workspace = [&](const char* what) {  // as cudaMalloc gives it: written before it is read
    void* bytes = nullptr;
    require(cudaMalloc(&bytes, size_t(workspace_bytes(what, shape)) + 1), "cudaMalloc");
    buffers.push_back(bytes);
    return static_cast<float*>(bytes);
  };
  const auto narrow = [&](int64_t height, int64_t width) {
    return Narrow{made(2 * ((height - 1) * stride + width)), stride};
  };
  const auto wide = [&](int64_t height) { return Wide{made(2 * height * columns), columns}; };
  const Wide x = wide(rows), a = wide(rank), da = wide(rank), out = wide(rows);
  const Narrow h = narrow(rows, rank), dh = narrow(rows, rank), db = narrow(columns, shape.live);
  void* const bias = made(2 * columns);
  require(launch_project(type, shape, x, a, h, dropout, workspace("project"), stream), "project");
  require(launch_expand(type, shape, h, a, nullptr, out, false, 0.5f, dropout, stream), "expand");
  require(launch_expand(type, shape, h, a, bias, out, true, 0.5f, dropout, stream), "expand");
  require(launch_grad_b(type, shape, out, a, h, dh, db, 0.5f, workspace("grad_b"), stream), "grad_b");
  require(launch_grad_a(type, shape, dh, x, da, dropout, workspace("grad_a"), stream), "grad_a");
  require(cudaStreamSynchronize(stream), "products");
  for (void* one : buffers) require(cudaFree(one), "cudaFree");
  ++ran;
}

// A Kronecker op on groups of many sizes in both layouts, each matrix `beside` elements off a multiple of 16 bytes.
void run_kron(const KronOp& op, char type, int64_t beside, cudaStream_t stream) {
  const std::vector<std::vector<int64_t>> sizes = {{1, 1}, {7, 3, 2}, {1030, 8, 8, 8}, {300, 63, 1}, {128, 16}};
  const int64_t width = type == 'f' ? 4 : 2;
  std::vector<int64_t> groups, parts, of_parts, of_groups;
  std::vector<void*> buffers;
  const auto made = [&](int64_t bytes) {
    buffers.push_back(filled<char>(bytes, kFill));
    return int64_t(buffers.back());
  };
  for (const auto& size : sizes) {
    const int64_t n = size[0], matrices = int64_t(size.size()) - 1;
    int64_t r = 0;
    for (int64_t k = 1; k <= matrices; ++k) {
      const int64_t rank = size[size_t(k)];
      const bool transposed = parts.size() / 3 % 2;
      parts.insert(parts.end(), {rank, transposed ? 1 : rank, transposed ? n : 1});
      r += rank;
    }
    groups.insert(groups.end(), {n, r, int64_t(parts.size()) / 3 - matrices, matrices});
  }
  for (int list = 0; list < op.part_lists; ++list)
    for (const auto& size : sizes)
      for (size_t k = 1; k < size.size(); ++k)
        of_parts.push_back(made(width * (size[0] * size[k] + beside)) + beside * width);
  for (const char* kind = op.group_lists; *kind; ++kind)
    for (size_t g = 0; g < sizes.size(); ++g) {
      const int64_t n = groups[4 * g], r = groups[4 * g + 1];
      of_groups.push_back(made((*kind == 'd' ? 8 : 4) * (*kind == 'n' ? n : *kind == 'r' ? r : r * r)));
    }
  int64_t bytes = 0;
  require(kron_workspace(op.name, groups.data(), int64_t(sizes.size()), &bytes), op.name);
  void* workspace = nullptr;  // as cudaMalloc gives it: written before it is read
  require(cudaMalloc(&workspace, size_t(bytes) + 1), "cudaMalloc");
  buffers.push_back(workspace);
  const double scalars[] = {0.5, 0.125};
  const KronCall call{type, groups.data(), int64_t(sizes.size()), parts.data(), int64_t(parts.size()) / 3,
                      of_parts.data(), of_groups.data(), scalars, workspace};
  require(launch_kron(op.name, call, stream), op.name);
  require(cudaStreamSynchronize(stream), op.name);
  for (void* one : buffers) require(cudaFree(one), "cudaFree");
  ++ran;
}

}  // namespace

int main() {
  cudaStream_t stream;
  require(cudaStreamCreate(&stream), "cudaStreamCreate");
  const KernelTable table = averaging_kernels();
  for (int k = 0; k < table.size; ++k)
    for (const int beside : {0, 1}) run(table.kernels[k], beside, stream);
  const int64_t* seed = filled<int64_t>(1, 0x5a);
  for (const char type : {'f', 'b', 'h'})
    for (const int64_t columns : {1, 15, 127, 128, 129, 300})
      for (const bool add : {false, true}) run_dropout(type, add, columns, seed, stream);
  for (const KronOp& op : kKronOps)
    for (const char type : {'f', 'b', 'h'})
      for (const int64_t beside : {0, 1}) run_kron(op, type, beside, stream);
  for (const char type : {'b', 'h'})
    for (const int rank : {5, 16, 32, 64, 90, 128})
      for (const int64_t rows : {1, 70, 500})
        for (const int64_t columns : {8, 136, 1032})
          for (const int64_t gap : {0, 3})
            for (const uint32_t threshold : {0u, 3277u})
              run_products(type, {rows, columns, rank, rank - rank / 3}, gap,
                           {threshold ? seed : nullptr, threshold, 1}, stream);
  std::printf("%d kernels and layouts ran\n", ran);
  return 0;
}
