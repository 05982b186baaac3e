// The part of the self-check that is about attention.
#include <cstring>
#include <vector>

#include "attend.h"
#include "check.h"
#include "dot.h"
#include "multiply.h"

namespace {

// What attention makes of keys and values that are stored as T.
template <class T>
bool small_products_are_right() {
  using Term = TermOf<T>;
  constexpr int64_t m = 7, terms = 9, k = terms * kNumbers<Term>, n = (kBlockVecs + 1) * kLanes;
  Random random;
  std::vector<Element<Term>> a(m * k + kLanes);
  std::vector<T> b(k * n);
  std::vector<float> left(m * k), right(k * n), c(m * n);
  for (int64_t i = 0; i < m * k; ++i) store(&a[i], splat(left[i] = random.number()), 1);
  for (int64_t i = 0; i < k * n; ++i) store(&b[i], splat(right[i] = random.number()), 1);
  const auto columns = [&](int64_t at) { return b.data() + at; };
  multiply<false, false>(reinterpret_cast<const Term*>(a.data()), terms, m, terms, columns, columns, n, c.data(), n, n);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      const auto of_row = [&](int64_t i) { return left[row * k + i]; };
      const auto of_column = [&](int64_t i) { return right[i * n + column]; };
      if (!is_sum(c[row * n + column], 0, k, of_row, of_column)) return false;
    }
  }
  return true;
}

// What attention makes of keys and values of 8 bits.
bool products_of_bytes_are_right() {
  Random random;
  for (int i = 0; i < 64; ++i) {
    uint8_t w[4 * kLanes];
    int8_t x[4 * kLanes];
    for (uint8_t& weight : w) weight = uint8_t(random.whole(0, kMostPlain));
    for (int8_t& input : x) input = int8_t(random.whole(-127, 127));
    const Int got = dot_plain(Int{} + i, read<Int>(w), read<Int>(x));
    for (int lane = 0; lane < kLanes; ++lane) {
      int32_t expected = i;
      for (int byte = 4 * lane; byte < 4 * lane + 4; ++byte) expected += int32_t(w[byte]) * x[byte];
      if (got[lane] != expected) return false;
    }
  }
  return true;
}

// Attention of many rows over keys and values of 8 bits, which the matrix unit may compute, and of each row alone: True
// if they are the same, bit by bit.
bool rows_of_attention_are_the_same() {
  constexpr int64_t dim = 96, m = 49, first = 2, tokens = 150, kTokens = Tile<Int8>::kMost;
  const int64_t size = query_size<Quad>(dim);
  Random random;
  const auto codes_and_scales = [&](float scale) {
    std::vector<Int8> of_parts(kTokens * row_size8(dim));
    for (Int8& byte : of_parts) byte.code = int8_t(random.whole(-127, 127));
    for (int64_t token = 0; token < kTokens; ++token) {
      const float own = scale * float(1 + token % 3);
      Int8* const part = &of_parts[token / kPart * kPart * row_size8(dim)];
      std::memcpy(part + dim * kPart + token % kPart * sizeof own, &own, sizeof own);
    }
    return of_parts;
  };
  const std::vector<Int8> keys = codes_and_scales(0.01f), values = codes_and_scales(1);
  const int32_t block = 0;
  const PagedCache<Int8> cache{keys.data(), values.data(), &block, 1, 1, 1, kTokens, 1, dim};
  Tile<Int8> tile;
  if (!tile.find(cache, 0, 0, first, tokens)) return false;
  std::vector<Quad> q(m * size);
  for (int64_t row = 0; row < m; ++row) {
    float numbers[dim];
    for (float& number : numbers) number = random.number();
    load_query(numbers, &q[row * size], 0.1f, dim);
  }
  std::vector<float> scores(m * kTokens), scratch(attend_scratch<Int8>(dim)), together(m * dim), alone(m * dim);
  std::vector<Softmax> softmax(m), softmax_alone(m);
  const auto attend_to = [&](int64_t row, int64_t rows, std::vector<Softmax>& sums, std::vector<float>& acc) {
    const Queries<Quad> queries{&q[row * size], scores.data(), &sums[row], &acc[row * dim], rows};
    attend(cache, tile, tile, 0, first, queries, CausalMask{}, 0, scratch.data());
  };
  attend_to(0, m, softmax, together);
  for (int64_t row = 0; row < m; ++row) attend_to(row, 1, softmax_alone, alone);
  for (int64_t row = 0; row < m; ++row) {
    const Softmax &a = softmax[row], &b = softmax_alone[row];
    if (a.largest != b.largest || a.total != b.total) return false;
  }
  return together == alone;
}

}  // namespace

const char* fault_of_attention() {
  if (!small_products_are_right<float>()) return "products of attention in float32 are wrong";
  if (!small_products_are_right<BFloat16>()) return "products of attention in bfloat16 are wrong";
  if (!products_of_bytes_are_right()) return "products of attention in 8 bits are wrong";
  if (!rows_of_attention_are_the_same()) return "attention of many rows in 8 bits is not that of each row";
  return nullptr;
}
