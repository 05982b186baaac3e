// Samples the next token of each row and computes log-probabilities. One pass over a row of logits computes the maximum
// of each tile and the normaliser. After it, sampling reads only the tiles whose maxima show that they can matter.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "parallel.h"
#include "recording.h"
#include "vec.h"

namespace {

constexpr int64_t kTile = 256;  // logits
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;
constexpr double kNoiseLevels = 1 << 24;
constexpr double kMostNoise = 17.33;  // `gumbel` returns numbers between these two
constexpr double kLeastNoise = -2.87;
constexpr double kSlack = 1e-3;  // larger than all rounding errors in the comparisons that skip candidates

inline bool is_nan(float x) { return x != x; }

// The order of torch's searches: NaN is above everything.
inline bool above(float a, float b) { return a > b || (is_nan(a) && !is_nan(b)); }

// SplitMix64, the same as in `kernels.reference.rng`.
inline uint64_t mix(uint64_t z) {
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

inline uint64_t noise_key(uint64_t seed, uint64_t position) { return mix(mix(seed + kGolden) + (position + 1) * kGolden); }

inline uint32_t noise_bits(uint64_t key, uint64_t id) { return mix(key + (id + 1) * kGolden) >> 40; }

inline double gumbel(uint32_t bits) { return -std::log(-std::log((bits + 0.5) / kNoiseLevels)); }

// A lower bound of the bits for which `gumbel` returns `noise` or more; slightly below the exact bound.
inline uint32_t least_bits(double noise) {
  if (noise < kLeastNoise) return 0;
  return uint32_t(std::max(std::exp(-std::exp(-noise)) * kNoiseLevels - 2.0, 0.0));
}

struct Candidate {
  float value;
  int64_t id;
};

// Memory of a thread that is reused for each row.
struct Scratch {
  std::vector<float> maxima, source_maxima, values;
  std::vector<Candidate> candidates;
};

// A row of logits. The constructor makes the pass over it, which sums exp(x - largest) if the normaliser is needed.
class Row {
 public:
  Row(const float* logits, int64_t vocab, bool is_normalised, std::vector<float>& maxima)
      : logits_(logits),
        vocab_(vocab),
        num_tiles_((vocab + kTile - 1) / kTile),
        is_normalised_(is_normalised),
        maxima_(maxima) {
    maxima_.resize(num_tiles_);
    Int nan{};
    for (int64_t tile = 0; tile < num_tiles_; ++tile) read(tile, nan);
    int32_t has_nan = 0;
    for (int lane = 0; lane < kLanes; ++lane) has_nan |= nan[lane];
    if (has_nan) read_with_nan();
  }

  int64_t vocab() const { return vocab_; }
  int64_t num_tiles() const { return num_tiles_; }
  int64_t size(int64_t tile) const { return std::min(kTile, vocab_ - tile * kTile); }
  float operator[](int64_t id) const { return logits_[id]; }
  const float* at(int64_t tile) const { return logits_ + tile * kTile; }
  float maximum_of(int64_t tile) const { return maxima_[tile]; }
  float largest() const { return largest_; }
  float log_normaliser() const { return float(largest_ + std::log(total_)); }

  // The lowest token id that has the largest logit.
  int64_t first() const {
    const float* tile = at(largest_tile_);
    int64_t i = 0;
    while (above(largest_, tile[i])) ++i;
    return largest_tile_ * kTile + i;
  }

  // A lower bound of the k-th largest logit; tiles with a maximum below it do not contain it. Overwrites `values`.
  float bound_of_top(int64_t k, std::vector<float>& values) const {
    if (k > num_tiles_) return -kInfinity;
    values.assign(maxima_.begin(), maxima_.end());
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), above);
    return values[k - 1];
  }

