// GEMMs with weights of 16 or 32 bit floating point numbers and sums in float32.
//
// Each output number is summed in a fixed order in one accumulator. So a row of the result is the same, bit by bit,
// whatever other rows are in the batch and however many threads there are.
//
// A GEMM reads the tiles of a weight sequentially in memory. Where the CPU supports it, weights of bfloat16 are
// multiplied as pairs, with inputs rounded to bfloat16: by vectors (AVX-512 BF16) or by the matrix unit (AMX).
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

constexpr int kMostRows = kLanes == 16 ? 12 : 6;  // in a block: as many as registers hold for two vectors of columns
constexpr int64_t kAhead = 4096;                  // prefetch distance in bytes of weights, for a single block
constexpr double kItemNs = 6000;                  // enough work to be worth running on another thread

// From this number of rows on, a tile of 16-bit weights is widened to floats once for all blocks instead of within each
// block. Widening within a block needs registers. Without AVX-512 there are too few, so compilers keep some sums in
// memory.
constexpr int64_t kWidenedOnce = kLanes == 16 ? INT64_MAX : 3 * kMostRows;

// to [size] = the numbers of whole rows of a tile, as floats in the order of a float tile.
template <class W>
void widen(const W* tile, int64_t size, float* to) {
  constexpr int kRow = kTile * kDepth<W>;
  for (const W* end = tile + size; tile < end; tile += kRow, to += kRow) {
    for (int at = 0; at < kTile; at += kLanes) {
      if constexpr (std::is_same_v<W, BFloat16>) {
        const UInt words = read<UInt>(tile + 2 * at);
        store(to + at, bit_cast<Vec>(words << 16));
        store(to + kTile + at, bit_cast<Vec>(words & 0xffff0000u));
      } else {
        store(to + at, load(tile + at));
      }
    }
  }
}

// The unrounded inputs that are multiplied with one row of a tile of W.
template <class W>
struct Inputs {
  float x[kDepth<W>];
};

// The arguments of a GEMM. Its terms are of type In: Inputs<W>, or pairs of bfloat16 numbers.
template <class W, class In>
struct Problem {
  const In* x;  // [m, stride], of which k are used
  const W* weight;
  const float* bias;  // [n], or null
  float* out;         // [m, n]
  int64_t n, k, stride;  // k and stride in terms
};

// The bytes of weights to prefetch with each row of a tile while the tile is multiplied with a block.
struct Asked {
  static constexpr int64_t kSteps = 1024;  // in a byte, because a row may have to prefetch less than a byte

  const char* at;
  int64_t step, size;  // distance between two rows' prefetches in 1 / kSteps of a byte; bytes of each

  // `bytes` bytes from `at` on, spread over `rows` rows.
  static Asked slice(const char* at, int64_t bytes, int64_t rows) { return {at, bytes * kSteps / rows, 1}; }
  // With each row of `row` bytes, `size` bytes of it.
  static Asked rows(const char* at, int64_t row, int64_t size) { return {at, row * kSteps, size}; }
};

// Adds the products of one row of a tile with M rows of the input to V vectors of sums for each input row.
template <int M, int V, class W>
inline void add_products(Vec (&sum)[M][V], const W* w, const RowTerms<Inputs<W>, M>& inputs) {
  Vec weights[V];
  for (int v = 0; v < V; ++v) weights[v] = load(w + v * kLanes);
  for (int m = 0; m < M; ++m) {
    const Vec input = splat(inputs.row(m)->x[0]);
    for (int v = 0; v < V; ++v) sum[m][v] += weights[v] * input;
  }
}

// For pairs of bfloat16 weights: adds the products of the two inputs one after the other.
template <int M, int V>
inline void add_products(Vec (&sum)[M][V], const BFloat16* w, const RowTerms<Inputs<BFloat16>, M>& inputs) {
  for (int half = 0; half < 2; ++half) {
    Vec weights[V];
    for (int v = 0; v < V; ++v) {
      const UInt words = read<UInt>(w + 2 * v * kLanes);
      weights[v] = bit_cast<Vec>(half == 0 ? words << 16 : words & 0xffff0000u);
    }
    for (int m = 0; m < M; ++m) {
      const Vec input = splat(inputs.row(m)->x[half]);
      for (int v = 0; v < V; ++v) sum[m][v] += weights[v] * input;
    }
  }
}

