// Rows of activations and of what they are looked up in.
#include <algorithm>

#include "parallel.h"
#include "recording.h"
#include "tile.h"
#include "vec.h"

namespace {

constexpr int64_t kGrain = 65536;  // elements; fewer are done before another thread would be awake
constexpr int64_t kPiece = 64;     // numbers that are unpacked at a time

template <class T>
bool is_finite(const T* x, int64_t size) {
  Vec differences{};  // x - x of every number: 0, or NaN for one that is not finite
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) differences += load(x + at) - load(x + at);
  if (at < size) differences += load(x + at, size - at) - load(x + at, size - at);
  return sum(differences) == 0.0f;
}

// Unpacks one column of a tile, which is a row of the weight. Every step is rounded to T, as torch does.
template <class T>
void unpack_row(int64_t bits, const uint32_t* words, const T* scales, const T* zeros, T* out, int64_t size,
                int64_t group, float scale) {
  const int64_t per_word = 32 / bits;
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t start = 0; start < size; start += group, scales += kTile) {
    const float step = load(scales, 1)[0];
    const float zero = zeros == nullptr ? float(1 << (bits - 1)) : load(zeros, 1)[0];
    if (zeros != nullptr) zeros += kTile;
    for (int64_t piece = 0; piece < group; piece += kPiece) {
      const int64_t count = std::min(kPiece, group - piece);
      float numbers[kPiece];
      for (int64_t i = 0; i < count; i += per_word, words += kTile) {
        for (int64_t j = 0; j < per_word; ++j) numbers[i + j] = float(*words >> (j * bits) & mask);
      }
      for (int64_t at = 0; at < count; at += kLanes) {
        const Vec distance = rounded_to<T>(load(numbers + at) - zero);
        const Vec value = rounded_to<T>(distance * step) * scale;
        T* to = out + start + piece + at;
        at + kLanes <= count ? store(to, value) : store(to, value, count - at);
      }
    }
  }
}

// Calls run(row, id) for each row. If an id is not in 0..num_ids-1, calls nothing and returns the row of that id.
template <class Run>
int64_t for_ids(const int64_t* ids, int64_t rows, int64_t num_ids, int64_t size, int64_t threads, const Run& run) {
  for (int64_t row = 0; row < rows; ++row) {
    if (ids[row] < 0 || ids[row] >= num_ids) return row;
  }
  parallel_ranges(rows, kGrain / size + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(row, ids[row]);
  });
  return kDone;
}

}  // namespace

// out [rows] = whether all of a row of x [rows, size] is finite; the stride is that of rows, in elements.
EXPORT int64_t finite_rows(int64_t dtype, const void* x, bool* out, int64_t rows, int64_t size, int64_t stride,
                           int64_t threads) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    parallel_ranges(rows, kGrain / size + 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) out[row] = is_finite(static_cast<const T*>(x) + row * stride, size);
    });
  };
  dtype == kFloat32 ? run(float{}) : run(BFloat16{});
  return kDone;
}
RECORDABLE(finite_rows)

// out [rows, size] = rows `ids` of matrix [num_ids, size].
EXPORT int64_t gather_rows(const int32_t* matrix, const int64_t* ids, int32_t* out, int64_t rows, int64_t size,
                           int64_t num_ids, int64_t threads) {
  return for_ids(ids, rows, num_ids, size, threads, [&](int64_t row, int64_t id) {
    std::copy_n(matrix + id * size, size, out + row * size);
  });
}
RECORDABLE(gather_rows)

// out [rows, size] float32 = rows `ids` of a weight [num_ids, size] in tiles, times scale.
EXPORT int64_t gather_tiled_rows(int64_t weight_dtype, const void* weight, const int64_t* ids, float* out, int64_t rows,
                                 int64_t size, int64_t num_ids, double scale, int64_t threads) {
  const auto run = [&](auto type) {
    using W = decltype(type);
    return for_ids(ids, rows, num_ids, size, threads, [&](int64_t row, int64_t id) {
      const W* tile = static_cast<const W*>(weight) + id / kTile * even_inputs<W>(size) * kTile;
      float* to = out + row * size;
      for (int64_t i = 0; i < size; ++i) to[i] = load(tile + place_in_tile<W>(i, id % kTile), 1)[0] * float(scale);
    });
  };
  return weight_dtype == kFloat32 ? run(float{}) : weight_dtype == kBFloat16 ? run(BFloat16{}) : run(Float16{});
}
RECORDABLE(gather_tiled_rows)

// out [rows, size] = columns `ids` of a weight [size, num_ids] of packed integers in tiles, times scale.
EXPORT int64_t gather_packed_rows(int64_t bits, int64_t dtype, const void* words, const void* scales, const void* zeros,
                                  const int64_t* ids, void* out, int64_t rows, int64_t size, int64_t num_ids,
                                  int64_t group, double scale, int64_t threads) {
  const int64_t tile_words = size * bits / 32 * kTile, tile_groups = size / group * kTile;
  const auto run = [&](auto type) {
    using T = decltype(type);
    return for_ids(ids, rows, num_ids, size, threads, [&](int64_t row, int64_t id) {
      const int64_t tile = id / kTile, place = id % kTile, first = tile * tile_groups + place;
      unpack_row(bits, static_cast<const uint32_t*>(words) + tile * tile_words + place,
                 static_cast<const T*>(scales) + first,
                 zeros == nullptr ? nullptr : static_cast<const T*>(zeros) + first, static_cast<T*>(out) + row * size,
                 size, group, float(scale));
    });
  };
  return dtype == kFloat32 ? run(float{}) : run(BFloat16{});
}
RECORDABLE(gather_packed_rows)
