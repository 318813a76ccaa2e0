// Gradient entries of each input type: 16-byte loads, unpacking to float, and sign flips on the packed form.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda_ops.h"

namespace lf {

// The dynamic shared memory of every kernel.
extern __shared__ uint32_t shared_words[];

__device__ inline float half_to_float(uint32_t half) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(half)));
  return value;
#else
  const uint32_t sign = (half & 0x8000u) << 16, rest = (half & 0x7FFFu) << 13;
  if (rest >= 0x7C00u << 13) return __uint_as_float(sign | 0x7F800000u | rest);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 0x1p112f));
#endif
}

struct Float32 {
  using Raw = uint32_t;
};
struct Float16 {
  using Raw = uint16_t;
  __device__ static float low(uint32_t pair) { return half_to_float(pair & 0xFFFFu); }
  __device__ static float high(uint32_t pair) { return half_to_float(pair >> 16); }
};
struct BFloat16 {
  using Raw = uint16_t;
  __device__ static float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  __device__ static float high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
};

template <class T>
constexpr bool kPaired = sizeof(typename T::Raw) == 2;

// kCount neighbouring entries of one example, as they lie in memory.
template <class T, int kCount>
struct Entries {
  static constexpr int kWords = kCount * static_cast<int>(sizeof(typename T::Raw)) / 4;
  uint32_t word[kWords];

  // All of them at `from`, which is on a 16-byte boundary.
  __device__ void load(const typename T::Raw* from) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(from) + i);
      word[4 * i] = four.x;
      word[4 * i + 1] = four.y;
      word[4 * i + 2] = four.z;
      word[4 * i + 3] = four.w;
    }
  }

  // Those of [0, left) at `from`, wherever it lies, and zeros behind them.
  __device__ void load(const typename T::Raw* from, int64_t left) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t raw = i < left ? static_cast<uint32_t>(from[i]) : 0u;
      if (!kPaired<T>)
        word[i % kWords] = raw;
      else if (i % 2 == 0)
        word[i / 2] = raw;
      else
        word[i / 2] |= raw << 16;
    }
  }

  __device__ float value(int i) const {
    if constexpr (!kPaired<T>)
      return __uint_as_float(word[i]);
    else
      return i % 2 ? T::high(word[i / 2]) : T::low(word[i / 2]);
  }

  // Flips the sign of entry i where bit i of `signs` is set.
  __device__ void flip(uint32_t signs) {
    static_assert(kCount <= 16, "pairs of sign bits are spread over one word");
    if constexpr (!kPaired<T>) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) word[i] ^= (signs << (31 - i)) & 0x80000000u;
    } else {
      // Even bits stay, odd bits move 15 up: one shift then brings a pair of signs to bits 15 and 31.
      const uint32_t spread = (signs & 0x5555u) | ((signs & 0xAAAAu) << 15);
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[i] ^= (spread << (15 - 2 * i)) & 0x80008000u;
    }
  }
};

// Whether 16-byte loads may be used for rows of this matrix.
inline bool rows_aligned(const FlatGradients& grads) {
  const int64_t bytes = grads.dtype == Dtype::kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(grads.data) % 16 == 0 && (grads.n == 1 || grads.stride * bytes % 16 == 0);
}

// Calls `run` with the tag type of a dtype.
template <class Run>
cudaError_t dispatch(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(Float32{});
    case Dtype::kFloat16:
      return run(Float16{});
    case Dtype::kBFloat16:
      return run(BFloat16{});
  }
  return cudaErrorInvalidValue;
}

template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t stream,
                   const std::common_type_t<Arguments>&... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace lf