#if defined(__AVX512BF16__)
template <int M, int V>
inline void add_products(Vec (&sum)[M][V], const BFloat16* w, const RowTerms<Pair, M>& pairs) {
  Int weights[V];
  for (int v = 0; v < V; ++v) weights[v] = read<Int>(w + 2 * v * kLanes);
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) sum[m][v] = add_product(sum[m][v], weights[v], pairs.row(m));
  }
}
#endif

// out [count <= kLanes] = sum + bias, which may be null.
inline void store_sum(float* out, Vec sum, const float* bias, int64_t count) {
  if (count == kLanes) return store(out, sum + (bias == nullptr ? Vec{} : load(bias)));
  store(out, sum + (bias == nullptr ? Vec{} : load(bias, count)), count);
}

// Multiplies M rows, which are a block, with V vectors of columns of a tile. The columns begin at `w` in the tile and
// at `column` in the output.
template <class W, class In, int M, int V>
void part_of_tile(const Problem<W, In>& p, const W* w, int64_t column, int64_t row, const Asked& asked) {
  RowTerms<In, M> terms(p.x + row * p.stride, p.stride);
  Vec sum[M][V] = {};
  int64_t left = p.k, ahead = 0;
  do {  // not `while`: compilers do not know that k > 0, and would write the initial zeros to memory
    for (int64_t at = 0; at < asked.size; at += 64) {
      __builtin_prefetch(asked.at + ahead / Asked::kSteps + at, 0, 2);
    }
    ahead += asked.step;
    add_products<M, V>(sum, w, terms);
    w += kTile * kDepth<W>;
    terms.advance();
  } while (--left > 0);
  for (int v = 0; v < V; ++v, column += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, p.n - column);
    if (count <= 0) break;
    const float* bias = p.bias == nullptr ? nullptr : p.bias + column;
    for (int m = 0; m < M; ++m) store_sum(p.out + (row + m) * p.n + column, sum[m][v], bias, count);
  }
}

// While a tile is multiplied with one of several blocks, `size` bytes from `next` on are prefetched, because otherwise
// the first block of each tile would wait for memory and the others never. A single block prefetches later parts of its
// own tile; `next` is null then.
template <class W, class In, int M>
void block_of_tile(const Problem<W, In>& p, const W* tile, int64_t column, int64_t row, const char* next,
                   int64_t size) {
  constexpr int kVectors = M <= 3 ? std::min(kTile / kLanes, 4) : 2, kColumns = kVectors * kLanes;
  constexpr int kParts = kTile / kColumns;
  constexpr int64_t kNumbers = kColumns * kDepth<W>, kBytes = kNumbers * sizeof(W);
  for (int part = 0; part < kParts && column + part * kColumns < p.n; ++part) {
    const W* w = tile + part * kNumbers;
    const char* later = reinterpret_cast<const char*>(w) + kAhead;
    const auto asked = next != nullptr ? Asked::slice(next + part * (size / kParts), size / kParts, p.k)
                                       : Asked::rows(later, kBytes * kParts, kBytes);
    part_of_tile<W, In, M, kVectors>(p, w, column + part * kColumns, row, asked);
  }
}

// Multiplies a tile with all blocks of a share. Each block prefetches `size` bytes of the next tile.
template <class W, class In, int... Rows>
void blocks_of_tile(const Problem<W, In>& p, const Blocks& blocks, const Share& share, const W* tile, int64_t column,
                    const char* next, int64_t size, std::integer_sequence<int, Rows...>) {
  static constexpr void (*kBlock[])(const Problem<W, In>&, const W*, int64_t, int64_t, const char*, int64_t) = {
      block_of_tile<W, In, Rows + 1>...};
  for (int64_t block = share.first_block; block < share.end_block; ++block) {
    kBlock[blocks[block].rows - 1](p, tile, column, blocks[block].first, next, size);
    if (next != nullptr) next += size;
  }
}

