// The CPU operations: raw pointers and sizes in, nothing allocated that outlives the call, no framework.
#pragma once

#include <cstdint>

namespace lf {

enum class Rule : int { kNone = 0, kSign = 1, kAdam = 2 };

// u = g, sign(g), or (a + alpha g) / (sqrt(b + gamma g^2) + e). a and b are (S, L) tables, contiguous.
struct Precondition {
  Rule rule;
  const float* a;
  const float* b;
  float alpha, gamma, e;
};

// One parameter's gradients of a batch: (N, S, L) float32; each example's (S, L) is contiguous.
struct Gradients {
  const float* data;
  int64_t n, stride_n, n_short, n_long;
};

// (N, K) float32, rows `stride` apart; the operations add to it.
struct Features {
  float* data;
  int64_t dim, stride;
};

// Blocked SRHT. Runs are numbered rho_base + q S + s; additions to a feature happen in order of rho whatever `threads` is.
void accumulate_srht(const Features& features, const Gradients& grads, const Precondition& rule, int64_t rho_base,
                     int64_t block, uint64_t seed, int threads);

// CountSketch and SJLT. The global index of entry (s, l) is j_base + s short_stride + l long_stride.
void accumulate_sjlt(const Features& features, const Gradients& grads, const Precondition& rule, int64_t j_base,
                     int64_t short_stride, int64_t long_stride, int64_t nnz, uint64_t seed, int threads);

enum class Dense : int { kRademacher = 0, kGaussian = 1 };

// The dense kinds. Entries are numbered as for accumulate_sjlt. A feature's additions happen in an order that depends
// on the parameter's shape alone. `scale` multiplies the signs and normals: 1/sqrt(K) for a projection.
void accumulate_dense(const Features& features, const Gradients& grads, const Precondition& rule, Dense kind,
                      int64_t j_base, int64_t short_stride, int64_t long_stride, uint64_t seed, float scale,
                      int threads);

// out = u, contiguous (N, S, L).
void precondition(float* out, const Gradients& grads, const Precondition& rule, int threads);

// Tests choose the instruction set; `false` leaves the portable code in use. Returns whether AVX2 is in use.
bool use_avx2(bool wanted);

}  // namespace lf
