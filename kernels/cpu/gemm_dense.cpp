// Products with weights of 16 or 32 bit floating point numbers, in float32.
//
// Each sum of a row is added up in one order in one accumulator: a row of the result is the same, bit by bit, whatever
// rows are beside it and however many threads there are.
//
// A product reads the tiles of a weight from the first to the last as they are in memory. Inputs lie in blocks of rows:
// [k, rows of the block]. Where the CPU can, weights of bfloat16 are multiplied as pairs, with inputs rounded to
// bfloat16: by vectors (AVX-512 BF16) or by the matrix unit (AMX), for which inputs lie row by row.
#include <algorithm>
#include <utility>

#include "blocks.h"
#include "matrix_unit.h"
#include "parallel.h"
#include "recording.h"
#include "scratch.h"
#include "terms.h"
#include "tile.h"
#include "vec.h"

namespace {

constexpr int kMostRows = kLanes == 16 ? 12 : 6;  // in a block: with two vectors of columns, as many as registers hold
constexpr int64_t kAhead = 4096;                  // bytes of weights that are asked for ahead of a block that is alone
constexpr double kItemNs = 6000;                  // work worth another thread's taking

// `In` is that of x: float, or pairs of bfloat16 numbers.
template <class W, class In>
struct Problem {
  const In* x;  // in blocks
  const W* weight;
  const float* bias;  // [n], or null
  float* out;         // [m, n]
  int64_t n, k;       // k terms
};

// The products of one row of a tile, which is of one input or a pair, with M rows of the input, to V vectors of sums.
template <int M, int V, class W>
inline void add_products(Vec (&sum)[M][V], const W* w, const float* x) {
  Vec weights[V];
  for (int v = 0; v < V; ++v) weights[v] = load(w + v * kLanes);
  for (int m = 0; m < M; ++m) {
    const Vec input = splat(x[m]);
    for (int v = 0; v < V; ++v) sum[m][v] += weights[v] * input;
  }
}

// The two inputs one after the other.
template <int M, int V>
inline void add_products(Vec (&sum)[M][V], const BFloat16* w, const float* x) {
  for (int half = 0; half < 2; ++half) {
    Vec weights[V];
    for (int v = 0; v < V; ++v) {
      const UInt words = read<UInt>(w + 2 * v * kLanes);
      weights[v] = bit_cast<Vec>(half == 0 ? words << 16 : words & 0xffff0000u);
    }
    for (int m = 0; m < M; ++m) {
      const Vec input = splat(x[half * M + m]);
      for (int v = 0; v < V; ++v) sum[m][v] += weights[v] * input;
    }
  }
}

#if defined(__AVX512BF16__)
template <int M, int V>
inline void add_products(Vec (&sum)[M][V], const BFloat16* w, const Pair* x) {
  Int weights[V];
  for (int v = 0; v < V; ++v) weights[v] = read<Int>(w + 2 * v * kLanes);
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) sum[m][v] = add_product(sum[m][v], weights[v], x + m);
  }
}
#endif

// out [count <= kLanes] = sum + bias, which may be null.
inline void store_sum(float* out, Vec sum, const float* bias, int64_t count) {
  if (count == kLanes) return store(out, sum + (bias == nullptr ? Vec{} : load(bias)));
  store(out, sum + (bias == nullptr ? Vec{} : load(bias, count)), count);
}

// M rows, which are a block, times V vectors of the columns of a tile, the first of which begins at `first`. With each row
// of the tile, the line that is `ahead` is asked for, which moves on by `asked` bytes.
template <class W, class In, int M, int V>
void part_of_tile(const Problem<W, In>& p, int64_t tile, int64_t row, int first, const char* ahead, int64_t asked) {
  constexpr int64_t kInputs = std::is_same_v<In, float> ? kDepth<W> : 1;  // of a row of a block, for one of a tile
  const W* w = p.weight + (tile * p.k * kTile + first) * kDepth<W>;
  const In* x = p.x + row * p.k * kInputs;
  Vec sum[M][V] = {};
  int64_t left = p.k;
  do {  // there is at least one input, as compilers cannot know: else they would write the zeros to memory
    __builtin_prefetch(ahead, 0, 2);
    ahead += asked;
    add_products<M, V>(sum, w, x);
    w += kTile * kDepth<W>;
    x += M * kInputs;
  } while (--left > 0);
  for (int v = 0; v < V; ++v) {
    const int64_t column = tile * kTile + first + v * kLanes, count = std::min<int64_t>(kLanes, p.n - column);
    if (count <= 0) break;
    const float* bias = p.bias == nullptr ? nullptr : p.bias + column;
    for (int m = 0; m < M; ++m) store_sum(p.out + (row + m) * p.n + column, sum[m][v], bias, count);
  }
}

