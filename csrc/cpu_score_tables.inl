// Stored bits times float queries, for cpu_score.cpp. Included after cpu_score_kernels.inl, and under the same rules.
// The partial sums of 4 dims under all 16 sign patterns are tabulated, for as many queries as V has lanes, and used for
// every row of the block: a row then costs one addition per 4 dims.

template <class V>
LF_INLINE void tabulate(const float* queries, float* table) {
  constexpr int L = sizeof(V) / sizeof(float);
  for (int g = 0; g < kBitChunk / 4; ++g, queries += 4 * L, table += 16 * L) {
    V pair[2][4];  // bit 0 of the index: the sign of the first of the two dims
    LF_UNROLL for (int h = 0; h < 2; ++h) {
      const V x = load<V>(queries + 2 * h * L), y = load<V>(queries + (2 * h + 1) * L);
      const V sum = add(x, y), difference = sub(y, x), nothing = zero(static_cast<V*>(nullptr));
      pair[h][0] = sum;
      pair[h][1] = difference;
      pair[h][2] = sub(nothing, difference);
      pair[h][3] = sub(nothing, sum);
    }
    LF_UNROLL for (int i = 0; i < 16; ++i) store(table + i * L, add(pair[0][i % 4], pair[1][i / 4]));
  }
}

constexpr int kBitRows = 8;  // rows at a time: independent additions hide each other's latency

// One chunk of dims of kBitRows rows: sums[r] (+)= the tabulated sums that words[r] chooses.
template <class V>
LF_INLINE void look_up(uint64_t (&words)[kBitRows], const float* table, float* sums, bool first) {
  constexpr int L = sizeof(V) / sizeof(float);
  V acc[kBitRows];
  LF_UNROLL for (int r = 0; r < kBitRows; ++r) acc[r] = zero(static_cast<V*>(nullptr));
  LF_ROLL for (int g = 0; g < kBitChunk / 4; g += 4, table += 4 * 16 * L)
    LF_UNROLL for (int r = 0; r < kBitRows; ++r) {
      LF_UNROLL for (int i = 0; i < 4; ++i)
        acc[r] = add(acc[r], load<V>(table + i * 16 * L + (words[r] >> (4 * i) & 15) * L));
      words[r] >>= 16;
    }
  LF_UNROLL for (int r = 0; r < kBitRows; ++r)
    store(sums + r * L, first ? acc[r] : add(load<V>(sums + r * L), acc[r]));
}

// Queries [q, q + width), width <= lanes of V, of rows [begin, end). queries: (dims padded to chunks, lanes).
template <class V>
inline void bit_tile(const Products& out, const Codes& codes, const float* queries, int64_t q, int64_t width,
                     int64_t begin, int64_t end, float* table, float* sums) {
  constexpr int L = sizeof(V) / sizeof(float);
  for (int64_t k = 0; k < codes.dim; k += kBitChunk) {
    tabulate<V>(queries + k * L, table);
    const int64_t bytes = Bit::bytes(smaller(kBitChunk, codes.dim - k));
    for (int64_t n = begin; n < end; n += kBitRows) {
      uint64_t words[kBitRows];
      LF_UNROLL for (int r = 0; r < kBitRows; ++r) {
        const uint8_t* code = codes.data + smaller(n + r, end - 1) * codes.row_bytes + k / 8;
        words[r] = load_word(code, bytes);
      }
      look_up<V>(words, table, sums + (n - begin) * L, k == 0);
    }
  }
  for (int64_t n = begin; n < end; ++n) {
    float* to = out.data + n * out.stride + q;
    for (int64_t c = 0; c < width; ++c)
      to[c] = (out.accumulate ? to[c] : 0.0f) + out.factor[n] * sums[(n - begin) * L + c];
  }
}

// Up to so many queries, bits are turned into +-1 in registers: less work than a table that is mostly empty.
constexpr int kDirectBits = kRegisters == 32 ? 2 : 0;

// Rows [begin, end) with queries that pack_bit_queries has put in order.
inline void multiply_bits(const Products& out, const Codes& codes, const float* queries, int64_t n_queries,
                          int64_t begin, int64_t end, float* scratch) {
  if constexpr (kDirectBits > 0)
    if (n_queries <= kDirectBits)
      return multiply_few<Bit, kDirectBits>(out, codes, Tiling(codes.dim, n_queries), queries, begin, end);
  const int64_t padded = round_up(codes.dim, kBitChunk);
  float* sums = scratch + kBitTable;
  for (int64_t q = 0; q < n_queries; q += 16) {
    const int64_t width = smaller(16, n_queries - q);
    if (width > 8)
      bit_tile<Wide>(out, codes, queries + q * padded, q, width, begin, end, scratch, sums);
    else
      bit_tile<Half>(out, codes, queries + q * padded, q, width, begin, end, scratch, sums);
  }
}

// Queries in the order in which the tables are made: (tiles, dims padded with zeros, lanes).
inline void pack_bit_queries(const float* queries, int64_t n_queries, int64_t dim, float* to) {
  if (n_queries <= kDirectBits) return pack_queries(queries, n_queries, dim, to);
  for (int64_t q0 = 0; q0 < n_queries; q0 += 16) {
    const int64_t width = smaller(16, n_queries - q0), lanes = width > 8 ? 16 : 8;
    for (int64_t k = 0; k < round_up(dim, kBitChunk); ++k, to += lanes)
      for (int64_t q = 0; q < lanes; ++q) to[q] = q < width && k < dim ? queries[(q0 + q) * dim + k] : 0.0f;
  }
}
