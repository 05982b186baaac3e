// Products with weights of 4 and 8 bit integers in groups.
//
// Inputs are rounded to 8 bits, with a scale for every group of a row, so that a group's sum of products is exact in 32
// bits. Groups are added up in one order with the same roundings: a row of the result is the same, bit by bit, whatever
// rows are beside it and however many threads there are.
//
// Weights lie in tiles of columns, one behind the other: words [n / 32, k * bits / 32, 32], scales and zeros
// [n / 32, k / group, 32]. A product reads them from the first to the last as they are in memory. Inputs lie in blocks
// of rows, in the order in which they are used: codes [k / 4, rows of the block, 4].
#include <algorithm>
#include <cstring>
#include <utility>

#include "blocks.h"
#include "dot.h"
#include "parallel.h"
#include "recording.h"
#include "round8.h"
#include "scratch.h"
#include "tile.h"

namespace {

constexpr int kFewRows = kLanes == 16 ? 8 : 4;    // in a block: as many sums as there are registers for
constexpr int kManyRows = kLanes == 16 ? 6 : 4;   // the same, of calls with kMany: results have registers, too
constexpr int64_t kMany = 64;                     // rows: what is done once per tile counts for little
constexpr int kAhead = 8192;                      // bytes of words that are asked for ahead, into the second-level cache
constexpr double kItemNs = 6000;                  // work worth another thread's taking

template <class T>
struct Problem {
  const int32_t* words;
  const T* scales;
  const T* zeros;  // or null: the middle of the range is zero
  T* out;          // [m, n]
  int64_t n, k, group, groups;
  const int8_t* codes;        // for 4 bits, of every eight the four at even places come first
  const float* input_scales;  // [k / group, rows of the block] of each block
  const int32_t* starts;      // the same: where the sums of a group start
  const float* input_sums;    // the same, of codes
};

// One row of a block of `rows`; codes, scales and sums are where the row's first are.
template <class T, int Bits>
void round_row(const T* x, int64_t k, int64_t group, int64_t rows, int32_t start_per_code, int8_t* codes, float* scales,
               int32_t* starts, float* sums) {
  constexpr int kAtOnce = 16;
  for (int64_t start = 0; start < k; start += group, x += group, scales += rows, starts += rows, sums += rows) {
    Int largest = {};
    const auto look = [&](Vec v) { largest = larger(largest, magnitude_bits(v)); };
    int64_t i = 0;
    for (; i + kLanes <= group; i += kLanes) look(load(x + i));
    if (i < group) look(load(x + i, group - i));
    const Rounding rounding(largest_of(largest));
    Int total = {};
    const auto round = [&](const T* from, int64_t count) __attribute__((always_inline)) {
      uint8_t bytes[kAtOnce];
      for (int lane = 0; lane < kAtOnce; lane += kLanes) {
        const Int code = round_to_codes(load(from + lane), rounding.inverse);
        const auto narrow = __builtin_convertvector(code, Byte);
        std::memcpy(bytes + lane, &narrow, sizeof narrow);
        total += code;
      }
      if constexpr (Bits == 4) {
        // Of every four, even places are gathered in the lower half of a word and odd ones in the upper: then words.
        for (uint8_t* b = bytes; b < bytes + kAtOnce; b += 8) {
          uint64_t v;
          std::memcpy(&v, b, sizeof v);
          v = (v & 0xff0000ffff0000ff) | (v & 0x0000ff000000ff00) << 8 | (v >> 8 & 0x0000ff000000ff00);
          v = (v & 0xffff00000000ffff) | (v & 0x00000000ffff0000) << 16 | (v >> 16 & 0x00000000ffff0000);
          std::memcpy(b, &v, sizeof v);
        }
      }
      for (int four = 0; four < count; four += 4, codes += 4 * rows) std::memcpy(codes, bytes + four, 4);
    };
    for (i = 0; i + kAtOnce <= group; i += kAtOnce) round(x + i, kAtOnce);
    if (i < group) {
      T rest[kAtOnce] = {};
      std::memcpy(rest, x + i, (group - i) * sizeof(T));
      round(rest, group - i);
    }
    *scales = rounding.scale;
    const int32_t sum = joined(total, added);
    *starts = start_per_code * sum;
    *sums = float(sum);
  }
}

// M rows, which are a block, of V vectors of a tile's columns from `first` on. With FromMemory words are asked for
// ahead: they are in a cache where other rows of a call have been before.
template <class T, int Bits, int M, int V, bool HasZeros, bool FromMemory>
void part_of_tile(const Problem<T>& p, int64_t tile, int64_t row, int first) {
  constexpr bool kAsksAhead = FromMemory && (Bits == 4 || M > 2);  // what only loads, the CPU itself follows better
  const int64_t groups = p.groups, num_words = p.group * Bits / 32;
  const int32_t* words = p.words + tile * groups * num_words * kTile + first;
  const T* scales = p.scales + tile * groups * kTile + first;
  const T* zeros = HasZeros ? p.zeros + tile * groups * kTile + first : nullptr;
  const int8_t* codes = p.codes + row * p.k;
  const float* input_scales = p.input_scales + row * groups;
  const int32_t* starts = p.starts + row * groups;
  const float* input_sums = p.input_sums + row * groups;
  const int64_t column = tile * kTile + first;
  const int64_t width = std::min<int64_t>(V * kLanes, p.n - column);
  T* const out = p.out + row * p.n + column;
  for (int m = 0; m < M; ++m) {  // or stores would wait for one line after the other, and later ones for them
    for (int at = 0; at < V * kLanes; at += 64 / sizeof(T)) __builtin_prefetch(out + m * p.n + at, 1);
  }
  Vec result[M][V] = {};
  int64_t groups_left = p.groups;
  do {  // there is one, as compilers cannot know: else they would write the zeros to memory
    Int sum[M][V];
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) sum[m][v] = Int{} + starts[m];
    }
    const auto add_word = [&](auto& to, auto product) __attribute__((always_inline)) {
      Int w[V];
      for (int v = 0; v < V; ++v) {
        const int32_t* at = words + v * kLanes;
        w[v] = read<Int>(at);
        if (kAsksAhead && v * kLanes % 16 == 0) __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead, 0, 2);
      }
      const auto add = [&](auto weights) __attribute__((always_inline)) {
        for (int m = 0; m < M; ++m) {
          const Int x = splat_four(codes + 4 * m);
          for (int v = 0; v < V; ++v) to[m][v] = product(to[m][v], weights(w[v]), x);
        }
        codes += 4 * M;
      };
      if constexpr (Bits == 8) {
        add([](Int word) { return word; });
      } else {
        add([](Int word) { return word & 0x0f0f0f0f; });
        add([](Int word) { return word >> 4 & 0x0f0f0f0f; });
      }
      words += kTile;
    };
    if constexpr (Bits == 4 && kNarrowDots > 0) {
      for (int64_t i = 0; i < num_words;) {
        Int narrow[M][V] = {};
        for (const int64_t end = std::min(i + kNarrowDots / 2, num_words); i < end; ++i) {
          add_word(narrow, narrow_dot);
        }
        for (int m = 0; m < M; ++m) {
          for (int v = 0; v < V; ++v) sum[m][v] = widened(sum[m][v], narrow[m][v]);
        }
      }
    } else {
      for (int64_t i = 0; i < num_words; ++i) add_word(sum, dot<Bits>);
    }
    Vec scale[V], zero[V];
    for (int v = 0; v < V; ++v) scale[v] = load(scales + v * kLanes);
    if constexpr (HasZeros) {
      for (int v = 0; v < V; ++v) zero[v] = load(zeros + v * kLanes);
    }
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) {
        Vec value = __builtin_convertvector(sum[m][v], Vec);
        if constexpr (HasZeros) value -= zero[v] * input_sums[m];
        result[m][v] += value * (scale[v] * input_scales[m]);
      }
    }
    scales += kTile;
    if constexpr (HasZeros) zeros += kTile;
    starts += M;
    input_scales += M;
    input_sums += M;
  } while (--groups_left > 0);
  if (width == V * kLanes) {
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) store(out + m * p.n + v * kLanes, result[m][v]);
    }
  } else {
    T all[M][V * kLanes];
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) store(all[m] + v * kLanes, result[m][v]);
    }
    for (int m = 0; m < M; ++m) std::memcpy(out + m * p.n, all[m], width * sizeof(T));
  }
}

