// The CUDA operations: raw device pointers, sizes and a stream in, a cudaError_t out. Nothing is allocated: the caller
// passes a workspace of the size that the *_workspace function names.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lf {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// (N, P) gradients in device memory, rows `stride` entries apart.
struct FlatGradients {
  const void* data;
  Dtype dtype;
  int64_t n, size, stride;
};

// (N, K) float32 in device memory, rows `stride` apart; the operations add to it.
struct FlatFeatures {
  float* data;
  int64_t dim, stride;
};

// How the P axis is cut: part sums of `chunks` chunks are added up in order. Depends on P, K and B alone, so that
// an example's bits do not depend on its batch.
struct SrhtPlan {
  int folds;           // K is laid out `folds` times side by side, so that a small K still fills the warps
  int64_t chunks;      // part sums of an example: chunks x folds x K
  int64_t chunk_steps; // a step is one run for each of the folds x K / B slots
};
struct SjltPlan {
  int64_t chunks, chunk_entries;
};
SrhtPlan srht_plan(int64_t size, int64_t dim, int block);
SjltPlan sjlt_plan(int64_t size);

constexpr int kMinBlock = 32, kMaxBlock = 256;  // run lengths that srht can mix: a word of signs, a warp of entries

// Bytes of workspace for n examples.
int64_t srht_workspace(int64_t n, int64_t size, int64_t dim, int block);
int64_t sjlt_workspace(int64_t n, int64_t size, int64_t dim);

// The largest K whose sums fit the shared memory of the current device.
cudaError_t sjlt_max_dim(int64_t* dim);

// Whether this build holds code that the current device can run.
cudaError_t check_device();

// features += blocked SRHT of grads, whose first run has number run_base. docs/projections.md has the definition.
cudaError_t srht(const FlatFeatures& features, const FlatGradients& grads, int64_t run_base, int block, uint64_t seed,
                 void* workspace, cudaStream_t stream);

// features += SJLT of grads with nnz non-zeros per column; entry p has global index j_base + p. A row with an entry
// that is not finite becomes NaN throughout.
cudaError_t sjlt(const FlatFeatures& features, const FlatGradients& grads, int64_t j_base, int nnz, uint64_t seed,
                 void* workspace, cudaStream_t stream);

// features(n, k) += scale * sum over chunks and folds of partial(chunk, n, fold, k), in a fixed order.
cudaError_t add_partials(const FlatFeatures& features, const float* partial, int64_t n, int64_t chunks, int folds,
                         float scale, cudaStream_t stream);

}  // namespace lf
