// Products with weights of 16 or 32 bit floating point numbers, in float32.
//
// Each sum of a row is added up from the first input to the last in one accumulator: a row of the result is the same,
// bit by bit, whatever rows are beside it and however many threads there are.
//
// A product reads the tiles of a weight from the first to the last as they are in memory. Inputs lie in blocks of rows:
// [k, rows of the block].
#include <algorithm>
#include <utility>

#include "blocks.h"
#include "parallel.h"
#include "recording.h"
#include "scratch.h"
#include "tile.h"
#include "vec.h"

namespace {

constexpr int kMostRows = kLanes == 16 ? 12 : 6;  // in a block: with two vectors of columns, as many as registers hold
constexpr int64_t kAhead = 4096;                  // bytes of weights that are asked for ahead
constexpr double kItemNs = 6000;                  // work worth another thread's taking

template <class W>
struct Problem {
  const float* x;  // in blocks
  const W* weight;
  const float* bias;  // [n], or null
  float* out;  // [m, n]
  int64_t n, k;
};

// One row of a block of `rows`; `packed` is where the row's first number is.
void pack_row(const float* x, int64_t k, int64_t rows, float* packed) {
  for (int64_t i = 0; i < k; ++i) packed[i * rows] = x[i];
}

// Vectors of columns are taken in pairs, kApart columns apart; the left one begins at `column`.
template <class W>
inline void load_pair(const W* row, int column, Vec& left, Vec& right) {
  left = load(row + column);
  right = load(row + column + kApart);
}

inline void load_pair(const BFloat16* row, int column, Vec& left, Vec& right) {
  const UInt words = read<UInt>(row + place_in_tile<BFloat16>(column));
  left = bit_cast<Vec>(words << 16);
  right = bit_cast<Vec>(words & 0xffff0000u);
}

// M rows, which are a block, times the columns of a tile in P pairs of vectors, the first of which begins at `first`.
template <class W, int M, int P>
void part_of_tile(const Problem<W>& p, int64_t tile, int64_t row, int first) {
  const W* w = p.weight + tile * p.k * kTile;
  const float* x = p.x + row * p.k;
  Vec sum[M][2 * P] = {};
  int64_t left = p.k;
  do {  // there is at least one input, as compilers cannot know: else they would write the zeros to memory
    if constexpr (M <= 2) __builtin_prefetch(reinterpret_cast<const char*>(w) + kAhead, 0, 2);
    Vec weights[2 * P];
    for (int i = 0; i < P; ++i) load_pair(w, first + i * kLanes, weights[2 * i], weights[2 * i + 1]);
    for (int m = 0; m < M; ++m) {
      const Vec input = splat(x[m]);
      for (int v = 0; v < 2 * P; ++v) sum[m][v] += weights[v] * input;
    }
    w += kTile;
    x += M;
  } while (--left > 0);
  float* const out = p.out + row * p.n;
  for (int v = 0; v < 2 * P; ++v) {
    const int64_t column = tile * kTile + first + v / 2 * kLanes + v % 2 * kApart;
    const int64_t count = std::min<int64_t>(kLanes, p.n - column);
    if (count <= 0) continue;
    const Vec bias = p.bias == nullptr     ? Vec{}
                     : count == kLanes ? load(p.bias + column)
                                       : load(p.bias + column, count);
    for (int m = 0; m < M; ++m) {
      float* const to = out + m * p.n + column;
      const Vec value = sum[m][v] + bias;
      count == kLanes ? store(to, value) : store(to, value, count);
    }
  }
}

template <class W, int M>
void block_of_tile(const Problem<W>& p, int64_t tile, int64_t row) {
  constexpr int kPairs = M <= 3 ? std::min(kApart / kLanes, 2) : 1;
  for (int first = 0; first < kApart && tile * kTile + first < p.n; first += kPairs * kLanes) {
    part_of_tile<W, M, kPairs>(p, tile, row, first);
  }
}

template <class W, int... Rows>
void tiles(const Problem<W>& p, const Blocks& blocks, const Share& share, int64_t from, int64_t to,
           std::integer_sequence<int, Rows...>) {
  static constexpr void (*kBlock[])(const Problem<W>&, int64_t, int64_t) = {block_of_tile<W, Rows + 1>...};
  for (int64_t tile = from; tile < to; ++tile) {
    for (int64_t block = share.first_block; block < share.end_block; ++block) {
      kBlock[blocks[block].rows - 1](p, tile, blocks[block].first);
    }
  }
}

template <class W>
void gemm(const float* x, const int32_t* sources, const int32_t* starts, int64_t weights, const void* weight,
          const float* bias, float* out, int64_t m, int64_t n, int64_t k, int64_t threads) {
  if (m == 0 || n == 0) return;
  static thread_local Scratch<float> scratch;  // the calling thread's, whoever helps it
  static thread_local Blocks kept;
  float* packed = scratch.of(m * k);
  Blocks& blocks = kept;
  blocks.divide(m, starts, weights, [](int64_t) { return kMostRows; });
  parallel_ranges(blocks.count(), 65536 / (k * kMostRows) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const auto [first, rows] = blocks[block];
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t source = sources == nullptr ? first + i : sources[first + i];
        pack_row(x + source * k, k, rows, packed + first * k + i);
      }
    }
  });
  const W* const tiles_of_all = static_cast<const W*>(weight);
  // Bytes at the speed of memory and products at that of the widest vectors: a guess of what a tile takes.
  const double tile_ns = kTile * double(k) * (sizeof(W) / 16.0 + double(m) / blocks.num_shares() / 40.0);
  blocks.for_tiles(num_tiles(n), int64_t(kItemNs / tile_ns) + 1, threads,
                   [&](const Share& share, int64_t begin, int64_t end) {
    const Problem<W> p{packed, tiles_of_all + share.weight * num_tiles(n) * kTile * k, bias, out, n, k};
    tiles(p, blocks, share, begin, end, std::make_integer_sequence<int, kMostRows>());
  });
}

}  // namespace

// out [m, n] = x [m, k] times a weight in tiles, plus bias [n], which may be null. All float32 but the weight, whose
// dtype may also be bfloat16 or float16.
//
// Of a stack of `weights`, rows starts[w] .. starts[w + 1] - 1 are multiplied with weight w; `starts` may be null where
// there is one. Where `sources` [m] is not null, it names the rows of x that rows 0 .. m - 1 are.
EXPORT int64_t gemm_dense(int64_t weight_dtype, const float* x, const int32_t* sources, const int32_t* starts,
                          int64_t weights, const void* weight, const float* bias, float* out, int64_t m, int64_t n,
                          int64_t k, int64_t threads) {
  const auto run = weight_dtype == kFloat32 ? gemm<float> : weight_dtype == kBFloat16 ? gemm<BFloat16> : gemm<Float16>;
  run(x, sources, starts, weights, weight, bias, out, m, n, k, threads);
  return kDone;
}
RECORDABLE(gemm_dense)
