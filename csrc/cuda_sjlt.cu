// SJLT of flat gradients: one read of the input, sums in shared memory as integers, so that their order cannot matter.
//
// An entry g is rounded to an integer q = g * 2^s, |q| < 2^31, with one s per example and chunk: a power of two chosen
// by the largest |g| seen so far in the chunk and lowered, sums and all, when a larger one appears. A 32-bit sum that
// wraps is counted in a carry, so sums are exact whatever the input. With a unit of 2^-30 of the chunk's largest |g|
// (and no less than 2^-126), rounding costs at most half a unit an entry, and half a unit a feature each time that s
// is lowered.
#include <algorithm>
#include <cmath>

#include "cuda_entries.cuh"
#include "philox.h"

namespace lf {
namespace {

constexpr int kThreads = 512;
constexpr int kShare = 4;              // examples of one block, which share its buckets, where there are as many
constexpr int kLeastExponent = 31;     // of the largest |g|: smaller ones share the scale 2^126
constexpr int kInfinite = 255;         // biased exponent of infinities and NaNs
template <class T>
constexpr int kHeld = 16 / sizeof(typename T::Raw);  // neighbouring entries of one thread

struct SjltArguments {
  const void* grads;
  int32_t* partial;  // (chunks, n, K): carries while the chunk is read, then its sums as float
  int64_t size, stride, chunk_entries;
  int64_t j_base;
  uint64_t seed;
  int n, dim, nnz;
  int example, n_groups;  // this launch: groups of examples, from `example` on
  bool aligned;
};

// 2^exponent, -126 <= exponent <= 127.
__device__ inline float power_of_two(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// A sum of 64 bits as its low word, signed, and its carry; shifted right and rounded to nearest.
__device__ inline int64_t joined(int32_t low, int32_t carry) {
  return static_cast<int64_t>(carry) * (int64_t{1} << 32) + low;
}
__device__ inline int64_t shifted(int64_t sum, int by) {
  if (by > 62) return 0;
  return (sum + (int64_t{1} << (by - 1))) >> by;
}

// Lowers the scale of every example whose entries `held` exceed it, and its sums with it. Called by the whole block.
template <class T, int kExamples>
__device__ void rescale(const Entries<T, kHeld<T>> (&held)[kExamples], int (&exponent)[kExamples], int dim,
                        int32_t* sums, uint32_t* largest, int32_t* carries) {
  if (threadIdx.x < kExamples) largest[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kExamples; ++e) {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kHeld<T>; ++i) most = max(most, __float_as_uint(held[e].value(i)) & 0x7FFFFFFFu);
    atomicMax(largest + e, most);
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kExamples; ++e) {
    const int found = static_cast<int>(largest[e] >> 23);
    if (found <= exponent[e]) continue;
#pragma unroll 1
    for (int k = threadIdx.x; k < dim; k += kThreads) {
      const int64_t at = static_cast<int64_t>(e) * dim + k;
      const int64_t sum = shifted(joined(sums[at], __ldcg(carries + at)), found - exponent[e]);
      sums[at] = static_cast<int32_t>(sum);
      carries[at] = static_cast<int32_t>((sum - sums[at]) >> 32);
    }
    exponent[e] = found;
  }
  __syncthreads();
}

// One block: one chunk of the P axis for kExamples examples, tile by tile. kOne: one non-zero a column.
template <class T, int kExamples, bool kOne>
__global__ void __launch_bounds__(kThreads) sjlt_kernel(const SjltArguments a) {
  using Raw = typename T::Raw;
  constexpr int kTogether = kExamples == 1 ? 4 : 2;  // entries in flight: their additions do not wait for each other
  const int64_t chunk = blockIdx.x / a.n_groups;
  const int64_t example = a.example + static_cast<int64_t>(blockIdx.x % a.n_groups) * kExamples;
  uint32_t* largest = shared_words;                                          // (kShare)
  int32_t* sums = reinterpret_cast<int32_t*>(shared_words + kShare);         // (kExamples, K)
  int32_t* carries = a.partial + (chunk * a.n + example) * a.dim;            // (kExamples, K)
  for (int k = threadIdx.x; k < kExamples * a.dim; k += kThreads) sums[k] = 0;

  constexpr int64_t kTile = kThreads * kHeld<T>;
  const int64_t first = chunk * a.chunk_entries + threadIdx.x * kHeld<T>;
  uint64_t index = a.j_base + first;
  int64_t left = min((chunk + 1) * a.chunk_entries, a.size) - first;  // entries from here to the end of the chunk
  const Raw* from = static_cast<const Raw*>(a.grads) + example * a.stride + first;

  Entries<T, kHeld<T>> next[kExamples];
  int exponent[kExamples];
  const auto load = [&](int e) {
    if (a.aligned && left >= kHeld<T>)
      next[e].load(from + e * a.stride);
    else
      next[e].load(from + e * a.stride, left);
  };
#pragma unroll
  for (int e = 0; e < kExamples; ++e) {
    load(e);
    exponent[e] = kLeastExponent;
  }
#pragma unroll 1
  for (int tile = 0; tile < a.chunk_entries / kTile; ++tile, index += kTile) {
    if (chunk * a.chunk_entries + tile * kTile >= a.size) break;
    from += kTile;
    left -= kTile;
    Entries<T, kHeld<T>> held[kExamples];
    bool above = false;
#pragma unroll
    for (int e = 0; e < kExamples; ++e) {
      held[e] = next[e];
      load(e);
      const float limit = __uint_as_float(static_cast<uint32_t>(exponent[e]) << 23 | 0x7FFFFFu);
#pragma unroll
      for (int i = 0; i < kHeld<T>; ++i) above |= !(fabsf(held[e].value(i)) <= limit);  // or NaN
    }
    // The barrier also keeps a rescaling from the additions of the tile before.
    if (__syncthreads_or(above)) rescale<T, kExamples>(held, exponent, a.dim, sums, largest, carries);
    float scale[kExamples];  // 0 for a row that is not finite: every product is then 0 or NaN, which rounds to 0
#pragma unroll
    for (int e = 0; e < kExamples; ++e)
      scale[e] = exponent[e] == kInfinite ? 0.0f : power_of_two(kLeastExponent + 126 - exponent[e]);

#pragma unroll
    for (int i = 0; i < kHeld<T>; i += kTogether)
#pragma unroll 1
      for (int t = 0; t < (kOne ? 1 : a.nnz); t += 2) {
        Words drawn[kTogether];
#pragma unroll
        for (int p = 0; p < kTogether; ++p) drawn[p] = philox(a.seed, index + i + p, t / 2, kTagSjlt);
#pragma unroll
        for (int half = 0; half < (kOne ? 1 : 2); ++half) {
          if (!kOne && t + half >= a.nnz) break;
          int32_t q[kTogether][kExamples], wrapped[kTogether][kExamples], any = 0;
#pragma unroll
          for (int p = 0; p < kTogether; ++p) {
            const uint32_t bucket = __umulhi(drawn[p].w[2 * half], a.dim), sign = drawn[p].w[2 * half + 1] << 31;
#pragma unroll
            for (int e = 0; e < kExamples; ++e) {
              q[p][e] = __float2int_rn(held[e].value(i + p) * __uint_as_float(__float_as_uint(scale[e]) ^ sign));
              wrapped[p][e] = atomicAdd(sums + e * a.dim + bucket, q[p][e]);
            }
          }
#pragma unroll
          for (int p = 0; p < kTogether; ++p)
#pragma unroll
            for (int e = 0; e < kExamples; ++e) {
              const int32_t old = wrapped[p][e];
              const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(old) + static_cast<uint32_t>(q[p][e]));
              wrapped[p][e] = (old ^ sum) & (q[p][e] ^ sum);
              any |= wrapped[p][e];
            }
          if (any >= 0) continue;
#pragma unroll
          for (int p = 0; p < kTogether; ++p)
#pragma unroll
            for (int e = 0; e < kExamples; ++e) {
              const int64_t to = static_cast<int64_t>(e) * a.dim + __umulhi(drawn[p].w[2 * half], a.dim);
              if (wrapped[p][e] < 0) atomicAdd(carries + to, q[p][e] > 0 ? 1 : -1);
            }
        }
      }
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kExamples; ++e) {
    const bool finite = exponent[e] != kInfinite;
    const float unit = finite ? power_of_two(exponent[e] - 126 - kLeastExponent) : __uint_as_float(0x7FC00000u);
#pragma unroll 1
    for (int k = threadIdx.x; k < a.dim; k += kThreads) {
      const int64_t to = static_cast<int64_t>(e) * a.dim + k;
      const float sum = static_cast<float>(joined(sums[to], __ldcg(carries + to)));
      carries[to] = static_cast<int32_t>(__float_as_uint(sum * unit));
    }
  }
}

int64_t shared_bytes(int64_t examples, int64_t dim) { return 4 * (kShare + examples * dim); }

cudaError_t most_shared_bytes(int64_t* bytes) {
  int device = 0, found = 0;
  cudaError_t done = cudaGetDevice(&device);
  if (done == cudaSuccess) done = cudaDeviceGetAttribute(&found, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = found;
  return done;
}

template <class T, int kExamples>
cudaError_t launch_groups(SjltArguments a, int example, int n_groups, int64_t chunks, cudaStream_t stream) {
  if (n_groups == 0) return cudaSuccess;
  a.example = example;
  a.n_groups = n_groups;
  const auto kernel = a.nnz == 1 ? sjlt_kernel<T, kExamples, true> : sjlt_kernel<T, kExamples, false>;
  const int64_t bytes = shared_bytes(kExamples, a.dim);
  const cudaError_t allowed =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(bytes));
  return allowed == cudaSuccess ? launch(kernel, chunks * n_groups, kThreads, bytes, stream, a) : allowed;
}

// Groups of kShare examples where their sums fit, then the rest one by one. An example's bits are the same in either.
template <class T>
cudaError_t launch_examples(const SjltArguments& a, int64_t chunks, int64_t most_bytes, cudaStream_t stream) {
  const int n_groups = shared_bytes(kShare, a.dim) <= most_bytes ? a.n / kShare : 0, grouped = n_groups * kShare;
  const cudaError_t launched = launch_groups<T, kShare>(a, 0, n_groups, chunks, stream);
  return launched == cudaSuccess ? launch_groups<T, 1>(a, grouped, a.n - grouped, chunks, stream) : launched;
}

}  // namespace