template <class T, int Bits, bool HasZeros, bool FromMemory, int M>
void block_of_tile(const Problem<T>& p, int64_t tile, int64_t row) {
  constexpr int kVectors = M <= 2 ? std::min(kTile / kLanes, 4) : 2;  // one row alone waits for each of its sums
  for (int first = 0; first < kTile && tile * kTile + first < p.n; first += kVectors * kLanes) {
    part_of_tile<T, Bits, M, kVectors, HasZeros, FromMemory>(p, tile, row, first);
  }
}

// Blocks have `Least` rows or some more.
template <class T, int Bits, bool HasZeros, bool FromMemory, int Least, int... More>
void tiles(const Problem<T>& p, const Blocks& blocks, const Share& share, int64_t from, int64_t to,
           std::integer_sequence<int, More...>) {
  static constexpr void (*kBlock[])(const Problem<T>&, int64_t, int64_t) = {
      block_of_tile<T, Bits, HasZeros, FromMemory, Least + More>...};
  for (int64_t tile = from; tile < to; ++tile) {
    for (int64_t block = share.first_block; block < share.end_block; ++block) {
      kBlock[blocks[block].rows - Least](p, tile, blocks[block].first);
    }
  }
}

// What the inputs of a call become. It is the calling thread's, whoever helps it.
struct RoundedInputs {
  Scratch<int8_t> codes;
  Scratch<float> scales;
  Scratch<int32_t> starts;
  Scratch<float> sums;
  Blocks blocks;
};

