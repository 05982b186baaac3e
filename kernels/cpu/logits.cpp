// Masks of logits.
#include <algorithm>
#include <limits>

#include "parallel.h"
#include "recording.h"
#include "vec.h"

namespace {

constexpr int64_t kWordBits = 32;
constexpr int64_t kGrain = 65536;  // logits; fewer are done before another thread would be awake
constexpr float kBanned = -std::numeric_limits<float>::infinity();

// A fast path, because most words have all of their bits set, or none.
void mask_word(uint32_t allowed, float* logits, int64_t count) {
  if (allowed == ~uint32_t{0}) return;
  if (allowed == 0) {
    std::fill(logits, logits + count, kBanned);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (!(allowed >> i & 1)) logits[i] = kBanned;
  }
}

}  // namespace

// logits [rows, vocab] = -infinity where bitmask [rows, ceil(vocab / 32)] has no bit; the strides are those of rows.
EXPORT int64_t mask_logits(float* logits, const uint32_t* bitmask, int64_t rows, int64_t vocab, int64_t stride,
                           int64_t mask_stride, int64_t threads) {
  parallel_ranges(rows, kGrain / vocab + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* to = logits + row * stride;
      const uint32_t* words = bitmask + row * mask_stride;
      for (int64_t id = 0; id < vocab; id += kWordBits) {
        mask_word(words[id / kWordBits], to + id, std::min(kWordBits, vocab - id));
      }
    }
  });
  return kDone;
}
RECORDABLE(mask_logits)
