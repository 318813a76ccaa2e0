// Philox4x32-10, the generator that every backend shares (Salmon et al., SC 2011).
#pragma once

#include <cstdint>

namespace lf {

// Fourth counter word: one value per use of randomness. The same numbers stand in less_fast/projection.py.
enum Tag : uint32_t { kTagRademacher = 1, kTagGaussian = 2, kTagSjlt = 3, kTagSrhtIn = 4, kTagSrhtOut = 5 };

struct Words {
  uint32_t w[4];
};

inline Words philox(uint64_t seed, uint64_t index, uint32_t block, uint32_t tag) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = block, c3 = tag;
  uint32_t key_lo = static_cast<uint32_t>(seed), key_hi = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key_lo;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key_hi;
    c3 = static_cast<uint32_t>(product0);
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace lf
