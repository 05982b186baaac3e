// Attention over keys and values that need no scale, multiplied as floats or as pairs of bfloat16.
#include "attend.h"

namespace {

// The keys [dim, tile] and values [tile, dim] of one head of a tile, converted to terms. With many rows it pays to
// convert them once and to have the values of all parts in one array.
template <class Term>
struct LaidOut {
  static constexpr int64_t kTokens = kTile<Term>;

  Term *keys, *values;

  LaidOut(float* memory, int64_t dim)
      : keys(reinterpret_cast<Term*>(memory)), values(keys + dim * kTokens / kNumbers<Term>) {}

  template <class T>
  void fill_keys(const PagedCache<T>& cache, const Tile<T>& tile, int64_t head) {
    for (int64_t d = 0; d < cache.dim; d += kNumbers<Term>) {
      for (int64_t t = 0; t < kTokens; t += kLanes) {
        const T* from = tile.k[t / kPart] + (head * cache.dim + d) * cache.page + t % kPart;
        store(keys + d / kNumbers<Term> * kTokens + t, load_terms<Term>(from, cache.page));
      }
    }
  }

  // Fills the values of tokens begin .. end - 1. Other tokens of the same terms are not read and become 0.
  template <class T>
  void fill_values(const PagedCache<T>& cache, const Tile<T>& tile, int64_t head, int64_t begin, int64_t end) {
    const int64_t dim = cache.dim, width = cache.heads * dim;
    for (int64_t t = begin / kNumbers<Term> * kNumbers<Term>; t < end; t += kNumbers<Term>) {
      const T* row = tile.v[t / kPart] + t % kPart * width + head * dim;
      Term* to = values + t / kNumbers<Term> * dim;
      for (int64_t d = 0; d < dim; d += kLanes) {
        if constexpr (kNumbers<Term> == 2) {
          store(to + d, pairs_of(t < begin ? Vec{} : load(row + d), t + 1 < end ? load(row + width + d) : Vec{}));
        } else {
          store(to + d, load(row + d));
        }
      }
    }
  }
};

}  // namespace

template <class T>
void attend(const PagedCache<T>& cache, const Tile<T>& tile, const Tile<T>& next, int64_t head, int64_t first,
            const Queries<TermOf<T>>& queries, const CausalMask& mask, float softcap, float* scratch) {
  using Term = TermOf<T>;
  constexpr int64_t kSize = kNumbers<Term>, kTokens = kTile<Term>;
  const int64_t dim = cache.dim, rows = queries.count, width = cache.heads * dim;
  const bool many = rows > kBlockRows;
  LaidOut<Term> laid_out(scratch, dim);
  if (many) {
    laid_out.fill_keys(cache, tile, head);
    laid_out.fill_values(cache, tile, head, first, tile.size);
    const auto keys = [&](int64_t t) { return laid_out.keys + t; };
    multiply<false, false>(queries.q, dim / kSize, rows, dim / kSize, keys, keys, kTokens, queries.scores,
                           kTokens, kTokens);
  } else {
    const auto keys = [&](const Tile<T>& of) {
      return [&](int64_t t) { return of.k[t / kPart] + head * dim * cache.page + t % kPart; };
    };
    multiply<false, true>(queries.q, dim / kSize, rows, dim / kSize, keys(tile), keys(next), cache.page, queries.scores,
                          kTokens, kTokens);
  }
  queries.take_weights(tile, first, dim, mask, softcap, weigh_row<Term>);
  const Term* weights = reinterpret_cast<const Term*>(queries.scores);
  const auto add_laid_out = [&](int64_t begin, int64_t end) {  // terms
    const auto values = [&](int64_t d) { return laid_out.values + begin * dim + d; };
    multiply<true, false>(weights + begin, kTokens, rows, end - begin, values, values, dim, queries.acc, dim, dim);
  };
  if (many) {
    add_laid_out(first / kSize, (tile.size + kSize - 1) / kSize);
    next.prefetch_keys(cache, head, 0);
    next.prefetch_values(cache, head, 0);
    return;
  }
  for (int64_t begin = first, end; begin < tile.size; begin = end) {
    if (begin % kSize != 0 || begin + kSize > tile.size) {  // a term with a token that must not be read
      end = std::min((begin / kSize + 1) * kSize, tile.size);
      laid_out.fill_values(cache, tile, head, begin, end);
      add_laid_out(begin / kSize, begin / kSize + 1);
      continue;
    }
    end = std::min(tile.size / kSize * kSize, (begin / kPart + 1) * kPart);
    const auto values = [&](const Tile<T>& of) {
      return [&, from = of.v[begin / kPart] + begin % kPart * width + head * dim](int64_t d) { return from + d; };
    };
    multiply<true, true>(weights + begin / kSize, kTokens, rows, (end - begin) / kSize, values(tile), values(next),
                         width, queries.acc, dim, dim);
  }
  next.prefetch_values(cache, head, tile.size);
}

#define INSTANTIATE(T)                                                                                          \
  template void attend(const PagedCache<T>&, const Tile<T>&, const Tile<T>&, int64_t, int64_t,                  \
                       const Queries<TermOf<T>>&, const CausalMask&, float, float*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Float16)
INSTANTIATE(E4M3)
