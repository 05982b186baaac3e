// Memory that a thread keeps from one call to the next, because the system would have to zero new memory for each call.
#pragma once

#include <cstdint>
#include <memory>

template <class T>
class Scratch {
 public:
  // Returns room for `count` elements, whose values are undefined.
  T* of(int64_t count) {
    if (count > count_) {
      data_.reset();
      data_.reset(new T[count]);
      count_ = count;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<T[]> data_;
  int64_t count_ = 0;
};
