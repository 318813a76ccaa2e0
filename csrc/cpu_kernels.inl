// The inner loops. Included once per instruction set, inside a namespace of its own; no #include may stand here, and no
// standard container: its members would be compiled for this instruction set and shared with the other one.
// Every path performs the same additions, multiplications, divisions and roots in the same order, so that all
// instruction sets give the same bits.

inline void apply(const Precondition& rule, const float* g, int64_t offset, int64_t n, float* __restrict u) {
  switch (rule.rule) {
    case Rule::kNone:
      for (int64_t i = 0; i < n; ++i) u[i] = g[i];
      return;
    case Rule::kSign:
      for (int64_t i = 0; i < n; ++i) u[i] = static_cast<float>((g[i] > 0.0f) - (g[i] < 0.0f)) + (g[i] - g[i]);  // NaN where g is not finite
      return;
    case Rule::kAdam: {
      const float* __restrict a = rule.a + offset;
      const float* __restrict b = rule.b + offset;
      const float alpha = rule.alpha, gamma = rule.gamma, e = rule.e;
      for (int64_t i = 0; i < n; ++i) u[i] = (a[i] + alpha * g[i]) / (std::sqrt(b[i] + gamma * (g[i] * g[i])) + e);
      return;
    }
  }
}

inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

inline void flip(float* __restrict x, const uint32_t* __restrict mask, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits ^= mask[i];
    std::memcpy(x + i, &bits, 4);
  }
}

#ifdef LF_AVX2
// The first three butterflies of eight neighbours.
inline __m256 hadamard8(__m256 v) {
  const __m256 odd = _mm256_castsi256_ps(_mm256_setr_epi32(0, INT32_MIN, 0, INT32_MIN, 0, INT32_MIN, 0, INT32_MIN));
  const __m256 pair = _mm256_castsi256_ps(_mm256_setr_epi32(0, 0, INT32_MIN, INT32_MIN, 0, 0, INT32_MIN, INT32_MIN));
  const __m256 half = _mm256_castsi256_ps(_mm256_setr_epi32(0, 0, 0, 0, INT32_MIN, INT32_MIN, INT32_MIN, INT32_MIN));
  v = _mm256_add_ps(_mm256_permute_ps(v, 0xB1), _mm256_xor_ps(v, odd));
  v = _mm256_add_ps(_mm256_permute_ps(v, 0x4E), _mm256_xor_ps(v, pair));
  return _mm256_add_ps(_mm256_permute2f128_ps(v, v, 1), _mm256_xor_ps(v, half));
}

// All six butterflies of 64 neighbours, in registers.
inline void hadamard64(float* x) {
  __m256 v[8];
  for (int i = 0; i < 8; ++i) v[i] = hadamard8(_mm256_loadu_ps(x + 8 * i));
  for (int h = 1; h < 8; h *= 2)
    for (int i = 0; i < 8; ++i)
      if (!(i & h)) {
        const __m256 low = v[i], high = v[i + h];
        v[i] = _mm256_add_ps(low, high);
        v[i + h] = _mm256_sub_ps(low, high);
      }
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(x + 8 * i, v[i]);
}
#endif

// In-place Sylvester-Hadamard transform of n = 2^k floats.
inline void hadamard(float* x, int64_t n) {
  int64_t h = 1;
#ifdef LF_AVX2
  if (n >= 64) {
    for (int64_t i = 0; i < n; i += 64) hadamard64(x + i);
    h = 64;
  } else if (n >= 8) {
    for (int64_t i = 0; i < n; i += 8) _mm256_storeu_ps(x + i, hadamard8(_mm256_loadu_ps(x + i)));
    h = 8;
  }
#endif
  for (; h < n; h *= 2)
    for (int64_t i = 0; i < n; i += 2 * h) {
      float* __restrict low = x + i;
      float* __restrict high = x + i + h;
      for (int64_t k = 0; k < h; ++k) {
        const float s = low[k] + high[k], d = low[k] - high[k];
        low[k] = s;
        high[k] = d;
      }
    }
}

inline void expand_masks(uint32_t* mask, int64_t n, uint64_t seed, uint64_t index, uint32_t tag) {
  for (int64_t start = 0; start < n; start += 128) {
    const Words drawn = philox(seed, index, static_cast<uint32_t>(start / 128), tag);
    const int64_t stop = n - start < 128 ? n - start : 128;
    for (int64_t i = 0; i < stop; ++i) mask[start + i] = (drawn.w[i / 32] >> (i % 32)) << 31;
  }
}

