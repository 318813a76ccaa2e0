// Inner products of stored codes with queries, read straight from the stored bytes.
#pragma once

#include <cstdint>

namespace lf {

enum class CodeType : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kInt8 = 3, kBit = 4 };

// n rows of dim codes; row i begins at data + i row_bytes, on any address. kBit: bit i % 8 of byte i / 8 is set where
// the code is -1 and clear where it is +1; the unused bits of the last byte are 0.
struct Codes {
  const uint8_t* data;
  int64_t row_bytes, n, dim;
};

// (n, Q) float32, rows `stride` floats apart. Row i is multiplied by factor[i], and added to what is there or not.
struct Products {
  float* data;
  int64_t stride;
  const float* factor;
  bool accumulate;
};

// out[i, q] (+)= factor[i] sum_k code[i, k] queries[q, k], for contiguous float32 queries (Q, dim).
// A row's bits depend on its codes, the queries and the instruction set; not on its neighbours nor on `threads`.
void inner_products(const Products& out, const Codes& codes, CodeType type, const float* queries, int64_t n_queries,
                    int threads);

// The same with queries that are kBit codes as well, contiguous (Q, ceil(dim / 8)): exact integers by popcount, times
// factor[i] query_factor[q].
void inner_products_bits(const Products& out, const Codes& codes, const uint8_t* query_codes, int64_t n_queries,
                         const float* query_factor, int threads);

// Tests choose the instruction set: 0 portable, 1 AVX2, 2 AVX-512. Returns the highest one that is there and not above
// `wanted`, which is used from then on.
int use_instructions(int wanted);

}  // namespace lf
