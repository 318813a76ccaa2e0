// The dense projections; included like cpu_kernels.inl, after it.

#ifdef LF_AVX2
// The halves of eight products of 32-bit words.
inline void multiply8(__m256i a, __m256i b, __m256i& low, __m256i& high) {
  const __m256i even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}

// Word w of block b + i of the counter is words[4 i + w], for eight blocks.
inline void philox8(uint64_t seed, uint64_t index, uint32_t block, uint32_t tag, uint32_t* words) {
  __m256i c0 = _mm256_set1_epi32(static_cast<int>(index)), c1 = _mm256_set1_epi32(static_cast<int>(index >> 32));
  __m256i c2 = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(block)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  __m256i c3 = _mm256_set1_epi32(static_cast<int>(tag));
  const __m256i m0 = _mm256_set1_epi32(static_cast<int>(0xD2511F53u));
  const __m256i m1 = _mm256_set1_epi32(static_cast<int>(0xCD9E8D57u));
  uint32_t key_lo = static_cast<uint32_t>(seed), key_hi = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    __m256i low0, high0, low1, high1;
    multiply8(c0, m0, low0, high0);
    multiply8(c2, m1, low1, high1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), _mm256_set1_epi32(static_cast<int>(key_lo)));
    c1 = low1;
    c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), _mm256_set1_epi32(static_cast<int>(key_hi)));
    c3 = low0;
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
  alignas(32) uint32_t lanes[4][8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[0]), c0);
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[1]), c1);
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[2]), c2);
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[3]), c3);
  for (int i = 0; i < 8; ++i)
    for (int w = 0; w < 4; ++w) words[4 * i + w] = lanes[w][i];
}
#endif

// Words of blocks [block, block + blocks) of the counter.
inline void draw(uint64_t seed, uint64_t index, uint32_t block, int64_t blocks, uint32_t tag, uint32_t* words) {
  int64_t i = 0;
#ifdef LF_AVX2
  for (; i + 8 <= blocks; i += 8) philox8(seed, index, block + static_cast<uint32_t>(i), tag, words + 4 * i);
#endif
  for (; i < blocks; ++i) {
    const Words drawn = philox(seed, index, block + static_cast<uint32_t>(i), tag);
    std::memcpy(words + 4 * i, drawn.w, sizeof drawn.w);
  }
}

// log x for 0 < x < 1: a polynomial, as the standard library's functions are no vectors and differ from one machine to
// the next. With those of sine and cosine below, a normal is within a few units in the last place of float32.
inline float log_below_one(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;  // leaves [sqrt(1/2), sqrt(2))
  bits -= static_cast<uint32_t>(exponent) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  f -= 1.0f;
  float p = 0.07148933f;
  p = p * f - 0.11571515f;
  p = p * f + 0.11662003f;
  p = p * f - 0.12411021f;
  p = p * f + 0.14249872f;
  p = p * f - 0.16668481f;
  p = p * f + 0.2000071f;
  p = p * f - 0.2499999f;
  p = p * f + 0.33333331f;
  const float power = static_cast<float>(exponent);
  // ln 2 in two parts, the first of them short: its product with an exponent is exact.
  return power * 0.693359375f + (f + (f * f * (f * p - 0.5f) - power * 2.12194440e-4f));
}

// Box-Muller: every pair of words becomes two normals.
inline void normals_of_words(float* __restrict out, const uint32_t* __restrict words, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float u1 = (static_cast<float>(static_cast<int32_t>(words[2 * i] >> 9)) + 0.5f) * 0x1p-23f;
    const float u2 = (static_cast<float>(static_cast<int32_t>(words[2 * i + 1] >> 9)) + 0.5f) * 0x1p-23f;
    const float radius = std::sqrt(-2.0f * log_below_one(u1));
    const float quarters = u2 * 4.0f;
    const int32_t quadrant = static_cast<int32_t>(quarters + 0.5f);
    const float r = quarters - static_cast<float>(quadrant), z = r * r;  // r in [-1/2, 1/2], exact
    const float sine = r * (((-0.004602163f * z + 0.07968022f) * z - 0.6459635f) * z + 1.5707963f);
    const float cosine = (((0.00090362988f * z - 0.02086007f) * z + 0.2536692f) * z - 1.2337005f) * z + 1.0f;
    // Each quarter turn takes (cosine, sine) to (-sine, cosine).
    const float x = quadrant & 1 ? sine : cosine, y = quadrant & 1 ? cosine : sine;
    out[2 * i] = radius * ((quadrant + 1) & 2 ? -x : x);
    out[2 * i + 1] = radius * (quadrant & 2 ? -y : y);
  }
}

