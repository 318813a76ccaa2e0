#include "cpu_ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "philox.h"
#include "thread_pool.h"

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define LF_HAS_AVX2_PATH 1
#include <immintrin.h>
#else
#define LF_HAS_AVX2_PATH 0
#endif

namespace lf {

constexpr int64_t kMaskRows = 16;   // short rows whose SRHT masks are kept at a time: 8 KB at B = 64
constexpr int64_t kSjltTile = 256;  // entries whose buckets are kept at a time
// Entries, and features, of the part of a dense matrix that is kept at a time: 16 KB of signs, 128 KB of normals.
constexpr int64_t kDenseTile = 128, kDenseSigns = 1024, kDenseNormals = 256;

// How the entries of a gradient are numbered, and the key of their random words.
struct Numbering {
  int64_t j_base, short_stride, long_stride;
  uint64_t seed;
};

// Features [first, first + width), and room for kDenseTile rows, of row_words words each, of their part of the matrix.
struct Strip {
  int64_t first, width;
  uint32_t* matrix;
  int64_t row_words;
  float scale;  // of its signs or normals
};

namespace portable {
#include "cpu_kernels.inl"
#include "cpu_dense.inl"
}

#if LF_HAS_AVX2_PATH
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define LF_AVX2
namespace avx2 {
#include "cpu_kernels.inl"
#include "cpu_dense.inl"
}
#undef LF_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

std::atomic<bool> avx2_wanted{true};

bool avx2_in_use() {
#if LF_HAS_AVX2_PATH
  static const bool available = __builtin_cpu_supports("avx2");
  return available && avx2_wanted.load(std::memory_order_relaxed);
#else
  return false;
#endif
}

#if LF_HAS_AVX2_PATH
#define LF_DISPATCH(call) (avx2_in_use() ? avx2::call : portable::call)
#else
#define LF_DISPATCH(call) portable::call
#endif

// Cuts [0, n) into `parts` nearly equal pieces.
struct Split {
  int64_t n, parts;
  int64_t begin(int64_t i) const { return n * i / parts; }
};

}  // namespace

bool use_avx2(bool wanted) {
  avx2_wanted.store(wanted);
  return avx2_in_use();
}

void accumulate_srht(const Features& features, const Gradients& grads, const Precondition& rule, int64_t rho_base,
                     int64_t block, uint64_t seed, int threads) {
  // Masks are expanded once per group of examples, so groups are large; with few examples the slots are split too.
  const int64_t slots = features.dim / block;
  const Split examples{grads.n, std::min<int64_t>(grads.n, threads)};
  const Split groups{slots, std::min(slots, std::max<int64_t>(1, threads / std::max<int64_t>(examples.parts, 1)))};
  // Scratch is allocated here: a task must not throw.
  const int64_t tasks = examples.parts * groups.parts, n_masks = 2 * kMaskRows * block;
  std::vector<uint32_t> masks(tasks * n_masks);
  std::vector<float> scratch(tasks * block);
  parallel_for(tasks, threads, [&](int64_t task) {
    const int64_t e = task / groups.parts, g = task % groups.parts;
    LF_DISPATCH(srht_tile(features, grads, rule, rho_base, block, seed, examples.begin(e), examples.begin(e + 1),
                          groups.begin(g), groups.begin(g + 1), &masks[task * n_masks],
                          &scratch[task * block]));
  });
}

void accumulate_sjlt(const Features& features, const Gradients& grads, const Precondition& rule, int64_t j_base,
                     int64_t short_stride, int64_t long_stride, int64_t nnz, uint64_t seed, int threads) {
  const Split examples{grads.n, std::min<int64_t>(grads.n, threads)};
  const int64_t entries = kSjltTile * nnz;
  std::vector<uint32_t> bucket(examples.parts * entries), mask(examples.parts * entries);
  parallel_for(examples.parts, threads, [&](int64_t e) {
    LF_DISPATCH(sjlt_tile(features, grads, rule, j_base, short_stride, long_stride, nnz, seed, examples.begin(e),
                          examples.begin(e + 1), &bucket[e * entries], &mask[e * entries]));
  });
}

void accumulate_dense(const Features& features, const Gradients& grads, const Precondition& rule, Dense kind,
                      int64_t j_base, int64_t short_stride, int64_t long_stride, uint64_t seed, float scale,
                      int threads) {
  const bool normal = kind == Dense::kGaussian;
  // A strip for every thread, where the features are too few for strips of the best width.
  const int64_t share = ((features.dim + threads - 1) / threads + 127) / 128 * 128;
  const int64_t width = std::min(share, normal ? kDenseNormals : kDenseSigns);
  const int64_t n_strips = (features.dim + width - 1) / width, row_words = normal ? width : width / 32;
  const Split strips{n_strips, std::min<int64_t>(n_strips, threads)};
  const int64_t tile_words = kDenseTile * row_words;
  std::vector<uint32_t> matrix(strips.parts * tile_words);
  const Numbering numbers{j_base, short_stride, long_stride, seed};
  parallel_for(strips.parts, threads, [&](int64_t part) {
    for (int64_t strip = strips.begin(part); strip < strips.begin(part + 1); ++strip) {
      const int64_t first = strip * width;
      const int64_t here_width = std::min(width, features.dim - first);
      const Strip here{first, here_width, &matrix[part * tile_words], row_words, scale};
      if (normal)
        LF_DISPATCH(dense_strip<true>(features, grads, rule, numbers, here));
      else
        LF_DISPATCH(dense_strip<false>(features, grads, rule, numbers, here));
    }
  });
}

void precondition(float* out, const Gradients& grads, const Precondition& rule, int threads) {
  const int64_t size = grads.n_short * grads.n_long;
  const Split examples{grads.n, std::min<int64_t>(grads.n, threads)};
  parallel_for(examples.parts, threads, [&](int64_t e) {
    for (int64_t n = examples.begin(e); n < examples.begin(e + 1); ++n)
      LF_DISPATCH(apply(rule, grads.data + n * grads.stride_n, 0, size, out + n * size));
  });
}

}  // namespace lf