SjltPlan sjlt_plan(int64_t size) {
  constexpr int64_t kMost = 128;           // chunks: about one block a multiprocessor for each group of examples
  constexpr int64_t kFewest = 16 * 8192;   // entries, for which writing a part sum costs little
  const int64_t entries = (std::max(kFewest, (size + kMost - 1) / kMost) + 8191) / 8192 * 8192;
  return {std::max<int64_t>(1, (size + entries - 1) / entries), entries};
}

int64_t sjlt_workspace(int64_t n, int64_t size, int64_t dim) {
  return sjlt_plan(size).chunks * n * dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t sjlt_max_dim(int64_t* dim) {
  int64_t bytes = 0;
  const cudaError_t done = most_shared_bytes(&bytes);
  *dim = bytes / 4 - kShare;
  return done;
}

cudaError_t sjlt(const FlatFeatures& features, const FlatGradients& grads, int64_t j_base, int nnz, uint64_t seed,
                 void* workspace, cudaStream_t stream) {
  if (grads.n == 0 || grads.size == 0) return cudaSuccess;
  const SjltPlan plan = sjlt_plan(grads.size);
  // Carries of 32 bits hold the sum of up to 2^31 terms.
  if (nnz < 1 || j_base < 0 || plan.chunk_entries > INT32_MAX / nnz || grads.n > INT32_MAX)
    return cudaErrorInvalidValue;
  int64_t bytes = 0;
  cudaError_t done = most_shared_bytes(&bytes);
  if (done != cudaSuccess) return done;
  if (shared_bytes(1, features.dim) > bytes) return cudaErrorInvalidValue;
  SjltArguments a{};
  a.grads = grads.data;
  a.partial = static_cast<int32_t*>(workspace);
  a.size = grads.size;
  a.stride = grads.stride;
  a.chunk_entries = plan.chunk_entries;
  a.j_base = j_base;
  a.seed = seed;
  a.n = static_cast<int>(grads.n);
  a.dim = static_cast<int>(features.dim);
  a.nnz = nnz;
  a.aligned = rows_aligned(grads);
  done = cudaMemsetAsync(workspace, 0, static_cast<size_t>(sjlt_workspace(grads.n, grads.size, features.dim)), stream);
  if (done != cudaSuccess) return done;
  done = dispatch(grads.dtype, [&](auto tag) { return launch_examples<decltype(tag)>(a, plan.chunks, bytes, stream); });
  if (done != cudaSuccess) return done;
  const float scale = 1.0f / std::sqrt(static_cast<float>(nnz));
  return add_partials(features, static_cast<const float*>(workspace), grads.n, plan.chunks, 1, scale, stream);
}

}  // namespace lf
