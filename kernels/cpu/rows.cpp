// Rows of activations.
#include "parallel.h"
#include "recording.h"
#include "vec.h"

namespace {

constexpr int64_t kGrain = 65536;  // elements; fewer are done before another thread would be awake

template <class T>
bool is_finite(const T* x, int64_t size) {
  Vec differences{};  // of every number to itself: 0, or NaN for one that is not finite
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) differences += load(x + at) - load(x + at);
  if (at < size) differences += load(x + at, size - at) - load(x + at, size - at);
  return sum(differences) == 0.0f;
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
