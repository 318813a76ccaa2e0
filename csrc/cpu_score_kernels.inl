// The inner loops of cpu_score.cpp. Included once per instruction set, inside a namespace of its own; no #include may
// stand here, and no standard container: its members would be compiled for this instruction set and shared.

// Vectors: Half has 8 lanes, Wide 16; Vector is the one that fills a register.

#if defined(LF_AVX512) || defined(LF_AVX2)
using Half = __m256;

LF_INLINE Half zero(Half*) { return _mm256_setzero_ps(); }
LF_INLINE Half load(const float* from, Half*) { return _mm256_loadu_ps(from); }
LF_INLINE void store(float* to, Half x) { _mm256_storeu_ps(to, x); }
LF_INLINE Half add(Half x, Half y) { return _mm256_add_ps(x, y); }
LF_INLINE Half sub(Half x, Half y) { return _mm256_sub_ps(x, y); }
#else
using Half = Pair<Quad>;

LF_INLINE Quad zero(Quad*) { return Quad{}; }
LF_INLINE Quad load(const float* from, Quad*) { return read<Quad>(reinterpret_cast<const uint8_t*>(from)); }
LF_INLINE void store(float* to, const Quad& x) { std::memcpy(to, &x, sizeof x); }
LF_INLINE Quad add(const Quad& x, const Quad& y) { return x + y; }
LF_INLINE Quad sub(const Quad& x, const Quad& y) { return x - y; }
#endif

#if defined(LF_AVX512)
using Wide = __m512;

LF_INLINE Wide zero(Wide*) { return _mm512_setzero_ps(); }
LF_INLINE Wide load(const float* from, Wide*) { return _mm512_loadu_ps(from); }
LF_INLINE void store(float* to, Wide x) { _mm512_storeu_ps(to, x); }
LF_INLINE Wide add(Wide x, Wide y) { return _mm512_add_ps(x, y); }
LF_INLINE Wide sub(Wide x, Wide y) { return _mm512_sub_ps(x, y); }
#else
using Wide = Pair<Half>;

template <class T>
LF_INLINE Pair<T> zero(Pair<T>*) {
  return {zero(static_cast<T*>(nullptr)), zero(static_cast<T*>(nullptr))};
}
template <class T>
LF_INLINE Pair<T> load(const float* from, Pair<T>*) {
  return {load(from, static_cast<T*>(nullptr)), load(from + sizeof(T) / sizeof(float), static_cast<T*>(nullptr))};
}
template <class T>
LF_INLINE void store(float* to, const Pair<T>& x) {
  store(to, x.low);
  store(to + sizeof(T) / sizeof(float), x.high);
}
template <class T>
LF_INLINE Pair<T> add(const Pair<T>& x, const Pair<T>& y) {
  return {add(x.low, y.low), add(x.high, y.high)};
}
template <class T>
LF_INLINE Pair<T> sub(const Pair<T>& x, const Pair<T>& y) {
  return {sub(x.low, y.low), sub(x.high, y.high)};
}
#endif

// Vector; how a vector of codes is read; and add_lanes: to[i] += the sum of x[i]'s lanes, i < 4.
#if defined(LF_AVX512)
using Vector = Wide;
constexpr int kRegisters = 32;

LF_INLINE Vector multiply_add(Vector x, Vector y, Vector z) { return _mm512_fmadd_ps(x, y, z); }
LF_INLINE Vector decode(Float32, const uint8_t* code) { return _mm512_loadu_ps(code); }
LF_INLINE Vector decode(Float16, const uint8_t* code) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(code)));
}
LF_INLINE Vector decode(Bfloat16, const uint8_t* code) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(code));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
LF_INLINE Vector decode(Int8, const uint8_t* code) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code))));
}
LF_INLINE Vector decode(Bit, const uint8_t* code) {
  return _mm512_mask_blend_ps(read<uint16_t>(code), _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
}
#elif defined(LF_AVX2)
using Vector = Half;
constexpr int kRegisters = 16;

LF_INLINE Vector multiply_add(Vector x, Vector y, Vector z) { return _mm256_fmadd_ps(x, y, z); }
LF_INLINE Vector decode(Float32, const uint8_t* code) { return _mm256_loadu_ps(reinterpret_cast<const float*>(code)); }
LF_INLINE Vector decode(Float16, const uint8_t* code) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(code)));
}
LF_INLINE Vector decode(Bfloat16, const uint8_t* code) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
LF_INLINE Vector decode(Int8, const uint8_t* code) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(code))));
}
#else
using Vector = Quad;
constexpr int kRegisters = 16;

