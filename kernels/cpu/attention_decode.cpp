// Attention of one query token per sequence, read directly from the paged cache. Memory bandwidth limits it, so each
// key and value is read once for all query heads that share it.
#include <atomic>
#include <numeric>
#include <utility>
#include <vector>

#include "attend.h"
#include "parallel.h"
#include "recording.h"
#include "scratch.h"

namespace {

// A range of consecutive keys of a sequence, for all heads.
struct Share {
  int64_t sequence, begin, end;
};

// Shares that are computed together because they have the same keys, those of a common prefix, which are read once for
// many queries: `count` shares from place `first` of `order_` on.
struct Item {
  int64_t first, count;
};

template <class Q, class T>
class Decode {
 public:
  Decode(const Q* q, Q* out, const PagedCache<T>& cache, const int32_t* lens, int64_t sequences, int64_t group,
         int64_t q_stride, int64_t out_stride, int64_t window, float scale, float softcap, float v_scale)
      : q_(q), out_(out), cache_(cache), heads_(cache.heads * group), group_(group), q_stride_(q_stride),
        out_stride_(out_stride), scale_(scale), softcap_(softcap), v_scale_(v_scale) {
    bool has_long = false;
    for (int64_t s = 0; s < sequences; ++s) {
      const int64_t length = lens[s], first = window > 0 ? std::max<int64_t>(0, length - window) : 0;
      if (length <= 0) zero_rows(out + s * out_stride, heads_ * cache.dim);
      starts_.push_back(shares_.size());
      for (int64_t at = first / kShare * kShare; at < length; at += kShare) {
        shares_.push_back({s, std::max(at, first), std::min(at + kShare, length)});
        keys_ += shares_.back().end - shares_.back().begin;
      }
      has_long |= int64_t(shares_.size()) > starts_.back() + 1;
    }
    starts_.push_back(shares_.size());
    if (has_long) {
      values_.resize(shares_.size() * heads_ * cache.dim);
      softmaxes_.resize(shares_.size() * heads_);
    }
    find_items();
  }

  // Returns kDone, or the index of the sequence with an invalid block.
  int64_t run(int64_t threads) {
    // A task has several items, so that the keys of the next item can be prefetched. Each task has half of a thread's
    // part of the remaining work, so that the last tasks are short and a thread that loses its core delays the others
    // little. A small batch is one task, because it is done before another thread would be awake.
    const int64_t parts = keys_ * heads_ * cache_.dim < (1 << 17) ? 1 : 2 * threads;
    std::vector<int64_t> tasks{0};
    for (int64_t item = 0, keys = 0, left = keys_; item < int64_t(items_.size()); ++item) {
      const Share& share = shares_[order_[items_[item].first]];
      keys += (share.end - share.begin) * items_[item].count;
      if (keys * parts < left && item + 1 < int64_t(items_.size())) continue;
      tasks.push_back(item + 1);
      left -= keys;
      keys = 0;
    }
    std::atomic<int64_t> fault{kDone};
    parallel_for(tasks.size() - 1, threads, [&](int64_t task) {
      const int64_t sequence = attend_to(tasks[task], tasks[task + 1]);
      if (sequence != kDone) fault = sequence;
    });
    for (int64_t s = 0; fault == kDone && s + 1 < int64_t(starts_.size()); ++s) merge(s);
    return fault;
  }

 private:
  using Term = TermOf<T>;

  // The most shares of an item. A prefix of more sequences has several items.
  int64_t most_together() const { return std::max<int64_t>(1, kRows / group_); }

  bool are_the_same(const Share& a, const Share& b) const {
    if (a.begin != b.begin || a.end != b.end || a.end - a.begin != kShare || kShare % cache_.page != 0) return false;
    const int64_t first = a.begin / cache_.page, count = kShare / cache_.page;
    if (first + count > cache_.max_blocks) return false;
    const int32_t* table = cache_.block_table + first;
    return std::equal(table + a.sequence * cache_.table_stride, table + a.sequence * cache_.table_stride + count,
                      table + b.sequence * cache_.table_stride);
  }