template <class W, class In>
void tiles(const Problem<W, In>& p, const Blocks& blocks, const Share& share, const Tiles& part) {
  const int64_t size = p.k * kTile * kDepth<W>, count = share.end_block - share.first_block;
  const int64_t of_block = size * sizeof(W) / count;  // bytes
  const std::make_integer_sequence<int, kMostRows> rows;
  for (int64_t number = part.begin; number < part.end; ++number) {
    const W* tile = p.weight + number * size;
    const auto* next = count > 1 ? reinterpret_cast<const char*>(p.weight + part.after(number) * size) : nullptr;
    if constexpr (std::is_same_v<In, Inputs<W>> && !std::is_same_v<W, float>) {
      if (share.rows >= kWidenedOnce) {
        static thread_local Scratch<float> scratch;
        float* widened = scratch.of(kTile * p.k * kDepth<W>);
        widen(tile, size, widened);
        const auto* inputs = reinterpret_cast<const Inputs<float>*>(p.x);
        const Problem<float, Inputs<float>> wide{
            inputs, nullptr, p.bias, p.out, p.n, p.k * kDepth<W>, p.stride * kDepth<W>};
        blocks_of_tile(wide, blocks, share, widened, number * kTile, next, of_block, rows);
        continue;
      }
    }
    blocks_of_tile(p, blocks, share, tile, number * kTile, next, of_block, rows);
  }
}

// The arguments of `gemm_dense`, the same for all implementations.
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

// Calls take(i, row i of x) for each row.
template <class Take>
void take_rows(const Arguments& a, const Take& take) {
  parallel_ranges(a.m, 65536 / a.k + 1, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) take(i, a.row(i));
  });
}

// Divides the rows into blocks of at most `most` and calls multiply(share, part) for parts of the work. A number of a
// weight has `bytes` bytes; `row_ns` is the time of multiplying it with one row.
template <class Multiply>
void for_blocks(const Arguments& a, Blocks& blocks, int64_t most, double bytes, double row_ns,
                const Multiply& multiply) {
  blocks.divide(a.m, a.starts, a.weights, [&](int64_t) { return most; });
  // An estimate of a tile's time: its bytes at the memory's speed plus its products at the compute unit's speed.
  const double tile_ns = kTile * double(a.k) * (bytes / 16.0 + double(a.m) / blocks.num_shares() * row_ns);
  blocks.for_tiles(num_tiles(a.n), int64_t(kItemNs / tile_ns) + 1, a.threads, multiply);
}

template <class W>
void gemm_widened(const Arguments& a) {
  static thread_local Scratch<float> scratch;  // of the calling thread; the other threads use it too
  static thread_local Blocks kept;
  Blocks& blocks = kept;
  const int64_t k = even_inputs<W>(a.k);
  const int64_t stride = spread_stride<float>(k);
  const float* x = a.x;
  if (a.sources != nullptr || stride != a.k) {  // otherwise x is read in place
    float* copy = scratch.of(a.m * stride);
    take_rows(a, [&](int64_t i, const float* row) {
      std::fill(std::copy_n(row, a.k, copy + i * stride), copy + i * stride + k, 0.0f);
    });
    x = copy;
  }
  for_blocks(a, blocks, kMostRows, sizeof(W), 1 / 40.0, [&](const Share& share, const Tiles& part) {
    const W* weight = static_cast<const W*>(a.weight) + share.weight * num_tiles(a.n) * kTile * k;
    const Problem<W, Inputs<W>> p{
        reinterpret_cast<const Inputs<W>*>(x), weight, a.bias, a.out, a.n, k / kDepth<W>, stride / kDepth<W>};
    tiles(p, blocks, share, part);
  });
}

