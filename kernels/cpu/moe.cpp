// Operations of a mixture-of-experts layer: the choice of experts, sorting rows by expert, and the weighted sum of the
// experts' results of each row. The GEMMs with a stack of weights between them are in gemm_dense.cpp and
// gemm_wna16.cpp.
#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "recording.h"
#include "scratch.h"
#include "vec.h"

namespace {

constexpr int64_t kGrain = 8192;  // elements; fewer are done before another thread would be awake

// chances [size] = e^(logits - the largest of them). Returns their sum, which is NaN if a logit is NaN.
float exponentials(const float* logits, int64_t size, float* chances) {
  const float largest = *std::max_element(logits, logits + size);
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) store(chances + at, exp(load(logits + at) - largest));
  if (at < size) store(chances + at, exp(load(logits + at, size - at) - largest), size - at);
  float sum = 0.0f;
  for (int64_t i = 0; i < size; ++i) sum += chances[i];
  return sum;
}

// The index of the largest logit that is not taken, the first of equal ones. A NaN is chosen if it is
// the first that is not taken, and only then.
int64_t largest_left(const float* logits, int64_t size, const bool* taken) {
  int64_t best = -1;
  for (int64_t i = 0; i < size; ++i) {
    if (!taken[i] && (best < 0 || logits[i] > logits[best])) best = i;
  }
  return best;
}

template <class T>
void sum_choices(const T* results, const int32_t* places, const float* weights, int64_t choices, int64_t size, T* out) {
  for (int64_t at = 0; at < size; at += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, size - at);
    Vec sum = {};
    for (int64_t j = 0; j < choices; ++j) {
      const T* result = results + places[j] * size + at;
      sum += (count == kLanes ? load(result) : load(result, count)) * weights[j];
    }
    count == kLanes ? store(out + at, sum) : store(out + at, sum, count);
  }
}

}  // namespace

// weights [rows, k] float32 and ids [rows, k] = the k most probable of `experts`, from logits [rows, experts] float32.
EXPORT int64_t topk_softmax(const float* logits, float* weights, int32_t* ids, int64_t rows, int64_t experts, int64_t k,
                            int64_t renormalize, int64_t threads) {
  parallel_ranges(rows, kGrain / (experts * (k + 4)) + 1, threads, [&](int64_t begin, int64_t end) {
    static thread_local Scratch<float> chances_of_thread;
    static thread_local Scratch<bool> taken_of_thread;
    float* chances = chances_of_thread.of(experts);
    bool* taken = taken_of_thread.of(experts);
    for (int64_t row = begin; row < end; ++row) {
      const float* from = logits + row * experts;
      float* to = weights + row * k;
      float sum = exponentials(from, experts, chances), chosen = 0.0f;
      std::fill(taken, taken + experts, false);
      for (int64_t j = 0; j < k; ++j) {
        const int64_t id = largest_left(from, experts, taken);
        taken[id] = true;
        ids[row * k + j] = int32_t(id);
        to[j] = chances[id];
        chosen += chances[id];
      }
      // A NaN is in the sum of all logits, though it may not be among the chosen ones.
      const float divisor = renormalize && sum == sum ? chosen : sum;
      for (int64_t j = 0; j < k; ++j) to[j] /= divisor;
    }
  });
  return kDone;
}
RECORDABLE(topk_softmax)

// Sorts the pairs of a row and an expert chosen for it, ids [rows, k], by expert, and the pairs of an expert by row.
// The pair at place p of that order is of row sources[p], pair i has place places[i], and expert e has the places
// starts[e] .. starts[e + 1] - 1 (`starts` has experts + 1 elements). If an id is not in 0..experts-1, returns its row.
EXPORT int64_t sort_by_expert(const int32_t* ids, int32_t* sources, int32_t* places, int32_t* starts, int64_t rows,
                              int64_t k, int64_t experts, int64_t) {
  std::fill(starts, starts + experts + 1, 0);
  for (int64_t i = 0; i < rows * k; ++i) {
    if (ids[i] < 0 || ids[i] >= experts) return i / k;
    ++starts[ids[i]];
  }
  for (int64_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];  // each is now where the next expert's begin
  for (int64_t i = rows * k - 1; i >= 0; --i) {
    places[i] = --starts[ids[i]];
    sources[places[i]] = int32_t(i / k);
  }
  return kDone;
}
RECORDABLE(sort_by_expert)

// out [rows, size] = for each row the sum of its k results, which are rows places[row, 0 .. k - 1] of `results`, times
// weights [rows, k].
EXPORT int64_t sum_of_experts(int64_t dtype, const void* results, const int32_t* places, const float* weights,
                              void* out, int64_t rows, int64_t k, int64_t size, int64_t threads) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    parallel_ranges(rows, 2 * kGrain / (size * k) + 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        sum_choices(static_cast<const T*>(results), places + row * k, weights + row * k, k, size,
                    static_cast<T*>(out) + row * size);
      }
    });
  };
  dtype == kFloat32 ? run(float{}) : run(BFloat16{});
  return kDone;
}
RECORDABLE(sum_of_experts)
