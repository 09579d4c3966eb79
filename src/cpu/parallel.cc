// SPDX-License-Identifier: MIT
// A pool of threads of the library's own.
//
// Not OpenMP: a libgomp worker without work spins for milliseconds, on a core that the
// caller's next step (a matrix product on the threads of a BLAS, say) then waits for.  Here a
// worker spins for about as long as it takes to wake one up, then sleeps.
#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace ssmk::cpu {
namespace {

// Below this much work a second thread costs more to wake than it saves (about 5 us).
constexpr int64_t kWorthThreads = 32768;
constexpr int kMaxThreads = 256;
constexpr int kSpins = 500;  // about 12 us of pauses on x86, less elsewhere

std::atomic<int> chosen{0};

int default_threads() {
  if (const char *text = std::getenv("OMP_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n > 0) return std::min(n, kMaxThreads);
  }
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    return std::clamp(CPU_COUNT(&set), 1, kMaxThreads);
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  // One caller has the pool at a time; another one (or a nested call) works alone.
  bool try_run(int threads, int64_t ntasks, void (*task)(void *, int64_t, int), void *context) {
    std::unique_lock<std::mutex> lock(in_use_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    add_workers(threads - 1);

    task_ = task, context_ = context, ntasks_ = ntasks, helpers_ = threads - 1;
    // Tasks are handed out in runs: asking for one can cost more than a small task (0.5 us where
    // two cores contend for the counter), while eight runs a thread still even out a slow one.
    run_ = std::max<int64_t>(1, ntasks / (8 * threads));
    next_.store(0, std::memory_order_relaxed);
    open_.store(true);
    announce();
    drain(0);

    // A worker that enters from now on finds the job closed; wait for those inside.
    open_.store(false);
    for (int spins = 0; inside_.load() != 0; ++spins)
      spins < kSpins ? relax() : std::this_thread::yield();
    return true;
  }

 private:
  void announce() {
    bool sleepers;
    {
      std::lock_guard<std::mutex> lock(sleep_);
      job_.store(job_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
      sleepers = sleeping_ > 0;
    }
    if (sleepers) wake_.notify_all();
  }

  void add_workers(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_)
        std::thread(&Pool::work, this, workers_, job_.load()).detach();
    } catch (const std::system_error &) {
      // No more threads to be had: those that run, and this one, do it all.
    }
  }

  void work(int index, uint64_t seen) {
    for (;;) {
      seen = wait_for_job(seen);
      // Entering before looking: the caller closes before it looks who is inside (both sequentially
      // consistent), so either this sees a closed job or the caller waits.
      inside_.fetch_add(1);
      if (open_.load() && index < helpers_) drain(index + 1);
      inside_.fetch_sub(1);
    }
  }

  uint64_t wait_for_job(uint64_t seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      const uint64_t job = job_.load(std::memory_order_acquire);
      if (job != seen) return job;
      relax();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    ++sleeping_;
    wake_.wait(lock, [&] { return job_.load(std::memory_order_relaxed) != seen; });
    --sleeping_;
    return job_.load(std::memory_order_relaxed);
  }

  void drain(int worker) {
    for (int64_t i; (i = next_.fetch_add(run_, std::memory_order_relaxed)) < ntasks_;)
      for (const int64_t end = std::min(i + run_, ntasks_); i < end; ++i)
        task_(context_, i, worker);
  }

  // The job; written by the caller that has the pool while it is closed and nobody is inside.
  void (*task_)(void *, int64_t, int) = nullptr;
  void *context_ = nullptr;
  int64_t ntasks_ = 0, run_ = 1;
  int helpers_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};

  alignas(64) std::atomic<bool> open_{false};
  std::atomic<int> inside_{0};
  std::atomic<uint64_t> job_{0};

  std::mutex in_use_, sleep_;
  std::condition_variable wake_;
  int workers_ = 0;   // guarded by in_use_
  int sleeping_ = 0;  // guarded by sleep_
};

// Never destroyed: its threads sleep on it until the process ends.  A forked child has none of
// them, and makes a pool of its own; it keeps the other one, which is not a leak.
std::atomic<Pool *> pool{nullptr}, left_by_parent{nullptr};
#ifndef _WIN32
const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { left_by_parent.store(pool.exchange(nullptr)); });
#endif

Pool &the_pool() {
  Pool *p = pool.load(std::memory_order_acquire);
  if (p) return *p;
  Pool *made = new Pool;
  if (pool.compare_exchange_strong(p, made)) return *made;
  delete made;
  return *p;
}

}  // namespace

int num_threads() {
  const int n = chosen.load(std::memory_order_relaxed);
  if (n > 0) return n;
  static const int fallback = default_threads();
  return fallback;
}

void set_num_threads(int n) {
  chosen.store(n <= 0 ? 0 : std::min(n, kMaxThreads), std::memory_order_relaxed);
}

void parallel_for(int64_t ntasks, int64_t work, int workers, void (*task)(void *, int64_t, int),
                  void *context) {
  const int threads = static_cast<int>(std::min<int64_t>(std::min(num_threads(), workers), ntasks));
  if (threads > 1 && work >= kWorthThreads && the_pool().try_run(threads, ntasks, task, context))
    return;
  for (int64_t i = 0; i < ntasks; ++i) task(context, i, 0);
}

}  // namespace ssmk::cpu