LF_INLINE Vector multiply_add(const Vector& x, const Vector& y, const Vector& z) { return x * y + z; }
LF_INLINE Vector decode(Float32, const uint8_t* code) { return read<Vector>(code); }
#endif

#if defined(LF_AVX512) || defined(LF_AVX2)
LF_INLINE void add_lanes(const Vector* x, float* to) {
#if defined(LF_AVX512)
  Half half[4];
  LF_UNROLL for (int i = 0; i < 4; ++i)
    half[i] = add(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps(x[i], 1));
#else
  const Half* half = x;
#endif
  const Half all = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), sum));
}
#else
LF_INLINE void add_lanes(const Vector* x, float* to) {
  for (int i = 0; i < 4; ++i) {
    float lane[4];
    store(lane, x[i]);
    to[i] += (lane[0] + lane[1]) + (lane[2] + lane[3]);
  }
}
#endif

template <class V>
LF_INLINE V load(const float* from) {
  return load(from, static_cast<V*>(nullptr));
}

constexpr int kLanes = sizeof(Vector) / sizeof(float);

// Tiles of R rows and C queries.

// As many rows as leave registers for the shorter side of the tile and one vector of the longer.
constexpr int tile_rows(int n_queries) {
  int rows = 8;
  while (rows > 1 && rows * n_queries + (rows < n_queries ? rows : n_queries) + 1 > kRegisters) --rows;
  return rows;
}

constexpr int kWidest = kRegisters == 32 ? 6 : 3;  // queries of a tile
// Vectors of dims that are added up before the sums are: rounding errors grow with the longest sum.
constexpr int64_t kSteps = 128;

// acc[r, c] += rows[r][offset...] * queries[c], for one vector of dims.
template <class Code, int R, int C>
LF_INLINE void multiply_step(const uint8_t* const* rows, int64_t offset, const float* queries, Vector* acc) {
  if constexpr (C <= R) {
    Vector y[C];
    LF_UNROLL for (int c = 0; c < C; ++c) y[c] = load<Vector>(queries + c * kLanes);
    LF_UNROLL for (int r = 0; r < R; ++r) {
      const Vector x = decode(Code{}, rows[r] + offset);
      LF_UNROLL for (int c = 0; c < C; ++c) acc[r * C + c] = multiply_add(x, y[c], acc[r * C + c]);
    }
  } else {
    Vector x[R];
    LF_UNROLL for (int r = 0; r < R; ++r) x[r] = decode(Code{}, rows[r] + offset);
    LF_UNROLL for (int c = 0; c < C; ++c) {
      const Vector y = load<Vector>(queries + c * kLanes);
      LF_UNROLL for (int r = 0; r < R; ++r) acc[r * C + c] = multiply_add(x[r], y, acc[r * C + c]);
    }
  }
}

// sums (R, C) += steps [s, stop) of a tile's rows times its queries (steps, C, kLanes). On the way the next rows are
// fetched, `stride` bytes a step, so that memory works while the sums are made.
template <class Code, int R, int C>
inline void multiply_steps(const Rows<R>& at, int64_t s, int64_t stop, const float* queries, int64_t fetched,
                           int64_t stride, float* sums) {
  constexpr int64_t kStep = Code::bytes(kLanes);
  constexpr int kSums = round_up(R * C, 4);
  const uint8_t *rows[R], *next[R];
  LF_UNROLL for (int r = 0; r < R; ++r) {
    rows[r] = at.rows[r];
    next[r] = at.next[r] + fetched;
  }
  Vector acc[kSums];
  LF_UNROLL for (int i = 0; i < kSums; ++i) acc[i] = zero(static_cast<Vector*>(nullptr));
  for (int64_t i = s; i < stop; ++i) {
    if constexpr (kStep >= 4) LF_UNROLL for (int r = 0; r < R; ++r) LF_FETCH(next[r] + i * stride);
    multiply_step<Code, R, C>(rows, i * kStep, queries + i * C * kLanes, acc);
  }
  if (stop == at.steps && at.tails[0]) multiply_step<Code, R, C>(at.tails, 0, queries + stop * C * kLanes, acc);
  LF_UNROLL for (int i = 0; i < kSums; i += 4) add_lanes(acc + i, sums + i);
}

