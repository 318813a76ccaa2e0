// Columns of the dense projections; included like cpu_kernels.inl, after it.

inline void signs_of_words(float* __restrict out, const uint32_t* words, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = 0x3F800000u | ((words[i / 32] >> (i % 32)) << 31);
    std::memcpy(out + i, &bits, 4);
  }
}

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

// As signs_of_words, of all 32 bits of every word.
inline void signs_of_whole_words(float* __restrict out, const uint32_t* words, int64_t n_words) {
  const __m256i sign = _mm256_set1_epi32(INT32_MIN), one = _mm256_set1_epi32(0x3F800000);
  for (int64_t w = 0; w < n_words; ++w) {
    const __m256i word = _mm256_set1_epi32(static_cast<int>(words[w]));
    for (int part = 0; part < 4; ++part) {
      const int first = 31 - 8 * part;
      const __m256i left = _mm256_setr_epi32(first, first - 1, first - 2, first - 3, first - 4, first - 5, first - 6, first - 7);
      const __m256i bits = _mm256_or_si256(_mm256_and_si256(_mm256_sllv_epi32(word, left), sign), one);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * w + 8 * part), bits);
    }
  }
}
#endif

// Features [first, first + n) of column j; `first` is a multiple of 128.
inline void rademacher_row(float* __restrict out, uint64_t j, int64_t first, int64_t n, uint64_t seed) {
  int64_t start = 0;
#ifdef LF_AVX2
  for (; start + 1024 <= n; start += 1024) {
    uint32_t words[32];
    philox8(seed, j, static_cast<uint32_t>((first + start) / 128), kTagRademacher, words);
    signs_of_whole_words(out + start, words, 32);
  }
#endif
  for (; start < n; start += 128) {
    const Words drawn = philox(seed, j, static_cast<uint32_t>((first + start) / 128), kTagRademacher);
    signs_of_words(out + start, drawn.w, smaller(128, n - start));
  }
}

// log x for 0 < x < 1. A polynomial, as here and below: the standard library's functions are no vectors, and differ from
// one machine to the next. With those of sine and cosine, a normal is within a few units in the last place of float32.
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

// Features [first, first + n) of column j; `first` is a multiple of 4.
inline void gaussian_row(float* __restrict out, uint64_t j, int64_t first, int64_t n, uint64_t seed) {
  int64_t start = 0;
#ifdef LF_AVX2
  for (; start + 32 <= n; start += 32) {
    uint32_t words[32];
    philox8(seed, j, static_cast<uint32_t>((first + start) / 4), kTagGaussian, words);
    normals_of_words(out + start, words, 16);
  }
#endif
  for (; start < n; start += 4) {
    const Words drawn = philox(seed, j, static_cast<uint32_t>((first + start) / 4), kTagGaussian);
    float normal[4];
    normals_of_words(normal, drawn.w, 2);
    std::memcpy(out + start, normal, sizeof(float) * smaller(4, n - start));
  }
}
