// Adds part sums to features in a fixed order: the second half of every operation that cuts the P axis into chunks.
#include "cuda_entries.cuh"

namespace lf {
namespace {

constexpr int kTile = 32;   // features of one block
constexpr int kParts = 16;  // part sums that a feature's threads add up side by side

__global__ void __launch_bounds__(kTile* kParts)
    sum_kernel(float* features, const float* partial, int64_t features_stride, int64_t chunk_stride, int64_t dim,
               int64_t n_tiles, int64_t n_parts, int folds, float scale) {
  float* side = reinterpret_cast<float*>(shared_words);  // (kParts, kTile)
  const int64_t example = blockIdx.x / n_tiles;
  const int x = threadIdx.x % kTile, y = threadIdx.x / kTile;
  const int64_t feature = blockIdx.x % n_tiles * kTile + x;
  const float* from = partial + example * folds * dim + feature;
  float sum = 0.0f;
  if (feature < dim) {
#pragma unroll 4
    for (int64_t part = y; part < n_parts; part += kParts)
      sum += from[part / folds * chunk_stride + part % folds * dim];
  }
  side[threadIdx.x] = sum;
  __syncthreads();
  if (y > 0 || feature >= dim) return;
  for (int i = 1; i < kParts; ++i) sum += side[i * kTile + x];
  features[example * features_stride + feature] += scale * sum;
}

}  // namespace

cudaError_t add_partials(const FlatFeatures& features, const float* partial, int64_t n, int64_t chunks, int folds,
                         float scale, cudaStream_t stream) {
  const int64_t n_tiles = (features.dim + kTile - 1) / kTile;
  return launch(sum_kernel, n * n_tiles, kTile * kParts, sizeof(float) * kTile * kParts, stream, features.data, partial,
                features.stride, n * folds * features.dim, features.dim, n_tiles, chunks * folds, folds, scale);
}

}  // namespace lf