// sums (R, C) of tile number `part` of `parts`, which fetches its share of the next rows.
template <class Code, int R, int C>
LF_INLINE void multiply_tile(const Rows<R>& at, const float* queries, int64_t part, int64_t parts, float* sums) {
  constexpr int64_t kStep = Code::bytes(kLanes);
  const int64_t fetched = at.steps * part / parts * kStep, stride = (kStep + parts - 1) / parts;
  std::memset(sums, 0, round_up(R * C, 4) * sizeof *sums);
  int64_t s = 0;
  do {
    const int64_t stop = smaller(at.steps, s + kSteps);
    multiply_steps<Code, R, C>(at, s, stop, queries, fetched, stride, sums);
    s = stop;
  } while (s < at.steps);
}

// Adds rows [n, n + n_rows) and queries [q, q + width), kNarrowest <= width <= C, to the products, or sets them.
template <class Code, int R, int kNarrowest, int C>
inline void write_tile(const Products& out, const Rows<R>& at, int64_t n, int64_t n_rows, const float* queries,
                       int64_t q, int64_t width, int64_t part, int64_t parts, bool accumulate) {
  if constexpr (C > kNarrowest)
    if (width < C)
      return write_tile<Code, R, kNarrowest, C - 1>(out, at, n, n_rows, queries, q, width, part, parts, accumulate);
  float sums[round_up(R * C, 4)];
  multiply_tile<Code, R, C>(at, queries, part, parts, sums);
  for (int64_t r = 0; r < n_rows; ++r) {
    float* to = out.data + (n + r) * out.stride + q;
    const float factor = out.factor[n + r];
    LF_UNROLL for (int c = 0; c < C; ++c) to[c] = (accumulate ? to[c] : 0.0f) + factor * sums[r * C + c];
  }
}

// How the work is cut: blocks of dims, of which a tile's rows stay in an L1 cache, in them chunks of queries, in them
// tiles of nearly equal width, none narrower than half the widest. Where the queries are so few that they are one tile,
// rows are read from end to end.
struct Tiling {
  int64_t dim, n_queries, block, chunks;

  Tiling(int64_t dim, int64_t n_queries)
      : dim(dim),
        n_queries(n_queries),
        block(n_queries <= kWidest ? round_up(dim, kLanes) : kSteps * kLanes),
        chunks((n_queries + kChunk - 1) / kChunk) {}
  int64_t chunk(int64_t i) const { return n_queries * i / chunks; }
  int64_t tiles(int64_t i) const { return (chunk(i + 1) - chunk(i) + kWidest - 1) / kWidest; }
  int64_t tile(int64_t i, int64_t t) const { return chunk(i) + (chunk(i + 1) - chunk(i)) * t / tiles(i); }
};

// Rows [begin, end): R of them meet all queries of a chunk while their block of dims is in cache.
template <class Code, int R, int kNarrowest, int C>
inline void multiply_rows(const Products& out, const Codes& codes, const Tiling& tiling, const float* queries,
                          int64_t begin, int64_t end) {
  uint8_t tail[R * Code::bytes(kLanes)] = {};
  Rows<R> at;
  for (int64_t k = 0; k < codes.dim; k += tiling.block) {
    const int64_t dims = smaller(tiling.block, codes.dim - k);
    const float* panel = queries + k * tiling.n_queries;
    for (int64_t i = 0; i < tiling.chunks; ++i)
      for (int64_t n = begin; n < end; n += R) {
        at.find(codes, n, end, Code::bytes(k), Code::bytes(dims), Code::bytes(kLanes), tail);
        for (int64_t t = 0, tiles = tiling.tiles(i); t < tiles; ++t) {
          const int64_t q = tiling.tile(i, t), width = tiling.tile(i, t + 1) - q;
          write_tile<Code, R, kNarrowest, C>(out, at, n, smaller(R, end - n), panel + q * round_up(dims, kLanes), q,
                                             width, t, tiles, out.accumulate || k > 0);
        }
      }
  }
}

