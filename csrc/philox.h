// Philox4x32-10, the generator that every backend shares (Salmon et al., SC 2011).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LF_HOST_DEVICE __host__ __device__
#else
#define LF_HOST_DEVICE
#endif

namespace lf {

// Fourth counter word: one value per use of randomness. The same numbers stand in less_fast/projection.py.
enum Tag : uint32_t { kTagRademacher = 1, kTagGaussian = 2, kTagSjlt = 3, kTagSrhtIn = 4, kTagSrhtOut = 5 };

struct Words {
  uint32_t w[4];
};

// The two halves of a 64-bit product.
LF_HOST_DEVICE inline void multiply(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
#ifdef __CUDA_ARCH__  // spelled out: from the shift below ptxas makes one more addition
  asm("{ .reg .u64 product; mul.wide.u32 product, %2, %3; mov.b64 {%0, %1}, product; }"
      : "=r"(low), "=r"(high)
      : "r"(a), "r"(b));
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  low = static_cast<uint32_t>(product);
  high = static_cast<uint32_t>(product >> 32);
#endif
}

LF_HOST_DEVICE inline Words philox(uint64_t seed, uint64_t index, uint32_t block, uint32_t tag) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = block, c3 = tag;
  uint32_t key_lo = static_cast<uint32_t>(seed), key_hi = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    uint32_t low0, high0, low1, high1;
    multiply(c0, 0xD2511F53u, low0, high0);
    multiply(c2, 0xCD9E8D57u, low1, high1);
    c0 = high1 ^ c1 ^ key_lo;
    c1 = low1;
    c2 = high0 ^ c3 ^ key_hi;
    c3 = low0;
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace lf
