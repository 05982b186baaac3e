// Loops over independent items on a few threads that sleep when there is nothing to do.
//
// A team of OpenMP has every thread take its share and waits for all of them: one that the system runs late, because a
// neighbour needs its core, holds up all others. Here items are taken one at a time from a counter, the caller takes
// them too, and it waits only for items that another thread has begun. A thread that comes late finds nothing left.
// One that found the counter at its end looks for the next loop for some microseconds before it sleeps.
#pragma once

#include <algorithm>
#include <cstdint>

using Task = void (*)(const void* context, int64_t item);

// Calls `task` for the items 0..count-1 on at most `num_threads` threads, the caller being one, and returns when all
// are done. Calls from two threads at once are safe: the second one works alone.
void run_parallel(int64_t count, int64_t num_threads, Task task, const void* context);

template <class Body>
void parallel_for(int64_t count, int64_t num_threads, const Body& body) {
  run_parallel(
      count, num_threads, [](const void* context, int64_t item) { (*static_cast<const Body*>(context))(item); }, &body);
}

// Parts for each thread, where there is much work: with many more, giving them out takes longer than computing them.
constexpr int64_t kPartsOfThread = 8;

// Calls body(begin, end) for parts of 0..count-1. A part has at least `least` items, which is work worth another
// thread's taking.
template <class Body>
void parallel_ranges(int64_t count, int64_t least, int64_t num_threads, const Body& body) {
  const int64_t grain = std::max(least, count / (kPartsOfThread * num_threads));
  parallel_for((count + grain - 1) / grain, num_threads, [&](int64_t part) {
    int64_t end = (part + 1) * grain;
    body(part * grain, end < count ? end : count);
  });
}
