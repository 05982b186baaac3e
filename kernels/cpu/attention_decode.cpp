// Attention of one query token per sequence, read straight from the paged cache. What bounds it is memory: each key and
// value is read once for all query heads that share it.
#include <atomic>
#include <vector>

#include "paged.h"
#include "parallel.h"
#include "recording.h"

namespace {

// Keys of one item of work: a long sequence is shared by threads. It depends on nothing else in the batch, and so
// neither does a row's result.
constexpr int64_t kShare = 256;

// scores [kHeads, kTile] = q [kHeads, dim] . k
template <int kHeads, class T>
inline void score_heads(const float* q, const Tile<T>& tile, int64_t dim, float* scores) {
  for (int64_t t = 0; t < tile.size; t += 4) {
    Vec acc[kHeads][4] = {};
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec k[4];
      for (int i = 0; i < 4; ++i) k[i] = load(tile.k[t + i] + d);
      for (int h = 0; h < kHeads; ++h) {
        const Vec factor = load(q + h * dim + d);
        for (int i = 0; i < 4; ++i) acc[h][i] += factor * k[i];
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      const Vec4 four = sums(acc[h][0], acc[h][1], acc[h][2], acc[h][3]);
      std::memcpy(scores + h * kTile + t, &four, sizeof four);
    }
  }
}

template <class T>
void score(const float* q, int64_t heads, const Tile<T>& tile, int64_t dim, float* scores) {
  constexpr int kMost = kLanes == 16 ? 4 : 2;  // accumulators of heads times 4 tokens fit the registers
  for (int64_t h = 0; h < heads;) {
    const float* from = q + h * dim;
    float* to = scores + h * kTile;
    const int64_t count = std::min<int64_t>(heads - h, kMost);
    if constexpr (kMost == 4) {
      if (count == 4) score_heads<4>(from, tile, dim, to);
      if (count == 3) score_heads<3>(from, tile, dim, to);
    }
    if (count == 2) score_heads<2>(from, tile, dim, to);
    if (count == 1) score_heads<1>(from, tile, dim, to);
    h += count;
  }
  for (int64_t h = 0; h < heads; ++h) std::fill(scores + h * kTile + tile.size, scores + (h + 1) * kTile, kMasked);
}

// Consecutive keys of a sequence, of all heads: what they share in memory is read in the order in which it lies there.
struct Share {
  int64_t sequence, begin, end;
  bool whole;
};

// What a share of a row comes to: per query head a softmax and values that are not yet divided by its total.
template <class T>
bool attend(const PagedCache<T>& cache, const Share& share, const float* q, int64_t group, float softcap,
            Softmax* softmax, float* acc) {
  std::vector<float> scores(group * kTile);
  const int64_t dim = cache.dim;
  Tile<T> tile, next;
  if (!tile.find(cache, share.sequence, 0, share.begin, share.end)) return false;
  tile.prefetch(cache, 0, tile.size);
  for (int64_t at = share.begin; at < share.end; at += tile.size, tile = next) {
    const int64_t then = at + tile.size;
    if (then < share.end && !next.find(cache, share.sequence, 0, then, share.end)) return false;
    for (int64_t head = 0; head < cache.heads; ++head) {
      if (then < share.end) {
        next.prefetch(cache, next.size * head / cache.heads, next.size * (head + 1) / cache.heads);
      }
      const int64_t first = head * group;
      score(q + first * dim, group, tile, dim, scores.data());
      for (int64_t h = 0; h < group; ++h) {
        const float shrunk = softmax[first + h].add(&scores[h * kTile], softcap);
        if (shrunk != 1) scale_row(acc + (first + h) * dim, shrunk, dim);
      }
      add_values(scores.data(), group, tile, acc + first * dim, dim);
      tile.next_head(dim);
    }
  }
  return true;
}

template <class Q, class T>
int64_t decode(const Q* q, Q* out, const PagedCache<T>& cache, const int32_t* lens, int64_t sequences, int64_t group,
               int64_t q_stride, int64_t out_stride, int64_t window, float scale, float softcap, float v_scale,
               int64_t threads) {
  const int64_t dim = cache.dim, heads = cache.heads * group;
  std::vector<Share> shares;
  int64_t keys = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t length = lens[s], first = window > 0 ? std::max<int64_t>(0, length - window) : 0;
    if (length <= 0) zero_rows(out + s * out_stride, heads * dim);
    for (int64_t begin = first; begin < length; begin += kShare) {
      const int64_t end = std::min(begin + kShare, length);
      shares.push_back({s, begin, end, length - first <= kShare});
      keys += end - begin;
    }
  }
  const int64_t count = shares.size();
  // Where the shares of long rows meet: values and softmax of each.
  const bool split = std::any_of(shares.begin(), shares.end(), [](const Share& share) { return !share.whole; });
  std::vector<float> values(split ? count * heads * dim : 0);
  std::vector<Softmax> softmaxes(split ? count * heads : 0);
  std::atomic<int64_t> fault{kDone};
  const auto write = [&](const Share& share, const Softmax* softmax, const float* acc) {
    Q* to = out + share.sequence * out_stride;
    for (int64_t h = 0; h < heads; ++h) copy_scaled(acc + h * dim, to + h * dim, v_scale / softmax[h].total, dim);
  };
  // Little work is done before another thread would be awake.
  parallel_for(count, keys * heads * dim < (1 << 17) ? 1 : threads, [&](int64_t item) {
    const Share& share = shares[item];
    std::vector<float> scratch(2 * heads * dim);
    std::vector<Softmax> softmax(heads);
    float *scaled = &scratch[0], *acc = &scratch[heads * dim];
    copy_scaled(q + share.sequence * q_stride, scaled, scale, heads * dim);
    if (!attend(cache, share, scaled, group, softcap, softmax.data(), acc)) {
      fault = share.sequence;
    } else if (share.whole) {
      write(share, softmax.data(), acc);
    } else {
      std::copy(acc, acc + heads * dim, &values[item * heads * dim]);
      std::copy(softmax.begin(), softmax.end(), &softmaxes[item * heads]);
    }
  });
  for (int64_t item = 0, next; split && item < count; item = next) {
    const Share& row = shares[item];
    next = item + 1;
    if (row.whole) continue;
    for (; next < count && shares[next].sequence == row.sequence; ++next) {
      for (int64_t h = 0; h < heads; ++h) {
        Softmax& into = softmaxes[item * heads + h];
        const Softmax& other = softmaxes[next * heads + h];
        const float largest = std::max(into.largest, other.largest);
        const float shrunk = std::exp(into.largest - largest), weight = std::exp(other.largest - largest);
        float* acc = &values[(item * heads + h) * dim];
        const float* more = &values[(next * heads + h) * dim];
        for (int64_t d = 0; d < dim; d += kLanes) store(acc + d, load(acc + d) * shrunk + load(more + d) * weight);
        into = {largest, into.total * shrunk + other.total * weight};
      }
    }
    write(row, &softmaxes[item * heads], &values[item * heads * dim]);
  }
  return fault;
}

}  // namespace

// q and out [sequences, heads * group, dim], strides of their rows in elements; scale includes that of keys.
EXPORT int64_t paged_attention_decode(int64_t q_dtype, int64_t cache_dtype, const void* q, void* out, const void* k,
                                      const void* v, const int32_t* block_table, const int32_t* lens,
                                      int64_t sequences, int64_t max_blocks, int64_t table_stride, int64_t num_blocks,
                                      int64_t page, int64_t heads, int64_t group, int64_t dim, int64_t q_stride,
                                      int64_t out_stride, int64_t window, double scale, double softcap, double v_scale,
                                      int64_t threads) {
  return with_types(q_dtype, cache_dtype, [&](auto query, auto stored) {
    using Q = decltype(query);
    using T = decltype(stored);
    const PagedCache<T> cache{static_cast<const T*>(k), static_cast<const T*>(v), block_table, max_blocks,
                              table_stride, num_blocks, page, heads, dim};
    return decode(static_cast<const Q*>(q), static_cast<Q*>(out), cache, lens, sequences, group, q_stride, out_stride,
                  window, scale, softcap, v_scale, threads);
  });
}
RECORDABLE(paged_attention_decode)