template <class W, class In, int M>
void block_of_tile(const Problem<W, In>& p, int64_t tile, int64_t row, const char* ahead, int64_t asked) {
  constexpr int kVectors = M <= 3 ? std::min(kTile / kLanes, 4) : 2;
  constexpr int kParts = kTile / (kVectors * kLanes);
  for (int part = 0; part < kParts && tile * kTile + part * kVectors * kLanes < p.n; ++part) {
    part_of_tile<W, In, M, kVectors>(p, tile, row, part * kVectors * kLanes, ahead + part * (asked / kParts),
                                     asked / (kParts * p.k));
  }
}

// While a tile is multiplied with several blocks, the next tile comes into the cache, a part with each block: else the first
// block of each tile would wait for memory and the others never.
template <class W, class In, int... Rows>
void tiles(const Problem<W, In>& p, const Blocks& blocks, const Share& share, const Tiles& part,
           std::integer_sequence<int, Rows...>) {
  static constexpr void (*kBlock[])(const Problem<W, In>&, int64_t, int64_t, const char*, int64_t) = {
      block_of_tile<W, In, Rows + 1>...};
  const int64_t bytes = p.k * kTile * kDepth<W> * sizeof(W), count = share.end_block - share.first_block;
  const int64_t asked = bytes / count;
  for (int64_t tile = part.begin; tile < part.end; ++tile) {
    const char* weights = reinterpret_cast<const char*>(p.weight);
    const char* ahead = count > 1 ? weights + part.after(tile) * bytes : weights + tile * bytes + kAhead;
    for (int64_t block = share.first_block; block < share.end_block; ++block, ahead += asked) {
      kBlock[blocks[block].rows - 1](p, tile, blocks[block].first, ahead, asked);
    }
  }
}

// The arguments of `gemm_dense` that all ways of multiplying have.
struct Arguments {
  const float* x;
  const int32_t* sources;
  const int32_t* starts;
  int64_t weights;
  const void* weight;
  const float* bias;
  float* out;
  int64_t m, n, k, threads;

  const float* row(int64_t i) const { return x + (sources == nullptr ? i : sources[i]) * k; }
};

// Cuts the rows into blocks of `most` or fewer, calls pack(block, row of it, where it is in x) for each row, and then
// multiply(share, part) for parts of the work; `row_ns` is what a row and a number of a tile take.
template <class Pack, class Multiply>
void for_blocks(const Arguments& a, Blocks& blocks, int64_t most, double bytes, double row_ns, const Pack& pack,
                const Multiply& multiply) {
  blocks.divide(a.m, a.starts, a.weights, [&](int64_t) { return most; });
  parallel_ranges(blocks.count(), 65536 / (a.k * most) + 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t i = 0; i < blocks[block].rows; ++i) pack(blocks[block], i, a.row(blocks[block].first + i));
    }
  });
  // Bytes at the speed of memory and products at that of the unit that makes them: a guess of what a tile takes.
  const double tile_ns = kTile * double(a.k) * (bytes / 16.0 + double(a.m) / blocks.num_shares() * row_ns);
  blocks.for_tiles(num_tiles(a.n), int64_t(kItemNs / tile_ns) + 1, a.threads, multiply);
}

template <class W>
void gemm_widened(const Arguments& a) {
  static thread_local Scratch<float> scratch;  // the calling thread's, whoever helps it
  static thread_local Blocks kept;
  Blocks& blocks = kept;
  const int64_t inputs = even_inputs<W>(a.k);
  float* packed = scratch.of(a.m * inputs);
  const auto pack = [&](const Block& block, int64_t i, const float* x) {
    float* to = packed + block.first * inputs + i;
    for (int64_t at = 0; at < a.k; ++at) to[at * block.rows] = x[at];
    if (inputs > a.k) to[a.k * block.rows] = 0.0f;
  };
  for_blocks(a, blocks, kMostRows, sizeof(W), 1 / 40.0, pack, [&](const Share& share, const Tiles& part) {
    const W* weight = static_cast<const W*>(a.weight) + share.weight * num_tiles(a.n) * kTile * inputs;
    const Problem<W, float> p{packed, weight, a.bias, a.out, a.n, inputs / kDepth<W>};
    tiles(p, blocks, share, part, std::make_integer_sequence<int, kMostRows>());
  });
}

// to [size] = x, rounded; numbers behind x, up to `padded`, are 0.
[[maybe_unused]] void round_to_bfloat16(const float* x, int64_t size, BFloat16* to, int64_t padded) {
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) store(to + at, load(x + at));
  if (at < size) store(to + at, load(x + at, size - at), size - at);
  std::fill(to + size, to + padded, BFloat16{});
}

template <class W>
void gemm(const Arguments& a) {
  gemm_widened<W>(a);
}

#if defined(HAS_MATRIX_UNIT)

