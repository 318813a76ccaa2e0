// Blocked SRHT of flat gradients: one read of the input, butterflies in registers and across the lanes of a warp.
#include <algorithm>
#include <cmath>

#include "cuda_entries.cuh"
#include "philox.h"

namespace lf {
namespace {

constexpr int kWarpSize = 32, kWarps = 4;
constexpr int kHeld = 8;                     // neighbouring entries of a run that one lane holds
constexpr int kLogWindow = 8, kWindow = 1 << kLogWindow;  // features that one warp owns
constexpr int kBatch = 8;                    // steps whose signs are made together
static_assert(kWindow == kWarpSize * kHeld, "a lane holds its share of the window");
constexpr int kTable = kBatch * 2 * kWarpSize;  // bytes of one warp's signs: (steps, in or out, lanes) of 8 bits

// Examples of one warp, which share its signs, where there are as many: what 128 registers can hold.
template <class T>
constexpr int kShare = kPaired<T> ? 4 : 2;

struct SrhtArguments {
  const void* grads;
  float* partial;  // (chunks, n, folds x K)
  int64_t size, stride;
  int64_t run_base;
  uint64_t seed;
  int64_t n_steps, chunk_steps;
  int n, dim, log_block, n_slots, base_slot, n_windows;  // of folds x K features
  int example, n_groups;                    // this launch: groups of examples, from `example` on
  bool aligned;
};

// Number, counted from run_base, of the first run that falls on `slot`.
__device__ inline int first_run(const SrhtArguments& a, int slot) {
  const int first = slot - a.base_slot;
  return first < 0 ? first + a.n_slots : first;
}

// Makes the sign bits of steps [step, step + kBatch) for every lane of the warp: one Philox call a lane at a time.
__device__ inline void fill_signs(uint32_t* signs, const SrhtArguments& a, int window, int lane, int64_t step) {
  const int log_span = min(a.log_block, 7);  // of the entries whose signs one call gives
  const int log_calls = kLogWindow - log_span;
#pragma unroll 1
  for (int call = lane; call < kBatch * 2 << log_calls; call += kWarpSize) {
    const int table = call >> log_calls;  // 2 x step + (0 in, 1 out)
    const int entry = (call - (table << log_calls)) << log_span;
    const int run = first_run(a, (window * kWindow + entry) >> a.log_block);
    const int part = (entry & ((1 << a.log_block) - 1)) / 128;
    const uint64_t rho = a.run_base + run + (step + table / 2) * a.n_slots;
    const Words drawn = philox(a.seed, rho, part, table % 2 ? kTagSrhtOut : kTagSrhtIn);
    uint32_t* out = signs + (table * kWindow + entry) / 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < 1 << (log_span - 5)) out[i] = drawn.w[i];
  }
}

// Sylvester-Hadamard transform of the run that lies in neighbouring lanes, kHeld entries each; kLanes of them, or
// `lanes` where kLanes is 0.
template <int kLanes>
__device__ inline void hadamard(float (&x)[kHeld], int lane, int lanes) {
#pragma unroll
  for (int h = 1; h < kHeld; h *= 2)
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (!(i & h)) {
        const float low = x[i], high = x[i + h];
        x[i] = low + high;
        x[i + h] = low - high;
      }
#pragma unroll(kLanes ? kLanes : 1)
  for (int h = 1; h < (kLanes ? kLanes : lanes); h *= 2) {
    const float sign = lane & h ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = fmaf(x[i], sign, __shfl_xor_sync(0xFFFFFFFFu, x[i], h));
  }
}

// One warp: the runs of one chunk that fall on kWindow neighbouring features, for kExamples examples. Sums stay in
// registers; an example's next entries are on their way while its last ones are mixed.
template <class T, int kExamples, int kLanes>
__global__ void __launch_bounds__(kWarps* kWarpSize, 4) srht_kernel(const SrhtArguments a) {
  using Raw = typename T::Raw;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint32_t* words = shared_words + warp * (kTable / 4);
  const uint8_t* signs = reinterpret_cast<const uint8_t*>(words) + lane;

  const int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int window = static_cast<int>(task % a.n_windows);
  const int64_t example = a.example + task / a.n_windows % a.n_groups * kExamples;
  const int64_t chunk = task / a.n_windows / a.n_groups;
  const int64_t first = chunk * a.chunk_steps;
  const int n_steps = static_cast<int>(min(a.chunk_steps, a.n_steps - first));
  if (n_steps <= 0) return;

  const int feature = window * kWindow + lane * kHeld;
  const int64_t run = first_run(a, feature >> a.log_block) + first * a.n_slots;
  const int64_t at = (run << a.log_block) + (feature & ((1 << a.log_block) - 1));
  int64_t left = feature < a.dim ? a.size - at : 0;  // entries from here to the end of the row
  const Raw* from = static_cast<const Raw*>(a.grads) + example * a.stride + at;

  Entries<T, kHeld> next[kExamples];
  float sum[kExamples][kHeld] = {};
  const auto load = [&](int e) {
    if (a.aligned && left >= kHeld)
      next[e].load(from + e * a.stride);
    else
      next[e].load(from + e * a.stride, left);
  };
#pragma unroll
  for (int e = 0; e < kExamples; ++e) load(e);

#pragma unroll 1
  for (int step = 0; step < n_steps; ++step) {
    const int table = step % kBatch;
    if (table == 0) {
      __syncwarp();
      fill_signs(words, a, window, lane, first + step);
      __syncwarp();
    }
    const uint32_t sign_in = signs[2 * table * kWarpSize], sign_out = signs[(2 * table + 1) * kWarpSize];
    from += a.dim;
    left = step + 1 < n_steps ? left - a.dim : 0;
#pragma unroll
    for (int e = 0; e < kExamples; ++e) {
      next[e].flip(sign_in);
      float x[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) x[i] = next[e].value(i);
      load(e);
      hadamard<kLanes>(x, lane, (1 << a.log_block) / kHeld);
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        sum[e][i] = fmaf(x[i], __uint_as_float(0x3F800000u | ((sign_out << (31 - i)) & 0x80000000u)), sum[e][i]);
    }
  }
  if (feature >= a.dim) return;
#pragma unroll
  for (int e = 0; e < kExamples; ++e) {
    float4* out = reinterpret_cast<float4*>(a.partial + (chunk * a.n + example + e) * a.dim + feature);
#pragma unroll
    for (int i = 0; i < kHeld; i += 4) out[i / 4] = make_float4(sum[e][i], sum[e][i + 1], sum[e][i + 2], sum[e][i + 3]);
  }
}

template <class T, int kExamples>
cudaError_t launch_groups(SrhtArguments a, int example, int n_groups, int64_t chunks, cudaStream_t stream) {
  if (n_groups == 0) return cudaSuccess;
  constexpr int kCommon = 64;  // the default block
  a.example = example;
  a.n_groups = n_groups;
  const auto kernel =
      1 << a.log_block == kCommon ? srht_kernel<T, kExamples, kCommon / kHeld> : srht_kernel<T, kExamples, 0>;
  const int64_t blocks = (chunks * n_groups * a.n_windows + kWarps - 1) / kWarps;
  return launch(kernel, blocks, kWarps * kWarpSize, kWarps * kTable, stream, a);
}

// Groups of kShare examples, then the rest one by one. An example's additions are the same in either.
template <class T>
cudaError_t launch_examples(const SrhtArguments& a, int64_t chunks, cudaStream_t stream) {
  const int n_groups = a.n / kShare<T>, grouped = n_groups * kShare<T>;
  const cudaError_t launched = launch_groups<T, kShare<T>>(a, 0, n_groups, chunks, stream);
  return launched == cudaSuccess ? launch_groups<T, 1>(a, grouped, a.n - grouped, chunks, stream) : launched;
}

}  // namespace