  // Puts all logits >= bound into `values`; for rows without NaN.
  void collect(float bound, std::vector<float>& values) const {
    values.resize(vocab_);
    int64_t count = 0;
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      if (maxima_[tile] < bound) continue;
      const float* x = at(tile);
      for (int64_t i = 0, n = size(tile); i < n; ++i) {
        values[count] = x[i];
        count += x[i] >= bound;
      }
    }
    values.resize(count);
  }

 private:
  void read(int64_t tile, Int& nan) {
    const float* x = at(tile);
    float padded[kTile];
    if (const int64_t n = size(tile); n < kTile) {
      std::fill(std::copy(x, x + n, padded), padded + kTile, -kInfinity);
      x = padded;
    }
    Vec most = splat(-kInfinity);
    for (int64_t i = 0; i < kTile; i += kLanes) {
      const Vec v = load(x + i);
      most = max(v, most);
      nan |= v != v;
    }
    const float maximum = ::maximum(most);
    maxima_[tile] = maximum;
    if (maximum > largest_) {
      total_ *= std::exp(largest_ - maximum);
      largest_ = maximum;
      largest_tile_ = tile;
    }
    if (!is_normalised_ || maximum == -kInfinity) return;
    Vec sums{};
    for (int64_t i = 0; i < kTile; i += kLanes) sums += exp(load(x + i) - largest_);
    total_ += sum(sums);
  }

  void read_with_nan() {
    for (int64_t tile = 0; tile < num_tiles_; ++tile) {
      const float* x = at(tile);
      maxima_[tile] = *std::min_element(x, x + size(tile), above);
      if (above(maxima_[tile], largest_)) {
        largest_ = maxima_[tile];
        largest_tile_ = tile;
      }
    }
    total_ = largest_;
  }

  const float* logits_;
  int64_t vocab_, num_tiles_;
  bool is_normalised_;
  std::vector<float>& maxima_;
  float largest_ = -kInfinity;
  int64_t largest_tile_ = 0;
  double total_ = 0.0;
};

struct Filters {
  float temperature;
  int64_t top_k;
  float top_p, min_p;
};

// Samples from one row with a finite maximum. `scaled` is applied to its logits.
class Draw {
 public:
  Draw(const Row& row, const Filters& filters, std::vector<float>& values)
      : row_(row), temperature_(filters.temperature), values_(values) {
    if (filters.min_p > 0) bound_ = float(std::log(double(filters.min_p)));
    const bool is_nucleus = filters.top_p < 1;
    if (filters.top_k > 0 && filters.top_k < row.vocab()) {
      keep_top(filters.top_k);
      if (is_nucleus) {
        double total = 0.0;
        for (const float value : values_) total += std::exp(double(value));
        bound_ = std::max(bound_, nucleus(filters.top_p * total));
      }
    } else if (is_nucleus) {
      const double mass = filters.top_p * total();
      // Tries small depths first, because nearly all mass is close to the maximum.
      for (const float depth : {5.0f, 10.0f, 20.0f, kInfinity}) {
        collect_within(depth);
        if (const float found = nucleus(mass); found > -kInfinity) {
          bound_ = std::max(bound_, found);
          break;
        }
      }
    }
    bound_ = std::min(bound_, 0.0f);  // the most probable token is never excluded
  }

  // The token with the highest sum of scaled logit and noise; of equal ones, the lowest id.
  int64_t token(uint64_t key) const {
    int64_t token = row_.first();
    double best = gumbel(noise_bits(key, token));
    uint32_t bits[kTile];
    for (int64_t tile = 0; tile < row_.num_tiles(); ++tile) {
      const float top = scaled(row_.maximum_of(tile));
      if (row_.maximum_of(tile) < least_ || top < bound_) continue;
      const double needed = best - top - kSlack;
      if (needed > kMostNoise) continue;
      const uint32_t least = least_bits(needed);
      uint32_t most = 0;
      const uint64_t base = tile * kTile;
      for (int64_t i = 0; i < kTile; ++i) {
        bits[i] = noise_bits(key, base + i);
        most = std::max(most, bits[i]);
      }
      if (most < least) continue;
      for (int64_t i = 0, n = row_.size(tile); i < n; ++i) {
        const float x = row_.at(tile)[i];
        if (bits[i] < least || x < least_ || scaled(x) < bound_) continue;
        const double score = scaled(x) + gumbel(bits[i]);
        const int64_t id = base + i;
        if (score > best || (score == best && id < token)) {
          best = score;
          token = id;
        }
      }
    }
    return token;
  }

 private:
  float scaled(float x) const { return (x - row_.largest()) / temperature_; }

  // Applies top-k: the remaining tokens have logits >= `least_`, and `values_` has their scaled logits.
  void keep_top(int64_t k) {
    row_.collect(row_.bound_of_top(k, values_), values_);
    std::nth_element(values_.begin(), values_.begin() + (k - 1), values_.end(), std::greater<float>());
    least_ = values_[k - 1];
    keep_from(least_);
    for (float& value : values_) value = scaled(value);
  }

  void collect_within(float depth) {
    row_.collect(float(row_.largest() - depth * double(temperature_) * (1 + kSlack)), values_);
    for (float& value : values_) value = scaled(value);
    keep_from(-depth);
  }