#if defined(__AVX512BF16__)
// to [size] = x, rounded; the numbers after x, up to `padded`, are set to 0.
void round_to_bfloat16(const float* x, int64_t size, BFloat16* to, int64_t padded) {
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) store_element(to + at, load(x + at));
  std::fill(to + at, to + padded, BFloat16{});
  if (at < size) {
    BFloat16 rest[kLanes];
    store_element(rest, load(x + at, size - at));
    std::copy_n(rest, size - at, to + at);
  }
}
#endif

template <class W>
void gemm(const Arguments& a) {
  gemm_widened<W>(a);
}

#if defined(HAS_MATRIX_UNIT)

// to [rows, kTile] = the rows of a block, `stride` numbers apart, times a tile of weights with `pairs` pairs of inputs.
void multiply_on_unit(MatrixUnit& unit, int rows, const BFloat16* x, int64_t stride, const BFloat16* weight,
                      int64_t pairs, float* to) {
  static_assert(kTile == kUnitColumns);
  constexpr int64_t kRow = 2 * kTile;  // weights of a pair of inputs
  unit.begin(rows, kUnitWords);
  for (; pairs >= kUnitWords; pairs -= kUnitWords, x += 2 * kUnitWords, weight += kUnitWords * kRow) {
    unit.add<BFloat16, BFloat16>(x, stride * sizeof *x, weight);
  }
  if (pairs > 0) {  // memory after them belongs to another tile, and 0 times its numbers need not be 0
    BFloat16 rest[kUnitWords * kRow] = {};
    std::copy_n(weight, pairs * kRow, rest);
    unit.add<BFloat16, BFloat16>(x, stride * sizeof *x, rest);
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
  take_rows(a, [&](int64_t i, const float* x) { round_to_bfloat16(x, a.k, rounded + i * stride, stride); });
  for_blocks(a, blocks, kUnitRows, 2, 1 / 400.0, [&](const Share& share, const Tiles& part) {
    const BFloat16* weight = static_cast<const BFloat16*>(a.weight) + share.weight * num_tiles(a.n) * kTile * 2 * pairs;
    MatrixUnit unit;
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
  const int64_t pairs = (a.k + 1) / 2, stride = spread_stride<Pair>(pairs);
  Pair* rounded = scratch.of(a.m * stride);
  take_rows(a, [&](int64_t i, const float* x) {
    round_to_bfloat16(x, a.k, reinterpret_cast<BFloat16*>(rounded + i * stride), 2 * pairs);
  });
  for_blocks(a, blocks, kMostRows, 2, 1 / 80.0, [&](const Share& share, const Tiles& part) {
    const BFloat16* weight = static_cast<const BFloat16*>(a.weight) + share.weight * num_tiles(a.n) * kTile * 2 * pairs;
    tiles(Problem<BFloat16, Pair>{rounded, weight, a.bias, a.out, a.n, pairs, stride}, blocks, share, part);
  });
}

#endif

}  // namespace

// out [m, n] = x [m, k] times a weight in tiles, plus bias [n], which may be null. All float32 but the weight, whose
// dtype may also be bfloat16 or float16.
//
// With a stack of `weights`, rows starts[w] .. starts[w + 1] - 1 are multiplied with weight w; `starts` may be null if
// there is one weight. If `sources` [m] is not null, row i of the product is computed from row sources[i] of x.
EXPORT int64_t gemm_dense(int64_t weight_dtype, const float* x, const int32_t* sources, const int32_t* starts,
                          int64_t weights, const void* weight, const float* bias, float* out, int64_t m, int64_t n,
                          int64_t k, int64_t threads) {
  if (m == 0 || n == 0) return kDone;
  const auto run = weight_dtype == kFloat32 ? gemm<float> : weight_dtype == kBFloat16 ? gemm<BFloat16> : gemm<Float16>;
  run({x, sources, starts, weights, weight, bias, out, m, n, k, threads});
  return kDone;
}
RECORDABLE(gemm_dense)
