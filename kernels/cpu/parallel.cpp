#include "parallel.h"

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

// Short enough that waiting costs a busy neighbour nothing, long enough for an item that is nearly done.
constexpr int kSpins = 2000;
// Some 20 us: calls of a recorded step follow each other sooner, and to wake a sleeping thread takes longer.
constexpr int kIdleSpins = 600;
// Some 100 us of offering the core to others: calls of a step that is not recorded follow each other like this.
constexpr int kIdleYields = 300;
constexpr uint64_t kClosed = 0xffffffff;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One job at a time. `ticket_` is the number of the job in its upper half and the next item in its lower half, so that
// an item is taken only of the job whose description was read: a thread that is late fails to take it and never
// touches what belongs to the caller of a job that has ended.
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
      { std::lock_guard<std::mutex> lock(mutex_); }  // who has seen no job yet is in wait() by now
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
  // Threads are never dismissed: they sleep. In a forked child there are none, and the caller does everything.
  void hire(int64_t wanted) {
    for (; num_workers_ < wanted; ++num_workers_) std::thread([this] { work(); }).detach();
  }

  void work() {
    uint64_t seen = 0;  // the job that was looked at last; one that is not open yet is still to come
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
  static Pool* pool = new Pool;  // never deleted: its threads may sleep in it when the process ends
  pool->run(count, num_threads, task, context);
}