  void find_items() {
    const int64_t count = shares_.size();
    order_.resize(count);
    std::iota(order_.begin(), order_.end(), 0);
    // Sequences with a common prefix have the same first block, so only shares with equal first blocks are compared.
    std::vector<std::pair<int32_t, int64_t>> firsts;  // first block of each full share, and the share
    for (int64_t i = 0; i < count; ++i) {
      const Share& share = shares_[i];
      if (share.end - share.begin != kShare || share.begin / cache_.page >= cache_.max_blocks) continue;
      firsts.emplace_back(cache_.block_table[share.sequence * cache_.table_stride + share.begin / cache_.page], i);
    }
    std::sort(firsts.begin(), firsts.end());
    std::vector<int64_t> leader(count, -1);
    for (size_t i = 1; i < firsts.size(); ++i) {
      if (firsts[i].first != firsts[i - 1].first) continue;
      const int64_t share = firsts[i].second, before = firsts[i - 1].second;
      if (are_the_same(shares_[share], shares_[before])) {
        if (leader[before] < 0) leader[before] = before;
        leader[share] = leader[before];
      }
    }
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return leader[a] > leader[b]; });
    for (int64_t i = 0; i < count; ++i) {
      const bool joins = i > 0 && leader[order_[i]] >= 0 && leader[order_[i]] == leader[order_[i - 1]] &&
                         items_.back().count < most_together();
      if (joins) {
        ++items_.back().count;
      } else {
        items_.push_back({i, 1});
      }
    }
  }

  // Attends to the keys of items begin .. end - 1. Returns kDone, or the index of the sequence with an invalid block.
  int64_t attend_to(int64_t begin, int64_t end) {
    const int64_t dim = cache_.dim;
    int64_t most = 1;
    for (int64_t item = begin; item < end; ++item) most = std::max(most, items_[item].count);
    constexpr int64_t kTokens = Tile<T>::kMost;
    static thread_local Scratch<float> scratch;
    std::vector<Softmax> softmax(most * heads_);
    float* const scaled = scratch.of(most * (heads_ * 2 * dim + group_ * kTokens) + attend_scratch<T>(dim));
    float *acc = scaled + most * heads_ * dim, *scores = acc + most * heads_ * dim;
    auto* terms = reinterpret_cast<Term*>(scaled);
    float* laid_out = scores + most * group_ * kTokens;
    Tile<T> tile, next;
    const auto first_of = [&](int64_t item) -> const Share& { return shares_[order_[items_[item].first]]; };
    const auto find = [&](Tile<T>& to, const Share& share, int64_t at) {
      return to.find(cache_, share.sequence, at, share.begin, share.end);
    };
    if (!find(tile, first_of(begin), first_of(begin).begin / kTokens * kTokens)) return first_of(begin).sequence;
    next = tile;
    for (int64_t item = begin; item < end; ++item) {
      const Share& share = first_of(item);
      const int64_t together = items_[item].count, rows = together * group_;
      load_queries(items_[item], terms);
      std::fill(acc, acc + together * heads_ * dim, 0.0f);
      std::fill(softmax.begin(), softmax.begin() + together * heads_, Softmax());
      for (int64_t at = share.begin / kTokens * kTokens; at < share.end; at += kTokens) {
        if (at + kTokens < share.end) {
          if (!find(next, share, at + kTokens)) return share.sequence;
        } else if (item + 1 < end) {
          const Share& then = first_of(item + 1);
          if (!find(next, then, then.begin / kTokens * kTokens)) return then.sequence;
        }
        for (int64_t head = 0; head < cache_.heads; ++head) {
          const int64_t row = head * rows;
          const Queries<Term> queries{terms + row * query_size<Term>(dim), scores, &softmax[row], acc + row * dim, rows};
          attend(cache_, tile, next, head, std::max<int64_t>(0, share.begin - at), queries, CausalMask{},
                 softcap_, laid_out);
        }
        tile = next;
      }
      leave(items_[item], softmax.data(), acc);
    }
    return kDone;
  }

  // Rows of queries and of results are in the order [kv heads, shares of an item, group].
  void load_queries(const Item& item, Term* terms) const {
    for (int64_t head = 0; head < cache_.heads; ++head) {
      for (int64_t i = 0; i < item.count; ++i) {
        const Q* q = q_ + shares_[order_[item.first + i]].sequence * q_stride_ + head * group_ * cache_.dim;
        for (int64_t h = 0; h < group_; ++h, terms += query_size<Term>(cache_.dim)) {
          load_query(q + h * cache_.dim, terms, scale_, cache_.dim);
        }
      }
    }
  }

  void leave(const Item& item, const Softmax* softmax, const float* acc) {
    const int64_t dim = cache_.dim;
    for (int64_t head = 0; head < cache_.heads; ++head) {
      for (int64_t i = 0; i < item.count; ++i, softmax += group_, acc += group_ * dim) {
        const int64_t share = order_[item.first + i], sequence = shares_[share].sequence;
        if (starts_[sequence + 1] - starts_[sequence] == 1) {
          for (int64_t h = 0; h < group_; ++h) write(sequence, head * group_ + h, softmax[h], acc + h * dim);
        } else {
          std::copy(acc, acc + group_ * dim, &values_[(share * heads_ + head * group_) * dim]);
          std::copy(softmax, softmax + group_, &softmaxes_[share * heads_ + head * group_]);
        }
      }
    }
  }

  // Merges the shares of a long sequence, in their order.
  void merge(int64_t sequence) {
    const int64_t first = starts_[sequence], end = starts_[sequence + 1], dim = cache_.dim;
    if (end - first < 2) return;
    for (int64_t h = 0; h < heads_; ++h) {
      Softmax& into = softmaxes_[first * heads_ + h];
      float* acc = &values_[(first * heads_ + h) * dim];
      for (int64_t share = first + 1; share < end; ++share) {
        ::merge(into, acc, softmaxes_[share * heads_ + h], &values_[(share * heads_ + h) * dim], dim);
      }
      write(sequence, h, into, acc);
    }
  }

  void write(int64_t sequence, int64_t head, const Softmax& softmax, const float* acc) const {
    copy_scaled(acc, out_ + sequence * out_stride_ + head * cache_.dim, v_scale_ / softmax.total, cache_.dim);
  }

  const Q* q_;
  Q* out_;
  const PagedCache<T>& cache_;
  const int64_t heads_, group_, q_stride_, out_stride_;
  const float scale_, softcap_, v_scale_;
  int64_t keys_ = 0;
  std::vector<Share> shares_;        // of all sequences, in their order
  std::vector<int64_t> starts_;      // first share of each sequence, and the number of all shares
  std::vector<int64_t> order_;       // shares in the order in which items have them
  std::vector<Item> items_;
  std::vector<float> values_;        // [shares, heads, dim]; empty if each sequence has one share
  std::vector<Softmax> softmaxes_;   // [shares, heads]
};

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
    return Decode<Q, T>(static_cast<const Q*>(q), static_cast<Q*>(out), cache, lens, sequences, group, q_stride,
                        out_stride, window, scale, softcap, v_scale)
        .run(threads);
  });
}
RECORDABLE(paged_attention_decode)
