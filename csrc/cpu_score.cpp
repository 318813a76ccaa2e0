#include "cpu_score.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "thread_pool.h"

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define LF_HAS_X86_PATHS 1
#include <immintrin.h>
#else
#define LF_HAS_X86_PATHS 0
#endif

// Accumulators are arrays that must become registers: the loops over them are unrolled, their helpers inlined. LF_ROLL
// keeps a loop from being unrolled. LF_FETCH asks for a line of memory, not for room in the first cache.
#if defined(__clang__)
#define LF_INLINE inline __attribute__((always_inline))
#define LF_UNROLL _Pragma("unroll")
#define LF_ROLL _Pragma("nounroll")
#define LF_FETCH(address) __builtin_prefetch(address, 0, 2)
#elif defined(__GNUC__)
#define LF_INLINE inline __attribute__((always_inline))
#define LF_UNROLL _Pragma("GCC unroll 64")
#define LF_ROLL _Pragma("GCC unroll 1")
#define LF_FETCH(address) __builtin_prefetch(address, 0, 2)
// GCC 12 says that its AVX-512 headers use undefined vectors, and that a template's argument is no vector of its own.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#else
#define LF_INLINE inline
#define LF_UNROLL
#define LF_ROLL
#define LF_FETCH(address) static_cast<void>(address)
#endif