// Examples [n0, n1), slots [slot0, slot1): every run whose slot is one of them, in order of rho.
inline void srht_tile(const Features& features, const Gradients& grads, const Precondition& rule, int64_t rho_base,
                      int64_t block, uint64_t seed, int64_t n0, int64_t n1, int64_t slot0, int64_t slot1,
                      uint32_t* masks, float* x) {
  const int64_t slots = features.dim / block, n_runs = (grads.n_long + block - 1) / block;
  const float scale = 1.0f / std::sqrt(static_cast<float>(block));
  for (int64_t q = 0; q < n_runs; ++q) {
    const int64_t start = q * block, length = smaller(block, grads.n_long - start);
    for (int64_t s0 = 0; s0 < grads.n_short; s0 += kMaskRows) {
      const int64_t rows = smaller(kMaskRows, grads.n_short - s0);
      const int64_t rho0 = rho_base + q * grads.n_short + s0;
      int64_t chosen[kMaskRows], slot[kMaskRows], n_chosen = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (rho0 + r) % slots;
        if (at < slot0 || at >= slot1) continue;
        expand_masks(masks + 2 * n_chosen * block, block, seed, rho0 + r, kTagSrhtIn);
        expand_masks(masks + (2 * n_chosen + 1) * block, block, seed, rho0 + r, kTagSrhtOut);
        slot[n_chosen] = at;
        chosen[n_chosen++] = r;
      }
      for (int64_t n = n0; n < n1; ++n)
        for (int64_t c = 0; c < n_chosen; ++c) {
          const int64_t offset = (s0 + chosen[c]) * grads.n_long + start;
          apply(rule, grads.data + n * grads.stride_n + offset, offset, length, x);
          for (int64_t i = length; i < block; ++i) x[i] = 0.0f;
          flip(x, masks + 2 * c * block, block);
          hadamard(x, block);
          flip(x, masks + (2 * c + 1) * block, block);
          float* __restrict out = features.data + n * features.stride + slot[c] * block;
          for (int64_t i = 0; i < block; ++i) out[i] += x[i] * scale;
        }
    }
  }
}

// Examples [n0, n1), every entry in the order (s, l).
inline void sjlt_tile(const Features& features, const Gradients& grads, const Precondition& rule, int64_t j_base,
                      int64_t short_stride, int64_t long_stride, int64_t nnz, uint64_t seed, int64_t n0, int64_t n1,
                      uint32_t* bucket, uint32_t* mask) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(nnz));
  float u[kSjltTile];
  for (int64_t s = 0; s < grads.n_short; ++s)
    for (int64_t l0 = 0; l0 < grads.n_long; l0 += kSjltTile) {
      const int64_t length = smaller(kSjltTile, grads.n_long - l0), offset = s * grads.n_long + l0;
      for (int64_t i = 0; i < length; ++i) {
        const uint64_t j = j_base + s * short_stride + (l0 + i) * long_stride;
        for (int64_t t = 0; t < nnz; t += 2) {
          const Words drawn = philox(seed, j, static_cast<uint32_t>(t / 2), kTagSjlt);
          for (int64_t k = t; k < smaller(t + 2, nnz); ++k) {
            const uint32_t* pair = drawn.w + 2 * (k - t);
            bucket[i * nnz + k] = static_cast<uint32_t>((static_cast<uint64_t>(pair[0]) * features.dim) >> 32);
            mask[i * nnz + k] = pair[1] << 31;
          }
        }
      }
      for (int64_t n = n0; n < n1; ++n) {
        apply(rule, grads.data + n * grads.stride_n + offset, offset, length, u);
        float* out = features.data + n * features.stride;
        for (int64_t i = 0; i < length; ++i) {
          uint32_t bits;
          const float value = u[i] * scale;
          std::memcpy(&bits, &value, 4);
          for (int64_t k = i * nnz; k < (i + 1) * nnz; ++k) {
            const uint32_t flipped = bits ^ mask[k];
            float signed_value;
            std::memcpy(&signed_value, &flipped, 4);
            out[bucket[k]] += signed_value;
          }
        }
      }
    }
}
