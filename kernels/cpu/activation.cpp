// Gated activations of the packed gate/up projection.
#include "parallel.h"
#include "recording.h"
#include "vec.h"

namespace {

constexpr int64_t kGrain = 16384;  // elements; fewer are done before another thread would be awake

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1 };

template <Activation activation>
inline Vec activate(Vec x) {
  if constexpr (activation == kSilu) return x / (exp(-x) + 1.0f);
  // 1 + tanh(u) is 2 / (1 + e^(-2 u)), which loses nothing where tanh is close to -1.
  return x / (exp((x + x * x * x * 0.044715f) * -1.5957691216f) + 1.0f);
}

template <class T, Activation activation>
void gated(const T* x, T* out, int64_t rows, int64_t columns, int64_t x_stride, int64_t out_stride, int64_t threads) {
  const int64_t grain = kGrain / columns + 1;
  parallel_ranges(rows, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *gate = x + row * x_stride, *up = gate + columns;
      T* to = out + row * out_stride;
      int64_t at = 0;
      for (; at + kLanes <= columns; at += kLanes) {
        store(to + at, rounded_to<T>(activate<activation>(load(gate + at))) * load(up + at));
      }
      if (const int64_t left = columns - at) {
        store(to + at, rounded_to<T>(activate<activation>(load(gate + at, left))) * load(up + at, left), left);
      }
    }
  });
}

template <class T>
void gated(int64_t activation, const void* x, void* out, int64_t rows, int64_t columns, int64_t x_stride,
           int64_t out_stride, int64_t threads) {
  const auto run = activation == kSilu ? gated<T, kSilu> : gated<T, kGeluTanh>;
  run(static_cast<const T*>(x), static_cast<T*>(out), rows, columns, x_stride, out_stride, threads);
}

}  // namespace

// out [rows, columns] = activation(x[:, :columns]) * x[:, columns:]; strides are those of rows, in elements.
EXPORT int64_t gated_activation(int64_t activation, int64_t dtype, const void* x, void* out, int64_t rows,
                                int64_t columns, int64_t x_stride, int64_t out_stride, int64_t threads) {
  const auto run = dtype == kFloat32 ? gated<float> : gated<BFloat16>;
  run(activation, x, out, rows, columns, x_stride, out_stride, threads);
  return kDone;
}
RECORDABLE(gated_activation)
