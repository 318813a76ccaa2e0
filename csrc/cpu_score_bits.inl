// Popcounts of stored bits against query bits, for cpu_score.cpp. Included once per instruction set, like
// cpu_score_kernels.inl, and under the same rules.

constexpr int kCountRows = 4;  // rows of a tile

// Counts: partial counts of the bits in which two pieces of kCountBytes differ; they hold kCountSteps pieces.
// sum_counts: to[i] += all of x[i], i < 4.
#if defined(LF_AVX512)
using Counts = __m512i;
constexpr int64_t kCountBytes = 64, kCountSteps = int64_t{1} << 20;
constexpr int kCountWidest = 5;  // queries of a tile

LF_INLINE Counts load_bits(const uint8_t* from) { return _mm512_loadu_si512(from); }
LF_INLINE Counts no_counts() { return _mm512_setzero_si512(); }
LF_INLINE Counts count(Counts sum, Counts x, Counts y) {
  return _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_xor_si512(x, y)));
}
LF_INLINE void sum_counts(const Counts* x, int32_t* to) {
  const Counts low = _mm512_or_si512(x[0], _mm512_slli_epi64(x[1], 32));
  const Counts high = _mm512_or_si512(x[2], _mm512_slli_epi64(x[3], 32));
  const Counts all = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  __m128i* const at = reinterpret_cast<__m128i*>(to);
  _mm_storeu_si128(at, _mm_add_epi32(_mm_loadu_si128(at), sum));
}
#elif defined(LF_AVX2)
using Counts = __m256i;
constexpr int64_t kCountBytes = 32, kCountSteps = 31;  // a byte holds 31 times 8
constexpr int kCountWidest = 2;

