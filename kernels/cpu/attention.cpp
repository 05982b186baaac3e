// Causal attention of prompts and chunks of prompts over the paged cache, by tiles of queries and keys (Dao 2023).
#include <atomic>
#include <vector>

#include "paged.h"
#include "parallel.h"
#include "recording.h"

namespace {

// Rows of a tile, a row being a query of one head: enough to pay for laying out the keys.
constexpr int64_t kRows = 96;

// to [dim, kTile] = the keys, transposed: a row of it is what one dimension of a query is multiplied by.
template <class T>
void transpose_keys(const Tile<T>& tile, float* to, int64_t dim) {
  float block[4][kLanes];
  for (int64_t t = 0; t < kTile; t += 4) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      for (int i = 0; i < 4; ++i) store(block[i], load(tile.k[t + i] + d));
      for (int i = 0; i < kLanes; ++i) {
        const float four[4] = {block[0][i], block[1][i], block[2][i], block[3][i]};
        std::memcpy(to + (d + i) * kTile + t, four, sizeof four);
      }
    }
  }
}

struct QueryTile {
  int64_t sequence, head, begin, count, position;  // rows of q from `begin`; position of the first
};

template <class Q, class T>
bool attend(const Q* q, Q* out, const PagedCache<T>& cache, const QueryTile& queries, const float* sinks,
            int64_t group, int64_t q_stride, int64_t out_stride, int64_t window, float scale, float softcap,
            float v_scale) {
  const int64_t dim = cache.dim, rows = queries.count * group;
  std::vector<float> scratch(2 * rows * dim + rows * kTile + dim * kTile);
  float *scaled = &scratch[0], *acc = scaled + rows * dim, *scores = acc + rows * dim, *keys = scores + rows * kTile;
  std::vector<Softmax> softmax(rows);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = queries.head * group + r % group;
    copy_scaled(q + (queries.begin + r / group) * q_stride + head * dim, scaled + r * dim, scale, dim);
    if (sinks != nullptr) softmax[r] = {sinks[head], 1};
  }
  const int64_t end = queries.position + queries.count;
  const int64_t first = window > 0 ? std::max<int64_t>(0, queries.position - window + 1) : 0;
  Tile<T> tile;
  for (int64_t at = first; at < end; at += tile.size) {
    if (!tile.find(cache, queries.sequence, queries.head, at, end)) return false;
    transpose_keys(tile, keys, dim);
    std::fill(scores, scores + rows * kTile, 0.0f);
    multiply(scaled, dim, rows, dim, [&](int64_t i) { return keys + i * kTile; }, scores, kTile, kTile);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = scores + r * kTile;
      const int64_t position = queries.position + r / group;
      const int64_t live = std::clamp<int64_t>(position + 1 - at, 0, tile.size);
      const int64_t left = window > 0 ? std::clamp<int64_t>(position - window + 1 - at, 0, live) : 0;
      std::fill(row, row + left, kMasked);
      std::fill(row + live, row + kTile, kMasked);
      const float shrunk = softmax[r].add(row, softcap);
      if (shrunk != 1) scale_row(acc + r * dim, shrunk, dim);
    }
    add_values(scores, rows, tile, acc, dim);
  }
  for (int64_t r = 0; r < rows; ++r) {
    Q* to = out + (queries.begin + r / group) * out_stride + (queries.head * group + r % group) * dim;
    copy_scaled(acc + r * dim, to, v_scale / softmax[r].total, dim);
  }
  return true;
}

template <class Q, class T>
int64_t unified(const Q* q, Q* out, const PagedCache<T>& cache, const int32_t* cu_seqlens_q, const int32_t* lens,
                const float* sinks, int64_t tokens, int64_t sequences, int64_t group, int64_t q_stride,
                int64_t out_stride, int64_t window, float scale, float softcap, float v_scale, int64_t threads) {
  std::vector<QueryTile> tiles;
  const int64_t width = cache.heads * group * cache.dim, most = std::max<int64_t>(1, kRows / group);
  int64_t written = 0;
  const auto zero_until = [&](int64_t end) {
    for (; written < end; ++written) zero_rows(out + written * out_stride, width);
  };
  int64_t work = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t begin = cu_seqlens_q[s], end = cu_seqlens_q[s + 1], length = lens[s];
    if (begin < 0 || end < begin || end > tokens || (length > 0 && end - begin > length)) return s;
    if (length <= 0) continue;
    zero_until(begin);
    written = std::max(written, end);
    for (int64_t head = 0; head < cache.heads; ++head) {
      for (int64_t at = begin; at < end; at += most) {
        tiles.push_back({s, head, at, std::min(most, end - at), length - (end - at)});
      }
    }
    work += (end - begin) * std::min(length, window > 0 ? window + kTile : length);
  }
  zero_until(tokens);
  std::atomic<int64_t> fault{kDone};
  // The last queries of a sequence see most keys: they come first, so that no thread is left with them at the end.
  const int64_t count = tiles.size();
  parallel_for(count, work * width < (1 << 17) ? 1 : threads, [&](int64_t item) {
    const QueryTile& queries = tiles[count - 1 - item];
    if (!attend(q, out, cache, queries, sinks, group, q_stride, out_stride, window, scale, softcap, v_scale)) {
      fault = queries.sequence;
    }
  });
  return fault;
}

}  // namespace

// q and out [tokens, heads * group, dim], strides of their rows in elements; scale includes that of keys; sinks or null.
EXPORT int64_t unified_attention(int64_t q_dtype, int64_t cache_dtype, const void* q, void* out, const void* k,
                                 const void* v, const int32_t* block_table, const int32_t* lens, int64_t sequences,
                                 int64_t max_blocks, int64_t table_stride, int64_t num_blocks, int64_t page,
                                 int64_t heads, int64_t group, int64_t dim, int64_t q_stride, int64_t out_stride,
                                 int64_t window, double scale, double softcap, double v_scale,
                                 const int32_t* cu_seqlens_q, const float* sinks, int64_t tokens, int64_t threads) {
  return with_types(q_dtype, cache_dtype, [&](auto query, auto stored) {
    using Q = decltype(query);
    using T = decltype(stored);
    const PagedCache<T> cache{static_cast<const T*>(k), static_cast<const T*>(v), block_table, max_blocks,
                              table_stride, num_blocks, page, heads, dim};
    return unified(static_cast<const Q*>(q), static_cast<Q*>(out), cache, cu_seqlens_q, lens, sinks, tokens, sequences,
                   group, q_stride, out_stride, window, scale, softcap, v_scale, threads);
  });
}
RECORDABLE(unified_attention)
