// Per-head norm, rotary embedding of queries and keys, and writing keys and values into the paged cache.
#include <atomic>

#include "cache8.h"
#include "norm.h"
#include "parallel.h"
#include "recording.h"

namespace {

constexpr int64_t kGrain = 3072;  // elements; few, as every number of a key is written to a cache line of its own
constexpr int64_t kMaxDim = 256;

// The arguments that all heads of a call share.
template <class T>
struct Heads {
  const T *q_norm, *k_norm;  // or null
  int64_t q_heads, kv_heads, dim;
  float eps;
  bool gemma;
};

// to [dim] = x, rotated by pairs (i, i + dim / 2), after its norm if there is one.
template <class T>
inline void rotate(const T* x, const T* norm, const float* cos_sin, T* to, const Heads<T>& heads) {
  T normed[kMaxDim];
  if (norm != nullptr) {
    norm_row(x, norm, normed, heads.dim, heads.eps, heads.gemma);
    x = normed;
  }
  const int64_t half = heads.dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const Vec first = load(x + i), second = load(x + half + i);
    const Vec cos = load(cos_sin + i), sin = load(cos_sin + half + i);
    store(to + i, first * cos - second * sin);
    store(to + half + i, second * cos + first * sin);
  }
}

// to [dim] = x in the type of the cache, clamped to its finite range; codes of e4m3 are of x / scale.
template <class T, class C>
inline void encode(const T* x, C* to, int64_t dim, float scale) {
  for (int64_t i = 0; i < dim; i += kLanes) {
    Vec v = load(x + i);
    if constexpr (sizeof(C) == 1) {
      v = v / scale;
      v = v > 448.0f ? splat(448.0f) : (v < -448.0f ? splat(-448.0f) : v);
    }
    if constexpr (std::is_same_v<C, Float16>) v = v > 65504.0f ? splat(65504.0f) : (v < -65504.0f ? splat(-65504.0f) : v);
    store(to + i, v);
  }
}

template <class T, class C>
int64_t rope(const T* qkv, T* out_q, const int64_t* positions, const float* cos_sin, const int64_t* slots, C* k_cache,
             C* v_cache, const Heads<T>& heads, int64_t tokens, int64_t num_positions, int64_t num_slots, int64_t page,
             int64_t qkv_stride, int64_t out_stride, float k_scale, float v_scale, int64_t threads) {
  std::atomic<int64_t> fault{kDone};
  const int64_t dim = heads.dim, kv_width = heads.kv_heads * dim, q_width = heads.q_heads * dim;
  parallel_ranges(tokens, kGrain / (q_width + 2 * kv_width) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (positions[t] < 0 || positions[t] >= num_positions || slots[t] >= num_slots) {
        fault = t;
        return;
      }
      const T* row = qkv + t * qkv_stride;
      const float* angles = cos_sin + positions[t] * dim;
      for (int64_t at = 0; at < q_width; at += dim) {
        rotate(row + at, heads.q_norm, angles, out_q + t * out_stride + at, heads);
      }
      if (slots[t] < 0) continue;
      for (int64_t at = 0; at < kv_width; at += dim) {
        T key[kMaxDim];
        const T* value = row + q_width + kv_width + at;
        rotate(row + q_width + at, heads.k_norm, angles, key, heads);
        if constexpr (std::is_same_v<C, Int8>) {
          const int64_t place = slots[t] % kPart, first = slots[t] - place;  // of the token's part
          const int64_t part = (first * heads.kv_heads + at / dim * kPart) * row_size8(dim);
          write_key8(key, dim, place, k_cache + part);
          write_value8(value, dim, place, v_cache + part);
        } else {
          const int64_t slot = slots[t] % page;
          C stored[kMaxDim];
          C* keys = k_cache + (slots[t] - slot) * kv_width + slot;  // [kv_heads, dim, page]
          encode(key, stored, dim, k_scale);
          for (int64_t i = 0; i < dim; ++i) keys[(at + i) * page] = stored[i];
          encode(value, v_cache + slots[t] * kv_width + at, dim, v_scale);
        }
      }
    }
  });
  return fault;
}

}  // namespace

// Keys are [num_blocks, kv_heads, dim, page], values [num_blocks, page, kv_heads, dim], or both have cache8.h's layout;
// qkv [tokens, (q_heads + 2 kv_heads) * dim] and out_q [tokens, q_heads * dim], strides of their rows in elements.
EXPORT int64_t qk_norm_rope_and_cache(int64_t dtype, int64_t cache_dtype, const void* qkv, void* out_q,
                                      const int64_t* positions, const float* cos_sin, const int64_t* slots,
                                      void* k_cache, void* v_cache, const void* q_norm, const void* k_norm,
                                      int64_t tokens, int64_t num_positions, int64_t num_blocks, int64_t page,
                                      int64_t q_heads, int64_t kv_heads, int64_t dim, int64_t qkv_stride, int64_t out_stride,
                                      int64_t gemma, double eps, double k_scale, double v_scale, int64_t threads) {
  return with_types(dtype, cache_dtype, [&](auto type, auto stored) {
    using T = decltype(type);
    using C = decltype(stored);
    const Heads<T> heads{static_cast<const T*>(q_norm), static_cast<const T*>(k_norm), q_heads, kv_heads, dim,
                         float(eps), gemma != 0};
    return rope(static_cast<const T*>(qkv), static_cast<T*>(out_q), positions, cos_sin, slots,
                static_cast<C*>(k_cache), static_cast<C*>(v_cache), heads, tokens, num_positions,
                num_blocks * page, page, qkv_stride, out_stride, k_scale, v_scale, threads);
  });
}
RECORDABLE(qk_norm_rope_and_cache)