  void keep_from(float bound) {
    values_.erase(std::remove_if(values_.begin(), values_.end(), [&](float value) { return value < bound; }),
                  values_.end());
  }

  // The sum of e^x over all scaled logits x.
  double total() const {
    double total = 0.0;
    for (int64_t tile = 0; tile < row_.num_tiles(); ++tile) {
      if (scaled(row_.maximum_of(tile)) < -87.0f) continue;
      const float* x = row_.at(tile);
      const int64_t n = row_.size(tile), whole = n / kLanes * kLanes;
      Vec sums{};
      for (int64_t i = 0; i < whole; i += kLanes) sums += exp((load(x + i) - row_.largest()) / temperature_);
      total += sum(sums);
      for (int64_t i = whole; i < n; ++i) total += std::exp(double(scaled(x[i])));
    }
    return total;
  }

  // The largest bound such that the `values_` not below it have this mass; -infinity if all have less. Reorders
  // `values_`.
  float nucleus(double mass) {
    auto begin = values_.begin(), end = values_.end();
    double before = 0.0;  // the mass in front of `begin`, of values not smaller than the others
    while (end - begin > 1) {
      const auto middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end, std::greater<float>());
      double reached = before;
      for (auto at = begin; at != middle; ++at) reached += std::exp(double(*at));
      if (reached >= mass) {
        end = middle;
      } else {
        begin = middle;
        before = reached;
      }
    }
    return before + std::exp(double(*begin)) >= mass ? *begin : -kInfinity;
  }

  const Row& row_;
  float temperature_;
  std::vector<float>& values_;
  float least_ = -kInfinity;  // tokens with logits below it, or scaled logits below `bound_`, are excluded
  float bound_ = -kInfinity;
};

// The k most probable tokens, most probable first, equal ones by ascending id.
void top(const Row& row, int64_t k, int64_t* ids, float* logprobs, Scratch& scratch) {
  const float bound = row.bound_of_top(k, scratch.values), log_z = row.log_normaliser();
  scratch.candidates.clear();
  for (int64_t tile = 0; tile < row.num_tiles(); ++tile) {
    if (above(bound, row.maximum_of(tile))) continue;
    for (int64_t i = 0, n = row.size(tile); i < n; ++i) {
      const float x = row.at(tile)[i];
      if (!above(bound, x)) scratch.candidates.push_back({x, tile * kTile + i});
    }
  }
  const auto begin = scratch.candidates.begin();
  std::partial_sort(begin, begin + k, scratch.candidates.end(), [](const Candidate& a, const Candidate& b) {
    return above(a.value, b.value) || (!above(b.value, a.value) && a.id < b.id);
  });
  for (int64_t i = 0; i < k; ++i) {
    ids[i] = begin[i].id;
    logprobs[i] = begin[i].value - log_z;
  }
}

}  // namespace

// Samples token_ids [rows] from logits [rows, vocab], and computes log-probabilities from `source`, often the same
// rows.
// Filters, seeds and positions are [rows]; top_ids and top_logprobs [rows, num_logprobs]. num_logprobs is at most vocab;
// below 0, no log-probabilities are computed.
EXPORT int64_t sample(const float* logits, const float* source, const float* temperature, const int64_t* top_k,
                      const float* top_p, const float* min_p, const int64_t* seeds, const int64_t* positions,
                      int64_t* token_ids, float* logprobs, int64_t* top_ids, float* top_logprobs, int64_t rows,
                      int64_t vocab, int64_t logits_stride, int64_t source_stride, int64_t num_logprobs,
                      int64_t threads) {
  parallel_for(rows, threads, [&](int64_t i) {
    static thread_local Scratch scratch;
    const bool has_logprobs = num_logprobs >= 0;
    const Row row(logits + i * logits_stride, vocab, has_logprobs && source == logits, scratch.maxima);
    if (temperature[i] > 0 && std::isfinite(row.largest())) {
      const Draw draw(row, {temperature[i], top_k[i], top_p[i], min_p[i]}, scratch.values);
      token_ids[i] = draw.token(noise_key(seeds[i], positions[i]));
    } else {
      token_ids[i] = row.first();
    }
    if (!has_logprobs) return;
    const auto tell = [&](const Row& of) {
      logprobs[i] = of[token_ids[i]] - of.log_normaliser();
      if (num_logprobs) top(of, num_logprobs, top_ids + i * num_logprobs, top_logprobs + i * num_logprobs, scratch);
    };
    source == logits ? tell(row) : tell(Row(source + i * source_stride, vocab, true, scratch.source_maxima));
  });
  return kDone;
}
RECORDABLE(sample)