// sums[r][k] = sum over i of u[i][r] times entry k of row i of the matrix, in order of i: eight features, R examples.
// The matrix is signs (bit k of the words of a row) or normals.
template <int R, bool kNormal>
inline void multiply_tile(const float* __restrict u, const Strip& strip, int64_t n, int64_t k, float* __restrict sums) {
  const uint32_t* __restrict at = strip.matrix + (kNormal ? k : k / 32);
  const int64_t row_words = strip.row_words;
#ifdef LF_AVX2
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i left = _mm256_sub_epi32(_mm256_set1_epi32(31 - static_cast<int>(k % 32)), lanes);
  __m256 sum[R];
  for (int r = 0; r < R; ++r) sum[r] = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; ++i) {
    if (kNormal) {
      const __m256 normal = _mm256_loadu_ps(reinterpret_cast<const float*>(at + i * row_words));
      for (int r = 0; r < R; ++r)
        sum[r] = _mm256_add_ps(sum[r], _mm256_mul_ps(_mm256_broadcast_ss(u + i * R + r), normal));
    } else {
      const __m256i word = _mm256_set1_epi32(static_cast<int>(at[i * row_words]));
      const __m256 mask = _mm256_castsi256_ps(_mm256_and_si256(_mm256_sllv_epi32(word, left), sign));
      for (int r = 0; r < R; ++r)
        sum[r] = _mm256_add_ps(sum[r], _mm256_xor_ps(_mm256_broadcast_ss(u + i * R + r), mask));
    }
  }
  for (int r = 0; r < R; ++r) _mm256_storeu_ps(sums + 8 * r, sum[r]);
#else
  for (int i = 0; i < 8 * R; ++i) sums[i] = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    float entry[8];
    for (int c = 0; c < 8; ++c) {
      const uint32_t* word = at + i * row_words;
      const uint32_t bits = kNormal ? word[c] : 0x3F800000u | (*word >> (k % 32 + c) & 1u) << 31;
      std::memcpy(entry + c, &bits, 4);
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 8; ++c) sums[8 * r + c] += u[i * R + r] * entry[c];
  }
#endif
}

// What the tile of entries [offset, offset + length) adds to the strip's features of R examples, from n0 on.
template <int R, bool kNormal>
inline void dense_rows(const Features& features, const Gradients& grads, const Precondition& rule, int64_t offset,
                       int64_t length, const Strip& strip, int64_t n0) {
  float u[kDenseTile * R], one[kDenseTile], sums[8 * R];
  for (int r = 0; r < R; ++r) {
    apply(rule, grads.data + (n0 + r) * grads.stride_n + offset, offset, length, one);
    for (int64_t i = 0; i < length; ++i) u[i * R + r] = one[i];
  }
  for (int64_t k = 0; k < strip.width; k += 8) {
    multiply_tile<R, kNormal>(u, strip, length, k, sums);
    for (int r = 0; r < R; ++r) {
      float* out = features.data + (n0 + r) * features.stride + strip.first + k;
      for (int64_t c = 0; c < smaller(8, strip.width - k); ++c) out[c] += sums[8 * r + c] * strip.scale;
    }
  }
}

// The strip's features of all examples; entries in the order (s, l), a tile at a time. `first` is a multiple of 128.
template <bool kNormal>
inline void dense_strip(const Features& features, const Gradients& grads, const Precondition& rule,
                        const Numbering& numbers, const Strip& strip) {
  const auto block = static_cast<uint32_t>(strip.first / (kNormal ? 4 : 128));
  const int64_t blocks = kNormal ? (strip.width + 3) / 4 : (strip.width + 127) / 128;
  for (int64_t s = 0; s < grads.n_short; ++s)
    for (int64_t l0 = 0; l0 < grads.n_long; l0 += kDenseTile) {
      const int64_t length = smaller(kDenseTile, grads.n_long - l0), offset = s * grads.n_long + l0;
      for (int64_t i = 0; i < length; ++i) {
        const uint64_t j = numbers.j_base + s * numbers.short_stride + (l0 + i) * numbers.long_stride;
        uint32_t* row = strip.matrix + i * strip.row_words;
        if (kNormal) {
          uint32_t words[kDenseNormals];
          draw(numbers.seed, j, block, blocks, kTagGaussian, words);
          normals_of_words(reinterpret_cast<float*>(row), words, 2 * blocks);
        } else {
          draw(numbers.seed, j, block, blocks, kTagRademacher, row);
        }
      }
      int64_t n = 0;
      for (; n + 8 <= grads.n; n += 8) dense_rows<8, kNormal>(features, grads, rule, offset, length, strip, n);
      for (; n + 4 <= grads.n; n += 4) dense_rows<4, kNormal>(features, grads, rule, offset, length, strip, n);
      for (; n < grads.n; ++n) dense_rows<1, kNormal>(features, grads, rule, offset, length, strip, n);
    }
}
