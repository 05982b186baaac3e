// Loops over independent items on a few threads, which sleep when there is no loop to run.
//
// With OpenMP every thread of a team gets a share, and the team waits for all threads: a thread that the system
// schedules late, because another process needs its core, delays all others. Here threads take items one at a time from
// a counter, the caller takes items too, and it waits only for items that another thread has begun. A thread that
// arrives late finds no items left. A thread that finds no item polls for the next loop for some microseconds before it
// sleeps.
#pragma once

#include <algorithm>
#include <cstdint>

using Task = void (*)(const void* context, int64_t item);

// Calls `task` for the items 0..count-1 on at most `num_threads` threads, one of which is the caller, and returns when
// all are done. Concurrent calls from two threads are safe: the second caller executes its items alone.
void run_parallel(int64_t count, int64_t num_threads, Task task, const void* context);

template <class Body>
void parallel_for(int64_t count, int64_t num_threads, const Body& body) {
  run_parallel(
      count, num_threads, [](const void* context, int64_t item) { (*static_cast<const Body*>(context))(item); }, &body);
}

// Parts per thread for large loops. With many more parts, distributing them takes longer than computing them.
constexpr int64_t kPartsOfThread = 8;

// Calls body(begin, end) for parts of 0..count-1. A part has at least `least` items, so that it is enough work to be
// worth running on another thread.
template <class Body>
void parallel_ranges(int64_t count, int64_t least, int64_t num_threads, const Body& body) {
  const int64_t grain = std::max(least, count / (kPartsOfThread * num_threads));
  parallel_for((count + grain - 1) / grain, num_threads, [&](int64_t part) {
    int64_t end = (part + 1) * grain;
    body(part * grain, end < count ? end : count);
  });
}