LF_INLINE Counts load_bits(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
LF_INLINE Counts no_counts() { return _mm256_setzero_si256(); }
LF_INLINE Counts count(Counts sum, Counts x, Counts y) {
  const Counts bits_of = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                          0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const Counts nibble = _mm256_set1_epi8(15), different = _mm256_xor_si256(x, y);
  const Counts low = _mm256_and_si256(different, nibble);
  const Counts high = _mm256_and_si256(_mm256_srli_epi16(different, 4), nibble);
  sum = _mm256_add_epi8(sum, _mm256_shuffle_epi8(bits_of, low));
  return _mm256_add_epi8(sum, _mm256_shuffle_epi8(bits_of, high));
}
LF_INLINE void sum_counts(const Counts* x, int32_t* to) {
  Counts word[4];
  LF_UNROLL for (int i = 0; i < 4; ++i) word[i] = _mm256_sad_epu8(x[i], _mm256_setzero_si256());
  const Counts low = _mm256_or_si256(word[0], _mm256_slli_epi64(word[1], 32));
  const Counts high = _mm256_or_si256(word[2], _mm256_slli_epi64(word[3], 32));
  const Counts all = _mm256_add_epi32(_mm256_unpacklo_epi64(low, high), _mm256_unpackhi_epi64(low, high));
  const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  __m128i* const at = reinterpret_cast<__m128i*>(to);
  _mm_storeu_si128(at, _mm_add_epi32(_mm_loadu_si128(at), sum));
}
#else
using Counts = uint64_t;
constexpr int64_t kCountBytes = 8, kCountSteps = 31;
constexpr int kCountWidest = 1;

LF_INLINE Counts load_bits(const uint8_t* from) { return read<uint64_t>(from); }
LF_INLINE Counts no_counts() { return 0; }
LF_INLINE Counts count(Counts sum, Counts x, Counts y) {
  uint64_t bits = x ^ y;
  bits -= bits >> 1 & 0x5555555555555555u;
  bits = (bits & 0x3333333333333333u) + (bits >> 2 & 0x3333333333333333u);
  return sum + ((bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0Fu);
}
LF_INLINE void sum_counts(const Counts* x, int32_t* to) {
  constexpr uint64_t kEven = 0x00FF00FF00FF00FFu;
  for (int i = 0; i < 4; ++i)
    to[i] += static_cast<int32_t>((((x[i] & kEven) + (x[i] >> 8 & kEven)) * 0x0001000100010001u) >> 48);
}
#endif

// acc[r, c] += bits in which rows[r][offset...] and queries[c] differ.
template <int C>
LF_INLINE void count_step(const uint8_t* const* rows, int64_t offset, const uint8_t* queries,
                          Counts (&acc)[kCountRows * C]) {
  Counts y[C];
  LF_UNROLL for (int c = 0; c < C; ++c) y[c] = load_bits(queries + c * kCountBytes);
  LF_UNROLL for (int r = 0; r < kCountRows; ++r) {
    const Counts x = load_bits(rows[r] + offset);
    LF_UNROLL for (int c = 0; c < C; ++c) acc[r * C + c] = count(acc[r * C + c], x, y[c]);
  }
}

// counts (kCountRows, C); queries: (steps, C, kCountBytes). Tile `part` of `parts` fetches its share of the next rows.
template <int C>
inline void count_tile(const Rows<kCountRows>& at, const uint8_t* queries, int64_t part, int64_t parts,
                       int32_t* counts) {
  const uint8_t *row[kCountRows], *next[kCountRows];
  LF_UNROLL for (int r = 0; r < kCountRows; ++r) {
    row[r] = at.rows[r];
    next[r] = at.next[r] + at.steps * part / parts * kCountBytes;
  }
  const int64_t stride = (kCountBytes + parts - 1) / parts;
  std::memset(counts, 0, kCountRows * C * sizeof *counts);
  int64_t s = 0;
  do {
    Counts acc[kCountRows * C];
    LF_UNROLL for (int i = 0; i < kCountRows * C; ++i) acc[i] = no_counts();
    for (const int64_t stop = smaller(at.steps, s + kCountSteps - 1); s < stop; ++s) {
      LF_UNROLL for (int r = 0; r < kCountRows; ++r) LF_FETCH(next[r] + s * stride);
      count_step<C>(row, s * kCountBytes, queries + s * C * kCountBytes, acc);
    }
    if (s == at.steps && at.tails[0]) count_step<C>(at.tails, 0, queries + s * C * kCountBytes, acc);
    LF_UNROLL for (int i = 0; i < kCountRows * C; i += 4) sum_counts(acc + i, counts + i);
  } while (s < at.steps);
}

// Adds rows [n, n + n_rows) and queries [q, q + width), width <= C, to the products, or sets them.
template <int C>
inline void write_counts(const Products& out, int64_t dim, const Rows<kCountRows>& at, int64_t n, int64_t n_rows,
                         const uint8_t* queries, const float* query_factor, int64_t q, int64_t width, int64_t part,
                         int64_t parts) {
  if constexpr (C > 1)
    if (width < C)
      return write_counts<C - 1>(out, dim, at, n, n_rows, queries, query_factor, q, width, part, parts);
  int32_t counts[kCountRows * C];
  count_tile<C>(at, queries, part, parts, counts);
  for (int64_t r = 0; r < n_rows; ++r) {
    float* to = out.data + (n + r) * out.stride + q;
    const float factor = out.factor[n + r];
    for (int c = 0; c < C; ++c) {
      const float product = static_cast<float>(dim - 2 * int64_t{counts[r * C + c]});
      to[c] = (out.accumulate ? to[c] : 0.0f) + factor * query_factor[q + c] * product;
    }
  }
}

inline int64_t count_tiles(int64_t n_queries) { return (n_queries + kCountWidest - 1) / kCountWidest; }

// Rows [begin, end) with queries that pack_bits has put in order.
inline void count_rows(const Products& out, const Codes& codes, const uint8_t* queries, int64_t n_queries,
                       const float* query_factor, int64_t begin, int64_t end) {
  const int64_t bytes = Bit::bytes(codes.dim), padded = round_up(bytes, kCountBytes), tiles = count_tiles(n_queries);
  uint8_t tail[kCountRows * kCountBytes] = {};
  Rows<kCountRows> at;
  for (int64_t n = begin; n < end; n += kCountRows) {
    at.find(codes, n, end, 0, bytes, kCountBytes, tail);
    for (int64_t t = 0, q = 0; t < tiles; ++t) {
      const int64_t width = n_queries * (t + 1) / tiles - q;
      write_counts<kCountWidest>(out, codes.dim, at, n, smaller(kCountRows, end - n), queries + q * padded,
                                 query_factor, q, width, t, tiles);
      q += width;
    }
  }
}

// Query bits in the order in which the tiles read them: (tiles, pieces, queries of the tile, kCountBytes).
inline void pack_bits(const uint8_t* queries, int64_t n_queries, int64_t dim, uint8_t* to) {
  const int64_t bytes = Bit::bytes(dim), tiles = count_tiles(n_queries);
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t b = 0; b < bytes; b += kCountBytes)
      for (int64_t q = n_queries * t / tiles; q < n_queries * (t + 1) / tiles; ++q, to += kCountBytes) {
        const int64_t present = smaller(kCountBytes, bytes - b);
        std::memcpy(to, queries + q * bytes + b, present);
        std::memset(to + present, 0, kCountBytes - present);
      }
}
