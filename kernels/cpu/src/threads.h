// A pool that hands out chunks dynamically and never waits for a thread that holds none.
//
// A worker that the operating system has set aside (the server's own threads share the cores) delays a
// phase only while it is inside a chunk; the others take the rest. Idle workers spin for a bounded time,
// then sleep on the ticket's futex.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "time_slice.h"

#if defined(__x86_64__)
#include <immintrin.h>
static inline void cpu_relax() { _mm_pause(); }
#else
static inline void cpu_relax() {}
#endif

class ThreadPool {
 public:
  using Task = void (*)(void* context, int64_t chunk);

  ~ThreadPool() { resize(1); }

  // Threads that work on a phase, the calling one included.
  void resize(int num_threads) {
    stopping_.store(true);
    bump();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false);
    for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this] { work(); });
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Run fn(chunk) for every chunk in [0, num_chunks); returns when all are done.
  template <class Fn>
  void run(int64_t num_chunks, Fn&& fn) {
    thread_local const bool has_long_slice = take_long_slice();
    (void)has_long_slice;
    if (num_chunks <= 1 || workers_.empty()) {
      for (int64_t i = 0; i < num_chunks; ++i) fn(i);
      return;
    }
    // While the ticket is closed (next chunk = kClosed) nobody takes a chunk, so the task may change.
    const uint64_t generation = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store(generation << 32 | kClosed, std::memory_order_seq_cst);
    task_.store([](void* context, int64_t chunk) { (*static_cast<std::remove_reference_t<Fn>*>(context))(chunk); },
                std::memory_order_relaxed);
    context_.store(&fn, std::memory_order_relaxed);
    num_chunks_.store(static_cast<uint32_t>(num_chunks), std::memory_order_relaxed);
    num_done_.store(0, std::memory_order_relaxed);
    ticket_.store((generation + 1) << 32, std::memory_order_seq_cst);
    if (num_asleep_.load(std::memory_order_seq_cst) > 0) ticket_.notify_all();
    take_chunks();
    while (num_done_.load(std::memory_order_acquire) != static_cast<uint32_t>(num_chunks)) cpu_relax();
  }

 private:
  static constexpr uint64_t kClosed = 0xffffffffu;
  static constexpr int kSpins = 4000;  // about 100 microseconds

  void bump() {
    ticket_.store(((ticket_.load() >> 32) + 1) << 32 | kClosed);
    ticket_.notify_all();
  }

  // Work on the open task until no chunk is left.
  void take_chunks() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (true) {
      const uint64_t next = ticket & 0xffffffffu;
      const Task task = task_.load(std::memory_order_relaxed);
      void* context = context_.load(std::memory_order_relaxed);
      if (next == kClosed || next >= num_chunks_.load(std::memory_order_relaxed)) return;
      // Success proves that the ticket, hence the task read above, is still this generation's.
      if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
        task(context, static_cast<int64_t>(next));
        num_done_.fetch_add(1, std::memory_order_release);
        ticket = ticket_.load(std::memory_order_acquire);
      }
    }
  }

  void work() {
    take_long_slice();
    while (!stopping_.load(std::memory_order_relaxed)) {
      take_chunks();
      const uint64_t seen = ticket_.load(std::memory_order_acquire);
      if (has_chunks(seen)) continue;
      int spins = 0;
      while (ticket_.load(std::memory_order_relaxed) >> 32 == seen >> 32 && ++spins < kSpins) cpu_relax();
      if (spins < kSpins) continue;
      num_asleep_.fetch_add(1, std::memory_order_seq_cst);
      const uint64_t last = ticket_.load(std::memory_order_seq_cst);
      if (!has_chunks(last) && !stopping_.load()) ticket_.wait(last, std::memory_order_seq_cst);
      num_asleep_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  bool has_chunks(uint64_t ticket) const {
    return (ticket & 0xffffffffu) < num_chunks_.load(std::memory_order_relaxed);
  }

  std::vector<std::thread> workers_;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint64_t> ticket_{kClosed};  // generation << 32 | next chunk
  alignas(64) std::atomic<uint32_t> num_done_{0};
  alignas(64) std::atomic<Task> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<uint32_t> num_chunks_{0};
  std::atomic<int> num_asleep_{0};
};
