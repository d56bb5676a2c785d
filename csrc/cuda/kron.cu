// Entry points of the Kronecker ops on the current device. They do not synchronize.
#include "kron_kernels.h"

const char* kron_workspace(const char* op, const int64_t* groups, int64_t group_count, int64_t* bytes) {
  return workspace_of(op, groups, group_count, bytes);
}

const char* launch_kron(const char* op, const KronCall& call, Stream stream) { return kron(op, call, stream); }
