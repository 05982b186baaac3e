#include "parallel.h"

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

// Spins of the caller before it yields: few enough to cost other busy processes nothing, enough for an item that is
// nearly done.
constexpr int kSpins = 2000;
// Spins of an idle thread, some 20 us: the calls of a recorded step follow each other faster than that, and waking a
// sleeping thread takes longer.
constexpr int kIdleSpins = 600;
// Yields of an idle thread after its spins, some 100 us: calls of a step that is not recorded follow each other within
// that time.
constexpr int kIdleYields = 300;
constexpr uint64_t kClosed = 0xffffffff;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Runs one job at a time. `ticket_` has the number of the job in its upper half and the next item in its lower half, so
// that a thread takes an item only from the job whose task, context and count it has read. A late thread fails to take
// an item, and so never uses memory of the caller of a job that has ended.
class Pool {
 public:
  void run(int64_t count, int64_t num_threads, Task task, const void* context) {
    std::unique_lock<std::mutex> running(running_, std::defer_lock);
    if (count < 2 || num_threads < 2 || count >= int64_t(kClosed) || !running.try_lock()) {
      for (int64_t item = 0; item < count; ++item) task(context, item);
      return;
    }
    hire((count < num_threads ? count : num_threads) - 1);
    const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(job << 32 | kClosed, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(job << 32, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }  // a thread that saw no job is in wait() once this lock is taken
      wake_.notify_all();
    }
    take_items();
    for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  // Threads never end; they sleep. A forked child has none of them, and there the caller executes all items.
  void hire(int64_t wanted) {
    for (; num_workers_ < wanted; ++num_workers_) std::thread([this] { work(); }).detach();
  }

  void work() {
    uint64_t seen = 0;  // the last job that this thread found open
    const auto has_job = [&] {
      const uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
      if (ticket >> 32 == seen || (ticket & kClosed) == kClosed) return false;
      seen = ticket >> 32;
      return true;
    };
    const auto has_job_soon = [&] {
      for (int spins = 0; spins < kIdleSpins; ++spins, pause()) {
        if (has_job()) return true;
      }
      for (int yields = 0; yields < kIdleYields; ++yields, sched_yield()) {
        if (has_job()) return true;
      }
      return false;
    };
    for (;;) {
      if (!has_job_soon()) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, has_job);
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
      }
      take_items();
    }
  }

  void take_items() {
    for (;;) {
      uint64_t ticket = ticket_.load(std::memory_order_acquire);
      const Task task = task_.load(std::memory_order_relaxed);
      const void* context = context_.load(std::memory_order_relaxed);
      const int64_t count = count_.load(std::memory_order_relaxed);
      std::atomic_thread_fence(std::memory_order_acquire);
      const int64_t item = int64_t(ticket & kClosed);
      if (item >= count || item == int64_t(kClosed)) return;
      if (!ticket_.compare_exchange_strong(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
      task(context, item);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  std::mutex running_;
  std::mutex mutex_;
  std::condition_variable wake_;
  int64_t num_workers_ = 0;
  std::atomic<int> asleep_{0};
  alignas(64) std::atomic<uint64_t> ticket_{0};
  std::atomic<Task> task_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> count_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace

void run_parallel(int64_t count, int64_t num_threads, Task task, const void* context) {
  static Pool* pool = new Pool;  // never deleted, because its threads may sleep in it when the process ends
  pool->run(count, num_threads, task, context);
}