namespace lf {

constexpr int64_t kRowBlock = 96;      // rows of a task
constexpr int64_t kChunk = 96;         // queries that meet them: their dims fit an L2 cache
constexpr int64_t kBitChunk = 64;      // dims whose partial sums are tabulated at a time
constexpr int64_t kBitRowBlock = 512;  // rows for which a table is made
constexpr int64_t kBitTable = kBitChunk / 4 * 16 * 16;  // floats of a table for 16 queries: 16 KB

inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class T>
inline T read(const uint8_t* from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Four floats, where nothing is known of the CPU; two of something.
#if defined(__GNUC__)
typedef float Quad __attribute__((vector_size(16)));
#else
struct Quad {
  float lane[4];
};
inline Quad operator+(Quad x, const Quad& y) {
  for (int i = 0; i < 4; ++i) x.lane[i] += y.lane[i];
  return x;
}
inline Quad operator-(Quad x, const Quad& y) {
  for (int i = 0; i < 4; ++i) x.lane[i] -= y.lane[i];
  return x;
}
inline Quad operator*(Quad x, const Quad& y) {
  for (int i = 0; i < 4; ++i) x.lane[i] *= y.lane[i];
  return x;
}
#endif
template <class T>
struct Pair {
  T low, high;
};

// The types of codes: the bytes of n of them and, for the portable path, the value of one.
struct Float32 {
  static constexpr int64_t bytes(int64_t n) { return 4 * n; }
  static float value(const uint8_t* code) { return read<float>(code); }
};
struct Float16 {
  static constexpr int64_t bytes(int64_t n) { return 2 * n; }
  static float value(const uint8_t* code) {
    const uint32_t half = read<uint16_t>(code), sign = (half & 0x8000u) << 16, rest = (half & 0x7FFFu) << 13;
    const uint32_t normal = rest + (112u << 23), infinite = rest + (224u << 23);
    const uint32_t subnormal = to_bits(from_bits(rest + (113u << 23)) - 0x1p-14f);
    return from_bits(sign | (rest < 1u << 23 ? subnormal : rest < 31u << 23 ? normal : infinite));
  }
};
struct Bfloat16 {
  static constexpr int64_t bytes(int64_t n) { return 2 * n; }
  static float value(const uint8_t* code) { return from_bits(static_cast<uint32_t>(read<uint16_t>(code)) << 16); }
};
struct Int8 {
  static constexpr int64_t bytes(int64_t n) { return n; }
  static float value(const uint8_t* code) { return static_cast<float>(read<int8_t>(code)); }
};
struct Bit {
  static constexpr int64_t bytes(int64_t n) { return (n + 7) / 8; }
};

// Where R rows lie: `steps` pieces of `step` bytes at `rows`, then part of one, padded with zeros, at `tails`, or
// nothing where those are null; `next`: the rows that will be read after these.
template <int R>
struct Rows {
  const uint8_t *rows[R], *tails[R], *next[R];
  int64_t steps;

  // `bytes` bytes, the first `skipped` left out, of rows n, n + 1, ...; past `end` they are the last row again.
  // tail: (R, step) bytes, zeros before the first call.
  void find(const Codes& codes, int64_t n, int64_t end, int64_t skipped, int64_t bytes, int64_t step, uint8_t* tail) {
    const int64_t left = bytes % step;
    steps = bytes / step;
    for (int r = 0; r < R; ++r) {
      rows[r] = codes.data + smaller(n + r, end - 1) * codes.row_bytes + skipped;
      next[r] = codes.data + smaller(n + R + r, end - 1) * codes.row_bytes + skipped;
      tails[r] = left ? tail + r * step : nullptr;
      if (left) std::memcpy(tail + r * step, rows[r] + steps * step, left);
    }
  }
};

// 8 bytes, or fewer and zeros, as a little-endian number.
inline uint64_t load_word(const uint8_t* from, int64_t bytes) {
#if LF_HAS_X86_PATHS
  if (bytes == 8) return read<uint64_t>(from);
#endif
  uint64_t word = 0;
  for (int64_t i = 0; i < bytes; ++i) word |= static_cast<uint64_t>(from[i]) << (8 * i);
  return word;
}

namespace portable {
#include "cpu_score_bits.inl"
#include "cpu_score_kernels.inl"
#include "cpu_score_tables.inl"
}  // namespace portable

#if LF_HAS_X86_PATHS

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define LF_AVX2
namespace avx2 {
#include "cpu_score_bits.inl"
#include "cpu_score_kernels.inl"
#include "cpu_score_tables.inl"
}  // namespace avx2
#undef LF_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define LF_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace avx512 {
#include "cpu_score_kernels.inl"
#include "cpu_score_tables.inl"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512vpopcntdq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512vpopcntdq")
#endif
namespace avx512_bits {
#include "cpu_score_bits.inl"
}  // namespace avx512_bits
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef LF_AVX512

#endif

namespace {

enum Instructions : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

std::atomic<int> instructions_wanted{kAvx512};

Instructions instructions() {
#if LF_HAS_X86_PATHS
  static const int available = [] {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
      return kPortable;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? kAvx512 : kAvx2;
  }();
  return static_cast<Instructions>(std::min(available, instructions_wanted.load(std::memory_order_relaxed)));
#else
  return kPortable;
#endif
}

#if LF_HAS_X86_PATHS
#define LF_DISPATCH(set, call) ((set) == kAvx512 ? avx512::call : (set) == kAvx2 ? avx2::call : portable::call)
// Popcounts of vectors came to AVX-512 later than the rest.
#define LF_DISPATCH_BITS(set, call)                                                         \
  ((set) == kAvx512 && __builtin_cpu_supports("avx512vpopcntdq") ? avx512_bits::call        \
   : (set) == kPortable                                          ? portable::call : avx2::call)
#else
#define LF_DISPATCH(set, call) (static_cast<void>(set), portable::call)
#define LF_DISPATCH_BITS(set, call) LF_DISPATCH(set, call)
#endif

// Memory that begins on a cache line, so that no vector of it lies across two.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : memory_(n + 64 / sizeof(T)) {}
  T* data() {
    void* start = memory_.data();
    size_t space = memory_.size() * sizeof(T);
    return static_cast<T*>(std::align(64, 0, start, space));
  }

 private:
  std::vector<T> memory_;
};

// Blocks of rows for tasks that take them in order: as the rows of a file are read.
class Blocks {
 public:
  Blocks(int64_t n, int64_t most, int threads)
      : n_(n), block_(std::min(most, round_up((n + threads - 1) / threads, 8))), threads_(threads) {}
  int64_t block() const { return block_; }

  // work(i, begin, end) for every block; task i < threads is one thread, and alone has that i.
  template <class Work>
  void run(const Work& work) {
    std::atomic<int64_t> next{0};
    parallel_for(threads_, threads_, [&](int64_t i) {
      for (int64_t begin = next.fetch_add(block_); begin < n_; begin = next.fetch_add(block_))
        work(i, begin, std::min(n_, begin + block_));
    });
  }

 private:
  int64_t n_, block_;
  int threads_;
};

template <class Code>
void multiply_codes(const Products& out, const Codes& codes, const float* queries, int64_t n_queries, int threads) {
  const Instructions set = instructions();
  const int64_t each = LF_DISPATCH(set, kDecodedRows) * codes.dim;
  Scratch<float> packed(n_queries * round_up(codes.dim, 16)), scratch(threads * each);
  float *const at = packed.data(), *const scratch_at = scratch.data();
  LF_DISPATCH(set, pack_queries(queries, n_queries, codes.dim, at));
  Blocks(codes.n, kRowBlock, threads).run([&](int64_t i, int64_t begin, int64_t end) {
    LF_DISPATCH(set, multiply<Code>(out, codes, at, n_queries, begin, end, scratch_at + i * each));
  });
}

void multiply_bits(const Products& out, const Codes& codes, const float* queries, int64_t n_queries, int threads) {
  const Instructions set = instructions();
  Blocks blocks(codes.n, kBitRowBlock, threads);
  const int64_t each = kBitTable + blocks.block() * 16;
  Scratch<float> packed(round_up(n_queries, 16) * round_up(codes.dim, kBitChunk)), scratch(threads * each);
  float *const at = packed.data(), *const scratch_at = scratch.data();
  LF_DISPATCH(set, pack_bit_queries(queries, n_queries, codes.dim, at));
  blocks.run([&](int64_t i, int64_t begin, int64_t end) {
    LF_DISPATCH(set, multiply_bits(out, codes, at, n_queries, begin, end, scratch_at + i * each));
  });
}

}  // namespace

int use_instructions(int wanted) {
  instructions_wanted.store(wanted);
  return instructions();
}

void inner_products(const Products& out, const Codes& codes, CodeType type, const float* queries, int64_t n_queries,
                    int threads) {
  switch (type) {
    case CodeType::kFloat32:
      return multiply_codes<Float32>(out, codes, queries, n_queries, threads);
    case CodeType::kFloat16:
      return multiply_codes<Float16>(out, codes, queries, n_queries, threads);
    case CodeType::kBfloat16:
      return multiply_codes<Bfloat16>(out, codes, queries, n_queries, threads);
    case CodeType::kInt8:
      return multiply_codes<Int8>(out, codes, queries, n_queries, threads);
    case CodeType::kBit:
      return multiply_bits(out, codes, queries, n_queries, threads);
  }
}

void inner_products_bits(const Products& out, const Codes& codes, const uint8_t* query_codes, int64_t n_queries,
                         const float* query_factor, int threads) {
  const Instructions set = instructions();
  Scratch<uint8_t> packed(n_queries * round_up(Bit::bytes(codes.dim), 64));
  uint8_t* const at = packed.data();
  LF_DISPATCH_BITS(set, pack_bits(query_codes, n_queries, codes.dim, at));
  Blocks(codes.n, kRowBlock, threads).run([&](int64_t, int64_t begin, int64_t end) {
    LF_DISPATCH_BITS(set, count_rows(out, codes, at, n_queries, query_factor, begin, end));
  });
}

}  // namespace lf
