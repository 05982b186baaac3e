// What the parts of the self-check share.
#pragma once

#include <cmath>
#include <cstdint>

// Returns null where the products of attention are right, else what is wrong.
const char* fault_of_attention();

inline constexpr double kTolerance = 1e-5;  // of the sum of magnitudes

class Random {
 public:
  // A whole number of least .. most.
  int32_t whole(int32_t least, int32_t most) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return least + int32_t((state_ >> 33) % uint64_t(most - least + 1));
  }

  // A number of at least -1 and below 1 that every type of 16 bits holds as it is.
  float number() { return float(whole(-128, 127)) / 128.0f; }

 private:
  uint64_t state_ = 1;
};

// True if got = start plus the products of k pairs of numbers, left(i) * right(i).
template <class Left, class Right>
bool is_sum(double got, double start, int64_t k, const Left& left, const Right& right) {
  double expected = start, magnitudes = std::abs(start);
  for (int64_t i = 0; i < k; ++i) {
    const double product = double(left(i)) * right(i);
    expected += product;
    magnitudes += std::abs(product);
  }
  return std::abs(got - expected) <= kTolerance * magnitudes;
}
