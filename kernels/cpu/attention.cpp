// Causal attention of prompts and chunks of prompts over the paged cache, by tiles of queries and keys
// (FlashAttention-2, Dao 2023).
#include <atomic>
#include <vector>

#include "attend.h"
#include "parallel.h"
#include "recording.h"
#include "scratch.h"

namespace {

struct QueryTile {
  int64_t sequence, head, begin, count, position;  // rows of q from `begin` on; position of the first
};

template <class Q, class T>
bool attend_tile(const Q* q, Q* out, const PagedCache<T>& cache, const QueryTile& tile_of_q, const float* sinks,
                 int64_t group, int64_t q_stride, int64_t out_stride, int64_t window, float scale, float softcap,
                 float v_scale) {
  const int64_t dim = cache.dim, rows = tile_of_q.count * group;
  using Term = TermOf<T>;
  constexpr int64_t kTokens = Tile<T>::kMost;
  static thread_local Scratch<float> scratch;
  float* const total = scratch.of(3 * rows * dim + rows * kTokens + attend_scratch<T>(dim));
  float *acc = total + rows * dim, *scores = acc + rows * dim, *scaled = scores + rows * kTokens;
  auto* terms = reinterpret_cast<Term*>(scaled);
  float* laid_out = scaled + rows * dim;
  std::vector<Softmax> totals(rows), softmax(rows);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = tile_of_q.head * group + r % group;
    load_query(q + (tile_of_q.begin + r / group) * q_stride + head * dim, terms + r * query_size<Term>(dim), scale, dim);
    if (sinks != nullptr) softmax[r] = {sinks[head], 1};
  }
  const Queries<Term> queries{terms, scores, softmax.data(), acc, rows};
  const int64_t end = tile_of_q.position + tile_of_q.count;
  const int64_t begin = window > 0 ? std::max<int64_t>(0, tile_of_q.position - window + 1) : 0;
  const int64_t start = begin / kTokens * kTokens;
  const auto end_of_tile = [&](int64_t at) { return std::min({at + kTokens, (at / kShare + 1) * kShare, end}); };
  Tile<T> tile, next;
  if (!tile.find(cache, tile_of_q.sequence, start, begin, end_of_tile(start))) return false;
  for (int64_t at = start; at < end; at = end_of_tile(at), tile = next) {
    const int64_t then = end_of_tile(at);
    next = tile;
    if (then < end && !next.find(cache, tile_of_q.sequence, then, begin, end_of_tile(then))) return false;
    if (at == start || at % kShare == 0) std::fill(acc, acc + rows * dim, 0.0f);
    const CausalMask mask{tile_of_q.position - at, group, window, tile.size};
    attend(cache, tile, next, tile_of_q.head, std::max<int64_t>(0, begin - at), queries, mask, softcap, laid_out);
    if (then % kShare == 0 || then == end) {
      for (int64_t r = 0; r < rows; ++r) merge(totals[r], total + r * dim, softmax[r], acc + r * dim, dim);
      std::fill(softmax.begin(), softmax.end(), Softmax());
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    Q* to = out + (tile_of_q.begin + r / group) * out_stride + (tile_of_q.head * group + r % group) * dim;
    copy_scaled(total + r * dim, to, v_scale / totals[r].total, dim);
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
    work += (end - begin) * std::min(length, window > 0 ? window + Tile<T>::kMost : length);
  }
  zero_until(tokens);
  std::atomic<int64_t> fault{kDone};
  // The last queries of a sequence have the most keys. They are computed first, so that no thread works alone at the
  // end.
  const int64_t count = tiles.size();
  parallel_for(count, work * width < (1 << 17) ? 1 : threads, [&](int64_t item) {
    const QueryTile& queries = tiles[count - 1 - item];
    if (!attend_tile(q, out, cache, queries, sinks, group, q_stride, out_stride, window, scale, softcap, v_scale)) {
      fault = queries.sequence;
    }
  });
  return fault;
}

}  // namespace

// q and out [tokens, heads * group, dim], strides of their rows in elements; scale includes that of keys; sinks or
// null.
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