// All queries are one tile, of Q = C or fewer.
template <class Code, int C>
inline void multiply_few(const Products& out, const Codes& codes, const Tiling& tiling, const float* queries,
                         int64_t begin, int64_t end) {
  if constexpr (C > 1)
    if (tiling.n_queries < C) return multiply_few<Code, C - 1>(out, codes, tiling, queries, begin, end);
  multiply_rows<Code, tile_rows(C), C, C>(out, codes, tiling, queries, begin, end);
}

// Rows [begin, end) with queries that pack_queries has put in order, decoded in registers.
template <class Code>
inline void multiply_loaded(const Products& out, const Codes& codes, const float* queries, int64_t n_queries,
                            int64_t begin, int64_t end) {
  const Tiling tiling(codes.dim, n_queries);
  if (n_queries <= kWidest) return multiply_few<Code, kWidest>(out, codes, tiling, queries, begin, end);
  multiply_rows<Code, tile_rows(kWidest), (kWidest + 1) / 2, kWidest>(out, codes, tiling, queries, begin, end);
}

// The same. scratch: (kDecodedRows, dim).
#if defined(LF_AVX512) || defined(LF_AVX2)
constexpr int64_t kDecodedRows = 0;

template <class Code>
inline void multiply(const Products& out, const Codes& codes, const float* queries, int64_t n_queries, int64_t begin,
                     int64_t end, float*) {
  multiply_loaded<Code>(out, codes, queries, n_queries, begin, end);
}
#else
constexpr int64_t kDecodedRows = 8;

template <class Code>
inline void multiply(const Products& out, const Codes& codes, const float* queries, int64_t n_queries, int64_t begin,
                     int64_t end, float* scratch) {
  if constexpr (Code::bytes(1) == Float32::bytes(1))
    return multiply_loaded<Code>(out, codes, queries, n_queries, begin, end);
  for (int64_t n = begin; n < end; n += kDecodedRows) {
    const int64_t rows = smaller(kDecodedRows, end - n);
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* code = codes.data + (n + r) * codes.row_bytes;
      float* __restrict to = scratch + r * codes.dim;
      for (int64_t k = 0; k < codes.dim; ++k) to[k] = Code::value(code + Code::bytes(k));
    }
    const Products part{out.data + n * out.stride, out.stride, out.factor + n, out.accumulate};
    const Codes decoded{reinterpret_cast<const uint8_t*>(scratch), Float32::bytes(codes.dim), rows, codes.dim};
    multiply_loaded<Float32>(part, decoded, queries, n_queries, 0, rows);
  }
}
#endif

// Queries in the order in which the tiles read them: (blocks, tiles, vectors of dims, queries of the tile, kLanes);
// dims are padded with zeros.
inline void pack_queries(const float* queries, int64_t n_queries, int64_t dim, float* to) {
  const Tiling tiling(dim, n_queries);
  for (int64_t k0 = 0; k0 < dim; k0 += tiling.block)
    for (int64_t i = 0; i < tiling.chunks; ++i)
      for (int64_t t = 0; t < tiling.tiles(i); ++t)
        for (int64_t k = k0; k < smaller(dim, k0 + tiling.block); k += kLanes)
          for (int64_t q = tiling.tile(i, t); q < tiling.tile(i, t + 1); ++q, to += kLanes) {
            const int64_t present = smaller(kLanes, dim - k);
            std::memcpy(to, queries + q * dim + k, present * sizeof(float));
            for (int64_t j = present; j < kLanes; ++j) to[j] = 0.0f;
          }
}
