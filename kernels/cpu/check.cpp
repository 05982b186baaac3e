// The self-check of a library: compares its results, computed with its widest instructions, with the same sums made one
// product at a time. A level may be compiled on a machine that lacks its instructions, so that a user's machine may be
// the first to run them.
#include "check.h"

#include <vector>

#include "tile.h"

extern "C" {
int64_t prepare();
int64_t gemm_dense(int64_t weight_dtype, const float* x, const int32_t* sources, const int32_t* starts, int64_t weights,
                   const void* weight, const float* bias, float* out, int64_t m, int64_t n, int64_t k, int64_t threads);
int64_t gemm_wna16(int64_t bits, int64_t dtype, const void* x, const int32_t* sources, const int32_t* starts,
                   int64_t weights, const void* words, const void* scales, const void* zeros, void* out, int64_t m,
                   int64_t n, int64_t k, int64_t group, int64_t threads);
}

namespace {

// Inputs are integers and every group of them has a 127, so that rounding to bytes does not change them; scales are 1
// or 2. Then all intermediate results are integers that float32 represents exactly, and the order of additions does not
// matter.
bool packed_products_are_right(int64_t bits, bool has_zeros, int64_t m, int64_t group) {
  constexpr int64_t n = 2 * kTile + 6;
  const int64_t groups = 2, k = groups * group, per_word = 32 / bits, tiles = num_tiles(n);
  const int32_t most = (1 << bits) - 1;
  Random random;
  std::vector<uint32_t> words(tiles * k / per_word * kTile);
  std::vector<float> scales(tiles * groups * kTile), zeros(scales.size()), x(m * k), out(m * n);
  for (uint32_t& word : words) {
    for (int64_t i = 0; i < per_word; ++i) word = word << bits | uint32_t(random.whole(0, most));
  }
  for (float& scale : scales) scale = float(random.whole(1, 2));
  for (float& zero : zeros) zero = has_zeros ? float(random.whole(0, most)) : float(1 << (bits - 1));
  for (float& number : x) number = float(random.whole(-127, 127));
  for (int64_t i = 0; i < m * k; i += group) x[i] = 127.0f;
  gemm_wna16(bits, kFloat32, x.data(), nullptr, nullptr, 1, words.data(), scales.data(),
             has_zeros ? zeros.data() : nullptr, out.data(), m, n, k, group, 1);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      const int64_t tile = column / kTile, place = column % kTile;
      int64_t expected = 0;
      for (int64_t i = 0; i < k; ++i) {
        const uint32_t word = words[(tile * k / per_word + i / per_word) * kTile + place];
        const int64_t at = (tile * groups + i / group) * kTile + place, weight = word >> i % per_word * bits & most;
        expected += int64_t(x[row * k + i]) * (weight - int64_t(zeros[at])) * int64_t(scales[at]);
      }
      if (out[row * n + column] != float(expected)) return false;
    }
  }
  return true;
}

bool packed_products_are_right(int64_t bits) {
  for (const bool has_zeros : {false, true}) {
    const bool are_right = packed_products_are_right(bits, has_zeros, 1, 64) &&
                           packed_products_are_right(bits, has_zeros, 7, 24) &&
                           packed_products_are_right(bits, has_zeros, 67, 64);
    if (!are_right) return false;
  }
  return true;
}

template <class W>
bool dense_products_are_right(Code code, int64_t m) {
  constexpr int64_t n = 2 * kTile + 6, k = 131;
  Random random;
  std::vector<W> weight(num_tiles(n) * even_inputs<W>(k) * kTile);
  std::vector<float> x(m * k), bias(n), out(m * n);
  std::vector<double> numbers(n * k);
  for (float& number : x) number = random.number();
  for (float& number : bias) number = random.number();
  for (int64_t column = 0; column < n; ++column) {
    for (int64_t i = 0; i < k; ++i) {
      const float number = random.number();
      numbers[column * k + i] = number;
      W* const tile = &weight[column / kTile * even_inputs<W>(k) * kTile];
      store(tile + place_in_tile<W>(i, column % kTile), splat(number), 1);
    }
  }
  gemm_dense(code, x.data(), nullptr, nullptr, 1, weight.data(), bias.data(), out.data(), m, n, k, 1);
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      const auto left = [&](int64_t i) { return x[row * k + i]; };
      const auto right = [&](int64_t i) { return numbers[column * k + i]; };
      if (!is_sum(out[row * n + column], bias[column], k, left, right)) return false;
    }
  }
  return true;
}

template <class W>
bool dense_products_are_right(Code code) {
  return dense_products_are_right<W>(code, 1) && dense_products_are_right<W>(code, 37);
}

}  // namespace

// Returns null if all checks pass, otherwise a description of what failed.
EXPORT const char* self_check() {
  if (!prepare()) return "the operating system does not keep the state that it needs";
  if (!packed_products_are_right(4)) return "products with packed integers of 4 bits are wrong";
  if (!packed_products_are_right(8)) return "products with packed integers of 8 bits are wrong";
  if (!dense_products_are_right<float>(kFloat32)) return "products with float32 weights are wrong";
  if (!dense_products_are_right<BFloat16>(kBFloat16)) return "products with bfloat16 weights are wrong";
  if (!dense_products_are_right<Float16>(kFloat16)) return "products with float16 weights are wrong";
  return fault_of_attention();
}
