// RMSNorm fused with the residual addition before it.
#include "norm.h"

#include "parallel.h"
#include "recording.h"

namespace {

constexpr int64_t kGrain = 32768;  // elements; fewer are done before another thread would be awake

template <class T>
void add_norm(const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t size, int64_t x_stride,
              int64_t residual_stride, int64_t out_stride, bool gemma, float eps, int64_t threads) {
  parallel_ranges(rows, kGrain / size + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* hidden = x + row * x_stride;
      if (residual != nullptr) {
        T* sum = residual + row * residual_stride;
        for (int64_t i = 0; i < size; i += kLanes) store(sum + i, load(sum + i) + load(hidden + i));
        hidden = sum;
      }
      norm_row(hidden, weight, out + row * out_stride, size, eps, gemma);
    }
  });
}

}  // namespace

// residual [rows, size] += x; out = RMSNorm of the sum, of x where residual is null. Strides are those of rows.
EXPORT int64_t fused_add_rms_norm(int64_t dtype, const void* x, void* residual, const void* weight, void* out,
                                  int64_t rows, int64_t size, int64_t x_stride, int64_t residual_stride,
                                  int64_t out_stride, int64_t gemma, double eps, int64_t threads) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    add_norm(static_cast<const T*>(x), static_cast<T*>(residual), static_cast<const T*>(weight), static_cast<T*>(out),
             rows, size, x_stride, residual_stride, out_stride, gemma != 0, eps, threads);
  };
  dtype == kFloat32 ? run(float{}) : run(BFloat16{});
  return kDone;
}
RECORDABLE(fused_add_rms_norm)
