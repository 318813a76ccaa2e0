// What Python calls, through ctypes, of the CUDA kernels compiled for the CPU.
#include "cuda_ops.h"

namespace lf {
alignas(16) uint32_t shared_words[emulator::kSharedBytes / 4];
}

extern "C" {

// order: how a block's threads take turns; most_shared: bytes of shared memory that the device lets a block have.
void configure(unsigned order, int64_t most_shared) {
  emulator::state.order = order;
  emulator::state.most_shared = most_shared;
}

int64_t srht_workspace(int64_t n, int64_t size, int64_t dim, int block) {
  return lf::srht_workspace(n, size, dim, block);
}
int64_t sjlt_workspace(int64_t n, int64_t size, int64_t dim) { return lf::sjlt_workspace(n, size, dim); }

int srht(float* features, int64_t dim, int64_t features_stride, const void* grads, int dtype, int64_t n, int64_t size,
         int64_t stride, int64_t run_base, int block, uint64_t seed, void* workspace) {
  return lf::srht({features, dim, features_stride}, {grads, static_cast<lf::Dtype>(dtype), n, size, stride}, run_base,
                  block, seed, workspace, nullptr);
}

int sjlt(float* features, int64_t dim, int64_t features_stride, const void* grads, int dtype, int64_t n, int64_t size,
         int64_t stride, int64_t j_base, int nnz, uint64_t seed, void* workspace) {
  return lf::sjlt({features, dim, features_stride}, {grads, static_cast<lf::Dtype>(dtype), n, size, stride}, j_base,
                  nnz, seed, workspace, nullptr);
}

}
