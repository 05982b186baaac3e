// Divides the input rows of a GEMM into blocks of rows that are computed together.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "scratch.h"

// Rows first .. first + rows - 1.
struct Block {
  int64_t first, rows;
};

// The rows that are multiplied with weight number `weight` of a stack. Their blocks are first_block .. end_block - 1.
struct Share {
  int64_t weight, rows, first_block, end_block;
};

// The stride, in elements, of rows of `size` elements. Rows at distances of a multiple of 4 KiB would map to the same
// set of the L1 cache, which has fewer ways than a block has rows.
template <class T>
constexpr int64_t spread_stride(int64_t size) {
  return size * int64_t(sizeof(T)) % 4096 == 0 ? size + 64 / int64_t(sizeof(T)) : size;
}

// An iterator over the terms [M, stride] of the rows of a block, from the first term to the last. There are fewer
// registers than rows, so each pointer serves three rows: x86 addressing adds a register, or twice its value, at no
// cost.
template <class Term, int M>
struct RowTerms {
  const Term* first[(M + 2) / 3];
  int64_t stride;

  RowTerms(const Term* terms, int64_t stride) : stride(stride) {
    for (int i = 0; i < (M + 2) / 3; ++i) first[i] = terms + 3 * i * stride;
  }
  const Term* row(int m) const { return first[m / 3] + m % 3 * stride; }
  void advance() {
    for (const Term*& of_three : first) ++of_three;
  }
};

// Tiles begin .. end - 1 of a weight, which a thread multiplies one after the other. The next tiles that this thread
// gets are probably those from `next` on; `next` may be beyond the last tile.
struct Tiles {
  int64_t begin, end, next;

  int64_t after(int64_t tile) const { return tile + 1 < end ? tile + 1 : next; }
};

class Blocks {
 public:
  // Divides m rows into blocks. Rows starts[w] .. starts[w + 1] - 1 belong to weight w; without `starts`, all belong to
  // weight 0. The rows of each weight are divided into as few blocks of at most most(rows) rows as possible, of nearly
  // equal sizes.
  template <class Most>
  void divide(int64_t m, const int32_t* starts, int64_t weights, const Most& most) {
    Block* blocks = blocks_.of(m);
    Share* shares = shares_.of(weights);
    num_blocks_ = num_shares_ = 0;
    for (int64_t weight = 0; weight < weights; ++weight) {
      const int64_t start = starts == nullptr ? 0 : starts[weight];
      const int64_t rows = starts == nullptr ? m : starts[weight + 1] - start;
      if (rows == 0) continue;
      const int64_t count = (rows + most(rows) - 1) / most(rows);
      shares[num_shares_++] = {weight, rows, num_blocks_, num_blocks_ + count};
      for (int64_t i = 0; i < count; ++i) {
        const int64_t first = rows * i / count;
        blocks[num_blocks_++] = {start + first, rows * (i + 1) / count - first};
      }
    }
    all_blocks_ = blocks;
    all_shares_ = shares;
  }

  int64_t count() const { return num_blocks_; }
  int64_t num_shares() const { return num_shares_; }
  const Block& operator[](int64_t block) const { return all_blocks_[block]; }

  // Calls body(share, part) for parts of the `tiles` tiles of the weight of each share. A part has at least `worth`
  // tiles, so that it is enough work to be worth running on another thread.
  template <class Body>
  void for_tiles(int64_t tiles, int64_t worth, int64_t threads, const Body& body) const {
    const int64_t even = num_shares_ * tiles / (kPartsOfThread * threads);
    const int64_t grain = std::min(std::max({worth, even, int64_t(1)}), tiles);
    const int64_t parts = (tiles + grain - 1) / grain;
    parallel_for(num_shares_ * parts, threads, [&](int64_t item) {
      const int64_t begin = item % parts * grain, end = std::min(begin + grain, tiles);
      body(all_shares_[item / parts], Tiles{begin, end, begin + threads * grain});
    });
  }

 private:
  Scratch<Block> blocks_;
  Scratch<Share> shares_;
  const Block* all_blocks_ = nullptr;
  const Share* all_shares_ = nullptr;
  int64_t num_blocks_ = 0, num_shares_ = 0;
};
