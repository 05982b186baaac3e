// Products with weights of 4 and 8 bit integers in groups.
//
// Inputs are rounded to 8 bits, with a scale for every group of a row, so that a group's sum of products is exact in 32
// bits. Groups are added up in one order with the same roundings: a row of the result is the same, bit by bit, whatever
// rows are beside it and however many threads there are.
//
// Weights lie in tiles of columns, one behind the other: words [n / 32, k * bits / 32, 32], scales and zeros
// [n / 32, k / group, 32]. A product reads them from the first to the last as they are in memory. Inputs lie in blocks of
// rows, in the order in which they are used: codes [k / 4, rows of the block, 4].
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "dot.h"
#include "parallel.h"
#include "recording.h"

namespace {

constexpr int kTile = 32;  // `TILE` in gemm_wna16.py
constexpr int kBlockRows = kDotIsOneInstruction ? 8 : 4;  // as many sums as there are registers for
constexpr int kAhead = 2048;                              // bytes of words that are asked for ahead
constexpr double kItemNs = 6000;                          // work worth another thread's taking

// Rows are in as few blocks as can be, of even sizes.
struct Blocks {
  int64_t rows, count;

  explicit Blocks(int64_t m) : rows(m), count((m + kBlockRows - 1) / kBlockRows) {}
  int64_t start(int64_t block) const { return rows * block / count; }
};

template <class T>
struct Problem {
  const int32_t* words;
  const T* scales;
  const T* zeros;  // or null: the middle of the range is zero
  T* out;          // [m, n]
  int64_t m, n, k, group;
  const int8_t* codes;        // for 4 bits, of every eight the four at even places come first
  const float* input_scales;  // [k / group, rows of the block] of each block
  const int32_t* input_sums;  // the same, of codes
};

using Bytes16 = int8_t __attribute__((vector_size(16)));

// One row of a block of `rows`; codes, scales and sums are where the row's first are.
template <class T, int Bits>
void round_row(const T* x, int64_t k, int64_t group, int64_t rows, int8_t* codes, float* scales, int32_t* sums) {
  for (int64_t start = 0; start < k; start += group, x += group, scales += rows, sums += rows) {
    Vec largest = {}, poison = {};  // 0, or NaN if an input is not finite
    auto look = [&](Vec v) {
      largest = max(largest, max(v, -v));
      poison += v * 0.0f;
    };
    int64_t i = 0;
    for (; i + kLanes <= group; i += kLanes) look(load(x + i));
    if (i < group) look(load(x + i, group - i));
    const float bound = maximum(largest);
    const float inverse = bound > 1e-30f ? 127.0f / bound : 0.0f;
    Int total = {};
    for (i = 0; i < group; i += 16) {
      alignas(16) uint8_t bytes[16];
      for (int part = 0; part < 16 / kLanes; ++part) {
        const int64_t at = i + part * kLanes;
        const Vec v = at + kLanes <= group ? load(x + at) : at < group ? load(x + at, group - at) : Vec{};
        const Int code = bit_cast<Int>(v * inverse + 12582912.0f) - 0x4B400000;  // the integer lands in the low bits
        total += code;
        const auto narrow = __builtin_convertvector(code, Byte);
        std::memcpy(bytes + part * kLanes, &narrow, sizeof narrow);
      }
      if constexpr (Bits == 4) {
        Bytes16 b;
        std::memcpy(&b, bytes, sizeof b);
        b = __builtin_shuffle(b, Bytes16{0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15});
        std::memcpy(bytes, &b, sizeof b);
      }
      for (int four = 0; four < std::min<int64_t>(16, group - i); four += 4, codes += 4 * rows) {
        std::memcpy(codes, bytes + four, 4);
      }
    }
    *scales = bound / 127.0f + sum(poison);
    int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
    *sums = sum;
  }
}

inline Int load_words(const int32_t* p) {
  Int v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Int four(const int8_t* codes) {
  int32_t v;
  std::memcpy(&v, codes, 4);
  return Int{} + v;
}

// Where the sum of a group starts, so that no zero point is left to subtract except those of `zeros`.
template <int Bits>
inline int32_t start_of(bool has_zeros, int32_t input_sum) {
  return (has_zeros ? kCentre<Bits> : kCentre<Bits> - (1 << (Bits - 1))) * input_sum;
}

// M rows, which are a block, of V vectors of a tile's columns from `first` on.
template <class T, int Bits, int M, int V>
void part_of_tile(const Problem<T>& p, int64_t tile, int64_t row, int first) {
  const int64_t groups = p.k / p.group, num_words = p.group * Bits / 32;
  const int32_t* words = p.words + tile * groups * num_words * kTile + first;
  const T* scales = p.scales + tile * groups * kTile + first;
  const T* zeros = p.zeros == nullptr ? nullptr : p.zeros + tile * groups * kTile + first;
  const int8_t* codes = p.codes + row * p.k;
  const float* input_scales = p.input_scales + row * groups;
  const int32_t* input_sums = p.input_sums + row * groups;
  Vec result[M][V] = {};
  for (int64_t g = 0; g < groups; ++g) {
    Int sum[M][V];
    for (int m = 0; m < M; ++m) {
      const Int start = Int{} + start_of<Bits>(zeros != nullptr, input_sums[m]);
      for (int v = 0; v < V; ++v) sum[m][v] = start;
    }
    for (int64_t i = 0; i < num_words; ++i, words += kTile) {
      Int w[V];
      for (int v = 0; v < V; ++v) {
        w[v] = load_words(words + v * kLanes);
        if (v * kLanes % 16 == 0) __builtin_prefetch(reinterpret_cast<const char*>(words + v * kLanes) + kAhead);
      }
      auto add = [&](auto weights) __attribute__((always_inline)) {
        for (int m = 0; m < M; ++m) {
          const Int x = four(codes + 4 * m);
          for (int v = 0; v < V; ++v) sum[m][v] = dot<Bits>(sum[m][v], weights(w[v]), x);
        }
        codes += 4 * M;
      };
      if constexpr (Bits == 8) {
        add([](Int word) { return word; });
      } else {
        add([](Int word) { return word & 0x0f0f0f0f; });
        add([](Int word) { return word >> 4 & 0x0f0f0f0f; });
      }
    }
    for (int v = 0; v < V; ++v) {
      const Vec scale = load(scales + v * kLanes);
      const Vec zero = zeros == nullptr ? Vec{} : load(zeros + v * kLanes);
      for (int m = 0; m < M; ++m) {
        Vec value = __builtin_convertvector(sum[m][v], Vec);
        if (zeros != nullptr) value -= zero * float(input_sums[m]);
        result[m][v] += value * (scale * input_scales[m]);
      }
    }
    scales += kTile;
    if (zeros != nullptr) zeros += kTile;
    input_scales += M;
    input_sums += M;
  }
  const int64_t column = tile * kTile + first;
  const int64_t width = std::min<int64_t>(V * kLanes, p.n - column);
  for (int m = 0; m < M; ++m) {
    T* to = p.out + (row + m) * p.n + column;
    T all[V * kLanes];
    for (int v = 0; v < V; ++v) store((width == V * kLanes ? to : all) + v * kLanes, result[m][v]);
    if (width < V * kLanes) std::memcpy(to, all, width * sizeof(T));
  }
}

template <class T, int Bits, int M>
void block_of_tile(const Problem<T>& p, int64_t tile, int64_t row) {
  constexpr int kVectors = M == 1 && kTile >= 4 * kLanes ? 4 : 2;
  for (int first = 0; first < kTile && tile * kTile + first < p.n; first += kVectors * kLanes) {
    part_of_tile<T, Bits, M, kVectors>(p, tile, row, first);
  }
}

template <class T, int Bits, int... M>
void tiles(const Problem<T>& p, int64_t from, int64_t to, std::integer_sequence<int, M...>) {
  static constexpr void (*kBlock[])(const Problem<T>&, int64_t, int64_t) = {block_of_tile<T, Bits, M + 1>...};
  const Blocks blocks(p.m);
  for (int64_t tile = from; tile < to; ++tile) {
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t row = blocks.start(block);
      kBlock[blocks.start(block + 1) - row - 1](p, tile, row);
    }
  }
}

// Memory that is kept from one call to the next: new memory for each would have to be zeroed by the system.
template <class T>
class Scratch {
 public:
  // Returns room for so many, whose values are not said.
  T* of(int64_t count) {
    if (count > count_) {
      data_.reset();
      data_.reset(new T[count]);
      count_ = count;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<T[]> data_;
  int64_t count_ = 0;
};

// What the inputs of a call become. It is the calling thread's, whoever helps it.
struct RoundedInputs {
  Scratch<int8_t> codes;
  Scratch<float> scales;
  Scratch<int32_t> sums;
};

template <class T, int Bits>
void gemm(const void* x, const void* words, const void* scales, const void* zeros, void* out, int64_t m, int64_t n,
          int64_t k, int64_t group, int64_t threads) {
  if (m == 0 || n == 0) return;
  const int64_t groups = k / group;
  static thread_local RoundedInputs rounded;
  int8_t* codes = rounded.codes.of(m * k);
  float* input_scales = rounded.scales.of(m * groups);
  int32_t* input_sums = rounded.sums.of(m * groups);
  const Blocks blocks(m);
  parallel_ranges(blocks.count, 65536 / (k * kBlockRows) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = blocks.start(block), rows = blocks.start(block + 1) - row;
      for (int64_t i = 0; i < rows; ++i) {
        round_row<T, Bits>(static_cast<const T*>(x) + (row + i) * k, k, group, rows, codes + row * k + 4 * i,
                           input_scales + row * groups + i, input_sums + row * groups + i);
      }
    }
  });
  const Problem<T> p{static_cast<const int32_t*>(words), static_cast<const T*>(scales), static_cast<const T*>(zeros),
                     static_cast<T*>(out), m, n, k, group, codes, input_scales, input_sums};
  const int64_t num_tiles = (n + kTile - 1) / kTile;
  // Bytes at the speed of memory and products at that of the widest vectors: a guess of what a tile takes.
  const double tile_ns = kTile * double(k) * (Bits / 200.0 + m / 130.0);
  const int64_t worth = int64_t(kItemNs / tile_ns) + 1, even = num_tiles / (8 * threads);
  parallel_ranges(num_tiles, std::max({worth, even, int64_t(1)}), threads, [&](int64_t begin, int64_t end) {
    tiles<T, Bits>(p, begin, end, std::make_integer_sequence<int, kBlockRows>());
  });
}

}  // namespace

// out [m, n] = x [m, k] times the weight that `kernels.w4a16_gemm` (bits 4) or `w8a16_gemm` describes; dtype is that of
// x, scales, zeros (may be null) and out.
EXPORT int64_t gemm_wna16(int64_t bits, int64_t dtype, const void* x, const void* words, const void* scales,
                          const void* zeros, void* out, int64_t m, int64_t n, int64_t k, int64_t group,
                          int64_t threads) {
  const auto run = dtype == kFloat32 ? (bits == 4 ? gemm<float, 4> : gemm<float, 8>)
                                     : (bits == 4 ? gemm<BFloat16, 4> : gemm<BFloat16, 8>);
  run(x, words, scales, zeros, out, m, n, k, group, threads);
  return kDone;
}
RECORDABLE(gemm_wna16)