SrhtPlan srht_plan(int64_t size, int64_t dim, int block) {
  constexpr int64_t kSmallest = 4 * kWindow;  // features below which a window would be mostly empty
  constexpr int64_t kTasks = 2048;            // warps an example: about one full H100 or B200
  constexpr int64_t kFewestSteps = 16;        // for which writing a part sum costs little
  int folds = 1;
  while (folds * dim < kSmallest) folds *= 2;
  const int64_t n_runs = (size + block - 1) / block, slots = folds * dim / block;
  const int64_t n_steps = (n_runs + slots - 1) / slots, windows = (folds * dim + kWindow - 1) / kWindow;
  const int64_t most = std::max<int64_t>(1, kTasks / windows);
  int64_t steps = std::max(kFewestSteps, (n_steps + most - 1) / most);
  steps = (steps + kBatch - 1) / kBatch * kBatch;
  return {folds, std::max<int64_t>(1, (n_steps + steps - 1) / steps), steps};
}

int64_t srht_workspace(int64_t n, int64_t size, int64_t dim, int block) {
  const SrhtPlan plan = srht_plan(size, dim, block);
  return plan.chunks * n * plan.folds * dim * static_cast<int64_t>(sizeof(float));
}

cudaError_t srht(const FlatFeatures& features, const FlatGradients& grads, int64_t run_base, int block, uint64_t seed,
                 void* workspace, cudaStream_t stream) {
  if (block < kMinBlock || block > kMaxBlock || block & (block - 1) || features.dim % block || run_base < 0)
    return cudaErrorInvalidValue;
  if (features.dim > INT32_MAX || grads.n > INT32_MAX) return cudaErrorInvalidValue;
  if (grads.n == 0 || grads.size == 0) return cudaSuccess;
  const SrhtPlan plan = srht_plan(grads.size, features.dim, block);
  SrhtArguments a{};
  a.grads = grads.data;
  a.partial = static_cast<float*>(workspace);
  a.size = grads.size;
  a.stride = grads.stride;
  a.run_base = run_base;
  a.seed = seed;
  a.n = static_cast<int>(grads.n);
  a.dim = static_cast<int>(plan.folds * features.dim);
  while (1 << a.log_block < block) ++a.log_block;
  a.n_slots = a.dim / block;
  a.base_slot = static_cast<int>(run_base % a.n_slots);
  a.n_windows = (a.dim + kWindow - 1) / kWindow;
  a.n_steps = ((grads.size + block - 1) / block + a.n_slots - 1) / a.n_slots;
  a.chunk_steps = plan.chunk_steps;
  a.aligned = rows_aligned(grads);
  const cudaError_t launched =
      dispatch(grads.dtype, [&](auto tag) { return launch_examples<decltype(tag)>(a, plan.chunks, stream); });
  if (launched != cudaSuccess) return launched;
  const float scale = 1.0f / std::sqrt(static_cast<float>(block));
  return add_partials(features, a.partial, grads.n, plan.chunks, plan.folds, scale, stream);
}

cudaError_t check_device() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&srht_kernel<BFloat16, 1, 0>));
}

}  // namespace lf