template <class T, int Bits>
void gemm(const void* x, const int32_t* sources, const int32_t* starts, int64_t weights, const void* words,
          const void* scales, const void* zeros, void* out, int64_t m, int64_t n, int64_t k, int64_t group,
          int64_t threads) {
  if (m == 0 || n == 0) return;
  const int64_t groups = k / group;
  static thread_local RoundedInputs rounded;
  int8_t* codes = rounded.codes.of(m * k);
  float* input_scales = rounded.scales.of(m * groups);
  int32_t* sum_starts = rounded.starts.of(m * groups);
  float* input_sums = rounded.sums.of(m * groups);
  Blocks& blocks = rounded.blocks;
  blocks.divide(m, starts, weights, [](int64_t rows) { return rows < kMany ? kFewRows : kManyRows; });
  // So that no zero point is left to subtract except those of `zeros`.
  const int32_t start = zeros != nullptr ? kCentre<Bits> : kCentre<Bits> - (1 << (Bits - 1));
  parallel_ranges(blocks.count(), 65536 / (k * kFewRows) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const auto [row, rows] = blocks[block];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t source = sources == nullptr ? row + i : sources[row + i];
        round_row<T, Bits>(static_cast<const T*>(x) + source * k, k, group, rows, start, codes + row * k + 4 * i,
                           input_scales + row * groups + i, sum_starts + row * groups + i,
                           input_sums + row * groups + i);
      }
    }
  });
  // Bytes at the speed of memory and products at that of the widest vectors: a guess of what a tile takes.
  const double tile_ns = kTile * double(k) * (Bits / 200.0 + double(m) / blocks.num_shares() / 130.0);
  blocks.for_tiles(num_tiles(n), int64_t(kItemNs / tile_ns) + 1, threads,
                   [&](const Share& share, int64_t begin, int64_t end) {
    const int64_t before = share.weight * num_tiles(n) * kTile;  // columns of the weights before it
    const T* const own_zeros = zeros == nullptr ? nullptr : static_cast<const T*>(zeros) + before * groups;
    const Problem<T> p{static_cast<const int32_t*>(words) + before * k * Bits / 32,
                       static_cast<const T*>(scales) + before * groups, own_zeros, static_cast<T*>(out), n, k, group,
                       groups, codes, input_scales, sum_starts, input_sums};
    const std::make_integer_sequence<int, kFewRows> few;
    const std::make_integer_sequence<int, 2> even_sizes;  // of many blocks
    if (share.rows < kMany) {
      zeros == nullptr ? tiles<T, Bits, false, true, 1>(p, blocks, share, begin, end, few)
                       : tiles<T, Bits, true, true, 1>(p, blocks, share, begin, end, few);
    } else {
      zeros == nullptr ? tiles<T, Bits, false, false, kManyRows - 1>(p, blocks, share, begin, end, even_sizes)
                       : tiles<T, Bits, true, false, kManyRows - 1>(p, blocks, share, begin, end, even_sizes);
    }
  });
}

}  // namespace

// out [m, n] = x [m, k] times the weight that `kernels.w4a16_gemm` (bits 4) or `w8a16_gemm` describes, in tiles. dtype
// is that of x, scales, zeros (may be null) and out. `sources`, `starts` and `weights` are those of gemm_dense.
EXPORT int64_t gemm_wna16(int64_t bits, int64_t dtype, const void* x, const int32_t* sources, const int32_t* starts,
                          int64_t weights, const void* words, const void* scales, const void* zeros, void* out,
                          int64_t m, int64_t n, int64_t k, int64_t group, int64_t threads) {
  const auto run = dtype == kFloat32 ? (bits == 4 ? gemm<float, 4> : gemm<float, 8>)
                                     : (bits == 4 ? gemm<BFloat16, 4> : gemm<BFloat16, 8>);
  run(x, sources, starts, weights, words, scales, zeros, out, m, n, k, group, threads);
  return kDone;
}
RECORDABLE(gemm_wna16)