// The rows of a block, `stride` numbers apart, times a tile of weights with `pairs` pairs of inputs: to [rows, kTile].
void multiply_on_unit(MatrixUnit<float>& unit, int rows, const BFloat16* x, int64_t stride, const BFloat16* weight,
                      int64_t pairs, float* to) {
  static_assert(kTile == kUnitColumns);
  constexpr int64_t kRow = 2 * kTile;  // numbers of a pair of inputs
  unit.begin(rows, kUnitWords);
  for (; pairs >= kUnitWords; pairs -= kUnitWords, x += 2 * kUnitWords, weight += kUnitWords * kRow) {
    unit.add(x, stride * sizeof *x, weight);
  }
  if (pairs > 0) {  // what lies behind them is another tile's, and 0 times it need not be 0
    BFloat16 rest[kUnitWords * kRow] = {};
    std::copy_n(weight, pairs * kRow, rest);
    unit.add(x, stride * sizeof *x, rest);
  }
  unit.store_sums(to);
}

template <>
void gemm<BFloat16>(const Arguments& a) {
  static thread_local Scratch<BFloat16> scratch;
  static thread_local Blocks kept;
  Blocks& blocks = kept;
  const int64_t pairs = (a.k + 1) / 2, stride = (a.k + 2 * kUnitWords - 1) / (2 * kUnitWords) * (2 * kUnitWords);
  BFloat16* rounded = scratch.of(a.m * stride);
  const auto pack = [&](const Block& block, int64_t i, const float* x) {
    round_to_bfloat16(x, a.k, rounded + (block.first + i) * stride, stride);
  };
  for_blocks(a, blocks, kUnitRows, 2, 1 / 400.0, pack, [&](const Share& share, const Tiles& part) {
    const BFloat16* weight = static_cast<const BFloat16*>(a.weight) + share.weight * num_tiles(a.n) * kTile * 2 * pairs;
    MatrixUnit<float> unit;
    for (int64_t tile = part.begin; tile < part.end; ++tile) {
      for (int64_t at = share.first_block; at < share.end_block; ++at) {
        const auto [first, rows] = blocks[at];
        float sums[kUnitRows * kTile];
        multiply_on_unit(unit, int(rows), rounded + first * stride, stride, weight + tile * kTile * 2 * pairs, pairs,
                         sums);
        for (int64_t column = tile * kTile; column < std::min((tile + 1) * kTile, a.n); column += kLanes) {
          const float* bias = a.bias == nullptr ? nullptr : a.bias + column;
          for (int64_t i = 0; i < rows; ++i) {
            store_sum(a.out + (first + i) * a.n + column, load(sums + i * kTile + column - tile * kTile), bias,
                      std::min<int64_t>(kLanes, a.n - column));
          }
        }
      }
    }
  });
}

#elif defined(__AVX512BF16__)

template <>
void gemm<BFloat16>(const Arguments& a) {
  static thread_local Scratch<Pair> scratch;
  static thread_local Blocks kept;
  Blocks& blocks = kept;
  const int64_t pairs = (a.k + 1) / 2;
  Pair* packed = scratch.of(a.m * pairs);
  const auto pack = [&](const Block& block, int64_t i, const float* x) {
    static thread_local Scratch<BFloat16> rounded_of_thread;
    BFloat16* rounded = rounded_of_thread.of(2 * pairs);
    round_to_bfloat16(x, a.k, rounded, 2 * pairs);
    Pair* to = packed + block.first * pairs + i;
    for (int64_t at = 0; at < pairs; ++at) to[at * block.rows] = {rounded[2 * at], rounded[2 * at + 1]};
  };
  for_blocks(a, blocks, kMostRows, 2, 1 / 80.0, pack, [&](const Share& share, const Tiles& part) {
    const BFloat16* weight = static_cast<const BFloat16*>(a.weight) + share.weight * num_tiles(a.n) * kTile * 2 * pairs;
    const Problem<BFloat16, Pair> p{packed, weight, a.bias, a.out, a.n, pairs};
    tiles(p, blocks, share, part, std::make_integer_sequence<int, kMostRows>());
  });
}

#endif

}  // namespace

// out [m, n] = x [m, k] times a weight in tiles, plus bias [n], which may be null. All float32 but the weight, whose
// dtype may also be bfloat16 or float16.
//
// Of a stack of `weights`, rows starts[w] .. starts[w + 1] - 1 are multiplied with weight w; `starts` may be null where
// there is one. Where `sources` [m] is not null, it names the rows of x that rows 0 .. m - 1 are.
EXPORT int64_t gemm_dense(int64_t weight_dtype, const float* x, const int32_t* sources, const int32_t* starts,
                          int64_t weights, const void* weight, const float* bias, float* out, int64_t m, int64_t n,
                          int64_t k, int64_t threads) {
  if (m == 0 || n == 0) return kDone;
  const auto run = weight_dtype == kFloat32 ? gemm<float> : weight_dtype == kBFloat16 ? gemm<BFloat16> : gemm<Float16>;
  run({x, sources, starts, weights, weight, bias, out, m, n, k, threads});
  return kDone;
}
RECORDABLE(gemm_dense)
